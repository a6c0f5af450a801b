// SPDX-License-Identifier: Apache-2.0
// Gradients of softmax attention over the kept blocks of keys, on the CPU, in fp32 (arXiv
// 2205.14135, appendix B.2).
//
// A pair is a block of queries with a block of keys that it keeps. Its weights are
// P = exp(scale Q K^T - lse), and the gradient of its logits, called the change, is
// dS = P (dO V^T - common). The number `common` of a row is the sum of dO O over the head
// dimension, less the gradient of the row's lse. Then
//
//   dV += P^T dO,   dK += scale dS^T Q,   dQ += scale dS K.
//
// A task of the first kind owns a block of keys: it sums up dK and dV over the block's pairs and
// stores their changes. A task of the second kind owns a block of queries and sums up dQ from the
// stored changes. That makes five products for a pair, and no two tasks add to one number: the
// order of every sum, and with it every bit, is the same for any number of threads. Changes are
// stored for one strip of keys at a time, which bounds their memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numbers>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "blocks.h"
#include "panel.h"
#include "simd.h"

namespace kandinsky {
namespace {

// Floats of the stored change of a pair: [queries][kMaxBlock keys].
constexpr int64_t kPair = kMaxBlock * kMaxBlock;
// Pairs in a strip, whose changes take 16 MiB. A block of keys with more of them is a strip alone.
constexpr int64_t kStripPairs = 1024;
// Bytes of queries, keys, values and gradients that are packed at once: as many heads as fit, and
// at least one.
constexpr int64_t kPackedBytes = 16 << 20;

// The pairs of some heads. They are numbered along the blocks of keys: block j of head h, which is
// column h * N + j, has the pairs [column_start[column], column_start[column + 1]), and query_of[p]
// is the block of queries of pair p. Row h * N + i, a block of queries, has the entries
// [row_start[row], row_start[row + 1]) of row_pair, the numbers of its pairs, and of key_of, their
// blocks of keys.
struct Pairs {
  std::vector<int64_t> column_start, row_start;
  std::vector<int32_t> query_of, key_of;
  std::vector<int64_t> row_pair;

  Pairs(const int32_t* selection, int64_t heads, int64_t N, int64_t words)
      : column_start(zeros<int64_t>(heads * N + 1)), row_start(zeros<int64_t>(heads * N + 1)) {
    each(selection, heads, N, words,
         [&](int64_t row, int64_t column) { ++row_start[row + 1], ++column_start[column + 1]; });
    for (int64_t i = 0; i < heads * N; ++i)
      row_start[i + 1] += row_start[i], column_start[i + 1] += column_start[i];
    query_of = zeros<int32_t>(row_start.back()), key_of = zeros<int32_t>(row_start.back());
    row_pair = zeros<int64_t>(row_start.back());
    std::vector<int64_t> next = column_start;
    int64_t entry = 0;
    each(selection, heads, N, words, [&](int64_t row, int64_t column) {
      query_of[next[column]] = int32_t(row % N);
      key_of[entry] = int32_t(column % N);
      row_pair[entry++] = next[column]++;
    });
  }

  template <class Visit>
  static void each(const int32_t* selection, int64_t heads, int64_t N, int64_t words,
                   const Visit& visit) {
    for (int64_t row = 0; row < heads * N; ++row)
      for (int64_t j = 0; j < N; ++j) {
        const uint32_t word = uint32_t(selection[row * words + j / 32]) >> j % 32;
        if (!word) j |= 31;
        if (word & 1) visit(row, row / N * N + j);
      }
  }
};

// What both kinds of tasks share.
struct Backward {
  const float *query, *key, *value, *grad_out;  // [heads, S, D]
  const float *out, *grad_lse;                  // [heads, S, D]; [heads, S] or null
  const float* lse;                             // [heads, S]
  const int32_t* offsets;                       // [N + 1]
  const Pairs& pairs;
  float *common, *lanes;                      // scratch: [heads, S]; keys as [heads][D / P][S][P]
  float* changes;                             // scratch: of the pairs in the strip
  float *grad_query, *grad_key, *grad_value;  // [S, heads, D] with the stride below
  int64_t token;
  int64_t heads, S, D, N;
  float scale;

