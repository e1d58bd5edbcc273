// prefill: block-sparse flash attention, a tile of queries against tiles of the keys that it attends.
//
// Keys of a tile are unpacked once to float32 (transposed) and shared by the query heads of the group.
// Both products are then the same small matrix kernel: rows of A broadcast against vectors of B.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../grid.h"
#include "rows.h"
#include "simd.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kQueries = 64, kKeys = 64;  // a tile
constexpr int kRows = 8;                      // of A that one pass over B serves
// Values are summed before they are divided by the sum of weights. Scaled down by a power of two, which changes no bit
// of the result, thousands of the largest values still have a finite sum.
constexpr float kHeadroom = 0x1p-24f;

// Rows x Parts sums stay in registers, whatever the instruction set calls V.
template <class V, int Rows, int Parts>
LSERVE_INLINE void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t inner, float* c,
                                  int64_t ldc, bool add) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  V acc[Rows][Parts] = {};
  for (int r = 0; r < Rows && add; ++r)
    for (int v = 0; v < Parts; ++v) std::memcpy(&acc[r][v], c + r * ldc + v * lanes, sizeof(V));
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
  for (int64_t r = 0; r < rows; r += Rows) {
    int64_t n = 0;
    for (; n + 2 * lanes <= columns; n += 2 * lanes)
      multiply_block<V, Rows, 2>(a + r * lda, lda, b + n, ldb, inner, c + r * ldc + n, ldc, add);
    for (; n < columns; n += lanes) multiply_block<V, Rows, 1>(a + r * lda, lda, b + n, ldb, inner, c + r * ldc + n, ldc, add);
  }
}

LSERVE_CLONES void multiply_16(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                               int64_t ldb, float* c, int64_t ldc, bool add) {
  multiply_blocks<floats, kRows / 2>(rows, columns, inner, a, lda, b, ldb, c, ldc, add);  // 8 sums of 16 registers
}
#ifdef LSERVE_AVX512
LSERVE_AVX512 void multiply_32(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                               int64_t ldb, float* c, int64_t ldc, bool add) {
  typedef float wide __attribute__((vector_size(64)));
  multiply_blocks<wide, kRows>(rows, columns, inner, a, lda, b, ldb, c, ldc, add);  // 16 sums of 32 registers
}
const bool has_avx512 = __builtin_cpu_supports("x86-64-v4");
#endif

// c [rows, columns] = (add ? c : 0) + a [rows, inner] b [inner, columns]; rows a multiple of kRows, columns of 16.
// The one product bound by arithmetic, so it gets the widest registers. Every sum is one chain along `inner`: same bits.
void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
#ifdef LSERVE_AVX512
  if (has_avx512) return multiply_32(rows, columns, inner, a, lda, b, ldb, c, ldc, add);
#endif
  multiply_16(rows, columns, inner, a, lda, b, ldb, c, ldc, add);
}

// The tile's scores become weights in place; max, sum and out [D] of the row follow the new maximum.
LSERVE_CLONES void soften_row(float* s, float* max_row, float* sum_row, float* out, int64_t D) {
  f32x16 high = load(s);
  for (int64_t j = 16; j < kKeys; j += 16) high = max(high, load(s + j));
  const float tile_max = max(high), m = tile_max > *max_row ? tile_max : *max_row;
  const float shift = m == -kInf ? 0.0f : m;
  f32x16 total = {};
  for (int64_t j = 0; j < kKeys; j += 16) {
    const f32x16 w = exp(load(s + j) - shift);
    store(s + j, w);
    total += w;
  }
  if (m != *max_row) {
    const float fade = std::exp(*max_row - shift);
    *sum_row *= fade;
    for (int64_t d = 0; d < D; d += 16) store(out + d, load(out + d) * fade);
    *max_row = m;
  }
  *sum_row += sum(total);
}

template <class T>
LSERVE_CLONES void load_row(const T* from, int64_t D, float scale, float* to) {
  for (int64_t d = 0; d < D; d += 16) store(to + d, load(from + d) * scale);
}

template <class T>
LSERVE_CLONES void store_row(const float* from, int64_t D, float scale, T* to) {
  for (int64_t d = 0; d < D; d += 16) store(to + d, load(from + d) * scale * (1.0f / kHeadroom));
}

LSERVE_CLONES bool is_finite(const float* x, int64_t D) {
  f32x16 total = {};
  for (int64_t d = 0; d < D; d += 16) total += load(x + d) * 0.0f;  // 0, or NaN
  return sum(total) == 0.0f;
}

