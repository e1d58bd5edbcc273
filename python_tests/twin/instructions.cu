// Every function of cuda/ptx.cuh, and what the kernels use of CUDA C++ beside them, once: test_instructions.py knows what
// must come out, of the twin on a CPU and of a GPU.
#include <cuda_runtime.h>

#include "cuda/convert.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/sm90/ptx.cuh"

namespace lserve::cuda {

struct Input {
  uint16_t rows[32][8];   // of 16 bytes, for copies and ldmatrix
  uint16_t a[2][16][16];  // in half, in bfloat16
  uint16_t b[2][16][8];
  float c[16][8];
  float x[32];
  uint16_t wide_a[2][64][16], wide_b[2][16][64];  // for wgmma
};

struct Output {
  uint32_t misaligned;        // addresses of shared arrays that do not start at multiples of 128
  uint16_t copied[2][32][8];  // all rows; even rows, zeros between them
  uint32_t matrices[32][4], transposed[32][4];
  float d[2][16][8];
  float power[32];         // 2^x
  float logarithm[32];     // log2 |x|
  float codes[32][4];      // the bytes of a word
  uint32_t packed[2][32];  // x and -x, in half, in bfloat16
  float unpacked[2][32][2];
  float butterfly[32], up[32], down[32], broadcast[32];
  uint32_t ballot, any, all;
  float quotients[2][65536];   // by 255, of every half, of every bfloat16
  uint32_t turned[32];         // of r[0] in `matrices`
  float wide_d[2][2][64][64];  // b by columns, by rows
  uint32_t met[128][3];        // whether any thread says so, and none does; what another wrote before it arrived
};

template <typename T>
__device__ void multiply(const uint16_t (&a)[16][16], const uint16_t (&b)[16][8], const float (&c)[16][8], float (&d)[16][8]) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  const auto pair = [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; };
  const uint32_t fragment[4] = {pair(a[row][column], a[row][column + 1]), pair(a[row + 8][column], a[row + 8][column + 1]),
                                pair(a[row][column + 8], a[row][column + 9]),
                                pair(a[row + 8][column + 8], a[row + 8][column + 9])};
  float sums[4] = {c[row][column], c[row][column + 1], c[row + 8][column], c[row + 8][column + 1]};
  mma_m16n8k16<T>(sums, fragment, pair(b[column][row], b[column + 1][row]), pair(b[column + 8][row], b[column + 9][row]));
  d[row][column] = sums[0], d[row][column + 1] = sums[1], d[row + 8][column] = sums[2], d[row + 8][column + 1] = sums[3];
}

__global__ void __launch_bounds__(32) instructions_kernel(const Input* in, Output* out) {
  join_stream();
  const int lane = threadIdx.x;
  SharedMemory shared;
  uint8_t* const odd = shared.take<uint8_t>(5);
  uint16_t (*const rows)[8] = reinterpret_cast<uint16_t (*)[8]>(shared.take<uint16_t>(32 * 8));
  uint16_t (*const even)[8] = reinterpret_cast<uint16_t (*)[8]>(shared.take<uint16_t>(32 * 8));
  if (lane == 0)
    out->misaligned = (reinterpret_cast<uintptr_t>(odd) % 128 != 0) + (reinterpret_cast<uintptr_t>(rows) % 128 != 0) +
                      (reinterpret_cast<uintptr_t>(even) % 128 != 0);

  cp_async_16(rows[lane], in->rows[lane]);
  cp_async_commit();
  cp_async_16(even[lane], in->rows[lane], lane % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();  // the first of the two
  __syncwarp();
  for (int i = 0; i < 8; ++i) out->copied[0][lane][i] = rows[lane][i];
  uint32_t r[4];
  ldmatrix_x4(r, rows[lane]);
  for (int i = 0; i < 4; ++i) out->matrices[lane][i] = r[i];
  out->turned[lane] = transpose_8x8(r[0]);
  ldmatrix_x4_trans(r, rows[lane]);
  for (int i = 0; i < 4; ++i) out->transposed[lane][i] = r[i];
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 8; ++i) out->copied[1][lane][i] = even[lane][i];

  multiply<__half>(in->a[0], in->b[0], in->c, out->d[0]);
  multiply<__nv_bfloat16>(in->a[1], in->b[1], in->c, out->d[1]);

  const float x = in->x[lane];
  out->power[lane] = exp2_approx(x);
  out->logarithm[lane] = log2_approx(fabsf(x));
  const uint32_t word = 0x01000000u * (255 - lane) + 0x00010000u * lane + 0x00008000u + (lane * 8);
  for (int i = 0; i < 4; ++i) out->codes[lane][i] = code_value(word, i);
  out->packed[0][lane] = pack<__half>(x, -x), out->packed[1][lane] = pack<__nv_bfloat16>(x, -x);
  const float2 half = unpack<__half>(out->packed[0][lane]), bf16 = unpack<__nv_bfloat16>(out->packed[1][lane]);
  out->unpacked[0][lane][0] = half.x, out->unpacked[0][lane][1] = half.y;
  out->unpacked[1][lane][0] = bf16.x, out->unpacked[1][lane][1] = bf16.y;

  for (int i = lane; i < 65536; i += 32) {
    const uint32_t bits = i;
    out->quotients[0][i] = divided_by_255(unpack<__half>(bits).x);
    out->quotients[1][i] = divided_by_255(unpack<__nv_bfloat16>(bits).x);
  }

  out->butterfly[lane] = __shfl_xor_sync(~0u, x, 5);
  out->up[lane] = __shfl_up_sync(~0u, x, 3);
  out->down[lane] = __shfl_down_sync(~0u, x, 7);
  out->broadcast[lane] = __shfl_sync(~0u, x, 31 - lane);
  const uint32_t ballot = __ballot_sync(~0u, x > 0);
  const int any = __any_sync(~0u, lane == 9), all = __all_sync(~0u, lane != 9);
  if (lane == 0) out->ballot = ballot, out->any = any, out->all = all;
}

