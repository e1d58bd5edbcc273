// From torch's tensors to the structs of kernels.h: checks, whose messages name the argument, what was expected and what
// came. Only this file and ops.cpp know torch.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace lserve {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// ---------------------------------------------------------------------------------------------------
// Checks. Every message reads `lserve_ext::op: argument: expected X, got Y`.

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline Dtype kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: return Dtype::u8;
  }
}

inline std::string text(const std::vector<int64_t>& dims) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i) s << ", ";
    if (dims[i] < 0) s << '*';
    else s << dims[i];
  }
  s << ']';
  return s.str();
}

inline std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> dims(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) dims[i] = t.size(i);
  return dims;
}

constexpr int64_t any = -1;  // a dimension of any size

class Checker {
 public:
  Checker(const char* op, const Tensor& like, const char* name) : op_(op), device_(given(like, name).device()) {}

  template <class... Parts>
  [[noreturn]] void fail(const char* name, const Parts&... parts) const {
    std::ostringstream s;
    s << "lserve_ext::" << op_ << ": " << name << ": ";
    (s << ... << parts);
    throw std::runtime_error(s.str());
  }

  const Tensor& given(const Tensor& t, const char* name) const {
    if (!t.defined()) fail(name, "expected a tensor, got None");
    return t;
  }

  // The last `inner` dimensions must be contiguous; the strides of the others are free.
  const Checker& shape(const Tensor& t, const char* name, const char* letters, std::initializer_list<int64_t> want,
                       int64_t inner = 1) const {
    if (given(t, name).device() != device_) fail(name, "expected the device of the other arguments, got another device");
    const int64_t dims = t.dim();
    bool ok = dims == static_cast<int64_t>(want.size());
    for (int64_t i = 0; ok && i < dims; ++i) ok = want.begin()[i] == any || want.begin()[i] == t.size(i);
    if (!ok) fail(name, "expected ", letters, " = ", text(std::vector<int64_t>(want)), ", got ", text(sizes(t)));
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= dims - inner && t.numel() > 0; --i) {
      if (t.size(i) > 1 && t.stride(i) != stride)
        fail(name, "expected the last ", inner, " dimension(s) of ", letters, " to be contiguous, got stride ", t.stride(i),
             " in dimension ", i);
      stride *= t.size(i);
    }
    return *this;
  }

  const Checker& dtype(const Tensor& t, const char* name, ScalarType want) const {
    if (t.scalar_type() != want) fail(name, "expected dtype ", dtype_name(want), ", got ", dtype_name(t.scalar_type()));
    return *this;
  }

  const Checker& floating(const Tensor& t, const char* name) const {
    if (kernel_dtype(t.scalar_type()) == Dtype::u8)
      fail(name, "expected dtype float32, float16 or bfloat16, got ", dtype_name(t.scalar_type()));
    return *this;
  }

  // Kernels hold counts and positions in 32 bits.
  const Checker& at_least(const char* name, int64_t value, int64_t least) const {
    if (value < least) fail(name, "expected at least ", least, ", got ", value);
    if (value > INT32_MAX) fail(name, "expected at most ", INT32_MAX, ", got ", value);
    return *this;
  }

  // A tensor that an op writes: no two of its elements may lie in one place.
  const Checker& written(const Tensor& t, const char* name) const {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) == 0) return *this;
      if (t.size(i) > 1) dims.emplace_back(t.stride(i), t.size(i));
    }
    std::sort(dims.begin(), dims.end());
    int64_t extent = 1;
    for (const auto& [stride, size] : dims) {
      if (stride < extent) fail(name, "expected rows that do not overlap, because they are written, got stride ", stride);
      extent = stride * (size - 1) + extent;
    }
    return *this;
  }

  struct Named {
    const Tensor* tensor;  // null: not given
    const char* name;
  };

  // Each tensor that is written has rows of its own, and shares memory neither with another one nor with what is read.
  const Checker& written_apart(std::initializer_list<Named> written_ones, std::initializer_list<Named> read_ones) const {
    struct Range {
      Named named;
      const char *begin, *end;
    };
    std::vector<Range> seen;
    const auto add = [&](const Named& named, size_t others) {
      const auto [begin, end] = range(*named.tensor, 0);
      for (size_t i = 0; i < others; ++i)
        if (begin < seen[i].end && seen[i].begin < end && !interleaved(*seen[i].named.tensor, *named.tensor))
          fail(named.name, "expected memory of its own, got some of ", seen[i].named.name, "'s, and one of the two is written");
      seen.push_back({named, begin, end});
    };
    for (const Named& named : written_ones)
      if (named.tensor) {
        written(*named.tensor, named.name);
        add(named, seen.size());
      }
    const size_t count = seen.size();
    for (const Named& named : read_ones)
      if (named.tensor) add(named, count);
    return *this;
  }

  // An allocation whose failure names the argument that asked for so much.
  Tensor allocate(const Tensor& like, const char* name, const std::vector<int64_t>& dims, ScalarType dtype) const {
    try {
      return torch::stable::new_empty(like, dims, dtype);
    } catch (const std::exception&) {
      fail(name, "expected a result that fits in memory, got ", text(dims), " of ", dtype_name(dtype));
    }
  }

  // Tokens of a group, of which stats [.., groups, 2, D] has those of a page of P.
  int64_t group_tokens(const Tensor& stats, const char* name, int64_t P) const {
    const int64_t groups = stats.size(1);
    if (groups < 1 || P % groups) fail(name, "expected a number of groups that divides P = ", P, ", got ", groups);
    return P / groups;
  }

  const Checker& head_dim(const char* name, int64_t D) const {
    if (D < 16 || D > 256 || D % 16) fail(name, "expected a head dimension D that is a multiple of 16 up to 256, got ", D);
    return *this;
  }

  int64_t group_heads(const char* name, int64_t Hq, int64_t H) const {
    if (H == 0 || Hq % H) fail(name, "expected query heads to be a multiple of the ", H, " kv heads, got ", Hq);
    return Hq / H;
  }

 private:
  // Whether rows of the one lie between those of the other, as K and V of a block do in [blocks, 2, P, D].
  static bool interleaved(const Tensor& a, const Tensor& b) {
    const int64_t stride = a.stride(0) * static_cast<int64_t>(a.element_size());
    if (stride <= 0 || stride != b.stride(0) * static_cast<int64_t>(b.element_size())) return false;
    const auto [a_row, a_end] = range(a, 1);
    const auto [b_row, b_end] = range(b, 1);
    const int64_t after = ((b_row - a_row) % stride + stride) % stride;
    return after >= a_end - a_row && stride - after >= b_end - b_row;
  }

  // Where a tensor begins and ends, or its first row if `first` is 1.
  static std::pair<const char*, const char*> range(const Tensor& t, int64_t first) {
    const char* begin = static_cast<const char*>(t.const_data_ptr());
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) == 0) return {begin, begin};
      if (i >= first) last += (t.size(i) - 1) * t.stride(i);
    }
    return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
  }

  const char* op_;
  torch::stable::Device device_;
};

