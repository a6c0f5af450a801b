// SPDX-License-Identifier: Apache-2.0
// What the attention kernels of the CPU share: softmax attention of one panel of queries over keys
// that come block by block, with a running maximum (arXiv 2205.14135), all in fp32. Which keys the
// queries see is for the kernel to say.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "panel.h"

namespace kandinsky {

// The keys and values of some tokens, D floats each, with `step` floats from one to the next.
struct KeyBlock {
  const float *key, *value;
  int64_t step, tokens;
};

// The running softmax of the kPanel<W> queries of a panel: `out` is the sum of weight * value and
// `total` the sum of weights, where weight = e^(logit - maximum).
template <int W>
struct OnlineSoftmax {
  using F = typename Lanes<W>::F;
  static constexpr int P = kPanel<W>;

  float *query, *out;      // [D][P]; query times scale, so that products are logits
  float *maximum, *total;  // [P]

  static constexpr int64_t floats(int64_t D) { return (2 * D + 2) * P; }

  static KANDINSKY_INLINE F share(const F& below) {
    return exp2_of_negative(below * std::numbers::log2e_v<float>);
  }

  OnlineSoftmax() = default;
  OnlineSoftmax(float* memory, int64_t D)
      : query(memory),
        out(memory + D * P),
        maximum(memory + 2 * D * P),
        total(memory + (2 * D + 1) * P) {}

  // Starts with `count` queries of D floats, `step` floats apart.
  KANDINSKY_INLINE void begin(const float* queries, int64_t step, int64_t count, int64_t D,
                              float scale) const {
    std::fill(query, query + D * P, 0.0f);
    transpose<W>(queries, step, count, D, query, P);
    for (int64_t i = 0; i < D * P; ++i) query[i] *= scale;
    std::fill(out, out + D * P, 0.0f);
    // A finite start, so that logits of -infinity weigh 0 and not NaN.
    std::fill(maximum, maximum + P, -FLT_MAX);
    std::fill(total, total + P, 0.0f);
  }

  // Adds one block of keys, with weights [block.tokens][P] as scratch. Meanwhile the block `ahead`,
  // if any, is prefetched, because hardware would not guess where it is.
  KANDINSKY_INLINE void attend(const KeyBlock& block, const KeyBlock* ahead, int64_t D,
                               float* weights) const {
    const F old0 = load<W>(maximum), old1 = load<W>(maximum + W);
    F top0 = old0, top1 = old1, sum0{}, sum1{};
    const auto weigh = [&](int64_t j, const F& low, const F& high) __attribute__((always_inline)) {
      for (int64_t d = 0; ahead && d < D; d += 16) {
        __builtin_prefetch(ahead->key + j * ahead->step + d, 0, 2);
        __builtin_prefetch(ahead->value + j * ahead->step + d, 0, 2);
      }
      store<W>(weights + j * P, low);
      store<W>(weights + j * P + W, high);
      top0 = low > top0 ? low : top0;
      top1 = high > top1 ? high : top1;
    };
    product<W>(block.key, block.step, 1, query, D, block.tokens, weigh);
    for (int64_t j = 0; j < block.tokens; ++j) {
      float* w = weights + j * P;
      const F low = share(load<W>(w) - top0), high = share(load<W>(w + W) - top1);
      store<W>(w, low);
      store<W>(w + W, high);
      sum0 += low;
      sum1 += high;
    }
    const F rescale0 = share(old0 - top0), rescale1 = share(old1 - top1);
    store<W>(maximum, top0);
    store<W>(maximum + W, top1);
    store<W>(total, load<W>(total) * rescale0 + sum0);
    store<W>(total + W, load<W>(total + W) * rescale1 + sum1);
    const auto gather = [&](int64_t d, const F& low, const F& high) __attribute__((always_inline)) {
      float* o = out + d * P;
      store<W>(o, load<W>(o) * rescale0 + low);
      store<W>(o + W, load<W>(o + W) * rescale1 + high);
    };
    product<W>(block.value, 1, block.step, weights, block.tokens, D, gather);
  }

  // Writes `count` results of D floats, `step` floats apart, and their natural log-sum-exp. Where
  // there were no keys (`empty`), the results are zeros.
  KANDINSKY_INLINE void end(float* results, int64_t step, float* lse, int64_t count, int64_t D,
                            bool empty) const {
    for (int64_t d = 0; d < D && !empty; ++d)
      for (int64_t lane = 0; lane < P; lane += W)
        store<W>(out + d * P + lane, load<W>(out + d * P + lane) / load<W>(total + lane));
    transpose<W>(out, P, D, count, results, step);
    for (int64_t lane = 0; lane < count; ++lane) {
      const double top = maximum[lane];
      lse[lane] = float(top == INFINITY ? top : top + std::log(double(total[lane])));
    }
  }
};

}  // namespace kandinsky
