// Reads the weights of stacked layers from a file in safetensors format, as Session.export in
// fastrnn/session.py writes it:
//
//   8 bytes      N, the size of the header, little endian
//   N bytes      JSON: {"__metadata__": {"cell": "lstm", ...},
//                       "weight_ih_l0": {"dtype": "F32", "shape": [G*H, I],
//                                        "data_offsets": [begin, end]}, ...}
//                      A learned initial state is h_0 [L, 1, R] and, if the cell has c, c_0.
//   the rest     the tensors; offsets count from here
//
// The content may be damaged or hostile: every size and offset is checked.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/packed_stack.h"

namespace fastrnn::c {

// The file cannot be read.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The content is not a model.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Model {
  cpu::StackShape shape;                     // one direction
  std::vector<LayerWeights<float>> weights;  // [L], they point into values
  // The learned initial states [L, 1, R] and [L, 1, H], which point into values; null: zero.
  const float* h0;
  const float* c0;
  std::vector<float> values;
};

// Throws FileError.
std::vector<char> read_file(const char* path);
// Throws FormatError.
Model parse_model(const char* data, std::size_t size);

}  // namespace fastrnn::c
