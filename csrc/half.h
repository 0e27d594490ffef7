// half.h: 16-bit floating point numbers in memory: widening to float, narrowing with round to nearest even, 32 x 32 -> 64 bit
// products of vectors. Included by the kernel files, compiled once a SIMD level (simd.h); internal linkage, no standard
// library.
#pragma once
#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lrk {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float widen_one(float x) {
  return x;
}
inline double widen_one(double x) {
  return x;
}
inline float widen_one(Bfloat16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
inline float widen_one(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  // The exponent is rebiased by a multiplication, which is right for subnormal numbers too.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  return bits_to_float((magnitude >= 0x7C00u << 13 ? magnitude | 0x7F800000 : finite) | sign);
}

inline void narrow_one(float* out, float x) {
  *out = x;
}
inline void narrow_one(double* out, double x) {
  *out = x;
}
inline void narrow_one(Bfloat16* out, float x) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  out->bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void narrow_one(Float16* out, float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;  // NaN
  } else if (magnitude >= 0x477FF000) {
    half = 0x7C00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end of the significand.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

template <typename X, typename A>
inline void widen_row(A* out, const X* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen_one(in[i]);
}
inline void widen_row(float* out, const float* in, int64_t count) {
  typedef Vector<float>::type V;
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(out + i, load<V>(in + i));
  for (; i < count; ++i) out[i] = in[i];
}
#if defined(__F16C__)
inline void widen_row(float* out, const Float16* in, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < count; ++i) out[i] = widen_one(in[i]);
}
#endif

inline void narrow(float* out, Vector<float>::type v) {
  store(out, v);
}
inline void narrow(double* out, Vector<double>::type v) {
  store(out, v);
}
inline void narrow(Bfloat16* out, Vector<float>::type v) {
  typedef uint32_t U __attribute__((vector_size(LRK_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(LRK_VECTOR_BYTES / 2)));
  U bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  const U rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  const H half = __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded, H);
  __builtin_memcpy(out, &half, sizeof half);
}
inline void narrow(Float16* out, Vector<float>::type v) {
#if defined(__F16C__) && LRK_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow_one(out + i, v[i]);
#endif
}

// Lanes below 2^32 times a constant below 2^32; the compiler's own 64-bit product takes three multiplications.
typedef uint64_t Words __attribute__((vector_size(32)));
inline Words multiply_words(Words a, uint32_t b) {
#if defined(__AVX2__)
  return Words(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(int64_t(b))));
#elif defined(__SSE2__)
  const __m128i factor = _mm_set1_epi64x(int64_t(b));
  __m128i half[2];
  __builtin_memcpy(half, &a, sizeof a);
  half[0] = _mm_mul_epu32(half[0], factor);
  half[1] = _mm_mul_epu32(half[1], factor);
  __builtin_memcpy(&a, half, sizeof a);
  return a;
#else
  return a * uint64_t(b);
#endif
}

}  // namespace
}  // namespace lrk
