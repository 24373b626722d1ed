// GloBE's operators on the CPU: schemas, checks, and the choice of the instruction set at run time.
#include "globe_ops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace globe {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

static int64_t threads() { return torch::stable::get_num_threads(); }

// f(begin, end) over [0, n) on torch's threads; `cost` (about a nanosecond at 1) of one item keeps small jobs on one.
template <class F>
static void parallel(int64_t n, int64_t cost, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(cost, 1));
  if (n <= grain) {
    if (n > 0) f(int64_t(0), n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// The kernels four times in one binary. A name for each level; the last two are AVX-512, without and with bfloat16 and byte products.
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the baseline's only travel between inlined functions
#define ISA plain
#define LEVEL 0
#include "cpu_kernels.h"
#undef ISA
#undef LEVEL

#if defined(__x86_64__)
#if defined(__clang__)
#define TARGET_BEGIN(set) _Pragma(STRING(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(set) _Pragma("GCC push_options") _Pragma(STRING(GCC target(set)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
#define STRING(...) #__VA_ARGS__

TARGET_BEGIN("avx2,fma,f16c")
#define ISA avx2
#define LEVEL 1
#include "cpu_kernels.h"
#undef ISA
#undef LEVEL
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define ISA avx512
#define LEVEL 2
#include "cpu_kernels.h"
#undef ISA
#undef LEVEL
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,gfni")
#define ISA avx512_bf16
#define LEVEL 3
#include "cpu_kernels.h"
#undef ISA
#undef LEVEL
TARGET_END
#endif

static int level() {  // GLOBE_ISA lowers it, for tests
  static const int chosen = [] {
    int best = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = 1;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl"))
        best = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                       __builtin_cpu_supports("gfni")
                   ? 3
                   : 2;
    }
#endif
    const char* want = std::getenv("GLOBE_ISA");
    const std::string name = want ? want : "";
    return std::min(best, name == "plain" ? 0 : name == "avx2" ? 1 : name == "avx512" ? 2 : 3);
  }();
  return chosen;
}

#if defined(__x86_64__)
#define RUN(kernel, ...)                                                                             \
  (level() == 3   ? avx512_bf16::kernel(__VA_ARGS__)                                                 \
   : level() == 2 ? avx512::kernel(__VA_ARGS__)                                                      \
   : level() == 1 ? avx2::kernel(__VA_ARGS__)                                                        \
                  : plain::kernel(__VA_ARGS__))
#else
#define RUN(kernel, ...) plain::kernel(__VA_ARGS__)
#endif

static std::string about() {  // "1 avx512": the schemas' version and what runs on this CPU
  return std::to_string(kVersion) + " " + (level() == 3 ? "avx512_bf16" : level() == 2 ? "avx512" : level() == 1 ? "avx2" : "plain");
}

// ---- operators ---------------------------------------------------------------------------------------
static void compose_out(Tensor bank, Tensor idx, Tensor val, std::string act, Tensor out, std::optional<Tensor> slot) {
  Compose c = compose_args(bank, idx, val, act);
  into(c, bank, idx, out, slot);
  for (int64_t e = 0; c.slot && e < c.E; ++e)
    check(0 <= c.slot[e] && c.slot[e] < out.size(0), "globe::compose: slot in [0, ", out.size(0), ") expected, found ", c.slot[e]);
  RUN(compose, c);
}

static Tensor compose(Tensor bank, Tensor idx, Tensor val, std::string act) {
  compose_args(bank, idx, val, act);
  Tensor out = torch::stable::new_empty(bank, {idx.size(0), bank.size(1), bank.size(2)});
  compose_out(bank, idx, val, act, out, std::nullopt);
  return out;
}

static std::tuple<Tensor, Tensor> compose_backward(Tensor grad, Tensor bank, Tensor idx, Tensor val, std::string act) {
  Compose c = compose_args(bank, idx, val, act);
  expect("globe::compose_backward", "grad", grad, bank.scalar_type(), bank, {idx.size(0), bank.size(1), bank.size(2)});
  Tensor dbank = torch::stable::empty_like(bank), dval = torch::stable::empty_like(val);
  c.grad = grad.const_data_ptr(), c.dbank = dbank.mutable_data_ptr(), c.dval = dval.mutable_data_ptr(), c.backward = true;
  RUN(compose, c);
  return {dbank, dval};
}

static std::tuple<Tensor, Tensor> simplex(Tensor x, double alpha) {
  Type type = simplex_type(x, alpha);
  const int64_t n = x.size(x.dim() - 1), rows = x.numel() / n;
  Tensor p = torch::stable::empty_like(x);
  Tensor size = torch::stable::new_empty(x, support_shape(x), ScalarType::Long);
  RUN(simplex, type, x.const_data_ptr(), p.mutable_data_ptr(), (int64_t*)size.mutable_data_ptr(), rows, n, alpha == 2 ? 1 : 2);
  return {p, size};
}

static Tensor simplex_backward(Tensor grad, Tensor p, double alpha) {
  Type type = simplex_type(p, alpha);
  check(grad.numel() == p.numel() && grad.is_contiguous() && grad.scalar_type() == p.scalar_type() && grad.is_cpu(),
        "globe::simplex_backward: grad: expected a contiguous tensor like p, of shape ", shape_of(p), ", found ", shape_of(grad));
  Tensor dx = torch::stable::empty_like(p);
  const int64_t n = p.size(p.dim() - 1);
  RUN(simplex_backward, type, grad.const_data_ptr(), p.const_data_ptr(), dx.mutable_data_ptr(), p.numel() / n, n, alpha == 2 ? 1 : 2);
  return dx;
}

static Tensor experts_decode(Tensor x, Tensor index, Tensor weights, Tensor slot, Tensor row, Tensor gate, std::optional<Tensor> gate_A,
                             Tensor up, std::optional<Tensor> up_A, Tensor down, std::optional<Tensor> down_A,
                             std::vector<int64_t> cached, std::vector<double> scale, std::vector<double> shift, std::string act) {
  Decode a = decode_args(x, index, weights, slot, row, gate, gate_A, up, up_A, down, down_A, cached, scale, shift, act);
  Tensor out = torch::stable::empty_like(x);
  a.out = out.mutable_data_ptr();
  RUN(decode, a);
  return out;
}

// The same straight from the banks, with nothing composed: the bases act on x, and their results are mixed.
static Tensor experts_mixed(Tensor x, Tensor index, Tensor weights, Tensor row, Tensor gate, std::optional<Tensor> gate_A,
                            std::optional<Tensor> gate_idx, std::optional<Tensor> gate_val, Tensor up, std::optional<Tensor> up_A,
                            std::optional<Tensor> up_idx, std::optional<Tensor> up_val, Tensor down, std::optional<Tensor> down_A,
                            std::optional<Tensor> down_idx, std::optional<Tensor> down_val, std::vector<double> scale,
                            std::vector<double> shift, std::string act) {
  Decode a = decode_args(x, index, weights, row, row, gate, gate_A, up, up_A, down, down_A, {bool(gate_A), bool(up_A), bool(down_A)}, scale,
                         shift, act);
  mixture(a.gate, "gate", gate_idx, gate_val, x);
  mixture(a.up, "up", up_idx, up_val, x);
  mixture(a.down, "down", down_idx, down_val, x);
  Tensor out = torch::stable::empty_like(x);
  a.out = out.mutable_data_ptr();
  RUN(decode, a);
  return out;
}

static Tensor linear(Tensor x, Tensor W, std::optional<Tensor> bias) {
  const char* op = "globe::linear";
  const Type type = type_of(op, "x", x);
  check(type != Type::f64, op, ": x: expected float32, bfloat16 or float16, found float64");
  expect(op, "x", x, x.scalar_type(), x, {-1, -1});
  expect(op, "W", W, x.scalar_type(), x, {-1, x.size(1)});
  if (bias) expect(op, "bias", *bias, x.scalar_type(), x, {W.size(0)});
  Tensor out = torch::stable::new_empty(x, {x.size(0), W.size(0)});
  RUN(linear, type, x.const_data_ptr(), W.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(), x.size(0), W.size(0),
      x.size(1));
  return out;
}

// x (n, columns) float32, width (n, columns) uint8 in 0..6, weight (n, columns) float32, levels (7, 128) float32, subsets (512,) int64
// -> states (n, columns) int16
static Tensor trellis_encode(Tensor x, Tensor width, Tensor weight, Tensor levels, Tensor subsets) {
  const char* op = "globe::trellis_encode";
  check(x.dim() == 2, op, ": expected x (n, columns), found ", shape_of(x));
  expect(op, "x", x, ScalarType::Float, x, {x.size(0), x.size(1)});
  expect(op, "width", width, ScalarType::Byte, x, {x.size(0), x.size(1)});
  expect(op, "weight", weight, ScalarType::Float, x, {x.size(0), x.size(1)});
  expect(op, "levels", levels, ScalarType::Float, x, {7, 128});
  expect(op, "subsets", subsets, ScalarType::Long, x, {512});
  const uint8_t* w = (const uint8_t*)width.const_data_ptr();
  for (int64_t i = 0; i < width.numel(); ++i)
    check(w[i] <= 6, op, ": width: expected 0 to 6, found ", int(w[i]));
  const int64_t* s = (const int64_t*)subsets.const_data_ptr();
  for (int64_t i = 0; i < 512; ++i)
    check(0 <= s[i] && s[i] < 4, op, ": subsets: expected 0 to 3, found ", s[i]);
  Tensor states = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Short);
  RUN(trellis, (const float*)x.const_data_ptr(), w, (const float*)weight.const_data_ptr(), (const float*)levels.const_data_ptr(), s,
      (int16_t*)states.mutable_data_ptr(), x.size(0), x.size(1));
  return states;
}

