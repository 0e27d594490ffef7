// three_factor_cuda.cu: the low-rank update of a linear layer (formulas, symbols and the dropout rule in three_factor.h).
//
// left (M, K) and right^T (N, K) are both F: features D x rank K. Three skinny products of F do everything, s, bias, dropout
// and the small K x K product inside:
//   shrink  first[t][k] = sum_d in[t][d] F[d][k], second = s first B^T     x -> z1, z2;        dy -> g2, g1  (B = C, C^T)
//   expand  out[t][d]   = sum_k a[t][k] F[d][k]                            z2 -> y0 (+ bias);  g1 -> dx0 (dropped)
//   outer   dF[d][k]    = sum_t in[t][d] a[t][k]                           dy, z2 -> dL;  x, g1 -> dR^T;  g2, z1 -> dC / s
// forward:  prologue (C, row by row; factors to the type and layout of the products), shrink, expand.
// backward: prologue, shrink, expand, outer (all three, partial sums over ranges of t), reduce; chain (dC -> dcore) if L > 1.
// What is not wanted is not launched.
//
// bfloat16 and float16 run on the tensor cores: K padded with zeros to 16, 32, ... 256, tiles of x, dy and F streamed through
// shared memory by asynchronous copies, sums in float32. F, z and g are rounded to the type once, as operands; z is saved, and
// the gradients of the factors are summed, in float32. One pass over T x D numbers costs a few times K flops a byte, so the
// passes are bound by memory up to K = 64 or so. float32, float64 and what is no multiple of 8 or not 16-byte aligned take
// product_kernel, a plain tiled product, with the same structure; nothing is rounded to 16 bits there but the outputs.
//
// Every partial sum has its own slot and slots are added up in order: no atomics, results repeat bit by bit. How T is cut into
// ranges depends on the sizes alone, not on the GPU.
#include <type_traits>

#include "cuda_utils.cuh"
#include "ptx.cuh"
#include "three_factor.h"

namespace lrk {
namespace {

constexpr const char* kOp = "three_factor";
constexpr int64_t kSplitBlocks = 384;  // blocks that share the sums over t, about three an SM of a large GPU
constexpr int64_t kSplitRows = 64;     // rows of t that are worth a block

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The widest dtype of a sum.
template <typename T>
using Sum = std::conditional_t<std::is_same<T, double>::value, double, float>;

// ---------------------------------------------------------------------------------------------------------------------------
// Dropout
// ---------------------------------------------------------------------------------------------------------------------------

struct Dropout {
  const int64_t* seed;
  uint32_t threshold;  // 0: none
};

double keep_scale(int32_t threshold) {
  return threshold < 65536 ? 65536.0 / (65536 - threshold) : 0.0;
}

// The bits of x[t][8 group ... 8 group + 7].
__device__ __forceinline__ uint4 philox(uint64_t seed, int64_t t, uint32_t group) {
  uint32_t c0 = group, c1 = uint32_t(t), c2 = uint32_t(uint64_t(t) >> 32), c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t(0xD2511F53u) * c0, high = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(high >> 32) ^ c1 ^ k0;
    c1 = uint32_t(high);
    c2 = uint32_t(low >> 32) ^ c3 ^ k1;
    c3 = uint32_t(low);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ uint32_t kept(uint32_t bits, uint32_t threshold) {  // a mask of two 16-bit numbers
  return ((bits & 0xFFFFu) >= threshold ? 0xFFFFu : 0u) | ((bits >> 16) >= threshold ? 0xFFFF0000u : 0u);
}

// Zeros the dropped ones of eight 16-bit numbers, which start at x[t][8 group].
__device__ __forceinline__ void drop(uint4& v, uint64_t seed, uint32_t threshold, int64_t t, int64_t group) {
  const uint4 bits = philox(seed, t, uint32_t(group));
  v.x &= kept(bits.x, threshold);
  v.y &= kept(bits.y, threshold);
  v.z &= kept(bits.z, threshold);
  v.w &= kept(bits.w, threshold);
}

// The same as one bit an element.
__device__ __forceinline__ uint32_t kept_bits(uint64_t seed, uint32_t threshold, int64_t t, int64_t group) {
  const uint4 bits = philox(seed, t, uint32_t(group));
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
  uint32_t mask = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) mask |= uint32_t((word[e / 2] >> (e % 2 * 16) & 0xFFFFu) >= threshold) << e;
  return mask;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Prologue: C and the factors, in the type and layout of the products
// ---------------------------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// to[r][k] = from[r][k], or from[k][r] if transposed, and 0 for k >= columns. `width` is a multiple of 8: 8 numbers a thread.
template <typename From, typename To>
struct Copy {
  const From* from;
  To* to;
  int64_t rows, columns, width;
  bool transposed;
};

template <typename From, typename To>
__device__ __forceinline__ void copy(const Copy<From, To>& p, int64_t first, int64_t step) {
  struct __align__(16) Chunk {
    To v[8];
  };
  const int64_t chunks = p.width / 8;
  for (int64_t i = first; i < p.rows * chunks; i += step) {
    const int64_t r = p.transposed ? i % p.rows : i / chunks;
    const int64_t c = p.transposed ? i / p.rows : i % chunks;
    Chunk chunk;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t k = 8 * c + e;
      chunk.v[e] = static_cast<To>(
          k < p.columns ? static_cast<Sum<To>>(p.from[p.transposed ? k * p.rows + r : r * p.columns + k]) : Sum<To>(0));
    }
    *reinterpret_cast<Chunk*>(p.to + r * p.width + 8 * c) = chunk;
  }
}

template <typename F, typename To>
struct Prologue {
  const F* core;  // (L, K, K)
  To* matrix;     // (width, width): C, or C^T if transposed, zeros beyond K; or null
  bool transposed;
  int depth, rank, width;
  int64_t matrix_blocks;       // one a row of `matrix`; the other blocks share the copies
  Copy<F, To> factor[2];       // no rows: nothing to copy
  Copy<Sum<To>, To> products;  // z1 and z2
};

template <typename F, typename To>
__global__ void __launch_bounds__(kThreads) prologue_kernel(const Prologue<F, To> p) {
  typedef Sum<To> S;
  const int64_t copier = int64_t(blockIdx.x) - p.matrix_blocks;
  if (copier >= 0) {
    const int64_t first = copier * kThreads + threadIdx.x, step = (int64_t(gridDim.x) - p.matrix_blocks) * kThreads;
    copy(p.factor[0], first, step);
    copy(p.factor[1], first, step);
    copy(p.products, first, step);
    return;
  }
  // Row i of C is row i of core[L-1], times core[L-2], ..., times core[0]: no row waits for another.
  LRK_DYN_SMEM(S, shared);
  S *row = shared, *next = shared + p.rank;
  const int i = int(blockIdx.x);
  const int64_t size = int64_t(p.rank) * p.rank;
  if (i < p.rank) {
    for (int k = threadIdx.x; k < p.rank; k += kThreads)
      row[k] = static_cast<S>(p.core[(p.depth - 1) * size + int64_t(i) * p.rank + k]);
    __syncthreads();
    for (int l = p.depth - 2; l >= 0; --l) {
      for (int j = threadIdx.x; j < p.rank; j += kThreads) {
        S sum = 0;
        for (int k = 0; k < p.rank; ++k) sum += row[k] * static_cast<S>(p.core[l * size + int64_t(k) * p.rank + j]);
        next[j] = sum;
      }
      __syncthreads();
      S* const done = row;
      row = next;
      next = done;
    }
  }
  for (int k = threadIdx.x; k < p.width; k += kThreads)
    p.matrix[p.transposed ? k * p.width + i : i * p.width + k] = static_cast<To>(i < p.rank && k < p.rank ? row[k] : S(0));
}

// ---------------------------------------------------------------------------------------------------------------------------
// Tensor cores
// ---------------------------------------------------------------------------------------------------------------------------

// Where 16-byte chunk `chunk` of row `row` lies in a tile of kWidth 16-bit numbers a row, in bytes. Chunks change places so
// that the eight rows of an 8 x 8 matrix lie in different banks.
template <int kWidth>
__device__ __forceinline__ int place(int row, int chunk) {
  constexpr int kChunks = kWidth < 64 ? kWidth / 8 : 8;
  return row * kWidth * 2 + (chunk ^ (row / (8 / kChunks) % kChunks)) * 16;
}

// Starts the copy of rows [row, row_end) and columns [column, column_end) of src into a tile; the rest of it becomes zero.
template <int kRows, int kWidth, int kTileThreads, typename T>
__device__ __forceinline__ void load_tile(unsigned char* tile, const T* src, int64_t pitch, int64_t row, int64_t row_end,
                                          int64_t column, int64_t column_end) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kWidth / 8; i += kTileThreads) {
    const int r = i / (kWidth / 8), c = i % (kWidth / 8);
    const bool inside = row + r < row_end && column + 8 * c < column_end;
    copy_async(tile + place<kWidth>(r, c), inside ? src + (row + r) * pitch + column + 8 * c : src, inside);
  }
}

