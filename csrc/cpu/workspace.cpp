#include "workspace.h"

#include <algorithm>
#include <new>
#include <utility>

namespace fastrnn::cpu {
namespace {

constexpr std::size_t kKeptBytes = std::size_t(128)
                                   << 20;  // a larger block goes back after its call
constexpr std::align_val_t kAlignment{64};

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { release(); }

  void release() {
    if (data != nullptr) ::operator delete(data, kAlignment);
    data = nullptr;
    bytes = 0;
  }
};

thread_local Block kept;

}  // namespace

Workspace::Workspace(std::size_t bytes) {
  if (kept.bytes < bytes) {
    kept.release();
    kept.data = ::operator new(std::max<std::size_t>(bytes, 64), kAlignment);
    kept.bytes = bytes;
  }
  data_ = std::exchange(kept.data, nullptr);
  bytes_ = std::exchange(kept.bytes, 0);
}

Workspace::~Workspace() {
  if (kept.data != nullptr || bytes_ > kKeptBytes) {
    ::operator delete(data_, kAlignment);
  } else {
    kept.data = data_;
    kept.bytes = bytes_;
  }
}

}  // namespace fastrnn::cpu
