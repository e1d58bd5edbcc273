// PyTorch's current CUDA stream, from a library that does not link libtorch_cuda: one wheel serves every torch.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace lserve::cuda {

// A cudaStream_t. Throws where torch is a build without CUDA.
inline void* current_stream(int32_t device) {
  using Lookup = int32_t (*)(int32_t device, void** stream);  // 0: success
  static const Lookup lookup = [] {
    // torch has loaded its library already, but not into the global scope, where a plain dlsym would find it.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!lookup) throw std::runtime_error("lserve_ext: this build of torch has no CUDA");
  void* stream = nullptr;
  if (lookup(device, &stream) != 0) throw std::runtime_error("lserve_ext: torch has no current CUDA stream");
  return stream;
}

}  // namespace lserve::cuda