  KANDINSKY_INLINE int64_t length(int64_t block) const {
    return offsets[block + 1] - offsets[block];
  }
};

// Fills the `width` floats of `to`: `count` of them from `from`, the rest with zeros.
KANDINSKY_INLINE void copy_lanes(const float* from, int64_t count, float* to, int64_t width) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  for (int64_t i = count; i < width; ++i) to[i] = 0.0f;
}

// The pass before the tasks: computes `common` of every row, and copies the keys with their
// dimensions in lanes. `common` is summed in the order of the products that it is subtracted from,
// in chains of the same length, so that a weight of 1 has a change of exactly 0.
struct Prepare : Backward {
  // Rows that are summed side by side, so that no addition waits for the one before it.
  static constexpr int kTogether = 8;

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int P = kPanel<W>;
    const int64_t panels = (D + P - 1) / P;
    for (int64_t first = begin; first < end; first += kTogether) {
      float sums[kTogether]{};
      const int64_t rows = std::min<int64_t>(kTogether, end - first);
      for (int64_t start = 0; start < D; start += kChain) {
        float chain[kTogether]{};
        for (int64_t d = start; d < std::min(D, start + kChain); ++d)
          for (int64_t i = 0; i < rows; ++i)
            chain[i] += out[(first + i) * D + d] * grad_out[(first + i) * D + d];
        for (int64_t i = 0; i < rows; ++i) sums[i] += chain[i];
      }
      for (int64_t row = first; row < first + rows; ++row) {
        common[row] = grad_lse ? sums[row - first] - grad_lse[row] : sums[row - first];
        float* to = lanes + (row / S * panels * S + row % S) * P;
        for (int64_t d = 0; d < D; d += P, to += S * P)
          copy_lanes(key + row * D + d, std::min<int64_t>(P, D - d), to, P);
      }
    }
  }
};

// Tasks of the first kind. Task number `task` owns that block of keys, all of whose pairs are in
// the strip that starts with pair `first`.
struct OfKeys : Backward {
  int64_t first, stop_task;
  std::atomic<int64_t>* next_task;

  // A panel of keys: [D][P] each, a key in each lane. `key` is times scale, so that products are
  // logits.
  struct State {
    float *key, *value, *grad_key, *grad_value;
  };

  template <int W>
  KANDINSKY_INLINE void begin(const State& state, int64_t row, int64_t count) const {
    constexpr int P = kPanel<W>;
    std::fill(state.key, state.key + 4 * D * P, 0.0f);
    transpose<W>(key + row * D, D, count, D, state.key, P);
    transpose<W>(value + row * D, D, count, D, state.value, P);
    for (int64_t i = 0; i < D * P; ++i) state.key[i] *= scale;
  }

  // Adds a pair, the queries [row, row + rows) with the keys of one panel, and stores its changes
  // in `left`. Meanwhile the queries from row `ahead` on are prefetched, because hardware would not
  // guess where they are; -1 prefetches nothing.
  template <int W>
  KANDINSKY_INLINE void attend(const State& state, int64_t row, int64_t rows, int64_t ahead,
                               float* weights, float* left) const {
    using F = typename Lanes<W>::F;
    constexpr int P = kPanel<W>;
    float* change = weights + kMaxBlock * P;
    const float *q = query + row * D, *g = grad_out + row * D;
    product<W>(q, D, 1, state.key, D, rows,
               [&](int64_t i, const F& low, const F& high) __attribute__((always_inline)) {
                 for (int64_t d = 0; ahead >= 0 && d < D; d += 16) {
                   __builtin_prefetch(query + (ahead + i) * D + d, 0, 2);
                   __builtin_prefetch(grad_out + (ahead + i) * D + d, 0, 2);
                 }
                 store<W>(weights + i * P, share(low - lse[row + i]));
                 store<W>(weights + i * P + W, share(high - lse[row + i]));
               });
    product<W>(g, D, 1, state.value, D, rows,
               [&](int64_t i, const F& low, const F& high) __attribute__((always_inline)) {
                 const F x = load<W>(weights + i * P) * (low - common[row + i]),
                         y = load<W>(weights + i * P + W) * (high - common[row + i]);
                 store<W>(change + i * P, x);
                 store<W>(change + i * P + W, y);
                 store<W>(left + i * kMaxBlock, x);
                 store<W>(left + i * kMaxBlock + W, y);
               });
    add<W>(g, weights, rows, state.grad_value);
    add<W>(q, change, rows, state.grad_key);
  }

  // e^t for t <= 0. A logit exceeds its row's log-sum-exp by rounding at most, which is cut off.
  template <class F>
  KANDINSKY_INLINE static F share(const F& t) {
    return exp2_of_negative((t > 0.0f ? F{} : t) * std::numbers::log2e_v<float>);
  }

  // sums [D][P] += a^T panel, with a [rows, D] and panel [rows][P].
  template <int W>
  KANDINSKY_INLINE void add(const float* a, const float* panel, int64_t rows, float* sums) const {
    using F = typename Lanes<W>::F;
    product<W>(a, 1, D, panel, rows, D,
               [&](int64_t d, const F& low, const F& high) __attribute__((always_inline)) {
                 float* sum = sums + d * kPanel<W>;
                 store<W>(sum, load<W>(sum) + low);
                 store<W>(sum + W, load<W>(sum + W) + high);
               });
  }

