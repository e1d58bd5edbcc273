// decode, attention_mass and merge_states: attention of a few queries over sink, list and local.
//
// A sequence's entries are cut every kChunkTokens tokens. A chunk is scored, normalised and kept as
// (out, lse); partials are then folded in list order. INT8 is not unpacked to memory: with k = min + step * code,
// q·k = q·min + (q * step)·code, so a group's grid is folded into the query once, and V's into the weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "gemm.h"
#include "rows.h"
#include "unpack.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxD = 256;
constexpr int64_t kHeads = 4;  // query heads that share a loaded row
constexpr int64_t kRows = 64;  // queries of attention_mass that share a looked up key
constexpr int64_t kKeys = 64;  // whose scores they make together
constexpr int64_t kAhead = 8;  // rows between asking for one and using it

template <class X>
LSERVE_INLINE void prefetch(const X* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(X)) __builtin_prefetch(row + d);
}

// Rows at a time: enough sums to hide the latency of an addition, few enough for 16 registers.
template <int Heads, class X>
LSERVE_INLINE void dot_rows(const float* q, const X* const* rows, int64_t count, int64_t D, float* s, int64_t s_stride) {
  constexpr int R = Heads > 2 ? 2 : 4;
  for (int64_t i = 0; i < count; i += R) {
    const X* row[R];
    for (int r = 0; r < R; ++r) row[r] = rows[std::min(i + r, count - 1)];
    for (int r = 0; r < R; ++r) prefetch(rows[i + r + kAhead], D);
    floats acc[R][Heads] = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      floats x[R];
      for (int r = 0; r < R; ++r) x[r] = load_part(row[r] + d);
      for (int g = 0; g < Heads; ++g) {
        const floats y = load_part(q + g * kMaxD + d);
        for (int r = 0; r < R; ++r) acc[r][g] += x[r] * y;
      }
    }
    for (int r = 0; r < R && i + r < count; ++r)
      for (int g = 0; g < Heads; ++g) s[g * s_stride + i + r] = sum(acc[r][g]);
  }
}

// s[g][i] = q[g] · rows[i]
template <class X>
LSERVE_CLONES void dots(int64_t G, const float* q, const X* const* rows, int64_t count, int64_t D, float* s, int64_t s_stride) {
  for (int64_t g = 0; g < G; g += kHeads) {
    const float* qg = q + g * kMaxD;
    float* sg = s + g * s_stride;
    switch (G - g) {
      case 1: dot_rows<1>(qg, rows, count, D, sg, s_stride); break;
      case 2: dot_rows<2>(qg, rows, count, D, sg, s_stride); break;
      case 3: dot_rows<3>(qg, rows, count, D, sg, s_stride); break;
      default: dot_rows<4>(qg, rows, count, D, sg, s_stride);
    }
  }
}

template <int Heads, int Parts, class X>
LSERVE_INLINE void add_columns(const float* w, int64_t w_stride, const X* const* rows, int64_t d, int64_t count, float* acc) {
  floats sums[Heads][Parts];
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) sums[g][v] = load_part(acc + g * kMaxD + d + v * kLanes);
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < Parts; ++v) {
      const floats x = load_part(rows[i] + d + v * kLanes);
      for (int g = 0; g < Heads; ++g) sums[g][v] += x * w[g * w_stride + i];
    }
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) store_part(acc + g * kMaxD + d + v * kLanes, sums[g][v]);
}

template <int Heads, class X>
LSERVE_INLINE void add_heads(const float* w, int64_t w_stride, const X* const* rows, int64_t count, int64_t D, float* acc) {
  constexpr int Parts = Heads > 2 ? 2 : 4;  // 16 channels or more: D is a multiple of 16
  for (int64_t i = 0; i < count; i += kAhead) {
    const int64_t some = std::min(kAhead, count - i);
    for (int64_t r = 0; r < some; ++r) prefetch(rows[i + r + kAhead], D);
    int64_t d = 0;
    for (; d + Parts * kLanes <= D; d += Parts * kLanes) add_columns<Heads, Parts>(w + i, w_stride, rows + i, d, some, acc);
    for (; d < D; d += 2 * kLanes) add_columns<Heads, 2>(w + i, w_stride, rows + i, d, some, acc);
  }
}

