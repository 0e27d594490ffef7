// three_factor_tiles.h: the blocks of three_factor_cpu.cpp: the register-blocked product, the dropout mask, tiles of x and dy,
// factors in the layouts that the products read. Compiled once a SIMD level (simd.h); internal linkage, no standard library.
#pragma once
#include "half.h"
#include "simd.h"
#include "three_factor.h"

namespace lrk {
namespace {

constexpr int64_t kTile = 96;   // columns of a tile: a multiple of every panel (8 to 32 numbers) and of 12
constexpr int64_t kGroup = 12;  // rows of the largest register block; what is read in blocks is padded to it
constexpr int64_t kAlign = 64;
template <typename A>
constexpr int64_t kRows = 192 / int64_t(sizeof(A));  // rows of a tile: 18 KB of 32 KB L1
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;  // outputs computed together by expand()

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// ---------------------------------------------------------------------- the register block

// acc[i][v] += sum_p a[i SA + p step] b[p ldb + v lanes]; SA = 0: rows of a are `stride` apart, known at run time only
template <typename A, int MR, int NV, int64_t SA>
inline void multiply(const A* a, int64_t stride, int64_t step, int64_t count, const A* b, int64_t ldb,
                     typename Vector<A>::type (&acc)[MR][NV]) {
  typedef typename Vector<A>::type V;
  for (int64_t p = 0; p < count; ++p, a += step, b += ldb) {
    V column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load<V>(b + v * kLanes<A>);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const V factor = a[i * (SA ? SA : stride)] - V{};
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] += factor * column[v];
    }
  }
}

template <int NV>
constexpr int kBlock = LRK_VECTOR_BYTES == 64 || NV == 1 ? 12 : 6;  // 12 of 16 registers, 24 of 32 with AVX-512

template <typename A, int NV, int64_t SA>
inline void product_panel(A* out, int64_t rows, int64_t width, const A* a, int64_t stride, int64_t step, int64_t count,
                          const A* b, bool add) {
  typedef typename Vector<A>::type V;
  constexpr int MR = kBlock<NV>;
  for (int64_t i = 0; i < rows; i += MR) {
    V acc[MR][NV];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] = V{};
    multiply<A, MR, NV, SA>(a + i * (SA ? SA : stride), stride, step, count, b, width, acc);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        A* place = out + (i + r) * width + v * kLanes<A>;
        store(place, add ? load<V>(place) + acc[r][v] : acc[r][v]);  // sums of sums: shorter chains round less
      }
  }
}

// out[i][:] (+)= sum_p a[i SA + p step] b[p][:], rows of out and b (and of a, if SA = 0) `width` long. Computes
// round_up(rows, 12) rows.
template <typename A, int64_t SA>
inline void product(A* out, int64_t rows, int64_t width, const A* a, int64_t step, int64_t count, const A* b, bool add) {
  int64_t j = 0;
  for (; j + kPanel<A> <= width; j += kPanel<A>)
    product_panel<A, 2, SA>(out + j, rows, width, a, width, step, count, b + j, add);
  if (j < width) product_panel<A, 1, SA>(out + j, rows, width, a, width, step, count, b + j, add);
}

// ---------------------------------------------------------------------- dropout

// 0 or 1 / (1 - p) for columns [column, column + columns) of row t, columns a multiple of 8 (as is `column`).
template <typename A>
void mask_row(A* mask, const ThreeFactor& p, A keep, int64_t t, int64_t column, int64_t columns) {
  typedef uint64_t U __attribute__((vector_size(32)));
  const uint64_t seed = uint64_t(*p.seed);
  for (int64_t c = 0; c < columns; c += 32) {  // four counters side by side, 32-bit words in 64-bit lanes
    const uint64_t group = uint64_t(column + c) / 8;
    U c0 = {group, group + 1, group + 2, group + 3}, c1 = U{} + (uint64_t(t) & 0xFFFFFFFF), c2 = U{} + (uint64_t(t) >> 32),
      c3 = {};
    uint64_t k0 = seed & 0xFFFFFFFF, k1 = seed >> 32;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const U low = multiply_words(c0, 0xD2511F53), high = multiply_words(c2, 0xCD9E8D57);
      c0 = (high >> 32) ^ c1 ^ k0;
      c1 = high & 0xFFFFFFFF;
      c2 = (low >> 32) ^ c3 ^ k1;
      c3 = low & 0xFFFFFFFF;
      k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF;
      k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF;
    }
    const U first = c0 | c1 << 32, second = c2 | c3 << 32;
    const U words[2] = {__builtin_shufflevector(first, second, 0, 4, 1, 5), __builtin_shufflevector(first, second, 2, 6, 3, 7)};
    uint16_t bits[32];
    __builtin_memcpy(bits, words, sizeof bits);
    const int64_t live = smaller(columns - c, 32);
    for (int64_t e = 0; e < live; ++e) mask[c + e] = int32_t(bits[e]) >= p.drop_threshold ? keep : A(0);
  }
}

// ---------------------------------------------------------------------- tiles and packed factors

