// three_factor_cuda.cu: the low-rank update of a linear layer (formulas, symbols and the dropout rule in three_factor.h).
//
// left (M, K) and right^T (N, K) are both F: features D x rank K. Three skinny products of F do everything, s, bias, dropout
// and the small K x K product inside:
//   shrink  first[t][k] = sum_d in[t][d] F[d][k], second = s first B^T     x -> z1, z2;        dy -> g2, g1  (B = C, C^T)
//   expand  out[t][d]   = sum_k a[t][k] F[d][k]                            z2 -> y0 (+ bias);  g1 -> dx0 (dropped)
//   outer   dF[d][k]    = sum_t in[t][d] a[t][k]                           dy, z2 -> dL;  x, g1 -> dR^T;  g2, z1 -> dC / s
// forward:  prologue (C, row by row; factors to the type and layout of the products), shrink, expand.
// backward: prologue, shrink, outer (all three, partial sums over ranges of t), reduce, chain (dC -> dcore, if L > 1), expand.
// With K <= 16 a dy too large for the caches is read once: outer makes dL and each stripe's share of g2, then finish adds these
// up in place of shrink. With more ranks the shares would cost as much as a second pass. What is not wanted is not launched.
//
// bfloat16 and float16 run on the tensor cores, sums in float32. F, z and g are rounded to the type once, as operands; z is
// saved, and gradients of the factors are added up, in float32. Such a pass has some K flops a byte, so the memory bounds it up
// to K = 64 or so. float32, float64 and what is no multiple of 8 or not 16-byte aligned take product_kernel, a plain tiled
// product, in the same order; nothing but the outputs is rounded to 16 bits there.
//
// Every partial sum has its own slot and slots are added up in order: no atomics, results repeat bit by bit. How T is cut into
// ranges depends on the sizes alone, not on the GPU.
#include "three_factor.h"
#include "three_factor_kernels.cuh"

#ifndef LRK_FUSED_BYTES  // a test lowers it to see both ways with small numbers
#define LRK_FUSED_BYTES (32 << 20)
#endif

namespace lrk {
namespace {

constexpr const char* kOp = "three_factor";
constexpr int64_t kSplitBlocks = 384;             // blocks that share the sums over t, about three an SM of a large GPU
constexpr int64_t kSplitRows = 64;                // rows of t that are worth a block
constexpr int64_t kFusedBytes = LRK_FUSED_BYTES;  // of dy: less of it stays in the caches of a large GPU until it is read again

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
  const int64_t rows = ceil_div(ceil_div(tokens, count > 0 ? count : 1), kSplitRows) * kSplitRows;
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
  float* shares;             // of g2, (M / kOuterColumns, T, kFusedRank), if fused
  Partials<float> partials;
};

// g2 and dL from one pass over dy. With 32 ranks the shares of g2 would cost as much as a second pass.
bool fuses(const ThreeFactor& p) {
  return p.rank <= kFusedRank && 2 * p.tokens * p.out_features > kFusedBytes;
}

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
  if (fuses(p)) w.shares = room.take<float>(ceil_div(p.out_features, kOuterColumns) * p.tokens * kFusedRank);
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
  job.shift = static_cast<Sum<T>>(p.shift);
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

// dL, dR and dC in one launch.
template <typename T>
struct OuterLaunch {
  Outer<T> args = {};
  int64_t blocks = 0;
  int jobs = 0;

