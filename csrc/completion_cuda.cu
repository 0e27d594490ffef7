// completion_cuda.cu: one pass over the observed entries (formula and symbols in completion.h) on the GPU.
//
// A unit of work is a row of at most `long_row` entries, or a segment of that many entries of a longer row; segments come
// first, being the longest units. kLanes = K / 4 threads (K / 2 in double, rounded up to 4, 8, 16 or 32) share an entry: each
// loads 16 bytes of other_j and keeps 16 bytes of own_i and of its gradient in registers; K beyond 128 (64) loops over
// column tiles with the gradient in memory. kGroup >= 8 threads share a unit: units of a warp wait for the longest, so at
// most four share one. Every entry group has four entries in flight: lane t reads index, value, weight and bias of entry
// t % 4, indices and errors travel by shuffle, and the four dot products share one transposed reduction. 4 K flops an entry
// and pass; bound by the gathers of `other`.
//
// Loops are uniform over a warp: ended units repeat their last entry with weight 0, and shuffles need no partial masks.
// Within a unit w E^2 is summed in T with what rounding lost kept beside (a float64 add an entry would cost more than all
// else where float64 runs at 1/64 of the float rate), across lanes and units in double. A block writes its own loss slot, a
// segment its own partial gradient; two small kernels add both up in a fixed order. No atomics, so results repeat bit by bit.
//
// plan, for the L rows longer than long_row with S segments: (L) their numbers, (L + 1) their first segments, (S) the place
// of each segment's row in that list.
// workspace: loss slots and their sums by level (double); S x K partial gradients, S partial bias gradients and S losses (T).
#include "completion.h"
#include "cuda_utils.cuh"

