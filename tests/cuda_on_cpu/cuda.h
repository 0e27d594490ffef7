// cuda.h: the CUDA C++ names that kernels and launches use, for g++. Included before a .cu file, whose threads scheduler.h
// runs.
//
// There is no static shared memory: `__shared__` stays undefined, kernels take theirs from LRK_DYN_SMEM.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (cuda_on_cpu::here.thread)
#define blockIdx (cuda_on_cpu::here.block)
#define blockDim (cuda_on_cpu::here.block_size)
#define gridDim (cuda_on_cpu::here.grid_size)

// csrc/cuda_utils.cuh leaves these two to us.
#define LRK_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  cuda_on_cpu::launch_kernel<&kernel>(blocks, threads, shared_bytes, stream, __VA_ARGS__)
#define LRK_DYN_SMEM(T, name) T* const name = reinterpret_cast<T*>(cuda_on_cpu::here.shared)

// Functions that read what other lanes brought: to ThreadSanitizer that is no access of memory.
#define CUDA_ON_CPU_UNSEEN __attribute__((noinline, no_sanitize_thread))

// ---- types

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const bool nan = (word & 0x7FFFFFFF) > 0x7F800000;
    bits = nan ? 0x7FFF : uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) {
    const _Float16 rounded = _Float16(value);
    std::memcpy(&bits, &rounded, 2);
  }
  operator float() const {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
};

// ---- the runtime

typedef std::string cudaError_t;  // empty, or what went wrong
typedef void* cudaStream_t;
inline const cudaError_t cudaSuccess;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_on_cpu {

constexpr size_t kSharedBytes = 48 << 10;     // that every launch may have
constexpr size_t kMaxSharedBytes = 99 << 10;  // that a launch may be allowed, on the GPUs that have least: sm_86 and sm_89

inline cudaError_t last_error;
inline std::map<const void*, size_t> allowed_bytes;

template <auto* kKernel>
const char* name_of() {
  return __PRETTY_FUNCTION__;  // "... [with auto* kKernel = lrk::{anonymous}::kernel<float, 16>]"
}
template <auto* kKernel>
const bool remembered = remember_kernel(name_of<kKernel>());

inline cudaError_t refusal(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return "invalid grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
  if (threads == 0 || threads > 1024 || block.z > 64) return "invalid block of " + std::to_string(threads) + " threads";
  const auto allowed = allowed_bytes.find(kernel);
  if (shared_bytes > (allowed == allowed_bytes.end() ? kSharedBytes : allowed->second))
    return std::to_string(shared_bytes) + " bytes of shared memory were not allowed by cudaFuncSetAttribute";
  return cudaSuccess;
}

template <auto* kKernel, typename... Arguments>
void launch_kernel(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  (void)remembered<kKernel>;
  last_error = refusal(reinterpret_cast<const void*>(kKernel), grid, block, shared_bytes);
  if (last_error != cudaSuccess) return;
  auto run = [&] { kKernel(arguments...); };
  run_grid(
      {name_of<kKernel>(), grid, block, shared_bytes, [](const void* f) { (*static_cast<const decltype(run)*>(f))(); }, &run});
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  cudaError_t error;
  error.swap(cuda_on_cpu::last_error);
  return error;
}
inline const char* cudaGetErrorString(const cudaError_t& error) {
  return error.c_str();
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > cuda_on_cpu::kMaxSharedBytes)
    return cuda_on_cpu::last_error = std::to_string(bytes) + " bytes of shared memory are more than every GPU has";
  cuda_on_cpu::allowed_bytes[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}

// ---- barriers, shuffles, votes, atomics

inline void __syncthreads(cuda_on_cpu::Site site = {}) {
  cuda_on_cpu::sync_block(site);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Site site = {}) {
  cuda_on_cpu::sync_warp(mask, nullptr, [](void* const*, unsigned) {}, true, site);
}

namespace cuda_on_cpu {

template <typename T>
struct Shuffled {
  T value;
  int from;  // lane
  T result;
};
template <typename T>
CUDA_ON_CPU_UNSEEN void finish_shuffle(void* const* operands, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* const mine = static_cast<Shuffled<T>*>(operands[lane]);
    if (!(mask >> mine->from & 1))
      stop("lane " + std::to_string(lane) + " reads lane " + std::to_string(mine->from) + ", which the mask leaves out");
    mine->result = static_cast<Shuffled<T>*>(operands[mine->from])->value;
  }
}
template <typename T>
T shuffle(unsigned mask, T value, int from, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) stop("a shuffle of width " + std::to_string(width));
  Shuffled<T> mine = {value, from, value};
  sync_warp(mask, &mine, finish_shuffle<T>, false, site);
  return mine.result;
}

struct Vote {
  bool yes;
  unsigned result;
};
CUDA_ON_CPU_UNSEEN inline void finish_vote(void* const* operands, unsigned mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && static_cast<Vote*>(operands[lane])->yes) ballot |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Vote*>(operands[lane])->result = ballot;
}

}  // namespace cuda_on_cpu

// Lanes are in sections of `width`; a source outside the own section (for xor: in a later one) is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuda_on_cpu::Site site = {}) {
  const int lane = cuda_on_cpu::here.lane;
  return cuda_on_cpu::shuffle(mask, value, lane / width * width + (source & (width - 1)), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, cuda_on_cpu::Site site = {}) {
  const int lane = cuda_on_cpu::here.lane, source = lane ^ distance;
  return cuda_on_cpu::shuffle(mask, value, source / width > lane / width ? lane : source, width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, cuda_on_cpu::Site site = {}) {
  const int lane = cuda_on_cpu::here.lane;
  const bool inside = unsigned(lane % width) + distance < unsigned(width);
  return cuda_on_cpu::shuffle(mask, value, inside ? lane + int(distance) : lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, cuda_on_cpu::Site site = {}) {
  const int lane = cuda_on_cpu::here.lane;
  return cuda_on_cpu::shuffle(mask, value, unsigned(lane % width) >= distance ? lane - int(distance) : lane, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = {}) {
  cuda_on_cpu::Vote vote = {predicate != 0, 0};
  cuda_on_cpu::sync_warp(mask, &vote, cuda_on_cpu::finish_vote, false, site);
  return vote.result;
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = {}) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = {}) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

// Integers only: sums of floats in no fixed order would not repeat.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral<T>::value);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  static_assert(std::is_integral<T>::value);
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
