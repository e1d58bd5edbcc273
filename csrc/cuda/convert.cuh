// From the dtypes of tensors to float32, in which all arithmetic is done, and back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quant.h"

namespace lserve::cuda {

// N neighbouring elements, moved by one load or store.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
// 16 bytes of global memory that no thread of the kernel writes, by a pointer of which the compiler cannot tell as much.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_global(const T* p) {
  static_assert(sizeof(Vector<T, N>) == sizeof(uint4));
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
  Vector<T, N> x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& x) {
  *reinterpret_cast<Vector<T, N>*>(p) = x;
}

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

// Both elements of a pair.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    return __half22float2(pair);
  } else {
    __nv_bfloat162 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    return __bfloat1622float2(pair);
  }
}

// Byte i of a word of INT8 codes, exactly: 2^23 + code has the code in its lowest bits.
__device__ __forceinline__ float code_value(uint32_t codes, int i) {
  return __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440 + i)) - 8388608.0f;
}

// Bytes i and j of a word of INT8 codes as a pair of T, exactly. 1024 + code has the code in the lowest bits of a float16,
// which converts two at a time.
template <typename T>
__device__ __forceinline__ uint32_t code_pair(uint32_t codes, int i, int j) {
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t bits = __byte_perm(codes, 0x64646464u, 0x4040 + i + 256 * j);
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    pair = __hsub2(pair, __float2half2_rn(1024.0f));
    uint32_t exact;
    memcpy(&exact, &pair, sizeof(exact));
    return exact;
  } else {
    return pack<T>(code_value(codes, i), code_value(codes, j));
  }
}

// x / 255 for an x of 16 bits, to the bit and without a division: quant.h's step of a grid of such.
__device__ __forceinline__ float divided_by_255(float x) {
  const float quotient = x * (1.0f / 255), rest = fmaf(quotient, -255.0f, x);
  return rest == rest ? fmaf(rest, 1.0f / 255, quotient) : quotient;  // no number is left of what is infinite
}
__device__ __forceinline__ float narrow_step(float min, float max) { return divided_by_255(max) - divided_by_255(min); }

// quant.h's step of a grid whose ends are of type T.
template <typename T>
__device__ __forceinline__ float step_of(float min, float max) {
  return sizeof(T) == 2 ? narrow_step(min, max) : quant_step(min, max);
}

// quant.h's quantize, to the bit and without a division a number: all numbers of a grid are divided by the same step.
// Both sides of the quotient are scaled by a power of two that makes the step a normal number. With the rounded reciprocal,
// two corrections by what is left of the number round as a division does (Markstein, 1990).
struct Quantizer {
  float half_min, scale, width, reciprocal;  // width: half a step, scaled

  Quantizer() = default;
  __device__ __forceinline__ Quantizer(float min, float step) : half_min(min * 0.5f) {
    const bool some = step > 0.0f && step <= FLT_MAX;  // else all codes are 0
    const uint32_t exponent = __float_as_uint(step) & 0x7f800000u;
    scale = some ? __uint_as_float((254u << 23) - exponent) : 0.0f;  // 2^127 for what is not normal
    width = some ? step * scale * 0.5f : 0.0f;
    reciprocal = some ? 1.0f / width : 0.0f;
  }

  __device__ __forceinline__ uint8_t operator()(float x) const {
    const float number = fminf(fmaxf(fmaf(x, 0.5f, -half_min) * scale, 0.0f), 255.0f * width);  // 0 where it is none
    float quotient = number * reciprocal;
#pragma unroll
    for (int i = 0; i < 2; ++i) quotient = fmaf(fmaf(-quotient, width, number), reciprocal, quotient);
    return static_cast<uint8_t>(__float_as_uint(quotient + 8388608.0f));  // halves to even, as 2^23 has no room for them
  }
};

}  // namespace lserve::cuda
