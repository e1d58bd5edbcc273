// What is compiled for the host and for the device alike.
#pragma once

#ifdef __CUDACC__
#define LSERVE_HD __host__ __device__ __forceinline__
#else
#define LSERVE_HD inline __attribute__((always_inline))
#endif
