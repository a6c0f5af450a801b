// SPDX-License-Identifier: Apache-2.0
// Gradients of modulated_norm, gated_add_norm and norm_rope on the CPU.
//
// With n the normalised row and g the gradient of n, the row's own gradient is
// (g - mean(g) - n mean(g n)) / deviation, and for the root mean square the same without mean(g).
//
// The gradients of vectors that all rows share are sums over rows: eight rows, or the heads of a
// token, in one chain of fp32; the chains of a chunk of rows in fp64; and the chunks in fp64. A
// chunk is one task. Its rows do not depend on the number of threads, and so no bit of the result
// does.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "norm.h"

namespace kandinsky {
namespace {

constexpr int64_t kChain = 8;   // rows that are summed in fp32
constexpr int64_t kChunk = 64;  // rows of C channels, or tokens of H heads, of one task

KANDINSKY_INLINE int64_t chunks_of(int64_t S) { return (S + kChunk - 1) / kChunk; }

// The sums of `count` numbers over the rows of a chunk.
class ChunkSums {
 public:
  explicit ChunkSums(int64_t count) : chain_(zeros<float>(count)), total_(zeros<double>(count)) {}
  float* chain() { return chain_.data(); }  // what a row is added to
  void begin() { std::fill(total_.begin(), total_.end(), 0.0); }
  KANDINSKY_INLINE void next() {  // the chain is long enough
    for (size_t i = 0; i < total_.size(); ++i) total_[i] += std::exchange(chain_[i], 0.0f);
  }
  void end(float* to) const { std::copy(total_.begin(), total_.end(), to); }

 private:
  std::vector<float> chain_;
  std::vector<double> total_;
};

// The gradient of modulated_norm and, where Gated, of gated_add_norm, whose sum y is x here.
template <class T, bool Gated>
struct LayerNormBackward {
  static constexpr int kVectors = Gated ? 3 : 2;  // scale, shift and gate

  Rows<T> x, grad, grad_x;
  const float* scale;                 // [B, C], holds 1 + scale
  Rows<T> branch, more, grad_branch;  // where Gated; `more` is y's own gradient, if it has one
  bool has_more;
  const float* gate;  // [B, C]
  float* sums;        // [B, chunks, kVectors, C]
  int64_t S, C;
  double eps;

  template <int W>
  KANDINSKY_INLINE void row(int64_t row, float* wide_x, float* wide_grad, float* chain) const {
    const int64_t sample = row / S * C;
    const float *at = widened<W>(x[row], C, wide_x), *g = widened<W>(grad[row], C, wide_grad),
                *factor = scale + sample;
    const Moments m = safe_moments<W>(at, C, eps);
    const Sums s = reduce<W>(C, [&]<int V>(int64_t i) __attribute__((always_inline)) {
      return Two<V>{load<V>(g + i) * load<V>(factor + i), m.centred<V>(at + i)};
    });
    const float mean = float(s.values / double(C)),
                along = float(s.products / double(C) * m.exact_inverse * m.exact_inverse);
    const float inverse = m.inverse * m.scale;
    T* out = grad_x[row];
    const T *b = Gated ? branch[row] : nullptr, *own = Gated && has_more ? more[row] : nullptr;
    T* out_b = Gated ? grad_branch[row] : nullptr;
    sweep<W, 1>(C, [&]<int V>(int64_t i) __attribute__((always_inline)) {
      const auto centred = m.centred<V>(at + i), given = load<V>(g + i);
      auto result = ((given * load<V>(factor + i) - mean) - centred * along) * inverse;
      store<V>(chain + i, load<V>(chain + i) + given * (centred * m.inverse));
      store<V>(chain + C + i, load<V>(chain + C + i) + given);
      if constexpr (Gated) {
        if (own) result += load<V>(own + i);
        store<V>(chain + 2 * C + i, load<V>(chain + 2 * C + i) + result * load<V>(b + i));
        store<V>(out_b + i, result * load<V>(gate + sample + i));
      }
      store<V>(out + i, result);
    });
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t chunks = chunks_of(S);
    std::vector<float> scratch = zeros<float>(2 * C);
    ChunkSums partial(kVectors * C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % chunks * kChunk, last = std::min(first + kChunk, S),
                    start = unit / chunks * S;
      partial.begin();
      for (int64_t i = first; i < last; ++i) {
        row<W>(start + i, scratch.data(), scratch.data() + C, partial.chain());
        if (i % kChain == kChain - 1 || i + 1 == last) partial.next();
      }
      partial.end(sums + unit * kVectors * C);
    }
  }
};

template <class T>
struct NormRopeBackward {
  const T *x, *grad;  // [B, S, H, D] with the strides below
  T* grad_x;          // contiguous
  const float* weight;
  Angles angles;
  float* sums;  // [B, chunks, D]
  int64_t S, H, D;
  int64_t strides[3], grad_strides[3];
  double eps;

