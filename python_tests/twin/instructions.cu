// Every function of cuda/ptx.cuh, and what the kernels use of CUDA C++ beside them, once: test_instructions.py knows what
// must come out, of the twin on a CPU and of a GPU.
#include <cuda_runtime.h>

#include "cuda/convert.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace lserve::cuda {

struct Input {
  uint16_t rows[32][8];   // of 16 bytes, for copies and ldmatrix
  uint16_t a[2][16][16];  // in half, in bfloat16
  uint16_t b[2][16][8];
  float c[16][8];
  float x[32];
};

struct Output {
  uint32_t misaligned;        // addresses of shared arrays that do not start at multiples of 128
  uint16_t copied[2][32][8];  // all rows; even rows, zeros between them
  uint32_t matrices[32][4], transposed[32][4];
  float d[2][16][8];
  float power[32];         // 2^x
  float codes[32][4];      // the bytes of a word
  uint32_t packed[2][32];  // x and -x, in half, in bfloat16
  float unpacked[2][32][2];
  float butterfly[32], up[32], down[32], broadcast[32];
  uint32_t ballot, any, all;
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
  ldmatrix_x4_trans(r, rows[lane]);
  for (int i = 0; i < 4; ++i) out->transposed[lane][i] = r[i];
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 8; ++i) out->copied[1][lane][i] = even[lane][i];

  multiply<__half>(in->a[0], in->b[0], in->c, out->d[0]);
  multiply<__nv_bfloat16>(in->a[1], in->b[1], in->c, out->d[1]);

  const float x = in->x[lane];
  out->power[lane] = exp2_approx(x);
  const uint32_t word = 0x01000000u * (255 - lane) + 0x00010000u * lane + 0x00008000u + (lane * 8);
  for (int i = 0; i < 4; ++i) out->codes[lane][i] = code_value(word, i);
  out->packed[0][lane] = pack<__half>(x, -x), out->packed[1][lane] = pack<__nv_bfloat16>(x, -x);
  const float2 half = unpack<__half>(out->packed[0][lane]), bf16 = unpack<__nv_bfloat16>(out->packed[1][lane]);
  out->unpacked[0][lane][0] = half.x, out->unpacked[0][lane][1] = half.y;
  out->unpacked[1][lane][0] = bf16.x, out->unpacked[1][lane][1] = bf16.y;

  out->butterfly[lane] = __shfl_xor_sync(~0u, x, 5);
  out->up[lane] = __shfl_up_sync(~0u, x, 3);
  out->down[lane] = __shfl_down_sync(~0u, x, 7);
  out->broadcast[lane] = __shfl_sync(~0u, x, 31 - lane);
  const uint32_t ballot = __ballot_sync(~0u, x > 0);
  const int any = __any_sync(~0u, lane == 9), all = __all_sync(~0u, lane != 9);
  if (lane == 0) out->ballot = ballot, out->any = any, out->all = all;
}

}  // namespace lserve::cuda

// Both in memory of the device. Returns their sizes in `sizes`.
extern "C" void run(const void* in, void* out, int* sizes) {
  using namespace lserve::cuda;
  sizes[0] = sizeof(Input), sizes[1] = sizeof(Output);
  if (!in) return;
  launch("instructions", instructions_kernel, 1, 32, shared_bytes({5, 512, 512}), nullptr, static_cast<const Input*>(in),
         static_cast<Output*>(out));
}
