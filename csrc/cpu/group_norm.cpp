// SPDX-License-Identifier: Apache-2.0
// group_moments and group_norm_silu of the video VAE on the CPU, channels-last. Both are bound by
// memory: the first reads its input once, the second reads it once and writes its padded output
// once, borders included.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <optional>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "panel.h"
#include "simd.h"

namespace kandinsky {
namespace {

// A slab is some rows of a frame, and one task of group_moments. A frame is cut into slabs by its
// own size alone, so that the number of threads cannot change its sums.
constexpr int64_t kSlabElements = 1 << 16;  // that a slab has at least
constexpr int64_t kSlabs = 32;              // of a frame, at most
// Pixels that are summed in fp32 before they join the fp64 sums of their channels.
constexpr int64_t kPixels = 16;
// Pixels of a frame's first row whose mean is the pivot: an outlier alone must not become it.
constexpr int64_t kPivotPixels = 64;
// With fewer pixels, the roundings of fp32 sums do not cancel out, and fp64 sums are quick.
constexpr int64_t kFewPixels = 256;

template <class Kernel>
void run_parallel(const Kernel& kernel, int64_t units, int64_t elements_per_unit) {
  const int64_t grain =
      std::max<int64_t>(1, kSlabElements / std::max<int64_t>(1, elements_per_unit));
  parallel_for(units, grain, [&](int64_t begin, int64_t end) { run_simd(kernel, begin, end); });
}

// A tensor [B, T, Y, X, C] whose pixels of C numbers are contiguous.
template <class T>
struct Video {
  T* base;
  int64_t T_, batch, frame, row, pixel;

  explicit Video(const Tensor& t)
      : base(mutable_data<T>(t)),
        T_(t.size(1)),
        batch(t.stride(0)),
        frame(t.stride(1)),
        row(t.stride(2)),
        pixel(t.stride(3)) {}
  KANDINSKY_INLINE T* at(int64_t b, int64_t t, int64_t y) const {
    return base + b * batch + t * frame + y * row;
  }
};

template <int W>
struct Doubles {
  typedef double D __attribute__((vector_size(8 * W)));
};

// The sums of x - pivot and of its square for every channel: in fp32 over kPixels pixels, from
// there on in fp64. The pivot is a mean of pixels of the frame, near the frame's mean, so that
// little cancels when the variance is computed. Sums whose squares leave fp32 are computed again in
// fp64.
template <class T>
struct FrameSums {
  Video<T> x;
  float* pivot;  // [frames, C]
  double* sums;  // [frames, slabs, 2, C]
  int64_t Y, X, C, slabs, rows;

  void choose_pivot(int64_t frame) const {
    const T* p = x.at(frame / x.T_, frame % x.T_, 0);
    const int64_t count = std::min(X, kPivotPixels);
    float* mean = pivot + frame * C;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < C; ++c) mean[c] += float(p[i * x.pixel + c]) / float(count);
    for (int64_t c = 0; c < C; ++c) mean[c] = std::isfinite(mean[c]) ? mean[c] : 0.0f;
  }

  // Pixels come one after the other as they lie in memory: two at once, whose lines alternate, came
  // at half the speed (8 of 17 GB/s).
  template <int V>
  KANDINSKY_INLINE void add(const T* p, const float* about, float* first, float* second) const {
    const auto d = load<V>(p) - load<V>(about);
    store<V>(first, load<V>(first) + d);
    store<V>(second, load<V>(second) + d * d);
  }

  template <int V>
  KANDINSKY_INLINE void add_pixels(const T* p, int64_t count, const float* about, float* first,
                                   double* sums_of_slab) const {
    const int64_t channels = C, step = x.pixel;
    float* second = first + channels;
    std::fill(first, second + channels, 0.0f);
    for (int64_t i = 0; i < count; ++i, p += step) {
      int64_t c = 0;
      for (; c + V <= channels; c += V) add<V>(p + c, about + c, first + c, second + c);
      for (; c < channels; ++c) add<1>(p + c, about + c, first + c, second + c);
    }
    for (int64_t i = 0; i < 2 * channels; ++i) sums_of_slab[i] += first[i];
  }