// Drops in a tile of x. Every thread takes the chunks that it copied itself, so its own copy_wait is all it needs before.
template <int kRows, int kWidth, int kTileThreads>
__device__ __forceinline__ void drop_tile(unsigned char* tile, uint64_t seed, uint32_t threshold, int64_t t, int64_t n) {
  for (int i = threadIdx.x; i < kRows * kWidth / 8; i += kTileThreads) {
    const int r = i / (kWidth / 8), c = i % (kWidth / 8);
    drop(*reinterpret_cast<uint4*>(tile + place<kWidth>(r, c)), seed, threshold, t + r, n / 8 + c);
  }
}

// The 16 x 16 numbers at (row, 8 chunk) of a tile as matrices top left, bottom left, top right, bottom right, each transposed
// or not: fragment a of mma, or (0, 2) and (1, 3) two fragments b of its transpose.
// Transposed: (0, 1) and (2, 3) two fragments b, or 0, 2, 1, 3 fragment a of its transpose.
template <int kWidth, bool kTranspose>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const unsigned char* tile, int row, int chunk, int lane) {
  load_matrices<kTranspose>(r, tile + place<kWidth>(row + lane % 16, chunk + lane / 16));
}

template <typename T>
struct Shrink {
  const T* in;  // (rows, columns)
  int64_t pitch;
  const T* factor;  // (columns, kRank)
  const T* matrix;  // (kRank, kRank): B; or null, the identity
  int64_t rows, columns;
  int rank;
  float first_scale, second_scale;
  float *first_saved, *second_saved;  // (rows, rank), or null
  T *first, *second;                  // (rows, kRank), or null
  Dropout dropout;
};

// A warp has 16 rows and 64 ranks (or all) of the sums. With few ranks F is cheap to read again: blocks have 32 rows only, so
// that there are more of them, and two warps share a sum, on alternate halves of a stage.
template <int kRank>
struct ShrinkShape {
  static constexpr int kRowGroups = kRank <= 32 ? 2 : 4;
  static constexpr int kHalves = 4 / kRowGroups;
  static constexpr int kWarpRank = kRank <= 64 ? kRank : 64;
  static constexpr int kRankGroups = kRank / kWarpRank;
  static constexpr int kRows = 16 * kRowGroups;
  static constexpr int kColumns = 64 * kHalves;  // of `in`, a stage
  static constexpr int kThreads = 32 * kRowGroups * kHalves * kRankGroups;
  static constexpr int kStageBytes = 2 * kColumns * (kRows + kRank);
  static constexpr int kStages = kRank == 16 ? 4 : kRank <= 128 ? 3 : 2;  // 48 KiB up to K = 64, then 72 and 80
  static_assert(kHalves == 1 || 64 * kRank <= kStageBytes, "the sums of half the warps fit");
};

