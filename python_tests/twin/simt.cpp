// Compiled WITHOUT sanitizers; it tells them of fibers by hand. For ThreadSanitizer everything in here happens in the
// host's fiber (see AsHost), so that the machine's own bookkeeping neither races nor orders the kernel's threads.
#include "simt.h"

#include <driver_types.h>

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#ifdef SIMT_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif
#ifdef SIMT_TSAN
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned);
extern "C" void __tsan_destroy_fiber(void*);
extern "C" void __tsan_switch_to_fiber(void*, unsigned);
extern "C" void __tsan_set_fiber_name(void*, const char*);
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch,.-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  uint3 thread{};
  int index = 0;
  bool exited = false;
  const Site* waits = nullptr;  // where it is blocked
  Site site{};
  std::deque<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
  std::deque<std::deque<Product>> products;  // committed
  std::deque<Product> open_products;
};

struct Meeting {  // of lanes of one warp, or of threads at a barrier
  unsigned arrived = 0;
  int count = 0, expected = 0, phase = 0;
  Site site{};
  void* payload[32];
  std::vector<int> waiting;
  int value = 0, result = 0;
  char token[2];
};

struct MBarrier {
  unsigned expected = 0, pending = 0, phase = 0;
  long transactions = 0;
  std::vector<Copy> copies;
  std::vector<int> waiting;
  char token[2], issued;
};

struct Block {
  std::vector<std::map<unsigned, Meeting>> warps;  // of each warp, by mask
  Meeting barriers[16];
  std::map<size_t, std::pair<void*, size_t>> shared;
  std::unordered_map<uint64_t*, MBarrier> mbarriers;
  size_t shared_bytes = 0;
  int live = 0;
  Fiber async;  // who the bulk copies are, for ThreadSanitizer
};

Fiber host;
std::vector<Fiber> fibers;
std::vector<int> ready;
size_t ready_head = 0;
Fiber* current = &host;
Block* block = nullptr;
void (*kernel_body)(void*) = nullptr;
void* kernel_argument = nullptr;
Order schedule = [] {  // SIMT_ORDER: forward, reverse, or the seed of a random order
  const char* order = getenv("SIMT_ORDER");
  if (!order || !strcmp(order, "forward")) return Order::forward;
  return strcmp(order, "reverse") ? Order::random : Order::reverse;
}();
std::mt19937 random_bits(getenv("SIMT_ORDER") ? atoi(getenv("SIMT_ORDER")) : 0);
std::deque<void*> dead;
constexpr size_t kDeadFibers = 1024;
Stats counters{};
std::unordered_set<uintptr_t> sectors;  // that were copied

void count_copy(const Copy& copy) {
  counters.copied_bytes += copy.read;
  for (uintptr_t byte = 0; byte < copy.read; byte += 16) sectors.insert(((uintptr_t)copy.from + byte) / 32);
}
char launch_begin, launch_end;

void switch_to(Fiber* next, bool leaving = false) {
  Fiber* self = current;
  if (next == self) return;
  current = next;
  threadIdx = next->thread;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(leaving ? nullptr : &self->fake, next->stack, kStackBytes);
#endif
  (void)leaving;
  simt_switch(&self->sp, next->sp);
#ifdef SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self->fake, &bottom, &size);
  if (current != &host && !host.stack) host.stack = (char*)bottom;
#endif
}

Fiber* identity = &host;  // as whom ThreadSanitizer sees us

void become(Fiber* fiber) {
  identity = fiber;
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(fiber->tsan, 1 /* no synchronisation */);
#endif
}
// The calling CUDA thread: what it did before order_before(t) happens before what follows an order_after(t).
void order_after(void* token) {
#ifdef SIMT_TSAN
  become(current);
  __tsan_acquire(token);
  become(&host);
#endif
  (void)token;
}
void order_before(void* token) {
#ifdef SIMT_TSAN
  become(current);
  __tsan_release(token);
  become(&host);
#endif
  (void)token;
}
struct AsHost {
  Fiber* before = identity;
  AsHost() { become(&host); }
  ~AsHost() { become(before); }
};

void make_ready(int index) { ready.push_back(index); }