// d = 2 a b, in two groups; b is the second panel's, and for the columns the second 16 channels.
template <typename T, bool kRows>
__device__ void multiply_wide(const uint16_t (&a)[64][16], const uint16_t (&b)[16][64], T* panels, float (&d)[64][64]) {
  T* const panel = panels + 64 * 64;
  for (int i = threadIdx.x; i < 16 * 64; i += 128) {
    const int k = i / 64, n = i % 64, row = kRows ? 16 + k : n, element = kRows ? n : 16 + k;
    memcpy(panel + row * 64 + (element / 8 ^ row % 8) * 8 + element % 8, &b[k][n], sizeof(T));
  }
  sm90::fence_for_wgmma();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const auto pair = [&](int row, int column) { return static_cast<uint32_t>(a[row][column + 1]) << 16 | a[row][column]; };
  uint32_t fragment[1][4] = {{pair(row, column), pair(row + 8, column), pair(row, column + 8), pair(row + 8, column + 8)}};
  float sums[8][4];
  sm90::pin(fragment), sm90::pin(sums);
  sm90::fence_registers();
  for (int i = 0; i < 2; ++i) {
    sm90::wgmma_m64n64k16<T, kRows>(sums, 0, fragment[0], sm90::Panels(panels), 64 * 64 + (kRows ? 16 * 64 : 16), i > 0);
    sm90::commit_wgmma();
  }
  sm90::wait_wgmma<1>();
  sm90::wait_wgmma<0>();
  sm90::pin(sums);
  for (int n = 0; n < 8; ++n)
    for (int e = 0; e < 4; ++e) d[row + e / 2 * 8][n * 8 + column + e % 2] = sums[n][e];
  __syncthreads();
}

__global__ void __launch_bounds__(128) wgmma_kernel(const Input* in, Output* out) {
  join_stream();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  SharedMemory shared;
  uint16_t* const panels = shared.take<uint16_t>(2 * 64 * 64);
  __half* const half = reinterpret_cast<__half*>(panels);
  __nv_bfloat16* const bf16 = reinterpret_cast<__nv_bfloat16*>(panels);
  uint64_t* const barrier = shared.take<uint64_t>(1);
  uint32_t* const written = shared.take<uint32_t>(128);
  const int thread = threadIdx.x;
  if (thread == 0) sm90::mbarrier_init(barrier, 128);
  __syncthreads();
  out->met[thread][0] = sm90::sync_threads_or(3, 128, thread == 77);
  out->met[thread][1] = sm90::sync_threads_or(3, 128, thread == 128);
  sm90::mbarrier_wait(barrier, 1);  // the phase before the first one
  uint32_t sum = 0;
  for (int phase = 0; phase < 2; ++phase) {
    written[thread] = thread + phase;
    sm90::mbarrier_arrive(barrier);
    sm90::mbarrier_wait(barrier, phase);
    sum += written[127 - thread];
    sm90::sync_threads(4, 128);
  }
  out->met[thread][2] = sum;
  multiply_wide<__half, false>(in->wide_a[0], in->wide_b[0], half, out->wide_d[0][0]);
  multiply_wide<__half, true>(in->wide_a[0], in->wide_b[0], half, out->wide_d[0][1]);
  multiply_wide<__nv_bfloat16, false>(in->wide_a[1], in->wide_b[1], bf16, out->wide_d[1][0]);
  multiply_wide<__nv_bfloat16, true>(in->wide_a[1], in->wide_b[1], bf16, out->wide_d[1][1]);
#endif
}

}  // namespace lserve::cuda

// Both in memory of the device. Returns their sizes in `sizes`.
extern "C" void run(const void* in, void* out, int* sizes) {
  using namespace lserve::cuda;
  sizes[0] = sizeof(Input), sizes[1] = sizeof(Output);
  if (!in) return;
  launch("instructions", instructions_kernel, 1, 32, shared_bytes({5, 512, 512}), nullptr, static_cast<const Input*>(in),
         static_cast<Output*>(out));
  if (device_attribute("instructions", cudaDevAttrComputeCapabilityMajor) == 9)
    launch("instructions", wgmma_kernel, 1, 128, shared_bytes({2 * 2 * 64 * 64, 8, 512}), nullptr,
           static_cast<const Input*>(in), static_cast<Output*>(out));
}