// acc[g] += Σ_i w[g][i] rows[i]
template <class X>
LSERVE_CLONES void add_rows(int64_t G, const float* w, int64_t w_stride, const X* const* rows, int64_t count, int64_t D,
                            float* acc) {
  for (int64_t g = 0; g < G; g += kHeads) {
    const float* wg = w + g * w_stride;
    float* ag = acc + g * kMaxD;
    switch (G - g) {
      case 1: add_heads<1>(wg, w_stride, rows, count, D, ag); break;
      case 2: add_heads<2>(wg, w_stride, rows, count, D, ag); break;
      case 3: add_heads<3>(wg, w_stride, rows, count, D, ag); break;
      default: add_heads<4>(wg, w_stride, rows, count, D, ag);
    }
  }
}

// The tokens of one chunk, wherever they lie.
struct Chunk {
  // Neighbours of one type and, with statistics, one group.
  struct Span {
    int64_t first, count;
    bool floating;     // in the model's dtype, else codes
    const void* grid;  // of the keys: stats [2, D]; null: (step, min) a token
  };
  struct Grid {
    float step, min;
  };
  std::vector<Span> spans;
  std::vector<int64_t> position;
  std::vector<const void*> k, v;     // rows [D], and kAhead more to prefetch
  std::vector<Grid> k_grid, v_grid;  // of codes

  int64_t count() const { return static_cast<int64_t>(position.size()); }

  // Entries [first, last) of the query at position t, without those that were freed.
  void load(const Paged& kv, const Rule& rule, const Entries& e, int64_t b, int64_t h, int64_t first, int64_t last, int64_t t) {
    spans.clear(), position.clear(), k.clear(), v.clear(), k_grid.clear(), v_grid.clear();
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = e[i] * rule.unit;
      add(kv, cached_run(kv, b, h, begin, std::min(begin + rule.unit, t + 1) - begin));
    }
    k.resize(k.size() + kAhead + kHeads, k.empty() ? nullptr : k.back());
    v.resize(v.size() + kAhead + kHeads, v.empty() ? nullptr : v.back());
  }

 private:
  void add(const Paged& kv, const Run& run) {
    const int64_t size = width(run.floating ? kv.dtype : Dtype::u8);
    for (int64_t i = 0; i < run.count; ++i) {
      const void* grid = run.stats ? at(run.stats, (run.offset + i) / kv.L * 2 * kv.D, width(kv.dtype)) : nullptr;
      if (run.floating) grid = nullptr;
      if (spans.empty() || spans.back().floating != run.floating || spans.back().grid != grid)
        spans.push_back({count(), 0, run.floating, grid});
      ++spans.back().count;
      position.push_back(run.position + i);
      k.push_back(at(run.k, i * run.k_stride, size));
      v.push_back(at(run.v, i * run.v_stride, size));
      k_grid.push_back(run.k_scales ? Grid{run.k_scales[2 * i], run.k_scales[2 * i + 1]} : Grid{});
      v_grid.push_back(run.v_scales ? Grid{run.v_scales[2 * i], run.v_scales[2 * i + 1]} : Grid{});
    }
  }
};

template <class X>
const X* const* rows_of(const std::vector<const void*>& rows, int64_t first) {
  return reinterpret_cast<const X* const*>(rows.data() + first);
}

// What one thread works with: the query group, and the scores of one chunk.
struct Scratch {
  Scratch(int64_t G, int64_t chunk)
      : G(G),
        chunk(chunk),
        q(new float[G * kMaxD]),
        folded(new float[G * kMaxD]),
        base(new float[G]),
        s(new float[G * chunk]),
        acc(new float[G * kMaxD]),
        k(new float[std::max<int64_t>(kAhead, 16) * kMaxD]()),
        columns(new float[kKeys * kMaxD]()) {}
  int64_t G, chunk;
  std::unique_ptr<float[]> q;        // [G, kMaxD] query heads, scaled
  std::unique_ptr<float[]> folded;   // [G, kMaxD] times a group's steps
  std::unique_ptr<float[]> base;     // [G] the grid's constant part
  std::unique_ptr<float[]> s;        // [G, chunk] scores, then weights
  std::unique_ptr<float[]> acc;      // [G, kMaxD]
  std::unique_ptr<float[]> k;        // [16, kMaxD] keys, where a grid is not folded into the query
  std::unique_ptr<float[]> columns;  // [kMaxD, kKeys] keys of many queries
};

template <class T>
LSERVE_CLONES void load_query(const T* q, int64_t stride, int64_t G, int64_t D, float scale, float* out) {
  for (int64_t g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; d += 16) store(out + g * kMaxD + d, load(q + g * stride + d) * scale);
}

