// SPDX-License-Identifier: Apache-2.0
// What every CPU kernel needs from its caller's tensors: checks of what would corrupt memory,
// allocations that explain themselves where memory is short, and dispatch over the float types.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iomanip>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kandinsky {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The library knows no Python, and torch 2.15 makes a RuntimeError of every exception. So each
// sentence begins with the name of Python's error, which _library.py reads and takes off.
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Error>
constexpr const char* kPython = "ValueError: ";
template <>
inline constexpr const char* kPython<WrongType> = "TypeError: ";
template <>
inline constexpr const char* kPython<OutOfMemory> = "OutOfMemoryError: ";

// Throws one sentence, made of the arguments.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  sentence << kPython<Error>;
  (sentence << ... << parts);
  throw Error(sentence.str());
}

// Throws one sentence, a ValueError in Python, unless the condition holds.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail<std::invalid_argument>(parts...);
}

// The dtype as Python spells it.
inline std::string type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    default:
      return torch::headeronly::toString(type);
  }
}

// The number as Python spells it.
inline std::string shown(double number) {
  if (std::isnan(number)) return "nan";  // a NaN with a sign, too
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.begin(), digits.end(), number).ptr;
  const std::string text(digits.begin(), end);
  return text + (text.find_first_not_of("-0123456789") == std::string::npos ? ".0" : "");
}

inline std::string list_of(const std::vector<int64_t>& numbers) {
  std::string text;
  for (int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return list_of(sizes);
}

inline void require_shape(const Tensor& tensor, const char* name,
                          const std::vector<int64_t>& wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == wanted[i];
  if (same) return;
  require(false, name, " must have shape ", list_of(wanted), ", got ", shape_of(tensor), ".");
}

inline void require_type(const Tensor& tensor, const char* name, ScalarType wanted) {
  if (tensor.scalar_type() != wanted)
    fail<WrongType>(name, " must be ", type_name(wanted), ", got ", type_name(tensor.scalar_type()),
                    "; cast it first.");
}

// The kernels take the three narrower float types; float64 belongs to the references.
inline void require_float(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
    fail<WrongType>(name, " must be float32, bfloat16 or float16, got ", type_name(type),
                    "; cast it first.");
}

// Requires the form of block_offsets. What their values must be depends on the operator.
inline void require_list(const Tensor& offsets) {
  require(offsets.dim() == 1 && offsets.numel() > 0, "block_offsets must have shape [N + 1], got ",
          shape_of(offsets), ".");
  require_type(offsets, "block_offsets", ScalarType::Int);
  require(offsets.is_contiguous(), "block_offsets must be contiguous; call .contiguous() first.");
}

// The last dimension must be contiguous, because kernels read whole rows; other strides are free.
inline void require_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  require(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
          " must be contiguous in its last dimension; call .contiguous() first.");
}

constexpr double kLargest = std::numeric_limits<float>::max();  // kernels compute in fp32

// Requires what a norm adds to a variance.
inline void require_epsilon(double eps) {
  require(eps >= 0.0 && eps <= kLargest, "eps must be from 0 on and finite in float32, got ",
          shown(eps), "; 1e-6 is usual.");
}

// Requires the factor of logits.
inline void require_scale(double scale) {
  require(std::abs(scale) <= kLargest, "scale must be finite in float32, got ", shown(scale),
          "; leave it out for 1 / sqrt(D).");
}

// Requires the arguments of select_blocks that are not tensors. N is divided by one size of the
// grid after the other, because their product could overflow.
inline void require_choice(double keep_mass, const std::vector<int64_t>& tiles,
                           const std::vector<int64_t>& window, const std::string& ties, int64_t N) {
  require(keep_mass > 0.0 && keep_mass <= 1.0, "keep_mass must be in (0, 1], got ",
          shown(keep_mass), ".");
  require(ties == "all" || ties == "stable", "ties must be \"all\" or \"stable\", got \"", ties,
          "\".");
  if (tiles.empty() && window.empty()) return;
  bool fit = tiles.size() == 3 && window.size() == 3;
  int64_t rest = N;
  for (size_t i = 0; fit && i < 3; ++i) {
    fit = tiles[i] > 0 && rest % tiles[i] == 0 && window[i] > 0;
    if (fit) rest /= tiles[i];
  }
  require(fit && rest == 1, "tiles must be three numbers from 1 on with product N = ", N,
          " and window three widths from 1 on, got ", list_of(tiles), " and ", list_of(window),
          ".");
}

// Requires a vector that many rows share, such as a scale or a weight.
inline void require_vector(const Tensor& tensor, const char* name,
                           const std::vector<int64_t>& wanted) {
  require_shape(tensor, name, wanted);
  require_float(tensor, name);
  require_rows(tensor, name);
}

// Returns make(), which does nothing but allocate `bytes` for what `name` says. Where that fails,
// one sentence gives the size.
template <class Make>
auto allocate(const std::string& name, double bytes, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {  // torch's own arrive as runtime errors
    fail<OutOfMemory>(name, " needs ", std::fixed, std::setprecision(0), bytes,
                      " bytes of memory, which this machine does not give; compute fewer samples, "
                      "tokens or heads at once.");
  }
}

// The size of a tensor in bytes, as a double, because a product of sizes can overflow.
inline double bytes_of(const std::vector<int64_t>& shape, ScalarType type) {
  const bool eight = type == ScalarType::Double || type == ScalarType::Long;
  const bool two = type == ScalarType::Half || type == ScalarType::BFloat16;
  double bytes = eight ? 8 : two ? 2 : 4;
  for (int64_t size : shape) bytes *= double(size);
  return bytes;
}

// A new tensor without values on the device of `like`, and of its dtype where no other is given.
inline Tensor fresh(const Tensor& like, const char* name, const std::vector<int64_t>& shape,
                    std::optional<ScalarType> type = std::nullopt) {
  return allocate(name, bytes_of(shape, type.value_or(like.scalar_type())),
                  [&] { return torch::stable::new_empty(like, shape, type); });
}

inline Tensor fresh_zeros(const Tensor& like, const char* name, const std::vector<int64_t>& shape,
                          ScalarType type) {
  return allocate(name, bytes_of(shape, type),
                  [&] { return torch::stable::new_zeros(like, shape, type); });
}

// `count` zeros of working memory.
template <class T>
std::vector<T> zeros(int64_t count) {
  return allocate("working memory", double(count) * sizeof(T),
                  [&] { return std::vector<T>(count); });
}

// torch::stable::parallel_for, except that an exception of a task keeps its type.
template <class Body>
void parallel_for(int64_t units, int64_t grain, const Body& body) {
  std::exception_ptr thrown;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!taken.test_and_set()) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The tensor itself where it has the type, otherwise a copy that does.
inline Tensor in_type(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return allocate("a copy in " + type_name(type), bytes_of({tensor.numel()}, type),
                  [&] { return torch::stable::to(tensor, type); });
}

inline Tensor to_float(const Tensor& tensor) { return in_type(tensor, ScalarType::Float); }

// The tensor itself where it is contiguous, otherwise a copy that is.
inline Tensor gapless(const Tensor& tensor) {
  return allocate("a contiguous copy", double(tensor.numel()) * double(tensor.element_size()),
                  [&] { return torch::stable::contiguous(tensor); });
}

// Calls body(T{}) with the C++ type T of the tensor's dtype.
template <class Body>
void dispatch_float(const Tensor& tensor, const char* name, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      require_float(tensor, name);
  }
}

}  // namespace kandinsky
