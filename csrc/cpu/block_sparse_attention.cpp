// SPDX-License-Identifier: Apache-2.0
// Softmax attention over the kept blocks of keys, on the CPU. One task is one block of queries of
// one head, which attends to its kept blocks of keys in ascending order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "blocks.h"
#include "online_softmax.h"
#include "simd.h"

namespace kandinsky {
namespace {

// Bytes of keys and values that are packed at once: as many heads as fit, and at least one.
constexpr int64_t kPackedBytes = 16 << 20;

struct Attention {
  const float* query;  // [S, heads, D] with the strides below
  int64_t query_token, query_head;
  const float *key, *value;  // [heads, S, D]
  const int32_t* selection;  // [heads, N, words]
  const int32_t* offsets;    // [N + 1]
  float* out;                // [S, heads, D] with the stride below
  int64_t out_token;
  float* lse;  // [heads, S]
  int64_t heads, S, D, N, words;
  float scale;
  // Threads take tasks one by one, because rows keep very different numbers of blocks.
  std::atomic<int64_t>* next_task;

  KANDINSKY_INLINE int64_t length(int64_t block) const {
    return offsets[block + 1] - offsets[block];
  }

  // Fills `kept` with the blocks of keys that a task keeps, in ascending order.
  KANDINSKY_INLINE void list_kept(int64_t task, std::vector<KeyBlock>& kept) const {
    kept.clear();
    for (int64_t j = 0; j < N; ++j) {
      const uint32_t word = uint32_t(selection[task * words + j / 32]) >> j % 32;
      if (!word) j |= 31;
      if (!(word & 1)) continue;
      const int64_t at = (task / N * S + offsets[j]) * D;
      kept.push_back({key + at, value + at, D, length(j)});
    }
  }

  // Takes tasks until none is left. The queries of a block are cut into panels of P lanes.
  template <int W>
  KANDINSKY_INLINE void run(int64_t, int64_t) const {
    constexpr int P = kPanel<W>, kPanels = (kMaxBlock + P - 1) / P;
    Scratch memory(OnlineSoftmax<W>::floats(D) * kPanels + kMaxBlock * P);
    float* weights = memory.floats();
    OnlineSoftmax<W> states[kPanels];
    for (int p = 0; p < kPanels; ++p)
      states[p] = {weights + kMaxBlock * P + p * OnlineSoftmax<W>::floats(D), D};
    std::vector<KeyBlock> kept;
    for (int64_t task; (task = next_task->fetch_add(1)) < heads * N;) {
      const int64_t head = task / N, first = offsets[task % N], tokens = length(task % N),
                    panels = (tokens + P - 1) / P;
      list_kept(task, kept);
      const float* queries = query + first * query_token + head * query_head;
      for (int64_t p = 0; p < panels; ++p)
        states[p].begin(queries + p * P * query_token, query_token,
                        std::min<int64_t>(P, tokens - p * P), D, scale);
      for (size_t i = 0; i < kept.size(); ++i)
        for (int64_t p = 0; p < panels; ++p)
          states[p].attend(kept[i], p == 0 && i + 1 < kept.size() ? &kept[i + 1] : nullptr, D,
                           weights);
      for (int64_t p = 0; p < panels; ++p)
        states[p].end(out + (first + p * P) * out_token + head * D, out_token,
                      lse + head * S + first + p * P, std::min<int64_t>(P, tokens - p * P), D,
                      kept.empty());
    }
  }
};

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& selection,
                                                  const Tensor& offsets, double scale,
                                                  double bound) {
  require(query.dim() == 4, "query must have shape [B, S, H, D], got ", shape_of(query), ".");
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
  require_blocks(offsets, S);
  const int64_t N = offsets.numel() - 1, words = (N + 31) / 32;
  require_shape(key, "key", {B, S, H, D});
  require_shape(value, "value", {B, S, H, D});
  require_shape(selection, "selection", {B, H, N, words});
  require_type(selection, "selection", ScalarType::Int);
  const std::pair<const Tensor*, const char*> inputs[] = {
      {&query, "query"}, {&key, "key"}, {&value, "value"}};
  require_float(query, "query");
  for (const auto& [tensor, name] : inputs) {
    require_rows(*tensor, name);
    require_type(*tensor, name, query.scalar_type());
  }
  require_scale(scale);
  require(bound >= 0.0, "logit_bound must be a number from 0 on, got ", shown(bound),
          "; leave it out when none is known.");
  const Tensor out = fresh(query, "the result", {B, S, H, D}, ScalarType::Float);
  const Tensor lse = fresh(query, "the log-sum-exp", {B, H, S}, ScalarType::Float);
  const auto rounded = [&] { return in_type(out, query.scalar_type()); };
  if (!lse.numel()) return {rounded(), lse};
  const Tensor wide = to_float(query), bits = gapless(selection);
  const int64_t group = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, 8 * S * D));
  for (int64_t i = 0; i < B * H; i += std::min(group, H - i % H)) {
    const int64_t sample = i / H, first = i % H, heads = std::min(group, H - first);
    const Tensor packed_key = pack(key, sample, first, heads),
                 packed_value = pack(value, sample, first, heads);
    std::atomic<int64_t> next_task{0};
    const Attention kernel{data<float>(wide) + sample * wide.stride(0) + first * wide.stride(2),
                           wide.stride(1),
                           wide.stride(2),
                           data<float>(packed_key),
                           data<float>(packed_value),
                           data<int32_t>(bits) + i * N * words,
                           data<int32_t>(offsets),
                           mutable_data<float>(out) + (sample * S * H + first) * D,
                           H * D,
                           mutable_data<float>(lse) + i * S,
                           heads,
                           S,
                           D,
                           N,
                           words,
                           float(scale),
                           &next_task};
    parallel_for(torch::stable::get_num_threads(), 1,
                 [&](int64_t a, int64_t b) { run_simd(kernel, a, b); });
  }
  return {rounded(), lse};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("block_sparse_attention", TORCH_BOX(&kandinsky::block_sparse_attention));
}