// folded[g] = q[g] * step and base[g] = q[g] · min, for one group's grid: stats [2, D].
template <class T>
LSERVE_CLONES void fold_grid(const T* stats, int64_t G, int64_t D, const float* q, float* folded, float* base) {
  for (int64_t g = 0; g < G; ++g) {
    f32x16 total = {};
    for (int64_t d = 0; d < D; d += 16) {
      const f32x16 x = load(q + g * kMaxD + d), min = load(stats + d), max = load(stats + D + d);
      total += x * min;
      store(folded + g * kMaxD + d, x * (max / 255.0f - min / 255.0f));  // grid_step, a vector at a time
    }
    base[g] = sum(total);
  }
}

// Scores of a chunk against the query group, into scratch.s.
template <class T>
void score_chunk(const Chunk& rows, int64_t D, const Scratch& scratch) {
  const int64_t G = scratch.G, chunk = scratch.chunk;
  float *q = scratch.q.get(), *base = scratch.base.get();
  for (const auto& span : rows.spans) {
    float* s = scratch.s.get() + span.first;
    if (span.floating) {
      dots(G, q, rows_of<T>(rows.k, span.first), span.count, D, s, chunk);
    } else if (span.grid) {
      fold_grid(static_cast<const T*>(span.grid), G, D, q, scratch.folded.get(), base);
      dots(G, scratch.folded.get(), rows_of<uint8_t>(rows.k, span.first), span.count, D, s, chunk);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < span.count; ++i) s[g * chunk + i] += base[g];
    } else {
      // Min and step are not folded into q here: with one huge channel q·min and step * (q·code) would cancel.
      const Chunk::Grid* grid = rows.k_grid.data() + span.first;
      for (int64_t i = 0; i < span.count; i += kAhead) {
        const int64_t some = std::min(kAhead, span.count - i);
        const float* block[3 * kAhead];  // and what dots prefetches
        for (int64_t r = 0; r < 3 * kAhead; ++r) block[r] = scratch.k.get() + std::min(r, some - 1) * kMaxD;
        for (int64_t r = 0; r < some; ++r)
          load_codes(rows_of<uint8_t>(rows.k, span.first)[i + r], grid[i + r].step, grid[i + r].min, D,
                     scratch.k.get() + r * kMaxD);
        dots(G, q, block, some, D, s + i, chunk);
      }
    }
  }
}

// acc[g][...] += base[g]
LSERVE_CLONES void add_constant(int64_t G, int64_t D, const float* base, float* acc) {
  for (int64_t g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; d += 16) store(acc + g * kMaxD + d, load(acc + g * kMaxD + d) + base[g]);
}

// acc[g] = Σ_i s[g][i] v[i]
template <class T>
void weigh_chunk(const Chunk& rows, int64_t D, const Scratch& scratch) {
  const int64_t G = scratch.G, chunk = scratch.chunk;
  float *acc = scratch.acc.get(), *base = scratch.base.get();
  std::fill_n(acc, G * kMaxD, 0.0f);
  std::fill_n(base, G, 0.0f);
  for (const auto& span : rows.spans) {
    float* w = scratch.s.get() + span.first;
    if (span.floating) {
      add_rows(G, w, chunk, rows_of<T>(rows.v, span.first), span.count, D, acc);
      continue;
    }
    const Chunk::Grid* grid = rows.v_grid.data() + span.first;
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < span.count; ++i) {
        base[g] += w[g * chunk + i] * grid[i].min;
        w[g * chunk + i] *= grid[i].step;
      }
    add_rows(G, w, chunk, rows_of<uint8_t>(rows.v, span.first), span.count, D, acc);
  }
  add_constant(G, D, base, acc);
}

// Turns scores into weights exp(s - max) in place; returns max and their sum.
LSERVE_CLONES void soften(float* s, int64_t count, float* max_out, float* sum_out) {
  f32x16 high = splat(-kInf);
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) high = max(high, load(s + i));
  float m = max(high);
  for (int64_t i = whole; i < count; ++i) m = s[i] > m ? s[i] : m;
  const float shift = m == -kInf ? 0.0f : m;  // all -inf: weights 0, not exp(nan)
  f32x16 total = {};
  float rest = 0;
  for (int64_t i = 0; i < whole; i += 16) {
    const f32x16 w = exp(load(s + i) - shift);
    store(s + i, w);
    total += w;
  }
  if (whole < count) {
    float tail[16] = {};
    for (int64_t i = whole; i < count; ++i) tail[i - whole] = s[i] - shift;
    store(tail, exp(load(tail)));
    for (int64_t i = whole; i < count; ++i) rest += s[i] = tail[i - whole];
  }
  *max_out = shift;
  *sum_out = sum(total) + rest;
}

