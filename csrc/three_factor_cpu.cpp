// three_factor_cpu.cpp: the update of a linear layer on the CPU (formulas and symbols in three_factor.h), compiled once a SIMD
// level.
//
// One register-blocked product does everything: acc[i][:] += a[i] b[p][:], vectors along K (or along the outputs), with 6 x 2
// or 12 x 1 accumulators. x and dy go through tiles of 48 x 96 numbers, widened to float (and dropped) on the way, that stay in
// L1 while both of their products are formed: dy L and dy^T z2 from one read of dy. 6 T K (N + M) flops, two thirds of them in
// backward; bound by the multipliers, as the base products are.
//
// Rows of x are independent of how they are divided among threads. Parameter gradients are summed over at most 16 slices of
// rows whose number depends on the shape alone, then over the slices in their order: threads do not change a bit.
#include "three_factor.h"
#include "three_factor_tiles.h"

namespace lrk {
namespace {

constexpr int64_t kMaxSlices = 16;
constexpr int64_t kFew = 32;  // rows of x up to which packing R and L takes longer than it saves

// ---------------------------------------------------------------------- the core

// Carves aligned pieces out of the workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used;
  template <typename A>
  A* take(int64_t count) {
    A* piece = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(A)), kAlign);
    return piece;
  }
};

template <typename A>
struct Core {  // (K, K) matrices as rows of `width`, padded to a multiple of 12 rows
  int64_t rank, width, size;
  A* layers;    // (L, ...)
  A* prefixes;  // (L, ...): prefixes[l] = core[l] ... core[0]; the last one minus the shift: C
  A* scratch;   // (2, ...)
  A* product() const { return prefixes; }
  A* at(A* matrices, int64_t index) const { return matrices + index * size; }
};

template <typename A>
Core<A> take_core(Arena& arena, const ThreeFactor& p, int64_t width) {
  Core<A> core;
  core.rank = p.rank;
  core.width = width;
  core.size = (round_up(p.rank, kGroup) + 1) * width;  // a row more: blocks of 12 read past the end
  core.layers = p.depth ? arena.take<A>(p.depth * core.size) : nullptr;
  core.prefixes = p.depth ? arena.take<A>(p.depth * core.size) : nullptr;
  core.scratch = p.depth ? arena.take<A>(2 * core.size) : nullptr;
  return core;
}

// out = a b
template <typename A>
void core_times(const Core<A>& core, A* out, const A* a, const A* b) {
  product<A, 0>(out, core.rank, core.width, a, 1, core.rank, b, false);
}

template <typename F, typename A>
void make_core(const Core<A>& core, const ThreeFactor& p) {
  const int64_t kk = core.rank * core.rank;
  for (int64_t l = 0; l < p.depth; ++l) {
    A* layer = core.at(core.layers, l);
    A* prefix = core.at(core.prefixes, l);
    pack_rows(layer, static_cast<const F*>(p.core) + l * kk, core.rank, core.rank, core.rank, 1, core.width);
    if (l == 0) {
      __builtin_memcpy(prefix, layer, sizeof(A) * size_t(core.rank * core.width));
      continue;
    }
    core_times(core, prefix, layer, core.at(core.prefixes, l - 1));
  }
  if (p.shift == 0 || p.depth == 0) return;
  A* const last = core.at(core.prefixes, p.depth - 1);
  for (int64_t r = 0; r < core.rank; ++r) last[r * core.width + r] -= A(p.shift);
}

// dcore[l] = (C_L ... C_{l+1})^T dC (C_{l-1} ... C_1)^T; `grad` is dC^T, kept transposed so that nothing else must be
template <typename F, typename A>
void core_gradients(const Core<A>& core, const ThreeFactor& p, A* grad, F* out) {
  A *result = core.scratch, *next = core.at(core.scratch, 1);
  for (int64_t l = p.depth - 1; l >= 0; --l) {
    if (l > 0) core_times(core, result, core.at(core.prefixes, l - 1), grad);
    const A* found = l > 0 ? result : grad;
    for (int64_t r = 0; r < core.rank; ++r)
      for (int64_t c = 0; c < core.rank; ++c) narrow_one(out + (l * core.rank + r) * core.rank + c, found[c * core.width + r]);
    if (l == 0) break;
    core_times(core, next, grad, core.at(core.layers, l));
    A* const done = grad;
    grad = next;
    next = done;
  }
}