  // Adds X pixels to the sums of channels [from, to), in fp64.
  KANDINSKY_INLINE void add_wide(const T* p, int64_t from, int64_t to, const float* about,
                                 double* first, double* second) const {
    for (int64_t i = 0; i < X; ++i, p += x.pixel) {
      for (int64_t c = from; c < to; ++c) {
        const double d = double(float(p[c])) - about[c];
        first[c] += d;
        second[c] += d * d;
      }
    }
  }

  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    const bool few = Y * X < kFewPixels;
    Scratch memory(2 * C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t frame = unit / slabs, start = unit % slabs * rows,
                    stop = std::min(Y, start + rows);
      const float* about = pivot + frame * C;
      double *first = sums + unit * 2 * C, *second = first + C;
      const auto row = [&](int64_t y) __attribute__((always_inline)) {
        return x.at(frame / x.T_, frame % x.T_, y);
      };
      std::fill(first, first + 2 * C, 0.0);
      for (int64_t y = start; y < stop; ++y) {
        for (int64_t i = 0; i < X && !few; i += kPixels)
          add_pixels<W>(row(y) + i * x.pixel, std::min(kPixels, X - i), about, memory.floats(),
                        first);
        if (few) add_wide(row(y), 0, C, about, first, second);
      }
      for (int64_t c = 0; c < C; ++c) {
        if (std::isfinite(second[c])) continue;
        first[c] = second[c] = 0;
        for (int64_t y = start; y < stop; ++y) add_wide(row(y), c, c + 1, about, first, second);
      }
    }
  }
};

// Turns the sums of a frame's slabs, added in order, into the mean and variance of its G groups.
// `count` is the number of pixels of a frame.
void join(const double* sums, const float* pivot, int64_t slabs, int64_t C, int64_t G, double count,
          double* moments) {
  std::vector<double> mean = zeros<double>(C), spread = zeros<double>(C);
  for (int64_t slab = 0; slab < slabs; ++slab)
    for (int64_t c = 0; c < C; ++c)
      mean[c] += sums[2 * slab * C + c], spread[c] += sums[(2 * slab + 1) * C + c];
  for (int64_t c = 0; c < C; ++c) {
    mean[c] /= count;
    spread[c] = std::max(spread[c] / count - mean[c] * mean[c], std::isnan(mean[c]) ? NAN : 0.0);
    mean[c] += pivot[c];
  }
  const int64_t width = C / G;
  for (int64_t g = 0; g < G; ++g) {
    double middle = 0, variance = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) middle += mean[c];
    middle /= double(width);
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      variance += spread[c] + (mean[c] - middle) * (mean[c] - middle);
    moments[2 * g] = middle;
    moments[2 * g + 1] = variance / double(width);
  }
}

Tensor group_moments(const Tensor& x, int64_t groups) {
  require(x.dim() == 5, "x must have shape [B, T, Y, X, C], got ", shape_of(x), ".");
  require_rows(x, "x");
  const int64_t B = x.size(0), T = x.size(1), Y = x.size(2), X = x.size(3), C = x.size(4);
  require(groups > 0 && C % groups == 0, "groups must divide the ", C, " channels of x, got ",
          groups, ".");
  require_float(x, "x");
  const Tensor moments = fresh(x, "the moments", {B, T, groups, 2}, ScalarType::Double);
  if (!moments.numel()) return moments;
  if (!x.numel()) {  // the mean of nothing
    std::fill_n(mutable_data<double>(moments), moments.numel(), double(NAN));
    return moments;
  }
  const int64_t rows = std::max<int64_t>(
      {1, (Y + kSlabs - 1) / kSlabs, kSlabElements / std::max<int64_t>(1, X * C)});
  const int64_t slabs = (Y + rows - 1) / rows;
  std::vector<float> pivot = zeros<float>(B * T * C);
  std::vector<double> sums = zeros<double>(B * T * slabs * 2 * C);
  dispatch_float(x, "x", [&](auto type) {
    using E = decltype(type);
    const FrameSums<E> kernel{Video<E>(x), pivot.data(), sums.data(), Y, X, C, slabs, rows};
    for (int64_t frame = 0; frame < B * T && X * Y > 0; ++frame) kernel.choose_pivot(frame);
    run_parallel(kernel, B * T * slabs, rows * X * C);
  });
  for (int64_t frame = 0; frame < B * T; ++frame)
    join(sums.data() + frame * slabs * 2 * C, pivot.data() + frame * C, slabs, C, groups,
         double(Y * X), mutable_data<double>(moments) + frame * groups * 2);
  return moments;
}

// x * sigmoid(x), by the exponential of -|x| alone, which cannot overflow.
template <class F>
KANDINSKY_INLINE F silu_of(const F& x) {
  const F small = exp2_of_negative((x < 0.0f ? x : -x) * std::numbers::log2e_v<float>);
  return x * (x < 0.0f ? small : F{} + 1.0f) / (1.0f + small);
}

template <class T, bool kSilu>
struct GroupNormSilu {
  Video<T> x, front;           // front: [B, 2, Y + 2, X + 2, C], read where `before` is 2
  T* out;                      // [B, T + 2 pad, Y + 2 pad, X + 2 pad, C]
  const float *scale, *shift;  // [B, C]
  int64_t before, Y, X, C, pad;

