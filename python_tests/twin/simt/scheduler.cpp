// Fibers, blocks, barriers and shared memory.
#include "scheduler.h"

#include <driver_types.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

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

std::vector<Fiber> fibers;
Fiber host;
Fiber* current = &host;
Block* block = nullptr;
const void* parameters = nullptr;
size_t parameter_bytes = 0;

namespace {

std::vector<int> ready;
size_t ready_head = 0;
void (*kernel_body)(void*) = nullptr;
enum class Order { forward, reverse, random };  // of blocks, and of runnable threads
const Order schedule = [] {                     // SIMT_ORDER: forward, reverse, or the seed of a random order
  const char* order = getenv("SIMT_ORDER");
  if (!order || !strcmp(order, "forward")) return Order::forward;
  return strcmp(order, "reverse") ? Order::random : Order::reverse;
}();
std::mt19937 random_bits(getenv("SIMT_ORDER") ? atoi(getenv("SIMT_ORDER")) : 0);
std::deque<void*> dead;
constexpr size_t kDeadFibers = 1024;
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

Fiber* pick() {
  while (ready_head == ready.size()) {
    ready.clear();
    ready_head = 0;
    if (block->live == 0) return &host;
    report_deadlock();
  }
  if (schedule == Order::reverse) {  // last in, first out
    int index = ready.back();
    ready.pop_back();
    return &fibers[index];
  }
  if (schedule == Order::random) std::swap(ready[ready_head], ready[ready_head + random_bits() % (ready.size() - ready_head)]);
  return &fibers[ready[ready_head++]];
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
  kernel_body(const_cast<void*>(parameters));
  become(&host);
  Fiber* self = current;
  if (!self->joined)
    fail({"the end of a kernel", "", 0}, "it has not waited for the kernel before: the next one may be too early");
  for (auto& group : self->copies.committed) counters.copies_never_waited += group.size();
  counters.copies_never_waited += self->copies.open.size();
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
  f.joined = false;
  f.fake = nullptr;
  f.copies = {};
  f.products = {};
}

}  // namespace

void become(Fiber* fiber) {
  identity = fiber;
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(fiber->tsan, 1 /* no synchronisation */);
#endif
}
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
AsHost::AsHost() : before(identity) { become(&host); }
AsHost::~AsHost() { become(before); }

void make_ready(int index) { ready.push_back(index); }

void block_here(const Site& site) {
  current->site = site;
  switch_to(pick());
}

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

void join_stream() { current->joined = true; }

void launch(dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*), void* argument, size_t argument_bytes) {
  int count = threads.x * threads.y * threads.z;
  gridDim = grid;
  blockDim = threads;
  kernel_body = body;
  parameters = argument;
  parameter_bytes = argument_bytes;
  ++counters.launches;
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
    switch_to(pick());
    end_of_block();
#ifdef SIMT_TSAN
    // A new fiber takes the number of a dead one and so seems to come after it: the last blocks' fibers live on.
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

}  // namespace simt

// The runtime, as far as the launchers use it: no launch fails here.
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error"; }
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