void report_deadlock() {
  fprintf(stderr, "simt: block (%u,%u,%u): no thread can go on\n", blockIdx.x, blockIdx.y, blockIdx.z);
  std::map<std::string, std::vector<int>> places;
  for (auto& f : fibers) {
    char text[512];
    if (f.exited) snprintf(text, sizeof text, "has returned");
    else snprintf(text, sizeof text, "waits in %s at %s:%d", f.site.what, f.site.file, f.site.line);
    places[text].push_back(f.index);
  }
  for (auto& [text, who] : places) {
    fprintf(stderr, "  %zu thread(s) %s:", who.size(), text.c_str());
    for (size_t i = 0; i < who.size() && i < 8; ++i) fprintf(stderr, " %d", who[i]);
    fprintf(stderr, who.size() > 8 ? " ...\n" : "\n");
  }
  abort();
}

bool deliver_bulk_copy();

Fiber* pick() {
  while (ready_head == ready.size()) {
    ready.clear();
    ready_head = 0;
    if (block->live == 0) return &host;
    if (!deliver_bulk_copy()) report_deadlock();
  }
  if (schedule == Order::reverse) {  // last in, first out
    int index = ready.back();
    ready.pop_back();
    return &fibers[index];
  }
  if (schedule == Order::random) std::swap(ready[ready_head], ready[ready_head + random_bits() % (ready.size() - ready_head)]);
  return &fibers[ready[ready_head++]];
}

void block_here(const Site& site) {
  current->site = site;
  switch_to(pick());
}

extern "C" void simt_fiber_main() {
#ifdef SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!host.stack) host.stack = (char*)bottom;
#endif
  order_after(&launch_begin);
  become(current);
  kernel_body(kernel_argument);
  become(&host);
  Fiber* self = current;
  for (auto& group : self->groups) counters.copies_never_waited += group.size();
  counters.copies_never_waited += self->open.size();
  self->exited = true;
  order_before(&launch_end);
  --block->live;
  switch_to(pick(), true);
  abort();
}