// ---------------------------------------------------------------------- forward

template <typename A>
struct ForwardSpace {
  int64_t width;
  A *right, *left, *bias, *turned;
  Core<A> core;
};

template <typename A>
ForwardSpace<A> forward_space(Arena& arena, const ThreeFactor& p) {
  ForwardSpace<A> s;
  s.width = round_up(p.rank, kLanes<A>);
  s.core = take_core<A>(arena, p, s.width);
  s.turned = p.depth ? arena.take<A>(s.core.size) : nullptr;                                        // C^T
  s.right = arena.take<A>(round_up(p.in_features, kLanes<A>) * (s.width > kFew ? s.width : kFew));  // R^T; or the few rows of x
  s.left = arena.take<A>(round_up(p.out_features, kTile) * p.rank);                                 // L^T in panels
  s.bias = arena.take<A>(round_up(p.out_features, kTile));
  return s;
}

template <typename X, typename A>
void forward_rows(const ThreeFactorForward& p, const ForwardSpace<A>& s, int64_t begin, int64_t end, A keep) {
  alignas(kAlign) A tile[kRows<A> * kTile];
  alignas(kAlign) A mask[kRows<A> * kTile];
  alignas(kAlign) A z1[kRows<A> * kMaxRank], z2[kRows<A> * kMaxRank];
  const int64_t rows = end - begin, width = s.width;
  const X* x = static_cast<const X*>(p.x) + begin * p.x_stride;
  for (int64_t c = 0; c < p.in_features; c += kTile) {
    const int64_t columns = smaller(kTile, p.in_features - c);
    if (p.drop_threshold)
      for (int64_t r = 0; r < rows; ++r) mask_row(mask + r * kTile, p, keep, begin + r, c, columns);
    read_tile(tile, x + c, p.x_stride, rows, columns, p.drop_threshold ? mask : nullptr);
    const Ahead<X> ahead = tile_after(static_cast<const X*>(p.x), p.x_stride, begin, c, p.tokens, p.in_features, rows);
    for (int64_t i = 0; i < rows; i += kGroup) {
      ahead.fetch(i / kGroup, (rows + kGroup - 1) / kGroup);
      product<A, kTile>(z1 + i * width, kGroup, width, tile + i * kTile, 1, columns, s.right + c * width, c > 0);
    }
  }
  if (p.in_features == 0)
    for (int64_t i = 0; i < round_up(rows, kGroup) * width; ++i) z1[i] = 0;
  A* const saved = static_cast<A*>(p.z);
  write_z(saved + begin * p.rank, z1, rows, p.rank, width);
  if (p.depth) {
    product<A, 0>(z2, rows, width, z1, 1, p.rank, s.turned, false);
  }
  A* const scaled = p.depth ? z2 : z1;
  for (int64_t i = 0; i < round_up(rows, kGroup) * width; ++i) scaled[i] *= A(p.scale);
  write_z(saved + (p.tokens + begin) * p.rank, scaled, rows, p.rank, width);
  X* y = static_cast<X*>(p.y) + begin * p.out_features;
  for (int64_t c = 0; c < p.out_features; c += kTile)
    expand<X, A>(y + c, p.out_features, rows, smaller(kTile, p.out_features - c), scaled, width, p.rank, s.left + c * p.rank,
                 p.bias ? s.bias + c : nullptr, nullptr);
}