  template <int W>
  KANDINSKY_INLINE void end(const State& state, int64_t head, int64_t first_token,
                            int64_t count) const {
    constexpr int P = kPanel<W>;
    for (int64_t i = 0; i < D * P; ++i) state.grad_key[i] *= scale;
    transpose<W>(state.grad_key, P, D, count, grad_key + first_token * token + head * D, token);
    transpose<W>(state.grad_value, P, D, count, grad_value + first_token * token + head * D, token);
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t, int64_t) const {
    constexpr int P = kPanel<W>, kPanels = kMaxBlock / P;
    Scratch memory(kPanels * 4 * D * P + 2 * kMaxBlock * P);
    float* weights = memory.floats();
    State states[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      float* at = weights + 2 * kMaxBlock * P + p * 4 * D * P;
      states[p] = {at, at + D * P, at + 2 * D * P, at + 3 * D * P};
    }
    for (int64_t task; (task = next_task->fetch_add(1)) < stop_task;) {
      const int64_t head = task / N, start = offsets[task % N], tokens = length(task % N),
                    panels = (tokens + P - 1) / P;
      for (int64_t p = 0; p < panels; ++p)
        begin<W>(states[p], head * S + start + p * P, std::min<int64_t>(P, tokens - p * P));
      for (int64_t pair = pairs.column_start[task]; pair < pairs.column_start[task + 1]; ++pair) {
        const int64_t block = pairs.query_of[pair], last = pairs.column_start[task + 1] - 1;
        const int64_t ahead = pair < last ? head * S + offsets[pairs.query_of[pair + 1]] : -1;
        for (int64_t p = 0; p < panels; ++p)
          attend<W>(states[p], head * S + offsets[block], length(block), p ? -1 : ahead, weights,
                    changes + (pair - first) * kPair + p * P);
      }
      for (int64_t p = 0; p < panels; ++p)
        end<W>(states[p], head, start + p * P, std::min<int64_t>(P, tokens - p * P));
    }
  }
};

// Tasks of the second kind. Task number `task` owns that block of queries and adds the changes of
// its pairs in the strip [first, stop). The sum so far is in grad_query, so that the order of the
// sum does not depend on where strips end.
struct OfQueries : Backward {
  int64_t first, stop;
  std::atomic<int64_t>* next_task;

  // sums [D / P][queries][P] += change [queries][kMaxBlock] * keys [D / P][tokens][P]. Meanwhile
  // the next change, `ahead`, is prefetched.
  template <int W>
  KANDINSKY_INLINE void add(const float* change, const float* ahead, const float* keys,
                            int64_t tokens, int64_t rows, float* sums) const {
    using F = typename Lanes<W>::F;
    constexpr int P = kPanel<W>;
    for (int64_t d = 0; d < D; d += P, keys += S * P, sums += kMaxBlock * P)
      product<W>(change, kMaxBlock, 1, keys, tokens, rows,
                 [&](int64_t i, const F& low, const F& high) __attribute__((always_inline)) {
                   for (int64_t j = 0; d == 0 && j < tokens; j += 16)
                     __builtin_prefetch(ahead + i * kMaxBlock + j, 0, 2);
                   store<W>(sums + i * P, load<W>(sums + i * P) + low);
                   store<W>(sums + i * P + W, load<W>(sums + i * P + W) + high);
                 });
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t, int64_t) const {
    constexpr int P = kPanel<W>;
    const int64_t panels = (D + P - 1) / P;
    const int64_t* numbers = pairs.row_pair.data();
    Scratch memory(panels * kMaxBlock * P);
    float* sums = memory.floats();
    for (int64_t task; (task = next_task->fetch_add(1)) < heads * N;) {
      const int64_t head = task / N, rows = length(task % N), end = pairs.row_start[task + 1];
      int64_t i = std::lower_bound(numbers + pairs.row_start[task], numbers + end, first) - numbers;
      if (i == end || numbers[i] >= stop) continue;
      float* grad = grad_query + offsets[task % N] * token + head * D;
      const auto change_of = [&](int64_t pair) { return changes + (pair - first) * kPair; };
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t row = 0; row < rows; ++row)
          copy_lanes(grad + row * token + p * P, std::min<int64_t>(P, D - p * P),
                     sums + (p * kMaxBlock + row) * P, P);
      for (; i < end && numbers[i] < stop; ++i) {
        const int64_t block = pairs.key_of[i];
        const int64_t next = i + 1 < end && numbers[i + 1] < stop ? i + 1 : i;
        add<W>(change_of(numbers[i]), change_of(numbers[next]),
               lanes + (head * panels * S + offsets[block]) * P, length(block), rows, sums);
      }
      const float factor = i == end ? scale : 1.0f;
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t d = 0; d < std::min<int64_t>(P, D - p * P); ++d)
            grad[row * token + p * P + d] = factor * sums[(p * kMaxBlock + row) * P + d];
    }
  }
};

