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
void prefill(const PrefillArgs& a) { cuda::prefill(a, nullptr); }
void merge_states(const MergeArgs& a) { cuda::merge_states(a, nullptr); }

void resolve_pages(const ResolveArgs& a) {
  std::vector<int32_t> victims(a.B * a.H * a.K, -1);
  ResolveArgs args = a;
  args.victims = victims.data();
  cuda::resolve_pages(args, nullptr);
}

void decode(const DecodeArgs& a) {
  const int64_t bytes = cuda::decode_workspace(a) * sizeof(float);
  const std::unique_ptr<void, decltype(&free)> workspace(malloc(bytes + 1), free);
  memset(workspace.get(), 0xff, bytes);  // NaN
  DecodeArgs args = a;
  args.workspace = static_cast<float*>(workspace.get());
  cuda::decode(args, nullptr);
}

}  // namespace lserve::cpu
