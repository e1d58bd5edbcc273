// Pages: statistics, INT8 codes, appending and copying.
//
// A page is sealed by one block of threads, straight from where its tokens lie. Its keys are split into groups of
// tokens by vectors of channels; its values into tokens, each shared by neighbouring lanes. A thread reads its part once
// for the grid, and a second time, from the first-level cache, for the codes.
#pragma once
#include <cuda_runtime.h>

#include "cuda/convert.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_size.h"
#include "kernels.h"
#include "paged_kv.h"
#include "quant.h"

namespace lserve::cuda {

// The rows of one page: the first `split` from the residual buffer, the rest from the new tokens.
template <typename T>
struct PageRows {
  const T* old;    // row stride D
  const T* fresh;  // of row `split`
  int64_t fresh_stride;
  int split, D;

  __device__ const T* operator[](int i) const {
    return i < split ? old + static_cast<int64_t>(i) * D : fresh + (i - split) * fresh_stride;
  }
};

// Least and greatest of what was added. As with torch.amin and torch.amax, a NaN makes both NaN. Comparisons are made in
// float32, which holds every T exactly; of equal zeros the first one's sign is kept.
struct Bounds {
  float low = INFINITY, high = -INFINITY;

  __device__ void lower(float x) { low = x < low || x != x ? x : low; }
  __device__ void raise(float x) { high = x > high || x != x ? x : high; }
  __device__ void add(float x) { lower(x), raise(x); }
};

// Of N neighbouring channels over `count` rows.
template <int N, typename T>
__device__ __forceinline__ void channel_bounds(const PageRows<T>& rows, int first, int count, int d, Bounds (&bounds)[N]) {
#pragma unroll 8
  for (int row = first; row < first + count; ++row) {
    const auto x = load_vector<T, N>(rows[row] + d);
#pragma unroll
    for (int i = 0; i < N; ++i) bounds[i].add(static_cast<float>(x.value[i]));
  }
}

// Stores least and greatest of N channels of a group, rounded to T, which holds them exactly.
template <int N, typename T>
__device__ __forceinline__ void store_bounds(const Bounds (&bounds)[N], T* low, T* high) {
  Vector<T, N> least, most;
#pragma unroll
  for (int i = 0; i < N; ++i) least.value[i] = static_cast<T>(bounds[i].low), most.value[i] = static_cast<T>(bounds[i].high);
  store_vector(low, least);
  store_vector(high, most);
}

// The same of mean minus and plus a standard deviation.
template <int N, typename T>
__device__ __forceinline__ void store_moments(const PageRows<T>& rows, int first, int count, int d, T* low, T* high) {
  constexpr int kBatch = 8;  // rows that are read once and held, for their mean and then their squares
  float mean[N] = {}, squares[N] = {};
  for (int done = 0; done < count; done += kBatch) {
    const int batch = min(kBatch, count - done);
    const float size = static_cast<float>(batch), share = size / static_cast<float>(done + batch);
    Vector<T, N> x[kBatch];
#pragma unroll
    for (int row = 0; row < kBatch; ++row)
      if (row < batch) x[row] = load_vector<T, N>(rows[first + done + row] + d);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float own = 0, apart = 0;
#pragma unroll
      for (int row = 0; row < kBatch; ++row)
        if (row < batch) own += static_cast<float>(x[row].value[i]);
      own /= size;
#pragma unroll
      for (int row = 0; row < kBatch; ++row) {
        const float off = static_cast<float>(x[row].value[i]) - own;
        if (row < batch) apart = fmaf(off, off, apart);
      }
      // Joined with what came before (Chan, Golub and LeVeque, 1979).
      const float off = own - mean[i];
      mean[i] = done == 0 ? own : fmaf(off, share, mean[i]);
      squares[i] += done == 0 ? apart : fmaf(off * off, share * static_cast<float>(done), apart);
    }
  }
  Bounds bounds[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float deviation = sqrtf(squares[i] / static_cast<float>(count));
    bounds[i] = {mean[i] - deviation, mean[i] + deviation};
  }
  store_bounds<N>(bounds, low, high);
}

// Lanes that share a token of so many parts: a power of two.
__host__ __device__ inline int lanes_of_token(int parts) {
  int lanes = 1;
  while (lanes < parts && lanes < 32) lanes *= 2;
  return lanes;
}