template <typename T, int kRank>
__global__ void __launch_bounds__(ShrinkShape<kRank>::kThreads) shrink_kernel(const Shrink<T> p) {
  typedef ShrinkShape<kRank> Shape;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStages = Shape::kStages, kWarpRank = Shape::kWarpRank;
  LRK_DYN_SMEM(unsigned char, shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row_group = warp % Shape::kRowGroups;
  const int side = warp / Shape::kRowGroups;  // of the warps that share the rows
  const int half = side % Shape::kHalves, rank0 = side / Shape::kHalves * kWarpRank;
  const int64_t row0 = int64_t(blockIdx.x) * kRows, steps = ceil_div(p.columns, kColumns);
  const uint64_t seed = p.dropout.threshold ? uint64_t(*p.dropout.seed) : 0;

  auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* const stage = shared + step % kStages * Shape::kStageBytes;
      load_tile<kRows, kColumns, Shape::kThreads>(stage, p.in, p.pitch, row0, p.rows, step * kColumns, p.columns);
      load_tile<kColumns, kRank, Shape::kThreads>(stage + 2 * kRows * kColumns, p.factor, kRank, step * kColumns, p.columns, 0,
                                                  kRank);
    }
    copy_commit();
  };
  float sum[kWarpRank / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    unsigned char* const stage = shared + step % kStages * Shape::kStageBytes;
    copy_wait<kStages - 2>();
    if (p.dropout.threshold)
      drop_tile<kRows, kColumns, Shape::kThreads>(stage, seed, p.dropout.threshold, row0, step * kColumns);
    __syncthreads();  // the stage is complete, and everybody has left the one that is loaded next
    load(step + kStages - 1);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      load_fragment<kColumns, false>(a, stage, 16 * row_group, 8 * half + 2 * k, lane);
#pragma unroll
      for (int n = 0; n < kWarpRank / 16; ++n) {
        uint32_t b[4];
        load_fragment<kRank, true>(b, stage + 2 * kRows * kColumns, 64 * half + 16 * k, rank0 / 8 + 2 * n, lane);
        mma<T>(sum[2 * n], a, b[0], b[1]);
        mma<T>(sum[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
  copy_wait<0>();
  __syncthreads();  // the stages are free for other things

  if (Shape::kHalves == 2) {
    float* const other = reinterpret_cast<float*>(shared) + row_group * (kWarpRank / 8 * 4 * 32) + lane;
    if (half == 1) {
#pragma unroll
      for (int i = 0; i < kWarpRank / 2; ++i) other[32 * i] = sum[i / 4][i % 4];
    }
    __syncthreads();
    if (half == 0) {
#pragma unroll
      for (int i = 0; i < kWarpRank / 2; ++i) sum[i / 4][i % 4] += other[32 * i];
    }
    __syncthreads();
  }

  const int row = 16 * row_group + lane / 4, pair = lane % 4 * 2;
  auto save = [&](float* saved, T* rounded, int r, int k, float low, float high) {
    const int64_t t = row0 + r;
    if (t >= p.rows) return;
    if (saved && k < p.rank) saved[t * p.rank + k] = low;
    if (saved && k + 1 < p.rank) saved[t * p.rank + k + 1] = high;
    if (rounded) *reinterpret_cast<uint32_t*>(rounded + t * kRank + k) = pack<T>(low, high);
  };
  if (half == 0) {
#pragma unroll
    for (int i = 0; i < kWarpRank / 8; ++i)
#pragma unroll
      for (int bottom = 0; bottom < 2; ++bottom) {
        const int r = row + 8 * bottom, k = rank0 + 8 * i + pair;
        const float low = p.first_scale * sum[i][2 * bottom], high = p.first_scale * sum[i][2 * bottom + 1];
        save(p.first_saved, p.first, r, k, low, high);
        if (p.matrix)
          *reinterpret_cast<uint32_t*>(shared + place<kRank>(r, k / 8) + 2 * pair) = pack<T>(low, high);
        else
          save(p.second_saved, p.second, r, k, p.second_scale * low, p.second_scale * high);
      }
  }
  if (!p.matrix) return;

  __syncthreads();
  for (int n = 16 * side; n < kRank; n += 16 * Shape::kHalves * Shape::kRankGroups) {
    float second[2][4] = {};
    // Row-major B is the fragment layout of B^T, so lanes read it from memory; all blocks read the same.
    const T* const matrix = p.matrix + (n + lane / 4) * kRank + pair;
#pragma unroll
    for (int k = 0; k < kRank; k += 16) {
      uint32_t a[4];
      load_fragment<kRank, false>(a, shared, 16 * row_group, k / 8, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* const b = matrix + 8 * i * kRank + k;
        mma<T>(second[i], a, *reinterpret_cast<const uint32_t*>(b), *reinterpret_cast<const uint32_t*>(b + 8));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int bottom = 0; bottom < 2; ++bottom)
        save(p.second_saved, p.second, row + 8 * bottom, n + 8 * i + pair, p.second_scale * second[i][2 * bottom],
             p.second_scale * second[i][2 * bottom + 1]);
  }
}

template <typename T>
struct Expand {
  const T* a;       // (rows, kRank)
  const T* factor;  // (columns, kRank)
  const T* bias;    // (columns), or null
  T* out;           // (rows, columns)
  int64_t rows, columns;
  float scale;
  Dropout dropout;
};

constexpr int kExpandThreads = 128, kExpandRows = 64, kExpandColumns = 128;
template <int kRank>
constexpr int kExpandBytes = 2 * (kRank <= 32 ? kExpandRows * kExpandColumns : (kExpandRows + kExpandColumns) * kRank);

// A warp has 16 rows. Blocks do nothing but load, multiply and store; that there are many of them hides each one's waiting.
template <typename T, int kRank>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(const Expand<T> p) {
  LRK_DYN_SMEM(unsigned char, shared);
  unsigned char* const factor = shared + 2 * kExpandRows * kRank;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tiles = ceil_div(p.columns, kExpandColumns);
  const int64_t row0 = blockIdx.x / tiles * kExpandRows, column0 = blockIdx.x % tiles * kExpandColumns;
  load_tile<kExpandRows, kRank, kExpandThreads>(shared, p.a, kRank, row0, p.rows, 0, kRank);
  load_tile<kExpandColumns, kRank, kExpandThreads>(factor, p.factor, kRank, column0, p.columns, 0, kRank);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  float sum[kExpandColumns / 8][4] = {};
#pragma unroll
  for (int k = 0; k < kRank / 16; ++k) {
    uint32_t a[4];
    load_fragment<kRank, false>(a, shared, 16 * warp, 2 * k, lane);
#pragma unroll
    for (int n = 0; n < kExpandColumns / 16; ++n) {
      uint32_t b[4];
      load_fragment<kRank, false>(b, factor, 16 * n, 2 * k, lane);
      mma<T>(sum[2 * n], a, b[0], b[2]);
      mma<T>(sum[2 * n + 1], a, b[1], b[3]);
    }
  }
  __syncthreads();
  const int pair = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kExpandColumns / 8; ++i) {
    const int64_t column = column0 + 8 * i + pair;
    float low = 0, high = 0;
    if (p.bias && column < p.columns) {
      low = static_cast<float>(p.bias[column]);
      high = static_cast<float>(p.bias[column + 1]);
    }
#pragma unroll
    for (int bottom = 0; bottom < 2; ++bottom)
      *reinterpret_cast<uint32_t*>(shared + place<kExpandColumns>(16 * warp + lane / 4 + 8 * bottom, i) + 2 * pair) =
          pack<T>(p.scale * sum[i][2 * bottom] + low, p.scale * sum[i][2 * bottom + 1] + high);
  }
  __syncthreads();
  const uint64_t seed = p.dropout.threshold ? uint64_t(*p.dropout.seed) : 0;
  for (int i = threadIdx.x; i < kExpandRows * kExpandColumns / 8; i += kExpandThreads) {
    const int r = i / (kExpandColumns / 8), c = i % (kExpandColumns / 8);
    const int64_t t = row0 + r, column = column0 + 8 * c;
    if (t >= p.rows || column >= p.columns) continue;
    uint4 v = *reinterpret_cast<const uint4*>(shared + place<kExpandColumns>(r, c));
    if (p.dropout.threshold) drop(v, seed, p.dropout.threshold, t, column / 8);
    *reinterpret_cast<uint4*>(p.out + t * p.columns + column) = v;
  }
}

// Work of several kinds in one launch: the job of a block, whose number becomes that within the job.
template <typename Job>
__device__ __forceinline__ Job job_of(const Job (&jobs)[3], int64_t& block) {
  Job job = jobs[0];
#pragma unroll
  for (int j = 1; j < 3; ++j)
    if (block >= job.blocks) {
      block -= job.blocks;
      job = jobs[j];
    }
  return job;
}

template <typename T>
struct OuterJob {
  int64_t blocks;  // stripes of kOuterColumns columns x ranges of t
  const T* in;     // (rows, columns)
  int64_t pitch, columns;
  const T* a;          // (rows, kRank)
  float* partials;     // a range of t each, columns x rank numbers
  int64_t range;       // rows of it
  bool transposed;     // (rank, columns)
  uint32_t threshold;  // of dropout
};

template <typename T>
struct Outer {
  OuterJob<T> job[3];
  int64_t rows;
  int rank;
  const int64_t* seed;
};

constexpr int kOuterThreads = 256, kOuterRows = 32, kOuterColumns = 128;
template <int kRank>
constexpr int kOuterStages = kRank == 16    ? 5
                             : kRank <= 64  ? 4
                             : kRank == 128 ? 3
                                            : 2;
template <int kRank>
constexpr int kOuterStageBytes = 2 * kOuterRows * (kOuterColumns + kRank);  // 48 KiB or less in all

// A warp has 16 columns and all ranks of the sums.
template <typename T, int kRank>
__global__ void __launch_bounds__(kOuterThreads) outer_kernel(const Outer<T> p) {
  constexpr int kStages = kOuterStages<kRank>, kStageBytes = kOuterStageBytes<kRank>;
  LRK_DYN_SMEM(unsigned char, shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int64_t block = blockIdx.x;
  const OuterJob<T> job = job_of(p.job, block);
  const int64_t stripes = ceil_div(job.columns, kOuterColumns);
  const int64_t column0 = block % stripes * kOuterColumns, part = block / stripes;
  const int64_t begin = part * job.range, end = begin + job.range < p.rows ? begin + job.range : p.rows;
  const int64_t steps = ceil_div(end - begin, kOuterRows);
  const uint64_t seed = job.threshold ? uint64_t(*p.seed) : 0;

  auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* const stage = shared + step % kStages * kStageBytes;
      const int64_t row = begin + step * kOuterRows;
      load_tile<kOuterRows, kOuterColumns, kOuterThreads>(stage, job.in, job.pitch, row, end, column0, job.columns);
      load_tile<kOuterRows, kRank, kOuterThreads>(stage + 2 * kOuterRows * kOuterColumns, job.a, kRank, row, end, 0, kRank);
    }
    copy_commit();
  };
  float sum[kRank / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    unsigned char* const stage = shared + step % kStages * kStageBytes;
    copy_wait<kStages - 2>();
    if (job.threshold)
      drop_tile<kOuterRows, kOuterColumns, kOuterThreads>(stage, seed, job.threshold, begin + step * kOuterRows, column0);
    __syncthreads();
    load(step + kStages - 1);
#pragma unroll
    for (int k = 0; k < kOuterRows; k += 16) {
      uint32_t a[4];
      load_fragment<kOuterColumns, true>(a, stage, k, 2 * warp, lane);
      const uint32_t swapped[4] = {a[0], a[2], a[1], a[3]};
#pragma unroll
      for (int n = 0; n < kRank / 16; ++n) {
        uint32_t b[4];
        load_fragment<kRank, true>(b, stage + 2 * kOuterRows * kOuterColumns, k, 2 * n, lane);
        mma<T>(sum[2 * n], swapped, b[0], b[1]);
        mma<T>(sum[2 * n + 1], swapped, b[2], b[3]);
      }
    }
  }
  copy_wait<0>();

  float* const out = job.partials + part * job.columns * p.rank;
#pragma unroll
  for (int i = 0; i < kRank / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t column = column0 + 16 * warp + lane / 4 + e / 2 * 8;
      const int k = 8 * i + lane % 4 * 2 + e % 2;
      if (column < job.columns && k < p.rank) out[job.transposed ? k * job.columns + column : column * p.rank + k] = sum[i][e];
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Any type, shape and alignment
// ---------------------------------------------------------------------------------------------------------------------------

// Row-major, or transposed in memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t pitch;
  bool transposed;
  __device__ __forceinline__ int64_t at(int64_t row, int64_t column) const {
    return transposed ? column * pitch + row : row * pitch + column;
  }
};

// C(i, j) = scale sum_p A(i, p) B(p, j) + bias(j), and second = second_scale scale A B.
template <typename TA, typename S, typename TC>
struct Product {
  int64_t rows, columns, terms;
  Matrix<const TA> a;
  Matrix<const S> b;
  Matrix<TC> c;
  S scale = 1;
  const TC* bias = nullptr;
  TC* second = nullptr;  // laid out as C
  S second_scale = 1;
  int64_t parts = 1;  // partial C, one after the other, of `range` terms each
  int64_t range = INT64_MAX;
  Dropout dropout = {};
  bool drops_result = false;  // (t, n) of the mask are those of C, else of A as it lies in memory
};

constexpr int kTerms = 16;  // of a tile
template <int kColumns>
constexpr int kProductRows = kColumns == 16 ? 128 : 64;
template <int kColumns>
constexpr int kProductNumbers = kTerms * (kProductRows<kColumns> + 4 + kColumns + 4);

// 256 threads have 8 x 1 or 4 x 4 sums each. A thread loads eight neighbours in memory of A, which share one Philox call.
// Two blocks an SM: left to itself, ptxas keeps to 80 registers for a third one and spills.
template <typename TA, typename S, typename TC, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Product<TA, S, TC> p) {
  constexpr int kRows = kProductRows<kColumns>, kPitchA = kRows + 4, kPitchB = kColumns + 4;
  constexpr int kMine = kRows / 16, kMyColumns = kColumns / 16;
  LRK_DYN_SMEM(S, shared);
  S* const tile_a = shared;  // [term][row]
  S* const tile_b = shared + kTerms * kPitchA;
  const int tid = int(threadIdx.x), row = tid / 16 * kMine, column = tid % 16 * kMyColumns;
  const int64_t column_tiles = ceil_div(p.columns, kColumns), tiles = column_tiles * ceil_div(p.rows, kRows);
  const int64_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const int64_t row0 = tile / column_tiles * kRows, column0 = tile % column_tiles * kColumns;
  const int64_t begin = part * p.range, end = p.range < p.terms - begin ? begin + p.range : p.terms;
  const uint32_t threshold = p.dropout.threshold;
  const uint64_t seed = threshold ? uint64_t(*p.dropout.seed) : 0;

  S sum[kMine][kMyColumns] = {};
  for (int64_t term0 = begin; term0 < end; term0 += kTerms) {
    if (tid < kRows * kTerms / 8) {
      const int r = p.a.transposed ? tid % (kRows / 8) * 8 : tid / 2, q = p.a.transposed ? tid / (kRows / 8) : tid % 2 * 8;
      const int64_t i = row0 + r, term = term0 + q;  // the first of eight rows, or terms
      const int64_t count = p.a.transposed ? term < end ? p.rows - i : 0 : i < p.rows ? end - term : 0;
      const TA* const a = p.a.data + p.a.at(i, term);
      uint32_t mask = 0xFF;
      if (threshold && !p.drops_result)
        mask = p.a.transposed ? kept_bits(seed, threshold, term, i / 8) : kept_bits(seed, threshold, i, term / 8);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const S value = e < count && (mask >> e & 1) ? static_cast<S>(a[e]) : S(0);
        tile_a[p.a.transposed ? q * kPitchA + r + e : (q + e) * kPitchA + r] = value;
      }
    }
    for (int i = tid; i < kTerms * kColumns; i += kThreads) {
      const int q = p.b.transposed ? i % kTerms : i / kColumns, c = p.b.transposed ? i / kTerms : i % kColumns;
      const int64_t term = term0 + q, j = column0 + c;
      tile_b[q * kPitchB + c] = term < end && j < p.columns ? p.b.data[p.b.at(term, j)] : S(0);
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      S b[kMyColumns];
#pragma unroll
      for (int c = 0; c < kMyColumns; ++c) b[c] = tile_b[q * kPitchB + column + c];
#pragma unroll
      for (int r = 0; r < kMine; ++r) {
        const S a = tile_a[q * kPitchA + row + r];
#pragma unroll
        for (int c = 0; c < kMyColumns; ++c) sum[r][c] += a * b[c];
      }
    }
    __syncthreads();
  }

  const int64_t offset = part * p.rows * p.columns;
#pragma unroll
  for (int r = 0; r < kMine; ++r) {
    const int64_t i = row0 + row + r, j0 = column0 + column;
    if (i >= p.rows || j0 >= p.columns) continue;
    uint32_t mask = 0xFF;
    if (threshold && p.drops_result) mask = kept_bits(seed, threshold, i, j0 / 8) >> j0 % 8;
#pragma unroll
    for (int c = 0; c < kMyColumns; ++c) {
      const int64_t j = j0 + c;
      if (j >= p.columns) continue;
      const int64_t at = offset + p.c.at(i, j);
      S value = mask >> c & 1 ? p.scale * sum[r][c] : S(0);
      if (p.second) p.second[at] = static_cast<TC>(p.second_scale * value);
      if (p.bias) value += static_cast<S>(p.bias[j]);
      p.c.data[at] = static_cast<TC>(value);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Gradients of the factors from partial sums
// ---------------------------------------------------------------------------------------------------------------------------

template <typename S, typename F>
struct ReduceJob {
  int64_t blocks, size, parts;
  const S* partials;  // (parts, size)
  S scale;
  F* out;  // one of the two
  S* exact;
};

template <typename S, typename F>
struct Reduce {
  ReduceJob<S, F> job[3];
};

template <typename S, typename F>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Reduce<S, F> p) {
  int64_t block = blockIdx.x;
  const ReduceJob<S, F> job = job_of(p.job, block);
  const int64_t i = block * kThreads + threadIdx.x;
  if (i >= job.size) return;
  S sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < job.parts; ++part) sum += job.partials[part * job.size + i];
  sum *= job.scale;
  if (job.out)
    job.out[i] = static_cast<F>(sum);
  else
    job.exact[i] = sum;
}

// dcore[l] = (core[L-1] ... core[l+1])^T dC (core[l-1] ... core[0])^T, a block a row: row i is column i of the left product,
// times dC, times core[0]^T, ..., times core[l-1]^T.
template <typename S, typename F>
__global__ void __launch_bounds__(kThreads) chain_kernel(const F* core, const S* grad, F* out, int depth, int rank) {
  LRK_DYN_SMEM(S, shared);
  S *row = shared, *next = shared + rank;
  const int l = int(blockIdx.x) / rank, i = int(blockIdx.x) % rank;
  const int64_t size = int64_t(rank) * rank;
  auto times = [&](const auto* matrix, int64_t row_step, int64_t column_step) {  // row <- row times the matrix of these steps
    for (int j = threadIdx.x; j < rank; j += kThreads) {
      S sum = 0;
      for (int k = 0; k < rank; ++k) sum += row[k] * static_cast<S>(matrix[k * row_step + j * column_step]);
      next[j] = sum;
    }
    __syncthreads();
    S* const done = row;
    row = next;
    next = done;
  };
  if (l + 1 < depth) {
    for (int k = threadIdx.x; k < rank; k += kThreads) row[k] = static_cast<S>(core[(l + 1) * size + int64_t(k) * rank + i]);
    __syncthreads();
    for (int m = l + 2; m < depth; ++m) times(core + m * size, 1, rank);
    times(grad, rank, 1);
  } else {
    for (int k = threadIdx.x; k < rank; k += kThreads) row[k] = grad[int64_t(i) * rank + k];
    __syncthreads();
  }
  for (int m = 0; m < l; ++m) times(core + m * size, 1, rank);
  for (int k = threadIdx.x; k < rank; k += kThreads) out[l * size + int64_t(i) * rank + k] = static_cast<F>(row[k]);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------------

// Hands out the workspace piece by piece; with a null base only the size counts.
struct Room {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* const piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return piece;
  }
};

// Ranges of t whose sums are added up later: enough blocks for the GPU when `blocks` of them share a range.
struct Ranges {
  int64_t count, rows;
};
Ranges ranges_of(int64_t tokens, int64_t blocks) {
  if (tokens == 0) return {0, 1};
  int64_t count = kSplitBlocks / (blocks > 0 ? blocks : 1);
  if (count > ceil_div(tokens, kSplitRows)) count = ceil_div(tokens, kSplitRows);
  const int64_t rows = ceil_div(ceil_div(tokens, count > 0 ? count : 1), kOuterRows) * kOuterRows;
  return {ceil_div(tokens, rows), rows};
}

template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename F, typename To>
void launch_prologue(const Prologue<F, To>& p, void* stream) {
  const int64_t chunks =
      (p.factor[0].rows * p.factor[0].width + p.factor[1].rows * p.factor[1].width + p.products.rows * p.products.width) / 8;
  const int64_t copiers = chunks < 1024 * kThreads ? ceil_div(chunks, kThreads) : 1024;
  if (p.matrix_blocks + copiers == 0) return;
  const unsigned blocks = grid_size(kOp, p.matrix_blocks + copiers);
  LRK_LAUNCH((prologue_kernel<F, To>), blocks, kThreads, 2 * p.rank * sizeof(Sum<To>), stream, p);
  check_launch(kOp, "prologue_kernel");
}

// The gradients of the factors from partial sums; a `dcore` of several layers from dC, which needs room.
template <typename S>
struct Partials {
  Ranges left, core, right;
  S *left_sums, *core_sums, *right_sums, *core_grad;
};

template <typename S>
Partials<S> partials_at(Room& room, const ThreeFactor& p, int64_t left_blocks, int64_t core_blocks, int64_t right_blocks) {
  Partials<S> w;
  w.left = ranges_of(p.tokens, left_blocks);
  w.core = ranges_of(p.tokens, core_blocks);
  w.right = ranges_of(p.tokens, right_blocks);
  w.left_sums = room.take<S>(w.left.count * p.out_features * p.rank);
  w.core_sums = room.take<S>(p.depth > 0 ? w.core.count * p.rank * p.rank : 0);
  w.right_sums = room.take<S>(w.right.count * p.in_features * p.rank);
  w.core_grad = room.take<S>(p.depth > 1 ? p.rank * p.rank : 0);
  return w;
}

template <typename S, typename F>
void launch_reduce(const ThreeFactorBackward& p, const Partials<S>& w, void* stream) {
  const int64_t core_size = p.rank * p.rank;
  Reduce<S, F> reduce = {};
  int64_t blocks = 0;
  int jobs = 0;
  auto add = [&](int64_t size, const Ranges& ranges, const S* sums, double scale, void* out, S* exact) {
    const int64_t count = ceil_div(size, kThreads);
    if (count == 0 || !(out || exact)) return;
    reduce.job[jobs++] = {count, size, ranges.count, sums, S(scale), static_cast<F*>(out), exact};
    blocks += count;
  };
  add(p.out_features * p.rank, w.left, w.left_sums, 1, p.dleft, nullptr);
  add(p.rank * p.in_features, w.right, w.right_sums, keep_scale(p.drop_threshold), p.dright, nullptr);
  if (p.depth == 1) add(core_size, w.core, w.core_sums, p.scale, p.dcore, nullptr);
  if (p.depth > 1 && p.dcore) add(core_size, w.core, w.core_sums, p.scale, nullptr, w.core_grad);
  if (blocks == 0) return;
  LRK_LAUNCH((reduce_kernel<S, F>), grid_size(kOp, blocks), kThreads, 0, stream, reduce);
  check_launch(kOp, "reduce_kernel");
  if (p.depth > 1 && p.dcore && p.rank > 0) {
    const F* const core = static_cast<const F*>(p.core);
    F* const dcore = static_cast<F*>(p.dcore);
    LRK_LAUNCH((chain_kernel<S, F>), grid_size(kOp, p.depth * p.rank), kThreads, 2 * p.rank * sizeof(S), stream, core,
               w.core_grad, dcore, int(p.depth), int(p.rank));
    check_launch(kOp, "chain_kernel");
  }
}

Dropout dropout_of(const ThreeFactor& p) {
  return {p.seed, uint32_t(p.drop_threshold)};
}

// ---- tensor cores

int padded(int64_t rank) {
  int width = 16;
  while (width < rank) width *= 2;
  return width;
}

// Calls f(std::integral_constant<int, width>()).
template <typename F>
void with_rank(int width, F f) {
  switch (width) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    case 128: return f(std::integral_constant<int, 128>());
    case 256: return f(std::integral_constant<int, 256>());
  }
  throw std::runtime_error(std::string(kOp) + ": no kernels for a padded rank of " + std::to_string(width));
}

bool sizes_fit_tensor_cores(const ThreeFactor& p) {
  return (p.type == DType::bfloat16 || p.type == DType::float16) && p.in_features % 8 == 0 && p.out_features % 8 == 0;
}
bool aligned(const void* first, int64_t tokens, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && (pitch % 8 == 0 || tokens <= 1);
}

template <typename T>
struct TensorWork {
  T *left, *right, *matrix;  // (M, width), (N, width), (width, width)
  T *z1, *z2;                // (T, width); forward: z2
  T *g2, *g1;                // (T, width)
  Partials<float> partials;
};

template <typename T>
TensorWork<T> tensor_work_at(Room& room, const ThreeFactor& p, bool backward) {
  const int width = padded(p.rank);
  TensorWork<T> w = {};
  w.left = room.take<T>(p.out_features * width);
  w.right = room.take<T>(p.in_features * width);
  w.matrix = room.take<T>(p.depth > 0 ? width * width : 0);
  w.z1 = room.take<T>((backward ? 2 : 1) * p.tokens * width);
  w.z2 = backward ? w.z1 + p.tokens * width : w.z1;
  if (!backward) return w;
  w.g2 = room.take<T>(p.tokens * width);
  w.g1 = room.take<T>(p.tokens * width);
  w.partials = partials_at<float>(room, p, ceil_div(p.out_features, kOuterColumns), 1, ceil_div(p.in_features, kOuterColumns));
  return w;
}

template <typename T, typename F>
Prologue<F, T> tensor_prologue(const ThreeFactor& p, const TensorWork<T>& w, bool left, bool right) {
  const int width = padded(p.rank);
  Prologue<F, T> job = {};
  job.core = static_cast<const F*>(p.core);
  job.matrix = p.depth > 0 ? w.matrix : nullptr;
  job.depth = int(p.depth);
  job.rank = int(p.rank);
  job.width = width;
  job.matrix_blocks = p.depth > 0 ? width : 0;
  job.factor[0] = {static_cast<const F*>(p.left), w.left, left ? p.out_features : 0, p.rank, width, false};
  job.factor[1] = {static_cast<const F*>(p.right), w.right, right ? p.in_features : 0, p.rank, width, true};
  return job;
}

template <typename T>
void launch_shrink(const Shrink<T>& p, int width, void* stream) {
  if (p.rows == 0) return;
  with_rank(width, [&](auto rank) {
    typedef ShrinkShape<decltype(rank)::value> Shape;
    constexpr int kBytes = Shape::kStages * Shape::kStageBytes;
    allow_shared(&shrink_kernel<T, decltype(rank)::value>, kBytes);
    LRK_LAUNCH((shrink_kernel<T, decltype(rank)::value>), grid_size(kOp, ceil_div(p.rows, Shape::kRows)), Shape::kThreads,
               kBytes, stream, p);
    check_launch(kOp, "shrink_kernel");
  });
}

template <typename T>
void launch_expand(const Expand<T>& p, int width, void* stream) {
  const int64_t blocks = ceil_div(p.rows, kExpandRows) * ceil_div(p.columns, kExpandColumns);
  if (blocks == 0) return;
  with_rank(width, [&](auto rank) {
    constexpr int kBytes = kExpandBytes<decltype(rank)::value>;
    allow_shared(&expand_kernel<T, decltype(rank)::value>, kBytes);
    LRK_LAUNCH((expand_kernel<T, decltype(rank)::value>), grid_size(kOp, blocks), kExpandThreads, kBytes, stream, p);
    check_launch(kOp, "expand_kernel");
  });
}

template <typename T, typename F>
void tensor_forward(const ThreeFactorForward& p, void* workspace, void* stream) {
  Room room = {static_cast<char*>(workspace)};
  const TensorWork<T> w = tensor_work_at<T>(room, p, false);
  const int width = padded(p.rank);
  launch_prologue(tensor_prologue<T, F>(p, w, true, true), stream);
  float* const z = static_cast<float*>(p.z);
  launch_shrink(Shrink<T>{static_cast<const T*>(p.x), p.x_stride, w.right, p.depth > 0 ? w.matrix : nullptr, p.tokens,
                          p.in_features, int(p.rank), float(keep_scale(p.drop_threshold)), float(p.scale), z,
                          z + p.tokens * p.rank, nullptr, w.z2, dropout_of(p)},
                width, stream);
  launch_expand(Expand<T>{w.z2, w.left, static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.tokens, p.out_features, 1, {}},
                width, stream);
}

template <typename T, typename F>
void tensor_backward(const ThreeFactorBackward& p, void* workspace, void* stream) {
  Room room = {static_cast<char*>(workspace)};
  const TensorWork<T> w = tensor_work_at<T>(room, p, true);
  const int width = padded(p.rank);
  const bool wants_core = p.dcore && p.depth > 0, wants_g = p.dx || p.dright || wants_core;

  Prologue<F, T> prologue = tensor_prologue<T, F>(p, w, wants_g, p.dx != nullptr);
  prologue.transposed = true;
  if (!wants_g) prologue.matrix_blocks = 0;
  const int64_t first = wants_core ? 0 : p.tokens, stop = p.dleft ? 2 * p.tokens : p.tokens;  // rows of z1, then z2
  prologue.products = {
      static_cast<const float*>(p.z) + first * p.rank, w.z1 + first * width, stop - first, p.rank, width, false};
  launch_prologue(prologue, stream);
  if (wants_g)
    launch_shrink(Shrink<T>{static_cast<const T*>(p.dy),
                            p.dy_stride,
                            w.left,
                            p.depth > 0 ? w.matrix : nullptr,
                            p.tokens,
                            p.out_features,
                            int(p.rank),
                            1,
                            float(p.scale),
                            nullptr,
                            nullptr,
                            w.g2,
                            w.g1,
                            {}},
                  width, stream);
  if (p.dx)
    launch_expand(Expand<T>{w.g1, w.right, nullptr, static_cast<T*>(p.dx), p.tokens, p.in_features,
                            float(keep_scale(p.drop_threshold)), dropout_of(p)},
                  width, stream);

  Outer<T> outer = {};
  outer.rows = p.tokens;
  outer.rank = int(p.rank);
  outer.seed = p.seed;
  int64_t blocks = 0;
  int jobs = 0;
  auto add = [&](const Ranges& ranges, const void* in, int64_t pitch, int64_t columns, const T* a, float* sums, bool transposed,
                 int32_t threshold) {
    const int64_t count = ceil_div(columns, kOuterColumns) * ranges.count;
    if (count == 0) return;
    outer.job[jobs++] = {count,      static_cast<const T*>(in), pitch, columns, a, sums, ranges.rows,
                         transposed, uint32_t(threshold)};
    blocks += count;
  };
  const Partials<float>& parts = w.partials;
  if (p.dleft) add(parts.left, p.dy, p.dy_stride, p.out_features, w.z2, parts.left_sums, false, 0);
  if (p.dright) add(parts.right, p.x, p.x_stride, p.in_features, w.g1, parts.right_sums, true, p.drop_threshold);
  if (wants_core) add(parts.core, w.g2, width, p.rank, w.z1, parts.core_sums, false, 0);
  if (blocks > 0)
    with_rank(width, [&](auto rank) {
      constexpr int kRank = decltype(rank)::value, kBytes = kOuterStages<kRank> * kOuterStageBytes<kRank>;
      static_assert(kBytes <= 48 * 1024, "a block may have more only by allow_shared()");
      LRK_LAUNCH((outer_kernel<T, decltype(rank)::value>), grid_size(kOp, blocks), kOuterThreads, kBytes, stream, outer);
      check_launch(kOp, "outer_kernel");
    });
  launch_reduce<float, F>(p, parts, stream);
}

// ---- any type, shape and alignment

template <typename TA, typename S, typename TC>
void launch_product(const Product<TA, S, TC>& p, void* stream) {
  auto launch = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const int64_t tiles = ceil_div(p.rows, kProductRows<kColumns>) * ceil_div(p.columns, kColumns);
    if (tiles * p.parts == 0) return;
    LRK_LAUNCH((product_kernel<TA, S, TC, decltype(columns)::value>), grid_size(kOp, tiles * p.parts), kThreads,
               kProductNumbers<kColumns> * sizeof(S), stream, p);
    check_launch(kOp, "product_kernel");
  };
  if (p.columns <= 16)
    launch(std::integral_constant<int, 16>());
  else
    launch(std::integral_constant<int, 64>());
}

