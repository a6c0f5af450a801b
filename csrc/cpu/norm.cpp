// SPDX-License-Identifier: Apache-2.0
// modulated_norm, gated_add_norm and norm_rope on the CPU. A row is widened to fp32, stays in the
// first-level cache over the passes that need it, and is rounded once. So the cost is one trip of
// the tensors through memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "norm.h"

namespace kandinsky {
namespace {

// out = normalised row * scale + shift, where `scale` holds 1 + scale.
template <int W, class T>
KANDINSKY_INLINE void modulate(const float* row, const Moments& m, const float* scale,
                               const float* shift, int64_t n, T* out) {
  sweep<W, 1>(n, [&]<int V>(int64_t i) __attribute__((always_inline)) {
    store<V>(out + i, m.centred<V>(row + i) * m.inverse * load<V>(scale + i) + load<V>(shift + i));
  });
}

template <class T>
struct ModulatedNorm {
  Rows<T> x, out;
  const float *scale, *shift;  // [B, C]; scale holds 1 + scale
  int64_t S, C;
  double eps;

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    std::vector<float> scratch = zeros<float>(C);
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
    std::vector<float> scratch = zeros<float>(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / S * C;
      const T *a = x[row], *b = branch[row];
      T* sum = y[row];
      sweep<W, 1>(C, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        store<V>(sum + i, load<V>(a + i) + load<V>(gate + sample + i) * load<V>(b + i));
      });
      if (!scale) continue;
      const float* wide = widened<W>(sum, C, scratch.data());
      modulate<W>(wide, safe_moments<W>(wide, C, eps), scale + sample, shift + sample, C,
                  normed[row]);
    }
  }
};

template <class T>
struct NormRope {
  const T* x;
  T* y;
  const float* weight;  // [D]
  Angles angles;
  const int32_t* offsets;  // [N + 1], or null: then a unit of work is one token
  float* means;            // [B, H, N, D]
  int64_t S, H, D, N;
  int64_t batch_stride, token_stride, head_stride;
  double eps;

  template <int W>
  KANDINSKY_INLINE void token(int64_t batch, int64_t token, float* scratch, float* sums) const {
    float *twice_cos = scratch + D, *signed_sin = scratch + 2 * D;
    if (angles.cos) angles.spread(token, twice_cos, signed_sin);
    for (int64_t head = 0; head < H; ++head) {
      const float* row = widened<W>(
          x + batch * batch_stride + token * token_stride + head * head_stride, D, scratch);
      T* out = y + ((batch * S + token) * H + head) * D;
      float* sum = sums + head * D;
      const float inverse = inverse_rms<W>(row, D, eps);
      sweep<W, 2>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        auto v = load<V>(row + i) * inverse * load<V>(weight + i);
        if (angles.cos) v = v * load<V>(twice_cos + i) + swap_pairs<V>(v) * load<V>(signed_sin + i);
        store<V>(out + i, v);
        if (offsets) store<V>(sum + i, load<V>(sum + i) + load<V>(out + i));
      });
    }
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    std::vector<float> scratch = zeros<float>(3 * D), partial = zeros<float>(offsets ? H * D : 0),
                       sums = zeros<float>(int64_t(partial.size()));
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
        // Eight tokens at a time, because short chains of additions round less.
        for (size_t i = 0; i < sums.size(); ++i) sums[i] += std::exchange(partial[i], 0.0f);
      }
      for (int64_t head = 0; head < H; ++head) {
        float* mean = means + ((batch * H + head) * N + block) * D;
        for (int64_t i = 0; i < D; ++i) mean[i] = sums[head * D + i] / float(count);
      }
    }
  }
};