// Where a page goes. Either codes and scales, or k and v; stats and moments, or null.
template <typename T>
struct PageOut {
  T* stats;                    // [P/L, 2, D]
  T* moments;                  // [P/moments_group, 2, D]
  uint8_t *k_codes, *v_codes;  // [P, D]
  float* scales;               // [C, P, 2]: V's (step, min), and K's behind them without statistics
  T *k, *v;                    // [P, D]
  int P, L, D, moments_group;
};

// N numbers of a grid, as its codes.
template <int N, typename T>
__device__ __forceinline__ Vector<uint8_t, N> encode(const Vector<T, N>& x, const Quantizer (&grids)[N]) {
  Vector<uint8_t, N> codes;
#pragma unroll
  for (int i = 0; i < N; ++i) codes.value[i] = grids[i](static_cast<float>(x.value[i]));
  return codes;
}

// A token on a grid of its own, by neighbouring lanes of a warp, all of which come here. there: whether this lane has one.
template <int N, typename T>
__device__ __forceinline__ void encode_token(bool there, const T* row, int D, int lanes, uint8_t* codes, float* scale) {
  const int first = threadIdx.x % lanes * N, end = there ? D : 0;
  Bounds bounds;
  for (int d = first; d < end; d += lanes * N) {
    const auto x = load_vector<T, N>(row + d);
#pragma unroll
    for (int i = 0; i < N; ++i) bounds.add(static_cast<float>(x.value[i]));
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    bounds.lower(__shfl_xor_sync(~0u, bounds.low, distance));
    bounds.raise(__shfl_xor_sync(~0u, bounds.high, distance));
  }
  const float low = bounds.low + 0.0f, step = quant_step(low, bounds.high + 0.0f);  // no zero has a sign
  if (there && first == 0) scale[0] = step, scale[1] = low;
  const Quantizer grid(low, step);
  Quantizer grids[N];
#pragma unroll
  for (auto& each : grids) each = grid;
  for (int d = first; d < end; d += lanes * N) store_vector(codes + d, encode<N>(load_vector<T, N>(row + d), grids));
}

// N channels of a group of L keys: its statistics, taken here or, if they are known, read; and its codes.
template <int N, bool kKnown, typename T>
__device__ __forceinline__ void encode_group(const PageRows<T>& k, const PageOut<T>& out, int group, int d) {
  T* const stats = out.stats + group * 2 * out.D + d;
  Bounds bounds[N];
  if (kKnown) {
    const auto low = load_vector<T, N>(stats), high = load_vector<T, N>(stats + out.D);
#pragma unroll
    for (int i = 0; i < N; ++i) bounds[i] = {static_cast<float>(low.value[i]), static_cast<float>(high.value[i])};
  } else {
    channel_bounds<N>(k, group * out.L, out.L, d, bounds);
    store_bounds<N>(bounds, stats, stats + out.D);
  }
  if (!out.k_codes) return;
  Quantizer grids[N];
#pragma unroll
  for (int i = 0; i < N; ++i) grids[i] = Quantizer(bounds[i].low, quant_step(bounds[i].low, bounds[i].high));
#pragma unroll 4
  for (int row = group * out.L; row < (group + 1) * out.L; ++row)
    store_vector(out.k_codes + row * out.D + d, encode<N>(load_vector<T, N>(k[row] + d), grids));
}

template <int N, typename T>
__device__ __forceinline__ void copy_rows(const PageRows<T>& from, int P, int D, T* to) {
  const int parts = D / N;
  for (int i = threadIdx.x; i < P * parts; i += kPageThreads)
    store_vector(to + i / parts * D + i % parts * N, load_vector<T, N>(from[i / parts] + i % parts * N));
}

