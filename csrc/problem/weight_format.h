// The formats in which a kernel can hold the weights that it multiplies with.
#pragma once

#include <cstdint>

namespace fastrnn {

enum class WeightFormat {
  kNative,   // the type that the kernel computes in
  kFloat16,  // rounded to the nearest float16: half the bytes of float32
  // Chosen by the dtype of the layer, never by a caller:
  kBfloat16Pairs,  // bfloat16, two values along K side by side; then all matrices have it
  kBfloat16Tiles,  // the same for AMX: the depth of a panel is a multiple of a tile's
};

struct WeightFormatInfo {
  const char* name;
  int value_bytes;  // of one weight, 0: those of the type that the kernel computes in
};

// By WeightFormat.
constexpr WeightFormatInfo kWeightFormats[] = {
    {"native", 0}, {"float16", 2}, {"bfloat16", 2}, {"bfloat16_tiles", 2}};
// Number of formats that a caller may allow.
constexpr int kWeightFormatCount = int(WeightFormat::kBfloat16Pairs);

constexpr const WeightFormatInfo& weight_format_info(WeightFormat format) {
  return kWeightFormats[int(format)];
}

// Bytes of one weight of a kernel whose own values have `element_bytes`.
constexpr int weight_bytes(WeightFormat format, int element_bytes) {
  const int bytes = weight_format_info(format).value_bytes;
  return bytes > 0 ? bytes : element_bytes;
}

// Whether kernels with this format have tensors of bfloat16.
constexpr bool is_bfloat16(WeightFormat format) { return format >= WeightFormat::kBfloat16Pairs; }

// Rows of a panel that holds k weights of each unit. In bfloat16 a row holds two of them.
constexpr std::int64_t panel_rows(WeightFormat format, std::int64_t k) {
  constexpr std::int64_t kTile = 16;
  return format == WeightFormat::kBfloat16Tiles   ? (k + 2 * kTile - 1) / (2 * kTile) * kTile
         : format == WeightFormat::kBfloat16Pairs ? (k + 1) / 2
                                                  : k;
}

// A set of formats.
class WeightFormats {
 public:
  template <class... Formats>
  constexpr explicit WeightFormats(Formats... formats) : bits_(((1u << int(formats)) | ...)) {}
  constexpr bool has(WeightFormat format) const { return (bits_ >> int(format) & 1u) != 0; }

 private:
  unsigned bits_;
};

}  // namespace fastrnn
