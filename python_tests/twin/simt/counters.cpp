// What kernels did, counted, while somebody counts: see Stats in ../simt.h.
//
// CMake has the CUDA sources compiled as for ThreadSanitizer, but without its runtime: the calls that stand before every load
// and store are answered here. Lanes run one after the other, so an access waits in `requests` for those of the other lanes:
// what the n-th execution of one instruction by every lane reads or writes is one request of the warp.
#include "scheduler.h"

#include <algorithm>
#include <unordered_set>

// The first and the last byte of this library, from the linker.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

namespace simt {

Stats counters{};

namespace {

constexpr uintptr_t kSector = 32, kBanks = 32, kWord = 4;

struct Request {
  Instruction* instruction = nullptr;
  unsigned bytes = 0, lanes = 0;
  uintptr_t addresses[32] = {};  // of each lane, or 0
};

bool counting = false;
std::unordered_map<const void*, Instruction> instructions;
std::unordered_map<uint64_t, Request> requests;     // of the running block
std::unordered_map<uint64_t, unsigned> executions;  // of an instruction by a thread
std::unordered_set<uintptr_t> read_before, copied;  // sectors

// Lanes are served 128 bytes at a time; words of one bank follow each other.
void finish_shared(const Request& r) {
  const unsigned together = std::clamp(128 / r.bytes, 1u, 32u);
  for (unsigned first = 0; first < 32; first += together) {
    std::unordered_set<uintptr_t> words;
    unsigned of_bank[kBanks] = {}, longest = 0;
    for (unsigned i = first; i < std::min(first + together, 32u); ++i) {
      if (!r.addresses[i]) continue;
      for (uintptr_t word = r.addresses[i] / kWord; word * kWord < r.addresses[i] + r.bytes; ++word)
        if (words.insert(word).second) longest = std::max(longest, ++of_bank[word % kBanks]);
    }
    if (!longest) continue;
    r.instruction->wavefronts += longest;
    r.instruction->conflicts += longest - 1;
    counters.shared_wavefronts += longest;
    counters.shared_conflicts += longest - 1;
  }
}

void finish_global(Request& r) {
  std::sort(r.addresses, r.addresses + 32);
  long bytes = 0, sectors = 0;
  uintptr_t end = 0, next = 0;  // of what has been counted
  for (unsigned i = 32 - r.lanes; i < 32; ++i) {
    const uintptr_t from = std::max(r.addresses[i], end);
    end = std::max(end, r.addresses[i] + r.bytes);
    bytes += end - std::min(from, end);
    for (uintptr_t sector = std::max(r.addresses[i] / kSector, next); sector * kSector < end; next = ++sector) {
      ++sectors;
      if (!r.instruction->write) counters.first_read_sectors += read_before.insert(sector).second;
    }
  }
  r.instruction->bytes += bytes;
  r.instruction->sectors += sectors;
  (r.instruction->write ? counters.written_bytes : counters.read_bytes) += bytes;
  (r.instruction->write ? counters.written_sectors : counters.read_sectors) += sectors;
}

void finish(Request& r) {
  ++r.instruction->requests;
  if (r.instruction->shared) finish_shared(r);
  else finish_global(r);
}

}  // namespace

void count_access(const void* instruction, const void* address, unsigned bytes, bool write) {
  if (current == &host || (!counting && current->joined)) return;
  auto* const byte = (char*)address;
  const auto within = [&](const void* first, size_t size) { return byte >= first && byte < (char*)first + size; };
  // Registers, parameters and constants.
  if (within(current->stack, kStackBytes) || within(parameters, parameter_bytes) ||
      within(&__ehdr_start, &_end - &__ehdr_start))
    return;
  if (!current->joined && !is_shared(address, bytes))
    fail({"an access", "", 0}, "global memory, which the kernel before may still write or read");
  if (!counting) return;
  const uint64_t place = (uintptr_t)instruction * 0x9e3779b97f4a7c15;
  const unsigned turn = executions[place + current->index]++;
  const uint64_t key = (place ^ (uint64_t(turn) << 10 | current->index / 32)) * 0xff51afd7ed558ccd;
  Request& request = requests[key];
  if (!request.lanes) {
    request.bytes = bytes;
    request.instruction = &instructions[instruction];
    request.instruction->offset = (char*)instruction - &__ehdr_start;
    request.instruction->write = write;
    request.instruction->shared = is_shared(address, bytes);
  }
  request.addresses[current->index % 32] = (uintptr_t)address;
  ++request.lanes;
  if (request.lanes == 32) {
    finish(request);
    requests.erase(key);
  }
}

void count_copy(const Copy& copy, const void* instruction) {
  if (!copy.read) return;
  count_access(instruction, copy.from, copy.read, false);
  if (!counting) return;
  counters.copied_bytes += copy.read;
  counters.copied_sectors += copied.insert((uintptr_t)copy.from / kSector).second;
}

void end_of_block() {
  for (auto& [key, request] : requests) finish(request);
  requests.clear();
  executions.clear();
}

}  // namespace simt

// For bench/traffic.py.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
SIMT_EXPORT void simt_start() {
  simt::counters = {};
  simt::read_before.clear();
  simt::copied.clear();
  simt::instructions.clear();
  simt::counting = true;
}
SIMT_EXPORT void simt_stop(simt::Stats* stats) {
  *stats = simt::counters;
  simt::counting = false;
}

SIMT_EXPORT long simt_instructions(simt::Instruction* out, long room) {  // how many there are
  for (auto& [_, instruction] : simt::instructions)
    if (room-- > 0) *out++ = instruction;
  return long(simt::instructions.size());
}

#if !defined(SIMT_TSAN)
#define HERE __builtin_return_address(0)
#define ACCESS(name, bytes, write) \
  extern "C" void __tsan_##name(void* p) { simt::count_access(HERE, p, bytes, write); }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(unaligned_read2, 2, false)
ACCESS(unaligned_read4, 4, false)
ACCESS(unaligned_read8, 8, false)
ACCESS(unaligned_read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
ACCESS(unaligned_write2, 2, true)
ACCESS(unaligned_write4, 4, true)
ACCESS(unaligned_write8, 8, true)
ACCESS(unaligned_write16, 16, true)
extern "C" void __tsan_read_range(void* p, long bytes) { simt::count_access(HERE, p, bytes, false); }
extern "C" void __tsan_write_range(void* p, long bytes) { simt::count_access(HERE, p, bytes, true); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}

#define ATOMIC(bits, T)                                                                                         \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int order) { return __atomic_load_n(p, order); } \
  extern "C" void __tsan_atomic##bits##_store(volatile T* p, T x, int order) { __atomic_store_n(p, x, order); } \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old, T x, int order, int) {   \
    ++simt::counters.atomics;                                                                                   \
    return __atomic_compare_exchange_n(p, old, x, false, order, __ATOMIC_ACQUIRE);                              \
  }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
#endif
