// simd.h: the vector type of one SIMD level, written once with the compilers' vector extensions.
//
// A kernel file is compiled once a level with LRK_SIMD_LEVEL (a name) and LRK_VECTOR_BYTES (16, 32 or 64) defined and the
// level's own -m flags. It must not instantiate anything from the standard library: an inline function emitted in the
// AVX-512 object could replace the portable one at link time and crash an older processor (a test reads the symbols).
#pragma once
#include <cstdint>

#ifndef LRK_SIMD_LEVEL
#define LRK_SIMD_LEVEL portable
#endif
#ifndef LRK_VECTOR_BYTES
#define LRK_VECTOR_BYTES 16
#endif
#define LRK_JOIN2(a, b) a##_##b
#define LRK_JOIN(a, b) LRK_JOIN2(a, b)
#define LRK_AT_LEVEL(name) LRK_JOIN(name, LRK_SIMD_LEVEL)

namespace lrk {
namespace {  // internal linkage: every level has its own copy

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(LRK_VECTOR_BYTES)));
  typedef float four __attribute__((vector_size(16)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(LRK_VECTOR_BYTES)));
  typedef double four __attribute__((vector_size(32)));
};
typedef double double4 __attribute__((vector_size(32)));

template <typename T>
constexpr int kLanes = LRK_VECTOR_BYTES / int(sizeof(T));

// By memcpy: an unaligned vector typedef would lose its alignment as a template argument.
template <typename V, typename T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// (sum a, sum b, sum c, sum d): four vectors reduced together share their shuffles.
inline Vector<float>::four sum4(Vector<float>::type a, Vector<float>::type b, Vector<float>::type c, Vector<float>::type d) {
  typedef Vector<float>::four F;
#if LRK_VECTOR_BYTES == 64
  typedef float H __attribute__((vector_size(32)));
#define LRK_HALVE(v) \
  H v##h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
  LRK_HALVE(a);
  LRK_HALVE(b);
  LRK_HALVE(c);
  LRK_HALVE(d);
#undef LRK_HALVE
#elif LRK_VECTOR_BYTES == 32
  Vector<float>::type ah = a, bh = b, ch = c, dh = d;
#endif
#if LRK_VECTOR_BYTES >= 32
  // Transposes inside the 128-bit lanes, then one add across them.
  auto ab =
      __builtin_shufflevector(ah, bh, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(ah, bh, 2, 10, 3, 11, 6, 14, 7, 15);
  auto cd =
      __builtin_shufflevector(ch, dh, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(ch, dh, 2, 10, 3, 11, 6, 14, 7, 15);
  auto s =
      __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  return F(__builtin_shufflevector(s, s, 0, 1, 2, 3)) + F(__builtin_shufflevector(s, s, 4, 5, 6, 7));
#else
  F ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  F cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return F(__builtin_shufflevector(ab, cd, 0, 1, 4, 5)) + F(__builtin_shufflevector(ab, cd, 2, 3, 6, 7));
#endif
}

inline double4 sum4(Vector<double>::type a, Vector<double>::type b, Vector<double>::type c, Vector<double>::type d) {
#if LRK_VECTOR_BYTES == 16
  return double4{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
#else
#if LRK_VECTOR_BYTES == 64
#define LRK_HALVE(v) double4 v##h = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7)
#else
#define LRK_HALVE(v) double4 v##h = v
#endif
  LRK_HALVE(a);
  LRK_HALVE(b);
  LRK_HALVE(c);
  LRK_HALVE(d);
#undef LRK_HALVE
  double4 ab = __builtin_shufflevector(ah, bh, 0, 4, 2, 6) + __builtin_shufflevector(ah, bh, 1, 5, 3, 7);
  double4 cd = __builtin_shufflevector(ch, dh, 0, 4, 2, 6) + __builtin_shufflevector(ch, dh, 1, 5, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

inline double4 widen(Vector<float>::four v) {
  return __builtin_convertvector(v, double4);
}
inline double4 widen(double4 v) {
  return v;
}

}  // namespace
}  // namespace lrk