  template <int V>
  static KANDINSKY_INLINE void apply(const T* from, const float* by, const float* plus, T* to) {
    const auto y = load<V>(from) * load<V>(by) + load<V>(plus);
    if constexpr (kSilu)
      store<V>(to, silu_of(y));
    else
      store<V>(to, y);
  }

  // Writes one row of pixels, with its left and right border.
  template <int W>
  KANDINSKY_INLINE void norm_row(const T* from, const float* by, const float* plus, T* to) const {
    // Copies of members, because the compiler must assume that a store changes members.
    const int64_t channels = C, step = x.pixel;
    T* q = to + pad * channels;
    for (int64_t i = X; i > 0; --i, from += step, q += channels) {
      int64_t c = 0;
      for (; c + W <= channels; c += W) apply<W>(from + c, by + c, plus + c, q + c);
      for (; c < channels; ++c) apply<1>(from + c, by + c, plus + c, q + c);
    }
    if (!pad) return;
    std::memcpy(to, to + C, C * sizeof(T));
    std::memcpy(to + (X + 1) * C, to + X * C, C * sizeof(T));
  }

  KANDINSKY_INLINE void copy_row(int64_t b, int64_t t, int64_t y, T* to) const {
    const T* from = front.at(b, t, y);
    if (front.pixel == C) return void(std::memcpy(to, from, (X + 2) * C * sizeof(T)));
    for (int64_t i = 0; i < X + 2; ++i)
      std::memcpy(to + i * C, from + i * front.pixel, C * sizeof(T));
  }

  // A unit is a row of a frame of `front`, or of x. The first and last rows also write the rows and
  // frames that repeat them.
  template <int W>
  KANDINSKY_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t row = (X + 2 * pad) * C, frame = (Y + 2 * pad) * row, frames = x.T_ + before;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t y = unit % Y, t = unit / Y % frames, b = unit / Y / frames;
      T* to = out + (b * (x.T_ + 2 * pad) + t + 2 * pad - before) * frame + (y + pad) * row;
      if (t < before) {
        copy_row(b, t, y + 1, to);
        if (y == 0) copy_row(b, t, 0, to - row);
        if (y == Y - 1) copy_row(b, t, Y + 1, to + row);
        continue;
      }
      norm_row<W>(x.at(b, t - before, y), scale + b * C, shift + b * C, to);
      if (!pad) continue;
      const int64_t above = y == 0, below = y == Y - 1;
      for (int64_t i = -above; i <= below; ++i)
        for (int64_t back = 0; back <= (t == 0 ? 2 : 0); ++back)
          if (i || back) std::memcpy(to + i * row - back * frame, to, row * sizeof(T));
    }
  }
};

Tensor group_norm_silu(const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const std::optional<Tensor>& front, bool pad, bool silu) {
  require(x.dim() == 5, "x must have shape [B, T, Y, X, C], got ", shape_of(x), ".");
  require_rows(x, "x");
  const int64_t B = x.size(0), T = x.size(1), Y = x.size(2), X = x.size(3), C = x.size(4),
                edge = pad ? 2 : 0;
  require(!pad || (Y > 0 && X > 0 && (T > 0 || front)), "x must have a pixel to repeat, got ",
          shape_of(x), "; give pad=False.");
  if (front) {
    require(pad, "front must come with pad.");
    require_shape(*front, "front", {B, 2, Y + 2, X + 2, C});
    require_type(*front, "front", x.scalar_type());
    require_rows(*front, "front");
  }
  require_float(x, "x");
  require_vector(scale, "scale", {B, C});
  require_vector(shift, "shift", {B, C});
  require(std::max({T, Y, X}) <= std::numeric_limits<int64_t>::max() - edge,
          "x must leave room for its borders, got ", shape_of(x), ".");
  Tensor out = fresh(x, "the result", {B, T + edge, Y + edge, X + edge, C});
  if (!out.numel()) return out;
  const Tensor wide_scale = gapless(to_float(scale)), wide_shift = gapless(to_float(shift));
  dispatch_float(x, "x", [&](auto type) {
    using E = decltype(type);
    const int64_t before = front ? 2 : 0;
    const auto run = [&](auto with_silu) {
      run_parallel(
          GroupNormSilu<E, with_silu>{Video<E>(x), Video<E>(front ? *front : x),
                                      mutable_data<E>(out), data<float>(wide_scale),
                                      data<float>(wide_shift), before, Y, X, C, pad ? 1 : 0},
          B * (T + before) * Y, X * C);
    };
    silu ? run(std::true_type()) : run(std::false_type());
  });
  return out;
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CPU, library) {
  library.impl("group_moments", TORCH_BOX(&kandinsky::group_moments));
  library.impl("group_norm_silu", TORCH_BOX(&kandinsky::group_norm_silu));
}
