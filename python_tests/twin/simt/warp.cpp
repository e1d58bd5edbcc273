// What the lanes of a warp do together: shuffles, votes, ldmatrix, mma.
#include "scheduler.h"

namespace simt {
namespace {

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

}  // namespace simt
