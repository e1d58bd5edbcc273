// Sixteen floats at a time, in GCC's and clang's vector extensions: no intrinsics, so one source compiles to
// AVX-512, AVX2, SSE2 or NEON. All arithmetic is float32; storage is converted at load and store.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../kernels.h"

// Compiles a function once per instruction set and picks one when the library is loaded, so that a portable
// wheel is fast everywhere. Only what is inlined into such a function is compiled for its instruction set:
// hence the always_inline below, and no std::function inside. A template needs an explicit instantiation.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define LSERVE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LSERVE_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define LSERVE_CLONES
#endif
#define LSERVE_INLINE inline __attribute__((always_inline))

namespace lserve::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t kMaxD = 256;  // channels of a head

// A register. Compilers take wider vectors apart, and then compare lane by lane and spill accumulators.
#ifdef __x86_64__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = 16 / kLanes;
typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t shorts __attribute__((vector_size(2 * kLanes)));
// For what is bound by arithmetic, within LSERVE_AVX512.
typedef float wide_floats __attribute__((vector_size(64)));
typedef int32_t wide_ints __attribute__((vector_size(64)));
typedef uint32_t wide_words __attribute__((vector_size(64)));
#ifdef LSERVE_AVX512
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("x86-64-v4");
  return has;
}
#endif

template <class F>
constexpr int64_t kLanesOf = sizeof(F) / sizeof(float);
template <class F>
using IntsOf = std::conditional_t<std::is_same_v<F, floats>, ints, wide_ints>;
template <class F>
using WordsOf = std::conditional_t<std::is_same_v<F, floats>, words, wide_words>;

struct f32x16 {
  floats part[kParts];

  f32x16() = default;
  LSERVE_INLINE f32x16(float x) {
    for (floats& p : part) p = floats{} + x;
  }
  LSERVE_INLINE float operator[](int lane) const { return part[lane / kLanes][lane % kLanes]; }
};

// f of every part. It sees `floats`, whose comparisons are masks for ?:, and must be LSERVE_LAMBDA to be inlined.
#define LSERVE_LAMBDA __attribute__((always_inline))
template <class F, class... V>
LSERVE_INLINE f32x16 map(F f, const V&... v) {
  f32x16 y;
  for (int i = 0; i < kParts; ++i) y.part[i] = f(v.part[i]...);
  return y;
}

template <class To, class From>
LSERVE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- conversions: written once, for (float, uint32_t) and for (floats, words)

template <class F, class U>
LSERVE_INLINE F widen_f16(U h) {
  const U bits = (h & 0x7fffu) << 13;  // exponent and mantissa in their float32 places, the exponent not yet rebiased
  const U exponent = bits & (0x7c00u << 13);
  const U normal = bits + (112u << 23);
  const U special = bits + (224u << 23);  // infinity and NaN: on to exponent 255
  const F denormal = bit_cast<F>(bits + (113u << 23)) - 0x1p-14f;
  const U magnitude = exponent == 0u ? bit_cast<U>(denormal) : exponent == (0x7c00u << 13) ? special : normal;
  return bit_cast<F>(magnitude | ((h & 0x8000u) << 16));
}

// The narrowings round to nearest, ties to even, and leave the result in the low 16 bits.
template <class F, class U>
LSERVE_INLINE U narrow_f16(F x) {
  const U bits = bit_cast<U>(x), zero = {};
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U denormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  const U finite = magnitude < (113u << 23) ? denormal : normal;
  const U special = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  return (magnitude >= (143u << 23) ? special : finite) | ((bits >> 16) & 0x8000u);
}

template <class F, class U>
LSERVE_INLINE U narrow_bf16(F x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded;
}

LSERVE_INLINE float to_float(float x) { return x; }
LSERVE_INLINE float to_float(uint8_t x) { return static_cast<float>(x); }
LSERVE_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
LSERVE_INLINE float to_float(f16 x) { return widen_f16<float>(uint32_t{x.bits}); }

template <class T>
LSERVE_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  else if constexpr (std::is_same_v<T, bf16>) return {static_cast<uint16_t>(narrow_bf16<float, uint32_t>(x))};
  else return {static_cast<uint16_t>(narrow_f16<float, uint32_t>(x))};
}

// ---- memory, at any alignment

LSERVE_INLINE uint32_t code(uint8_t x) { return x; }
template <class T>
LSERVE_INLINE uint32_t code(T x) {
  return x.bits;
}

