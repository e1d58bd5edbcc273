// The instructions that CUDA C++ has no name for; sm90/ptx.cuh has those of one architecture. python_tests/twin/cuda has the
// same names and signatures for a CPU, and python_tests/twin/instructions.cu tests the one against the other.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Hands out typed arrays of the block's dynamic shared memory, 128-byte aligned, in the order of the calls.
class SharedMemory {
 public:
  template <typename T>
  __device__ T* take(int count) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    T* array = reinterpret_cast<T*>(dynamic_shared_memory + offset_);
    offset_ += (count * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
    return array;
  }

 private:
  int offset_ = 0;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory in the background; zeros, and nothing is read, where `read` is false.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool read = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(read ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all but the newest `keep` groups.
template <int keep>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(keep) : "memory");
}

// Asks for a line of global memory, so that it lies in the second-level cache when it is read.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p)); }

// Four 8 x 8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8, and gets of matrix i, in r[i], the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements in registers: lane l gives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, and gets
// those of the transposed matrix.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// d [16, 8] += a [16, 16] b [16, 8], T is __half or __nv_bfloat16. With row = lane / 4 and column = 2 (lane % 4), a lane
// holds of d: (row, column), (row, column + 1), then the same of row + 8;
// of a: the pairs at (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8);
// of b: the pairs of neighbouring rows at (column, row) and (column + 8, row).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Every thread of every kernel begins with this. From sm_90 on kernels are launched while the one before them ends (see
// launch.h): this waits until that has ended, and sees what it has written; and from here on the next one may be launched. A
// block that ended without having waited would let the next one begin before the one before has ended.
__device__ __forceinline__ void join_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// log2 x to about 2^-22 of itself or of 1; denormals are zero.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 2^x to about 2 ulp; denormals are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