template <typename S>
struct PlainWork {
  S *left, *right, *matrix;  // (M, K), (K, N), (K, K)
  S *g2, *g1;                // (T, K)
  Partials<S> partials;
};

template <typename S>
PlainWork<S> plain_work_at(Room& room, const ThreeFactor& p, bool backward) {
  const bool converts = p.factor_type == DType::bfloat16 || p.factor_type == DType::float16;
  PlainWork<S> w = {};
  w.left = room.take<S>(converts ? ceil_div(p.out_features * p.rank, 8) * 8 : 0);
  w.right = room.take<S>(converts ? ceil_div(p.in_features * p.rank, 8) * 8 : 0);
  w.matrix = room.take<S>(p.depth > 0 ? p.rank * p.rank : 0);
  if (!backward) return w;
  w.g2 = room.take<S>(p.tokens * p.rank);
  w.g1 = room.take<S>(p.tokens * p.rank);
  const int64_t across = ceil_div(p.rank, p.rank <= 16 ? 16 : 64);
  auto tiles = [&](int64_t rows) { return across * ceil_div(rows, p.rank <= 16 ? kProductRows<16> : kProductRows<64>); };
  w.partials = partials_at<S>(room, p, tiles(p.out_features), tiles(p.rank), tiles(p.in_features));
  return w;
}