// Few rows, as in decoding: R and L are read once, in their own layouts, each element for all rows; packing them would take
// longer than the products. `x` is (tokens, wide), widened and dropped, zero-filled.
template <typename F, typename A>
void few_z1(const ThreeFactorForward& p, const A* x, int64_t wide, int64_t j) {
  typedef typename Vector<A>::type V;
  constexpr int64_t kChunk = 512;
  alignas(kAlign) A rows[4][kChunk];
  const int64_t n = p.in_features, k = p.rank, live = smaller(4, k - j);
  A sums[kFew][4] = {};
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t columns = smaller(kChunk, n - c), padded = round_up(columns, kLanes<A>);
    for (int64_t i = 0; i < 4; ++i) {
      widen_row(rows[i], static_cast<const F*>(p.right) + (j + smaller(i, live - 1)) * n + c, columns);
      for (int64_t e = columns; e < padded; ++e) rows[i][e] = 0;
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      V s0{}, s1{}, s2{}, s3{};
      for (int64_t e = 0; e < padded; e += kLanes<A>) {
        const V v = load<V>(x + t * wide + c + e);
        s0 += v * load<V>(rows[0] + e);
        s1 += v * load<V>(rows[1] + e);
        s2 += v * load<V>(rows[2] + e);
        s3 += v * load<V>(rows[3] + e);
      }
      const auto four = sum4(s0, s1, s2, s3);
      for (int i = 0; i < 4; ++i) sums[t][i] += four[i];
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t i = 0; i < live; ++i) static_cast<A*>(p.z)[t * k + j + i] = sums[t][i];
}

// z is (tokens, width), zero-filled
template <typename X, typename F, typename A>
void few_outputs(const ThreeFactorForward& p, const A* z, int64_t width, int64_t begin, int64_t end) {
  typedef typename Vector<A>::type V;
  alignas(kAlign) A rows[4][kMaxRank];
  const int64_t k = p.rank;
  for (int64_t m = begin; m < end; m += 4) {
    const int64_t live = smaller(4, end - m);
    for (int64_t i = 0; i < 4; ++i) {
      widen_row(rows[i], static_cast<const F*>(p.left) + (m + smaller(i, live - 1)) * k, k);
      for (int64_t e = k; e < width; ++e) rows[i][e] = 0;
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      V s0{}, s1{}, s2{}, s3{};
      for (int64_t e = 0; e < width; e += kLanes<A>) {
        const V v = load<V>(z + t * width + e);
        s0 += v * load<V>(rows[0] + e);
        s1 += v * load<V>(rows[1] + e);
        s2 += v * load<V>(rows[2] + e);
        s3 += v * load<V>(rows[3] + e);
      }
      const auto four = sum4(s0, s1, s2, s3);
      for (int64_t i = 0; i < live; ++i) {
        const A bias = p.bias ? A(widen_one(static_cast<const X*>(p.bias)[m + i])) : A(0);
        narrow_one(static_cast<X*>(p.y) + t * p.out_features + m + i, A(four[i]) + bias);
      }
    }
  }
}

template <typename X, typename F, typename A>
void forward_few(const ThreeFactorForward& p, const ForwardSpace<A>& s, A keep, int threads) {
  const int64_t n = p.in_features, m = p.out_features, k = p.rank, wide = round_up(n, kLanes<A>), rows = p.tokens;
  alignas(kAlign) A z[kFew * kMaxRank];
  for (int64_t i = 0; i < rows * s.width; ++i) z[i] = 0;
  A* const x = s.right;
  for (int64_t t = 0; t < rows; ++t) {
    widen_row(x + t * wide, static_cast<const X*>(p.x) + t * p.x_stride, n);
    for (int64_t c = 0; p.drop_threshold && c < n; c += kTile) {
      A mask[kTile];
      const int64_t columns = smaller(kTile, n - c);
      mask_row(mask, p, keep, t, c, columns);
      for (int64_t e = 0; e < columns; ++e) x[t * wide + c + e] *= mask[e];
    }
    for (int64_t c = n; c < wide; ++c) x[t * wide + c] = 0;
  }
  const bool worth = threads > 1 && rows * k * (n + m) > 100000;
#pragma omp parallel num_threads(threads) if (worth)
  {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < k; j += 4) few_z1<F>(p, x, wide, j);
#pragma omp single
    for (int64_t t = 0; t < rows; ++t) {
      const A* z1 = static_cast<const A*>(p.z) + t * k;
      A* z2 = z + t * s.width;
      for (int64_t i = 0; i < k; ++i) {
        if (p.depth)
          for (int64_t j = 0; j < k; ++j) z2[j] += z1[i] * s.turned[i * s.width + j];
        else
          z2[i] = z1[i];
      }
      for (int64_t j = 0; j < k; ++j) static_cast<A*>(p.z)[(rows + t) * k + j] = z2[j] *= A(p.scale);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < m; c += kTile) few_outputs<X, F>(p, z, s.width, c, smaller(c + kTile, m));
  }
}

