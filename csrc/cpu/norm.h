// SPDX-License-Identifier: Apache-2.0
// What the norms and their gradients share: loops over a row, sums over a row, moments, and angles.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "lanes.h"
#include "simd.h"

namespace kandinsky {

constexpr int64_t kGrainElements = 1 << 15;  // less work than this is not worth a second thread

// Calls step.operator()<W>(i) over [0, n) in strides of W, and for the rest in strides of Tail.
template <int W, int Tail, class Step>
KANDINSKY_INLINE void sweep(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + W <= n; i += W) step.template operator()<W>(i);
  for (; i + Tail <= n; i += Tail) step.template operator()<Tail>(i);
}

// The row itself where it is fp32, otherwise its copy in scratch.
template <int W, class T>
KANDINSKY_INLINE const float* widened(const T* row, int64_t n, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    sweep<W, 1>(n, [&]<int V>(int64_t i)
                       __attribute__((always_inline)) { store<V>(scratch + i, load<V>(row + i)); });
    return scratch;
  }
}

// The power of two that brings the largest magnitude of the row near 1; it is 1 for rows with an
// infinity or NaN.
KANDINSKY_INLINE float taming_scale(const float* row, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(row[i]));
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::isfinite(largest) ? std::ldexp(1.0f, -exponent) : 1.0f;
}

// How a row is normalised: ((x * scale - mean) - offset) * inverse. `offset` is what rounding left
// out of `mean`, so that a constant row gives exact zeros. `scale` is 1 unless the squares of the
// row would overflow.
struct Moments {
  float scale, mean, offset, inverse;
  double exact_inverse;  // before it was rounded

  template <int W>
  KANDINSKY_INLINE typename Lanes<W>::F centred(const float* x) const {
    return (load<W>(x) * scale - mean) - offset;
  }
};

struct Sums {
  double values = 0, products = 0;
};

template <int W>
struct Two {
  typename Lanes<W>::F value, factor;
};

// The sums over [0, n) of the values that map.operator()<V>(i) returns, and of their products with
// its factors. Four chains of additions hide their latency. None is longer than 16 before it joins
// the total, because rounding grows with the length of a chain, and narrow lanes make long ones.
template <int W, class Map>
KANDINSKY_INLINE Sums reduce(int64_t n, const Map& map) {
  Sums sums;
  float rest = 0, rest_products = 0;
  int64_t i = 0;
  while (i + 4 * W <= n) {
    typename Lanes<W>::F values[4]{}, products[4]{};
    for (const int64_t stop = std::min(n - 4 * W, i + 60 * W); i <= stop; i += 4 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Two<W> two = map.template operator()<W>(i + j * W);
        values[j] += two.value;
        products[j] += two.value * two.factor;
      }
    }
    sums.values += sum_lanes<W>((values[0] + values[1]) + (values[2] + values[3]));
    sums.products += sum_lanes<W>((products[0] + products[1]) + (products[2] + products[3]));
  }
  typename Lanes<W>::F values{}, products{};
  for (; i + W <= n; i += W) {
    const Two<W> two = map.template operator()<W>(i);
    values += two.value;
    products += two.value * two.factor;
  }
  for (; i < n; ++i) {
    const Two<1> two = map.template operator()<1>(i);
    rest += two.value[0];
    rest_products += two.value[0] * two.factor[0];
  }
  sums.values += sum_lanes<W>(values) + rest;
  sums.products += sum_lanes<W>(products) + rest_products;
  return sums;
}

// The sums over [0, n) of x = map.operator()<V>(i) and of its square.
template <int W, class Map>
KANDINSKY_INLINE Sums sums_and_squares(int64_t n, const Map& map) {
  return reduce<W>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) {
    const auto x = map.template operator()<V>(i);
    return Two<V>{x, x};
  });
}

template <int W>
KANDINSKY_INLINE Moments moments(const float* row, int64_t n, float scale, double eps) {
  const Sums first = sums_and_squares<W>(
      n, [&]<int V>(int64_t i) __attribute__((always_inline)) { return load<V>(row + i) * scale; });
  const float mean = float(first.values / double(n));
  const Sums second = sums_and_squares<W>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) {
    return load<V>(row + i) * scale - mean;
  });
  const double offset = second.values / double(n),
               variance = std::max(second.products / double(n) - offset * offset, 0.0);
  // A huge constant row, whose deviation is 0, must not get an infinity.
  const double inverse = std::min(1.0 / std::sqrt(variance + eps * scale * scale), 3e38);
  return {scale, mean, float(offset), float(inverse), inverse};
}

// The moments of any row; the row is scaled only where its squares overflow.
template <int W>
KANDINSKY_INLINE Moments safe_moments(const float* row, int64_t n, double eps) {
  const Moments plain = moments<W>(row, n, 1.0f, eps);
  if (plain.inverse > 0) return plain;  // otherwise a sum of the row or of its squares overflowed
  return moments<W>(row, n, taming_scale(row, n), eps);
}