Tensor modulated_norm(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  require(x.dim() == 3, "x must have shape [B, S, C], got ", shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2);
  require_rows(x, "x");
  require_vector(scale, "scale", {B, C});
  require_vector(shift, "shift", {B, C});
  require_float(x, "x");
  require_epsilon(eps);
  Tensor out = fresh(x, "the result", {B, S, C});
  if (!x.numel()) return out;
  const auto wide_scale = vectors(scale, "scale", 1.0f), wide_shift = vectors(shift, "shift");
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    run_parallel(
        ModulatedNorm<T>{Rows<T>(x), Rows<T>(out), wide_scale.data(), wide_shift.data(), S, C, eps},
        B * S, C);
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_add_norm(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                          const std::optional<Tensor>& scale,
                                          const std::optional<Tensor>& shift, double eps) {
  require(x.dim() == 3, "x must have shape [B, S, C], got ", shape_of(x), ".");
  require(scale.has_value() == shift.has_value(),
          "scale and shift must be given together, got only one of them.");
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2);
  require_rows(x, "x");
  require_rows(branch, "branch");
  require_shape(branch, "branch", {B, S, C});
  require_type(branch, "branch", x.scalar_type());
  require_vector(gate, "gate", {B, C});
  const std::vector<int64_t> shape{B, S, C};
  if (scale) {
    require_vector(*scale, "scale", {B, C});
    require_vector(*shift, "shift", {B, C});
  }
  require_float(x, "x");
  require_epsilon(eps);
  Tensor y = fresh(x, "the sum", shape);
  Tensor normed = fresh(x, "the result", scale ? shape : std::vector<int64_t>{0});
  if (!x.numel()) return {y, normed};
  const auto wide_gate = vectors(gate, "gate");
  std::vector<float> wide_scale, wide_shift;
  if (scale) {
    wide_scale = vectors(*scale, "scale", 1.0f);
    wide_shift = vectors(*shift, "shift");
  }
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    run_parallel(GatedAddNorm<T>{Rows<T>(x), Rows<T>(branch), Rows<T>(y),
                                 Rows<T>(scale ? normed : y), wide_gate.data(),
                                 scale ? wide_scale.data() : nullptr, wide_shift.data(), S, C, eps},
                 B * S, C);
  });
  return {y, normed};
}

void require_offsets(const Tensor& offsets, int64_t S) {
  require_list(offsets);
  const int32_t* p = data<int32_t>(offsets);
  const int64_t N = offsets.numel() - 1;
  bool ascending = p[0] == 0 && p[N] == S;
  for (int64_t i = 0; i < N; ++i) ascending = ascending && p[i] < p[i + 1];
  require(ascending, "block_offsets must ascend from 0 to the number of tokens ", S,
          " without empty blocks.");
}

std::tuple<Tensor, Tensor> norm_rope(const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& cos,
                                     const std::optional<Tensor>& sin,
                                     const std::optional<Tensor>& positions,
                                     const std::vector<int64_t>& pairs,
                                     const std::optional<Tensor>& offsets, double eps) {
  require(x.dim() == 4 && x.size(3) % 2 == 0, "x must have shape [B, S, H, D] with even D, got ",
          shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), H = x.size(2), D = x.size(3);
  require_rows(x, "x");
  require_vector(weight, "weight", {D});
  const Angles angles = angles_of(cos, sin, positions, pairs, S, D);
  if (offsets) require_offsets(*offsets, S);
  const int64_t N = offsets ? offsets->numel() - 1 : 0;
  require_float(x, "x");
  require_epsilon(eps);
  Tensor y = fresh(x, "the result", {B, S, H, D});
  const std::vector<int64_t> mean_shape =
      offsets ? std::vector<int64_t>{B, H, N, D} : std::vector<int64_t>{0};
  Tensor means = fresh(x, "the means", mean_shape, ScalarType::Float);
  if (!x.numel()) return {y, means};
  const auto wide_weight = vectors(weight, "weight");
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const NormRope<T> kernel{data<T>(x),
                             mutable_data<T>(y),
                             wide_weight.data(),
                             angles,
                             offsets ? data<int32_t>(*offsets) : nullptr,
                             mutable_data<float>(means),
                             S,
                             H,
                             D,
                             N,
                             x.stride(0),
                             x.stride(1),
                             x.stride(2),
                             eps};
    run_parallel(kernel, offsets ? B * N : B * S,
                 offsets ? S / std::max<int64_t>(1, N) * H * D : H * D);
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
