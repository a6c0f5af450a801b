// SPDX-License-Identifier: Apache-2.0
// modulated_norm, gated_add_norm and norm_rope on the CPU. Rows are widened to fp32, stay in the first-level cache over
// the passes that need them, and are rounded once; the cost is one trip of the tensors through memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "lanes.h"
#include "simd.h"

namespace kandinsky {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // less work than this is not worth a second thread

// Calls step.operator()<W>(i) over [0, n) in strides of W and the rest in strides of Tail.
template <int W, int Tail, class Step>
KANDINSKY_INLINE void sweep(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + W <= n; i += W) step.template operator()<W>(i);
  for (; i + Tail <= n; i += Tail) step.template operator()<Tail>(i);
}

template <int W, class T>
KANDINSKY_INLINE const float* widened(const T* row, int64_t n, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    sweep<W, 1>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) { store<V>(scratch + i, load<V>(row + i)); });
    return scratch;
  }
}

// Power of two that brings the largest magnitude of the row near one; 1 for rows with an infinity or NaN.
KANDINSKY_INLINE float taming_scale(const float* row, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(row[i]));
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::isfinite(largest) ? std::ldexp(1.0f, -exponent) : 1.0f;
}

// normalised = ((x * scale - mean) - offset) * inverse. `offset` is what rounding left out of `mean`, so that a constant
// row gives exact zeros; `scale` is 1 unless the squares of the row would overflow.
struct Moments {
  float scale, mean, offset, inverse;
};

struct Sums {
  double values = 0, squares = 0;
};

// Sums of map.operator()<V>(i) and of its square over [0, n). Four chains of additions hide their latency, and none is
// longer than 16 before it joins the total: rounding grows with the chain, and narrow lanes make long ones.
template <int W, class Map>
KANDINSKY_INLINE Sums reduce(int64_t n, const Map& map) {
  Sums sums;
  float rest = 0, rest_squares = 0;
  int64_t i = 0;
  while (i + 4 * W <= n) {
    typename Lanes<W>::F values[4]{}, squares[4]{};
    for (const int64_t stop = std::min(n - 4 * W, i + 60 * W); i <= stop; i += 4 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const auto x = map.template operator()<W>(i + j * W);
        values[j] += x;
        squares[j] += x * x;
      }
    }
    sums.values += sum_lanes<W>((values[0] + values[1]) + (values[2] + values[3]));
    sums.squares += sum_lanes<W>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  typename Lanes<W>::F values{}, squares{};
  for (; i + W <= n; i += W) {
    const auto x = map.template operator()<W>(i);
    values += x;
    squares += x * x;
  }
  for (; i < n; ++i) {
    const float x = map.template operator()<1>(i)[0];
    rest += x;
    rest_squares += x * x;
  }
  sums.values += sum_lanes<W>(values) + rest;
  sums.squares += sum_lanes<W>(squares) + rest_squares;
  return sums;
}

template <int W>
KANDINSKY_INLINE Moments moments(const float* row, int64_t n, float scale, double eps) {
  const Sums first = reduce<W>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) { return load<V>(row + i) * scale; });
  const float mean = float(first.values / double(n));
  const Sums second = reduce<W>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) { return load<V>(row + i) * scale - mean; });
  const double offset = second.values / double(n), variance = std::max(second.squares / double(n) - offset * offset, 0.0);
  const double inverse = std::min(1.0 / std::sqrt(variance + eps * scale * scale), 3e38);  // finite for a huge constant
  return {scale, mean, float(offset), float(inverse)};
}

template <int W>
KANDINSKY_INLINE Moments safe_moments(const float* row, int64_t n, double eps) {
  const Moments plain = moments<W>(row, n, 1.0f, eps);
  if (plain.inverse > 0) return plain;  // 0 or NaN: the sum of the row or of its squares overflowed
  return moments<W>(row, n, taming_scale(row, n), eps);
}

template <int W, class T>
KANDINSKY_INLINE void modulate(const float* row, const Moments& m, const float* scale, const float* shift, int64_t n, T* out) {
  sweep<W, 1>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) {
    const auto normed = ((load<V>(row + i) * m.scale - m.mean) - m.offset) * m.inverse;
    store<V>(out + i, normed * load<V>(scale + i) + load<V>(shift + i));
  });
}

