// dispatch.h: which of the compiled SIMD levels this processor runs. Included by bindings.cpp only, built without -m flags.
#pragma once
#include <stdexcept>
#include <string>

namespace lrk {

enum class Simd { portable, avx2, avx512 };

inline bool simd_supported(Simd level) {
#if defined(__x86_64__)
  // libgcc's test includes the operating system's: wide registers it does not save do not count.
  if (level == Simd::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (level == Simd::avx512)
    return simd_supported(Simd::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#endif
  return level == Simd::portable;
}

inline Simd simd_best() {
  if (simd_supported(Simd::avx512)) return Simd::avx512;
  if (simd_supported(Simd::avx2)) return Simd::avx2;
  return Simd::portable;
}

inline const char* simd_name(Simd level) {
  return level == Simd::avx512 ? "avx512" : level == Simd::avx2 ? "avx2" : "portable";
}

inline Simd simd_from_name(const std::string& name) {
  for (Simd level : {Simd::portable, Simd::avx2, Simd::avx512})
    if (name == simd_name(level)) {
      if (!simd_supported(level)) throw std::invalid_argument("simd level '" + name + "' is not supported by this processor");
      return level;
    }
  throw std::invalid_argument("simd level must be 'portable', 'avx2' or 'avx512', got '" + name + "'");
}

inline int simd_bytes(Simd level) {
  return level == Simd::avx512 ? 64 : level == Simd::avx2 ? 32 : 16;
}

}  // namespace lrk