void prepare(Fiber& f) {
  if (!f.stack) {
    f.stack = (char*)mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(f.stack, 4096, PROT_NONE);
  }
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(f.stack, kStackBytes);
#endif
#ifdef SIMT_TSAN  // a new mapping forgets the last block's accesses to this stack
  mmap(f.stack + 4096, kStackBytes - 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
  f.tsan = __tsan_create_fiber(0);
  char name[64];
  snprintf(name, sizeof name, "block %u,%u,%u thread %d", blockIdx.x, blockIdx.y, blockIdx.z, f.index);
  __tsan_set_fiber_name(f.tsan, name);
#endif
  void** top = (void**)(f.stack + kStackBytes - 64);
  *--top = nullptr;  // return address of simt_fiber_main; keeps the ABI's alignment
  *--top = (void*)simt_fiber_main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
  f.exited = false;
  f.fake = nullptr;
  f.groups.clear();
  f.open.clear();
  f.products.clear();
  f.open_products.clear();
}

float bf16_value(uint16_t bits) {
  uint32_t u = uint32_t(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

float f16_value(uint16_t bits) {
  uint32_t u = (bits & 0x7fffu) << 13;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f;
  if ((bits & 0x7c00) == 0x7c00) {
    memcpy(&u, &f, 4);
    u |= 0xffu << 23;
    memcpy(&f, &u, 4);
  }
  return bits & 0x8000 ? -f : f;
}

template <float (*value)(uint16_t)>
void mma_m16n8k16(void* const payload[32]) {
  float a[16][16], b[16][8], d[16][8];
  for (int t = 0; t < 32; ++t) {
    const Mma& p = *(const Mma*)payload[t];
    int g = t / 4, c = t % 4 * 2;
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) a[g + (r & 1) * 8][c + (r >> 1) * 8 + h] = value(p.a[r] >> (16 * h));
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) b[c + r * 8 + h][g] = value(p.b[r] >> (16 * h));
    for (int r = 0; r < 4; ++r) d[g + (r >> 1) * 8][c + (r & 1)] = p.c[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int t = 0; t < 32; ++t) {
    const Mma& p = *(const Mma*)payload[t];
    for (int r = 0; r < 4; ++r) p.d[r] = d[t / 4 + (r >> 1) * 8][t % 4 * 2 + (r & 1)];
  }
  ++counters.mma;
}

}  // namespace

void fail(const Site& site, const char* format, ...) {
  fprintf(stderr, "simt: %s:%d: %s: block (%u,%u,%u) thread (%u,%u,%u): ", site.file, site.line, site.what, blockIdx.x,
          blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list list;
  va_start(list, format);
  vfprintf(stderr, format, list);
  va_end(list);
  fprintf(stderr, "\n");
  abort();
}

void set_order(Order order, unsigned seed) {
  schedule = order;
  random_bits.seed(seed);
}

void launch(dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  int count = threads.x * threads.y * threads.z;
  gridDim = grid;
  blockDim = threads;
  kernel_body = body;
  kernel_argument = argument;
  if (fibers.size() != size_t(count)) {
    for (auto& f : fibers) munmap(f.stack, kStackBytes);
    fibers.clear();
    fibers.resize(count);
  }
#ifdef SIMT_TSAN
  host.tsan = __tsan_get_current_fiber();
  __tsan_release(&launch_begin);
#endif
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (schedule == Order::reverse) std::reverse(order.begin(), order.end());
  if (schedule == Order::random) std::shuffle(order.begin(), order.end(), random_bits);
  for (unsigned b : order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    block = new Block;
    block->warps.resize((count + 31) / 32);
    block->shared_bytes = shared_bytes;
    block->live = count;
    ready.clear();
    ready_head = 0;
    for (int t = 0; t < count; ++t) {
      Fiber& f = fibers[t];
      f.index = t;
      f.thread = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
      prepare(f);
      make_ready(t);
    }
#ifdef SIMT_TSAN
    block->async.tsan = __tsan_create_fiber(0);
#endif
    switch_to(pick());
#ifdef SIMT_TSAN
    // A new fiber takes the number of a dead one and so seems to come after it: the last blocks' fibers live on.
    dead.push_back(block->async.tsan);
    for (auto& f : fibers) dead.push_back(f.tsan);
    for (; dead.size() > kDeadFibers; dead.pop_front()) __tsan_destroy_fiber(dead.front());
    Fiber reaper;  // ordered after the block's threads, as the host is not: blocks stay unordered among themselves
    reaper.tsan = __tsan_create_fiber(0);
    become(&reaper);
    __tsan_acquire(&launch_end);
#endif
    for (auto& [offset, array] : block->shared) free(array.first);
#ifdef SIMT_TSAN
    become(&host);
    __tsan_destroy_fiber(reaper.tsan);
#endif
    delete block;
    ++counters.blocks;
  }
  const Site here{"launch", __FILE__, __LINE__};
  if (counters.ldmatrix_conflicts) fail(here, "%ld bank conflicts of ldmatrix", counters.ldmatrix_conflicts);
  if (counters.copies_never_waited)
    fail(here, "%ld copies to shared memory that nobody waited for", counters.copies_never_waited);
#ifdef SIMT_TSAN
  __tsan_acquire(&launch_end);
  for (void* fiber : dead) __tsan_destroy_fiber(fiber);
  dead.clear();
#endif
  block = nullptr;
}

void* shared_array(size_t offset, size_t bytes) {
  AsHost as_host;
  Site site{"shared memory", "", 0};
  auto found = block->shared.find(offset);
  if (found == block->shared.end()) {
    if (offset + bytes > block->shared_bytes)
      fail(site, "array [%zu, %zu) is past the %zu bytes of the launch", offset, offset + bytes, block->shared_bytes);
    void* p;
    if (posix_memalign(&p, 1024, bytes)) abort();
    memset(p, 0xff, bytes);
#ifdef SIMT_TSAN
    __tsan_release(p);
#endif
    found = block->shared.emplace(offset, std::make_pair(p, bytes)).first;
  } else if (found->second.second != bytes) {
    fail(site, "two arrays of different size at offset %zu", offset);
  }
  order_after(found->second.first);
  return found->second.first;
}

bool is_shared(const void* address, size_t bytes) {
  AsHost as_host;
  for (auto& [offset, array] : block->shared)
    if (address >= array.first && (char*)address + bytes <= (char*)array.first + array.second) return true;
  return false;
}

void barrier(int id, int threads, Site site) {
  AsHost as_host;
  Meeting& m = block->barriers[id];
  int expected = threads ? threads : int(fibers.size());
  if (m.count == 0) {
    m.site = site;
    m.expected = expected;
  } else if (m.site.line != site.line || strcmp(m.site.file, site.file) || m.expected != expected) {
    fail(site, "divergent barrier: others of this block wait at %s:%d", m.site.file, m.site.line);
  }
  int phase = m.phase;
  order_before(&m.token[phase & 1]);
  if (++m.count == m.expected) {
    ++counters.barriers;
    m.count = 0;
    ++m.phase;
    for (int w : m.waiting) make_ready(w);
    m.waiting.clear();
    if (schedule != Order::forward) {  // let others go first
      make_ready(current->index);
      block_here(site);
    }
  } else {
    m.waiting.push_back(current->index);
    block_here(site);
  }
  order_after(&m.token[phase & 1]);
}

int barrier_reduce(int value, int op, Site site) {
  Meeting& m = block->barriers[0];
  if (m.count == 0) m.value = op == 0;
  m.value = op == 0 ? (m.value && value) : op == 1 ? (m.value || value) : m.value + (value != 0);
  if (m.count + 1 == int(fibers.size())) m.result = m.value;
  barrier(0, 0, site);
  return m.result;
}

void warp_operation(unsigned mask, void* payload, WarpFunction run, Site site) {
  AsHost as_host;
  int lane = current->index % 32, base = current->index - lane;
  if (!(mask >> lane & 1)) fail(site, "lane %d is not in its own mask %08x", lane, mask);
  Meeting& m = block->warps[base / 32][mask];
  if (m.arrived == 0) {
    m.site = site;
  } else if (m.site.line != site.line || strcmp(m.site.file, site.file)) {
    fail(site, "divergent warp operation: other lanes are in %s at %s:%d", m.site.what, m.site.file, m.site.line);
  }
  m.arrived |= 1u << lane;
  m.payload[lane] = payload;
  bool orders = run == run_nothing;  // __syncwarp orders memory; shuffles and mma do not
  int phase = m.phase;
  if (orders) order_before(&m.token[phase & 1]);
  if (m.arrived == mask) {
    ++counters.warp_ops;
    run(m.payload, mask);
    m.arrived = 0;
    ++m.phase;
    for (int i = 0; i < 32; ++i)
      if ((mask >> i & 1) && i != lane) make_ready(base + i);
  } else {
    block_here(site);
  }
  if (orders) order_after(&m.token[phase & 1]);
}

void run_nothing(void* const*, unsigned) {}

void run_shuffle(void* const payload[32], unsigned mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      auto* p = (Exchange*)payload[i];
      bool valid = mask >> p->source & 1;  // reading an inactive lane is undefined: give garbage
      p->out = valid ? ((Exchange*)payload[p->source])->in : ~uint64_t{0};
    }
}

void run_ballot(void* const payload[32], unsigned mask) {
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && ((Exchange*)payload[i])->in) bits |= 1u << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) ((Exchange*)payload[i])->out = bits;
}

