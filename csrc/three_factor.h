// three_factor.h: the low-rank update of a linear layer; the base products stay with the vendor's BLAS.
//
//   forward   z1 = drop(x) R^T,  z2 = s z1 C^T,  y0 = bias + z2 L^T             C = core[L-1] ... core[0] - shift I; no core: I
//   backward  g2 = dy L,         g1 = s g2 C,    dx0 = drop'(g1 R)
//             dL = dy^T z2,      dR = g1^T drop(x),      dC = s g2^T z1,  dcore[l] by the chain rule
//
// The caller then adds the base in place, beta = 1: y = y0 + x W^T and dx = dx0 + dy W, so no further pass over T x M or
// T x N numbers exists. The CPU reads x and dy once each way (CUDA: see its file), sums are float32 (float64 for float64),
// every output is rounded once.
//
// drop(x) keeps x[t][n] / (1 - p) where its 16 random bits are >= drop_threshold = round(65536 p), else 0. Philox4x32-10 with
// key (seed_lo, seed_hi) and counter (n / 8, t_lo, t_hi, 0) gives the bits of eight neighbours: half n % 8 of its four words,
// low halves first. The mask depends on seed, t and n only, so backward makes it again instead of reading it.
#pragma once
#include <cstdint>

namespace lrk {

enum class DType : int { float32, float64, bfloat16, float16 };

constexpr int64_t kMaxRank = 256;  // the kernels serve K up to this; beyond, the products are matrix products like others

struct ThreeFactor {
  int64_t tokens;        // T
  int64_t in_features;   // N
  int64_t out_features;  // M
  int64_t rank;          // K
  int64_t depth;         // L; 0: no core, C is the identity
  DType type;            // of x, y, dy, dx and bias
  DType factor_type;     // of left, core, right and their gradients: `type`, or float32 for bfloat16 and float16
  const void* x;         // (T, N), row pitch x_stride elements, unit stride inside a row
  int64_t x_stride;
  const void* left;        // (M, K) contiguous, as are the other factors
  const void* core;        // (L, K, K); null when depth == 0
  const void* right;       // (K, N)
  double scale;            // s
  double shift;            // subtracted from the diagonal of the product of the cores; 0 when depth == 0
  int32_t drop_threshold;  // 0: no dropout; 65536: everything is dropped
  const int64_t* seed;     // one number in the memory of the device; null without dropout
};

struct ThreeFactorForward : ThreeFactor {
  const void* bias;  // (M), or null
  void* y;           // (T, M) contiguous: y0
  void* z;           // (2, T, K): z1 and z2, float32 (float64 for float64); saved for backward
};

struct ThreeFactorBackward : ThreeFactor {
  const void* dy;  // (T, M), row pitch dy_stride
  int64_t dy_stride;
  const void* z;  // (2, T, K) of the forward pass
  void* dx;       // (T, N) contiguous: dx0; or null, as every gradient that is not wanted
  void* dleft;    // (M, K)
  void* dcore;    // (L, K, K)
  void* dright;   // (K, N)
};

// CPU: one symbol a SIMD level. `workspace` of three_factor_cpu_workspace() bytes, 64-byte aligned. The result does not depend
// on `threads`.
#define LRK_DECLARE_THREE_FACTOR(level)                                                         \
  int64_t three_factor_workspace_##level(const ThreeFactor& p, bool backward);                  \
  void three_factor_forward_##level(const ThreeFactorForward& p, void* workspace, int threads); \
  void three_factor_backward_##level(const ThreeFactorBackward& p, void* workspace, int threads);
LRK_DECLARE_THREE_FACTOR(portable)
#if defined(__x86_64__)
LRK_DECLARE_THREE_FACTOR(avx2)
LRK_DECLARE_THREE_FACTOR(avx512)
#endif
#undef LRK_DECLARE_THREE_FACTOR

// CUDA: all pointers are device memory, `workspace` is 256-byte aligned and as large as the first function says. Work is queued
// on `stream`, a cudaStream_t: no allocation, no synchronisation, no float atomics. A failed launch throws std::runtime_error.
int64_t three_factor_cuda_workspace(const ThreeFactor& p, bool backward);
void three_factor_forward_cuda(const ThreeFactorForward& p, void* workspace, void* stream);
void three_factor_backward_cuda(const ThreeFactorBackward& p, void* workspace, void* stream);

}  // namespace lrk
