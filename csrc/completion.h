// completion.h: one pass of matrix completion over the observed entries, sorted by one of the two sides.
//
//   E_e  = <own_i, other_j> + own_bias_i + other_bias_j + offset - value_e        for every entry e = (i, j)
//   loss = 1/2 sum_e w_e E_e^2
//   own_grad_i      = sum_j w_e E_e other_j          (K numbers a row)
//   own_bias_grad_i = sum_j w_e E_e
//
// The rows pass has own = P = left @ core[L-1] ... core[0], other = V = right^T; the columns pass swaps them. Both
// recompute E: cheaper than storing it, no atomics, every output has one writer, results repeat bit by bit.
#pragma once
#include <cstdint>

namespace lrk {

template <typename T, typename I>
struct CompletionPass {
  int64_t own_count;       // M: rows of `own` (and the number of CSR rows)
  int64_t other_count;     // N: rows of `other`
  int64_t entry_count;     // Z
  int64_t width;           // K: factor columns in memory, zero-padded to a multiple of the vector width
  const int64_t* offsets;  // (M + 1): entries of row i are [offsets[i], offsets[i + 1])
  const I* other_index;    // (Z): j, int32 or int64
  const T* values;         // (Z)
  const T* weights;        // (Z), or null: all 1
  const T* own;            // (M, K), contiguous
  const T* other;          // (N, K), contiguous
  const T* own_bias;       // (M), or null: all 0
  const T* other_bias;     // (N), or null: all 0
  T offset;                // mu
  const int64_t* plan;     // CPU: (plan_size) row boundaries of the units of work. CUDA: see completion_cuda.cu
  int64_t plan_size;
  int64_t long_count;  // CUDA: rows with more than long_row entries, done in segments of that many; CPU: 0
  int64_t long_row;    // CUDA: the length `plan` was made with; CPU: not read
  double* loss_parts;  // CPU: partial sums of w E^2, summed in a fixed order; null: no loss wanted. CUDA: not read
  T* own_grad;         // (M, K), or null
  T* own_bias_grad;    // (M), or null
  T* own_loss;         // (M): sum_j w_e E_e^2 of each row, or null
};

// One symbol a SIMD level; `threads` units of work run side by side. loss_parts has plan_size - 1 slots.
#define LRK_DECLARE_COMPLETION(level)                                        \
  void completion_pass_##level(const CompletionPass<float, int32_t>&, int);  \
  void completion_pass_##level(const CompletionPass<float, int64_t>&, int);  \
  void completion_pass_##level(const CompletionPass<double, int32_t>&, int); \
  void completion_pass_##level(const CompletionPass<double, int64_t>&, int);
LRK_DECLARE_COMPLETION(portable)
#if defined(__x86_64__)
LRK_DECLARE_COMPLETION(avx2)
LRK_DECLARE_COMPLETION(avx512)
#endif
#undef LRK_DECLARE_COMPLETION

// CUDA: pointers are device memory, rows of own, other and own_grad 16-byte aligned, width a multiple of 16 bytes. `loss`
// (one number, or null) and `workspace` of completion_cuda_workspace() bytes, 16-byte aligned, are the caller's. Work is
// queued on `stream`, a cudaStream_t: no allocation, no synchronisation. A failed launch throws std::runtime_error.
#define LRK_DECLARE_COMPLETION(T, I)                                                \
  int64_t completion_cuda_workspace(const CompletionPass<T, I>& p, bool want_loss); \
  void completion_pass_cuda(const CompletionPass<T, I>& p, void* workspace, T* loss, void* stream);
LRK_DECLARE_COMPLETION(float, int32_t)
LRK_DECLARE_COMPLETION(float, int64_t)
LRK_DECLARE_COMPLETION(double, int32_t)
LRK_DECLARE_COMPLETION(double, int64_t)
#undef LRK_DECLARE_COMPLETION

}  // namespace lrk
