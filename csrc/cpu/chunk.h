// The tokens of a chunk of a sequence's entries, wherever they lie, as pointers to their rows.
#pragma once
#include <vector>

#include "gemv.h"
#include "rows.h"

namespace lserve::cpu {

inline int64_t chunk_entries(const Mask& mask) { return std::max<int64_t>(1, kChunkTokens / mask.unit); }
inline int64_t chunk_tokens(const Mask& mask) { return chunk_entries(mask) * mask.unit; }

struct Chunk {
  // Neighbours of one type and, with statistics, one group.
  struct Span {
    int64_t first, count;
    bool floating;     // in the model's dtype, else codes
    const void* grid;  // of the keys: stats [2, D]; null: (step, min) a token
  };
  std::vector<Span> spans;
  std::vector<int64_t> position;
  std::vector<const void*> k, v;          // rows [D], and kAhead that are read after them
  std::vector<TokenGrid> k_grid, v_grid;  // of codes
  int64_t count = 0;

  explicit Chunk(int64_t tokens) : position(tokens), k(tokens + kAhead), v(tokens + kAhead), k_grid(tokens), v_grid(tokens) {}

  // Units [first, last) of the query at position t, without those that were freed.
  void load(const PagedKV& kv, const Mask& mask, const AttendedUnits& e, int64_t b, int64_t h, int64_t first, int64_t last,
            int64_t t) {
    spans.clear();
    count = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = e[i] * mask.unit;
      add(kv, cached_run(kv, b, h, begin, std::min(begin + mask.unit, t + 1) - begin));
    }
  }

 private:
  void add(const PagedKV& kv, const Run& run) {
    const int64_t size = width(run.floating ? kv.dtype : Dtype::u8);
    for (int64_t i = 0; i < run.count; ++i) {
      position[count + i] = run.position + i;
      k[count + i] = at(run.k, i * run.k_stride, size);
      v[count + i] = at(run.v, i * run.v_stride, size);
    }
    if (run.k_scales) std::memcpy(&k_grid[count], run.k_scales, run.count * sizeof(TokenGrid));
    if (run.v_scales) std::memcpy(&v_grid[count], run.v_scales, run.count * sizeof(TokenGrid));
    for (int64_t i = 0, next; i < run.count; i = next) {
      const bool grouped = !run.floating && run.stats;
      const int64_t group = grouped ? (run.offset + i) / kv.L : 0;
      next = grouped ? std::min(run.count, (group + 1) * kv.L - run.offset) : run.count;
      const void* grid = grouped ? at(run.stats, group * 2 * kv.D, width(kv.dtype)) : nullptr;
      if (spans.empty() || spans.back().floating != run.floating || spans.back().grid != grid) {
        spans.push_back({count + i, 0, run.floating, grid});
        if (grid) prefetch<char>(grid, 2 * kv.D * width(kv.dtype));
      }
      spans.back().count += next - i;
    }
    count += run.count;
  }
};

// s [count, columns(heads)]: scores of a chunk's keys against `heads` query heads. `grid` is somewhere to unpack.
template <class T>
void score_chunk(const Chunk& chunk, int64_t heads, const float* q, int64_t D, ChannelGrid& grid, float* s) {
  for (const auto& span : chunk.spans) {
    const void* const* rows = chunk.k.data() + span.first;
    float* to = s + span.first * columns(heads);
    if (span.floating) {
      score(heads, q, PlainKeys<T>{}, rows, span.count, D, to);
    } else if (span.grid) {
      load_grid(static_cast<const T*>(span.grid), D, grid);
      score(heads, q, GroupKeys{grid}, rows, span.count, D, to);
    } else {
      score(heads, q, TokenKeys{chunk.k_grid.data() + span.first}, rows, span.count, D, to);
    }
  }
}

}  // namespace lserve::cpu