template <typename X, typename F, typename A>
void forward(const ThreeFactorForward& p, void* workspace, int threads) {
  Arena arena{static_cast<char*>(workspace), 0};
  const ForwardSpace<A> s = forward_space<A>(arena, p);
  const int64_t n = p.in_features, m = p.out_features, k = p.rank;
  if (p.depth) {
    make_core<F>(s.core, p);
    const A* product = s.core.at(s.core.prefixes, p.depth - 1);
    for (int64_t c = 0; c < k; ++c)
      for (int64_t r = 0; r < s.width; ++r) s.turned[c * s.width + r] = r < k ? product[r * s.width + c] : A(0);
  }
  const A keep = p.drop_threshold < 65536 ? A(65536) / A(65536 - p.drop_threshold) : A(0);
  if (p.tokens <= kFew) return forward_few<X, F>(p, s, keep, threads);
  // Rows a unit of work: full tiles, or fewer where that would leave threads without work.
  int64_t step = kRows<A>;
  while (step > kGroup && p.tokens < step * threads) step -= kGroup;
  const int64_t units = (p.tokens + step - 1) / step;
  const bool worth = threads > 1 && p.tokens * k * (n + m) > 400000;
#pragma omp parallel num_threads(threads) if (worth)
  {
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < n; c += kTile)
      pack_rows(s.right + c * s.width, static_cast<const F*>(p.right) + c, smaller(kTile, n - c), k, 1, n, s.width);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < m; c += kTile) {
      const int64_t columns = smaller(kTile, m - c);
      pack_panels(s.left + c * k, static_cast<const F*>(p.left) + c * k, k, columns, 1, k);
      if (p.bias) {
        widen_row(s.bias + c, static_cast<const X*>(p.bias) + c, columns);
        for (int64_t i = columns; i < kTile; ++i) s.bias[c + i] = 0;
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit)
      forward_rows<X, A>(p, s, unit * step, smaller((unit + 1) * step, p.tokens), keep);
  }
}

// ---------------------------------------------------------------------- backward

template <typename A>
struct BackwardSpace {
  int64_t width, slices, slice_rows;
  A *left, *right;            // (M, width), and R in panels
  A *dleft, *dright, *dcore;  // (slices, M, width), (slices, N, width), (slices, core.size)
  int64_t left_size, right_size;
  Core<A> core;
};

template <typename A>
BackwardSpace<A> backward_space(Arena& arena, const ThreeFactor& p) {
  BackwardSpace<A> s;
  s.width = round_up(p.rank, kLanes<A>);
  // Slices cost their partial sums, (M + N) K numbers each, beside rows of M + N numbers.
  s.slices = p.tokens / (4 * p.rank) > 2 ? p.tokens / (4 * p.rank) : 2;
  s.slices = smaller(kMaxSlices, smaller(s.slices, p.tokens / 32 > 1 ? p.tokens / 32 : 1));
  s.slice_rows = round_up((p.tokens + s.slices - 1) / s.slices, kGroup);
  s.core = take_core<A>(arena, p, s.width);
  s.left_size = round_up(p.out_features, kGroup) * s.width;
  s.right_size = round_up(p.in_features, kGroup) * s.width;
  s.left = arena.take<A>(s.left_size);
  s.right = arena.take<A>(round_up(p.in_features, kTile) * p.rank);
  s.dleft = arena.take<A>(s.slices * s.left_size);
  s.dright = arena.take<A>(s.slices * s.right_size);
  s.dcore = arena.take<A>(s.slices * ((round_up(p.rank, kGroup) + 1) * s.width));
  return s;
}

