#include "c/model_file.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <utility>

namespace fastrnn::c {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little endian");

constexpr std::size_t kMostHeader = std::size_t(1) << 20;  // bytes
constexpr std::size_t kMostDimensions = 8;
constexpr std::uint64_t kMostSize = std::uint64_t(1) << 24;  // of I, H, P and L

using Shape = std::vector<std::uint64_t>;

struct Tensor {
  std::string dtype;
  Shape shape;
  std::uint64_t begin = 0, end = 0;  // bytes
};

struct Header {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;
};

// JSON of exactly the depth that a header has, so no recursion.
class HeaderParser {
 public:
  HeaderParser(const char* begin, const char* end) : at_(begin), end_(end) {}

  Header parse() {
    Header header;
    bool has_metadata = false;
    each_member([&](const std::string& name) {
      if (name == "__metadata__") {
        if (std::exchange(has_metadata, true)) fail("__metadata__ twice");
        each_member([&](const std::string& key) {
          if (!header.metadata.emplace(key, text()).second) fail("a name twice");
        });
      } else if (!header.tensors.emplace(name, tensor()).second) {
        fail("a name twice");
      }
    });
    skip_space();
    if (at_ != end_) fail("something after its end");
    return header;
  }

 private:
  [[noreturn]] static void fail(const char* what) {
    throw FormatError(std::string("the header has ") + what);
  }

  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }
  // Whether the next character, after space, is this one; if so, skips it.
  bool next_is(char expected) {
    skip_space();
    if (at_ == end_ || *at_ != expected) return false;
    ++at_;
    return true;
  }
  void expect(char expected) {
    if (!next_is(expected)) fail("a syntax error");
  }

  // Calls body(name) at the value of each member of an object.
  template <class Body>
  void each_member(const Body& body) {
    expect('{');
    if (next_is('}')) return;
    do {
      const std::string name = text();
      expect(':');
      body(name);
    } while (next_is(','));
    expect('}');
  }
  // Calls body() at each value of an array.
  template <class Body>
  void each_value(const Body& body) {
    expect('[');
    if (next_is(']')) return;
    do {
      body();
    } while (next_is(','));
    expect(']');
  }

  char character() {
    if (at_ == end_) fail("a text without end");
    return *at_++;
  }
  std::string text() {
    expect('"');
    std::string result;
    for (char c = character(); c != '"'; c = character()) {
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a text");
      result.push_back(c == '\\' ? escaped(result) : c);
    }
    return result;
  }
  // The last character of an escape sequence; adds those before it. No name that is looked for has
  // an escape sequence, so \u stays as it is.
  char escaped(std::string& result) {
    const char c = character();
    if (c == '"' || c == '\\' || c == '/') return c;
    if (c == 'b') return '\b';
    if (c == 'f') return '\f';
    if (c == 'n') return '\n';
    if (c == 'r') return '\r';
    if (c == 't') return '\t';
    if (c != 'u') fail("an unknown escape sequence");
    result += "\\u";
    for (int i = 0; i < 4; ++i) {
      const char digit = character();
      const bool is_hex = (digit >= '0' && digit <= '9') || (digit >= 'a' && digit <= 'f') ||
                          (digit >= 'A' && digit <= 'F');
      if (!is_hex) fail("an unknown escape sequence");
      if (i == 3) return digit;
      result.push_back(digit);
    }
    return c;
  }

  std::uint64_t number() {
    skip_space();
    if (at_ == end_ || *at_ < '0' || *at_ > '9') fail("no whole number where one must be");
    const bool leads_with_zero = *at_ == '0';
    const char* const first = at_;
    std::uint64_t value = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      if (value > (std::numeric_limits<std::uint64_t>::max() >> 4)) fail("too large a number");
      value = value * 10 + std::uint64_t(*at_ - '0');
    }
    if (leads_with_zero && at_ - first > 1) fail("a number that begins with 0");
    return value;
  }

  Tensor tensor() {
    Tensor result;
    bool has_dtype = false, has_shape = false, has_offsets = false;
    each_member([&](const std::string& name) {
      if (name == "dtype" && !std::exchange(has_dtype, true)) {
        result.dtype = text();
      } else if (name == "shape" && !std::exchange(has_shape, true)) {
        each_value([&] {
          if (result.shape.size() == kMostDimensions) fail("a tensor of too many dimensions");
          result.shape.push_back(number());
        });
      } else if (name == "data_offsets" && !std::exchange(has_offsets, true)) {
        expect('[');
        result.begin = number();
        expect(',');
        result.end = number();
        expect(']');
      } else {
        fail("an unknown or repeated member of a tensor");
      }
    });
    if (!has_dtype || !has_shape || !has_offsets) fail("a tensor without a type, shape or place");
    return result;
  }

  const char* at_;
  const char* const end_;
};

// What the metadata says about the layers.
class Metadata {
 public:
  explicit Metadata(const std::map<std::string, std::string>& values) : values_(values) {}

  const std::string& text(const char* name) const {
    const auto found = values_.find(name);
    if (found == values_.end())
      throw FormatError(std::string("__metadata__ has no ") + name +
                        "; write the file with fastrnn's Session.export");
    return found->second;
  }
  std::int64_t size(const char* name, std::uint64_t least) const {
    const std::string& value = text(name);
    std::uint64_t number = 0;
    for (const char digit : value) {
      if (digit < '0' || digit > '9' || number >= kMostSize) fail(name);
      number = number * 10 + std::uint64_t(digit - '0');
    }
    if (value.empty() || number < least || number >= kMostSize) fail(name);
    return std::int64_t(number);
  }
  bool is_true(const char* name) const {
    const std::string& value = text(name);
    if (value != "true" && value != "false") fail(name);
    return value == "true";
  }
  [[noreturn]] static void fail(const char* name) {
    throw FormatError(std::string("__metadata__ has an invalid ") + name);
  }

