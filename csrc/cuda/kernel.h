// The kernels of the CUDA object by name. Where a source is compiled by itself, by NVRTC or for the host, names need no table.
#pragma once

#ifdef ADVKD_CUDA_OBJECT
namespace advkd {

// A link of the list of all kernels.
struct Kernel {
  const char* name;
  const void* function;
  const Kernel* before;
  static const Kernel* last;

  Kernel(const char* name, const void* function) : name(name), function(function), before(last) { last = this; }
};

}  // namespace advkd

#define ADVKD_KERNEL(NAME) static const ::advkd::Kernel kernel_##NAME(#NAME, reinterpret_cast<const void*>(NAME));
#else
#define ADVKD_KERNEL(NAME)
#endif
