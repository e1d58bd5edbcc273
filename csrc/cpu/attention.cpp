// decode, attention_mass and merge_states: attention of a few queries over sink, list and local.
//
// A sequence's entries are cut every kChunkTokens tokens. A chunk is scored, normalised and kept as
// (out, lse); partials are then folded in list order. INT8 is not unpacked to memory: with k = min + step * code,
// q·k = q·min + (q * step)·code, so a group's grid is folded into the query once, and V's into the weights.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "rule.h"
#include "simd.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxD = 256;
constexpr int64_t kHeads = 4;  // query heads that share a loaded row

// A copy of the compiler's choice for loops over heads: their count is known when it is inlined.
template <int Heads, class X>
LSERVE_INLINE void dot_rows(const float* q, const X* rows, int64_t stride, int64_t count, int64_t D, float* s, int64_t s_stride) {
  constexpr int R = Heads > 2 ? 2 : 4;  // rows at a time: enough sums in flight to hide the latency of an addition
  for (int64_t i = 0; i < count; i += R) {
    const X* row[R];
    for (int r = 0; r < R; ++r) row[r] = rows + std::min(i + r, count - 1) * stride;
    wide acc[R][Heads] = {};
    for (int64_t d = 0; d < D; d += 16) {
      wide x[R];
      for (int r = 0; r < R; ++r) x[r] = load_wide(row[r] + d);
      for (int g = 0; g < Heads; ++g) {
        const wide y = load_wide(q + g * kMaxD + d);
        for (int r = 0; r < R; ++r) acc[r][g] += x[r] * y;
      }
    }
    for (int r = 0; r < R && i + r < count; ++r)
      for (int g = 0; g < Heads; ++g) s[g * s_stride + i + r] = sum(bit_cast<f32x16>(acc[r][g]));
  }
}

// s[g][i] = q[g] · rows[i]
template <class X>
LSERVE_CLONES void dots(int64_t G, const float* q, const X* rows, int64_t stride, int64_t count, int64_t D, float* s, int64_t s_stride) {
  for (int64_t g = 0; g < G; g += kHeads) {
    const float* qg = q + g * kMaxD;
    float* sg = s + g * s_stride;
    switch (G - g) {
      case 1: dot_rows<1>(qg, rows, stride, count, D, sg, s_stride); break;
      case 2: dot_rows<2>(qg, rows, stride, count, D, sg, s_stride); break;
      case 3: dot_rows<3>(qg, rows, stride, count, D, sg, s_stride); break;
      default: dot_rows<4>(qg, rows, stride, count, D, sg, s_stride);
    }
  }
}

template <int Heads, int Vectors, class X>
LSERVE_INLINE void add_columns(const float* w, int64_t w_stride, const X* rows, int64_t stride, int64_t count, float* acc) {
  wide sums[Heads][Vectors];
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Vectors; ++v) sums[g][v] = load_wide(acc + g * kMaxD + v * 16);
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < Vectors; ++v) {
      const wide x = load_wide(rows + i * stride + v * 16);
      for (int g = 0; g < Heads; ++g) sums[g][v] += x * w[g * w_stride + i];
    }
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Vectors; ++v) std::memcpy(acc + g * kMaxD + v * 16, &sums[g][v], sizeof(wide));
}

template <int Heads, class X>
LSERVE_INLINE void add_heads(const float* w, int64_t w_stride, const X* rows, int64_t stride, int64_t count, int64_t D, float* acc) {
  int64_t d = 0;
  for (; d + 64 <= D; d += 64) add_columns<Heads, 4>(w, w_stride, rows + d, stride, count, acc + d);
  for (; d < D; d += 16) add_columns<Heads, 1>(w, w_stride, rows + d, stride, count, acc + d);
}

// acc[g] += Σ_i w[g][i] rows[i]
template <class X>
LSERVE_CLONES void add_rows(int64_t G, const float* w, int64_t w_stride, const X* rows, int64_t stride, int64_t count, int64_t D, float* acc) {
  for (int64_t g = 0; g < G; g += kHeads) {
    const float* wg = w + g * w_stride;
    float* ag = acc + g * kMaxD;
    switch (G - g) {
      case 1: add_heads<1>(wg, w_stride, rows, stride, count, D, ag); break;
      case 2: add_heads<2>(wg, w_stride, rows, stride, count, D, ag); break;
      case 3: add_heads<3>(wg, w_stride, rows, stride, count, D, ag); break;
      default: add_heads<4>(wg, w_stride, rows, stride, count, D, ag);
    }
  }
}

