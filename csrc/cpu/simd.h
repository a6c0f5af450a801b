// SPDX-License-Identifier: Apache-2.0
// The instruction set that the CPU kernels use: at first the best of the processor, later the one
// that a test chooses.
#pragma once
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../check.h"
#include "lanes.h"

namespace kandinsky {

enum class Simd : int { scalar = 0, avx2 = 1, avx512 = 2 };

inline Simd best_simd() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Simd::avx2;
#endif
  return Simd::scalar;
}

inline std::atomic<Simd>& chosen_simd() {
  static std::atomic<Simd> chosen{best_simd()};
  return chosen;
}

inline Simd simd() { return chosen_simd().load(std::memory_order_relaxed); }

inline const char* simd_level() {
  constexpr const char* names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(simd())];
}

inline void set_simd_level(const char* name) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512"};
  const std::string wanted = name;
  for (Simd level : {Simd::scalar, Simd::avx2, Simd::avx512}) {
    if (wanted == names[static_cast<int>(level)] && level <= best_simd()) {
      chosen_simd() = level;
      return;
    }
  }
  fail<std::invalid_argument>("the instruction set must be one this processor has, up to ",
                              names[static_cast<int>(best_simd())], ", got \"", wanted, "\".");
}

template <class Kernel>
void run_scalar(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<4>(begin, end);
}
#if defined(__x86_64__)
template <class Kernel>
KANDINSKY_AVX2 void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<8>(begin, end);
}
template <class Kernel>
KANDINSKY_AVX512 void run_avx512(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<16>(begin, end);
}
#endif

// Calls kernel.run<W>(begin, end), compiled for the instruction set in use. `run`, and all that it
// calls, must be KANDINSKY_INLINE.
template <class Kernel>
void run_simd(const Kernel& kernel, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return run_avx512(kernel, begin, end);
  if (simd() == Simd::avx2) return run_avx2(kernel, begin, end);
#endif
  run_scalar(kernel, begin, end);
}

}  // namespace kandinsky
