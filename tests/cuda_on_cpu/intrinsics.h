// SPDX-License-Identifier: Apache-2.0
// The functions that CUDA C++ has built in, and csrc/cuda/ptx.cuh, on the emulator.
#pragma once
#define KANDINSKY_PTX  // instead of csrc/cuda/ptx.cuh

#include "emulator.h"

using std::max;
using std::min;

inline void __syncthreads() {
  emulator::meet(emulator::block.gate, emulator::block.threads.size());
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::exchange(mask, 0, [](auto) { return 0; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::exchange(mask, value, [&](auto of) { return of(from % 32); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, emulator::lane() ^ distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return __shfl_sync(
      mask, value,
      emulator::lane() + distance < 32 ? emulator::lane() + distance : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return __shfl_sync(mask, value,
                     emulator::lane() >= distance ? emulator::lane() - distance : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulator::reduce(mask, unsigned(vote) << emulator::lane(),
                          [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote); }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return min(a, b); });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return max(a, b); });
}

inline unsigned atomicOr(unsigned* where, unsigned bits) {
  return std::exchange(*where, *where | bits);
}
inline unsigned atomicAdd(unsigned* where, unsigned value) {
  return std::exchange(*where, *where + value);
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

// To integers CUDA rounds as named, saturates, and makes zero of NaN.
inline uint32_t saturated(double x) { return x > 0 ? uint32_t(min(x, 4294967295.0)) : 0; }
inline uint32_t __float2uint_rn(float x) { return saturated(std::nearbyint(double(x))); }
inline uint32_t __float2uint_rd(float x) { return saturated(std::floor(double(x))); }
inline uint32_t __float2uint_ru(float x) { return saturated(std::ceil(double(x))); }
inline uint64_t __double2ull_ru(double x) { return x > 0 ? uint64_t(std::ceil(x)) : 0; }
inline float towards_zero(double x) {
  const float nearest = float(x);
  return std::abs(double(nearest)) > std::abs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline float __uint2float_rd(uint32_t x) { return towards_zero(x); }

namespace kandinsky {

inline float4* dynamic_shared() { return reinterpret_cast<float4*>(emulator::shared.data()); }
inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : max(a, b); }
inline float exp2_approximate(float x) { return std::exp2(x); }

inline void multiply_add(uint64_t& sum, uint32_t a, uint32_t b) { sum += uint64_t(a) * b; }

// As the hardware does it: sums of exact products are cut off, not rounded.
inline void mma_tf32(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  struct Fragments {
    float a[4], b[2];
  };
  const Fragments mine{{a0, a1, a2, a3}, {b0, b1}};
  for (float x : {a0, a1, a2, a3, b0, b1})
    if (__float_as_uint(x) & 0x1FFF) emulator::fail("an operand of mma_tf32 is no tf32 number");
  emulator::exchange(~0u, mine, [&](auto of) {
    const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
      double total = sum[i];
      for (unsigned k = 0; k < 8; ++k) {
        const float a = of(row % 8 * 4 + k % 4).a[k / 4 * 2 + row / 8],
                    b = of(column * 4 + k % 4).b[k / 4];
        total += double(a) * b;
      }
      sum[i] = towards_zero(total);
    }
    return 0;
  });
}

}  // namespace kandinsky
