// The machine that schedules run on: one stream of one GPU.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/machine/grid.h"
#include "cuda/machine/product.h"
#include "cuda/math/fragment.h"

namespace fastrnn::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that later calls do not report it again
  throw std::runtime_error(std::string("fastrnn: CUDA failed to ") + what + ": " +
                           cudaGetErrorString(status) + ".");
}
inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("fastrnn: cuBLAS failed to ") + what + ": " +
                             cublasGetStatusString(status) + ".");
}

template <class Body>
__global__ void __launch_bounds__(kBlockThreads)
    for_each_kernel(const __grid_constant__ Body body, const __grid_constant__ Grid grid) {
  const Element at = element_of(grid, blockIdx.x, threadIdx.x, threadIdx.y);
  if (at.is_inside) body(at.row, at.column);
}

// Values passed as launch arguments: a graph stores them, and no copy has to be waited for.
template <class T>
struct Payload {
  static constexpr int kCount = 3584 / sizeof(T);  // arguments of a launch are limited to 4 KB
  T values[kCount];
};
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    upload_kernel(const __grid_constant__ Payload<T> payload, T* to, int count) {
  for (int i = int(threadIdx.x); i < count; i += kBlockThreads) to[i] = payload.values[i];
}

// A thread of a persistent kernel.
class GpuThread {
 public:
  __device__ unsigned index() const { return threadIdx.x; }
  __device__ unsigned block() const { return blockIdx.x; }
  __device__ char* shared() const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<char*>(memory);
  }
  __device__ void sync() { __syncthreads(); }
  __device__ void sync_warp() { __syncwarp(); }
  __device__ float shuffle_xor(float value, unsigned mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  // Loads from the L2 cache: the L1 cache may not have what other blocks wrote.
  __device__ Quad load(const void* p) {
    Quad quad;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
                 : "l"(p));
    return quad;
  }
  __device__ int uniform(int value) const { return __shfl_sync(0xffffffffu, value, 0); }

#if __CUDA_ARCH__ >= 800
  __device__ void wait(const std::uint64_t* flag, std::uint64_t at_least) {
    std::uint64_t value;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    } while (value < at_least);
  }
  __device__ void publish(std::uint64_t* flag, std::uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
  }

  // d += a b by the whole warp, [16, k] times [k, 8]; k = 8 for TF32, 16 for half types
  template <class S>
  __device__ void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#define FASTRNN_MMA(kind)                                                         \
  asm volatile("mma.sync.aligned." kind                                           \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<S, Float16>)
      FASTRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    else if constexpr (std::is_same_v<S, BFloat16>)
      FASTRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    else
      FASTRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef FASTRNN_MMA
  }
#else  // plans are never persistent on older GPUs
  __device__ void wait(const std::uint64_t*, std::uint64_t) { __trap(); }
  __device__ void publish(std::uint64_t*, std::uint64_t) { __trap(); }
  template <class S>
  __device__ void mma(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2]) {
    __trap();
  }
#endif
};

template <class Body>
__global__ void __launch_bounds__(kWalkThreads, 1) walk_kernel(const __grid_constant__ Body body) {
  GpuThread thread;
  body(thread);
}

template <class S>
constexpr cudaDataType_t kDataType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kDataType<double> = CUDA_R_64F;
template <>
constexpr cudaDataType_t kDataType<Float16> = CUDA_R_16F;
template <>
constexpr cudaDataType_t kDataType<BFloat16> = CUDA_R_16BF;

class Gpu {
 public:
  // cudaStream_t and cublasHandle_t, as in cuda/api.h
  Gpu(void* stream, void* blas)
      : stream_(static_cast<cudaStream_t>(stream)), blas_(static_cast<cublasHandle_t>(blas)) {}

  // cuBLAS is column-major, so it computes c^T [n, m] = w' a^T.
  template <class S, class C>
  void multiply(const Product<S, C>& p) {
    using A = Accumulate<S>;
    if (p.m == 0 || p.n == 0) return;
    if (p.k == 0) {
      if (!p.add)
        check(cudaMemset2DAsync(p.c, p.c_stride * sizeof(C), 0, p.n * sizeof(C), p.m, stream_),
              "clear a product");
      return;
    }
    const A alpha = 1, beta = p.add ? 1 : 0;
    const cublasComputeType_t compute =
        std::is_same_v<A, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    check(cublasGemmEx_64(blas_, p.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, p.n, p.m,
                          p.k, &alpha, p.w, kDataType<S>, p.w_stride, p.a, kDataType<S>, p.a_stride,
                          &beta, p.c, kDataType<C>, p.c_stride, compute, CUBLAS_GEMM_DEFAULT),
          "multiply");
  }

  template <class Body>
  void for_each(std::int64_t rows, std::int64_t columns, const Body& body) {
    if (rows <= 0 || columns == 0) return;
    const Grid grid = grid_for(rows, columns);
    if (grid.blocks > 0x7fffffff)
      throw std::runtime_error("fastrnn: a step must have fewer than 2^31 blocks of units.");
    for_each_kernel<<<unsigned(grid.blocks), dim3(grid.width, grid.height), 0, stream_>>>(body,
                                                                                          grid);
    check(cudaGetLastError(), "launch a kernel");
  }

  void clear(void* memory, std::size_t bytes) {
    check(cudaMemsetAsync(memory, 0, bytes, stream_), "clear memory");
  }

  template <class T>
  void upload(T* to, const T* from, std::size_t count) {
    for (std::size_t begin = 0; begin < count; begin += Payload<T>::kCount) {
      const int part = int(std::min<std::size_t>(count - begin, Payload<T>::kCount));
      Payload<T> payload{};
      std::copy(from + begin, from + begin + part, payload.values);
      upload_kernel<T><<<1, kBlockThreads, 0, stream_>>>(payload, to + begin, part);
      check(cudaGetLastError(), "launch a kernel");
    }
  }

  // For the current device. Also raises the kernel's limit of shared memory to all there is, so
  // that concurrent calls with other sizes cannot lower it.
  template <class Body>
  int blocks_per_multiprocessor(std::int64_t shared_bytes, const Chip& chip) {
    int blocks = 0;
    if (cudaFuncSetAttribute(walk_kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             chip.shared_bytes) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, walk_kernel<Body>, kWalkThreads,
                                                      std::size_t(shared_bytes)) != cudaSuccess) {
      cudaGetLastError();  // not an error: the kernel does not fit
      return 0;
    }
    return blocks;
  }

  // A cooperative launch: either all blocks are resident at once or the launch fails.
  template <class Body>
  void walk(const Body& body, int blocks, std::int64_t shared_bytes) {
    void* arguments[] = {const_cast<Body*>(&body)};
    check(cudaLaunchCooperativeKernel(walk_kernel<Body>, dim3(unsigned(blocks)), dim3(kWalkThreads),
                                      arguments, std::size_t(shared_bytes), stream_),
          "launch all blocks of a persistent kernel at once (FASTRNN_SCHEDULE=stepwise does "
          "without)");
  }

 private:
  cudaStream_t stream_;
  cublasHandle_t blas_;
};

}  // namespace fastrnn::cuda