// A [B, S, C] tensor whose rows are contiguous.
template <class T>
struct Rows {
  T* base;
  int64_t S, batch_stride, stride;

  explicit Rows(const Tensor& t) : base(mutable_data<T>(t)), S(t.size(1)), batch_stride(t.stride(0)), stride(t.stride(1)) {}
  KANDINSKY_INLINE T* operator[](int64_t row) const { return base + row / S * batch_stride + row % S * stride; }
};

template <class T>
struct ModulatedNorm {
  Rows<T> x, out;
  const float *scale, *shift;  // [B, C]; scale holds 1 + scale
  int64_t S, C;
  double eps;

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    std::vector<float> scratch(C);
    for (int64_t row = begin; row < end; ++row) {
      const float* wide = widened<W>(x[row], C, scratch.data());
      const int64_t sample = row / S * C;
      modulate<W>(wide, safe_moments<W>(wide, C, eps), scale + sample, shift + sample, C, out[row]);
    }
  }
};

template <class T>
struct GatedAddNorm {
  Rows<T> x, branch, y, normed;
  const float *gate, *scale, *shift;  // [B, C]; scale is null when no norm is wanted
  int64_t S, C;
  double eps;

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    std::vector<float> scratch(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / S * C;
      const T *a = x[row], *b = branch[row];
      T* sum = y[row];
      sweep<W, 1>(C, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        store<V>(sum + i, load<V>(a + i) + load<V>(gate + sample + i) * load<V>(b + i));
      });
      if (!scale) continue;
      const float* wide = widened<W>(sum, C, scratch.data());
      modulate<W>(wide, safe_moments<W>(wide, C, eps), scale + sample, shift + sample, C, normed[row]);
    }
  }
};

template <class T>
struct NormRope {
  const T* x;
  T* y;
  const float *weight, *cos, *sin;  // [D], [P, D/2], [P, D/2]; cos and sin null: no rotation
  const int32_t* positions;         // [S, axes]: a token's row of the tables for the pairs of each axis
  const std::vector<int64_t>& pairs;
  const int32_t* offsets;           // [N + 1], or null: then a unit of work is one token
  float* means;                     // [B, H, N, D]
  int64_t S, H, D, N;
  int64_t batch_stride, token_stride, head_stride, cos_stride, sin_stride;
  double eps;

  template <int W>
  KANDINSKY_INLINE float inverse_rms(const float* row) const {
    const Sums sums = reduce<W>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) { return load<V>(row + i); });
    const float inverse = float(1.0 / std::sqrt(sums.squares / double(D) + eps));
    if (inverse > 0 || inverse != inverse) return inverse;
    double squares = 0;  // fp32 squares overflowed
    for (int64_t i = 0; i < D; ++i) squares += double(row[i]) * row[i];
    return float(1.0 / std::sqrt(squares / double(D) + eps));
  }

  // Every angle twice, sines with the sign that belongs to the even and the odd element of a pair.
  KANDINSKY_INLINE void spread_angles(int64_t token, float* twice_cos, float* signed_sin) const {
    const int64_t axes = int64_t(pairs.size());
    for (int64_t axis = 0, i = 0, stop = 0; axis < axes; ++axis) {
      const int64_t position = positions[token * axes + axis];
      for (stop += pairs[axis]; i < stop; ++i) {
        twice_cos[2 * i] = twice_cos[2 * i + 1] = cos[position * cos_stride + i];
        signed_sin[2 * i + 1] = sin[position * sin_stride + i];
        signed_sin[2 * i] = -signed_sin[2 * i + 1];
      }
    }
  }

  template <int W>
  KANDINSKY_INLINE void token(int64_t batch, int64_t token, float* scratch, float* sums) const {
    float *twice_cos = scratch + D, *signed_sin = scratch + 2 * D;
    if (cos) spread_angles(token, twice_cos, signed_sin);
    for (int64_t head = 0; head < H; ++head) {
      const float* row = widened<W>(x + batch * batch_stride + token * token_stride + head * head_stride, D, scratch);
      T* out = y + ((batch * S + token) * H + head) * D;
      float* sum = sums + head * D;
      const float inverse = inverse_rms<W>(row);
      sweep<W, 2>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        auto v = load<V>(row + i) * inverse * load<V>(weight + i);
        if (cos) v = v * load<V>(twice_cos + i) + swap_pairs<V>(v) * load<V>(signed_sin + i);
        store<V>(out + i, v);
        if (offsets) store<V>(sum + i, load<V>(sum + i) + load<V>(out + i));
      });
    }
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    std::vector<float> scratch(3 * D), partial(offsets ? H * D : 0), sums(partial.size());
    for (int64_t unit = begin; unit < end; ++unit) {
      if (!offsets) {
        token<W>(unit / S, unit % S, scratch.data(), nullptr);
        continue;
      }
      const int64_t batch = unit / N, block = unit % N, count = offsets[block + 1] - offsets[block];
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t t = offsets[block]; t < offsets[block + 1]; ++t) {
        token<W>(batch, t, scratch.data(), partial.data());
        if ((t - offsets[block]) % 8 < 7 && t + 1 < offsets[block + 1]) continue;
        for (size_t i = 0; i < sums.size(); ++i) sums[i] += std::exchange(partial[i], 0.0f);  // 8 by 8: short chains round less
      }
      for (int64_t head = 0; head < H; ++head) {
        float* mean = means + ((batch * H + head) * N + block) * D;
        for (int64_t i = 0; i < D; ++i) mean[i] = sums[head * D + i] / float(count);
      }
    }
  }
};