 private:
  const std::map<std::string, std::string>& values_;
};

const CellInfo& find_cell(const std::string& name) {
  for (const CellInfo& info : kCells)
    if (name == info.name && cpu::StackShape::supports(info)) return info;
  Metadata::fail("cell");
}

// Takes tensors out of a file by name.
class Tensors {
 public:
  Tensors(std::map<std::string, Tensor> tensors, const std::vector<float>& values)
      : tensors_(std::move(tensors)), values_(values) {}

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  const float* take(const std::string& name, const Shape& shape) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw FormatError("the file has no " + name);
    const Tensor tensor = std::move(found->second);
    tensors_.erase(found);
    if (tensor.dtype != "F32") throw FormatError(name + " must have the type F32");
    if (tensor.shape != shape)
      throw FormatError(name + " does not have the shape that follows from __metadata__");
    std::uint64_t bytes = sizeof(float);
    for (const std::uint64_t size : shape) bytes *= size;  // below 4 * 4 * 2^24 * 2^24
    const std::uint64_t all = values_.size() * sizeof(float);
    if (tensor.begin % sizeof(float) != 0 || tensor.begin > tensor.end || tensor.end > all ||
        tensor.end - tensor.begin != bytes)
      throw FormatError("the place of " + name + " is not valid");
    return values_.data() + tensor.begin / sizeof(float);
  }
  void check_all_taken() const {
    if (!tensors_.empty())
      throw FormatError("the file has a tensor that the cell does not: " + tensors_.begin()->first);
  }

 private:
  std::map<std::string, Tensor> tensors_;
  const std::vector<float>& values_;
};

}  // namespace

std::vector<char> read_file(const char* path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
  if (file == nullptr) throw FileError("the file cannot be opened");
  if (std::fseek(file.get(), 0, SEEK_END) != 0) throw FileError("the path is not that of a file");
  const long size = std::ftell(file.get());
  // The size of a folder is reported as the largest number.
  if (size < 0 || size == std::numeric_limits<long>::max())
    throw FileError("the path is not that of a file");
  std::rewind(file.get());
  std::vector<char> content(static_cast<std::size_t>(size));
  if (std::fread(content.data(), 1, content.size(), file.get()) != content.size())
    throw FileError("the file cannot be read");
  return content;
}

Model parse_model(const char* data, std::size_t size) {
  std::uint64_t header_size = 0;
  if (size < sizeof(header_size)) throw FormatError("the file is shorter than 8 bytes");
  std::memcpy(&header_size, data, sizeof(header_size));
  const std::size_t rest = size - sizeof(header_size);
  if (header_size > rest) throw FormatError("the file is shorter than its header");
  if (header_size > kMostHeader) throw FormatError("the header is larger than 1 MiB");
  const char* const begin = data + sizeof(header_size);
  const char* const values = begin + header_size;
  Header header = HeaderParser(begin, values).parse();

  const Metadata metadata(header.metadata);
  // Version 2 has one more entry, "residual".
  const std::string& version = metadata.text("fastrnn");
  if (version != "1" && version != "2")
    throw FormatError("the file has another version of the format than 1 and 2");
  Model model{};
  model.values.resize((rest - header_size) / sizeof(float));
  if (!model.values.empty())
    std::memcpy(model.values.data(), values, model.values.size() * sizeof(float));
  Tensors tensors(std::move(header.tensors), model.values);

  const CellInfo& cell = find_cell(metadata.text("cell"));
  const std::int64_t layers = metadata.size("num_layers", 1);
  model.shape = {cell.kind,
                 int(layers),
                 1,
                 metadata.size("input_size", 1),
                 metadata.size("hidden_size", 1),
                 metadata.size("proj_size", 0),
                 version == "2" && metadata.is_true("residual")};
  const bool bias = metadata.is_true("bias");
  if (model.shape.proj_size > 0 && !cell.projects) Metadata::fail("proj_size");
  const auto hidden = std::uint64_t(model.shape.hidden_size);
  const auto out = std::uint64_t(model.shape.output_size());
  const std::uint64_t rows = std::uint64_t(cell.gates) * hidden;
  for (std::int64_t layer = 0; layer < layers; ++layer) {  // ends at the first one that is missing
    const std::string l = "_l" + std::to_string(layer);
    const std::uint64_t inputs = layer == 0 ? std::uint64_t(model.shape.input_size) : out;
    LayerWeights<float> own{};
    own.w_ih = tensors.take("weight_ih" + l, {rows, inputs});
    own.w_hh = tensors.take("weight_hh" + l, {rows, out});
    own.b_ih = bias ? tensors.take("bias_ih" + l, {rows}) : nullptr;
    own.b_hh = bias ? tensors.take("bias_hh" + l, {rows}) : nullptr;
    if (model.shape.proj_size > 0) own.w_hr = tensors.take("weight_hr" + l, {out, hidden});
    own.w_ih_stride = std::int64_t(inputs);
    own.w_hh_stride = std::int64_t(out);
    own.w_hr_stride = std::int64_t(hidden);
    model.weights.push_back(own);
  }
  const auto depth = std::uint64_t(layers);
  if (tensors.has("h_0")) {
    model.h0 = tensors.take("h_0", {depth, 1, out});
    if (model.shape.has_cell_state()) model.c0 = tensors.take("c_0", {depth, 1, hidden});
  }
  tensors.check_all_taken();
  return model;
}

}  // namespace fastrnn::c