// A tensor's numbers in float32, converted into `kept` where it is not
template <class T> static void convert(const T* from, std::vector<float>& to) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = float(from[i]);
}
static const float* in_float(const char* op, const char* name, const Tensor& t, std::vector<float>& kept) {
  const Type type = type_of(op, name, t);
  check(type != Type::f64, op, ": ", name, ": expected float32, bfloat16 or float16, found float64");
  if (type == Type::f32) return (const float*)t.const_data_ptr();
  kept.resize(t.numel());
  if (type == Type::bf16) convert((const BFloat16*)t.const_data_ptr(), kept);
  else convert((const Half*)t.const_data_ptr(), kept);
  return kept.data();
}
// A result of this shape in x's dtype: f writes it in float32
template <class F> static Tensor in_dtype_of(const Tensor& x, int64_t rows, int64_t cols, const F& f) {
  Tensor out = torch::stable::new_empty(x, {rows, cols});
  if (x.scalar_type() == ScalarType::Float) {
    f((float*)out.mutable_data_ptr());
    return out;
  }
  std::vector<float> wide(rows * cols);
  f(wide.data());
  auto narrow = [&](auto* to) {
    for (size_t i = 0; i < wide.size(); ++i) to[i] = wide[i];
  };
  if (x.scalar_type() == ScalarType::BFloat16) narrow((BFloat16*)out.mutable_data_ptr());
  else narrow((Half*)out.mutable_data_ptr());
  return out;
}