  template <int W>
  KANDINSKY_INLINE void token(int64_t batch, int64_t token, float* scratch, float* chain) const {
    float *turned = scratch + D, *twice_cos = scratch + 2 * D, *signed_sin = scratch + 3 * D;
    if (angles.cos) angles.spread(token, twice_cos, signed_sin);
    for (int64_t head = 0; head < H; ++head) {
      const float* at =
          widened<W>(x + batch * strides[0] + token * strides[1] + head * strides[2], D, scratch);
      const T* given =
          grad + batch * grad_strides[0] + token * grad_strides[1] + head * grad_strides[2];
      const float inverse = inverse_rms<W>(at, D, eps);
      sweep<W, 2>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        auto v = load<V>(given + i);
        if (angles.cos) v = v * load<V>(twice_cos + i) - swap_pairs<V>(v) * load<V>(signed_sin + i);
        store<V>(turned + i, v);
      });
      const Sums s = reduce<W>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        return Two<V>{load<V>(turned + i) * load<V>(weight + i), load<V>(at + i) * inverse};
      });
      const float along = float(s.products / double(D));
      T* out = grad_x + ((batch * S + token) * H + head) * D;
      sweep<W, 2>(D, [&]<int V>(int64_t i) __attribute__((always_inline)) {
        const auto normed = load<V>(at + i) * inverse, g = load<V>(turned + i);
        store<V>(out + i, (g * load<V>(weight + i) - normed * along) * inverse);
        store<V>(chain + i, load<V>(chain + i) + g * normed);
      });
    }
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t chunks = chunks_of(S);
    std::vector<float> scratch = zeros<float>(4 * D);
    ChunkSums partial(D);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % chunks * kChunk, last = std::min(first + kChunk, S);
      partial.begin();
      for (int64_t i = first; i < last; ++i) {
        token<W>(unit / chunks, i, scratch.data(), partial.chain());
        partial.next();
      }
      partial.end(sums + unit * D);
    }
  }
};

Tensor floats(const Tensor& like, const std::vector<int64_t>& shape) {
  return fresh(like, "the gradient's sums", shape, ScalarType::Float);
}

// The sums over no rows at all.
Tensor no_sums(const Tensor& like, const std::vector<int64_t>& shape) {
  return fresh_zeros(like, "the gradient's sums", shape, ScalarType::Float);
}

// totals[i] [rows, C] = the sums of [rows, chunks, n, C] over chunks, for i < n.
std::vector<Tensor> totals(const Tensor& sums, int64_t rows, int64_t chunks, int64_t n, int64_t C) {
  std::vector<Tensor> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(floats(sums, {rows, C}));
  if (rows == 0 || C == 0) return out;
  parallel_for(n * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total = zeros<double>(C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / rows, row = unit % rows;
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* part = data<float>(sums) + ((row * chunks + chunk) * n + i) * C;
        for (int64_t c = 0; c < C; ++c) total[c] += part[c];
      }
      std::copy(total.begin(), total.end(), mutable_data<float>(out[i]) + row * C);
    }
  });
  return out;
}