// A tile of x (or dy), widened, times the mask where there is one, zero-filled to multiples of 12.
template <typename X, typename A>
void read_tile(A* tile, const X* x, int64_t pitch, int64_t rows, int64_t columns, const A* mask) {
  const int64_t wide = round_up(columns, kGroup), high = round_up(rows, kGroup);
  for (int64_t r = 0; r < rows; ++r) {
    A* out = tile + r * kTile;
    widen_row(out, x + r * pitch, columns);
    if (mask)
      for (int64_t c = 0; c < columns; ++c) out[c] *= mask[r * kTile + c];
    for (int64_t c = columns; c < wide; ++c) out[c] = 0;
  }
  for (int64_t r = rows; r < high; ++r)
    for (int64_t c = 0; c < wide; ++c) tile[r * kTile + c] = 0;
}

// The next tile's cache lines, asked for in `parts` portions between the products of this one: asked for together they would
// wait for each other, and the hardware does not follow 48 short rows.
template <typename X>
struct Ahead {
  const X* start;
  int64_t pitch, rows, columns;
  inline void fetch(int64_t part, int64_t parts) const {
    for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r)
      for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(X))) __builtin_prefetch(start + r * pitch + c);
  }
};

// The tile after the one at (row, column): the next columns, or the start of the next rows.
template <typename X>
Ahead<X> tile_after(const X* x, int64_t pitch, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t step) {
  if (column + kTile < columns)
    return {x + row * pitch + column + kTile, pitch, smaller(step, rows - row), smaller(kTile, columns - column - kTile)};
  if (row + step < rows) return {x + (row + step) * pitch, pitch, smaller(step, rows - row - step), smaller(kTile, columns)};
  return {x, pitch, 0, 0};
}

// (rows, columns) F with the given strides -> rows of `width` numbers A, zero-filled
template <typename F, typename A>
void pack_rows(A* out, const F* in, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int64_t width) {
  if (row_stride == 1) {  // transposed: read along the rows of `in`
    for (int64_t begin = 0; begin < rows; begin += kTile) {
      const int64_t end = smaller(begin + kTile, rows);
      for (int64_t c = 0; c < columns; ++c) {
        A line[kTile];
        widen_row(line, in + begin + c * column_stride, end - begin);
        for (int64_t r = begin; r < end; ++r) out[r * width + c] = line[r - begin];
      }
    }
    for (int64_t c = columns; c < width; ++c)
      for (int64_t r = 0; r < rows; ++r) out[r * width + c] = 0;
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    widen_row(out + r * width, in + r * row_stride, columns);
    for (int64_t c = columns; c < width; ++c) out[r * width + c] = 0;
  }
}

// (rows, columns) F -> panels [columns / P][rows][P] for expand(), zero-filled
template <typename F, typename A>
void pack_panels(A* out, const F* in, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t begin = 0; begin < columns; begin += P) {
    const int64_t live = smaller(P, columns - begin);
    A* panel = out + begin * rows;
    if (column_stride == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        widen_row(panel + r * P, in + r * row_stride + begin, live);
        for (int64_t c = live; c < P; ++c) panel[r * P + c] = 0;
      }
    } else {  // L^T: read along the rows of L
      A line[kMaxRank];
      for (int64_t c = 0; c < P; ++c) {
        if (c < live) widen_row(line, in + (begin + c) * column_stride, rows);
        for (int64_t r = 0; r < rows; ++r) panel[r * P + c] = c < live ? line[r] : A(0);
      }
    }
  }
}

// (rows, K) of z, without padding, -> rows of `width` numbers
template <typename A>
void read_z(A* out, const A* z, int64_t rows, int64_t rank, int64_t width) {
  for (int64_t r = 0; r < round_up(rows, kGroup); ++r)
    for (int64_t c = 0; c < width; ++c) out[r * width + c] = r < rows && c < rank ? z[r * rank + c] : A(0);
}
template <typename A>
void write_z(A* z, const A* block, int64_t rows, int64_t rank, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(z + r * rank, block + r * width, sizeof(A) * size_t(rank));
}

// out[r][columns] = (init + sum_p z[r][p] panels[p][:]) * mask, columns of one tile starting at a panel boundary
template <typename X, typename A>
void expand(X* out, int64_t pitch, int64_t rows, int64_t columns, const A* z, int64_t width, int64_t rank, const A* panels,
            const A* init, const A* mask) {
  typedef typename Vector<A>::type V;
  constexpr int L = kLanes<A>;
  constexpr int MR = kBlock<2>;
  for (int64_t i = 0; i < rows; i += MR) {
    const int64_t high = smaller(MR, rows - i);
    for (int64_t begin = 0; begin < columns; begin += kPanel<A>) {
      const int64_t live = smaller(kPanel<A>, columns - begin);
      const V first = init ? load<V>(init + begin) : V{}, second = init ? load<V>(init + begin + L) : V{};
      V acc[MR][2];
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) acc[r][0] = first, acc[r][1] = second;
      multiply<A, MR, 2, 0>(z + i * width, width, 1, rank, panels + begin * rank, kPanel<A>, acc);
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        if (r >= high) break;
        if (mask) {
          acc[r][0] *= load<V>(mask + (i + r) * kTile + begin);
          acc[r][1] *= load<V>(mask + (i + r) * kTile + begin + L);
        }
        X* line = out + (i + r) * pitch + begin;
        if (live == kPanel<A>) {
          narrow(line, acc[r][0]);
          narrow(line + L, acc[r][1]);
        } else {
          A rest[kPanel<A>];
          store(rest, acc[r][0]);
          store(rest + L, acc[r][1]);
          for (int64_t c = 0; c < live; ++c) narrow_one(line + c, rest[c]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lrk
