// SPDX-License-Identifier: Apache-2.0
// Operators without tensors: they describe the build and choose the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <string>

#include "cpu/simd.h"

namespace kandinsky {
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

// The oldest PyTorch that the library runs on.
std::string stable_abi() {
  constexpr std::uint64_t version = TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

// One line of "name: value" for each of compiler, torch, stable_abi, simd and cuda.
std::string build_info() {
#if defined(__x86_64__)
  const std::string levels = "scalar avx2 avx512";
#else
  const std::string levels = "scalar";
#endif
  return "compiler: " + compiler() + "\ntorch: " TORCH_VERSION "\nstable_abi: " + stable_abi() +
         "\nsimd: " + levels + "\ncuda: " + (KANDINSKY_WITH_CUDA ? "with" : "without");
}

std::string simd_in_use() { return simd_level(); }

void set_simd(const std::string& name) { set_simd_level(name.c_str()); }

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_FRAGMENT(kandinsky_kernels, library) {
  library.def("build_info() -> str");
  library.def("simd() -> str");
  library.def("set_simd(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&kandinsky::build_info));
  library.impl("simd", TORCH_BOX(&kandinsky::simd_in_use));
  library.impl("set_simd", TORCH_BOX(&kandinsky::set_simd));
}
