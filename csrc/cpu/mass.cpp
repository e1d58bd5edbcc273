// attention_mass: the softmax mass that queries put on every token.
//
// The keys of one query are scored as decode scores them. Those of many queries are unpacked, and scores are a product.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "chunk.h"
#include "gemm.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // queries that share a looked up key
constexpr int64_t kKeys = 64;  // whose scores they make together

// What one thread works with.
struct Scratch {
  explicit Scratch(int64_t rows)  // a multiple of 8
      : q(new float[rows * kMaxD]),
        s(new float[rows * kKeys]),
        k(new float[16 * kMaxD]()),
        columns(new float[kKeys * kMaxD]()) {}
  std::unique_ptr<float[]> q;        // [rows, kMaxD] query heads, scaled
  std::unique_ptr<float[]> s;        // [rows, kKeys] scores
  std::unique_ptr<float[]> k;        // [16, kMaxD] keys
  std::unique_ptr<float[]> columns;  // [kMaxD, kKeys] of them
  ChannelGrid grid;
  const void* unpacked = nullptr;  // the group whose grid that is
};

// mass[i] += exp(s[i] - lse)
LSERVE_CLONES void add_weights(const float* s, int64_t count, float lse, float* mass) {
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(mass + i, load(mass + i) + exp(load(s + i) - lse));
  float tail[16] = {};
  for (int64_t i = whole; i < count; ++i) tail[i - whole] = s[i] - lse;
  store(tail, exp(load(tail)));
  for (int64_t i = whole; i < count; ++i) mass[i] += tail[i - whole];
}

// mass[i] = Σ_g exp(s[i][g] - lse[g]), of scores s [count, C], and up to 15 values more.
template <int C>
LSERVE_INLINE void sum_weights(const float* s, int64_t count, const float* lse, float* mass) {
  float shift[16], w[16];
  for (int i = 0; i < 16; ++i) shift[i] = lse[i % C];
  for (int64_t i = 0; i < count * C; i += 16) {
    store(w, exp(load(s + i) - load(shift)));
    for (int j = 0; j < 16 / C; ++j) {
      float total = w[j * C];
      for (int g = 1; g < C; ++g) total += w[j * C + g];
      mass[i / C + j] = total;
    }
  }
}

LSERVE_CLONES void sum_weights(int64_t heads, const float* s, int64_t count, const float* lse, float* mass) {
  switch (columns(heads)) {
    case 1: return sum_weights<1>(s, count, lse, mass);
    case 2: return sum_weights<2>(s, count, lse, mass);
    default: return sum_weights<4>(s, count, lse, mass);
  }
}

// Scores of keys [first, first + count) of a chunk, at most kKeys, against the first queries [queries] of scratch.q: into
// scratch.s.
template <class T>
void score_many(int64_t queries, const Chunk& keys, int64_t first, int64_t count, int64_t D, Scratch& scratch) {
  float *const rows = scratch.k.get(), *const columns = scratch.columns.get();
  auto span = keys.spans.begin();
  for (int64_t i = 0; i < count; ++i) {
    while (first + i >= span->first + span->count) ++span;
    const void* row = keys.k[first + i];
    float* to = rows + i % 16 * kMaxD;
    if (span->floating) load_row(static_cast<const T*>(row), D, 1.0f, to);
    else if (!span->grid)
      load_codes(static_cast<const uint8_t*>(row), keys.k_grid[first + i].step, keys.k_grid[first + i].min, D, to);
    else {
      if (span->grid != scratch.unpacked) load_grid(static_cast<const T*>(scratch.unpacked = span->grid), D, scratch.grid);
      load_codes(static_cast<const uint8_t*>(row), scratch.grid, D, to);
    }
    if (i % 16 == 15 || i == count - 1)
      transpose(reinterpret_cast<uint32_t*>(rows), D, kMaxD, kKeys, reinterpret_cast<uint32_t*>(columns) + i / 16 * 16);
  }
  multiply((queries + 7) / 8 * 8, (count + 15) / 16 * 16, D, scratch.q.get(), kMaxD, columns, kKeys, scratch.s.get(), kKeys,
           false);
}

AttendedUnits mass_entries(const MassArgs& a, int64_t b, int64_t h, int64_t t) {
  return attended(a.mask, b, h, t, a.kv.P, a.kv.sealed[b]);
}

// The mass that all queries of a (sequence, kv head) put on entries [first, last). Queries of one page attend the same
// entries, up to their own position, and go together: so keys are looked up, and decoded, once for kRows of them.
template <class T>
void add_mass(const MassArgs& a, int64_t b, int64_t h, int64_t first, int64_t last, Scratch& scratch, Chunk& keys,
              std::vector<float>& sums) {
  const PagedKV& kv = a.kv;
  const int64_t D = kv.D, G = a.G, held = a.seq_lens[b], start = held - a.T, per_chunk = chunk_entries(a.mask);
  const T* const q = static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * G * a.q.stride2;
  float* const mass = a.mass + (b * kv.H + h) * kv.M * kv.P;
  for (int64_t row = std::max<int64_t>(0, -start), next; row < a.T; row = next) {
    next = std::min({row + kRows, a.T, row + kv.P - (start + row) % kv.P});
    for (int64_t r = row; r < next; ++r)
      load_query(q + r * a.q.stride1, a.q.stride2, G, D, a.scale, scratch.q.get() + (r - row) * G * kMaxD);
    const AttendedUnits e = mass_entries(a, b, h, start + next - 1);
    const int64_t end = std::min<int64_t>(last, e.count());
    for (int64_t from = first; from < end; from += per_chunk) {
      keys.load(kv, a.mask, e, b, h, from, std::min(from + per_chunk, end), start + next - 1);
      sums.assign(keys.count, 0.0f);
      for (int64_t i = 0; i < keys.count; i += kKeys) {
        const int64_t count = std::min(kKeys, keys.count - i);
        score_many<T>((next - row) * G, keys, i, count, D, scratch);
        for (int64_t r = row; r < next; ++r) {
          const auto begin = keys.position.begin() + i;
          const int64_t seen = std::upper_bound(begin, begin + count, start + r) - begin;
          for (int64_t g = 0; g < G; ++g) {
            const float lse = a.lse[((b * a.T + r) * kv.H + h) * G + g];
            if (lse != -kInf) add_weights(scratch.s.get() + ((r - row) * G + g) * kKeys, seen, lse, sums.data() + i);
          }
        }
      }
      for (int64_t j = 0; j < keys.count; ++j) mass[keys.position[j]] += sums[j];
    }
  }
}