template <class Kernel>
void run_parallel(const Kernel& kernel, int64_t units, int64_t elements_per_unit) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { run_simd(kernel, begin, end); });
}

// [B, C] or [D] in any float type as contiguous fp32, plus a constant.
std::vector<float> vectors(const Tensor& t, const char* name, float plus = 0) {
  require_rows(t, name);
  const int64_t C = t.size(t.dim() - 1), rows = t.dim() == 2 ? t.size(0) : 1, stride = t.dim() == 2 ? t.stride(0) : 0;
  std::vector<float> wide(rows * C);
  dispatch_float(t, name, [&](auto type) {
    const auto* source = data<decltype(type)>(t);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < C; ++i) wide[row * C + i] = plus + float(source[row * stride + i]);
  });
  return wide;
}

Tensor modulated_norm(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  require(x.dim() == 3, "x must have shape [B, S, C], got ", shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2);
  require_rows(x, "x");
  require_shape(scale, "scale", {B, C});
  require_shape(shift, "shift", {B, C});
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{B, S, C});
  const auto wide_scale = vectors(scale, "scale", 1.0f), wide_shift = vectors(shift, "shift");
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    run_parallel(ModulatedNorm<T>{Rows<T>(x), Rows<T>(out), wide_scale.data(), wide_shift.data(), S, C, eps}, B * S, C);
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_add_norm(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                          const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, double eps) {
  require(x.dim() == 3, "x must have shape [B, S, C], got ", shape_of(x), ".");
  require(scale.has_value() == shift.has_value(), "scale and shift must be given together, got only one of them.");
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2);
  require_rows(x, "x");
  require_rows(branch, "branch");
  require_shape(branch, "branch", {B, S, C});
  require_type(branch, "branch", x.scalar_type());
  require_shape(gate, "gate", {B, C});
  const std::vector<int64_t> shape{B, S, C};
  Tensor y = torch::stable::new_empty(x, shape);
  Tensor normed = scale ? torch::stable::new_empty(x, shape) : torch::stable::new_empty(x, std::vector<int64_t>{0});
  const auto wide_gate = vectors(gate, "gate");
  std::vector<float> wide_scale, wide_shift;
  if (scale) {
    require_shape(*scale, "scale", {B, C});
    require_shape(*shift, "shift", {B, C});
    wide_scale = vectors(*scale, "scale", 1.0f);
    wide_shift = vectors(*shift, "shift");
  }
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    run_parallel(GatedAddNorm<T>{Rows<T>(x), Rows<T>(branch), Rows<T>(y), Rows<T>(scale ? normed : y), wide_gate.data(),
                                 scale ? wide_scale.data() : nullptr, wide_shift.data(), S, C, eps}, B * S, C);
  });
  return {y, normed};
}