// All threads of a block together.
template <int N, bool kKnown, typename T>
__device__ void seal_page(const PageRows<T>& k, const PageRows<T>& v, const PageOut<T>& out) {
  const int parts = out.D / N, lanes = lanes_of_token(parts);
  if (out.stats) {
    constexpr int kHalf = N > 1 ? N / 2 : 1;  // channels: a page of 64 tokens then has work for all threads
    const int halves = out.D / kHalf;
    for (int i = threadIdx.x; i < out.P / out.L * halves; i += kPageThreads)
      encode_group<kHalf, kKnown>(k, out, i / halves, i % halves * kHalf);
  }
  const auto encode_tokens = [&](const PageRows<T>& rows, uint8_t* codes, float* scales) {
    for (int first = 0; first < out.P; first += kPageThreads / lanes) {
      const int row = first + threadIdx.x / lanes;
      const bool there = row < out.P;
      encode_token<N>(there, there ? rows[row] : nullptr, out.D, lanes, codes + row * out.D, scales + 2 * row);
    }
  };
  if (out.v_codes) encode_tokens(v, out.v_codes, out.scales);
  if (out.k_codes && !out.stats) encode_tokens(k, out.k_codes, out.scales + 2 * out.P);
  if (out.moments) {
    const int size = out.moments_group;
    for (int i = threadIdx.x; i < out.P / size * parts; i += kPageThreads) {
      T* const pair = out.moments + i / parts * 2 * out.D + i % parts * N;
      store_moments<N>(k, i / parts * size, size, i % parts * N, pair, pair + out.D);
    }
  }
  if (out.k) copy_rows<N>(k, out.P, out.D, out.k);
  if (out.v) copy_rows<N>(v, out.P, out.D, out.v);
}

// A thread walks the L tokens of one group for N of its channels, so that neighbouring threads read neighbouring bytes of
// a token. threadIdx.x counts the D/N parts of a row, and threadIdx.y the groups of a block.
// Moments hold more rows at a time.
template <typename T, int N, bool kMoments>
__global__ void __launch_bounds__(256, (kMoments ? 2 : 4)) page_stats_kernel(const __grid_constant__ PageStatsArgs a) {
  join_stream();
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y, groups = static_cast<uint32_t>(a.P) / static_cast<uint32_t>(a.L);
  if (row >= a.pages * groups) return;
  const T* const k = static_cast<const T*>(a.k.data) + row / groups * a.k.stride0;
  const PageRows<T> page{k, k, a.k.stride1, 0, static_cast<int>(a.D)};
  const int d = threadIdx.x * N, L = static_cast<int>(a.L), first = static_cast<int>(row % groups) * L;
  T* const out = static_cast<T*>(a.stats) + static_cast<int64_t>(row) * 2 * a.D + d;
  if constexpr (kMoments) {
    store_moments<N>(page, first, L, d, out, out + a.D);
  } else {
    Bounds bounds[N];
    channel_bounds<N>(page, first, L, d, bounds);
    store_bounds<N>(bounds, out, out + a.D);
  }
}

// A block of threads for each page.
template <typename T, int N>
__global__ void __launch_bounds__(kPageThreads, 4) quantize_kernel(const __grid_constant__ QuantizeArgs a) {
  join_stream();
  const int64_t page = blockIdx.x, codes = page * a.P * a.D;
  const int P = static_cast<int>(a.P), D = static_cast<int>(a.D), L = static_cast<int>(a.L);
  const auto rows = [&](const View& x) {
    const T* const first = static_cast<const T*>(x.data) + page * x.stride0;
    return PageRows<T>{first, first, x.stride1, 0, D};
  };
  PageOut<T> out{};
  out.k_codes = a.k_codes + codes, out.v_codes = a.v_codes + codes, out.scales = a.scales + page * (a.stats ? 2 : 4) * P;
  out.P = P, out.L = L, out.D = D;
  if (a.stats) out.stats = const_cast<T*>(static_cast<const T*>(a.stats)) + page * (P / L) * 2 * D;  // only read
  seal_page<N, true>(rows(a.k), rows(a.v), out);
}

// A block of threads for each page; a thread takes N channels of a key and of its value at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kPageThreads, 4) dequantize_kernel(const __grid_constant__ DequantizeArgs a) {
  join_stream();
  const int64_t page = blockIdx.x;
  const int P = static_cast<int>(a.P), D = static_cast<int>(a.D), L = static_cast<int>(a.L), parts = D / N;
  const float* const scales = a.scales + page * (a.stats ? 2 : 4) * P;
  const T* const stats = a.stats ? static_cast<const T*>(a.stats) + page * (P / L) * 2 * D : nullptr;
  for (int i = threadIdx.x; i < P * parts; i += kPageThreads) {
    const int row = i / parts, d = i % parts * N;
    const int64_t at = (page * P + row) * D + d;
    const auto k_codes = load_vector<uint8_t, N>(a.k_codes + at), v_codes = load_vector<uint8_t, N>(a.v_codes + at);
    Vector<T, N> k, v;
    if (stats) {
      const T* const group = stats + row / L * 2 * D + d;
      const auto low = load_vector<T, N>(group), high = load_vector<T, N>(group + D);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float min = static_cast<float>(low.value[j]), max = static_cast<float>(high.value[j]);
        k.value[j] = static_cast<T>(dequantize(k_codes.value[j], min, step_of<T>(min, max), max));
      }
    } else {
      const float step = scales[2 * (P + row)], min = scales[2 * (P + row) + 1];
#pragma unroll
      for (int j = 0; j < N; ++j) k.value[j] = static_cast<T>(dequantize(k_codes.value[j], min, step));
    }