int64_t chunk_entries(const Rule& rule) { return std::max<int64_t>(1, kChunkTokens / rule.unit); }
int64_t chunk_tokens(const Rule& rule) { return chunk_entries(rule) * rule.unit; }

template <class T>
void decode_chunk(const DecodeArgs& a, const Chunk& rows, int64_t b, int64_t h, Scratch& scratch, float* out, float* lse) {
  const int64_t D = a.kv.D, G = a.G, chunk = scratch.chunk;
  load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * G * a.q.stride1, a.q.stride1, G, D, a.scale,
             scratch.q.get());
  score_chunk<T>(rows, D, scratch);
  float* s = scratch.s.get();
  for (int64_t g = 0; g < G; ++g) {
    float shift, total;
    soften(s + g * chunk, rows.count(), &shift, &total);
    lse[g] = total == 0 ? -kInf : shift + std::log(total);
    const float scale = total == 0 ? 0.0f : 1.0f / total;
    for (int64_t i = 0; i < rows.count(); ++i) s[g * chunk + i] *= scale;
  }
  weigh_chunk<T>(rows, D, scratch);
  for (int64_t g = 0; g < G; ++g) std::copy_n(scratch.acc.get() + g * kMaxD, D, out + g * D);
}

// (a, lse_a) becomes the attention over both key sets. Equal to (b, lse_b) where a attended nothing.
LSERVE_CLONES void merge(float* a, float* lse_a, const float* b, float lse_b, int64_t D) {
  const float m = *lse_a > lse_b ? *lse_a : lse_b;
  if (m == -kInf) return;
  const float wa = std::exp(*lse_a - m), wb = std::exp(lse_b - m), scale = 1.0f / (wa + wb);
  for (int64_t d = 0; d < D; d += 16) {
    const f32x16 low = wa == 0 ? f32x16{} : load(a + d) * (wa * scale), high = wb == 0 ? f32x16{} : load(b + d) * (wb * scale);
    store(a + d, low + high);
  }
  *lse_a = m + std::log(wa + wb);
}

template <class T>
void decode_typed(const DecodeArgs& a) {
  const Paged& kv = a.kv;
  const int64_t D = kv.D, G = a.G, heads = kv.B * kv.H, per_chunk = chunk_entries(a.rule);
  check_windows("decode", a.rule, kv.H);
  check_lengths("decode", "seq_lens", kv, a.seq_lens);
  std::vector<Entries> all(heads);
  std::vector<int64_t> first(heads + 1, 0);  // chunks before a (sequence, kv head)
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t b = i / kv.H, h = i % kv.H, t = a.seq_lens[b] - 1;
    if (t >= 0) {
      const int32_t* list = a.rule.lists ? a.rule.lists + b * a.rule.list_stride0 + h * a.rule.list_stride1 : nullptr;
      const int64_t local = a.rule.local_start ? a.rule.local_start[b] : 0;
      if (local < 0) fail_range("decode: local_start", local, 0, t, b);
      all[i] = entries(a.rule, a.rule.windows[h], list, local, t, kv.P, kv.sealed[b] * (kv.P / a.rule.unit));
      check_entries("decode", kv, a.rule, all[i], b, h);
    }
    first[i + 1] = first[i] + (all[i].count() + per_chunk - 1) / per_chunk;
  }

  const int64_t chunks = first[heads];
  std::unique_ptr<float[]> outs(new float[chunks * G * D]), lses(new float[chunks * G]);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(G, chunk_tokens(a.rule));
    Chunk rows;
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first[i + 1]) ++i;
      const int64_t b = i / kv.H, h = i % kv.H, from = (c - first[i]) * per_chunk;
      rows.load(kv, a.rule, all[i], b, h, from, std::min<int64_t>(from + per_chunk, all[i].count()), a.seq_lens[b] - 1);
      decode_chunk<T>(a, rows, b, h, scratch, outs.get() + c * G * D, lses.get() + c * G);
    }
  });

  const int64_t grain = 1 + (1 << 14) / (G * D);  // heads: a thread that is woken for less costs more than it does
  parallel_for(heads, grain, [&](int64_t begin, int64_t end) {
    float acc[kMaxD];
    for (int64_t row = begin * G; row < end * G; ++row) {
      const int64_t i = row / G, g = row % G;
      float lse = -kInf;
      std::fill_n(acc, D, 0.0f);
      for (int64_t c = first[i]; c < first[i + 1]; ++c) merge(acc, &lse, outs.get() + (c * G + g) * D, lses[c * G + g], D);
      T* out = static_cast<T*>(a.out) + row * D;
      for (int64_t d = 0; d < D; ++d) out[d] = from_float<T>(acc[d]);
      a.lse[row] = lse;
    }
  });
}

