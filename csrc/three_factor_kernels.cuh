// three_factor_kernels.cuh: the kernels of three_factor_cuda.cu, which says what they compute and in which order they run.
//
// Tensor-core kernels are templates of kRank, the rank padded to 16, 32, ... 256. Their tiles of 16-bit numbers stream through
// a ring of stages in shared memory: cp.async keeps all but one of them under way (an SM has to have some 32 KiB under way to
// get the memory's full bandwidth), ldmatrix takes them to registers, mma sums in float32. In every tile the rows are features
// or tokens as they lie in memory; where a product needs the transpose, ldmatrix transposes.
#pragma once
#include <type_traits>

#include "cuda_utils.cuh"
#include "ptx.cuh"

namespace lrk {
namespace {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The widest dtype of a sum.
template <typename T>
using Sum = std::conditional_t<std::is_same<T, double>::value, double, float>;

// ---- dropout

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

// ---- prologue: C and the factors, in the type and layout of the products

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
  Sum<To> shift;               // subtracted from the diagonal of C
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
    p.matrix[p.transposed ? k * p.width + i : i * p.width + k] =
        static_cast<To>(i < p.rank && k < p.rank ? row[k] - (k == i ? p.shift : S(0)) : S(0));
}

// ---- tensor cores

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

// The 16 x 16 numbers X at (row, 8 chunk) of a tile as four matrices: top left, bottom left, top right, bottom right. To mma,
// r is a = X, and (r0, r2), (r1, r3) are b = the halves of X^T. With kTranspose (r0, r1), (r2, r3) are b = the halves of X, and
// (r0, r2, r1, r3) is a = X^T.
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
  int rank = 0;
  float first_scale = 1, second_scale = 1;
  float *first_saved = nullptr, *second_saved = nullptr;  // (rows, rank), or null
  T *first = nullptr, *second = nullptr;                  // (rows, kRank), or null
  Dropout dropout = {};
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
  static constexpr int kBlocks = 512 / kThreads;  // an SM: 128 registers a thread; left to itself, ptxas spills at 96
  static constexpr int kStageBytes = 2 * kColumns * (kRows + kRank);
  static constexpr int kStages = kRank == 64 ? 6 : kRank <= 128 ? 4 : 2;  // 48, 64, 96, 96 and 80 KiB; sm_86 allows 99
  static_assert(kHalves == 1 || 64 * kRank <= kStageBytes, "the sums of half the warps fit");
};

template <typename T, int kRank>
__global__ void __launch_bounds__(ShrinkShape<kRank>::kThreads, ShrinkShape<kRank>::kBlocks) shrink_kernel(const Shrink<T> p) {
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
  float scale = 1;
  Dropout dropout = {};
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
  const T* factor;  // fused: (columns, kRank)
  float* shares;    // (stripes, rows, kRank)
};

constexpr int kOuterThreads = 256, kOuterColumns = 128;
constexpr int kFusedRank = 16;

template <int kRank, bool kFused>
struct OuterShape {
  static constexpr int kRows = kFused ? 128 : 32;  // of t, a stage
  static constexpr int kStages = kFused || kRank == 256 ? 2 : kRank == 128 ? 3 : kRank == 16 ? 5 : 4;
  static constexpr int kStageBytes = 2 * kRows * (kOuterColumns + kRank);
  static constexpr int kBytes = kStages * kStageBytes + (kFused ? 2 * kOuterColumns * kRank : 0);  // 48 KiB; fused 76
};

