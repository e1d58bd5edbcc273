// prefill: block-sparse flash attention, a tile of queries against tiles of the keys that it attends.
//
// Keys of a tile are unpacked once (transposed) and shared by the query heads of the group. Both products are then the
// same small matrix product. Its operands E are floats; bfloat16 for a model of bfloat16 on a CPU with matrix units, and
// then weights are rounded to bfloat16, as tensor cores want it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "rows.h"
#include "unpack.h"

namespace lserve::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kQueries = 256, kKeys = 256;  // a tile
constexpr int64_t kBlock = 32;                  // queries whose weights stay in the first cache
// Values are summed before they are divided by the sum of weights. Scaled down by a power of two, which changes no bit
// of the result, thousands of the largest values still have a finite sum.
constexpr float kHeadroom = 0x1p-24f;

// What a row of queries knows: maximum of its scores, before the scale; sum of weights; values [D].
struct Row {
  float *max, *sum, *out;
  int64_t D;
};

// Scores [width] become weights 2^(scale (s - max)), of which there are `seen`; the row follows the new maximum.
template <class F, class U>
LSERVE_INLINE void soften_row(float* s, int64_t seen, int64_t width, float scale, Row row) {
  constexpr int64_t lanes = sizeof(F) / sizeof(float), parts = 16 / lanes;
  std::fill(s + seen, s + width, -kInf);
  F high[parts], total[parts] = {}, x;
  for (F& part : high) part = F{} - kInf;
  for (int64_t j = 0; j < width; j += lanes) {
    std::memcpy(&x, s + j, sizeof(x));
    F& part = high[j / lanes % parts];
    part = part > x ? part : x;
  }
  const float tile_max = max(bit_cast<f32x16>(high)), before = *row.max, now = tile_max > before ? tile_max : before;
  const float shift = now == -kInf ? 0.0f : now * scale;
  for (int64_t j = 0; j < width; j += lanes) {
    std::memcpy(&x, s + j, sizeof(x));
    x = exp2_part<F, U>(x * scale - shift);
    std::memcpy(s + j, &x, sizeof(x));
    total[j / lanes % parts] += x;
  }
  if (now != before) {
    const float fade = std::exp2(before * scale - shift);
    *row.sum *= fade;
    for (int64_t d = 0; d < row.D; d += 16) store(row.out + d, load(row.out + d) * fade);
    *row.max = now;
  }
  *row.sum += sum(bit_cast<f32x16>(total));
}

LSERVE_CLONES void soften_16(float* s, int64_t seen, int64_t width, float scale, Row row) {
  soften_row<floats, words>(s, seen, width, scale, row);
}
#ifdef LSERVE_AVX512
LSERVE_AVX512 void soften_32(float* s, int64_t seen, int64_t width, float scale, Row row) {
  soften_row<wide_floats, wide_words>(s, seen, width, scale, row);
}
#endif

void soften(float* s, int64_t seen, int64_t width, float scale, Row row) {
#ifdef LSERVE_AVX512
  if (has_avx512()) return soften_32(s, seen, width, scale, row);
#endif
  soften_16(s, seen, width, scale, row);
}

template <class T>
LSERVE_CLONES void store_row(const float* from, int64_t D, float scale, T* to) {
  for (int64_t d = 0; d < D; d += 16) store(to + d, load(from + d) * scale * (1.0f / kHeadroom));
}

template <class E>
LSERVE_CLONES bool is_finite(const E* x, int64_t D) {
  f32x16 total = {};
  for (int64_t d = 0; d < D; d += 16) total += load(x + d) * 0.0f;  // 0, or NaN
  return sum(total) == 0.0f;
}

// Two rows [D] become one of pairs [D, 2].
LSERVE_CLONES void interleave(const bf16* first, const bf16* second, int64_t D, bf16* pairs) {
  for (int64_t d = 0; d < D; ++d) pairs[2 * d] = first[d], pairs[2 * d + 1] = second[d];
}

// A tile of consecutive queries of one (sequence, kv head), and what they attend.
struct Tile {
  int64_t b, h, first, count;  // first query within its sequence
  int64_t position;            // of the first query
  AttendedUnits pages;
};