// Lane by lane, which compilers turn into one widening load.
template <class U, class T>
LSERVE_INLINE U widen(const T* p) {
  if constexpr (sizeof(U) == 16) return U{code(p[0]), code(p[1]), code(p[2]), code(p[3])};
  else if constexpr (sizeof(U) == 32)
    return U{code(p[0]), code(p[1]), code(p[2]), code(p[3]), code(p[4]), code(p[5]), code(p[6]), code(p[7])};
  else
    return U{code(p[0]), code(p[1]), code(p[2]),  code(p[3]),  code(p[4]),  code(p[5]),  code(p[6]),  code(p[7]),
             code(p[8]), code(p[9]), code(p[10]), code(p[11]), code(p[12]), code(p[13]), code(p[14]), code(p[15])};
}

// One register: F is floats or wide_floats.
template <class F = floats>
LSERVE_INLINE F load_part(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class F = floats>
LSERVE_INLINE F load_part(const bf16* p) {
  return bit_cast<F>(widen<WordsOf<F>>(p) << 16);
}
template <class F = floats>
LSERVE_INLINE F load_part(const f16* p) {
  return widen_f16<F>(widen<WordsOf<F>>(p));
}
template <class F = floats>
LSERVE_INLINE F load_part(const uint8_t* p) {
  return __builtin_convertvector(bit_cast<IntsOf<F>>(widen<WordsOf<F>>(p)), F);
}

template <class T>
LSERVE_INLINE f32x16 load(const T* p) {
  f32x16 x;
  for (int i = 0; i < kParts; ++i) x.part[i] = load_part(p + i * kLanes);
  return x;
}

template <class T, class Narrow>
LSERVE_INLINE void store_u16(T* p, f32x16 x, Narrow narrow) {
  for (int i = 0; i < kParts; ++i) {
    const shorts s = __builtin_convertvector(narrow(x.part[i]), shorts);
    std::memcpy(p + i * kLanes, &s, sizeof(s));
  }
}

template <class F>
LSERVE_INLINE void store_part(float* p, F x) {
  std::memcpy(p, &x, sizeof(x));
}
LSERVE_INLINE void store_quad(float* p, quad x) { std::memcpy(p, &x, sizeof(x)); }
LSERVE_INLINE void store(float* p, f32x16 x) {
  for (int i = 0; i < kParts; ++i) store_part(p + i * kLanes, x.part[i]);
}
LSERVE_INLINE void store(bf16* p, f32x16 x) {
  store_u16(p, x, [](floats f) LSERVE_LAMBDA { return narrow_bf16<floats, words>(f); });
}
LSERVE_INLINE void store(f16* p, f32x16 x) {
  store_u16(p, x, [](floats f) LSERVE_LAMBDA { return narrow_f16<floats, words>(f); });
}

// ---- arithmetic

LSERVE_INLINE f32x16 splat(float x) { return x; }
LSERVE_INLINE f32x16 operator+(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x + y; }, a, b);
}
LSERVE_INLINE f32x16 operator-(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x - y; }, a, b);
}
LSERVE_INLINE f32x16 operator*(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x * y; }, a, b);
}
LSERVE_INLINE f32x16 operator/(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x / y; }, a, b);
}
// One instruction where there is one for a register.
LSERVE_INLINE f32x16 sqrt(f32x16 x) {
  for (floats& part : x.part)
    for (int i = 0; i < kLanes; ++i) part[i] = __builtin_sqrtf(part[i]);
  return x;
}
LSERVE_INLINE f32x16& operator+=(f32x16& a, f32x16 b) { return a = a + b; }
LSERVE_INLINE f32x16& operator*=(f32x16& a, f32x16 b) { return a = a * b; }

// As the instructions do it: b, if either is NaN.
LSERVE_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x > y ? x : y; }, a, b);
}
LSERVE_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return x < y ? x : y; }, a, b);
}

// As torch.amax and torch.amin do it: NaN, if either is NaN.
template <class F>
LSERVE_INLINE F max_nan(F a, F b) {
  return ((b > a) | (b != b)) ? b : a;
}
template <class F>
LSERVE_INLINE F min_nan(F a, F b) {
  return ((b < a) | (b != b)) ? b : a;
}
LSERVE_INLINE f32x16 max_nan(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return max_nan(x, y); }, a, b);
}
LSERVE_INLINE f32x16 min_nan(f32x16 a, f32x16 b) {
  return map([](floats x, floats y) LSERVE_LAMBDA { return min_nan(x, y); }, a, b);
}