// mass[i] += exp(s[i] - lse)
LSERVE_CLONES void add_weights(const float* s, int64_t count, float lse, float* mass) {
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(mass + i, load(mass + i) + exp(load(s + i) - lse));
  float tail[16] = {};
  for (int64_t i = whole; i < count; ++i) tail[i - whole] = s[i] - lse;
  store(tail, exp(load(tail)));
  for (int64_t i = whole; i < count; ++i) mass[i] += tail[i - whole];
}

// Scores of keys [first, first + count) of a chunk, at most kKeys, against many queries: into scratch.s [G, kKeys].
template <class T>
void score_many(const Chunk& keys, int64_t first, int64_t count, int64_t D, const Scratch& scratch) {
  float *const rows = scratch.k.get(), *const columns = scratch.columns.get();
  auto span = keys.spans.begin();
  for (int64_t i = 0; i < count; ++i) {
    while (first + i >= span->first + span->count) ++span;
    const void* row = keys.k[first + i];
    float* to = rows + i % 16 * kMaxD;
    if (span->floating) load_row(static_cast<const T*>(row), D, 1.0f, to);
    else if (span->grid) load_codes(static_cast<const uint8_t*>(row), static_cast<const T*>(span->grid), D, to);
    else load_codes(static_cast<const uint8_t*>(row), keys.k_grid[first + i].step, keys.k_grid[first + i].min, D, to);
    if (i % 16 == 15 || i == count - 1)
      transpose(reinterpret_cast<uint32_t*>(rows), D, kMaxD, kKeys, reinterpret_cast<uint32_t*>(columns) + i / 16 * 16);
  }
  multiply((scratch.G + 7) / 8 * 8, (count + 15) / 16 * 16, D, scratch.q.get(), kMaxD, columns, kKeys, scratch.s.get(), kKeys,
           false);
}

Entries mass_entries(const MassArgs& a, int64_t b, int64_t h, int64_t t) {
  const int32_t* list = a.rule.lists ? a.rule.lists + b * a.rule.list_stride0 + h * a.rule.list_stride1 : nullptr;
  return entries(a.rule, a.rule.windows[h], list, a.rule.local_start ? a.rule.local_start[b] : 0, t, a.kv.P,
                 a.kv.sealed[b] * (a.kv.P / a.rule.unit));
}

// The mass that all queries of a (sequence, kv head) put on entries [first, last). Queries of one page attend the same
// entries, up to their own position, and go together: so keys are looked up, and decoded, once for kRows of them.
template <class T>
void add_mass(const MassArgs& a, int64_t b, int64_t h, int64_t first, int64_t last, Scratch& scratch, Chunk& keys,
              std::vector<float>& sums) {
  const Paged& kv = a.kv;
  const int64_t D = kv.D, G = a.G, held = a.seq_lens[b], start = held - a.T, per_chunk = chunk_entries(a.rule);
  const T* const q = static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * G * a.q.stride2;
  float* const mass = a.mass + (b * kv.H + h) * kv.M * kv.P;
  for (int64_t row = std::max<int64_t>(0, -start), next; row < a.T; row = next) {
    next = std::min({row + kRows, a.T, row + kv.P - (start + row) % kv.P});
    for (int64_t r = row; r < next; ++r)
      load_query(q + r * a.q.stride1, a.q.stride2, G, D, a.scale, scratch.q.get() + (r - row) * G * kMaxD);
    scratch.G = (next - row) * G;
    const Entries e = mass_entries(a, b, h, start + next - 1);
    const int64_t end = std::min<int64_t>(last, e.count());
    for (int64_t from = first; from < end; from += per_chunk) {
      keys.load(kv, a.rule, e, b, h, from, std::min(from + per_chunk, end), start + next - 1);
      sums.assign(keys.count(), 0.0f);
      const int64_t block = a.T == 1 ? scratch.chunk : kKeys;  // keys whose scores are made together
      for (int64_t i = 0; i < keys.count(); i += block) {
        const int64_t count = std::min(block, keys.count() - i);
        if (a.T == 1) score_chunk<T>(keys, D, scratch);
        else score_many<T>(keys, i, count, D, scratch);
        for (int64_t r = row; r < next; ++r) {
          const auto begin = keys.position.begin() + i;
          const int64_t seen = std::upper_bound(begin, begin + count, start + r) - begin;
          for (int64_t g = 0; g < G; ++g) {
            const float lse = a.lse[((b * a.T + r) * kv.H + h) * G + g];
            if (lse != -kInf) add_weights(scratch.s.get() + ((r - row) * G + g) * block, seen, lse, sums.data() + i);
          }
        }
      }
      for (int64_t j = 0; j < keys.count(); ++j) mass[keys.position[j]] += sums[j];
    }
  }
}

