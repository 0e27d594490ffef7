// cuda_utils.cuh: what the CUDA kernels share: launching with a check, dynamic shared memory, 16-byte vectors.
//
// Kernels reach the device through the two macros only, so that a test may define LRK_CUDA_ON_CPU, supply both (and
// threadIdx, __shfl_sync, ...) and run the same source on a CPU.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef LRK_CUDA_ON_CPU
#include <cuda_runtime.h>
// The caller's stream; nothing is allocated or awaited, so a launch can be captured in a CUDA graph.
#define LRK_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LRK_DYN_SMEM(T, name)                                 \
  extern __shared__ __align__(16) unsigned char lrk_shared[]; \
  T* const name = reinterpret_cast<T*>(lrk_shared)
#endif

namespace lrk {

// A launch that failed (a bad configuration, no kernel image for this GPU, an earlier fault) becomes an exception.
inline void check_launch(const char* op, const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": launching " + kernel + " failed: " + cudaGetErrorString(error));
}

inline unsigned grid_size(const char* op, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": " + std::to_string(blocks) +
                             " thread blocks, at most 2^31 - 1 fit in a grid");
  return static_cast<unsigned>(blocks);
}

template <typename T>
struct Vector16;  // 16 bytes: one load instruction
template <>
struct Vector16<float> {
  typedef float4 type;
};
template <>
struct Vector16<double> {
  typedef double2 type;
};
template <typename T>
constexpr int kVectorSize = 16 / int(sizeof(T));  // elements

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
__device__ __forceinline__ double dot(const double2& a, const double2& b, double sum) {
  return sum + a.x * b.x + a.y * b.y;
}
__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& a) {
  sum.x += scale * a.x;
  sum.y += scale * a.y;
  sum.z += scale * a.z;
  sum.w += scale * a.w;
}
__device__ __forceinline__ void add_scaled(double2& sum, double scale, const double2& a) {
  sum.x += scale * a.x;
  sum.y += scale * a.y;
}
__device__ __forceinline__ void add_shuffled(float4& sum, int distance) {  // the lane at `lane ^ distance` adds ours
  sum.x += __shfl_xor_sync(~0u, sum.x, distance);
  sum.y += __shfl_xor_sync(~0u, sum.y, distance);
  sum.z += __shfl_xor_sync(~0u, sum.z, distance);
  sum.w += __shfl_xor_sync(~0u, sum.w, distance);
}
__device__ __forceinline__ void add_shuffled(double2& sum, int distance) {
  sum.x += __shfl_xor_sync(~0u, sum.x, distance);
  sum.y += __shfl_xor_sync(~0u, sum.y, distance);
}

}  // namespace lrk
