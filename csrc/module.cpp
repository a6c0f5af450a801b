// SPDX-License-Identifier: Apache-2.0
// The Python module `kandinsky_kernels._C`. Importing it registers every kernel that is linked into
// it. Its functions only describe the build and choose the instruction set.
#include <torch/headeronly/version.h>

#include <cstdint>
#include <exception>
#include <string>

#include "check.h"
#include "cpu/simd.h"

// The oldest PyTorch that the extension runs on. PyTorch 2.11 and 2.12 refuse pybind11 where this
// is defined; the headers above have read it, and pybind11 is no part of PyTorch's interface.
constexpr std::uint64_t kStableAbi = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
  info["stable_abi"] =
      std::to_string(kStableAbi >> 56) + "." + std::to_string((kStableAbi >> 48) & 0xff);
#if defined(__x86_64__)
  info["simd"] = pybind11::make_tuple("scalar", "avx2", "avx512");
#else
  info["simd"] = pybind11::make_tuple("scalar");
#endif
  info["cuda"] = bool(KANDINSKY_WITH_CUDA);
  return info;
}

// Raises the Python exceptions for which C++ has none of its own.
void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const kandinsky::WrongType& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const kandinsky::OutOfMemory& error) {
    const auto type = pybind11::module_::import("torch").attr("OutOfMemoryError");
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of kandinsky_kernels.";
  pybind11::register_exception_translator(&translate);
  module.def("build_info", &build_info,
             "Compiler, torch version, stable ABI floor, SIMD levels and CUDA of this build.");
  module.def(
      "simd", [] { return std::string(kandinsky::simd_level()); },
      "The instruction set in use: scalar, avx2 or avx512.");
  module.def(
      "set_simd", [](const std::string& name) { kandinsky::set_simd_level(name.c_str()); },
      pybind11::arg("name"),
      "Use this instruction set from now on; ValueError when the processor or the build lacks it.");
}
