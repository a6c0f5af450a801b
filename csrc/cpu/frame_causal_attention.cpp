// SPDX-License-Identifier: Apache-2.0
// Attention of every frame to its own and earlier frames, on the CPU. One task is up to kQueries
// queries of one frame. It goes through the keys from the first frame on, a block at a time, and
// copies each block to one place, once for all of its queries.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../check.h"
#include "online_softmax.h"
#include "simd.h"

namespace kandinsky {
namespace {

// Queries of a task, for which a block of keys is read and copied once.
constexpr int64_t kQueries = 256;
// Keys of a block: one chain of sums, in whole tiles of the products.
template <int W>
constexpr int64_t kKeys = kChain / kRows<W> * kRows<W>;

// A tensor [B, T, P, D] whose rows of D numbers are contiguous.
template <class E>
struct Frames {
  const E* base;
  int64_t batch, frame, token;

  explicit Frames(const Tensor& t)
      : base(data<E>(t)), batch(t.stride(0)), frame(t.stride(1)), token(t.stride(2)) {}
  KANDINSKY_INLINE const E* at(int64_t b, int64_t t, int64_t p) const {
    return base + b * batch + t * frame + p * token;
  }
};

template <int W, class From, class To>
KANDINSKY_INLINE void copy_row(const From* from, int64_t D, To* to) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store<W>(to + d, load<W>(from + d));
  for (; d < D; ++d) to[d] = float(from[d]);
}

template <class E>
struct FrameAttention {
  Frames<E> query, key, value;
  E* out;                                 // [B, T, P, D]
  float* lse;                             // [B, T, P]
  int64_t B, T, P, D, keys, first_frame;  // keys: tokens of a frame of keys
  float scale;
  // Threads take tasks one by one, because late frames see more keys.
  std::atomic<int64_t>* next_task;

  // Copies `tokens` keys and values from token `first` on, where the tokens of all frames are
  // counted in one row.
  template <int W>
  KANDINSKY_INLINE KeyBlock copy_keys(int64_t b, int64_t first, int64_t tokens, float* to) const {
    float* values = to + kKeys<W> * D;
    for (int64_t j = 0; j < tokens; ++j) {
      const int64_t t = (first + j) / keys, p = (first + j) % keys;
      copy_row<W>(key.at(b, t, p), D, to + j * D);
      copy_row<W>(value.at(b, t, p), D, values + j * D);
    }
    return {to, values, D, tokens};
  }

  template <int W>
  KANDINSKY_INLINE void begin(const OnlineSoftmax<W>& state, int64_t b, int64_t t, int64_t p,
                              int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      copy_row<W>(query.at(b, t, p + i), D, state.out + i * D);  // not in use yet
    state.begin(state.out, D, count, D, scale);
  }

  template <int W>
  KANDINSKY_INLINE void end(const OnlineSoftmax<W>& state, int64_t token, int64_t count) const {
    state.end(state.query, D, lse + token, count, D, false);  // no longer in use
    for (int64_t i = 0; i < count; ++i) copy_row<W>(state.query + i * D, D, out + (token + i) * D);
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t, int64_t) const {
    constexpr int64_t width = kPanel<W>, kPanels = kQueries / width;
    Scratch memory(OnlineSoftmax<W>::floats(D) * kPanels + kKeys<W> * (width + 2 * D));
    float *weights = memory.floats(), *copies = weights + kKeys<W> * width;
    OnlineSoftmax<W> states[kPanels];
    for (int64_t i = 0; i < kPanels; ++i)
      states[i] = {copies + 2 * kKeys<W> * D + i * OnlineSoftmax<W>::floats(D), D};
    const int64_t pieces = (P + kQueries - 1) / kQueries;
    for (int64_t task; (task = next_task->fetch_add(1)) < B * T * pieces;) {
      const int64_t t = T - 1 - task / pieces / B, b = task / pieces % B,
                    first = task % pieces * kQueries;  // the longest ones first
      const int64_t queries = std::min(kQueries, P - first), panels = (queries + width - 1) / width,
                    seen = (first_frame + t + 1) * keys;
      const auto count = [&](int64_t i) __attribute__((always_inline)) {
        return std::min(width, queries - i * width);
      };
      for (int64_t i = 0; i < panels; ++i) begin<W>(states[i], b, t, first + i * width, count(i));
      for (int64_t j = 0; j < seen; j += kKeys<W>) {
        const KeyBlock block = copy_keys<W>(b, j, std::min(kKeys<W>, seen - j), copies);
        for (int64_t i = 0; i < panels; ++i) states[i].attend(block, nullptr, D, weights);
      }
      for (int64_t i = 0; i < panels; ++i)
        end<W>(states[i], (b * T + t) * P + first + i * width, count(i));
    }
  }
};

std::tuple<Tensor, Tensor> frame_causal_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, int64_t first_frame,
                                                  double scale) {
  require(query.dim() == 4 && key.dim() == 4, "query and key must have shape [B, T, P, D], got ",
          shape_of(query), " and ", shape_of(key), ".");
  const int64_t B = query.size(0), T = query.size(1), P = query.size(2), D = query.size(3),
                frames = key.size(1), keys = key.size(2);
  require_shape(key, "key", {B, frames, keys, D});
  require_shape(value, "value", {B, frames, keys, D});
  require(keys > 0, "key must have a token in every frame, got ", shape_of(key), ".");
  require(first_frame >= 0 && T <= frames && first_frame <= frames - T,
          "key must have the frames of query and first_frame >= 0 earlier ones, got ", frames,
          " frames for ", T, " and ", first_frame, ".");
  require_float(query, "query");
  const std::tuple<const Tensor*, const char*> inputs[] = {
      {&query, "query"}, {&key, "key"}, {&value, "value"}};
  for (const auto& [x, name] : inputs) {
    require_rows(*x, name);
    require_type(*x, name, query.scalar_type());
  }
  require_scale(scale);
  const Tensor out = fresh(query, "the result", {B, T, P, D});
  const Tensor lse = fresh(query, "the log-sum-exp", {B, T, P}, ScalarType::Float);
  if (!lse.numel()) return {out, lse};
  dispatch_float(query, "query", [&](auto type) {
    using E = decltype(type);
    std::atomic<int64_t> next_task{0};
    const FrameAttention<E> kernel{Frames<E>(query),
                                   Frames<E>(key),
                                   Frames<E>(value),
                                   mutable_data<E>(out),
                                   mutable_data<float>(lse),
                                   B,
                                   T,
                                   P,
                                   D,
                                   keys,
                                   first_frame,
                                   float(scale),
                                   &next_task};
    parallel_for(torch::stable::get_num_threads(), 1,
                 [&](int64_t a, int64_t b) { run_simd(kernel, a, b); });
  });
  return {out, lse};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("frame_causal_attention", TORCH_BOX(&kandinsky::frame_causal_attention));
}