void require_like(const Tensor& tensor, const char* name, const Tensor& x, const char* of) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  require_shape(tensor, name, shape);
  if (tensor.scalar_type() != x.scalar_type())
    fail<WrongType>(name, " must have the dtype of ", of, " ", type_name(x.scalar_type()), ", got ",
                    type_name(tensor.scalar_type()), "; cast one of them.");
  require_rows(tensor, name);
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward(const Tensor& x, const Tensor& scale,
                                                           const Tensor& grad, double eps) {
  require(x.dim() == 3, "x must have shape [B, S, C], got ", shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2), chunks = chunks_of(S);
  require_rows(x, "x");
  require_vector(scale, "scale", {B, C});
  require_like(grad, "grad", x, "x");
  require_float(x, "x");
  require_epsilon(eps);
  const Tensor grad_x = fresh(x, "the gradient", {B, S, C}), sums = floats(x, {B, chunks, 2, C});
  if (!x.numel()) return {grad_x, no_sums(x, {B, C}), no_sums(x, {B, C})};
  const auto wide_scale = vectors(scale, "scale", 1.0f);
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const Rows<T> unused(x);
    const LayerNormBackward<T, false> kernel{
        unused, Rows<T>(grad), Rows<T>(grad_x), wide_scale.data(),         unused, unused,
        unused, false,         nullptr,         mutable_data<float>(sums), S,      C,
        eps};
    run_parallel(kernel, B * chunks, kChunk * C);
  });
  const auto shared = totals(sums, B, chunks, 2, C);
  return {grad_x, shared[0], shared[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_add_norm_backward(
    const Tensor& y, const Tensor& branch, const Tensor& gate, const Tensor& scale,
    const std::optional<Tensor>& grad_y, const Tensor& grad_normed, double eps) {
  require(y.dim() == 3, "y must have shape [B, S, C], got ", shape_of(y), ".");
  const int64_t B = y.size(0), S = y.size(1), C = y.size(2), chunks = chunks_of(S);
  require_rows(y, "y");
  require_like(branch, "branch", y, "y");
  require_vector(gate, "gate", {B, C});
  require_vector(scale, "scale", {B, C});
  require_like(grad_normed, "grad_normed", y, "y");
  if (grad_y) require_like(*grad_y, "grad_y", y, "y");
  const std::vector<int64_t> shape{B, S, C};
  require_float(y, "y");
  require_epsilon(eps);
  const Tensor grad_x = fresh(y, "the gradient", shape),
               grad_branch = fresh(y, "the gradient of branch", shape);
  const Tensor sums = floats(y, {B, chunks, 3, C});
  if (!y.numel())
    return {grad_x, grad_branch, no_sums(y, {B, C}), no_sums(y, {B, C}), no_sums(y, {B, C})};
  const auto wide_scale = vectors(scale, "scale", 1.0f), wide_gate = vectors(gate, "gate");
  dispatch_float(y, "y", [&](auto type) {
    using T = decltype(type);
    const LayerNormBackward<T, true> kernel{Rows<T>(y),
                                            Rows<T>(grad_normed),
                                            Rows<T>(grad_x),
                                            wide_scale.data(),
                                            Rows<T>(branch),
                                            Rows<T>(grad_y ? *grad_y : y),
                                            Rows<T>(grad_branch),
                                            grad_y.has_value(),
                                            wide_gate.data(),
                                            mutable_data<float>(sums),
                                            S,
                                            C,
                                            eps};
    run_parallel(kernel, B * chunks, kChunk * C);
  });
  const auto shared = totals(sums, B, chunks, 3, C);
  return {grad_x, grad_branch, shared[2], shared[0], shared[1]};
}

std::tuple<Tensor, Tensor> norm_rope_backward(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& cos,
                                              const std::optional<Tensor>& sin,
                                              const std::optional<Tensor>& positions,
                                              const std::vector<int64_t>& pairs, const Tensor& grad,
                                              double eps) {
  require(x.dim() == 4 && x.size(3) % 2 == 0, "x must have shape [B, S, H, D] with even D, got ",
          shape_of(x), ".");
  const int64_t B = x.size(0), S = x.size(1), H = x.size(2), D = x.size(3), chunks = chunks_of(S);
  require_rows(x, "x");
  require_vector(weight, "weight", {D});
  require_like(grad, "grad", x, "x");
  const Angles angles = angles_of(cos, sin, positions, pairs, S, D);
  require_float(x, "x");
  require_epsilon(eps);
  const Tensor grad_x = fresh(x, "the gradient", {B, S, H, D}), sums = floats(x, {B, chunks, D});
  if (!x.numel()) return {grad_x, no_sums(x, {D})};
  const auto wide_weight = vectors(weight, "weight");
  dispatch_float(x, "x", [&](auto type) {
    using T = decltype(type);
    const NormRopeBackward<T> kernel{data<T>(x),
                                     data<T>(grad),
                                     mutable_data<T>(grad_x),
                                     wide_weight.data(),
                                     angles,
                                     mutable_data<float>(sums),
                                     S,
                                     H,
                                     D,
                                     {x.stride(0), x.stride(1), x.stride(2)},
                                     {grad.stride(0), grad.stride(1), grad.stride(2)},
                                     eps};
    run_parallel(kernel, B * chunks, kChunk * H * D);
  });
  return {grad_x, torch::stable::select(totals(sums, 1, B * chunks, 1, D)[0], 0, 0)};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("modulated_norm_backward", TORCH_BOX(&kandinsky::modulated_norm_backward));
  library.impl("gated_add_norm_backward", TORCH_BOX(&kandinsky::gated_add_norm_backward));
  library.impl("norm_rope_backward", TORCH_BOX(&kandinsky::norm_rope_backward));
}
