// SPDX-License-Identifier: Apache-2.0
// What every launcher needs: checks of what would corrupt memory, and dispatch over the float
// types.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kandinsky {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws one sentence made of the arguments; PyTorch shows it as a RuntimeError.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void require_shape(const Tensor& tensor, const char* name,
                          const std::vector<int64_t>& wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == wanted[i];
  if (same) return;
  std::string text;
  for (int64_t size : wanted) text += (text.empty() ? "" : ", ") + std::to_string(size);
  require(false, name, " must have shape [", text, "], got ", shape_of(tensor), ".");
}

inline void require_type(const Tensor& tensor, const char* name, ScalarType wanted) {
  require(tensor.scalar_type() == wanted, name, " must be ", torch::headeronly::toString(wanted),
          ", got ", torch::headeronly::toString(tensor.scalar_type()), "; cast it first.");
}

// The kernels read whole rows: the last dimension must be contiguous, the other strides are free.
inline void require_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  require(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
          " must be contiguous in its last dimension; call .contiguous() first.");
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor to_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor
                                                   : torch::stable::to(tensor, ScalarType::Float);
}

// Calls body(T{}) with the C++ type of a float32, bfloat16 or float16 tensor.
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
      require(false, name, " must be float32, bfloat16 or float16, got ",
              torch::headeronly::toString(tensor.scalar_type()), "; cast it first.");
  }
}

}  // namespace kandinsky
