// Products of small matrices: of floats everywhere, of bfloat16 where the CPU has matrix units (AMX).
//
// c [rows, columns] = (add ? c : 0) + a [rows, inner] b [inner, columns], float32 sums. In b stand words of 4 bytes: a
// float, or the bfloat16 of two neighbours along `inner`: [inner/2, columns, 2].
#pragma once
#include <array>
#include <cstdlib>

#include "simd.h"

#if defined(LSERVE_AVX512) && defined(__linux__)
#define LSERVE_AMX __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lserve::cpu {

// Words of 16 rows [width], `stride` apart, become columns [width, ldb] of b.
LSERVE_CLONES static void transpose(const uint32_t* rows, int64_t width, int64_t stride, int64_t ldb, uint32_t* b) {
  for (int64_t d = 0; d < width; ++d)
    for (int64_t i = 0; i < 16; ++i) b[d * ldb + i] = rows[i * stride + d];
}

// ---- floats

// Rows x Parts sums stay in registers, whatever the instruction set calls V.
template <class V, int Rows, int Parts>
LSERVE_INLINE void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t inner, float* c,
                                  int64_t ldc, bool add) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  V acc[Rows][Parts];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Parts; ++v) {
      acc[r][v] = V{};
      if (add) std::memcpy(&acc[r][v], c + r * ldc + v * lanes, sizeof(V));
    }
#pragma GCC unroll 4
  for (int64_t k = 0; k < inner; ++k)
    for (int v = 0; v < Parts; ++v) {
      V x;
      std::memcpy(&x, b + k * ldb + v * lanes, sizeof(V));
      for (int r = 0; r < Rows; ++r) acc[r][v] += x * a[r * lda + k];
    }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Parts; ++v) std::memcpy(c + r * ldc + v * lanes, &acc[r][v], sizeof(V));
}

template <class V, int Rows>
LSERVE_INLINE void multiply_blocks(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                                   int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  int64_t n = 0;  // in the outer loop: a strip of b stays in the first cache
  for (; n + 2 * lanes <= columns; n += 2 * lanes)
    for (int64_t r = 0; r < rows; r += Rows)
      multiply_block<V, Rows, 2>(a + r * lda, lda, b + n, ldb, inner, c + r * ldc + n, ldc, add);
  for (; n < columns; n += lanes)
    for (int64_t r = 0; r < rows; r += Rows)
      multiply_block<V, Rows, 1>(a + r * lda, lda, b + n, ldb, inner, c + r * ldc + n, ldc, add);
}

LSERVE_CLONES static void multiply_16(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                                      int64_t ldb, float* c, int64_t ldc, bool add) {
  multiply_blocks<floats, 4>(rows, columns, inner, a, lda, b, ldb, c, ldc, add);  // 8 sums of 16 registers
}
#ifdef LSERVE_AVX512
LSERVE_AVX512 inline void multiply_32(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                                      int64_t ldb, float* c, int64_t ldc, bool add) {
  multiply_blocks<wide_floats, 8>(rows, columns, inner, a, lda, b, ldb, c, ldc, add);  // 16 sums of 32 registers
}
#endif

// Rows a multiple of 8, columns of 16. Every sum is one chain along `inner`: the same bits on every instruction set with
// fused multiply and add.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
#ifdef LSERVE_AVX512
  if (has_avx512()) return multiply_32(rows, columns, inner, a, lda, b, ldb, c, ldc, add);
#endif
  multiply_16(rows, columns, inner, a, lda, b, ldb, c, ldc, add);
}

// What a thread needs while it multiplies operands E.
template <class E>
struct Units {};

// ---- bfloat16 on matrix units: tiles of 16 rows of 64 bytes

#ifdef LSERVE_AMX

// Whether the CPU has them and Linux lends them to this process. LSERVE_AMX=0 in the environment: do without.
inline bool has_amx() {
  static const bool has = [] {
    const char* wanted = std::getenv("LSERVE_AMX");
    if (wanted && std::strcmp(wanted, "0") == 0) return false;
    if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-bf16")) return false;
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return has;
}

// Sets up this thread's tiles, and puts back what was there: other libraries remember what they have set.
template <>
class Units<bf16> {
 public:
  LSERVE_AMX Units() {
    if (!has_amx()) return;
    _tile_storeconfig(before_.data());
    static const Config config;  // in memory for good: GCC's intrinsic claims to read only 8 bytes of it
    _tile_loadconfig(&config);
  }
  LSERVE_AMX ~Units() {
    if (has_amx()) _tile_loadconfig(before_.data());
  }
  Units(const Units&) = delete;
  Units& operator=(const Units&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  alignas(64) std::array<uint8_t, sizeof(Config)> before_{};
};

// 16 Rows x 16 Columns sums stay in tiles 0 to 3; 4 and 5 take a, 6 and 7 take b.
template <int Rows, int Columns>
LSERVE_AMX inline void multiply_tiles(int64_t inner, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                                      int64_t ldc, bool add) {
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (Columns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (Rows > 1) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if constexpr (Rows > 1 && Columns > 1) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  }
  for (int64_t k = 0; k < inner; k += 32) {
    const bf16* b_row = b + k * ldb;  // k / 2 rows of ldb pairs
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Rows > 1) {
      _tile_loadd(5, a + 16 * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (Columns > 1) {
      _tile_loadd(7, b_row + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (Rows > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (Columns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (Rows > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// Rows and columns multiples of 16, inner of 32; ldb in pairs. Within the life of a Units of this thread.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const bf16* a, int64_t lda, const bf16* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
  for (int64_t r = 0; r < rows; r += 32)
    for (int64_t n = 0; n < columns; n += 32) {
      const bf16 *a_part = a + r * lda, *b_part = b + n * 2;
      float* c_part = c + r * ldc + n;
      const bool tall = r + 32 <= rows, wide = n + 32 <= columns;
      if (tall && wide) multiply_tiles<2, 2>(inner, a_part, lda, b_part, ldb, c_part, ldc, add);
      else if (tall) multiply_tiles<2, 1>(inner, a_part, lda, b_part, ldb, c_part, ldc, add);
      else if (wide) multiply_tiles<1, 2>(inner, a_part, lda, b_part, ldb, c_part, ldc, add);
      else multiply_tiles<1, 1>(inner, a_part, lda, b_part, ldb, c_part, ldc, add);
    }
}

// A row [width] to the nearest bfloat16, ties to even.
LSERVE_AMX inline void round_row(const float* from, int64_t width, bf16* to) {
  for (int64_t j = 0; j < width; j += 16) {
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + j));
    std::memcpy(to + j, &x, sizeof(x));
  }
}

#endif  // LSERVE_AMX

}  // namespace lserve::cpu
