// SPDX-License-Identifier: Apache-2.0
// NABLA's choice of blocks of keys (arXiv 2507.13546) on the CPU, without sorting. Masses are
// integers, so the sum of the masses up to a limit does not depend on their order, and a bisection
// of the limit finds exactly the lightest block to keep.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <string>
#include <vector>

#include "../check.h"
#include "panel.h"
#include "simd.h"

namespace kandinsky {
namespace {

// One sum in double for each lane. It is exact, because masses are integers up to 2^32 and a row
// has fewer than 2^21 of them.
template <int W>
struct Sums {
  typedef double D __attribute__((vector_size(4 * W)));
  typedef double All __attribute__((vector_size(8 * W)));
  D low{}, high{};

  KANDINSKY_INLINE void add(const typename Lanes<W>::F& mass) {
    const All wide = __builtin_convertvector(mass, All);
    D halves[2];
    std::memcpy(halves, &wide, sizeof(wide));
    low += halves[0];
    high += halves[1];
  }
  KANDINSKY_INLINE void store_to(double* lanes) const {
    std::memcpy(lanes, &low, sizeof(low));
    std::memcpy(lanes + W / 2, &high, sizeof(high));
  }
};

// Blocks of queries of a task, all of one head: a whole number of panels.
constexpr int64_t kTaskRows = 32;

struct Selection {
  const float* query;  // [B, H, N, D] with the strides below
  int64_t batch_stride, head_stride, row_stride;
  const float* key;    // [B, H, N, D], contiguous
  int32_t* selection;  // [B, H, N, words]
  int64_t H, N, D, words;
  double drop;                         // 1 - keep_mass
  bool stable;                         // of equal masses the first ones are dropped; or none
  std::vector<int64_t> tiles, window;  // (T, Y, X) each, or both empty

  int64_t chunks() const { return (N + kTaskRows - 1) / kTaskRows; }

  // Computes logits [N][P] and the maximum of each lane, which becomes NaN where it is not finite
  // or where a logit is NaN.
  template <int W>
  KANDINSKY_INLINE void score(const float* panel, const float* keys, float* logits,
                              float* maximum) const {
    using F = typename Lanes<W>::F;
    constexpr int P = kPanel<W>;
    F top0 = F{} - INFINITY, top1 = top0, nan0{}, nan1{};
    product<W>(keys, D, 1, panel, D, N,
               [&](int64_t j, const F& low, const F& high) __attribute__((always_inline)) {
                 store<W>(logits + j * P, low);
                 store<W>(logits + j * P + W, high);
                 top0 = low > top0 ? low : top0;
                 top1 = high > top1 ? high : top1;
                 nan0 = low == low ? nan0 : low;
                 nan1 = high == high ? nan1 : high;
               });
    // Infinity less infinity is NaN.
    store<W>(maximum, top0 + (top0 - top0) + nan0);
    store<W>(maximum + W, top1 + (top1 - top1) + nan1);
  }

  // Replaces the logits of W lanes by masses round(2^32 exp(logit - maximum)), or by zeros where
  // the maximum is NaN, and sums them up.
  template <int W>
  KANDINSKY_INLINE void weigh(float* logits, const float* maximum, double* total) const {
    using F = typename Lanes<W>::F;
    const F top = load<W>(maximum);
    Sums<W> sums;
    for (int64_t j = 0; j < N; ++j, logits += kPanel<W>) {
      F mass = exp2_of_negative(load<W>(logits) - top) * 0x1p32f;
      // Adding 2^23 rounds to an integer; from 2^23 on every float is one.
      mass = mass < 0x1p23f ? (mass + 0x1p23f) - 0x1p23f : mass;
      mass = top == top ? mass : F{};
      store<W>(logits, mass);
      sums.add(mass);
    }
    sums.store_to(total);
  }

  // Sums up, for each of W lanes, the masses that are at most its limit.
  template <int W>
  KANDINSKY_INLINE void sum_up_to(const float* masses, const float* limit, double* sum) const {
    using F = typename Lanes<W>::F;
    const F most = load<W>(limit);
    Sums<W> sums;
    for (int64_t j = 0; j < N; ++j, masses += kPanel<W>) {
      const F mass = load<W>(masses);
      sums.add(mass <= most ? mass : F{});
    }
    sums.store_to(sum);
  }

  // What W lanes keep: the masses above `least`, and those equal to it but for the first `skip`.
  template <int W>
  struct Verdict {
    alignas(64) float least[W];
    alignas(64) int32_t skip[W];
  };

  // Bisects the bits of the limit, because positive floats are ordered like their bit patterns.
  template <int W>
  KANDINSKY_INLINE Verdict<W> judge(const float* masses, const double* total) const {
    Verdict<W> verdict;
    double sum[W];
    float limit[W];
    int32_t least[W];
    for (int lane = 0; lane < W; ++lane) least[lane] = bits<int32_t>(1.0f);
    for (int32_t bit = 1 << 28; bit; bit >>= 1) {  // 2^32 has the pattern of 1 plus 2^28
      for (int lane = 0; lane < W; ++lane) limit[lane] = bits<float>(least[lane] + bit - 1);
      sum_up_to<W>(masses, limit, sum);
      for (int lane = 0; lane < W; ++lane) least[lane] += sum[lane] < drop * total[lane] ? bit : 0;
    }
    for (int lane = 0; lane < W; ++lane) limit[lane] = bits<float>(least[lane] - 1);
    sum_up_to<W>(masses, limit, sum);
    for (int lane = 0; lane < W; ++lane) {
      const double target = drop * total[lane], mass = bits<float>(least[lane]);
      verdict.least[lane] = target > 0 ? float(mass) : 0.0f;
      verdict.skip[lane] = 0;
      while (stable && sum[lane] + (verdict.skip[lane] + 1) * mass < target) ++verdict.skip[lane];
    }
    return verdict;
  }