template <int W>
KANDINSKY_INLINE float inverse_rms(const float* row, int64_t n, double eps) {
  const Sums sums = sums_and_squares<W>(
      n, [&]<int V>(int64_t i) __attribute__((always_inline)) { return load<V>(row + i); });
  const float inverse = float(1.0 / std::sqrt(sums.products / double(n) + eps));
  if (inverse > 0 || inverse != inverse) return inverse;
  double squares = 0;  // fp32 squares overflowed
  for (int64_t i = 0; i < n; ++i) squares += double(row[i]) * row[i];
  return float(1.0 / std::sqrt(squares / double(n) + eps));
}

// The tables of the rotary embedding. cos and sin are null where nothing turns.
struct Angles {
  const float *cos = nullptr, *sin = nullptr;  // [P, D / 2] with the strides below
  // [S, axes]: the row of the tables that a token's pairs of each axis take.
  const int32_t* positions = nullptr;
  const std::vector<int64_t>* pairs = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;

  // Writes the angles of a token, each one twice, and the sines with the sign that the even and the
  // odd element of a pair need.
  KANDINSKY_INLINE void spread(int64_t token, float* twice_cos, float* signed_sin) const {
    const int64_t axes = int64_t(pairs->size());
    for (int64_t axis = 0, i = 0, stop = 0; axis < axes; ++axis) {
      const int64_t position = positions[token * axes + axis];
      for (stop += (*pairs)[axis]; i < stop; ++i) {
        twice_cos[2 * i] = twice_cos[2 * i + 1] = cos[position * cos_stride + i];
        signed_sin[2 * i + 1] = sin[position * sin_stride + i];
        signed_sin[2 * i] = -signed_sin[2 * i + 1];
      }
    }
  }
};

// A tensor [B, S, C] whose rows of C numbers are contiguous.
template <class T>
struct Rows {
  T* base;
  int64_t S, batch_stride, stride;

  explicit Rows(const Tensor& t)
      : base(mutable_data<T>(t)), S(t.size(1)), batch_stride(t.stride(0)), stride(t.stride(1)) {}
  KANDINSKY_INLINE T* operator[](int64_t row) const {
    return base + row / S * batch_stride + row % S * stride;
  }
};

template <class Kernel>
void run_parallel(const Kernel& kernel, int64_t units, int64_t elements_per_unit) {
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
  parallel_for(units, grain, [&](int64_t begin, int64_t end) { run_simd(kernel, begin, end); });
}

// A tensor [B, C] or [D] in any float type, as contiguous fp32 plus a constant.
inline std::vector<float> vectors(const Tensor& t, const char* name, float plus = 0) {
  require_rows(t, name);
  const int64_t C = t.size(t.dim() - 1), rows = t.dim() == 2 ? t.size(0) : 1,
                stride = t.dim() == 2 ? t.stride(0) : 0;
  std::vector<float> wide = zeros<float>(rows * C);
  dispatch_float(t, name, [&](auto type) {
    const auto* source = data<decltype(type)>(t);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < C; ++i) wide[row * C + i] = plus + float(source[row * stride + i]);
  });
  return wide;
}

inline const float* table_of(const Tensor& table, const char* name, int64_t P, int64_t D) {
  require_shape(table, name, {P, D / 2});
  require_type(table, name, ScalarType::Float);
  require_rows(table, name);
  return data<float>(table);
}

inline const int32_t* positions_of(const Tensor& positions, int64_t S,
                                   const std::vector<int64_t>& pairs, int64_t P, int64_t D) {
  int64_t left = D / 2;  // subtracted, because a sum could overflow
  bool fit = true;
  for (const int64_t count : pairs) {
    fit = fit && 0 <= count && count <= left;
    left -= fit ? count : 0;
  }
  require(fit && !left, "pairs must be numbers from 0 on with sum D / 2 = ", D / 2, ", got ",
          list_of(pairs), ".");
  require_shape(positions, "positions", {S, int64_t(pairs.size())});
  require_type(positions, "positions", ScalarType::Int);
  require(positions.is_contiguous(), "positions must be contiguous; call .contiguous() first.");
  const int32_t* p = data<int32_t>(positions);
  const bool inside =
      std::all_of(p, p + positions.numel(), [&](int32_t row) { return 0 <= row && row < P; });
  require(inside, "positions must lie in the tables' rows 0 to ", P - 1, ".");
  return p;
}

inline Angles angles_of(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                        const std::optional<Tensor>& positions, const std::vector<int64_t>& pairs,
                        int64_t S, int64_t D) {
  require(cos.has_value() == sin.has_value() && cos.has_value() == positions.has_value(),
          "cos, sin and positions must be given together, got only some of them.");
  if (!cos) return {};
  const int64_t P = cos->dim() ? cos->size(0) : 0;
  const float *cos_data = table_of(*cos, "cos", P, D), *sin_data = table_of(*sin, "sin", P, D);
  return {cos_data, sin_data,       positions_of(*positions, S, pairs, P, D),
          &pairs,   cos->stride(0), sin->stride(0)};
}

}  // namespace kandinsky
