// Packed weight panels. A block is U = vectors * V neighbouring units with all their gates; its
// panel holds, for each k, the weights of those units side by side: [K][gates][U], zero beyond the
// last unit.

// gate_rows = true: weights [gates*units, K], a unit is a row (products with w^T: forward).
// gate_rows = false: weights [K, units], a unit is a column (products with w: backward), gates = 1.
template <class T>
struct PanelSource {
  const T* weights;
  std::int64_t stride;  // of a row
  bool unit_is_row;
  int gates;
  std::int64_t units, k_count;
};

template <class T>
void pack_panel(const PanelSource<T>& source, std::int64_t block, std::int64_t block_units,
                T* panel) {
  const std::int64_t first = block * block_units;
  const std::int64_t present = std::min(block_units, source.units - first);
  const std::int64_t width = source.gates * block_units;
  if (!source.unit_is_row) {
    for (std::int64_t k = 0; k < source.k_count; ++k) {
      const T* from = source.weights + k * source.stride + first;
      T* to = panel + k * width;
      for (std::int64_t u = 0; u < present; ++u) to[u] = from[u];
      for (std::int64_t u = present; u < block_units; ++u) to[u] = T(0);
    }
    return;
  }
  // A transposition: in strips of k, so that the lines written stay in L1 until they are full.
  constexpr std::int64_t kStrip = 16;
  for (std::int64_t k0 = 0; k0 < source.k_count; k0 += kStrip) {
    const std::int64_t k1 = std::min(k0 + kStrip, source.k_count);
    for (int gate = 0; gate < source.gates; ++gate) {
      for (std::int64_t u = 0; u < block_units; ++u) {
        T* to = panel + gate * block_units + u;
        const T* from = source.weights + (gate * source.units + first + u) * source.stride;
        for (std::int64_t k = k0; k < k1; ++k) to[k * width] = u < present ? from[k] : T(0);
      }
    }
  }
}

// columns[i]: where vector i of a panel goes in a row of the tile, gate g at pre[g].
struct Columns {
  int at[kTileVectors];
  FASTRNN_INLINE Columns(const int* pre, int gates, int vectors, int lanes) {
    for (int g = 0; g < gates; ++g)
      for (int u = 0; u < vectors; ++u) at[g * vectors + u] = (pre[g] * vectors + u) * lanes;
  }
};