// `size` zeros, on cache lines of their own.
template <class X>
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(new Line[(size * sizeof(X) + 63) / 64]()) {}
  X* get() const { return lines_[0].x; }
  X& operator[](int64_t i) const { return get()[i]; }

 private:
  struct alignas(64) Line {
    X x[64 / sizeof(X)];
  };
  std::unique_ptr<Line[]> lines_;
};

// What a thread works on. A word is 4 bytes: kPair operands that stand side by side along the inner dimension.
template <class E>
struct Scratch {
  static constexpr int64_t kPair = sizeof(float) / sizeof(E);
  static constexpr int64_t kRows = 8 * kPair;  // whole blocks of the product

  Scratch(int64_t G, int64_t D_)
      : D(D_),
        inner((D + 16 * kPair - 1) / (16 * kPair) * (16 * kPair)),
        q(G * kQueries * inner),
        k(kKeys * inner),
        k_rows(16 * inner),
        v(kKeys * D),
        v_rows(kPair * D),
        s(kBlock * kKeys),
        weights(kPair > 1 ? kBlock * kKeys : 0),
        out(G * kQueries * D),
        max(G * kQueries),
        sum(G * kQueries) {}

  // Weights s as operands.
  const E* rounded(int64_t rows, int64_t width) {
    if constexpr (kPair == 1) return s.get();
    else {
      for (int64_t i = 0; i < rows; ++i) round_row(s.get() + i * kKeys, width, weights.get() + i * kKeys);
      return weights.get();
    }
  }

  // Keys up to a position, of which there are between `least` and `most`.
  int64_t seen(int64_t least, int64_t most, int64_t last) const {
    while (least < most && position[least] <= last) ++least;
    return least;
  }

  E& value(int64_t key, int64_t d) { return v[key / kPair * kPair * D + d * kPair + key % kPair]; }

  // Rows k and v of a key are complete: into the tile, once enough are.
  void put(int64_t key) {
    if (key % 16 == 15) transpose_keys(key - 15);
    if constexpr (kPair == 2)
      if (key % 2 == 1) interleave(v_rows.get(), v_rows.get() + D, D, v.get() + (key - 1) * D);
  }

  // There are no keys from here on. Columns of K may hold anything then, weights and values are 0.
  void finish(int64_t keys) {
    if (keys % 16) transpose_keys(keys / 16 * 16);
    if (kPair == 2 && keys % 2 == 1) {
      std::fill_n(v_rows.get() + D, D, E{});
      put(keys);
    }
    const int64_t filled = (keys + kPair - 1) / kPair * kPair;
    std::fill_n(v.get() + filled * D, (kKeys - filled) * D, E{});
  }

  E* k_row(int64_t key) { return k_rows.get() + key % 16 * inner; }
  E* v_row(int64_t key) { return kPair == 1 ? v.get() + key * D : v_rows.get() + key % 2 * D; }

  int64_t D, inner;                 // inner: of q k, D and zeros
  Buffer<E> q;                      // [G, kQueries, inner]
  Buffer<E> k;                      // [inner / kPair, kKeys, kPair]
  Buffer<E> k_rows;                 // [16, inner]
  Buffer<E> v;                      // [kKeys / kPair, D, kPair]
  Buffer<E> v_rows;                 // [kPair, D]
  Buffer<float> s;                  // [kBlock, kKeys]
  Buffer<E> weights;                // [kBlock, kKeys], rounded
  Buffer<float> out;                // [G, kQueries, D]
  Buffer<float> max, sum;           // [G, kQueries]
  ChannelGrid grid;                 // of one group of keys
  int64_t position[kKeys];          // of every key in the tile
  std::vector<int64_t> apart;       // keys whose values are added one by one
  std::vector<float> apart_values;  // [apart, D]

 private:
  void transpose_keys(int64_t first) {
    transpose(reinterpret_cast<const uint32_t*>(k_rows.get()), inner / kPair, inner / kPair, kKeys,
              reinterpret_cast<uint32_t*>(k.get()) + first);
  }
};