// K on its group's grid, clamped to the box: stats [2, D].
template <class T>
LSERVE_CLONES void load_codes(const uint8_t* codes, const T* stats, int64_t D, float* to) {
  for (int64_t d = 0; d < D; ++d) {
    const float low = to_float(stats[d]), high = to_float(stats[D + d]);
    to[d] = grid_value(codes[d], low, grid_step(low, high), high);
  }
}

LSERVE_CLONES void load_codes(const uint8_t* codes, float step, float min, int64_t D, float* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = grid_value(codes[d], min, step);
}

// columns [D, kKeys] from 16 rows [D] of stride D: blocks of 16 x 16.
LSERVE_CLONES void transpose(const float* rows, int64_t D, float* columns) {
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t i = 0; i < 16; ++i) columns[d * kKeys + i] = rows[i * D + d];
  }
}

// A tile of consecutive queries of one (sequence, kv head), and what they attend.
struct Tile {
  int64_t b, h, first, count;  // first query within its sequence
  int64_t position;            // of the first query
  Entries pages;
};

struct Scratch {
  explicit Scratch(int64_t G, int64_t D)
      : q(new float[G * kQueries * D]),
        out(new float[G * kQueries * D]),
        k(new float[kKeys * D]),
        v(new float[kKeys * D]),
        rows(new float[16 * D]),
        s(new float[kQueries * kKeys]),
        row(new float[kRows * kKeys]),
        row_out(new float[kRows * D]),
        max(new float[G * kQueries]),
        sum(new float[G * kQueries]) {}
  std::unique_ptr<float[]> q, out;    // [G, kQueries, D]
  std::unique_ptr<float[]> k;         // [D, kKeys]
  std::unique_ptr<float[]> v;         // [kKeys, D]
  std::unique_ptr<float[]> rows;      // [16, D]
  std::unique_ptr<float[]> s;         // [kQueries, kKeys]
  std::unique_ptr<float[]> row;       // [kRows, kKeys], one query's weights
  std::unique_ptr<float[]> row_out;   // [kRows, D]
  std::unique_ptr<float[]> max, sum;  // [G, kQueries]
  int64_t position[kKeys];            // of every key in the tile
};

template <class T>
class Prefill {
 public:
  explicit Prefill(const PrefillArgs& a) : a_(a), kv_(a.kv), D_(a.kv.D) {}

