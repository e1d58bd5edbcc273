// The emulator's own: what scheduler.cpp, warp.cpp and async.cpp share. Kernels see ../simt.h only.
//
// These files are compiled WITHOUT sanitizers; they tell them of fibers by hand. For ThreadSanitizer everything in here happens
// in the host's fiber (see AsHost), so that the machine's own bookkeeping neither races nor orders the kernel's threads.
#pragma once
#include "../simt.h"

#include <cstring>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simt {

constexpr size_t kStackBytes = 128 << 10;

// What a thread has started and not yet waited for.
template <typename T>
struct Groups {
  std::deque<std::deque<T>> committed;
  std::deque<T> open;

  void commit() { committed.push_back(std::exchange(open, {})); }
  // The next of what a wait completes that leaves so many groups.
  bool complete(int keep, T* x) {
    while (int(committed.size()) > keep) {
      std::deque<T>& oldest = committed.front();
      if (oldest.empty()) {
        committed.pop_front();
        continue;
      }
      *x = oldest.front();
      oldest.pop_front();
      return true;
    }
    return false;
  }
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  uint3 thread{};
  int index = 0;
  bool exited = false;
  bool joined = false;  // nothing that the kernel before does is under way any more
  Site site{};          // where it is blocked
  Groups<Copy> copies;
  Groups<Product> products;
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
  std::vector<int> waiting;
  char token[2];
};

struct Block {
  std::vector<std::map<unsigned, Meeting>> warps;  // of each warp, by mask
  Meeting barriers[16];
  std::map<size_t, std::pair<void*, size_t>> shared;
  std::unordered_map<uint64_t*, MBarrier> mbarriers;
  size_t shared_bytes = 0;
  int live = 0;
};

extern std::vector<Fiber> fibers;  // a CUDA thread of the running block each
extern Fiber host, *current;
extern Block* block;
extern Stats counters;
extern const void* parameters;  // of the running kernel
extern size_t parameter_bytes;

void make_ready(int index);
void block_here(const Site& site);  // until somebody makes it ready

void count_access(const void* instruction, const void* address, unsigned bytes, bool write);
void count_copy(const Copy& copy, const void* instruction);
void end_of_block();  // for the counters

void become(Fiber* fiber);  // as whom ThreadSanitizer sees us
// The calling CUDA thread: what it did before order_before(t) happens before what follows an order_after(t).
void order_after(void* token);
void order_before(void* token);
struct AsHost {
  Fiber* before;
  AsHost();
  ~AsHost();
};

}  // namespace simt