template <class T, class E>
class Prefill {
 public:
  explicit Prefill(const PrefillArgs& a)
      : a_(a),
        kv_(a.kv),
        D_(a.kv.D),
        sign_(a.scale > 0   ? 1.0f
              : a.scale < 0 ? -1.0f
                            : 0.0f),
        scale_(a.scale == 0 ? 1.0f : std::fabs(a.scale)) {}

  void run() {
    check();
    plan();
    // Tiles differ in length. Sorted, and then taken in steps of the golden ratio, every share of them is of like length.
    const auto work = [](const Tile& tile) { return tile.pages.count() * tile.count; };
    std::stable_sort(tiles_.begin(), tiles_.end(), [&](const Tile& x, const Tile& y) { return work(x) > work(y); });
    const int64_t tiles = static_cast<int64_t>(tiles_.size());
    int64_t step = tiles * 5 / 8 + 1;
    while (std::gcd(step, tiles) > 1) ++step;
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const Units<E> units;
      Scratch<E> scratch(a_.G, D_);
      for (int64_t i = begin; i < end; ++i) attend(tiles_[i * step % tiles], scratch);
    });
  }

 private:
  int64_t held(int64_t b) const { return a_.context_lens ? a_.context_lens[b] : 0; }

  void check() const {
    check_windows("prefill", a_.mask, kv_.H);
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
        const int32_t window = a_.mask.windows[h];
        const int64_t most = std::clamp(count / 4 / kBlock * kBlock, 2 * kBlock, kQueries);  // short ones keep all threads busy
        for (int64_t first = 0, size; first < count; first += size) {
          const int64_t position = start + first, page = position / P;
          size = std::min(most, count - first);
          if (window != kDense) size = std::min(size, (page + 1) * P - position);
          const int32_t* list = nullptr;
          if (window == 0) {
            check_range("prefill: lists", page - start / P, 0, a_.list_rows - 1, b, h);
            list = list_of(a_.mask, b, h) + (page - start / P) * a_.list_stride2;
          }
          // The newest P to 2P - 1 tokens before a query are unsealed when it is decoded, so always attended.
          const int64_t unsealed = window == 0 ? page : std::max<int64_t>(0, page - 1);
          const AttendedUnits pages =
              attended(a_.mask, window, list, page, position + size - 1, kv_.P, window == kDense ? 0 : unsealed);
          check_list("prefill", a_.mask, pages, b, h);
          if (a_.context_lens) check_entries("prefill", kv_, a_.mask, pages, b, h);
          tiles_.push_back({b, h, first, size, position, pages});
        }
      }
  }

  void attend(const Tile& tile, Scratch<E>& scratch) const {
    const int64_t G = a_.G, rows = (tile.count + kRows - 1) / kRows * kRows;
    const T* q =
        static_cast<const T*>(a_.q.data) + (a_.cu_seqlens_q[tile.b] + tile.first) * a_.q.stride0 + tile.h * G * a_.q.stride1;
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < rows; ++i) {
        E* row = scratch.q.get() + (g * kQueries + i) * scratch.inner;
        if (i < tile.count) load_row(q + i * a_.q.stride0 + g * a_.q.stride1, D_, sign_, row);
        else std::fill_n(row, D_, E{});
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
        a_.lse[row] = total == 0 ? -kInf : scratch.max[g * kQueries + i] * scale_ + std::log(total);
      }
  }

  // Where the tokens change from pool to residual buffer, from there to the new ones, or wrap around in the residual buffer.
  int64_t segment_end(int64_t b, int64_t position) const {
    if (position >= held(b)) return INT64_MAX;
    return std::min((position / kv_.P + 1) * kv_.P, held(b));
  }

  // Puts tokens [position, position + count) into the key tile from column `at` on; false: the page was freed.
  bool unpack(const Tile& tile, int64_t position, int64_t count, int64_t at_key, Scratch<E>& scratch) const {
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
    int64_t group = -1;  // whose grid is unpacked
    for (int64_t i = 0; i < count; ++i) {
      E *k = scratch.k_row(at_key + i), *v = scratch.v_row(at_key + i);
      scratch.position[at_key + i] = position + i;
      if (run.floating) {
        load_row(static_cast<const T*>(run.k) + i * run.k_stride, D_, 1.0f, k);
        load_row(static_cast<const T*>(run.v) + i * run.v_stride, D_, kHeadroom, v);
      } else {
        const auto* codes = static_cast<const uint8_t*>(run.k) + i * run.k_stride;
        if (run.k_scales) {
          load_codes(codes, run.k_scales[2 * i], run.k_scales[2 * i + 1], D_, k);
        } else {
          if ((run.offset + i) / kv_.L != group) {
            group = (run.offset + i) / kv_.L;
            load_grid(static_cast<const T*>(run.stats) + group * 2 * D_, D_, scratch.grid);
          }
          load_codes(codes, scratch.grid, D_, k);
        }
        load_codes(static_cast<const uint8_t*>(run.v) + i * run.v_stride, run.v_scales[2 * i] * kHeadroom,
                   run.v_scales[2 * i + 1] * kHeadroom, D_, v);
      }
      scratch.put(at_key + i);
    }
    return true;
  }

  void multiply_tile(const Tile& tile, int64_t rows, int64_t keys, Scratch<E>& scratch) const {
    scratch.finish(keys);
    set_apart(tile, keys, scratch);
    const int64_t inner = scratch.inner;
    float* s = scratch.s.get();
    for (int64_t g = 0; g < a_.G; ++g)
      for (int64_t first = 0, reach = 0; first < rows; first += kBlock) {
        const int64_t count = std::min(kBlock, rows - first), row = g * kQueries + first;
        int64_t seen = reach;  // keys that a query sees, of those that its block does
        reach = scratch.seen(reach, keys, tile.position + first + count - 1);
        const int64_t width = (reach + 31) / 32 * 32;
        float* out = scratch.out.get() + row * D_;
        multiply(count, width, inner, scratch.q.get() + row * inner, inner, scratch.k.get(), kKeys, s, kKeys, false);
        for (int64_t i = 0; i < count; ++i) {
          seen = scratch.seen(seen, reach, tile.position + first + i);
          soften(s + i * kKeys, seen, width, scale_ * kLog2E, {&scratch.max[row + i], &scratch.sum[row + i], out + i * D_, D_});
        }
        const E* weights = scratch.rounded(count, width);
        multiply(count, D_, width, weights, kKeys, scratch.v.get(), D_, out, D_, true);
        for (size_t n = 0; n < scratch.apart.size(); ++n)
          for (int64_t i = 0, j = scratch.apart[n]; i < count; ++i)
            for (int64_t d = 0; scratch.position[j] <= tile.position + first + i && d < D_; ++d)
              out[i * D_ + d] += to_float(weights[i * kKeys + j]) * scratch.apart_values[n * D_ + d];
      }
  }

  // A weight of 0 hides a later token from a query, but not its infinite value: 0 * inf is NaN.
  void set_apart(const Tile& tile, int64_t keys, Scratch<E>& scratch) const {
    constexpr int64_t kPair = Scratch<E>::kPair;
    scratch.apart.clear(), scratch.apart_values.clear();
    for (int64_t j = keys - 1; j >= 0 && scratch.position[j] > tile.position; --j) {
      if (is_finite(scratch.v.get() + j / kPair * kPair * D_, kPair * D_)) continue;
      scratch.apart.push_back(j);
      for (int64_t d = 0; d < D_; ++d) {
        scratch.apart_values.push_back(to_float(scratch.value(j, d)));
        scratch.value(j, d) = E{};
      }
    }
  }

  static constexpr int64_t kRows = Scratch<E>::kRows;
  const PrefillArgs& a_;
  const PagedKV& kv_;
  const int64_t D_;
  const float sign_, scale_;  // scale of q k is their product, which lets the largest q k have the largest weight
  std::vector<Tile> tiles_;
};

}  // namespace

void prefill(const PrefillArgs& a) {
#ifdef LSERVE_AMX
  if (a.kv.dtype == Dtype::bf16 && has_amx()) return Prefill<bf16, bf16>(a).run();
#endif
  dispatch(a.kv.dtype, [&](auto t) { Prefill<decltype(t), float>(a).run(); });
}

}  // namespace lserve::cpu