// What one thread works with: the query group, and the scores of one chunk.
struct Scratch {
  Scratch(int64_t G, int64_t chunk)
      : G(G), chunk(chunk), q(new float[G * kMaxD]), folded(new float[G * kMaxD]), base(new float[G]),
        s(new float[G * chunk]), w(new float[G * chunk]), acc(new float[G * kMaxD]) {}
  int64_t G, chunk;
  std::unique_ptr<float[]> q;       // [G, kMaxD] query heads, scaled
  std::unique_ptr<float[]> folded;  // [G, kMaxD] times a group's steps
  std::unique_ptr<float[]> base;    // [G] the grid's constant part
  std::unique_ptr<float[]> s;       // [G, chunk] scores, then weights
  std::unique_ptr<float[]> w;       // [G, chunk] weights times V's steps
  std::unique_ptr<float[]> acc;     // [G, kMaxD]
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

LSERVE_CLONES void sum_query(int64_t G, int64_t D, const float* q, float* sums) {
  for (int64_t g = 0; g < G; ++g) {
    f32x16 total = {};
    for (int64_t d = 0; d < D; d += 16) total += load(q + g * kMaxD + d);
    sums[g] = sum(total);
  }
}

// Scores of one run against the query group, into s[g * chunk + ...].
template <class T>
void score_run(const Run& run, int64_t D, int64_t L, const Scratch& scratch, float* s) {
  const int64_t G = scratch.G, chunk = scratch.chunk;
  const float* q = scratch.q.get();
  if (run.raw) return dots(G, q, static_cast<const T*>(run.k), run.k_stride, run.count, D, s, chunk);
  const auto* codes = static_cast<const uint8_t*>(run.k);
  float* base = scratch.base.get();
  if (run.k_scales) {  // a grid a token
    dots(G, q, codes, run.k_stride, run.count, D, s, chunk);
    sum_query(G, D, q, base);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < run.count; ++i)
        s[g * chunk + i] = run.k_scales[2 * i + 1] * base[g] + run.k_scales[2 * i] * s[g * chunk + i];
    return;
  }
  for (int64_t i = 0, count; i < run.count; i += count) {  // a grid a group and channel
    const int64_t group = (run.offset + i) / L;
    count = std::min(run.count - i, (group + 1) * L - run.offset - i);
    fold_grid(static_cast<const T*>(run.stats) + group * 2 * D, G, D, q, scratch.folded.get(), base);
    dots(G, scratch.folded.get(), codes + i * run.k_stride, run.k_stride, count, D, s + i, chunk);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t j = 0; j < count; ++j) s[g * chunk + i + j] += base[g];
  }
}

// acc[g][...] += base[g]
LSERVE_CLONES void add_constant(int64_t G, int64_t D, const float* base, float* acc) {
  for (int64_t g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; d += 16) store(acc + g * kMaxD + d, load(acc + g * kMaxD + d) + base[g]);
}

