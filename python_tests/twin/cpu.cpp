// The CUDA kernels in the place of the CPU kernels: with this file, csrc/ops.cpp and the host's cuda_runtime.h, the
// same op tests that run on the CPU and on a GPU run csrc/cuda on a CPU.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace lserve::cpu {

void page_stats(const PageStatsArgs& a) { cuda::page_stats(a, nullptr); }
void page_moments(const PageStatsArgs& a) { cuda::page_moments(a, nullptr); }
void quantize_kv(const QuantizeArgs& a) { cuda::quantize_kv(a, nullptr); }
void dequantize_kv(const DequantizeArgs& a) { cuda::dequantize_kv(a, nullptr); }
void append_kv(const AppendArgs& a) { cuda::append_kv(a, nullptr); }
void gather_pages(const GatherArgs& a) { cuda::gather_pages(a, nullptr); }
void wanted_pages(const WantedArgs& a) { cuda::wanted_pages(a, nullptr); }
void page_scores(const PageScoresArgs& a) { cuda::page_scores(a, nullptr); }
void select_pages(const SelectPagesArgs& a) { cuda::select_pages(a, nullptr); }
void select_tokens(const SelectTokensArgs& a) { cuda::select_tokens(a, nullptr); }
void attention_mass(const MassArgs& a) { cuda::attention_mass(a, nullptr); }
void merge_states(const MergeArgs& a) { cuda::merge_states(a, nullptr); }

void resolve_pages(const ResolveArgs& a) {
  std::vector<int32_t> victims(a.B * a.H * a.K, -1);
  ResolveArgs args = a;
  args.victims = victims.data();
  cuda::resolve_pages(args, nullptr);
}

// Memory for partial results that holds no number until one is written; null if it is to hold nothing.
std::unique_ptr<float, decltype(&free)> workspace(int64_t floats) {
  const int64_t bytes = floats * sizeof(float);
  if (bytes == 0) return {nullptr, free};
  float* const memory = static_cast<float*>(malloc(bytes));
  memset(memory, 0xff, bytes);
  return {memory, free};
}

void decode(const DecodeArgs& a) {
  const auto memory = workspace(cuda::decode_workspace(a));
  DecodeArgs args = a;
  args.workspace = memory.get();
  cuda::decode(args, nullptr);
}

void prefill(const PrefillArgs& a) {
  const auto memory = workspace(cuda::prefill_workspace(a));
  PrefillArgs args = a;
  args.workspace = memory.get();
  cuda::prefill(args, nullptr);
}

}  // namespace lserve::cpu