void run_ldmatrix(void* const payload[32], unsigned) {
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 32; ++j) ((Matrices*)payload[i])->rows[j] = ((Matrices*)payload[j])->row;
  ++counters.ldmatrix;
  for (int phase = 0; phase < 4; ++phase) {  // 8 rows of 16 bytes at a time must fall in 8 different bank groups
    unsigned groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << ((uintptr_t)((Matrices*)payload[phase * 8 + i])->row / 16 % 8);
    counters.ldmatrix_conflicts += 8 - __builtin_popcount(groups);
  }
}

void run_mma_bf16(void* const payload[32], unsigned) { mma_m16n8k16<bf16_value>(payload); }
void run_mma_f16(void* const payload[32], unsigned) { mma_m16n8k16<f16_value>(payload); }

void run_mma_s8(void* const payload[32], unsigned) {  // m16n8k32
  int a[16][32], b[32][8], d[16][8];
  for (int t = 0; t < 32; ++t) {
    const MmaInt& p = *(const MmaInt*)payload[t];
    int g = t / 4, c = t % 4 * 4;
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 4; ++h) a[g + (r & 1) * 8][c + (r >> 1) * 16 + h] = int8_t(p.a[r] >> (8 * h));
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 4; ++h) b[c + r * 16 + h][g] = int8_t(p.b[r] >> (8 * h));
    for (int r = 0; r < 4; ++r) d[g + (r >> 1) * 8][t % 4 * 2 + (r & 1)] = p.c[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int t = 0; t < 32; ++t)
    for (int r = 0; r < 4; ++r) ((MmaInt*)payload[t])->d[r] = d[t / 4 + (r >> 1) * 8][t % 4 * 2 + (r & 1)];
  ++counters.mma;
}

