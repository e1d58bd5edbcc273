// One plain C++ signature per op. Nothing here knows torch: ops.cpp checks and unpacks tensors, and
// then calls cpu::op(args) or cuda::op(args, stream).
//
// Letters, as in the README: B sequences, Hq query heads, H kv heads, G = Hq / H, D head dimension,
// P page size, L statistics group, M pages a sequence may have, N tokens of a packed batch.
// Pools are indexed by block (or slot): [blocks, ...], block stride given, inner part contiguous.
// All strides are in elements; the last dimension of q, k and v is always contiguous.
#pragma once
#include <cstdint>
#include <functional>

#include "divisor.h"

namespace lserve {

enum class Dtype { f32, f16, bf16, u8 };

// A local window that reaches back to page 0: a dense head.
constexpr int32_t kDense = INT32_MAX;
// Decode cuts a sequence's own entries every kChunkTokens tokens and folds the partial results in
// order, so bits do not depend on threads, splits or the rest of the batch.
constexpr int64_t kChunkTokens = 256;

// A [a, b, D] or [a, b, c, D] tensor whose last dimension is contiguous.
struct View {
  const void* data;
  int64_t stride0, stride1, stride2;
};

// What a layer holds. Page p of (sequence b, kv head h) is read from the pools if p < sealed[b],
// else from the residual buffer, at half p % 2.
struct PagedKV {
  void* k_pool;                // [blocks, P, D] dtype, or uint8 codes
  void* v_pool;                // [blocks, P, D]
  void* stats;                 // [blocks, P/L, 2, D] dtype: min and max of every group; or null
  float* scales;               // [blocks, C, P, 2] (step, min) a token: V's; with C = 2 also K's. Null if not uint8
  const int32_t* block_table;  // [B, H, M] block of the statistics; -1: the page is not held any more
  const int32_t* slot_table;   // [B, H, M] block of codes and scales; -1: not resident
  void* residual_k;            // [B, H, 2P, D] dtype: token t of a sequence lies in row t % 2P; or null: all is in the pools
  void* residual_v;            // [B, H, 2P, D]
  const int32_t* sealed;       // [B] pages in the pools
  int64_t k_stride, v_stride, stats_stride, scales_stride;  // of a block
  int64_t block_stride0, block_stride1, slot_stride0, slot_stride1;
  int64_t residual_stride0, residual_stride1;  // of residual_k and residual_v
  int64_t blocks, slots;                       // rows of stats; rows of the other pools
  int64_t B, H, M, D;
  Divisor P, L;           // L = 0 without statistics
  int64_t scale_rows;     // C; 0 without scales
  Dtype dtype, kv_dtype;  // of q, k, v, the residual buffer and stats; of the pools
};

// Which pages (or tokens) a query attends: sink, list and local, see README "What a head attends".
struct Mask {
  const int32_t* windows;      // [H] local pages; kDense: all pages; 0: the head follows its list
  const int32_t* lists;        // [B, H, K] ascending units, -1 padded, row stride 1; or null
  const int32_t* local_start;  // [B] first local unit of the heads that follow a list; or null
  int64_t list_stride0, list_stride1;
  bool has_lists;      // a list of width 0 has no data, and yet is one
  int64_t K;           // width of a list
  int64_t sink;        // pages
  Divisor unit;        // tokens an entry of a list stands for: P or 1
  int32_t page_units;  // entries that a page takes
};

struct PageStatsArgs {  // and of page_moments
  View k;               // [pages, P, D]
  void* stats;          // out [pages, P/L, 2, D]
  int64_t pages, P, L, D;
  Dtype dtype;
};

struct QuantizeArgs {
  View k, v;                   // [pages, P, D]
  const void* stats;           // [pages, P/L, 2, D], or null: K on a per-token grid of its own
  uint8_t *k_codes, *v_codes;  // out [pages, P, D]
  float* scales;               // out [pages, C, P, 2]
  int64_t pages, P, L, D;
  Dtype dtype;
};

struct DequantizeArgs {
  const uint8_t *k_codes, *v_codes;  // [pages, P, D]
  const void* stats;                 // [pages, P/L, 2, D] or null
  const float* scales;               // [pages, C, P, 2]
  void *k, *v;                       // out [pages, P, D]
  int64_t pages, P, L, D;
  Dtype dtype;
};

struct AppendArgs {
  View k, v;                    // [N, H, D] packed
  const int32_t* cu_seqlens_k;  // [B + 1]
  const int32_t* context_lens;  // [B] tokens held before
  PagedKV kv;
  void* moments;             // [blocks, P/group, 2, D] dtype: see page_moments; or null
  int64_t moments_stride;    // of a block
  int64_t N, moments_group;  // moments_group = 0 without moments
};

struct PageScoresArgs {
  View q;                      // [B, Hq, D]
  const void* stats;           // [blocks, P/L, 2, D]
  const int32_t* block_table;  // [B, H, M]
  const int32_t* sealed;       // [B]
  const int32_t* windows;      // [H]: heads other than 0 are skipped (score -inf); or null: none is
  float* scores;               // out [B, H, M]; -inf where there is no sealed page
  int64_t stats_stride, block_stride0, block_stride1, blocks;
  int64_t B, H, M, G, D, groups;  // groups = P/L
  Dtype dtype;
};

struct SelectPagesArgs {
  const float* scores;      // [B, H, M], row stride 1
  const int32_t* seq_lens;  // [B] tokens held, the query's own included
  const int32_t* sealed;    // [B]
  int32_t* pages;           // out [B, H, K]
  int32_t* local_start;     // out [B]
  int64_t score_stride0, score_stride1;
  int64_t B, H, M, K, P;
  int64_t sink, local;  // pages
};

struct SelectTokensArgs {
  const float* mass;        // [B, H, tokens], row stride 1
  const int32_t* seq_lens;  // [B] tokens held, the query's own included
  const int32_t* sealed;    // [B]
  const int32_t* counts;    // [B]: min(K, counts[b]) are picked, and at least as many are local
  int32_t* tokens;          // out [B, H, K]
  int32_t* local_start;     // out [B] first local token
  int64_t mass_stride0, mass_stride1;
  int64_t B, H, width, K, P;
};

struct WantedArgs {
  Mask mask;                   // lists: [B, H, K]
  const int32_t* block_table;  // [B, H, M]
  const int32_t* sealed;       // [B]
  const int32_t* first;        // [B] position of the first query
  int32_t* pages;              // out [B, H, M]
  int32_t* counts;             // out [B, H]
  int64_t block_stride0, block_stride1;
  int64_t B, H, M;
  Divisor P;
};

// Some blocks of the tier below lie in slots, too.
struct ResolveArgs {
  const int32_t* lists;        // [B, H, K] pages; -1: none
  const int32_t* block_table;  // [B, H, M]
  int32_t* slot_table;         // [B, H, M] slot where a page may lie; it does if the slot holds the page's block
  int32_t* slot_blocks;        // [S] block that lies in a slot; -1: none
  int32_t* last_use;           // [S] call that wanted it last
  int32_t* clock;              // [1] calls
  int32_t *src_ids, *dst_ids;  // out [B, H, K]: blocks to copy, and slots to copy them to
  int32_t* victims;            // CUDA: workspace [B, H, K]; null on the CPU
  int64_t list_stride0, list_stride1, block_stride0, block_stride1, slot_stride0, slot_stride1;
  int64_t B, H, M, S, K;
  int64_t keep;  // pages that count as used now; the others of the lists make room first
};

struct GatherArgs {
  const void* src;                        // [rows, bytes]; CUDA: of the device or pinned host memory, as dst
  const int32_t* src_ids;                 // [count]; a pair with a -1 is passed over
  void* dst;                              // [rows, bytes]
  const int32_t* dst_ids;                 // [count]
  int64_t src_stride, dst_stride, bytes;  // of a row, in bytes
  int64_t src_rows, dst_rows, count;
};

struct DecodeArgs {
  View q;  // [B, Hq, D]
  PagedKV kv;
  Mask mask;
  const int32_t* seq_lens;  // [B] tokens held, the query's own included
  void* out;                // out [B, Hq, D]
  float* lse;               // out [B, Hq]
  float* workspace;         // CUDA: partial results, see decode_workspace; null on the CPU
  Divisor G;
  float scale;
};

struct MassArgs {
  View q;            // [B, T, Hq, D]: the last T tokens of every sequence
  const float* lse;  // [B, T, Hq] contiguous; a row of -inf is no query
  PagedKV kv;
  Mask mask;
  const int32_t* seq_lens;  // [B]
  float* mass;              // out [B, H, M * P]
  int64_t T;
  Divisor G;
  float scale;
};

struct PrefillArgs {
  View q;                                      // [Nq, Hq, D] packed
  View k, v;                                   // [Nk, H, D] packed: the new tokens
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1]; queries are the last of their sequence's new tokens
  const int32_t* context_lens;                 // [B] tokens held before; or null: none
  PagedKV kv;                                  // pools null: nothing is held
  Mask mask;                                   // lists: [B, H, R, K], row r for the queries of page r after the first query's
  int64_t list_stride2;
  int64_t list_rows;  // R
  void* out;          // out [Nq, Hq, D]
  float* lse;         // out [Nq, Hq]
  float* workspace;   // CUDA: partial results, see prefill_workspace; else null
  int64_t Nq, Nk;
  Divisor G;
  float scale;
};