// Makes C, and the factors in the type of the sums where they have another one; `left` and `right` point to what is to be read.
template <typename S, typename F>
void plain_prologue(const ThreeFactor& p, const PlainWork<S>& w, const S*& left, const S*& right, void* stream) {
  Prologue<F, S> job = {};
  job.core = static_cast<const F*>(p.core);
  job.matrix = w.matrix;
  job.depth = int(p.depth);
  job.rank = job.width = int(p.rank);
  job.matrix_blocks = p.depth > 0 ? p.rank : 0;
  left = static_cast<const S*>(p.left);
  right = static_cast<const S*>(p.right);
  if (!std::is_same<S, F>::value) {
    const int64_t left_size = p.out_features * p.rank, right_size = p.in_features * p.rank;
    job.factor[0] = {static_cast<const F*>(p.left), w.left, 1, left_size, ceil_div(left_size, 8) * 8, false};
    job.factor[1] = {static_cast<const F*>(p.right), w.right, 1, right_size, ceil_div(right_size, 8) * 8, false};
    left = w.left;
    right = w.right;
  }
  launch_prologue(job, stream);
}

template <typename T, typename F>
void plain_forward(const ThreeFactorForward& p, void* workspace, void* stream) {
  typedef Sum<T> S;
  Room room = {static_cast<char*>(workspace)};
  const PlainWork<S> w = plain_work_at<S>(room, p, false);
  const int64_t rows = p.tokens, in = p.in_features, out = p.out_features, rank = p.rank;
  const S *left, *right;
  plain_prologue<S, F>(p, w, left, right, stream);
  S *const z1 = static_cast<S*>(p.z), *const z2 = z1 + rows * rank;

  Product<T, S, S> first = {
      rows, rank, in, {static_cast<const T*>(p.x), p.x_stride, false}, {right, in, true}, {z1, rank, false}};
  first.scale = S(keep_scale(p.drop_threshold));
  first.dropout = dropout_of(p);
  if (p.depth == 0) first.second = z2;
  first.second_scale = S(p.scale);
  launch_product(first, stream);
  if (p.depth > 0) {
    Product<S, S, S> second = {rows, rank, rank, {z1, rank, false}, {w.matrix, rank, true}, {z2, rank, false}};
    second.scale = S(p.scale);
    launch_product(second, stream);
  }
  Product<S, S, T> y = {rows, out, rank, {z2, rank, false}, {left, rank, true}, {static_cast<T*>(p.y), out, false}};
  y.bias = static_cast<const T*>(p.bias);
  launch_product(y, stream);
}