template <class Kernel>
void run_on_all_threads(const Kernel& kernel) {
  parallel_for(torch::stable::get_num_threads(), 1,
               [&](int64_t a, int64_t b) { run_simd(kernel, a, b); });
}

Tensor scratch(const Tensor& like, int64_t floats) {
  return fresh(like, "working memory", {floats}, ScalarType::Float);
}

// Runs both kinds of tasks, strip by strip: as many whole columns as have kStripPairs pairs.
void run_backward(Backward& backward, const Tensor& like) {
  parallel_for(backward.heads * backward.S, 256,
               [&](int64_t a, int64_t b) { run_simd(Prepare{backward}, a, b); });
  const std::vector<int64_t>& starts = backward.pairs.column_start;
  const int64_t columns = int64_t(starts.size()) - 1;
  int64_t most = kStripPairs;
  for (int64_t i = 0; i < columns; ++i) most = std::max(most, starts[i + 1] - starts[i]);
  const Tensor changes = scratch(like, std::min(most, starts[columns]) * kPair);
  backward.changes = mutable_data<float>(changes);
  for (int64_t column = 0; column < columns;) {
    const int64_t begin = column++;
    while (column < columns && starts[column + 1] - starts[begin] <= kStripPairs) ++column;
    std::atomic<int64_t> next_column{begin}, next_row{0};
    run_on_all_threads(OfKeys{backward, starts[begin], column, &next_column});
    run_on_all_threads(OfQueries{backward, starts[begin], starts[column], &next_row});
  }
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& selection, const Tensor& offsets, const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse, double scale) {
  require(query.dim() == 4, "query must have shape [B, S, H, D], got ", shape_of(query), ".");
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
  require_blocks(offsets, S);
  const int64_t N = offsets.numel() - 1, words = (N + 31) / 32;
  const std::pair<const Tensor*, const char*> alike[] = {
      {&key, "key"}, {&value, "value"}, {&out, "out"}, {&grad_out, "grad_out"}};
  require_float(query, "query");
  for (const auto& [tensor, name] : alike) {
    require_shape(*tensor, name, {B, S, H, D});
    require_type(*tensor, name, query.scalar_type());
  }
  require_rows(query, "query");
  require_rows(key, "key");
  require_rows(value, "value");
  require_type(lse, "lse", ScalarType::Float);
  if (grad_lse) require_type(*grad_lse, "grad_lse", ScalarType::Float);
  require_shape(lse, "lse", {B, H, S});
  if (grad_lse) require_shape(*grad_lse, "grad_lse", {B, H, S});
  require_shape(selection, "selection", {B, H, N, words});
  require_type(selection, "selection", ScalarType::Int);
  require_scale(scale);
  const Tensor bits = gapless(selection), sums = gapless(lse);
  const Tensor grad_sums = grad_lse ? gapless(*grad_lse) : sums;
  Tensor gradients[3];
  for (Tensor& gradient : gradients)
    gradient = fresh_zeros(query, "a gradient", {B, S, H, D}, ScalarType::Float);
  const int64_t group = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, 24 * S * D)),
                lane_D = D / 32 * 32 + 32;
  const int64_t rows = query.numel() ? std::min(group, H) * S : 0;
  const Tensor common = scratch(query, rows), lanes = scratch(query, rows * lane_D);
  const int64_t all_heads = query.numel() ? B * H : 0;
  for (int64_t i = 0; i < all_heads; i += std::min(group, H - i % H)) {
    const int64_t sample = i / H, first = i % H, heads = std::min(group, H - first);
    Tensor packed[5];
    int64_t next = 0;
    for (const Tensor* t : {&query, &key, &value, &grad_out, &out})
      packed[next++] = pack(*t, sample, first, heads);
    const auto heads_of = [&](int gradient) {
      return mutable_data<float>(gradients[gradient]) + (sample * S * H + first) * D;
    };
    const Pairs pairs(data<int32_t>(bits) + i * N * words, heads, N, words);
    Backward backward{data<float>(packed[0]),
                      data<float>(packed[1]),
                      data<float>(packed[2]),
                      data<float>(packed[3]),
                      data<float>(packed[4]),
                      grad_lse ? data<float>(grad_sums) + i * S : nullptr,
                      data<float>(sums) + i * S,
                      data<int32_t>(offsets),
                      pairs,
                      mutable_data<float>(common),
                      mutable_data<float>(lanes),
                      nullptr,
                      heads_of(0),
                      heads_of(1),
                      heads_of(2),
                      H * D,
                      heads,
                      S,
                      D,
                      N,
                      float(scale)};
    run_backward(backward, query);
  }
  for (Tensor& gradient : gradients) gradient = in_type(gradient, query.scalar_type());
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("block_sparse_attention_backward",
               TORCH_BOX(&kandinsky::block_sparse_attention_backward));
}
