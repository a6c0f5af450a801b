// SPDX-License-Identifier: Apache-2.0
// Softmax attention over the kept blocks of keys, on the CPU. One task is one block of queries of one head; it walks its
// kept blocks in ascending order with a running maximum (arXiv 2205.14135), all in fp32.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <numbers>
#include <tuple>
#include <vector>

#include "../check.h"
#include "panel.h"
#include "simd.h"

namespace kandinsky {
namespace {

constexpr int64_t kMaxBlock = 64;
constexpr int64_t kPackedBytes = 16 << 20;  // keys and values packed at once: as many heads as fit, at least one

struct KeyBlock {
  const float *key, *value;  // [tokens, D]
  int64_t tokens;
};

// The running softmax of the kPanel<W> queries of a panel: `out` is the sum of weight * value and `total` the sum of
// weights, where weight = 2^(logit - maximum).
struct State {
  float *query, *out;      // [D][P]; query times scale * log2(e), so that products are logits in base 2
  float *maximum, *total;  // [P]
};

struct Attention {
  const float* query;        // [S, heads, D] with the strides below
  int64_t query_token, query_head;
  const float *key, *value;  // [heads, S, D]
  const int32_t* selection;  // [heads, N, words]
  const int32_t* offsets;    // [N + 1]
  float* out;                // [S, heads, D] with the stride below
  int64_t out_token;
  float* lse;                // [heads, S]
  int64_t heads, S, D, N, words;
  float scale;
  std::atomic<int64_t>* next_task;  // threads take tasks one by one, because rows keep very different numbers of blocks

  KANDINSKY_INLINE int64_t length(int64_t block) const { return offsets[block + 1] - offsets[block]; }

  template <int W>
  KANDINSKY_INLINE void begin(const State& state, int64_t head, int64_t token, int64_t count) const {
    constexpr int P = kPanel<W>;
    const float factor = scale * std::numbers::log2e_v<float>;
    std::fill(state.query, state.query + D * P, 0.0f);
    std::fill(state.out, state.out + D * P, 0.0f);
    std::fill(state.maximum, state.maximum + P, -FLT_MAX);  // finite, so that logits of -infinity weigh 0 and not NaN
    std::fill(state.total, state.total + P, 0.0f);
    transpose<W>(query + token * query_token + head * query_head, query_token, count, D, state.query, P);
    for (int64_t i = 0; i < D * P; ++i) state.query[i] *= factor;
  }

  // Adds one block of keys. `ahead`, if any, is brought towards the cache meanwhile: it is not where hardware would guess.
  template <int W>
  KANDINSKY_INLINE void attend(const State& state, const KeyBlock& block, const KeyBlock* ahead, float* weights) const {
    using F = typename Lanes<W>::F;
    constexpr int P = kPanel<W>;
    const F old0 = load<W>(state.maximum), old1 = load<W>(state.maximum + W);
    F top0 = old0, top1 = old1, sum0{}, sum1{};
    product<W>(block.key, D, 1, state.query, D, block.tokens, [&](int64_t j, const F& low, const F& high) __attribute__((always_inline)) {
      for (int64_t d = 0; ahead && d < D; d += 16) {
        __builtin_prefetch(ahead->key + j * D + d, 0, 2);
        __builtin_prefetch(ahead->value + j * D + d, 0, 2);
      }
      store<W>(weights + j * P, low);
      store<W>(weights + j * P + W, high);
      top0 = low > top0 ? low : top0;
      top1 = high > top1 ? high : top1;
    });
    for (int64_t j = 0; j < block.tokens; ++j) {
      float* w = weights + j * P;
      const F low = exp2_of_negative(load<W>(w) - top0), high = exp2_of_negative(load<W>(w + W) - top1);
      store<W>(w, low);
      store<W>(w + W, high);
      sum0 += low;
      sum1 += high;
    }
    const F rescale0 = exp2_of_negative(old0 - top0), rescale1 = exp2_of_negative(old1 - top1);
    store<W>(state.maximum, top0);
    store<W>(state.maximum + W, top1);
    store<W>(state.total, load<W>(state.total) * rescale0 + sum0);
    store<W>(state.total + W, load<W>(state.total + W) * rescale1 + sum1);
    product<W>(block.value, 1, D, weights, block.tokens, D, [&](int64_t d, const F& low, const F& high) __attribute__((always_inline)) {
      float* o = state.out + d * P;
      store<W>(o, load<W>(o) * rescale0 + low);
      store<W>(o + W, load<W>(o + W) * rescale1 + high);
    });
  }

  template <int W>
  KANDINSKY_INLINE void end(const State& state, int64_t head, int64_t token, int64_t count, bool empty) const {
    constexpr int P = kPanel<W>;
    for (int64_t d = 0; d < D && !empty; ++d)
      for (int64_t lane = 0; lane < P; lane += W)
        store<W>(state.out + d * P + lane, load<W>(state.out + d * P + lane) / load<W>(state.total + lane));
    transpose<W>(state.out, P, D, count, out + token * out_token + head * D, out_token);
    for (int64_t lane = 0; lane < count; ++lane) {
      const double top = state.maximum[lane];
      lse[head * S + token + lane] = float(top == INFINITY ? top : top * std::numbers::ln2 + std::log(double(state.total[lane])));
    }
  }