  // Packs the choice of the first `count` of W lanes. Their rows of `packed` are `words` apart.
  template <int W>
  KANDINSKY_INLINE void pack(const float* masses, const Verdict<W>& verdict, int64_t count,
                             int32_t* packed) const {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const F least = load<W>(verdict.least);
    I skip = bits<I>(verdict.skip), kept{};
    for (int64_t j = 0; j < N; ++j, masses += kPanel<W>) {
      const F mass = load<W>(masses);
      const I skipped = (mass == least) & (skip > 0);
      skip += skipped;  // true is -1
      kept |= (mass >= least) & ~skipped & int32_t(1u << j % 32);
      if (j % 32 < 31 && j + 1 < N) continue;
      for (int64_t lane = 0; lane < count; ++lane) packed[lane * words + j / 32] = kept[lane];
      kept = I{};
    }
  }

  // Adds the blocks around block `row` of the grid.
  KANDINSKY_INLINE void add_window(int64_t row, int32_t* packed) const {
    const int64_t at[3] = {row / (tiles[1] * tiles[2]), row / tiles[2] % tiles[1], row % tiles[2]};
    int64_t first[3], last[3];
    for (int i = 0; i < 3; ++i) {
      first[i] = std::max<int64_t>(0, at[i] - window[i] / 2);
      last[i] = std::min(tiles[i] - 1, at[i] + window[i] / 2);
    }
    for (int64_t t = first[0]; t <= last[0]; ++t)
      for (int64_t y = first[1]; y <= last[1]; ++y)
        for (int64_t x = first[2]; x <= last[2]; ++x) {
          const int64_t j = (t * tiles[1] + y) * tiles[2] + x;
          packed[j / 32] |= int32_t(1u << j % 32);
        }
  }

  // Chooses for the rows [row, row + count) of head `head`, at most a panel of them.
  template <int W>
  KANDINSKY_INLINE void select(int64_t head, int64_t row, int64_t count, float* memory) const {
    constexpr int P = kPanel<W>;
    float *panel = memory, *maximum = panel + D * P, *masses = maximum + P;
    const float factor = std::numbers::log2e_v<float> / std::sqrt(float(D));
    transpose<W>(query + head / H * batch_stride + head % H * head_stride + row * row_stride,
                 row_stride, count, D, panel, P);
    for (int64_t i = 0; i < D * P; ++i) panel[i] *= factor;
    score<W>(panel, key + head * N * D, masses, maximum);
    int32_t* packed = selection + (head * N + row) * words;
    for (int64_t lane = 0; lane < count; lane += W) {
      double total[W];
      weigh<W>(masses + lane, maximum + lane, total);
      pack<W>(masses + lane, judge<W>(masses + lane, total), std::min<int64_t>(W, count - lane),
              packed + lane * words);
    }
    for (int64_t i = 0; i < count && !tiles.empty(); ++i) add_window(row + i, packed + i * words);
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    Scratch memory((D + 1 + N) * kPanel<W>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / chunks(), first = task % chunks() * kTaskRows,
                    last = std::min(N, first + kTaskRows);
      for (int64_t row = first; row < last; row += kPanel<W>)
        select<W>(head, row, std::min<int64_t>(kPanel<W>, last - row), memory.floats());
    }
  }
};

Tensor select_blocks(const Tensor& query_means, const Tensor& key_means, double keep_mass,
                     const std::vector<int64_t>& tiles, const std::vector<int64_t>& window,
                     const std::string& ties) {
  require(query_means.dim() == 4, "query_means must have shape [B, H, N, D], got ",
          shape_of(query_means), ".");
  const int64_t B = query_means.size(0), H = query_means.size(1), N = query_means.size(2),
                D = query_means.size(3);
  require_shape(key_means, "key_means", {B, H, N, D});
  require_rows(query_means, "query_means");
  require_rows(key_means, "key_means");
  require_choice(keep_mass, tiles, window, ties, N);
  require_float(query_means, "query_means");
  require_type(key_means, "key_means", query_means.scalar_type());
  const Tensor selection =
      fresh(query_means, "the selection", {B, H, N, N / 32 + (N % 32 > 0)}, ScalarType::Int);
  if (!selection.numel()) return selection;
  const Tensor query = to_float(query_means), key = gapless(to_float(key_means));
  const Selection kernel{data<float>(query),
                         query.stride(0),
                         query.stride(1),
                         query.stride(2),
                         data<float>(key),
                         mutable_data<int32_t>(selection),
                         H,
                         N,
                         D,
                         (N + 31) / 32,
                         1.0 - keep_mass,
                         ties == "stable",
                         tiles,
                         window};
  parallel_for(B * H * kernel.chunks(), 1,
               [&](int64_t begin, int64_t end) { run_simd(kernel, begin, end); });
  return selection;
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("select_blocks", TORCH_BOX(&kandinsky::select_blocks));
}
