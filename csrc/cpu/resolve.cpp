// Which pages attention wants, and which slot each lies in, where there are fewer slots than pages: the least recently used
// ones make room.
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "rows.h"

namespace lserve::cpu {
namespace {

// What an entry of a list wants.
struct Wanted {
  int32_t block;
  int32_t* slot;  // in the table
};

Wanted wanted(const ResolveArgs& a, int64_t entry) {
  const int64_t b = entry / a.K / a.H, h = entry / a.K % a.H, i = entry % a.K;
  const int32_t page = a.lists[b * a.list_stride0 + h * a.list_stride1 + i];
  if (page < 0) return {-1, nullptr};
  return {blocks_of(a, b, h)[page], slots_of(a, b, h) + page};
}

bool is_hit(const ResolveArgs& a, const Wanted& w) { return *w.slot >= 0 && a.slot_blocks[*w.slot] == w.block; }

void check(const ResolveArgs& a) {
  std::vector<int64_t> list_of(a.M, -1);  // that a page was seen in last
  for (int64_t entry = 0; entry < a.B * a.H * a.K; ++entry) {
    const int64_t list = entry / a.K, b = list / a.H, h = list % a.H, i = entry % a.K;
    const int32_t page = a.lists[b * a.list_stride0 + h * a.list_stride1 + i];
    check_range("resolve_pages: lists", page, -1, a.M - 1, b, h, i);
    if (page < 0) continue;
    if (list_of[page] == list)
      throw std::runtime_error("lserve_ext::resolve_pages: lists: expected each page once in a list, got " +
                               std::to_string(page) + " twice at [" + std::to_string(b) + ", " + std::to_string(h) + "]");
    list_of[page] = list;
    const Wanted w = wanted(a, entry);
    check_range("resolve_pages: block_table", w.block, 0, INT32_MAX, b, h, page);
    check_range("resolve_pages: slot_table", *w.slot, -1, a.S - 1, b, h, page);
  }
  check_range("resolve_pages: clock", a.clock[0], 0, INT32_MAX - 1, 0);
  for (int64_t s = 0; s < a.S; ++s) {
    check_range("resolve_pages: slot_blocks", a.slot_blocks[s], -1, INT32_MAX, s);
    check_range("resolve_pages: last_use", a.last_use[s], 0, a.clock[0], s);
  }
}

}  // namespace

void wanted_pages(const WantedArgs& a) {
  const Mask& mask = a.mask;
  const auto entries_of = [&](int64_t b, int64_t h) { return attended(mask, b, h, std::max(a.first[b], 0), a.P, a.sealed[b]); };
  check_windows("wanted_pages", mask, a.H);
  for (int64_t b = 0; b < a.B; ++b) {
    check_range("wanted_pages: sealed", a.sealed[b], 0, a.M, b);
    check_range("wanted_pages: first", a.first[b], -1, kDense - 1, b);
    for (int64_t h = 0; h < a.H; ++h) check_list("wanted_pages", mask, entries_of(b, h), b, h);
  }
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t h = 0; h < a.H; ++h) {
      const AttendedUnits e = entries_of(b, h);
      const int32_t* blocks = blocks_of(a, b, h);
      int32_t* pages = a.pages + (b * a.H + h) * a.M;
      int64_t count = 0;
      for (int64_t page = 0; page < a.sealed[b]; ++page)
        if (blocks[page] >= 0 && wants_page(e, page, mask.page_units)) pages[count++] = static_cast<int32_t>(page);
      std::fill(pages + count, pages + a.M, -1);
      a.counts[b * a.H + h] = static_cast<int32_t>(count);
    }
  }
}

void resolve_pages(const ResolveArgs& a) {
  check(a);
  const int64_t entries = a.B * a.H * a.K;
  std::vector<int64_t> misses;
  std::vector<bool> is_wanted(a.S);
  int64_t hits = 0, wants = 0;
  const auto use = [&](int32_t now) { return ++wants <= a.keep ? now : 0; };
  for (int64_t entry = 0; entry < entries; ++entry) {
    const Wanted w = wanted(a, entry);
    if (!w.slot) continue;
    if (!is_hit(a, w)) {
      misses.push_back(entry);
    } else if (!is_wanted[*w.slot]) {
      is_wanted[*w.slot] = true;
      ++hits;
    }
  }
  const int64_t count = static_cast<int64_t>(misses.size());
  if (hits + count > a.S)
    throw std::runtime_error("lserve_ext::resolve_pages: slot_blocks: expected at least " + std::to_string(hits + count) +
                             " slots for what lists want, got " + std::to_string(a.S));
  const int32_t now = ++a.clock[0];
  for (int64_t s = 0; s < a.S; ++s)
    if (is_wanted[s]) a.last_use[s] = now;
  std::vector<int64_t> victims(a.S);
  std::iota(victims.begin(), victims.end(), 0);
  std::partial_sort(victims.begin(), victims.begin() + count, victims.end(), [&](int64_t x, int64_t y) {
    return a.last_use[x] != a.last_use[y] ? a.last_use[x] < a.last_use[y] : x < y;
  });
  std::sort(victims.begin(), victims.begin() + count);
  std::fill_n(a.src_ids, entries, -1);
  std::fill_n(a.dst_ids, entries, -1);
  for (int64_t entry = 0, n = 0; entry < entries; ++entry) {
    const Wanted w = wanted(a, entry);
    if (!w.slot) continue;
    if (n < count && misses[n] == entry) {
      const int32_t s = static_cast<int32_t>(victims[n++]);
      a.slot_blocks[s] = a.src_ids[entry] = w.block;
      *w.slot = a.dst_ids[entry] = s;
    }
    a.last_use[*w.slot] = use(now);
  }
}

}  // namespace lserve::cpu