unsigned lane_id() { return current->index % 32; }
unsigned active_warp_mask() {
  int left = int(fibers.size()) - current->index / 32 * 32;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

void async_issue(const Copy& copy) {
  AsHost as_host;
  count_copy(copy);
  current->open.push_back(copy);
}
void async_commit() {
  AsHost as_host;
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}
bool async_complete(int keep, Copy* copy) {
  AsHost as_host;
  auto& groups = current->groups;
  while (int(groups.size()) > keep) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    *copy = groups.front().back();
    groups.front().pop_back();
    return true;
  }
  return false;
}

void product_issue(const Product& product) {
  AsHost as_host;
  current->open_products.push_back(product);
}
void product_commit() {
  AsHost as_host;
  current->products.push_back(std::move(current->open_products));
  current->open_products.clear();
}
bool product_complete(int keep, Product* product) {
  AsHost as_host;
  auto& groups = current->products;
  while (int(groups.size()) > keep) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    *product = groups.front().front();
    groups.front().pop_front();
    return true;
  }
  return false;
}

static MBarrier& find(uint64_t* bar, const Site& site) {
  auto found = block->mbarriers.find(bar);
  if (found == block->mbarriers.end()) fail(site, "no mbarrier was initialised at this address");
  return found->second;
}

static void advance(MBarrier& m) {
  if (m.pending || m.transactions) return;
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

void mbarrier_arrive(uint64_t* bar, unsigned transaction_bytes, Site site) {
  AsHost as_host;
  MBarrier& m = find(bar, site);
  if (m.pending == 0) fail(site, "more arrivals than the mbarrier expects");
  order_before(&m.token[m.phase & 1]);
  m.transactions += transaction_bytes;
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

void bulk_issue(uint64_t* bar, const Copy* copies, int count, Site site) {
  AsHost as_host;
  MBarrier& m = find(bar, site);
  order_before(&m.issued);
  become(&block->async);
#ifdef SIMT_TSAN
  __tsan_acquire(&m.issued);
#endif
  for (int i = 0; i < count; ++i) memset(copies[i].to, 0xff, copies[i].bytes);  // NaN until the copy arrives
  become(&host);
  for (int i = 0; i < count; ++i) count_copy(copies[i]), m.copies.push_back(copies[i]);
}

namespace {
// Copies arrive as late as can be: when every thread waits. Last issued, first delivered.
bool deliver_bulk_copy() {
  for (auto& [bar, m] : block->mbarriers)
    if (!m.copies.empty()) {
      Copy copy = m.copies.back();
      m.copies.pop_back();
      become(&block->async);
      memcpy(copy.to, copy.from, copy.read);
      memset((char*)copy.to + copy.read, 0, copy.bytes - copy.read);
#ifdef SIMT_TSAN
      __tsan_release(&m.token[m.phase & 1]);
#endif
      become(&host);
      m.transactions -= copy.bytes;
      advance(m);
      return true;
    }
  return false;
}
}  // namespace

}  // namespace simt

// The runtime, as far as the launchers use it: no launch fails here.
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error"; }
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

// For python_tests/test_traffic.py.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
SIMT_EXPORT void simt_reset_stats() { simt::counters = {}, simt::sectors.clear(); }
SIMT_EXPORT void simt_copied(long* bytes, long* sectors) {
  *bytes = simt::counters.copied_bytes, *sectors = long(simt::sectors.size());
}