// A warp has 16 columns and all ranks of the sums. kFused (job 0 only): each stage gives its share of in F as well, a warp 16
// rows of it, so that `in` is read once for both.
template <typename T, int kRank, bool kFused>
__global__ void __launch_bounds__(kOuterThreads) outer_kernel(const Outer<T> p) {
  typedef OuterShape<kRank, kFused> Shape;
  constexpr int kRows = Shape::kRows, kStages = Shape::kStages;
  LRK_DYN_SMEM(unsigned char, shared);
  unsigned char* const factor = shared + kStages * Shape::kStageBytes;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int64_t block = blockIdx.x;
  const OuterJob<T> job = job_of(p.job, block);
  const int64_t stripes = ceil_div(job.columns, kOuterColumns), stripe = block % stripes, part = block / stripes;
  const int64_t column0 = stripe * kOuterColumns;
  const int64_t begin = part * job.range, end = begin + job.range < p.rows ? begin + job.range : p.rows;
  const int64_t steps = ceil_div(end - begin, kRows);
  const uint64_t seed = job.threshold ? uint64_t(*p.seed) : 0;

  auto load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* const stage = shared + step % kStages * Shape::kStageBytes;
      const int64_t row = begin + step * kRows;
      load_tile<kRows, kOuterColumns, kOuterThreads>(stage, job.in, job.pitch, row, end, column0, job.columns);
      load_tile<kRows, kRank, kOuterThreads>(stage + 2 * kRows * kOuterColumns, job.a, kRank, row, end, 0, kRank);
    }
    copy_commit();
  };
  if (kFused) load_tile<kOuterColumns, kRank, kOuterThreads>(factor, p.factor, kRank, column0, job.columns, 0, kRank);
  float sum[kRank / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    unsigned char* const stage = shared + step % kStages * Shape::kStageBytes;
    copy_wait<kStages - 2>();
    if (job.threshold)
      drop_tile<kRows, kOuterColumns, kOuterThreads>(stage, seed, job.threshold, begin + step * kRows, column0);
    __syncthreads();
    load(step + kStages - 1);
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
      uint32_t a[4];
      load_fragment<kOuterColumns, true>(a, stage, k, 2 * warp, lane);
      const uint32_t swapped[4] = {a[0], a[2], a[1], a[3]};
#pragma unroll
      for (int n = 0; n < kRank / 16; ++n) {
        uint32_t b[4];
        load_fragment<kRank, true>(b, stage + 2 * kRows * kOuterColumns, k, 2 * n, lane);
        mma<T>(sum[2 * n], swapped, b[0], b[1]);
        mma<T>(sum[2 * n + 1], swapped, b[2], b[3]);
      }
    }
    if (kFused) {
      static_assert(!kFused || kRows == kOuterThreads / 2, "a warp has 16 rows");
      float share[kRank / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kOuterColumns; k += 16) {
        uint32_t a[4];
        load_fragment<kOuterColumns, false>(a, stage, 16 * warp, k / 8, lane);
#pragma unroll
        for (int n = 0; n < kRank / 16; ++n) {
          uint32_t b[4];
          load_fragment<kRank, true>(b, factor, k, 2 * n, lane);
          mma<T>(share[2 * n], a, b[0], b[1]);
          mma<T>(share[2 * n + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRank / 8; ++i)
#pragma unroll
        for (int bottom = 0; bottom < 2; ++bottom) {
          const int64_t t = begin + step * kRows + 16 * warp + lane / 4 + 8 * bottom;
          if (t < end)
            *reinterpret_cast<float2*>(p.shares + (stripe * p.rows + t) * kRank + 8 * i + lane % 4 * 2) =
                make_float2(share[i][2 * bottom], share[i][2 * bottom + 1]);
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

// The end of shrink where outer_kernel has left its shares: first is the sum of those of all stripes. A number a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Shrink<T> p, const float* shares, int64_t stripes) {
  static_assert(kThreads % kFusedRank == 0, "rows are not cut");
  LRK_DYN_SMEM(float, rounded);
  const int64_t size = p.rows * kFusedRank, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int64_t stripe = 0; stripe < stripes; ++stripe) sum += shares[stripe * size + i];
    p.first[i] = static_cast<T>(sum);
  }
  if (p.matrix) {
    rounded[threadIdx.x] = static_cast<float>(static_cast<T>(sum));
    __syncthreads();
    const int k = int(threadIdx.x) % kFusedRank;
    sum = 0;
#pragma unroll
    for (int q = 0; q < kFusedRank; ++q)
      sum += rounded[int(threadIdx.x) - k + q] * static_cast<float>(p.matrix[k * kFusedRank + q]);
  }
  if (i < size) p.second[i] = static_cast<T>(p.second_scale * sum);
}

// ---- any type, shape and alignment

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
    S tile_sum[kMine][kMyColumns] = {};  // apart, as errors grow with the number of terms that are added one by one
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      S b[kMyColumns];
#pragma unroll
      for (int c = 0; c < kMyColumns; ++c) b[c] = tile_b[q * kPitchB + column + c];
#pragma unroll
      for (int r = 0; r < kMine; ++r) {
        const S a = tile_a[q * kPitchA + row + r];
#pragma unroll
        for (int c = 0; c < kMyColumns; ++c) tile_sum[r][c] += a * b[c];
      }
    }
#pragma unroll
    for (int i = 0; i < kMine * kMyColumns; ++i)
      sum[i / kMyColumns][i % kMyColumns] += tile_sum[i / kMyColumns][i % kMyColumns];
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

// ---- gradients of the factors from partial sums

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

}  // namespace
}  // namespace lrk