// x (t, columns), codes and scale as in group_coded, bias (rows,) -> (t, rows) in x's dtype
static Tensor coded_linear(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> bias) {
  const char* op = "globe::coded_linear";
  const GroupCoded m = group_coded(op, codes, scale, x);
  expect(op, "x", x, x.scalar_type(), x, {-1, m.columns});
  if (bias) expect(op, "bias", *bias, bias->scalar_type(), x, {m.rows});
  std::vector<float> kept[2];
  const float* from = in_float(op, "x", x, kept[0]);
  const float* added = bias ? in_float(op, "bias", *bias, kept[1]) : nullptr;
  return in_dtype_of(x, x.size(0), m.rows, [&](float* out) {
    RUN(coded_linear, m, from, added, out, x.size(0), x.scalar_type() == ScalarType::BFloat16);
  });
}

// x (T, d), weights (T, k), index (T, k) and row (E,) int64; families as in coded_family -> (T, d) in x's dtype
static Tensor coded_experts(Tensor x, Tensor index, Tensor weights, Tensor row, std::vector<Tensor> gate, std::vector<Tensor> up,
                            std::vector<Tensor> down, Tensor levels, Tensor subsets, std::string act) {
  const char* op = "globe::coded_experts";
  CodedExperts a{};
  expect(op, "x", x, x.scalar_type(), x, {-1, -1});
  expect(op, "index", index, ScalarType::Long, x, {x.size(0), -1});
  expect(op, "weights", weights, weights.scalar_type(), x, {x.size(0), index.size(1)});
  expect(op, "row", row, ScalarType::Long, x, {-1});
  expect(op, "levels", levels, ScalarType::Float, x, {7, 128});
  expect(op, "subsets", subsets, ScalarType::Long, x, {512});
  a.act = act_of(op, act);
  a.half = x.scalar_type() == ScalarType::BFloat16;
  a.T = x.size(0), a.k = index.size(1), a.E = row.size(0), a.d = x.size(1);
  std::vector<float> kept[2];
  a.x = in_float(op, "x", x, kept[0]), a.weights = in_float(op, "weights", weights, kept[1]);
  a.levels = (const float*)levels.const_data_ptr(), a.subsets = (const int64_t*)subsets.const_data_ptr();
  a.index = (const int64_t*)index.const_data_ptr(), a.row = (const int64_t*)row.const_data_ptr();
  a.gate = coded_family(op, gate, x, a.d);
  a.up = coded_family(op, up, x, a.d);
  a.down = coded_family(op, down, x, a.gate.p);
  check(a.up.p == a.gate.p && a.up.n == a.gate.n && a.down.n == a.gate.n, op, ": gate, up, down: expected as many experts and rows each");
  check(a.down.order && a.down.p == a.d, op, ": down: expected an order of columns and ", a.d, " rows");
  return in_dtype_of(x, a.T, a.d, [&](float* out) {
    a.out = out;
    RUN(coded_experts, a);
  });
}