template <typename X, typename A>
void backward_slice(const ThreeFactorBackward& p, const BackwardSpace<A>& s, int64_t slice, A keep) {
  alignas(kAlign) A tile[kRows<A> * kTile];
  alignas(kAlign) A mask[kRows<A> * kTile];
  alignas(kAlign) A z[kRows<A> * kMaxRank + kGroup], g2[kRows<A> * kMaxRank + kGroup], g1[kRows<A> * kMaxRank + kGroup];
  const int64_t n = p.in_features, m = p.out_features, k = p.rank, width = s.width;
  const bool want_core = p.dcore && p.depth;
  const bool want_g2 = p.dx || p.dright || want_core, want_g1 = p.dx || p.dright;
  A* const dleft = s.dleft + slice * s.left_size;
  A* const dright = s.dright + slice * s.right_size;
  A* const dcore = s.dcore + slice * (round_up(k, kGroup) + 1) * width;
  const A* const z1 = static_cast<const A*>(p.z);
  const A* const z2 = z1 + p.tokens * k;
  const int64_t first = slice * s.slice_rows, last = smaller(first + s.slice_rows, p.tokens);
  if (first >= last) {  // no rows: nothing but zeros
    for (int64_t i = 0; p.dleft && i < s.left_size; ++i) dleft[i] = 0;
    for (int64_t i = 0; p.dright && i < s.right_size; ++i) dright[i] = 0;
    for (int64_t i = 0; want_core && i < (round_up(k, kGroup) + 1) * width; ++i) dcore[i] = 0;
  }
  for (int64_t begin = first; begin < last; begin += kRows<A>) {
    const int64_t rows = smaller(kRows<A>, last - begin), padded = round_up(rows, kGroup);
    const bool add = begin > first;
    if (p.dleft) read_z(z, z2 + begin * k, rows, k, width);
    for (int64_t c = 0; c < m; c += kTile) {
      const int64_t columns = smaller(kTile, m - c);
      read_tile<X, A>(tile, static_cast<const X*>(p.dy) + begin * p.dy_stride + c, p.dy_stride, rows, columns, nullptr);
      const Ahead<X> ahead = tile_after(static_cast<const X*>(p.dy), p.dy_stride, begin, c, last, m, kRows<A>);
      for (int64_t i = 0; i < rows; i += kGroup) {
        ahead.fetch(i / kGroup, (rows + kGroup - 1) / kGroup);
        if (want_g2) product<A, kTile>(g2 + i * width, kGroup, width, tile + i * kTile, 1, columns, s.left + c * width, c > 0);
      }
      if (p.dleft) product<A, 1>(dleft + c * width, columns, width, tile, kTile, rows, z, add);
    }
    if (m == 0)
      for (int64_t i = 0; i < padded * width; ++i) g2[i] = 0;
    if (!want_g2) continue;
    if (want_core) {
      read_z(z, z1 + begin * k, rows, k, width);
      product<A, 1>(dcore, k, width, z, width, rows, g2, add);  // dC^T
    }
    if (!want_g1) continue;
    if (p.depth) {
      product<A, 0>(g1, rows, width, g2, 1, k, s.core.at(s.core.prefixes, p.depth - 1), false);
    }
    A* const scaled = p.depth ? g1 : g2;
    for (int64_t i = 0; i < padded * width; ++i) scaled[i] *= A(p.scale);
    for (int64_t c = 0; c < n; c += kTile) {
      const int64_t columns = smaller(kTile, n - c);
      if (p.drop_threshold)
        for (int64_t r = 0; r < rows; ++r) mask_row(mask + r * kTile, p, keep, begin + r, c, columns);
      if (p.dright) {
        read_tile(tile, static_cast<const X*>(p.x) + begin * p.x_stride + c, p.x_stride, rows, columns,
                  p.drop_threshold ? mask : nullptr);
        const Ahead<X> ahead = tile_after(static_cast<const X*>(p.x), p.x_stride, begin, c, last, n, kRows<A>);
        for (int64_t i = 0; i < columns; i += kGroup) {
          ahead.fetch(i / kGroup, (columns + kGroup - 1) / kGroup);
          product<A, 1>(dright + (c + i) * width, kGroup, width, tile + i, kTile, rows, scaled, add);
        }
      }
      if (p.dx)
        expand<X, A>(static_cast<X*>(p.dx) + begin * n + c, n, rows, columns, scaled, width, k, s.right + c * k, nullptr,
                     p.drop_threshold ? mask : nullptr);
    }
  }
}