  void run() {
    check();
    plan();
    // Tiles differ in length, so each lane takes every lanes-th one.
    const int64_t tiles = static_cast<int64_t>(tiles_.size()), lanes = std::min<int64_t>(tiles, 64);
    parallel_for(lanes, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(a_.G, D_);
      for (int64_t lane = begin; lane < end; ++lane)
        for (int64_t i = lane; i < tiles; i += lanes) attend(tiles_[i], scratch);
    });
  }

 private:
  int64_t held(int64_t b) const { return a_.context_lens ? a_.context_lens[b] : 0; }

  void check() const {
    check_windows("prefill", a_.rule, kv_.H);
    if (a_.context_lens) check_lengths("prefill", "context_lens", kv_, a_.context_lens);
    for (int64_t b = 0; b < kv_.B; ++b)
      check_range("prefill: context_lens", held(b), 0,
                  INT32_MAX - std::max<int64_t>(0, a_.cu_seqlens_k[b + 1] - a_.cu_seqlens_k[b]), b);
    check_range("prefill: cu_seqlens_q", a_.cu_seqlens_q[0], 0, 0, 0);
    check_range("prefill: cu_seqlens_k", a_.cu_seqlens_k[0], 0, 0, 0);
    for (int64_t b = 0; b < kv_.B; ++b) {
      check_range("prefill: cu_seqlens_q", a_.cu_seqlens_q[b + 1], a_.cu_seqlens_q[b], a_.Nq, b + 1);
      check_range("prefill: cu_seqlens_k", a_.cu_seqlens_k[b + 1],
                  a_.cu_seqlens_k[b] + (a_.cu_seqlens_q[b + 1] - a_.cu_seqlens_q[b]), a_.Nk, b + 1);
    }
    check_range("prefill: cu_seqlens_q", a_.cu_seqlens_q[kv_.B], a_.Nq, a_.Nq, kv_.B);
    check_range("prefill: cu_seqlens_k", a_.cu_seqlens_k[kv_.B], a_.Nk, a_.Nk, kv_.B);
  }

  // Cuts the queries into tiles. Within a tile of a head with a window or a list all queries lie in one page, so
  // that they attend the same pages.
  void plan() {
    const int64_t P = kv_.P;
    for (int64_t b = 0; b < kv_.B; ++b)
      for (int64_t h = 0; h < kv_.H; ++h) {
        const int64_t count = a_.cu_seqlens_q[b + 1] - a_.cu_seqlens_q[b];
        const int64_t start = held(b) + (a_.cu_seqlens_k[b + 1] - a_.cu_seqlens_k[b]) - count;
        const int32_t window = a_.rule.windows[h];
        for (int64_t first = 0, size; first < count; first += size) {
          const int64_t position = start + first, page = position / P;
          size = std::min(kQueries, count - first);
          if (window != kDense) size = std::min(size, (page + 1) * P - position);
          const int32_t* list = nullptr;
          if (window == 0) {
            check_range("prefill: lists", page - start / P, 0, a_.list_rows - 1, b, h);
            list = a_.rule.lists + b * a_.rule.list_stride0 + h * a_.rule.list_stride1 + (page - start / P) * a_.list_stride2;
          }
          // The newest P to 2P - 1 tokens before a query are unsealed when it is decoded, so always attended.
          const int64_t unsealed = window == 0 ? page : std::max<int64_t>(0, page - 1);
          const Entries pages = entries(a_.rule, window, list, page, position + size - 1, P, window == kDense ? 0 : unsealed);
          check_list("prefill", a_.rule, pages, b, h);
          if (a_.context_lens) check_entries("prefill", kv_, a_.rule, pages, b, h);
          tiles_.push_back({b, h, first, size, position, pages});
        }
      }
  }

  void attend(const Tile& tile, Scratch& scratch) const {
    const int64_t G = a_.G, rows = (tile.count + kRows - 1) / kRows * kRows;
    const T* q =
        static_cast<const T*>(a_.q.data) + (a_.cu_seqlens_q[tile.b] + tile.first) * a_.q.stride0 + tile.h * G * a_.q.stride1;
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < rows; ++i) {
        float* row = scratch.q.get() + (g * kQueries + i) * D_;
        if (i < tile.count) load_row(q + i * a_.q.stride0 + g * a_.q.stride1, D_, a_.scale, row);
        else std::fill_n(row, D_, 0.0f);
      }
    std::fill_n(scratch.out.get(), G * kQueries * D_, 0.0f);
    std::fill_n(scratch.max.get(), G * kQueries, -kInf);
    std::fill_n(scratch.sum.get(), G * kQueries, 0.0f);

    const int64_t last = tile.position + tile.count - 1;
    int64_t keys = 0;
    for (int64_t i = 0; i < tile.pages.count(); ++i) {
      const int64_t page = tile.pages[i], end = std::min((page + 1) * kv_.P, last + 1);
      for (int64_t position = page * kv_.P; position < end;) {
        const int64_t count = std::min({end - position, kKeys - keys, segment_end(tile.b, position) - position});
        if (unpack(tile, position, count, keys, scratch)) keys += count;
        position += count;
        if (keys == kKeys) {
          multiply_tile(tile, rows, keys, scratch);
          keys = 0;
        }
      }
    }
    if (keys > 0) multiply_tile(tile, rows, keys, scratch);

    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t row = (a_.cu_seqlens_q[tile.b] + tile.first + i) * kv_.H * G + tile.h * G + g;
        const float total = scratch.sum[g * kQueries + i];
        store_row(scratch.out.get() + (g * kQueries + i) * D_, D_, total == 0 ? 0.0f : 1.0f / total,
                  static_cast<T*>(a_.out) + row * D_);
        a_.lse[row] = total == 0 ? -kInf : scratch.max[g * kQueries + i] + std::log(total);
      }
  }

  // Where the tokens change from pool to residual buffer, from there to the new ones, or wrap around in the residual buffer.
  int64_t segment_end(int64_t b, int64_t position) const {
    if (position >= held(b)) return INT64_MAX;
    return std::min((position / kv_.P + 1) * kv_.P, held(b));
  }

  // Puts tokens [position, position + count) into the key tile from column `at` on; false: the page was freed.
  bool unpack(const Tile& tile, int64_t position, int64_t count, int64_t at_key, Scratch& scratch) const {
    Run run;
    if (position < held(tile.b)) {
      run = cached_run(kv_, tile.b, tile.h, position, count);
      if (run.count == 0) return false;
    } else {
      const int64_t token = a_.cu_seqlens_k[tile.b] + position - held(tile.b);
      run = Run{};
      run.floating = true;
      run.k = static_cast<const T*>(a_.k.data) + token * a_.k.stride0 + tile.h * a_.k.stride1;
      run.v = static_cast<const T*>(a_.v.data) + token * a_.v.stride0 + tile.h * a_.v.stride1;
      run.k_stride = a_.k.stride0, run.v_stride = a_.v.stride0;
    }
    for (int64_t i = 0; i < count; ++i) {
      float* k = scratch.rows.get() + (at_key + i) % 16 * D_;
      float* v = scratch.v.get() + (at_key + i) * D_;
      scratch.position[at_key + i] = position + i;
      if (run.floating) {
        load_row(static_cast<const T*>(run.k) + i * run.k_stride, D_, 1.0f, k);
        load_row(static_cast<const T*>(run.v) + i * run.v_stride, D_, kHeadroom, v);
      } else {
        const auto* codes = static_cast<const uint8_t*>(run.k) + i * run.k_stride;
        if (run.k_scales) load_codes(codes, run.k_scales[2 * i], run.k_scales[2 * i + 1], D_, k);
        else load_codes(codes, static_cast<const T*>(run.stats) + (run.offset + i) / kv_.L * 2 * D_, D_, k);
        load_codes(static_cast<const uint8_t*>(run.v) + i * run.v_stride, run.v_scales[2 * i] * kHeadroom,
                   run.v_scales[2 * i + 1] * kHeadroom, D_, v);
      }
      if ((at_key + i) % 16 == 15) transpose(scratch.rows.get(), D_, scratch.k.get() + (at_key + i - 15));
    }
    return true;
  }

  void multiply_tile(const Tile& tile, int64_t rows, int64_t keys, Scratch& scratch) const {
    if (keys % 16) transpose(scratch.rows.get(), D_, scratch.k.get() + keys / 16 * 16);  // the rest of its columns is masked
    for (int64_t j = keys; j < kKeys; ++j) {
      scratch.position[j] = INT64_MAX;
      std::fill_n(scratch.v.get() + j * D_, D_, 0.0f);
    }
    const bool masked = keys < kKeys || scratch.position[keys - 1] > tile.position;
    // A weight of 0 hides a later token from a query, but not its infinite value: 0 * inf is NaN.
    bool finite = true;
    for (int64_t j = 0; masked && j < keys; ++j)
      if (scratch.position[j] > tile.position) finite = finite && is_finite(scratch.v.get() + j * D_, D_);
    for (int64_t g = 0; g < a_.G; ++g) {
      float *q = scratch.q.get() + g * kQueries * D_, *out = scratch.out.get() + g * kQueries * D_, *s = scratch.s.get();
      multiply(rows, kKeys, D_, q, D_, scratch.k.get(), kKeys, s, kKeys, false);
      for (int64_t i = 0; i < rows; ++i) {
        if (masked)
          for (int64_t j = 0; j < kKeys; ++j)
            if (scratch.position[j] > tile.position + i) s[i * kKeys + j] = -kInf;
        soften_row(s + i * kKeys, &scratch.max[g * kQueries + i], &scratch.sum[g * kQueries + i], out + i * D_, D_);
      }
      if (finite) {
        multiply(rows, D_, keys, s, kKeys, scratch.v.get(), D_, out, D_, true);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {  // the same chain of sums, a query at a time and no longer than it sees
        int64_t seen = keys;
        while (seen > 0 && scratch.position[seen - 1] > tile.position + i) --seen;
        for (int64_t r = 0; r < kRows; ++r) std::copy_n(s + i * kKeys, kKeys, scratch.row.get() + r * kKeys);
        for (int64_t r = 0; r < kRows; ++r) std::copy_n(out + i * D_, D_, scratch.row_out.get() + r * D_);
        multiply(kRows, D_, seen, scratch.row.get(), kKeys, scratch.v.get(), D_, scratch.row_out.get(), D_, true);
        std::copy_n(scratch.row_out.get(), D_, out + i * D_);
      }
    }
  }

  const PrefillArgs& a_;
  const Paged& kv_;
  const int64_t D_;
  std::vector<Tile> tiles_;
};

}  // namespace

void prefill(const PrefillArgs& a) {
  dispatch(a.kv.dtype, [&](auto t) { Prefill<decltype(t)>(a).run(); });
}

}  // namespace lserve::cpu
