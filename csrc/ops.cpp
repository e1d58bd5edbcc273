// The table of contents: every op's schema, then its checks, allocation and dispatch, once for CPU and
// CUDA. Of torch only the stable ABI is used, so one build loads in every torch >= 2.11. Letters (B, Hq, H, D, P, L, M, N) as
// in kernels.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

#ifdef LSERVE_CUDA
#include "cuda/stream.h"
#endif

using lserve::OptTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shapes, units and sources: lserve_ext/ops.py. Dispatch per device: at the end of this file.
STABLE_TORCH_LIBRARY(lserve_ext, m) {
  // Pages: statistics, INT8 codes, the cache's storage
  m.def("page_stats(Tensor k, int group) -> Tensor");
  m.def("page_moments(Tensor k, int group) -> Tensor");
  m.def("quantize_kv(Tensor k, Tensor v, Tensor? stats) -> (Tensor k_codes, Tensor v_codes, Tensor scales)");
  m.def(
      "dequantize_kv(Tensor k_codes, Tensor v_codes, Tensor? stats, Tensor scales, ScalarType dtype)"
      " -> (Tensor k, Tensor v)");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor cu_seqlens_k, Tensor context_lens,"
      " Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!)? stats, Tensor(d!)? scales,"
      " Tensor block_table, Tensor slot_table, Tensor(e!)? residual_k, Tensor(f!)? residual_v, Tensor sealed,"
      " Tensor(g!)? moments) -> ()");
  m.def(
      "wanted_pages(Tensor windows, Tensor? lists, Tensor? local_start, int sink, int unit,"
      " Tensor block_table, Tensor sealed, Tensor first, int page_size) -> (Tensor pages, Tensor counts)");
  m.def(
      "resolve_pages(Tensor lists, Tensor block_table, Tensor(a!) slot_table, Tensor(b!) slot_blocks, Tensor(c!) last_use,"
      " Tensor(d!) clock, int keep) -> (Tensor src_ids, Tensor dst_ids)");
  m.def("gather_pages(Tensor src, Tensor src_ids, Tensor(a!) dst, Tensor dst_ids) -> ()");

  // Selection: which pages or tokens a retrieval head attends
  m.def("page_scores(Tensor q, Tensor stats, Tensor block_table, Tensor sealed, Tensor? windows) -> Tensor");
  m.def(
      "select_pages(Tensor scores, Tensor seq_lens, Tensor sealed, int page_size, int sink, int local, int count)"
      " -> (Tensor pages, Tensor local_start)");
  m.def(
      "select_tokens(Tensor mass, Tensor seq_lens, Tensor sealed, Tensor counts, int page_size, int max_picks)"
      " -> (Tensor tokens, Tensor local_start)");

  // Attention over sink, list and local; each returns what merge_states joins
  m.def(
      "prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " Tensor windows, Tensor? lists, int sink,"
      " Tensor? k_pool, Tensor? v_pool, Tensor? stats, Tensor? scales,"
      " Tensor? block_table, Tensor? slot_table, Tensor? residual_k, Tensor? residual_v, Tensor? sealed,"
      " Tensor? context_lens, int page_size, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "decode(Tensor q, Tensor windows, Tensor? lists, Tensor? local_start, int sink, int unit,"
      " Tensor k_pool, Tensor v_pool, Tensor? stats, Tensor? scales,"
      " Tensor block_table, Tensor slot_table, Tensor? residual_k, Tensor? residual_v, Tensor sealed,"
      " Tensor seq_lens, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_mass(Tensor q, Tensor lse, Tensor windows, Tensor? lists, Tensor? local_start, int sink, int unit,"
      " Tensor k_pool, Tensor v_pool, Tensor? stats, Tensor? scales,"
      " Tensor block_table, Tensor slot_table, Tensor? residual_k, Tensor? residual_v, Tensor sealed,"
      " Tensor seq_lens, float scale)"
      " -> Tensor");
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

namespace lserve {

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

namespace {

#ifdef LSERVE_CUDA
#define LSERVE_KERNELS(op) cpu::op, cuda::op
#else
#define LSERVE_KERNELS(op) cpu::op
#endif

// Calls the CPU or the CUDA kernel of an op on the current stream of its device.
template <class Args, class... Cuda>
void launch(const Tensor& on, const Args& args, void (*cpu)(const Args&), [[maybe_unused]] Cuda... cuda) {
  if (on.is_cpu()) return cpu(args);
#ifdef LSERVE_CUDA
  if (on.is_cuda()) {
    torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    void* stream = cuda::current_stream(on.get_device_index());
    return (cuda(args, stream), ...);
  }
#endif
  throw std::runtime_error("lserve_ext: this build has no kernel of the op for that device");
}

// ---------------------------------------------------------------------------------------------------
// The ops

// Allocates what page_stats and page_moments return, and fills it.
template <class... Kernels>
Tensor stats_of_groups(const char* op, const Tensor& k, int64_t group, Kernels... kernels) {
  const Checker check(op, k, "k");
  check.shape(k, "k", "[pages, P, D]", {any, any, any}).floating(k, "k");
  const int64_t pages = k.size(0), P = k.size(1), D = k.size(2);
  check.head_dim("k", D).at_least("k", P, 1);
  if (group < 1 || P % group) check.fail("group", "expected a divisor of the page size ", P, ", got ", group);
  Tensor stats = torch::stable::new_empty(k, {pages, P / group, 2, D});
  PageStatsArgs args{};
  args.k = view(k);
  args.stats = stats.mutable_data_ptr();
  args.pages = pages;
  args.P = P;
  args.L = group;
  args.D = D;
  args.dtype = kernel_dtype(k.scalar_type());
  launch(k, args, kernels...);
  return stats;
}

Tensor page_stats(Tensor k, int64_t group) { return stats_of_groups("page_stats", k, group, LSERVE_KERNELS(page_stats)); }

Tensor page_moments(Tensor k, int64_t group) { return stats_of_groups("page_moments", k, group, LSERVE_KERNELS(page_moments)); }

std::tuple<Tensor, Tensor, Tensor> quantize_kv(Tensor k, Tensor v, OptTensor stats) {
  const Checker check("quantize_kv", k, "k");
  check.shape(k, "k", "[pages, P, D]", {any, any, any}).floating(k, "k");
  const int64_t pages = k.size(0), P = k.size(1), D = k.size(2);
  check.head_dim("k", D).at_least("k", P, 1);
  check.shape(v, "v", "[pages, P, D]", {pages, P, D}).dtype(v, "v", k.scalar_type());
  QuantizeArgs args{};
  if (stats) {
    check.shape(*stats, "stats", "[pages, P/L, 2, D]", {pages, any, 2, D}, 4).dtype(*stats, "stats", k.scalar_type());
    args.stats = stats->const_data_ptr();
    args.L = check.group_tokens(*stats, "stats", P);
  }
  Tensor k_codes = torch::stable::new_empty(k, {pages, P, D}, ScalarType::Byte);
  Tensor v_codes = torch::stable::new_empty(k, {pages, P, D}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(k, {pages, stats ? 1 : 2, P, 2}, ScalarType::Float);
  args.k = view(k);
  args.v = view(v);
  args.k_codes = static_cast<uint8_t*>(k_codes.mutable_data_ptr());
  args.v_codes = static_cast<uint8_t*>(v_codes.mutable_data_ptr());
  args.scales = out_floats(scales);
  args.pages = pages;
  args.P = P;
  args.D = D;
  args.dtype = kernel_dtype(k.scalar_type());
  launch(k, args, LSERVE_KERNELS(quantize_kv));
  return {k_codes, v_codes, scales};
}

std::tuple<Tensor, Tensor> dequantize_kv(Tensor k_codes, Tensor v_codes, OptTensor stats, Tensor scales, ScalarType dtype) {
  const Checker check("dequantize_kv", k_codes, "k_codes");
  check.shape(k_codes, "k_codes", "[pages, P, D]", {any, any, any}, 3).dtype(k_codes, "k_codes", ScalarType::Byte);
  const int64_t pages = k_codes.size(0), P = k_codes.size(1), D = k_codes.size(2);
  check.head_dim("k_codes", D).at_least("k_codes", P, 1);
  check.shape(v_codes, "v_codes", "[pages, P, D]", {pages, P, D}, 3).dtype(v_codes, "v_codes", ScalarType::Byte);
  if (kernel_dtype(dtype) == Dtype::u8)
    check.fail("dtype", "expected dtype float32, float16 or bfloat16, got ", dtype_name(dtype));
  DequantizeArgs args{};
  if (stats) {
    check.shape(*stats, "stats", "[pages, P/L, 2, D]", {pages, any, 2, D}, 4).dtype(*stats, "stats", dtype);
    args.stats = stats->const_data_ptr();
    args.L = check.group_tokens(*stats, "stats", P);
  }
  check.shape(scales, "scales", "[pages, C, P, 2]", {pages, stats ? 1 : 2, P, 2}, 4).dtype(scales, "scales", ScalarType::Float);
  Tensor k = torch::stable::new_empty(k_codes, {pages, P, D}, dtype);
  Tensor v = torch::stable::new_empty(k_codes, {pages, P, D}, dtype);
  args.k_codes = static_cast<const uint8_t*>(k_codes.const_data_ptr());
  args.v_codes = static_cast<const uint8_t*>(v_codes.const_data_ptr());
  args.scales = floats(scales);
  args.k = k.mutable_data_ptr();
  args.v = v.mutable_data_ptr();
  args.pages = pages;
  args.P = P;
  args.D = D;
  args.dtype = kernel_dtype(dtype);
  launch(k_codes, args, LSERVE_KERNELS(dequantize_kv));
  return {k, v};
}

void append_kv(Tensor k, Tensor v, Tensor cu_seqlens_k, Tensor context_lens, Tensor k_pool, Tensor v_pool, OptTensor stats,
               OptTensor scales, Tensor block_table, Tensor slot_table, OptTensor residual_k, OptTensor residual_v,
               Tensor sealed, OptTensor moments) {
  const Checker check("append_kv", k, "k");
  check.shape(k, "k", "[N, H, D]", {any, any, any}).floating(k, "k");
  const int64_t N = k.size(0), H = k.size(1), D = k.size(2);
  check.head_dim("k", D);
  check.shape(v, "v", "[N, H, D]", {N, H, D}).dtype(v, "v", k.scalar_type());
  check.shape(context_lens, "context_lens", "[B]", {any}).dtype(context_lens, "context_lens", ScalarType::Int);
  const int64_t B = context_lens.size(0);
  check.shape(cu_seqlens_k, "cu_seqlens_k", "[B + 1]", {B + 1}).dtype(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int);
  AppendArgs args{};
  args.kv = check_paged(check, {k_pool, v_pool, stats, scales, block_table, slot_table, residual_k, residual_v, sealed},
                        k.scalar_type(), B, H, D);
  if (moments) {
    check.shape(*moments, "moments", "[blocks, P/L, 2, D]", {stats ? args.kv.blocks : any, any, 2, D}, 3);
    check.dtype(*moments, "moments", k.scalar_type());
    args.moments = moments->data_ptr();
    args.moments_stride = moments->stride(0);
    args.moments_group = check.group_tokens(*moments, "moments", args.kv.P);
    args.kv.blocks = moments->size(0);
  }
  if (!residual_k && (stats || moments))
    check.fail(stats ? "stats" : "moments", "expected None without a residual buffer, got a tensor");
  const auto given = [](const OptTensor& t) { return t ? &*t : nullptr; };
  check.written_apart({{&k_pool, "k_pool"},
                       {&v_pool, "v_pool"},
                       {given(residual_k), "residual_k"},
                       {given(residual_v), "residual_v"},
                       {given(stats), "stats"},
                       {given(scales), "scales"},
                       {given(moments), "moments"}},
                      {{&k, "k"}, {&v, "v"}});
  args.k = view(k);
  args.v = view(v);
  args.N = N;
  args.cu_seqlens_k = ints(cu_seqlens_k);
  args.context_lens = ints(context_lens);
  launch(k, args, LSERVE_KERNELS(append_kv));
}

std::tuple<Tensor, Tensor> wanted_pages(Tensor windows, OptTensor lists, OptTensor local_start, int64_t sink, int64_t unit,
                                        Tensor block_table, Tensor sealed, Tensor first, int64_t page_size) {
  const Checker check("wanted_pages", block_table, "block_table");
  check.shape(block_table, "block_table", "[B, H, M]", {any, any, any}).dtype(block_table, "block_table", ScalarType::Int);
  const int64_t B = block_table.size(0), H = block_table.size(1), M = block_table.size(2);
  check.at_least("page_size", page_size, 1);
  WantedArgs args{};
  args.mask = check_mask(check, windows, lists, local_start, B, H, page_size, sink, unit);
  check.shape(sealed, "sealed", "[B]", {B}).dtype(sealed, "sealed", ScalarType::Int);
  check.shape(first, "first", "[B]", {B}).dtype(first, "first", ScalarType::Int);
  Tensor pages = torch::stable::new_empty(block_table, {B, H, M}), counts = torch::stable::new_empty(block_table, {B, H});
  args.block_table = ints(block_table);
  args.block_stride0 = block_table.stride(0);
  args.block_stride1 = block_table.stride(1);
  args.sealed = ints(sealed);
  args.first = ints(first);
  args.pages = out_ints(pages);
  args.counts = out_ints(counts);
  args.B = B;
  args.H = H;
  args.M = M;
  args.P = page_size;
  launch(block_table, args, LSERVE_KERNELS(wanted_pages));
  return {pages, counts};
}

std::tuple<Tensor, Tensor> resolve_pages(Tensor lists, Tensor block_table, Tensor slot_table, Tensor slot_blocks,
                                         Tensor last_use, Tensor clock, int64_t keep) {
  const Checker check("resolve_pages", lists, "lists");
  check.shape(lists, "lists", "[B, H, K]", {any, any, any}).dtype(lists, "lists", ScalarType::Int);
  const int64_t B = lists.size(0), H = lists.size(1), K = lists.size(2);
  check.shape(block_table, "block_table", "[B, H, M]", {B, H, any}).dtype(block_table, "block_table", ScalarType::Int);
  const int64_t M = block_table.size(2);
  check.shape(slot_table, "slot_table", "[B, H, M]", {B, H, M}).dtype(slot_table, "slot_table", ScalarType::Int);
  check.shape(slot_blocks, "slot_blocks", "[S]", {any}).dtype(slot_blocks, "slot_blocks", ScalarType::Int);
  const int64_t S = slot_blocks.size(0);
  check.shape(last_use, "last_use", "[S]", {S}).dtype(last_use, "last_use", ScalarType::Int);
  check.shape(clock, "clock", "[1]", {1}).dtype(clock, "clock", ScalarType::Int);
  check.at_least("lists", B * H * K, 0).at_least("slot_blocks", S, 0).at_least("keep", keep, 0);
  check.written_apart({{&slot_table, "slot_table"}, {&slot_blocks, "slot_blocks"}, {&last_use, "last_use"}, {&clock, "clock"}},
                      {{&lists, "lists"}, {&block_table, "block_table"}});
  Tensor src_ids = torch::stable::new_empty(lists, {B, H, K}), dst_ids = torch::stable::new_empty(lists, {B, H, K});
  ResolveArgs args{};
  args.lists = ints(lists);
  args.list_stride0 = lists.stride(0);
  args.list_stride1 = lists.stride(1);
  args.block_table = ints(block_table);
  args.block_stride0 = block_table.stride(0);
  args.block_stride1 = block_table.stride(1);
  args.slot_table = out_ints(slot_table);
  args.slot_stride0 = slot_table.stride(0);
  args.slot_stride1 = slot_table.stride(1);
  args.slot_blocks = out_ints(slot_blocks);
  args.last_use = out_ints(last_use);
  args.clock = out_ints(clock);
  args.src_ids = out_ints(src_ids);
  args.dst_ids = out_ints(dst_ids);
  args.B = B;
  args.H = H;
  args.M = M;
  args.S = S;
  args.K = K;
  args.keep = keep;
#ifdef LSERVE_CUDA
  std::optional<Tensor> victims;
  if (lists.is_cuda()) {
    victims = torch::stable::new_empty(lists, {B, H, K});
    args.victims = out_ints(*victims);
  }
#endif
  launch(lists, args, LSERVE_KERNELS(resolve_pages));
  return {src_ids, dst_ids};
}

void gather_pages(Tensor src, Tensor src_ids, Tensor dst, Tensor dst_ids) {
  // One of the two may be pinned host memory.
  const bool to_device = src.defined() && src.is_cpu();
  const Tensor& on = to_device ? dst : src;
  const Checker check("gather_pages", on, to_device ? "dst" : "src");
  check.given(dst, "dst");
  if (src.dim() < 1) check.fail("src", "expected [rows, ...], got a tensor without dimensions");
  if (!src.is_cpu() && !dst.is_cpu() && src.device() != dst.device())
    check.fail("dst", "expected the device of src, or pinned host memory, got another device");
  std::vector<int64_t> row = sizes(src);
  if (dst.scalar_type() != src.scalar_type())
    check.fail("dst", "expected dtype ", dtype_name(src.scalar_type()), ", got ", dtype_name(dst.scalar_type()));
  std::vector<int64_t> got = sizes(dst);
  row[0] = any;
  if (got.size() != row.size() || !std::equal(row.begin() + 1, row.end(), got.begin() + 1))
    check.fail("dst", "expected rows of src, ", text(row), ", got ", text(got));
  const auto inner_contiguous = [&](const Tensor& t, const char* name) {
    int64_t stride = 1;
    for (int64_t i = t.dim() - 1; i > 0; --i) {
      if (t.size(i) > 1 && t.stride(i) != stride) check.fail(name, "expected contiguous rows, got strided ones");
      stride *= t.size(i);
    }
    return stride;
  };
  const int64_t elements = inner_contiguous(src, "src");
  inner_contiguous(dst, "dst");
  check.written(dst, "dst");
  check.shape(src_ids, "src_ids", "[count]", {any}).dtype(src_ids, "src_ids", ScalarType::Int);
  check.shape(dst_ids, "dst_ids", "[count]", {src_ids.size(0)}).dtype(dst_ids, "dst_ids", ScalarType::Int);
  const int64_t width = static_cast<int64_t>(src.element_size());
  GatherArgs args{};
  args.src = src.const_data_ptr();
  args.src_ids = ints(src_ids);
  args.dst = dst.mutable_data_ptr();
  args.dst_ids = ints(dst_ids);
  args.src_stride = src.stride(0) * width;
  args.dst_stride = dst.stride(0) * width;
  args.bytes = elements * width;
  args.src_rows = src.size(0);
  args.dst_rows = dst.size(0);
  args.count = src_ids.size(0);
  launch(on, args, LSERVE_KERNELS(gather_pages));
}

Tensor page_scores(Tensor q, Tensor stats, Tensor block_table, Tensor sealed, OptTensor windows) {
  const Checker check("page_scores", q, "q");
  check.shape(q, "q", "[B, Hq, D]", {any, any, any}).floating(q, "q");
  const int64_t B = q.size(0), D = q.size(2);
  check.head_dim("q", D);
  check.shape(stats, "stats", "[blocks, P/L, 2, D]", {any, any, 2, D}, 3).dtype(stats, "stats", q.scalar_type());
  check.at_least("stats", stats.size(1), 1);
  check.shape(block_table, "block_table", "[B, H, M]", {B, any, any}).dtype(block_table, "block_table", ScalarType::Int);
  const int64_t H = block_table.size(1), M = block_table.size(2), G = check.group_heads("q", q.size(1), H);
  check.shape(sealed, "sealed", "[B]", {B}).dtype(sealed, "sealed", ScalarType::Int);
  if (windows) check.shape(*windows, "windows", "[H]", {H}).dtype(*windows, "windows", ScalarType::Int);
  Tensor scores = torch::stable::new_empty(q, {B, H, M}, ScalarType::Float);
  PageScoresArgs args{};
  args.q = view(q);
  args.stats = stats.const_data_ptr();
  args.block_table = ints(block_table);
  args.sealed = ints(sealed);
  args.windows = windows ? ints(*windows) : nullptr;
  args.scores = out_floats(scores);
  args.stats_stride = stats.stride(0);
  args.blocks = stats.size(0);
  args.groups = stats.size(1);
  args.block_stride0 = block_table.stride(0);
  args.block_stride1 = block_table.stride(1);
  args.B = B;
  args.H = H;
  args.M = M;
  args.G = G;
  args.D = D;
  args.dtype = kernel_dtype(q.scalar_type());
  launch(q, args, LSERVE_KERNELS(page_scores));
  return scores;
}

std::tuple<Tensor, Tensor> select_pages(Tensor scores, Tensor seq_lens, Tensor sealed, int64_t page_size, int64_t sink,
                                        int64_t local, int64_t count) {
  const Checker check("select_pages", scores, "scores");
  check.shape(scores, "scores", "[B, H, M]", {any, any, any}).dtype(scores, "scores", ScalarType::Float);
  const int64_t B = scores.size(0), H = scores.size(1), M = scores.size(2);
  check.shape(seq_lens, "seq_lens", "[B]", {B}).dtype(seq_lens, "seq_lens", ScalarType::Int);
  check.shape(sealed, "sealed", "[B]", {B}).dtype(sealed, "sealed", ScalarType::Int);
  check.at_least("page_size", page_size, 1).at_least("sink", sink, 0).at_least("local", local, 1).at_least("count", count, 0);
  Tensor pages = check.allocate(scores, "count", {B, H, count}, ScalarType::Int);
  Tensor local_start = torch::stable::new_empty(scores, {B}, ScalarType::Int);
  SelectPagesArgs args{};
  args.scores = floats(scores);
  args.seq_lens = ints(seq_lens);
  args.sealed = ints(sealed);
  args.pages = out_ints(pages);
  args.local_start = out_ints(local_start);
  args.score_stride0 = scores.stride(0);
  args.score_stride1 = scores.stride(1);
  args.B = B;
  args.H = H;
  args.M = M;
  args.K = count;
  args.P = page_size;
  args.sink = sink;
  args.local = local;
  launch(scores, args, LSERVE_KERNELS(select_pages));
  return {pages, local_start};
}

std::tuple<Tensor, Tensor> select_tokens(Tensor mass, Tensor seq_lens, Tensor sealed, Tensor counts, int64_t page_size,
                                         int64_t max_picks) {
  const Checker check("select_tokens", mass, "mass");
  check.shape(mass, "mass", "[B, H, tokens]", {any, any, any}).dtype(mass, "mass", ScalarType::Float);
  const int64_t B = mass.size(0), H = mass.size(1);
  check.shape(seq_lens, "seq_lens", "[B]", {B}).dtype(seq_lens, "seq_lens", ScalarType::Int);
  check.shape(sealed, "sealed", "[B]", {B}).dtype(sealed, "sealed", ScalarType::Int);
  check.shape(counts, "counts", "[B]", {B}).dtype(counts, "counts", ScalarType::Int);
  check.at_least("page_size", page_size, 1).at_least("max_picks", max_picks, 0);
  Tensor tokens = check.allocate(mass, "max_picks", {B, H, max_picks}, ScalarType::Int);
  Tensor local_start = torch::stable::new_empty(mass, {B}, ScalarType::Int);
  SelectTokensArgs args{};
  args.mass = floats(mass);
  args.seq_lens = ints(seq_lens);
  args.sealed = ints(sealed);
  args.counts = ints(counts);
  args.tokens = out_ints(tokens);
  args.local_start = out_ints(local_start);
  args.mass_stride0 = mass.stride(0);
  args.mass_stride1 = mass.stride(1);
  args.B = B;
  args.H = H;
  args.width = mass.size(2);
  args.K = max_picks;
  args.P = page_size;
  launch(mass, args, LSERVE_KERNELS(select_tokens));
  return {tokens, local_start};
}

std::tuple<Tensor, Tensor> prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor windows,
                                   OptTensor lists, int64_t sink, OptTensor k_pool, OptTensor v_pool, OptTensor stats,
                                   OptTensor scales, OptTensor block_table, OptTensor slot_table, OptTensor residual_k,
                                   OptTensor residual_v, OptTensor sealed, OptTensor context_lens, int64_t page_size,
                                   double scale) {
  const Checker check("prefill", q, "q");
  check.shape(q, "q", "[N, Hq, D]", {any, any, any}).floating(q, "q");
  const int64_t N = q.size(0), Hq = q.size(1), D = q.size(2);
  check.head_dim("q", D).at_least("page_size", page_size, 1);
  check.shape(k, "k", "[N, H, D]", {any, any, D}).dtype(k, "k", q.scalar_type());
  const int64_t H = k.size(1), G = check.group_heads("q", Hq, H);
  check.shape(v, "v", "[N, H, D]", {k.size(0), H, D}).dtype(v, "v", q.scalar_type());
  check.shape(cu_seqlens_q, "cu_seqlens_q", "[B + 1]", {any}).dtype(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int);
  const int64_t B = cu_seqlens_q.size(0) - 1;
  if (B < 0) check.fail("cu_seqlens_q", "expected [B + 1], got [0]");
  check.shape(cu_seqlens_k, "cu_seqlens_k", "[B + 1]", {B + 1}).dtype(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int);

  PrefillArgs args{};
  if (context_lens) {
    check.shape(*context_lens, "context_lens", "[B]", {B}).dtype(*context_lens, "context_lens", ScalarType::Int);
    if (!k_pool || !v_pool || !block_table || !slot_table || !sealed)
      check.fail("k_pool", "expected pools, tables and sealed, because context_lens are given, got None");
    args.kv = check_paged(check, {*k_pool, *v_pool, stats, scales, *block_table, *slot_table, residual_k, residual_v, *sealed},
                          q.scalar_type(), B, H, D);
    if (args.kv.P != page_size) check.fail("page_size", "expected that of the pools, ", args.kv.P, ", got ", page_size);
    args.context_lens = ints(*context_lens);
  } else {
    if (k_pool) check.fail("context_lens", "expected the tokens held per sequence, because pools are given, got None");
    args.kv.B = B;
    args.kv.H = H;
    args.kv.D = D;
    args.kv.P = page_size;
    args.kv.dtype = args.kv.kv_dtype = kernel_dtype(q.scalar_type());
  }
  args.mask = check_mask(check, windows, std::nullopt, std::nullopt, B, H, page_size, sink, page_size);
  if (lists) {
    check.shape(*lists, "lists", "[B, H, R, K]", {B, H, any, any}).dtype(*lists, "lists", ScalarType::Int);
    args.mask.has_lists = true;
    args.mask.lists = ints(*lists);
    args.mask.list_stride0 = lists->stride(0);
    args.mask.list_stride1 = lists->stride(1);
    args.list_stride2 = lists->stride(2);
    args.list_rows = lists->size(2);
    args.mask.K = lists->size(3);
  }
  Tensor out = torch::stable::new_empty(q, {N, Hq, D});
  Tensor lse = torch::stable::new_empty(q, {N, Hq}, ScalarType::Float);
  args.q = view(q);
  args.k = view(k);
  args.v = view(v);
  args.cu_seqlens_q = ints(cu_seqlens_q);
  args.cu_seqlens_k = ints(cu_seqlens_k);
  args.out = out.mutable_data_ptr();
  args.lse = out_floats(lse);
  args.Nq = N;
  args.Nk = k.size(0);
  args.G = G;
  args.scale = static_cast<float>(scale);
#ifdef LSERVE_CUDA
  std::optional<Tensor> workspace;
  if (const int64_t floats = q.is_cuda() ? cuda::prefill_workspace(args) : 0; floats > 0) {
    workspace = torch::stable::new_empty(q, {floats}, ScalarType::Float);
    args.workspace = out_floats(*workspace);
  }
#endif
  launch(q, args, LSERVE_KERNELS(prefill));
  return {out, lse};
}

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor windows, OptTensor lists, OptTensor local_start, int64_t sink, int64_t unit,
                                  Tensor k_pool, Tensor v_pool, OptTensor stats, OptTensor scales, Tensor block_table,
                                  Tensor slot_table, OptTensor residual_k, OptTensor residual_v, Tensor sealed, Tensor seq_lens,
                                  double scale) {
  const Checker check("decode", q, "q");
  check.shape(q, "q", "[B, Hq, D]", {any, any, any}).floating(q, "q");
  const int64_t B = q.size(0), Hq = q.size(1), D = q.size(2);
  check.head_dim("q", D);
  check.shape(block_table, "block_table", "[B, H, M]", {B, any, any});
  const int64_t H = block_table.size(1);
  DecodeArgs args{};
  args.G = check.group_heads("q", Hq, H);
  args.kv = check_paged(check, {k_pool, v_pool, stats, scales, block_table, slot_table, residual_k, residual_v, sealed},
                        q.scalar_type(), B, H, D);
  args.mask = check_mask(check, windows, lists, local_start, B, H, args.kv.P, sink, unit);
  check.shape(seq_lens, "seq_lens", "[B]", {B}).dtype(seq_lens, "seq_lens", ScalarType::Int);
  Tensor out = torch::stable::new_empty(q, {B, Hq, D});
  Tensor lse = torch::stable::new_empty(q, {B, Hq}, ScalarType::Float);
  args.q = view(q);
  args.seq_lens = ints(seq_lens);
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr();
  args.lse = out_floats(lse);
#ifdef LSERVE_CUDA
  std::optional<Tensor> workspace;
  if (q.is_cuda()) {
    workspace = torch::stable::new_empty(q, {cuda::decode_workspace(args)}, ScalarType::Float);
    args.workspace = out_floats(*workspace);
  }
#endif
  launch(q, args, LSERVE_KERNELS(decode));
  return {out, lse};
}

Tensor attention_mass(Tensor q, Tensor lse, Tensor windows, OptTensor lists, OptTensor local_start, int64_t sink, int64_t unit,
                      Tensor k_pool, Tensor v_pool, OptTensor stats, OptTensor scales, Tensor block_table, Tensor slot_table,
                      OptTensor residual_k, OptTensor residual_v, Tensor sealed, Tensor seq_lens, double scale) {
  const Checker check("attention_mass", q, "q");
  check.shape(q, "q", "[B, T, Hq, D]", {any, any, any, any}).floating(q, "q");
  const int64_t B = q.size(0), T = q.size(1), Hq = q.size(2), D = q.size(3);
  check.head_dim("q", D);
  check.shape(lse, "lse", "[B, T, Hq]", {B, T, Hq}, 3).dtype(lse, "lse", ScalarType::Float);
  check.shape(block_table, "block_table", "[B, H, M]", {B, any, any});
  const int64_t H = block_table.size(1);
  MassArgs args{};
  args.G = check.group_heads("q", Hq, H);
  args.kv = check_paged(check, {k_pool, v_pool, stats, scales, block_table, slot_table, residual_k, residual_v, sealed},
                        q.scalar_type(), B, H, D);
  args.mask = check_mask(check, windows, lists, local_start, B, H, args.kv.P, sink, unit);
  check.shape(seq_lens, "seq_lens", "[B]", {B}).dtype(seq_lens, "seq_lens", ScalarType::Int);
  Tensor mass = check.allocate(q, "block_table", {B, H, args.kv.M * args.kv.P}, ScalarType::Float);
  args.q = view(q);
  args.lse = floats(lse);
  args.seq_lens = ints(seq_lens);
  args.mass = out_floats(mass);
  args.T = T;
  args.scale = static_cast<float>(scale);
  launch(q, args, LSERVE_KERNELS(attention_mass));
  return mass;
}

std::tuple<Tensor, Tensor> merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  const Checker check("merge_states", out_a, "out_a");
  check.floating(out_a, "out_a");
  if (out_a.dim() < 1) check.fail("out_a", "expected [..., D], got a tensor without dimensions");
  const std::vector<int64_t> dims = sizes(out_a);
  const int64_t D = dims.back();
  const auto same = [&](const Tensor& t, const char* name, const std::vector<int64_t>& want, ScalarType dtype) {
    check.given(t, name);
    check.dtype(t, name, dtype);
    if (sizes(t) != want) check.fail(name, "expected ", text(want), ", got ", text(sizes(t)));
    if (!t.is_contiguous()) check.fail(name, "expected a contiguous tensor, got a strided one");
    if (t.device() != out_a.device()) check.fail(name, "expected the device of out_a, got another device");
  };
  const std::vector<int64_t> rows(dims.begin(), dims.end() - 1);
  check.head_dim("out_a", D);
  same(out_a, "out_a", dims, out_a.scalar_type());
  same(lse_a, "lse_a", rows, ScalarType::Float);
  same(out_b, "out_b", dims, out_a.scalar_type());
  same(lse_b, "lse_b", rows, ScalarType::Float);
  Tensor out = torch::stable::empty_like(out_a), lse = torch::stable::empty_like(lse_a);
  MergeArgs args{};
  args.out_a = out_a.const_data_ptr();
  args.out_b = out_b.const_data_ptr();
  args.lse_a = floats(lse_a);
  args.lse_b = floats(lse_b);
  args.out = out.mutable_data_ptr();
  args.lse = out_floats(lse);
  args.rows = lse_a.numel();
  args.D = D;
  args.dtype = kernel_dtype(out_a.scalar_type());
  launch(out_a, args, LSERVE_KERNELS(merge_states));
  return {out, lse};
}

}  // namespace
}  // namespace lserve