template <typename X, typename F, typename A>
void backward(const ThreeFactorBackward& p, void* workspace, int threads) {
  Arena arena{static_cast<char*>(workspace), 0};
  const BackwardSpace<A> s = backward_space<A>(arena, p);
  const int64_t n = p.in_features, m = p.out_features, k = p.rank, width = s.width;
  const bool want_core = p.dcore && p.depth;
  const A keep = p.drop_threshold < 65536 ? A(65536) / A(65536 - p.drop_threshold) : A(0);
  if (p.depth) make_core<F>(s.core, p);
  const bool worth = threads > 1 && p.tokens * k * (n + m) > 200000;
#pragma omp parallel num_threads(threads) if (worth)
  {
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < m; c += kTile)
      pack_rows(s.left + c * width, static_cast<const F*>(p.left) + c * k, smaller(kTile, m - c), k, k, 1, width);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < n; c += kTile)
      pack_panels(s.right + c * k, static_cast<const F*>(p.right) + c, k, smaller(kTile, n - c), n, 1);
#pragma omp for schedule(dynamic, 1)
    for (int64_t slice = 0; slice < s.slices; ++slice) backward_slice<X, A>(p, s, slice, keep);
    if (p.dleft) {
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < m; c += kTile)
        for (int64_t r = c; r < smaller(c + kTile, m); ++r) {
          A sum[kMaxRank];
          for (int64_t j = 0; j < width; ++j) sum[j] = s.dleft[r * width + j];
          for (int64_t slice = 1; slice < s.slices; ++slice)
            for (int64_t j = 0; j < width; ++j) sum[j] += s.dleft[slice * s.left_size + r * width + j];
          for (int64_t j = 0; j < k; ++j) narrow_one(static_cast<F*>(p.dleft) + r * k + j, sum[j]);
        }
    }
    if (p.dright) {
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < n; c += kTile) {
        const int64_t end = smaller(c + kTile, n);
        for (int64_t slice = 1; slice < s.slices; ++slice)
          for (int64_t i = c * width; i < end * width; ++i) s.dright[i] += s.dright[slice * s.right_size + i];
        for (int64_t j = 0; j < k; ++j)
          for (int64_t r = c; r < end; ++r) narrow_one(static_cast<F*>(p.dright) + j * n + r, s.dright[r * width + j]);
      }
    }
  }
  if (!want_core) return;
  for (int64_t slice = 1; slice < s.slices; ++slice)
    for (int64_t i = 0; i < k * width; ++i) s.dcore[i] += s.dcore[slice * (round_up(k, kGroup) + 1) * width + i];
  for (int64_t i = 0; i < k * width; ++i) s.dcore[i] *= A(p.scale);
  core_gradients(s.core, p, s.dcore, static_cast<F*>(p.dcore));
}

// ---------------------------------------------------------------------- types

template <typename Parameters, typename Run>
void for_types(const Parameters& p, Run run) {
  const bool same = p.factor_type == p.type;
  switch (p.type) {
    case DType::float32: run(float{}, float{}, float{}); break;
    case DType::float64: run(double{}, double{}, double{}); break;
    case DType::bfloat16: same ? run(Bfloat16{}, Bfloat16{}, float{}) : run(Bfloat16{}, float{}, float{}); break;
    case DType::float16: same ? run(Float16{}, Float16{}, float{}) : run(Float16{}, float{}, float{}); break;
  }
}

}  // namespace

int64_t LRK_AT_LEVEL(three_factor_workspace)(const ThreeFactor& p, bool backward) {
  Arena arena{nullptr, 0};
  if (p.type == DType::float64)
    backward ? (void)backward_space<double>(arena, p) : (void)forward_space<double>(arena, p);
  else
    backward ? (void)backward_space<float>(arena, p) : (void)forward_space<float>(arena, p);
  return arena.used;
}

void LRK_AT_LEVEL(three_factor_forward)(const ThreeFactorForward& p, void* workspace, int threads) {
  for_types(
      p, [&](auto x, auto factor, auto sum) { forward<decltype(x), decltype(factor), decltype(sum)>(p, workspace, threads); });
}

void LRK_AT_LEVEL(three_factor_backward)(const ThreeFactorBackward& p, void* workspace, int threads) {
  for_types(
      p, [&](auto x, auto factor, auto sum) { backward<decltype(x), decltype(factor), decltype(sum)>(p, workspace, threads); });
}

}  // namespace lrk