#pragma unroll
    for (int j = 0; j < N; ++j) v.value[j] = static_cast<T>(dequantize(v_codes.value[j], scales[2 * row + 1], scales[2 * row]));
    store_vector(static_cast<T*>(a.k) + at, k);
    store_vector(static_cast<T*>(a.v) + at, v);
  }
}

// Blocks of threads before those of sequence b, of which `tokens` new ones belong to earlier sequences: two, and one for
// every page that can be sealed.
__host__ __device__ inline int64_t append_blocks_before(int64_t b, int64_t tokens, int P) { return tokens / P + 2 * b; }

// A block of threads takes one page of one (sequence, kv head) and seals it if P tokens follow it now. The first two of a
// sequence take the pages that the residual buffer may hold, and write, once these are sealed, the new rows of their half
// of the buffer: nobody else reads or writes it.
template <typename T, int N>
__global__ void __launch_bounds__(kPageThreads, 4) append_kernel(const __grid_constant__ AppendArgs a) {
  join_stream();
  const PagedKV& kv = a.kv;
  const int P = static_cast<int>(kv.P), D = static_cast<int>(kv.D), h = blockIdx.y;
  int b = 0;  // the last sequence whose blocks begin at or before this one
  for (int end = static_cast<int>(kv.B); b + 1 < end;) {
    const int middle = (b + end) / 2;
    if (append_blocks_before(middle, a.cu_seqlens_k[middle], P) <= blockIdx.x) b = middle;
    else end = middle;
  }
  const int own = static_cast<int>(blockIdx.x - append_blocks_before(b, a.cu_seqlens_k[b], P));
  if (own < 0) return;  // tokens before those of the first sequence
  const int before = a.context_lens[b], after = before + a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b], sealed = kv.sealed[b];
  const int unsealed = max(sealed, after / P - 1), page = before / P - 1 + own;  // of the pages, once this is done
  const int64_t residual = residual_of(kv, b, h);
  const T* const new_k = static_cast<const T*>(a.k.data) + a.cu_seqlens_k[b] * a.k.stride0 + h * a.k.stride1;
  const T* const new_v = static_cast<const T*>(a.v.data) + a.cu_seqlens_k[b] * a.v.stride0 + h * a.v.stride1;

  const int64_t slot = page >= sealed && page < unsealed ? slots_of(kv, b, h)[page] : -1;
  if (slot >= 0) {  // else it is past already for a streaming head, or not due
    const int split = max(0, min(before - page * P, P));
    const int64_t first = page * static_cast<int64_t>(P) + split - before,
                  half = residual + static_cast<int64_t>(page % 2) * P * D;
    const PageRows<T> k{static_cast<const T*>(kv.residual_k) + half, new_k + first * a.k.stride0, a.k.stride0, split, D};
    const PageRows<T> v{static_cast<const T*>(kv.residual_v) + half, new_v + first * a.v.stride0, a.v.stride0, split, D};
    PageOut<T> out{};
    out.P = P, out.L = static_cast<int>(kv.L), out.D = D;
    if (kv.stats || a.moments) {
      const int64_t block = blocks_of(kv, b, h)[page];
      if (kv.stats) out.stats = static_cast<T*>(kv.stats) + block * kv.stats_stride;
      if (a.moments) out.moments = static_cast<T*>(a.moments) + block * a.moments_stride;
      out.moments_group = static_cast<int>(a.moments_group);
    }
    if (kv.kv_dtype == Dtype::u8) {
      out.k_codes = static_cast<uint8_t*>(kv.k_pool) + slot * kv.k_stride;
      out.v_codes = static_cast<uint8_t*>(kv.v_pool) + slot * kv.v_stride;
      out.scales = kv.scales + slot * kv.scales_stride;
    } else {
      out.k = static_cast<T*>(kv.k_pool) + slot * kv.k_stride;
      out.v = static_cast<T*>(kv.v_pool) + slot * kv.v_stride;
    }
    seal_page<N, false>(k, v, out);
  }
  if (own >= 2) return;
  __syncthreads();
  const int parts = D / N, first = max(before, unsealed * P);
  for (int i = threadIdx.x; i < (after - first) * parts; i += kPageThreads) {
    const int t = first + i / parts, d = i % parts * N;
    if ((t / P - page) % 2 != 0) continue;
    const int64_t to = residual + static_cast<int64_t>(t % (2 * P)) * D + d;
    store_vector(static_cast<T*>(kv.residual_k) + to, load_vector<T, N>(new_k + (t - before) * a.k.stride0 + d));
    store_vector(static_cast<T*>(kv.residual_v) + to, load_vector<T, N>(new_v + (t - before) * a.v.stride0 + d));
  }
}