// acc[g] += Σ_i weight[g][i] v[i] over one run.
template <class T>
void weigh_run(const Run& run, int64_t D, const Scratch& scratch, const float* weights) {
  const int64_t G = scratch.G, chunk = scratch.chunk;
  float *acc = scratch.acc.get(), *w = scratch.w.get(), *base = scratch.base.get();
  if (run.raw) return add_rows(G, weights, chunk, static_cast<const T*>(run.v), run.v_stride, run.count, D, acc);
  for (int64_t g = 0; g < G; ++g) {
    base[g] = 0;
    for (int64_t i = 0; i < run.count; ++i) {
      w[g * chunk + i] = weights[g * chunk + i] * run.v_scales[2 * i];
      base[g] += weights[g * chunk + i] * run.v_scales[2 * i + 1];
    }
  }
  add_constant(G, D, base, acc);
  add_rows(G, w, chunk, static_cast<const uint8_t*>(run.v), run.v_stride, run.count, D, acc);
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

// Cuts [first, last) of the entries into runs of tokens that lie together.
std::vector<Run> chunk_runs(const Paged& kv, const Rule& rule, const Entries& e, int64_t b, int64_t h, int64_t first, int64_t last, int64_t t) {
  std::vector<Run> runs;
  for (int64_t i = first; i < last;) {
    const int64_t begin = e[i] * rule.unit;
    int64_t end = begin + rule.unit;
    const int64_t page_end = (begin / kv.P + 1) * kv.P;
    for (++i; i < last && end < page_end && e[i] * rule.unit == end; ++i) end += rule.unit;
    const Run run = cached_run(kv, b, h, begin, std::min(end, t + 1) - begin);
    if (run.count > 0) runs.push_back(run);
  }
  return runs;
}

int64_t chunk_entries(const Rule& rule) { return std::max<int64_t>(1, kChunkTokens / rule.unit); }
int64_t chunk_tokens(const Rule& rule) { return chunk_entries(rule) * rule.unit; }

template <class T>
void decode_chunk(const DecodeArgs& a, const std::vector<Run>& runs, int64_t b, int64_t h, Scratch& scratch, float* out, float* lse) {
  const int64_t D = a.kv.D, G = a.G, chunk = scratch.chunk;
  load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * G * a.q.stride1, a.q.stride1, G, D, a.scale, scratch.q.get());
  float* s = scratch.s.get();
  int64_t count = 0;
  for (const Run& run : runs) {
    score_run<T>(run, D, a.kv.L, scratch, s + count);
    count += run.count;
  }
  float shift[1], total[1];
  std::fill_n(scratch.acc.get(), G * kMaxD, 0.0f);
  for (int64_t g = 0; g < G; ++g) {
    soften(s + g * chunk, count, shift, total);
    lse[g] = total[0] == 0 ? -kInf : shift[0] + std::log(total[0]);
    const float scale = total[0] == 0 ? 0.0f : 1.0f / total[0];
    for (int64_t i = 0; i < count; ++i) s[g * chunk + i] *= scale;
  }
  int64_t done = 0;
  for (const Run& run : runs) {
    weigh_run<T>(run, D, scratch, s + done);
    done += run.count;
  }
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
  check_lengths("decode", kv, a.lengths);
  std::vector<Entries> all(heads);
  std::vector<int64_t> first(heads + 1, 0);  // chunks before a (sequence, kv head)
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t b = i / kv.H, h = i % kv.H, t = a.lengths[b] - 1;
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
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first[i + 1]) ++i;
      const int64_t b = i / kv.H, h = i % kv.H, from = (c - first[i]) * per_chunk;
      const auto runs = chunk_runs(kv, a.rule, all[i], b, h, from, std::min(from + per_chunk, all[i].count()), a.lengths[b] - 1);
      decode_chunk<T>(a, runs, b, h, scratch, outs.get() + c * G * D, lses.get() + c * G);
    }
  });

  parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
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

template <class T>
void mass_typed(const MassArgs& a) {
  const Paged& kv = a.kv;
  const int64_t D = kv.D, G = a.G, per_chunk = chunk_entries(a.rule), tokens = kv.M * kv.P;
  check_windows("attention_mass", a.rule, kv.H);
  check_lengths("attention_mass", kv, a.lengths);
  const auto entries_of = [&](int64_t b, int64_t h, int64_t t) {
    const int32_t* list = a.rule.lists ? a.rule.lists + b * a.rule.list_stride0 + h * a.rule.list_stride1 : nullptr;
    return entries(a.rule, a.rule.windows[h], list, a.rule.local_start ? a.rule.local_start[b] : 0, t, kv.P,
                   kv.sealed[b] * (kv.P / a.rule.unit));
  };
  for (int64_t b = 0; b < kv.B; ++b) {
    if (a.rule.local_start && a.rule.local_start[b] < 0) fail_range("attention_mass: local_start", a.rule.local_start[b], 0, kDense, b);
    for (int64_t h = 0; h < kv.H; ++h)
      for (int64_t t = std::max<int64_t>(0, a.lengths[b] - a.T); t < a.lengths[b]; ++t)
        check_entries("attention_mass", kv, a.rule, entries_of(b, h, t), b, h);
  }
  parallel_for(kv.B * kv.H, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(G, chunk_tokens(a.rule));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / kv.H, h = i % kv.H;
      float* mass = a.mass + i * tokens;
      std::fill_n(mass, tokens, 0.0f);
      for (int64_t row = std::max<int64_t>(0, a.T - a.lengths[b]); row < a.T; ++row) {
        const int64_t t = a.lengths[b] - a.T + row;
        const float* lse = a.lse + ((b * a.T + row) * kv.H + h) * G;
        if (std::all_of(lse, lse + G, [](float x) { return x == -kInf; })) continue;
        load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + row * a.q.stride1 + h * G * a.q.stride2, a.q.stride2, G, D, a.scale,
                   scratch.q.get());
        const Entries e = entries_of(b, h, t);
        for (int64_t from = 0; from < e.count(); from += per_chunk)
          for (const Run& run : chunk_runs(kv, a.rule, e, b, h, from, std::min(from + per_chunk, e.count()), t)) {
            score_run<T>(run, D, kv.L, scratch, scratch.s.get());
            for (int64_t j = 0; j < run.count; ++j)
              for (int64_t g = 0; g < G; ++g)
                if (lse[g] != -kInf) mass[run.position + j] += std::exp(scratch.s[g * scratch.chunk + j] - lse[g]);
          }
      }
    }
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
