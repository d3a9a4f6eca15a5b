// The operators of linear recurrences on CUDA tensors: on the current stream of their device.
#include "cuda/scan/api.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda/math/half.h"
#include "torch/scan_operators.h"

namespace fastrnn {
namespace {

struct ScansOnCuda {
  using Half = cuda::Float16;
  using Brain = cuda::BFloat16;
  struct Guard {
    explicit Guard(const Tensor& t) : device(index_of(t)) {}
    static int32_t index_of(const Tensor& t) {
      FASTRNN_CHECK(t.is_cuda(),
                    "all tensors must be on a CUDA device if one is, got one that is not.");
      return t.get_device_index();
    }
    torch::stable::accelerator::DeviceGuard device;
  };
  static Tensor result(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
    return empty(sizes, dtype, like);
  }
  // The workspace goes back to torch's allocator, which hands it out again in the order of the
  // stream, so nothing has to wait.
  template <class Problem>
  static void run(const Problem& problem, const Tensor& like) {
    if (problem.shape.columns == 0) return;
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    const cuda::ScanPlan plan = cuda::plan_scan(problem);
    const Tensor workspace =
        empty({int64_t(cuda::scan_workspace_bytes(problem, plan))}, ScalarType::Byte, like);
    cuda::run_scan(problem, plan, workspace.data_ptr(), stream);
  }
};

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { FASTRNN_REGISTER_SCANS(m, fastrnn::ScansOnCuda); }