  // Fills `kept` with the key blocks that a task keeps, in ascending order.
  KANDINSKY_INLINE void list_kept(int64_t task, std::vector<KeyBlock>& kept) const {
    kept.clear();
    for (int64_t j = 0; j < N; ++j) {
      const uint32_t word = uint32_t(selection[task * words + j / 32]) >> j % 32;
      if (!word) j |= 31;
      if (!(word & 1)) continue;
      const int64_t at = (task / N * S + offsets[j]) * D;
      kept.push_back({key + at, value + at, length(j)});
    }
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t, int64_t) const {
    constexpr int P = kPanel<W>, kPanels = (kMaxBlock + P - 1) / P;
    Scratch memory((2 * D + 2) * P * kPanels + kMaxBlock * P);
    float* weights = memory.floats();
    State states[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      float* at = weights + kMaxBlock * P + p * (2 * D + 2) * P;
      states[p] = {at, at + D * P, at + 2 * D * P, at + (2 * D + 1) * P};
    }
    std::vector<KeyBlock> kept;
    for (int64_t task; (task = next_task->fetch_add(1)) < heads * N;) {
      const int64_t head = task / N, first = offsets[task % N], tokens = length(task % N), panels = (tokens + P - 1) / P;
      list_kept(task, kept);
      for (int64_t p = 0; p < panels; ++p) begin<W>(states[p], head, first + p * P, std::min<int64_t>(P, tokens - p * P));
      for (size_t i = 0; i < kept.size(); ++i)
        for (int64_t p = 0; p < panels; ++p)
          attend<W>(states[p], kept[i], p == 0 && i + 1 < kept.size() ? &kept[i + 1] : nullptr, weights);
      for (int64_t p = 0; p < panels; ++p) end<W>(states[p], head, first + p * P, std::min<int64_t>(P, tokens - p * P), kept.empty());
    }
  }
};

// Heads [first, first + count) of one sample of [B, S, H, D] as contiguous fp32 [count, S, D].
Tensor pack(const Tensor& t, int64_t sample, int64_t first, int64_t count) {
  Tensor heads = torch::stable::select(t, 0, sample);
  return torch::stable::contiguous(to_float(torch::stable::transpose(torch::stable::narrow(heads, 1, first, count), 0, 1)));
}

void require_blocks(const Tensor& offsets, int64_t S) {
  require(offsets.dim() == 1 && offsets.numel() > 0 && offsets.is_contiguous(), "block_offsets must be contiguous int32 [N + 1], got ",
          shape_of(offsets), ".");
  require_type(offsets, "block_offsets", ScalarType::Int);
  const int32_t* p = data<int32_t>(offsets);
  const int64_t N = offsets.numel() - 1;
  bool fit = p[0] == 0 && p[N] == S;
  for (int64_t i = 0; i < N; ++i) fit = fit && p[i] < p[i + 1] && p[i + 1] - p[i] <= kMaxBlock;
  require(fit, "block_offsets must ascend from 0 to S = ", S, " in blocks of 1 to ", kMaxBlock, " tokens.");
}

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const Tensor& selection, const Tensor& offsets, double scale, double) {
  require(query.dim() == 4, "query must have shape [B, S, H, D], got ", shape_of(query), ".");
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
  require_blocks(offsets, S);
  const int64_t N = offsets.numel() - 1, words = (N + 31) / 32;
  require_shape(key, "key", {B, S, H, D});
  require_shape(value, "value", {B, S, H, D});
  require_shape(selection, "selection", {B, H, N, words});
  require_type(selection, "selection", ScalarType::Int);
  require_rows(query, "query");
  const Tensor wide = to_float(query), bits = torch::stable::contiguous(selection);
  const Tensor out = torch::stable::new_empty(query, std::vector<int64_t>{B, S, H, D}, ScalarType::Float);
  const Tensor lse = torch::stable::new_empty(query, std::vector<int64_t>{B, H, S}, ScalarType::Float);
  const int64_t group = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, 8 * S * D));
  for (int64_t i = 0; i < B * H; i += std::min(group, H - i % H)) {
    const int64_t sample = i / H, first = i % H, heads = std::min(group, H - first);
    const Tensor packed_key = pack(key, sample, first, heads), packed_value = pack(value, sample, first, heads);
    std::atomic<int64_t> next_task{0};
    const Attention kernel{data<float>(wide) + sample * wide.stride(0) + first * wide.stride(2), wide.stride(1), wide.stride(2),
        data<float>(packed_key), data<float>(packed_value), data<int32_t>(bits) + i * N * words, data<int32_t>(offsets),
        mutable_data<float>(out) + (sample * S * H + first) * D, H * D, mutable_data<float>(lse) + i * S,
        heads, S, D, N, words, float(scale), &next_task};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t a, int64_t b) { run_simd(kernel, a, b); });
  }
  return {query.scalar_type() == ScalarType::Float ? out : torch::stable::to(out, query.scalar_type()), lse};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("block_sparse_attention", TORCH_BOX(&kandinsky::block_sparse_attention));
}