struct MergeArgs {
  const void *out_a, *out_b;   // [rows, D]
  const float *lse_a, *lse_b;  // [rows]
  void* out;                   // out [rows, D]
  float* lse;                  // out [rows]
  int64_t rows, D;
  Dtype dtype;
};

// Runs body(begin, end) over [0, count) on torch's threads. Bodies must not throw.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

namespace cpu {
void page_stats(const PageStatsArgs&);
void page_moments(const PageStatsArgs&);
void quantize_kv(const QuantizeArgs&);
void dequantize_kv(const DequantizeArgs&);
void append_kv(const AppendArgs&);
void wanted_pages(const WantedArgs&);
void resolve_pages(const ResolveArgs&);
void gather_pages(const GatherArgs&);
void page_scores(const PageScoresArgs&);
void select_pages(const SelectPagesArgs&);
void select_tokens(const SelectTokensArgs&);
void decode(const DecodeArgs&);
void attention_mass(const MassArgs&);
void prefill(const PrefillArgs&);
void merge_states(const MergeArgs&);
}  // namespace cpu

// On a stream of the current device: a cudaStream_t. Nothing waits, and what a graph captures may be replayed
// with other lengths, because grids follow from shapes alone.
namespace cuda {
void page_stats(const PageStatsArgs&, void* stream);
void page_moments(const PageStatsArgs&, void* stream);
void quantize_kv(const QuantizeArgs&, void* stream);
void dequantize_kv(const DequantizeArgs&, void* stream);
void append_kv(const AppendArgs&, void* stream);
void wanted_pages(const WantedArgs&, void* stream);
void resolve_pages(const ResolveArgs&, void* stream);
void gather_pages(const GatherArgs&, void* stream);
void page_scores(const PageScoresArgs&, void* stream);
void select_pages(const SelectPagesArgs&, void* stream);
void select_tokens(const SelectTokensArgs&, void* stream);
void decode(const DecodeArgs&, void* stream);
void attention_mass(const MassArgs&, void* stream);
void prefill(const PrefillArgs&, void* stream);
void merge_states(const MergeArgs&, void* stream);

int64_t decode_workspace(const DecodeArgs&);    // floats that DecodeArgs::workspace must hold
int64_t prefill_workspace(const PrefillArgs&);  // the same; 0: it may be null
}  // namespace cuda

}  // namespace lserve