template <typename T, typename F>
void plain_backward(const ThreeFactorBackward& p, void* workspace, void* stream) {
  typedef Sum<T> S;
  Room room = {static_cast<char*>(workspace)};
  const PlainWork<S> w = plain_work_at<S>(room, p, true);
  const int64_t rows = p.tokens, in = p.in_features, out = p.out_features, rank = p.rank;
  const bool wants_core = p.dcore && p.depth > 0, wants_g = p.dx || p.dright || wants_core;
  const S *left = nullptr, *right = nullptr;
  if (wants_g) plain_prologue<S, F>(p, w, left, right, stream);
  const S *const z1 = static_cast<const S*>(p.z), *const z2 = z1 + rows * rank;
  const Matrix<const T> dy = {static_cast<const T*>(p.dy), p.dy_stride, false};

  if (wants_g) {
    Product<T, S, S> first = {rows, rank, out, dy, {left, rank, false}, {w.g2, rank, false}};
    if (p.depth == 0) first.second = w.g1;
    first.second_scale = S(p.scale);
    launch_product(first, stream);
  }
  if (wants_g && p.depth > 0) {
    Product<S, S, S> second = {rows, rank, rank, {w.g2, rank, false}, {w.matrix, rank, false}, {w.g1, rank, false}};
    second.scale = S(p.scale);
    launch_product(second, stream);
  }
  if (p.dx) {
    Product<S, S, T> dx = {rows, in, rank, {w.g1, rank, false}, {right, in, false}, {static_cast<T*>(p.dx), in, false}};
    dx.scale = S(keep_scale(p.drop_threshold));
    dx.dropout = dropout_of(p);
    dx.drops_result = true;
    launch_product(dx, stream);
  }
  auto outer = [&](auto job, const Ranges& ranges) {
    job.range = ranges.rows;
    job.parts = ranges.count;
    launch_product(job, stream);
  };
  const Partials<S>& parts = w.partials;
  if (p.dleft)
    outer(Product<T, S, S>{out, rank, rows, {dy.data, dy.pitch, true}, {z2, rank, false}, {parts.left_sums, rank, false}},
          parts.left);
  if (p.dright) {
    Product<T, S, S> dright = {
        in, rank, rows, {static_cast<const T*>(p.x), p.x_stride, true}, {w.g1, rank, false}, {parts.right_sums, in, true}};
    dright.dropout = dropout_of(p);
    outer(dright, parts.right);
  }
  if (wants_core)
    outer(Product<S, S, S>{rank, rank, rows, {w.g2, rank, true}, {z1, rank, false}, {parts.core_sums, rank, false}},
          parts.core);
  launch_reduce<S, F>(p, parts, stream);
}