  OuterLaunch(const ThreeFactorBackward& p) {
    args.rows = p.tokens;
    args.rank = int(p.rank);
    args.seed = p.seed;
  }
  void add(const Ranges& ranges, const void* in, int64_t pitch, int64_t columns, const T* a, float* sums,
           bool transposed = false, int32_t threshold = 0) {
    const int64_t count = ceil_div(columns, kOuterColumns) * ranges.count;
    if (count == 0) return;
    OuterJob<T>& job = args.job[jobs++];
    job = {count, static_cast<const T*>(in), pitch, columns, a, sums, ranges.rows, transposed, uint32_t(threshold)};
    blocks += count;
  }
  template <int kRank, bool kFused>
  void launch(void* stream) const {
    if (blocks == 0) return;
    constexpr int kBytes = OuterShape<kRank, kFused>::kBytes;
    allow_shared(&outer_kernel<T, kRank, kFused>, kBytes);
    LRK_LAUNCH((outer_kernel<T, kRank, kFused>), grid_size(kOp, blocks), kOuterThreads, kBytes, stream, args);
    check_launch(kOp, "outer_kernel");
  }
};

template <typename T, typename F>
void tensor_forward(const ThreeFactorForward& p, void* workspace, void* stream) {
  Room room = {static_cast<char*>(workspace)};
  const TensorWork<T> w = tensor_work_at<T>(room, p, false);
  const int width = padded(p.rank);
  launch_prologue(tensor_prologue<T, F>(p, w, true, true), stream);

  Shrink<T> z = {static_cast<const T*>(p.x), p.x_stride, w.right, p.depth > 0 ? w.matrix : nullptr, p.tokens, p.in_features};
  z.rank = int(p.rank);
  z.first_scale = float(keep_scale(p.drop_threshold));
  z.second_scale = float(p.scale);
  z.first_saved = static_cast<float*>(p.z);
  z.second_saved = z.first_saved + p.tokens * p.rank;
  z.second = w.z2;
  z.dropout = dropout_of(p);
  launch_shrink(z, width, stream);

  Expand<T> y = {w.z2, w.left, static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.tokens, p.out_features};
  launch_expand(y, width, stream);
}

template <typename T, typename F>
void tensor_backward(const ThreeFactorBackward& p, void* workspace, void* stream) {
  Room room = {static_cast<char*>(workspace)};
  const TensorWork<T> w = tensor_work_at<T>(room, p, true);
  const Partials<float>& parts = w.partials;
  const int width = padded(p.rank);
  const bool wants_core = p.dcore && p.depth > 0, wants_g = p.dx || p.dright || wants_core;
  const bool fused = fuses(p) && p.dleft && wants_g;

  Prologue<F, T> prologue = tensor_prologue<T, F>(p, w, wants_g, p.dx != nullptr);
  prologue.transposed = true;
  if (!wants_g) prologue.matrix_blocks = 0;
  const int64_t first = wants_core ? 0 : p.tokens, stop = p.dleft ? 2 * p.tokens : p.tokens;  // rows of z1, then z2
  Copy<float, T>& z = prologue.products;
  z = {static_cast<const float*>(p.z) + first * p.rank, w.z1 + first * width, stop - first, p.rank, width, false};
  launch_prologue(prologue, stream);

  Shrink<T> g = {static_cast<const T*>(p.dy), p.dy_stride, w.left, p.depth > 0 ? w.matrix : nullptr, p.tokens, p.out_features};
  g.rank = int(p.rank);
  g.second_scale = float(p.scale);
  g.first = w.g2;
  g.second = w.g1;
  if (fused) {
    OuterLaunch<T> dleft(p);
    dleft.add(parts.left, p.dy, p.dy_stride, p.out_features, w.z2, parts.left_sums);
    dleft.args.factor = w.left;
    dleft.args.shares = w.shares;
    dleft.template launch<kFusedRank, true>(stream);
    LRK_LAUNCH((finish_kernel<T>), grid_size(kOp, ceil_div(p.tokens * kFusedRank, kThreads)), kThreads,
               kThreads * sizeof(float), stream, g, w.shares, ceil_div(p.out_features, kOuterColumns));
    check_launch(kOp, "finish_kernel");
  } else if (wants_g) {
    launch_shrink(g, width, stream);
  }

  OuterLaunch<T> outer(p);
  if (p.dleft && !fused) outer.add(parts.left, p.dy, p.dy_stride, p.out_features, w.z2, parts.left_sums);
  if (p.dright) outer.add(parts.right, p.x, p.x_stride, p.in_features, w.g1, parts.right_sums, true, p.drop_threshold);
  if (wants_core) outer.add(parts.core, w.g2, width, p.rank, w.z1, parts.core_sums);
  with_rank(width, [&](auto rank) { outer.template launch<decltype(rank)::value, false>(stream); });
  launch_reduce<float, F>(p, parts, stream);

  if (p.dx) {  // last, so that the caches hold some of it when dy W is added
    Expand<T> dx = {w.g1, w.right, nullptr, static_cast<T*>(p.dx), p.tokens, p.in_features};
    dx.scale = float(keep_scale(p.drop_threshold));
    dx.dropout = dropout_of(p);
    launch_expand(dx, width, stream);
  }
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
  job.shift = static_cast<S>(p.shift);
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
