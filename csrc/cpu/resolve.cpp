// Which slot a page lies in, where there are fewer slots than pages: the least recently used ones make room.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "check.h"

namespace lserve::cpu {
namespace {

// One kv head of one sequence.
struct Head {
  Head(const ResolveArgs& a, int64_t b, int64_t h)
      : list(a.lists + b * a.list_stride0 + h * a.list_stride1),
        blocks(a.block_table + b * a.block_stride0 + h * a.block_stride1),
        slots(a.slots + b * a.slots_stride0 + h * a.slots_stride1),
        table(a.slot_table + b * a.slot_stride0 + h * a.slot_stride1),
        pages(a.slot_pages + b * a.pages_stride0 + h * a.pages_stride1),
        last_use(a.last_use + b * a.use_stride0 + h * a.use_stride1),
        src(a.src_ids + (b * a.H + h) * a.K),
        dst(a.dst_ids + (b * a.H + h) * a.K),
        wanted(std::find(list, list + a.K, -1) - list) {}

  bool wants(int32_t page) const { return std::binary_search(list, list + wanted, page); }

  const int32_t *list, *blocks, *slots;
  int32_t *table, *pages, *last_use, *src, *dst;
  int64_t wanted;  // pages in the list
};

void check_head(const ResolveArgs& a, int64_t b, int64_t h) {
  const Head head(a, b, h);
  for (int64_t i = 0; i < a.K; ++i) {
    if (i < head.wanted) check_range("resolve_pages: lists", head.list[i], i > 0 ? head.list[i - 1] + 1 : 0, a.M - 1, b, h, i);
    else check_range("resolve_pages: lists", head.list[i], -1, -1, b, h, i);
  }
  int64_t usable = 0, needed = 0;  // slots
  for (int64_t s = 0; s < a.S; ++s) {
    check_range("resolve_pages: slots", head.slots[s], -1, INT32_MAX, b, h, s);
    check_range("resolve_pages: slot_pages", head.pages[s], -1, head.slots[s] < 0 ? -1 : a.M - 1, b, h, s);
    check_range("resolve_pages: last_use", head.last_use[s], 0, INT32_MAX - 1, b, h, s);
    if (head.pages[s] >= 0)
      check_range("resolve_pages: slot_table", head.table[head.pages[s]], head.slots[s], head.slots[s], b, h, head.pages[s]);
    usable += head.slots[s] >= 0;
    needed += head.pages[s] >= 0 && head.wants(head.pages[s]);
  }
  for (int64_t i = 0; i < head.wanted; ++i) needed += head.table[head.list[i]] < 0;
  if (needed > usable)
    throw std::runtime_error("lserve_ext::resolve_pages: slots: expected at least " + std::to_string(needed) +
                             " that are there, got " + std::to_string(usable) + " at [" + std::to_string(b) + ", " +
                             std::to_string(h) + "]");
}

void resolve(const ResolveArgs& a, int64_t b, int64_t h) {
  const Head head(a, b, h);
  const int32_t now = a.S > 0 ? 1 + *std::max_element(head.last_use, head.last_use + a.S) : 0;
  std::vector<int64_t> victims;
  for (int64_t s = 0; s < a.S; ++s) {
    if (head.pages[s] >= 0 && head.wants(head.pages[s])) head.last_use[s] = now;
    else if (head.slots[s] >= 0) victims.push_back(s);
  }
  const auto age = [&](int64_t s) { return head.pages[s] < 0 ? -1 : head.last_use[s]; };  // empty ones first
  std::stable_sort(victims.begin(), victims.end(), [&](int64_t x, int64_t y) { return age(x) < age(y); });
  auto victim = victims.begin();
  for (int64_t i = 0; i < a.K; ++i) {
    head.src[i] = head.dst[i] = -1;
    if (i >= head.wanted || head.table[head.list[i]] >= 0) continue;
    const int64_t s = *victim++;
    if (head.pages[s] >= 0) head.table[head.pages[s]] = -1;
    head.pages[s] = head.list[i], head.last_use[s] = now, head.table[head.list[i]] = head.slots[s];
    head.src[i] = head.blocks[head.list[i]], head.dst[i] = head.slots[s];
  }
}

}  // namespace

void resolve_pages(const ResolveArgs& a) {
  for (int64_t i = 0; i < a.B * a.H; ++i) check_head(a, i / a.H, i % a.H);
  parallel_for(a.B * a.H, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) resolve(a, i / a.H, i % a.H);
  });
}

}  // namespace lserve::cpu
