// Operands of the tensor cores and their products, for queries as rows: prefill and attention_mass.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/pipeline.cuh"

namespace lserve::cuda {

// ---- fragments: B operands of two steps of 16 channels, for 16 keys

// Keys and values in T, as they lie.
template <typename T, int kD>
struct KvOperand {
  SmemTile<T, kD> k, v;

  // b[step]: channels of 32 pair + 16 step; words 0 and 1 for keys 0 to 7, words 2 and 3 for keys 8 to 15.
  __device__ __forceinline__ void keys(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 2; ++step)
      ldmatrix_x4(b[step], k.at(key + lane / 16 * 8 + lane % 8, 32 * pair + 16 * step + lane / 8 % 2 * 8));
  }

  // b[block]: channels of 32 pair + 16 block; words 0 and 1 for the first 8 of them, words 2 and 3 for the others.
  __device__ __forceinline__ void values(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < 2; ++block)
      ldmatrix_x4_trans(b[block], v.at(key + lane % 16, 32 * pair + 16 * block + lane / 16 * 8));
  }
};

// ---- codes, dequantised for good: once for all warps

using Codes8 = Vector<uint32_t, 2>;  // of 8 neighbouring channels

__device__ __forceinline__ Codes8 load_codes(const uint8_t* codes) {
  return load_vector<uint32_t, 2>(reinterpret_cast<const uint32_t*>(codes));
}

// Channels i of a token on grids (step(i), min(i)). Rounding to T brings what is past a maximum back to it.
template <typename T, typename Step, typename Min>
__device__ __forceinline__ Vector<uint32_t, 4> dequantize_8(Codes8 codes, Step step, Min min) {
  Vector<uint32_t, 4> out;
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    out.value[i / 2] = pack<T>(fmaf(step(i), code_value(codes.value[i / 4], i % 4), min(i)),
                               fmaf(step(i + 1), code_value(codes.value[i / 4], i % 4 + 1), min(i + 1)));
  return out;
}

// On the token's own grid, (step, min).
template <typename T>
__device__ __forceinline__ Vector<uint32_t, 4> dequantize_8(Codes8 codes, float2 grid) {
  return dequantize_8<T>(codes, [&](int) { return grid.x; }, [&](int) { return grid.y; });
}

// Minima and maxima of 8 channels of a group of keys.
template <typename T>
struct Bounds {
  Vector<T, 8> min, max;

  __device__ __forceinline__ static Bounds load(const T* stats, int D) {
    return {load_global<T, 8>(stats), load_global<T, 8>(stats + D)};
  }
};

// The grid that they make.
template <typename T>
struct GroupGrid {
  float step[8], min[8];

  __device__ __forceinline__ explicit GroupGrid(const Bounds<T>& bounds) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      min[i] = static_cast<float>(bounds.min.value[i]);
      step[i] = narrow_step(min[i], static_cast<float>(bounds.max.value[i]));
    }
  }
  __device__ __forceinline__ Vector<uint32_t, 4> dequantize(Codes8 codes) const {
    return dequantize_8<T>(codes, [&](int i) { return step[i]; }, [&](int i) { return min[i]; });
  }
};

// ---- queries

// Puts rows [0, kRows) of a tile of queries into shared memory, zeros where query(row) is null and beyond channel D.
template <int kRows, typename T, int kD, typename Query>
__device__ __forceinline__ void load_queries(SmemTile<T, kD> q, int D, Query query) {
  for_chunks<kRows, kD / 8, kThreads>(threadIdx.x, [&](auto at) {
    const int row = at.row(), d = at.chunk * 8;
    const T* const from = query(row);
    Vector<uint32_t, 4> x{};
    if (from && d < D) x = load_vector<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from + d));
    store_vector(reinterpret_cast<uint32_t*>(q.at(row, d)), x);
  });
}

// ---- products

// s[n] [16, 8 keys] = q · k, not scaled, of `Columns` keys from `key` on.
template <int Columns, typename T, int kD, typename Keys>
__device__ __forceinline__ void gemm_qk(float (&s)[Columns / 8][4], SmemTile<T, kD> q, int row, const Keys& kv, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < kD / 32; ++pair) {
    uint32_t a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) ldmatrix_x4(a[step], q.at(row + lane % 16, 32 * pair + 16 * step + lane / 16 * 8));
#pragma unroll
    for (int n = 0; n < Columns / 8; n += 2) {
      uint32_t b[2][4];
      kv.keys(b, key + n * 8, pair);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        mma_m16n8k16<T>(s[n], a[step], b[step][0], b[step][1]);
        mma_m16n8k16<T>(s[n + 1], a[step], b[step][2], b[step][3]);
      }
    }
  }
}

// out += weights · v
template <int Columns, typename T, int kD>
__device__ __forceinline__ void gemm_pv(float (&out)[kD / 8][4], const float (&w)[Columns / 8][4], const KvOperand<T, kD>& kv,
                                        int key) {
#pragma unroll
  for (int n = 0; n < Columns / 8; n += 2) {
    const uint32_t a[4] = {pack<T>(w[n][0], w[n][1]), pack<T>(w[n][2], w[n][3]), pack<T>(w[n + 1][0], w[n + 1][1]),
                           pack<T>(w[n + 1][2], w[n + 1][3])};
#pragma unroll
    for (int pair = 0; pair < kD / 32; ++pair) {
      uint32_t b[2][4];
      kv.values(b, key + n * 8, pair);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        mma_m16n8k16<T>(out[4 * pair + 2 * block], a, b[block][0], b[block][1]);
        mma_m16n8k16<T>(out[4 * pair + 2 * block + 1], a, b[block][2], b[block][3]);
      }
    }
  }
}

}  // namespace lserve::cuda