namespace lrk {
namespace {

constexpr int kThreads = 128;       // a block holds its place until its longest unit ends: keep it small
constexpr int kFlight = 4;          // entries in flight per entry group; the transposed reduction is written for 4
constexpr int kSumThreads = 512;    // threads that add up loss slots or segments
constexpr int kSumSlots = 1 << 14;  // loss slots a block adds up, 32 a thread; more than that take another level

template <typename T>
struct Workspace {
  int64_t segments;  // S
  int64_t slots;     // blocks of entries_kernel, each with a loss slot
  double* loss;      // slots, then sums of the levels; null: no loss wanted
  T* grad;           // (S, K)
  T* bias_grad;      // (S)
  T* row_loss;       // (S)
  int64_t bytes;
};

int lanes_of(int vectors) {
  return vectors <= 4 ? 4 : vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32;
}
__host__ __device__ constexpr int group_of(int lanes) {
  return lanes < 8 ? 8 : lanes;
}

// The layout of the workspace at `base`; with a null base only its sizes count.
template <typename T, typename I>
Workspace<T> workspace_at(const CompletionPass<T, I>& p, char* base, bool want_loss) {
  Workspace<T> w;
  w.segments = p.plan_size - 2 * p.long_count - 1;
  const int64_t units_per_block = kThreads / group_of(lanes_of(int(p.width / kVectorSize<T>)));
  w.slots = (p.own_count + w.segments + units_per_block - 1) / units_per_block;
  int64_t doubles = 0;
  if (want_loss)
    for (int64_t count = w.slots; count > 1 || doubles == 0; count = (count + kSumSlots - 1) / kSumSlots) doubles += count;
  const int64_t loss_bytes = (8 * doubles + 15) / 16 * 16;
  const int64_t grad_bytes = p.own_grad ? w.segments * p.width * int64_t(sizeof(T)) : 0;
  const int64_t bias_bytes = p.own_bias_grad ? w.segments * int64_t(sizeof(T)) : 0;
  const int64_t row_loss_bytes = p.own_loss ? w.segments * int64_t(sizeof(T)) : 0;
  w.loss = base && want_loss ? reinterpret_cast<double*>(base) : nullptr;
  w.grad = base && p.own_grad ? reinterpret_cast<T*>(base + loss_bytes) : nullptr;
  w.bias_grad = base && p.own_bias_grad ? reinterpret_cast<T*>(base + loss_bytes + grad_bytes) : nullptr;
  w.row_loss = base && p.own_loss ? reinterpret_cast<T*>(base + loss_bytes + grad_bytes + bias_bytes) : nullptr;
  w.bytes = loss_bytes + grad_bytes + bias_bytes + row_loss_bytes;
  return w;
}

// Sums of s[0..3] over kLanes lanes; lane t returns that of s[t % 4]. 3 + log2(kLanes / 4) shuffles instead of 4 log2(kLanes).
template <int kLanes, typename T>
__device__ __forceinline__ T sum4(const T (&s)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  T low = odd ? s[1] : s[0];
  low += __shfl_xor_sync(~0u, odd ? s[0] : s[1], 1);
  T top = odd ? s[3] : s[2];
  top += __shfl_xor_sync(~0u, odd ? s[2] : s[3], 1);
  T sum = high ? top : low;
  sum += __shfl_xor_sync(~0u, high ? low : top, 2);
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

// Blocks an SM holds at least: allows 72 (tiled 128) registers a thread in float, 96 (168) in double. At 64, and left to
// itself, ptxas spills on one architecture or another.
template <typename T, bool kTiled>
constexpr int kBlocks = (sizeof(T) == 4 ? 7 : 5) - (kTiled ? sizeof(T) == 4 ? 3 : 2 : 0);

// kTiled: the row is wider than 32 vectors; factor and gradient stay in memory.
template <typename T, typename I, int kLanes, bool kTiled>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kTiled>)
    entries_kernel(const CompletionPass<T, I> p, const Workspace<T> work) {
  typedef typename Vector16<T>::type V;
  constexpr int kGroup = group_of(kLanes);
  constexpr int kSides = kGroup / kLanes;  // entry groups of a unit, on alternate entries
  constexpr int kStep = kFlight * kSides;  // entries of a unit at a time
  const int lane = int(threadIdx.x) % kLanes;
  const int side = int(threadIdx.x) % kGroup / kLanes;
  const int vectors = int(p.width / kVectorSize<T>);

  // This group's unit: `count` entries from `begin` on, of row i; its outputs have place `out` in arrays of rows or segments.
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / kGroup) + int(threadIdx.x) / kGroup;
  const bool segment = unit < work.segments;
  int64_t i = unit - work.segments, begin = 0;
  int count = 0;
  bool writes = true;
  if (segment) {
    const int64_t place = p.plan[2 * p.long_count + 1 + unit];
    i = p.plan[place];
    begin = p.offsets[i] + (unit - p.plan[p.long_count + place]) * p.long_row;
    const int64_t rest = p.offsets[i + 1] - begin;
    count = int(rest < p.long_row ? rest : p.long_row);
  } else if (i < p.own_count) {
    begin = p.offsets[i];
    const int64_t all = p.offsets[i + 1] - begin;
    writes = all <= p.long_row;  // else its segments do the work
    count = writes ? int(all) : 0;
  } else {
    i = 0;  // beyond the last unit
    writes = false;
  }
  const int64_t out = segment ? unit : i;
  if (count == 0) begin = 0;  // such a unit reads entry 0 while its neighbours work
  const int last = count > 0 ? count - 1 : 0;
  int steps = (count + kStep - 1) / kStep;
#pragma unroll
  for (int distance = kGroup; distance < 32; distance *= 2) {
    const int theirs = __shfl_xor_sync(~0u, steps, distance);
    steps = steps > theirs ? steps : theirs;
  }

  // Lanes beyond the row's vectors repeat its last one, with a zero own factor.
  const int column = lane < vectors ? lane : vectors - 1;
  const V* const own = reinterpret_cast<const V*>(p.own + i * p.width);
  const V* const other = reinterpret_cast<const V*>(p.other) + (kTiled ? 0 : column);
  // Where the gradient goes, or null. A function: untiled kernels need it at their end only, and registers are short.
  auto gradient = [&]() -> V* {
    T* const grads = segment ? work.grad : p.own_grad;
    return grads && writes ? reinterpret_cast<V*>(grads + out * p.width) : nullptr;
  };
  V* const sums = kTiled ? gradient() : nullptr;
  V a = {}, d = {};
  if (kTiled) {
    if (sums)
      for (int c = lane; c < vectors; c += kLanes) sums[c] = V{};
  } else if (lane < vectors) {
    a = own[lane];
  }
  const T base = p.offset + (p.own_bias ? p.own_bias[i] : T(0));
  T loss = 0, lost = 0, bias = 0;