// Folds the upper half of the lanes onto the lower, until one is left: always in this order.
template <class Fold>
LSERVE_INLINE float fold(floats x, Fold f) {
  quad q[kLanes / 4];
  std::memcpy(q, &x, sizeof(q));
  if constexpr (kLanes == 8) q[0] = f(q[0], q[1]);
  const quad pair = f(q[0], quad{q[0][2], q[0][3], q[0][2], q[0][3]});
  return f(pair, quad{pair[1], pair[1], pair[1], pair[1]})[0];
}
template <class Fold>
LSERVE_INLINE float fold(f32x16 x, Fold f) {
  for (int n = kParts / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.part[i] = f(x.part[i], x.part[i + n]);
  return fold(x.part[0], f);
}
LSERVE_INLINE float sum(f32x16 x) {
  return fold(x, [](auto a, auto b) LSERVE_LAMBDA { return a + b; });
}
// Four registers' sums, in the same order.
LSERVE_INLINE quad sums(floats a, floats b, floats c, floats d) {
  const auto half = [](floats x) LSERVE_LAMBDA {
    quad q[kLanes / 4];
    std::memcpy(q, &x, sizeof(q));
    return kLanes == 8 ? q[0] + q[kLanes / 4 - 1] : q[0];
  };
  const auto pair = [](quad x, quad y) LSERVE_LAMBDA {  // x02, y02, x13, y13
    return quad{x[0], y[0], x[1], y[1]} + quad{x[2], y[2], x[3], y[3]};
  };
  const quad ab = pair(half(a), half(b)), cd = pair(half(c), half(d));
  return quad{ab[0], ab[1], cd[0], cd[1]} + quad{ab[2], ab[3], cd[2], cd[3]};
}
#ifdef LSERVE_AVX512
LSERVE_INLINE quad sums(wide_floats a, wide_floats b, wide_floats c, wide_floats d) {
  const auto half = [](wide_floats x) LSERVE_LAMBDA {
    const f32x16 both = bit_cast<f32x16>(x);
    return both.part[0] + both.part[1];
  };
  return sums(half(a), half(b), half(c), half(d));
}
#endif
LSERVE_INLINE float max(f32x16 x) {
  return fold(x, [](auto a, auto b) LSERVE_LAMBDA { return a > b ? a : b; });
}
LSERVE_INLINE float max_nan(f32x16 x) {
  return fold(x, [](auto a, auto b) LSERVE_LAMBDA { return max_nan(a, b); });
}
LSERVE_INLINE float min_nan(f32x16 x) {
  return fold(x, [](auto a, auto b) LSERVE_LAMBDA { return min_nan(a, b); });
}

// e^x to about 1 ulp from -87.3 to 88.3; 0 below and infinity above, NaN at NaN.
LSERVE_INLINE floats exp_part(floats x) {
  const floats low = floats{} - 88.0f, high = floats{} + 89.0f;  // where n is -127 and 128
  x = x < low ? low : x;                                         // a comparison with NaN keeps x
  x = x > high ? high : x;
  const floats shifted = x * 1.44269504f + 0x1.8p23f;  // n = round(x / ln 2), in the low bits
  const floats n = shifted - 0x1.8p23f;
  const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * bit_cast<floats>((bit_cast<words>(shifted) + 127u) << 23);  // 2^n: bits 0 at -127, infinity at 128
}
LSERVE_INLINE f32x16 exp(f32x16 x) {
  return map([](floats p) LSERVE_LAMBDA { return exp_part(p); }, x);
}

// 2^x to about 1 ulp for x up to 127; 0 below -126, NaN at NaN. F, U: floats and words of any width.
template <class F, class U>
LSERVE_INLINE F exp2_part(F x) {
  const F low = F{} - 127.0f;
  x = x < low ? low : x;            // a comparison with NaN keeps x
  const F shifted = x + 0x1.8p23f;  // round(x), in the low bits
  const F r = x - (shifted - 0x1.8p23f);
  F y = r * 1.5353361960e-4f + 1.3398875017e-3f;  // minimax on [-1/2, 1/2], 1 at 0
  y = y * r + 9.6184369177e-3f;
  y = y * r + 5.5503323674e-2f;
  y = y * r + 2.4022647738e-1f;
  y = y * r + 6.9314718246e-1f;
  y = y * r + 1.0f;
  return y * bit_cast<F>((bit_cast<U>(shifted) + 127u) << 23);  // bits 0 at -127
}

// ---- from a Dtype to a type: f is called with a value of it

template <class F>
void dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    default: throw std::runtime_error("lserve_ext: expected float32, bfloat16 or float16");
  }
}

// A pool holds T or codes.
template <class T, class F>
void dispatch_pool(Dtype kv_dtype, F f) {
  if (kv_dtype == Dtype::u8) return f(uint8_t{});
  return f(T{});
}

}  // namespace lserve::cpu