// Attended units of a (sequence, kv head).
struct Unit {
  int64_t b, h, first, last;
};

// The mass that single queries put on all units.
template <class T>
void mass_of_step(const MassArgs& a, const std::vector<Unit>& units) {
  const PagedKV& kv = a.kv;
  const int64_t D = kv.D, G = a.G, tokens = chunk_tokens(a.mask);
  parallel_for(static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    const Chunk empty(tokens);
    ChannelGrid grid;
    std::vector<float> q(G * kMaxD), s((tokens + 16) * kHeads), sums(tokens + 16);
    const auto load = [&](int64_t i, Chunk& chunk) {
      const Unit& u = units[i];
      const int64_t t = a.seq_lens[u.b] - 1;
      const AttendedUnits e = mass_entries(a, u.b, u.h, t);
      chunk.load(kv, a.mask, e, u.b, u.h, u.first, std::min<int64_t>(u.last, e.count()), t);
    };
    in_turn(begin, end, empty, empty, load, [&](int64_t i, Chunk& now, const Chunk& next) {
      follow(now.k, now.count, next.k, next.count);
      const Unit& u = units[i];
      load_query(static_cast<const T*>(a.q.data) + u.b * a.q.stride0 + u.h * G * a.q.stride2, a.q.stride2, G, D, a.scale,
                 q.data());
      float* const mass = a.mass + (u.b * kv.H + u.h) * kv.M * kv.P;
      for (int64_t first = 0; first < G; first += kHeads) {
        const int64_t heads = std::min(kHeads, G - first);
        float lse[kHeads];
        for (int64_t g = 0; g < kHeads; ++g) {
          lse[g] = g < heads ? a.lse[(u.b * kv.H + u.h) * G + first + g] : kInf;
          if (lse[g] == -kInf) lse[g] = kInf;  // weights 0
        }
        score_chunk<T>(now, heads, q.data() + first * kMaxD, D, grid, s.data());
        sum_weights(heads, s.data(), now.count, lse, sums.data());
        for (int64_t j = 0; j < now.count; ++j) mass[now.position[j]] += sums[j];
      }
    });
  });
}

template <class T>
void mass_typed(const MassArgs& a) {
  const PagedKV& kv = a.kv;
  const int64_t G = a.G, per_chunk = chunk_entries(a.mask), tokens = kv.M * kv.P;
  check_windows("attention_mass", a.mask, kv.H);
  check_lengths("attention_mass", "seq_lens", kv, a.seq_lens);
  const auto entries_of = [&](int64_t b, int64_t h, int64_t t) { return mass_entries(a, b, h, t); };
  for (int64_t b = 0; b < kv.B; ++b) {
    if (a.mask.local_start && a.mask.local_start[b] < 0)
      fail_range("attention_mass: local_start", a.mask.local_start[b], 0, kDense, b);
    for (int64_t h = 0; h < kv.H; ++h)
      for (int64_t t = std::max<int64_t>(0, a.seq_lens[b] - a.T); t < a.seq_lens[b]; ++t)
        check_entries("attention_mass", kv, a.mask, entries_of(b, h, t), b, h);
  }
  // Chunks of a dense head, or of a single query, hold positions of their own, so threads may take them apart. Those of
  // other heads move with the query, and one thread takes them all.
  std::vector<Unit> units;
  for (int64_t b = 0; b < kv.B; ++b)
    for (int64_t h = 0; h < kv.H && a.seq_lens[b] > 0; ++h) {
      const int64_t count = entries_of(b, h, a.seq_lens[b] - 1).count();
      const bool apart = a.T == 1 || a.mask.windows[h] == kDense;
      for (int64_t first = 0; first < count; first += apart ? per_chunk : count)
        units.push_back({b, h, first, apart ? first + per_chunk : INT64_MAX});
    }
  std::fill_n(a.mass, kv.B * kv.H * tokens, 0.0f);
  if (a.T == 1) return mass_of_step<T>(a, units);
  parallel_for(static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch((std::min(kRows, a.T) * G + 7) / 8 * 8);
    Chunk keys(chunk_tokens(a.mask));
    std::vector<float> sums;
    for (int64_t i = begin; i < end; ++i)
      add_mass<T>(a, units[i].b, units[i].h, units[i].first, units[i].last, scratch, keys, sums);
  });
}

}  // namespace

void attention_mass(const MassArgs& a) {
  dispatch(a.kv.dtype, [&](auto t) { mass_typed<decltype(t)>(a); });
}

}  // namespace lserve::cpu