  for (int step = 0; step < steps; ++step) {
    const int place = step * kStep + lane % kFlight * kSides + side;
    const int64_t e = begin + (place < last ? place : last);
    const I j = p.other_index[e];
    T target = p.values[e];
    if (p.other_bias) target -= p.other_bias[j];
    const T weight = p.weights ? p.weights[e] : T(1);

    const V* row[kFlight];
#pragma unroll
    for (int t = 0; t < kFlight; ++t) row[t] = other + int64_t(__shfl_sync(~0u, j, t, kLanes)) * vectors;
    T s[kFlight] = {};
    V x[kFlight];
    if (kTiled) {
      for (int c = lane; c < vectors; c += kLanes) {
        const V tile = own[c];
#pragma unroll
        for (int t = 0; t < kFlight; ++t) s[t] = dot(tile, row[t][c], s[t]);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kFlight; ++t) x[t] = *row[t];
#pragma unroll
      for (int t = 0; t < kFlight; ++t) s[t] = dot(a, x[t], s[t]);
    }
    T error = sum4<kLanes>(s, lane) + (base - target);
    if (place >= count) error = 0;  // not by the weight: 0 x infinity would be NaN
    const T weighted = weight * error;
    const T term = weighted * error;
    const T grown = loss + term;
    lost += term - (grown - loss);
    loss = grown;
    bias += weighted;

    T scale[kFlight];
#pragma unroll
    for (int t = 0; t < kFlight; ++t) scale[t] = __shfl_sync(~0u, weighted, t, kLanes);
    if (kTiled) {
      if (sums)
        for (int c = lane; c < vectors; c += kLanes) {
          V sum = sums[c];
#pragma unroll
          for (int t = 0; t < kFlight; ++t) add_scaled(sum, scale[t], row[t][c]);
          sums[c] = sum;
        }
    } else {
#pragma unroll
      for (int t = 0; t < kFlight; ++t) add_scaled(d, scale[t], x[t]);
    }
  }

  // Lanes 0 to 3 of an entry group hold different entries, lanes beyond repeat them; then come the sides.
  double total = double(loss) + (lost == lost ? double(lost) : 0.0);  // NaN where the loss is infinite
  bias += __shfl_xor_sync(~0u, bias, 1);
  total += __shfl_xor_sync(~0u, total, 1);
  bias += __shfl_xor_sync(~0u, bias, 2);
  total += __shfl_xor_sync(~0u, total, 2);
#pragma unroll
  for (int distance = kLanes; distance < kGroup; distance *= 2) {
    bias += __shfl_xor_sync(~0u, bias, distance);
    total += __shfl_xor_sync(~0u, total, distance);
    add_shuffled(d, distance);
  }
  if (!kTiled && lane < vectors && side == 0)
    if (V* const row_sums = gradient()) row_sums[lane] = count > 0 ? d : V{};
  if (writes && lane == 0 && side == 0) {
    T* const bias_grads = segment ? work.bias_grad : p.own_bias_grad;
    T* const losses = segment ? work.row_loss : p.own_loss;
    if (bias_grads) bias_grads[out] = bias;
    if (losses) losses[out] = T(total);
  }