namespace {

// The same function serves every device: `launch` picks the kernel.
template <class Library>
void implement(Library& m) {
  m.impl("page_stats", TORCH_BOX(&lserve::page_stats));
  m.impl("page_moments", TORCH_BOX(&lserve::page_moments));
  m.impl("quantize_kv", TORCH_BOX(&lserve::quantize_kv));
  m.impl("dequantize_kv", TORCH_BOX(&lserve::dequantize_kv));
  m.impl("append_kv", TORCH_BOX(&lserve::append_kv));
  m.impl("wanted_pages", TORCH_BOX(&lserve::wanted_pages));
  m.impl("resolve_pages", TORCH_BOX(&lserve::resolve_pages));
  m.impl("gather_pages", TORCH_BOX(&lserve::gather_pages));
  m.impl("page_scores", TORCH_BOX(&lserve::page_scores));
  m.impl("select_pages", TORCH_BOX(&lserve::select_pages));
  m.impl("select_tokens", TORCH_BOX(&lserve::select_tokens));
  m.impl("prefill", TORCH_BOX(&lserve::prefill));
  m.impl("decode", TORCH_BOX(&lserve::decode));
  m.impl("attention_mass", TORCH_BOX(&lserve::attention_mass));
  m.impl("merge_states", TORCH_BOX(&lserve::merge_states));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lserve_ext, CPU, m) { implement(m); }
#ifdef LSERVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lserve_ext, CUDA, m) { implement(m); }
#endif