// codes (bytes,) uint8, width (rows, blocks) uint8 -> (rows, 8 blocks) float32
static Tensor unpack(Tensor codes, Tensor width, Tensor levels, Tensor subsets) {
  const char* op = "globe::unpack";
  expect(op, "codes", codes, ScalarType::Byte, codes, {-1});
  expect(op, "width", width, ScalarType::Byte, codes, {-1, -1});
  expect(op, "levels", levels, ScalarType::Float, codes, {7, 128});
  expect(op, "subsets", subsets, ScalarType::Long, codes, {512});
  const int64_t rows = width.size(0), blocks = width.size(1);
  const uint8_t* w = (const uint8_t*)width.const_data_ptr();
  for (int64_t i = 0; i < rows * blocks; ++i)
    check(w[i] <= 6 && (i < blocks || w[i] <= w[i - blocks]), op, ": width: expected 0 to 6 bits, no more in a later row, found ", int(w[i]));
  Tensor out = torch::stable::new_empty(codes, {rows, 8 * blocks}, ScalarType::Float);
  RUN(coded_values, (const uint8_t*)codes.const_data_ptr(), codes.numel(), w, rows, blocks, (const float*)levels.const_data_ptr(),
      (const int64_t*)subsets.const_data_ptr(), (float*)out.mutable_data_ptr());
  return out;
}

}  // namespace globe

STABLE_TORCH_LIBRARY(globe, m) {
  m.def("about() -> str");
  m.def("compose(Tensor bank, Tensor idx, Tensor val, str activation) -> Tensor");
  m.def("compose_out(Tensor bank, Tensor idx, Tensor val, str activation, Tensor(a!) out, Tensor? slot) -> ()");
  m.def("compose_backward(Tensor grad, Tensor bank, Tensor idx, Tensor val, str activation) -> (Tensor, Tensor)");
  m.def("simplex(Tensor x, float alpha) -> (Tensor, Tensor)");
  m.def("simplex_backward(Tensor grad, Tensor p, float alpha) -> Tensor");
  m.def("experts_decode(Tensor x, Tensor index, Tensor weights, Tensor slot, Tensor row, Tensor gate, Tensor? gate_A, Tensor up, "
        "Tensor? up_A, Tensor down, Tensor? down_A, int[] cached, float[] scale, float[] shift, str activation) -> Tensor");
  m.def("experts_mixed(Tensor x, Tensor index, Tensor weights, Tensor row, Tensor gate, Tensor? gate_A, Tensor? gate_idx, Tensor? gate_val, "
        "Tensor up, Tensor? up_A, Tensor? up_idx, Tensor? up_val, Tensor down, Tensor? down_A, Tensor? down_idx, Tensor? down_val, "
        "float[] scale, float[] shift, str activation) -> Tensor");
  m.def("linear(Tensor x, Tensor W, Tensor? bias) -> Tensor");
  m.def("trellis_encode(Tensor x, Tensor width, Tensor weight, Tensor levels, Tensor subsets) -> Tensor");
  m.def("coded_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor");
  m.def("coded_experts(Tensor x, Tensor index, Tensor weights, Tensor row, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor levels, "
        "Tensor subsets, str activation) -> Tensor");
  m.def("unpack(Tensor codes, Tensor width, Tensor levels, Tensor subsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(globe, CompositeExplicitAutograd, m) { m.impl("about", TORCH_BOX(&globe::about)); }

STABLE_TORCH_LIBRARY_IMPL(globe, CPU, m) {
  m.impl("compose", TORCH_BOX(&globe::compose));
  m.impl("compose_out", TORCH_BOX(&globe::compose_out));
  m.impl("compose_backward", TORCH_BOX(&globe::compose_backward));
  m.impl("simplex", TORCH_BOX(&globe::simplex));
  m.impl("simplex_backward", TORCH_BOX(&globe::simplex_backward));
  m.impl("experts_decode", TORCH_BOX(&globe::experts_decode));
  m.impl("experts_mixed", TORCH_BOX(&globe::experts_mixed));
  m.impl("linear", TORCH_BOX(&globe::linear));
  m.impl("trellis_encode", TORCH_BOX(&globe::trellis_encode));
  m.impl("coded_linear", TORCH_BOX(&globe::coded_linear));
  m.impl("coded_experts", TORCH_BOX(&globe::coded_experts));
  m.impl("unpack", TORCH_BOX(&globe::unpack));
}