  if (work.loss) {
    LRK_DYN_SMEM(double, warps);
#pragma unroll
    for (int distance = kGroup; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      static_assert(kThreads == 128, "four warps are added up");
      work.loss[blockIdx.x] = (warps[0] + warps[1]) + (warps[2] + warps[3]);
    }
  }
}

// One block a long row: adds up its segments, the bias gradient being column K and the row's loss column K + 1. With fewer
// columns than half the threads several threads share one, on alternate segments.
template <typename T, typename I>
__global__ void __launch_bounds__(kSumThreads) segments_kernel(const CompletionPass<T, I> p, const Workspace<T> work) {
  LRK_DYN_SMEM(T, parts);
  const int64_t row = p.plan[blockIdx.x];
  const int64_t begin = p.plan[p.long_count + blockIdx.x], stop = p.plan[p.long_count + blockIdx.x + 1];
  const int width = int(p.width), columns = width + 2;
  const int tile = columns < kSumThreads ? columns : kSumThreads;
  const int stripes = kSumThreads / tile;
  const int stripe = int(threadIdx.x) / tile;
  for (int first = 0; first < columns; first += tile) {
    const int c = first + int(threadIdx.x) % tile;
    const T* from = nullptr;
    T* to = nullptr;
    if (c < width && work.grad) {
      from = work.grad + c;
      to = p.own_grad + row * p.width + c;
    } else if (c == width && work.bias_grad) {
      from = work.bias_grad;
      to = p.own_bias_grad + row;
    } else if (c == width + 1 && work.row_loss) {
      from = work.row_loss;
      to = p.own_loss + row;
    }
    const int64_t pitch = c < width ? p.width : 1;
    T sum = 0;
    if (from && stripe < stripes)
#pragma unroll 4
      for (int64_t s = begin + stripe; s < stop; s += stripes) sum += from[s * pitch];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (from && stripe == 0) {
      for (int other = 1; other < stripes; ++other) sum += parts[other * tile + int(threadIdx.x)];
      *to = sum;
    }
    __syncthreads();
  }
}

// Every block adds up kSumSlots doubles; the last level, a single block, halves the sum into `loss`.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) loss_kernel(const double* slots, int64_t count, double* sums, T* loss) {
  LRK_DYN_SMEM(double, parts);
  const int64_t begin = int64_t(blockIdx.x) * kSumSlots;
  const int64_t stop = begin + kSumSlots < count ? begin + kSumSlots : count;
  double sum = 0;
#pragma unroll 8
  for (int64_t s = begin + threadIdx.x; s < stop; s += kSumThreads) sum += slots[s];
  parts[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    if (loss)
      *loss = T(parts[0] / 2);
    else
      sums[blockIdx.x] = parts[0];
  }
}

template <typename T, typename I, int kLanes, bool kTiled = false>
void launch_entries(const CompletionPass<T, I>& p, const Workspace<T>& work, void* stream) {
  const unsigned blocks = grid_size("completion_pass", work.slots);
  LRK_LAUNCH((entries_kernel<T, I, kLanes, kTiled>), blocks, kThreads, kThreads / 32 * sizeof(double), stream, p, work);
  check_launch("completion_pass", "entries_kernel");
}

template <typename T, typename I>
void pass(const CompletionPass<T, I>& p, void* workspace, T* loss, void* stream) {
  const Workspace<T> work = workspace_at(p, static_cast<char*>(workspace), loss != nullptr);
  const int vectors = int(p.width / kVectorSize<T>);
  if (work.slots > 0) {
    switch (lanes_of(vectors)) {
      case 4: launch_entries<T, I, 4>(p, work, stream); break;
      case 8: launch_entries<T, I, 8>(p, work, stream); break;
      case 16: launch_entries<T, I, 16>(p, work, stream); break;
      default: vectors <= 32 ? launch_entries<T, I, 32>(p, work, stream) : launch_entries<T, I, 32, true>(p, work, stream);
    }
  }
  if (work.segments > 0 && (work.grad || work.bias_grad || work.row_loss)) {
    const unsigned blocks = grid_size("completion_pass", p.long_count);
    LRK_LAUNCH((segments_kernel<T, I>), blocks, kSumThreads, kSumThreads * sizeof(T), stream, p, work);
    check_launch("completion_pass", "segments_kernel");
  }
  if (!loss) return;
  double* slots = work.loss;
  int64_t count = work.slots;
  for (bool last = false; !last;) {
    const int64_t blocks = count > kSumSlots ? (count + kSumSlots - 1) / kSumSlots : 1;
    last = blocks == 1;
    double* const sums = slots + count;
    T* const target = last ? loss : nullptr;
    LRK_LAUNCH((loss_kernel<T>), unsigned(blocks), kSumThreads, kSumThreads * sizeof(double), stream, slots, count, sums,
               target);
    check_launch("completion_pass", "loss_kernel");
    slots = sums;
    count = blocks;
  }
}

}  // namespace

#define LRK_DEFINE_COMPLETION(T, I)                                                                  \
  int64_t completion_cuda_workspace(const CompletionPass<T, I>& p, bool want_loss) {                 \
    return workspace_at(p, nullptr, want_loss).bytes;                                                \
  }                                                                                                  \
  void completion_pass_cuda(const CompletionPass<T, I>& p, void* workspace, T* loss, void* stream) { \
    pass(p, workspace, loss, stream);                                                                \
  }
LRK_DEFINE_COMPLETION(float, int32_t)
LRK_DEFINE_COMPLETION(float, int64_t)
LRK_DEFINE_COMPLETION(double, int32_t)
LRK_DEFINE_COMPLETION(double, int64_t)

}  // namespace lrk