inline View view(const Tensor& t) {
  return {t.const_data_ptr(), t.dim() > 1 ? t.stride(0) : 0, t.dim() > 2 ? t.stride(1) : 0, t.dim() > 3 ? t.stride(2) : 0};
}

inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* out_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline int32_t* out_ints(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

// ---------------------------------------------------------------------------------------------------
// The nine tensors of a paged layer

struct PagedTensors {
  Tensor k_pool, v_pool;
  OptTensor stats, scales;
  Tensor block_table, slot_table;
  OptTensor residual_k, residual_v;
  Tensor sealed;
};

inline PagedKV check_paged(const Checker& check, const PagedTensors& t, ScalarType dtype, int64_t B, int64_t H, int64_t D) {
  check.shape(t.k_pool, "k_pool", "[blocks, P, D]", {any, any, D}, 2);
  const int64_t slots = t.k_pool.size(0), P = t.k_pool.size(1);
  check.at_least("k_pool", P, 1);
  const bool int8 = t.k_pool.scalar_type() == ScalarType::Byte;
  if (!int8 && t.k_pool.scalar_type() != dtype)
    check.fail("k_pool", "expected dtype ", dtype_name(dtype), " or uint8, got ", dtype_name(t.k_pool.scalar_type()));
  check.shape(t.v_pool, "v_pool", "[blocks, P, D]", {slots, P, D}, 2).dtype(t.v_pool, "v_pool", t.k_pool.scalar_type());

  PagedKV kv{};
  kv.blocks = slots;
  if (t.stats) {
    check.shape(*t.stats, "stats", "[blocks, P/L, 2, D]", {any, any, 2, D}, 3).dtype(*t.stats, "stats", dtype);
    kv.stats = t.stats->data_ptr();
    kv.stats_stride = t.stats->stride(0);
    kv.blocks = t.stats->size(0);
    kv.L = check.group_tokens(*t.stats, "stats", P);
  }
  if (int8 != t.scales.has_value())
    check.fail("scales", int8 ? "expected a tensor, because the pools are uint8, got None"
                              : "expected None, because the pools are not uint8, got a tensor");
  if (t.scales) {
    kv.scale_rows = t.stats ? 1 : 2;
    check.shape(*t.scales, "scales", "[blocks, C, P, 2]", {slots, kv.scale_rows, P, 2}, 3);
    check.dtype(*t.scales, "scales", ScalarType::Float);
    kv.scales = static_cast<float*>(t.scales->data_ptr());
    kv.scales_stride = t.scales->stride(0);
  }
  check.shape(t.block_table, "block_table", "[B, H, M]", {B, H, any}).dtype(t.block_table, "block_table", ScalarType::Int);
  kv.M = t.block_table.size(2);
  if (kv.M > INT32_MAX / P)
    check.fail("block_table", "expected M * P up to ", INT32_MAX, ", which is what positions may reach, got M = ", kv.M);
  check.shape(t.slot_table, "slot_table", "[B, H, M]", {B, H, kv.M}).dtype(t.slot_table, "slot_table", ScalarType::Int);
  check.shape(t.sealed, "sealed", "[B]", {B}).dtype(t.sealed, "sealed", ScalarType::Int);
  if (t.residual_k.has_value() != t.residual_v.has_value())
    check.fail("residual_v", "expected residual_k and residual_v, or neither, got one");
  if (t.residual_k) {
    check.shape(*t.residual_k, "residual_k", "[B, H, 2P, D]", {B, H, 2 * P, D}, 2).dtype(*t.residual_k, "residual_k", dtype);
    check.shape(*t.residual_v, "residual_v", "[B, H, 2P, D]", {B, H, 2 * P, D}, 2).dtype(*t.residual_v, "residual_v", dtype);
    if (t.residual_k->stride(0) != t.residual_v->stride(0) || t.residual_k->stride(1) != t.residual_v->stride(1))
      check.fail("residual_v", "expected the strides of residual_k, got others");
    kv.residual_k = t.residual_k->data_ptr();
    kv.residual_v = t.residual_v->data_ptr();
    kv.residual_stride0 = t.residual_k->stride(0);
    kv.residual_stride1 = t.residual_k->stride(1);
  }
  kv.k_pool = t.k_pool.data_ptr();
  kv.v_pool = t.v_pool.data_ptr();
  kv.k_stride = t.k_pool.stride(0);
  kv.v_stride = t.v_pool.stride(0);
  kv.block_table = ints(t.block_table);
  kv.slot_table = ints(t.slot_table);
  kv.block_stride0 = t.block_table.stride(0);
  kv.block_stride1 = t.block_table.stride(1);
  kv.slot_stride0 = t.slot_table.stride(0);
  kv.slot_stride1 = t.slot_table.stride(1);
  kv.sealed = ints(t.sealed);
  kv.slots = slots;
  kv.B = B, kv.H = H, kv.P = P, kv.D = D;
  kv.dtype = kernel_dtype(dtype);
  kv.kv_dtype = kernel_dtype(t.k_pool.scalar_type());
  return kv;
}

inline Mask check_mask(const Checker& check, const Tensor& windows, const OptTensor& lists, const OptTensor& local_start,
                       int64_t B, int64_t H, int64_t P, int64_t sink, int64_t unit) {
  check.shape(windows, "windows", "[H]", {H}).dtype(windows, "windows", ScalarType::Int);
  check.at_least("sink", sink, 0);
  if (unit != P && unit != 1) check.fail("unit", "expected the page size ", P, " or 1, got ", unit);
  Mask mask{};
  mask.windows = ints(windows);
  mask.sink = sink;
  mask.unit = unit;
  mask.page_units = static_cast<int32_t>(P / unit);
  if (lists.has_value() != local_start.has_value())
    check.fail("local_start", "expected lists and local_start, or neither, got one");
  if (lists) {
    check.shape(*lists, "lists", "[B, H, K]", {B, H, any}).dtype(*lists, "lists", ScalarType::Int);
    check.shape(*local_start, "local_start", "[B]", {B}).dtype(*local_start, "local_start", ScalarType::Int);
    mask.has_lists = true;
    mask.lists = ints(*lists);
    mask.local_start = ints(*local_start);
    mask.list_stride0 = lists->stride(0);
    mask.list_stride1 = lists->stride(1);
    mask.K = lists->size(2);
  }
  return mask;
}

}  // namespace lserve
