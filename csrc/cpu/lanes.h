// SPDX-License-Identifier: Apache-2.0
// Vectors of W floats in the compiler's own vector types. The same source becomes SSE2 or NEON,
// AVX2 or AVX-512 code, depending on the target of the function that it is inlined into. So
// everything here must inline.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#define KANDINSKY_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define KANDINSKY_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KANDINSKY_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif

namespace kandinsky {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <int W>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

// The same bits as another type.
template <class To, class From>
KANDINSKY_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int W>
KANDINSKY_INLINE typename Lanes<W>::F load(const float* p) {
  typename Lanes<W>::F v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
KANDINSKY_INLINE void store(float* p, const typename Lanes<W>::F& v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
KANDINSKY_INLINE typename Lanes<W>::U load_halves(const void* p) {
  typename Lanes<W>::H h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, typename Lanes<W>::U);
}

template <int W>
KANDINSKY_INLINE void store_halves(void* p, const typename Lanes<W>::U& v) {
  const auto h = __builtin_convertvector(v, typename Lanes<W>::H);
  std::memcpy(p, &h, sizeof(h));
}

template <int W>
KANDINSKY_INLINE typename Lanes<W>::F load(const BFloat16* p) {
  return bits<typename Lanes<W>::F>(load_halves<W>(p) << 16);
}

template <int W>
KANDINSKY_INLINE void store(BFloat16* p, const typename Lanes<W>::F& v) {
  using U = typename Lanes<W>::U;
  const U u = bits<U>(v);
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U nan = bits<U>(v != v);
  store_halves<W>(p, (rounded & ~nan) | (0x7fc0 & nan));
}

template <int W>
KANDINSKY_INLINE typename Lanes<W>::F load(const Half* p) {
  using F = typename Lanes<W>::F;
  using U = typename Lanes<W>::U;
  const U h = load_halves<W>(p);
  // The product moves the bias of the exponent from 15 to 127, of subnormal numbers too.
  const F magnitude = bits<F>((h & 0x7fff) << 13) * 0x1p112f;
  // Infinities and NaN keep an exponent of ones.
  const U special = bits<U>(magnitude >= 65536.0f) & 0x7f800000;
  return bits<F>(bits<U>(magnitude) | special | ((h & 0x8000) << 16));
}

template <int W>
KANDINSKY_INLINE void store(Half* p, const typename Lanes<W>::F& v) {
  using F = typename Lanes<W>::F;
  using U = typename Lanes<W>::U;
  const U u = bits<U>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The addition rounds at 2^-24, the step of subnormal numbers.
  const U subnormal = bits<U>(bits<F>(magnitude) + 0.5f) - 0x3f000000;
  const U tiny = bits<U>(magnitude < 0x38800000u), big = bits<U>(magnitude >= 0x477ff000u),
          nan = bits<U>(magnitude > 0x7f800000u);
  const U finite = (subnormal & tiny) | (normal & ~tiny);
  store_halves<W>(p, (finite & ~big) | (0x7c00 & big & ~nan) | (0x7e00 & nan) | sign);
}

// The sum of all lanes, by halves.
template <int W>
KANDINSKY_INLINE float sum_lanes(const typename Lanes<W>::F& v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    typename Lanes<W / 2>::F low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<W / 2>(low + high);
  }
}

// The lanes of v in the order v1, v0, v3, v2, and so on.
template <int W>
KANDINSKY_INLINE typename Lanes<W>::F swap_pairs(const typename Lanes<W>::F& v) {
  typedef uint64_t Pairs __attribute__((vector_size(4 * W)));
  const Pairs pairs = bits<Pairs>(v);
  return bits<typename Lanes<W>::F>((pairs << 32) | (pairs >> 32));
}

}  // namespace kandinsky