// ---- types

// Calls f(T(), F()) with the types of x and of the factors.
template <typename Call>
void with_types(const ThreeFactor& p, Call f) {
  const bool same = p.factor_type == p.type;
  if (same || p.factor_type == DType::float32) switch (p.type) {
      case DType::float32: return f(float(), float());
      case DType::float64:
        if (same) return f(double(), double());
        break;
      case DType::bfloat16: return same ? f(__nv_bfloat16(), __nv_bfloat16()) : f(__nv_bfloat16(), float());
      case DType::float16: return same ? f(__half(), __half()) : f(__half(), float());
    }
  throw std::runtime_error(std::string(kOp) + ": no kernels for dtype " + std::to_string(int(p.type)) +
                           " with factors of dtype " + std::to_string(int(p.factor_type)));
}

}  // namespace

int64_t three_factor_cuda_workspace(const ThreeFactor& p, bool backward) {
  Room plain = {nullptr}, tensor = {nullptr};
  if (p.type == DType::float64)
    plain_work_at<double>(plain, p, backward);
  else
    plain_work_at<float>(plain, p, backward);
  if (sizes_fit_tensor_cores(p)) tensor_work_at<__half>(tensor, p, backward);  // if pointers are aligned
  return plain.used > tensor.used ? plain.used : tensor.used;
}

void three_factor_forward_cuda(const ThreeFactorForward& p, void* workspace, void* stream) {
  const bool tensor = sizes_fit_tensor_cores(p) && aligned(p.x, p.tokens, p.x_stride) && aligned(p.y, 0, 0);
  with_types(p, [&](auto type, auto factor) {
    typedef decltype(type) T;
    typedef decltype(factor) F;
    if constexpr (sizeof(T) == 2)
      if (tensor) return tensor_forward<T, F>(p, workspace, stream);
    plain_forward<T, F>(p, workspace, stream);
  });
}

void three_factor_backward_cuda(const ThreeFactorBackward& p, void* workspace, void* stream) {
  const bool tensor = sizes_fit_tensor_cores(p) && aligned(p.x, p.tokens, p.x_stride) && aligned(p.dy, p.tokens, p.dy_stride) &&
                      aligned(p.dx, 0, 0);
  with_types(p, [&](auto type, auto factor) {
    typedef decltype(type) T;
    typedef decltype(factor) F;
    if constexpr (sizeof(T) == 2)
      if (tensor) return tensor_backward<T, F>(p, workspace, stream);
    plain_backward<T, F>(p, workspace, stream);
  });
}

}  // namespace lrk