template <class T>
void mass_typed(const MassArgs& a) {
  const Paged& kv = a.kv;
  const int64_t G = a.G, per_chunk = chunk_entries(a.rule), tokens = kv.M * kv.P;
  check_windows("attention_mass", a.rule, kv.H);
  check_lengths("attention_mass", "seq_lens", kv, a.seq_lens);
  const auto entries_of = [&](int64_t b, int64_t h, int64_t t) { return mass_entries(a, b, h, t); };
  for (int64_t b = 0; b < kv.B; ++b) {
    if (a.rule.local_start && a.rule.local_start[b] < 0)
      fail_range("attention_mass: local_start", a.rule.local_start[b], 0, kDense, b);
    for (int64_t h = 0; h < kv.H; ++h)
      for (int64_t t = std::max<int64_t>(0, a.seq_lens[b] - a.T); t < a.seq_lens[b]; ++t)
        check_entries("attention_mass", kv, a.rule, entries_of(b, h, t), b, h);
  }
  // Chunks of a dense head, or of a single query, hold positions of their own, so threads may take them apart. Those of
  // other heads move with the query, and one thread takes them all.
  struct Unit {
    int64_t b, h, first, last;  // entries
  };
  std::vector<Unit> units;
  for (int64_t b = 0; b < kv.B; ++b)
    for (int64_t h = 0; h < kv.H && a.seq_lens[b] > 0; ++h) {
      const int64_t count = entries_of(b, h, a.seq_lens[b] - 1).count();
      const bool apart = a.T == 1 || a.rule.windows[h] == kDense;
      for (int64_t first = 0; first < count; first += apart ? per_chunk : count)
        units.push_back({b, h, first, apart ? first + per_chunk : INT64_MAX});
    }
  std::fill_n(a.mass, kv.B * kv.H * tokens, 0.0f);
  parallel_for(static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch((std::min(kRows, a.T) * G + 7) / 8 * 8, chunk_tokens(a.rule));
    Chunk keys;
    std::vector<float> sums;
    for (int64_t i = begin; i < end; ++i)
      add_mass<T>(a, units[i].b, units[i].h, units[i].first, units[i].last, scratch, keys, sums);
  });
}

template <class T>
void merge_typed(const MergeArgs& a) {
  parallel_for(a.rows, 64, [&](int64_t begin, int64_t end) {
    float x[kMaxD], y[kMaxD];
    for (int64_t row = begin; row < end; ++row) {
      const T *from_a = static_cast<const T*>(a.out_a) + row * a.D, *from_b = static_cast<const T*>(a.out_b) + row * a.D;
      for (int64_t d = 0; d < a.D; ++d) x[d] = to_float(from_a[d]), y[d] = to_float(from_b[d]);
      float lse = a.lse_a[row];
      if (lse == -kInf) std::fill_n(x, a.D, 0.0f);
      merge(x, &lse, y, a.lse_b[row], a.D);
      T* out = static_cast<T*>(a.out) + row * a.D;
      for (int64_t d = 0; d < a.D; ++d) out[d] = from_float<T>(x[d]);
      a.lse[row] = lse;
    }
  });
}

}  // namespace

void decode(const DecodeArgs& a) {
  dispatch(a.kv.dtype, [&](auto t) { decode_typed<decltype(t)>(a); });
}

void attention_mass(const MassArgs& a) {
  dispatch(a.kv.dtype, [&](auto t) { mass_typed<decltype(t)>(a); });
}

void merge_states(const MergeArgs& a) {
  dispatch(a.dtype, [&](auto t) { merge_typed<decltype(t)>(a); });
}

}  // namespace lserve::cpu
