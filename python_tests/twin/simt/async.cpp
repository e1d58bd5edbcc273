// What goes on in the background: cp.async and wgmma; and mbarriers.
#include "scheduler.h"

namespace simt {

void async_issue(const Copy& copy) {
  AsHost as_host;
  count_copy(copy, __builtin_return_address(0));
  current->copies.open.push_back(copy);
}
void async_commit() {
  AsHost as_host;
  current->copies.commit();
}
bool async_complete(int keep, Copy* copy) {
  AsHost as_host;
  return current->copies.complete(keep, copy);
}

void product_issue(const Product& product) {
  AsHost as_host;
  current->products.open.push_back(product);
}
void product_commit() {
  AsHost as_host;
  current->products.commit();
}
bool product_complete(int keep, Product* product) {
  AsHost as_host;
  return current->products.complete(keep, product);
}

static MBarrier& find(uint64_t* bar, const Site& site) {
  auto found = block->mbarriers.find(bar);
  if (found == block->mbarriers.end()) fail(site, "no mbarrier was initialised at this address");
  return found->second;
}

static void advance(MBarrier& m) {
  if (m.pending) return;
  ++m.phase;
  m.pending = m.expected;
  for (int w : m.waiting) make_ready(w);
  m.waiting.clear();
}

void mbarrier_init(uint64_t* bar, unsigned count, Site site) {
  AsHost as_host;
  if (!is_shared(bar, 8) || (uintptr_t)bar % 8) fail(site, "an mbarrier must lie in shared memory, 8-byte aligned");
  MBarrier& m = block->mbarriers[bar];
  m.expected = m.pending = count;
}

void mbarrier_arrive(uint64_t* bar, Site site) {
  AsHost as_host;
  MBarrier& m = find(bar, site);
  if (m.pending == 0) fail(site, "more arrivals than the mbarrier expects");
  order_before(&m.token[m.phase & 1]);
  --m.pending;
  advance(m);
}

void mbarrier_wait(uint64_t* bar, unsigned parity, Site site) {
  AsHost as_host;
  MBarrier& m = find(bar, site);
  while ((m.phase & 1) == parity) {
    m.waiting.push_back(current->index);
    block_here(site);
  }
  order_after(&m.token[parity & 1]);
}

}  // namespace simt