// Threads that share a key, or a value, that goes into its page at once.
template <int N>
__host__ __device__ inline int threads_a_row(const PagedKV& kv) {
  const int parts = static_cast<int>(kv.D) / N;
  return kv.kv_dtype == Dtype::u8 ? lanes_of_token(parts) : parts;
}

// Without a residual buffer: each new token into its page, N channels of a key or of a value a thread at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kPageThreads, 4) write_rows_kernel(const __grid_constant__ AppendArgs a) {
  join_stream();
  const PagedKV& kv = a.kv;
  const bool codes = kv.kv_dtype == Dtype::u8;
  const int P = static_cast<int>(kv.P), D = static_cast<int>(kv.D), h = blockIdx.y, threads = threads_a_row<N>(kv);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPageThreads + threadIdx.x, tokens = a.cu_seqlens_k[kv.B];
  if (tokens == 0) return;
  const int64_t token = min(i / (2 * threads), tokens - 1);
  int b = 0;  // the last sequence whose tokens begin at or before this one
  for (int end = static_cast<int>(kv.B); b + 1 < end;) {
    const int middle = (b + end) / 2;
    if (a.cu_seqlens_k[middle] <= token) b = middle;
    else end = middle;
  }
  const int t = a.context_lens[b] + static_cast<int>(token - a.cu_seqlens_k[b]), row = t % P;
  const int64_t slot = slots_of(kv, b, h)[t / P];
  // Not past already for a streaming head, and not beyond the last token.
  const bool there = slot >= 0 && i < tokens * 2 * threads, is_key = i / threads % 2 == 0;
  const View& x = is_key ? a.k : a.v;
  const T* const from = static_cast<const T*>(x.data) + token * x.stride0 + h * x.stride1;
  const int64_t to = slot * (is_key ? kv.k_stride : kv.v_stride) + row * D;
  void* const pool = is_key ? kv.k_pool : kv.v_pool;
  if (codes) {
    float* const scales = is_key ? key_grid(kv, slot, row) : value_grid(kv, slot, row);
    encode_token<N>(there, from, D, threads, static_cast<uint8_t*>(pool) + to, scales);
  } else if (there) {
    const int d = static_cast<int>(i % threads) * N;
    store_vector(static_cast<T*>(pool) + to + d, load_vector<T, N>(from + d));
  }
}

// All threads together go through the pairs, an X each; each thread reads kReads of them before it writes the first, as
// host memory answers late.
template <typename X>
__global__ void __launch_bounds__(256) gather_kernel(const __grid_constant__ GatherArgs a) {
  join_stream();
  constexpr int kReads = 4;
  const int64_t parts = a.bytes / static_cast<int64_t>(sizeof(X)), end = a.count * parts;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < end; first += kReads * threads) {
    X x[kReads];
    X* target[kReads] = {};
#pragma unroll
    for (int j = 0; j < kReads; ++j) {
      const int64_t i = first + j * threads, pair = i / parts, part = i % parts;
      const int64_t from = i < end ? a.src_ids[pair] : -1, to = i < end ? a.dst_ids[pair] : -1;
      if (from < 0 || to < 0) continue;
      x[j] = reinterpret_cast<const X*>(static_cast<const char*>(a.src) + from * a.src_stride)[part];
      target[j] = reinterpret_cast<X*>(static_cast<char*>(a.dst) + to * a.dst_stride) + part;
    }
#pragma unroll
    for (int j = 0; j < kReads; ++j)
      if (target[j]) *target[j] = x[j];
  }
}

}  // namespace lserve::cuda
