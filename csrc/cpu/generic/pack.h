// Pack<T>: one vector of the instruction set at hand, as a value type for the cells' text
// (csrc/cells/math.h says what a value type brings). Built on the compiler's vector extension, so
// the same lines make SSE2, AVX2, AVX-512 and NEON code.

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef std::int32_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef std::int64_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};

template <class T>
struct Pack {
  using Real = T;
  using Vector = typename VectorOf<T>::Type;
  using BitVector = typename VectorOf<T>::Bits;
  static constexpr int kLanes = FASTRNN_VECTOR_BYTES / int(sizeof(T));

  Vector v;

  Pack() = default;
  FASTRNN_INLINE Pack(Vector vector) : v(vector) {}
  explicit FASTRNN_INLINE Pack(T scalar) : v(scalar - Vector{}) {}

  static FASTRNN_INLINE Pack load(const T* from) {
    Pack p;
    __builtin_memcpy(&p.v, from, sizeof(p.v));
    return p;
  }
  FASTRNN_INLINE void store(T* to) const { __builtin_memcpy(to, &v, sizeof(v)); }

  // The first `lanes` lanes only; the others read as 0 and are not written.
  static FASTRNN_INLINE Pack load(const T* from, std::int64_t lanes) {
    if (lanes >= kLanes) return load(from);
    Pack p{T(0)};
    for (std::int64_t i = 0; i < lanes; ++i) p.v[i] = from[i];
    return p;
  }
  FASTRNN_INLINE void store(T* to, std::int64_t lanes) const {
    if (lanes >= kLanes) return store(to);
    for (std::int64_t i = 0; i < lanes; ++i) to[i] = v[i];
  }

  FASTRNN_INLINE T total() const {
    T lane[kLanes];
    store(lane);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

  friend FASTRNN_INLINE Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  friend FASTRNN_INLINE Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  friend FASTRNN_INLINE Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  friend FASTRNN_INLINE Pack operator/(Pack a, Pack b) { return a.v / b.v; }
  friend FASTRNN_INLINE Pack operator-(Pack a) { return -a.v; }
  friend FASTRNN_INLINE BitVector operator>(Pack a, Pack b) { return a.v > b.v; }
  friend FASTRNN_INLINE Pack select(BitVector mask, Pack a, Pack b) { return mask ? a.v : b.v; }
  friend FASTRNN_INLINE Pack power_of_two(Pack shifted) {
    BitVector bits;
    __builtin_memcpy(&bits, &shifted.v, sizeof(bits));
    bits = (bits + cells::Format<T>::kExponentBias) << cells::Format<T>::kMantissaBits;
    Pack p;
    __builtin_memcpy(&p.v, &bits, sizeof(bits));
    return p;
  }
};