void require_offsets(const Tensor& offsets, int64_t S) {
  require(offsets.dim() == 1 && offsets.is_contiguous() && offsets.numel() > 0, "block_offsets must have shape [N + 1], got ",
          shape_of(offsets), ".");
  require_type(offsets, "block_offsets", ScalarType::Int);
  const int32_t* p = data<int32_t>(offsets);
  const int64_t N = offsets.numel() - 1;
  bool ascending = p[0] == 0 && p[N] == S;
  for (int64_t i = 0; i < N; ++i) ascending = ascending && p[i] < p[i + 1];
  require(ascending, "block_offsets must ascend from 0 to the number of tokens ", S, " without empty blocks.");
}

const float* table_of(const Tensor& table, const char* name, int64_t P, int64_t D) {
  require_shape(table, name, {P, D / 2});
  require_type(table, name, ScalarType::Float);
  require_rows(table, name);
  return data<float>(table);
}

const int32_t* positions_of(const Tensor& positions, int64_t S, const std::vector<int64_t>& pairs, int64_t P, int64_t D) {
  int64_t sum = 0;
  for (const int64_t count : pairs) {
    require(count >= 0, "pairs must not be negative, got ", count, ".");
    sum += count;
  }
  require(sum == D / 2, "pairs must have the sum D / 2 = ", D / 2, ", got ", sum, ".");
  require_shape(positions, "positions", {S, int64_t(pairs.size())});
  require_type(positions, "positions", ScalarType::Int);
  require(positions.is_contiguous(), "positions must be contiguous; call .contiguous() first.");
  const int32_t* p = data<int32_t>(positions);
  const bool inside = std::all_of(p, p + positions.numel(), [&](int32_t row) { return 0 <= row && row < P; });
  require(inside, "positions must lie in the tables' rows 0 to ", P - 1, ".");
  return p;
}

std::tuple<Tensor, Tensor> norm_rope(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& cos,
                                     const std::optional<Tensor>& sin, const std::optional<Tensor>& positions,
                                     const std::vector<int64_t>& pairs, const std::optional<Tensor>& offsets, double eps) {
  require(x.dim() == 4 && x.size(3) % 2 == 0, "x must have shape [B, S, H, D] with even D, got ", shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), H = x.size(2), D = x.size(3);
  require_rows(x, "x");
  require_shape(weight, "weight", {D});
  require(cos.has_value() == sin.has_value() && cos.has_value() == positions.has_value(),
          "cos, sin and positions must be given together, got only some of them.");
  const int64_t P = cos && cos->dim() ? cos->size(0) : 0;
  const float *cos_data = cos ? table_of(*cos, "cos", P, D) : nullptr, *sin_data = sin ? table_of(*sin, "sin", P, D) : nullptr;
  const int32_t* position_data = positions ? positions_of(*positions, S, pairs, P, D) : nullptr;
  if (offsets) require_offsets(*offsets, S);
  const int64_t N = offsets ? offsets->numel() - 1 : 0;
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{B, S, H, D});
  const std::vector<int64_t> mean_shape = offsets ? std::vector<int64_t>{B, H, N, D} : std::vector<int64_t>{0};
  Tensor means = torch::stable::new_empty(x, mean_shape, ScalarType::Float);
  const auto wide_weight = vectors(weight, "weight");
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const NormRope<T> kernel{data<T>(x), mutable_data<T>(y), wide_weight.data(), cos_data, sin_data, position_data, pairs,
                             offsets ? data<int32_t>(*offsets) : nullptr, mutable_data<float>(means), S, H, D, N,
                             x.stride(0), x.stride(1), x.stride(2), cos ? cos->stride(0) : 0, sin ? sin->stride(0) : 0, eps};
    run_parallel(kernel, offsets ? B * N : B * S, offsets ? S / std::max<int64_t>(1, N) * H * D : H * D);
  });
  return {y, means};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("modulated_norm", TORCH_BOX(&kandinsky::modulated_norm));
  library.impl("gated_add_norm", TORCH_BOX(&kandinsky::gated_add_norm));
  library.impl("norm_rope", TORCH_BOX(&kandinsky::norm_rope));
}
