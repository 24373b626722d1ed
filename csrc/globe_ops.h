// What the CPU and CUDA operators share: argument checks, and the plain structs that the kernels take.
//
// Only torch's stable ABI is used (torch/csrc/stable), so one binary serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace globe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kVersion = 7;  // of the operators' schemas; globe.py refuses a library of another one

enum class Type { f32, bf16, f16, f64 };
enum class Act { identity, silu, tanh, gelu_tanh, relu };

// Like STD_TORCH_CHECK, with the operator's name instead of a source line: users read these.
template <class... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", args..., ""));
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

inline Type type_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    default: check(false, op, ": ", name, ": expected float32, float64, bfloat16 or float16"); return Type::f32;
  }
}

inline Act act_of(const char* op, const std::string& name) {
  if (name == "identity") return Act::identity;
  if (name == "silu") return Act::silu;
  if (name == "tanh") return Act::tanh;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "relu") return Act::relu;
  check(false, op, ": unknown activation ", name);
  return Act::identity;
}

// Shape (-1: any size), dtype, device and contiguity of one argument.
inline void expect(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like,
                   std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  std::string want;
  for (int64_t n : shape) {
    fits = fits && (n < 0 || t.size(i) == n);
    want += (i++ ? ", " : "") + (n < 0 ? std::string("*") : std::to_string(n));
  }
  check(fits, op, ": ", name, ": expected shape (", want, "), found ", shape_of(t));
  check(t.scalar_type() == dtype, op, ": ", name, ": expected another dtype than ", int(t.scalar_type()), " (expected ", int(dtype), ")");
  check(t.is_contiguous(), op, ": ", name, ": expected a contiguous tensor of shape ", shape_of(t));
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, ": ", name,
        ": expected the device of the other arguments");
}

inline ScalarType wide(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// out[slot[e]] = act(sum_j val[e, j] bank[idx[e, j]]), each of n = r * d numbers; slot null: out[e].
struct Compose {
  Type type;
  Act act;
  int64_t m, n, E, s;
  const void* bank;
  const int64_t* idx;
  const void* val;   // float, or double with a double bank
  void* out;         // forward
  const int64_t* slot;
  const void* grad;  // backward: of out
  void* dbank;
  void* dval;        // in val's type
  bool backward;     // asked for here: pointers of empty tensors are null
};

inline Compose compose_args(const Tensor& bank, const Tensor& idx, const Tensor& val, const std::string& act) {
  const char* op = "globe::compose";
  Compose c{};
  c.type = type_of(op, "bank", bank);
  c.act = act_of(op, act);
  check(c.act <= Act::tanh, op, ": activation: expected identity, silu or tanh, found ", act);
  expect(op, "bank", bank, bank.scalar_type(), bank, {-1, -1, -1});
  expect(op, "idx", idx, ScalarType::Long, bank, {-1, -1});
  expect(op, "val", val, wide(bank), bank, {idx.size(0), idx.size(1)});
  c.m = bank.size(0), c.n = bank.size(1) * bank.size(2), c.E = idx.size(0), c.s = idx.size(1);
  c.bank = bank.const_data_ptr();
  c.idx = static_cast<const int64_t*>(idx.const_data_ptr());
  c.val = val.const_data_ptr();
  return c;
}

inline void into(Compose& c, const Tensor& bank, const Tensor& idx, Tensor& out, const std::optional<Tensor>& slot) {
  const char* op = "globe::compose";
  expect(op, "out", out, bank.scalar_type(), bank, {slot ? -1 : idx.size(0), bank.size(1), bank.size(2)});
  if (slot) expect(op, "slot", *slot, ScalarType::Long, bank, {idx.size(0)});
  c.out = out.mutable_data_ptr();
  c.slot = slot ? static_cast<const int64_t*>(slot->const_data_ptr()) : nullptr;
}

inline Type simplex_type(const Tensor& x, double alpha) {
  const char* op = "globe::simplex";
  check(alpha == 2 || alpha == 1.5, op, ": alpha: expected 2 (sparsemax) or 1.5 (entmax), found ", alpha);
  check(x.dim() > 0 && x.size(x.dim() - 1) > 0, op, ": expected at least one entry per row, found shape ", shape_of(x));
  check(x.is_contiguous(), op, ": expected a contiguous tensor of shape ", shape_of(x));
  return type_of(op, "x", x);
}
inline std::vector<int64_t> support_shape(const Tensor& x) { return {x.sizes().begin(), x.sizes().end() - 1}; }

// One family of experts_decode. W: indexed by cache slot (cached) or by expert; A: (n, p, q) the adapters, absent where W is
// the whole weight. gate and up: W (n, q, d), q = p without A. down: W (n, d, p), or, with A, a basis (n, q, d).
// experts_mixed: W (m, q, d) is the bank, and adapter i belongs to the basis sum_j val[i, j] W[idx[i, j]]; idx is null elsewhere.
struct Family {
  const void *W, *A;
  int64_t W_n, A_n, q;
  bool cached;
  float scale, shift;
  const int32_t* idx;
  const float* val;
  int64_t s;
};

struct Decode {
  Type type;
  Act act;
  int64_t T, k, E, d, p;
  const void* x;
  const int64_t *index, *slot, *row;
  const void* weights;  // float, or x's type
  bool weights_wide;
  Family gate, up, down;
  void* out;
};

inline Family family(const char* name, const Tensor& W, const std::optional<Tensor>& A, bool cached, double scale, double shift,
                     const Tensor& x, int64_t rows, int64_t cols, int64_t p) {
  const char* op = "globe::experts_decode";
  expect(op, name, W, x.scalar_type(), x, {-1, A ? -1 : rows, cols});
  if (A) expect(op, name, *A, x.scalar_type(), x, {-1, p, W.size(1)});
  check(cached || !A, op, ": ", name, ": adapters belong to a cached basis");
  check(!A || A->numel() > 0, op, ": ", name, ": expected adapters, found an empty tensor");  // its null pointer would read as none
  return {W.const_data_ptr(), A ? A->const_data_ptr() : nullptr, W.size(0), A ? A->size(0) : 0, W.size(1), cached, float(scale), float(shift), nullptr, nullptr, 0};
}

inline void mixture(Family& f, const char* name, const std::optional<Tensor>& idx, const std::optional<Tensor>& val, const Tensor& x) {
  const char* op = "globe::experts_mixed";
  check(bool(f.A) == bool(idx) && bool(idx) == bool(val), op, ": ", name, ": expected adapters, idx and val together, or none of them");
  if (!idx) return;
  check(x.size(1) > 0 && idx->numel() > 0, op, ": ", name, ": expected columns and mixtures, found shapes ", shape_of(x), " and ", shape_of(*idx));
  expect(op, "idx", *idx, ScalarType::Int, x, {f.A_n, -1});
  expect(op, "val", *val, ScalarType::Float, x, {f.A_n, idx->size(1)});
  f.idx = static_cast<const int32_t*>(idx->const_data_ptr());
  f.val = static_cast<const float*>(val->const_data_ptr());
  f.s = idx->size(1);
  for (int64_t i = 0; i < f.A_n * f.s; ++i)
    check(0 <= f.idx[i] && f.idx[i] < f.W_n, op, ": ", name, ": idx in [0, ", f.W_n, ") expected, found ", f.idx[i]);
}

inline Decode decode_args(const Tensor& x, const Tensor& index, const Tensor& weights, const Tensor& slot, const Tensor& row,
                          const Tensor& gate, const std::optional<Tensor>& gate_A, const Tensor& up, const std::optional<Tensor>& up_A,
                          const Tensor& down, const std::optional<Tensor>& down_A, const std::vector<int64_t>& cached,
                          const std::vector<double>& scale, const std::vector<double>& shift, const std::string& act) {
  const char* op = "globe::experts_decode";
  Decode a{};
  a.type = type_of(op, "x", x);
  check(a.type != Type::f64, op, ": x: expected float32, bfloat16 or float16, found float64");
  a.act = act_of(op, act);
  expect(op, "x", x, x.scalar_type(), x, {-1, -1});
  expect(op, "index", index, ScalarType::Long, x, {x.size(0), -1});
  expect(op, "weights", weights, weights.scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type(), x,
         {x.size(0), index.size(1)});
  expect(op, "slot", slot, ScalarType::Long, x, {-1});
  expect(op, "row", row, ScalarType::Long, x, {slot.size(0)});
  check(cached.size() == 3 && scale.size() == 3 && shift.size() == 3, op, ": cached, scale, shift: expected 3 entries each");
  a.T = x.size(0), a.d = x.size(1), a.k = index.size(1), a.E = slot.size(0);
  check(down.dim() == 3, op, ": down: expected 3 dimensions, found ", down.dim());
  check(!down_A || down_A->dim() == 3, op, ": down: expected adapters (n, p, q), found ", down_A ? shape_of(*down_A) : "none");
  a.p = down_A ? down_A->size(1) : down.size(2);
  a.down = family("down", down, down_A, cached[2], scale[2], shift[2], x, a.d, down_A ? a.d : a.p, a.p);
  a.gate = family("gate", gate, gate_A, cached[0], scale[0], shift[0], x, a.p, a.d, a.p);
  a.up = family("up", up, up_A, cached[1], scale[1], shift[1], x, a.p, a.d, a.p);
  a.x = x.const_data_ptr();
  a.index = static_cast<const int64_t*>(index.const_data_ptr());
  a.slot = static_cast<const int64_t*>(slot.const_data_ptr());
  a.row = static_cast<const int64_t*>(row.const_data_ptr());
  a.weights = weights.const_data_ptr();
  a.weights_wide = weights.scalar_type() == ScalarType::Float;
  return a;
}

// ---- packed codes, as globe.py's decode_groups and unpack have them
// A matrix (rows, columns) in 8 or 4 bits, with a scale (rows, groups of 64 columns)
struct GroupCoded {
  const uint8_t* codes;
  const int16_t* scale;
  int64_t rows, columns, bits;
};

// One matrix in a trellis code
struct Coded {
  const uint8_t* codes;
  int64_t bytes;
  const uint8_t *kind, *row, *width;
  const int16_t *column, *order;  // order: of the columns; none: as they come
  int64_t p, columns, inputs, blocks, classes;
};

// A family of a layer's experts: codes of all, behind each other
struct CodedFamily {
  const uint8_t *codes, *kind, *row, *width;
  const int16_t *column, *order;
  const int64_t* places;
  int64_t n, p, columns, inputs, blocks, classes;
  GroupCoded basis;  // acts on x first; none: codes null
  Coded matrix(int64_t i) const {
    return {codes + places[i], places[i + 1] - places[i], kind + i * p, row + i * p, width, column, order ? order + i * columns : nullptr,
            p, columns, inputs, blocks, classes};
  }
};

struct CodedExperts {
  Act act;
  bool half;  // whether x came in bfloat16: prompts may meet what is decoded in it too
  int64_t T, k, E, d;
  const float *x, *weights, *levels;
  const int64_t *index, *row, *subsets;
  CodedFamily gate, up, down;
  float* out;
};

inline GroupCoded group_coded(const char* op, const Tensor& codes, const Tensor& scale, const Tensor& like) {
  const bool nibbles = codes.scalar_type() == ScalarType::Byte;
  expect(op, "codes", codes, nibbles ? ScalarType::Byte : ScalarType::Char, like, {-1, -1});
  const int64_t columns = codes.size(1) * (nibbles ? 2 : 1);
  expect(op, "scale", scale, ScalarType::Short, like, {codes.size(0), (columns + 63) / 64});
  return {(const uint8_t*)codes.const_data_ptr(), (const int16_t*)scale.const_data_ptr(), codes.size(0), columns, nibbles ? 4 : 8};
}

// t: codes (bytes,), kind and row (n, p), width and column (classes, blocks), places (n + 1,); then order (n, columns), or a basis
inline CodedFamily coded_family(const char* op, const std::vector<Tensor>& t, const Tensor& x, int64_t inputs) {
  check(t.size() == 7 || t.size() == 8, op, ": expected 7 tensors of a family, or 8 with a basis, found ", t.size());
  const char* names[] = {"codes", "kind", "row", "width", "column", "places", "order"};
  expect(op, names[0], t[0], ScalarType::Byte, x, {-1});
  expect(op, names[1], t[1], ScalarType::Byte, x, {-1, -1});
  expect(op, names[2], t[2], ScalarType::Byte, x, {t[1].size(0), t[1].size(1)});
  expect(op, names[3], t[3], ScalarType::Byte, x, {-1, -1});
  expect(op, names[4], t[4], ScalarType::Short, x, {t[3].size(0), t[3].size(1)});
  expect(op, names[5], t[5], ScalarType::Long, x, {t[1].size(0) + 1});
  CodedFamily f{};
  f.codes = (const uint8_t*)t[0].const_data_ptr();
  f.kind = (const uint8_t*)t[1].const_data_ptr();
  f.row = (const uint8_t*)t[2].const_data_ptr();
  f.width = (const uint8_t*)t[3].const_data_ptr();
  f.column = (const int16_t*)t[4].const_data_ptr();
  f.places = (const int64_t*)t[5].const_data_ptr();
  f.n = t[1].size(0), f.p = t[1].size(1), f.classes = t[3].size(0), f.blocks = t[3].size(1);
  check(f.classes <= 256, op, ": width: expected at most 256 classes, found ", f.classes);
  for (int64_t i = 0; i < f.n; ++i)
    check(0 <= f.places[i] && f.places[i] <= f.places[i + 1] && f.places[i + 1] <= t[0].numel(), op, ": places: expected to rise up to ",
          t[0].numel(), ", found ", f.places[i], " and ", f.places[i + 1]);
  for (int64_t i = 0; i < t[3].numel(); ++i)
    check(f.width[i] <= 6 && (i < f.blocks || f.width[i] <= f.width[i - f.blocks]), op,
          ": width: expected 0 to 6 bits, no more in a later class, found ", int(f.width[i]));
  if (t.size() == 8) {
    f.basis = group_coded(op, t[6], t[7], x);
    check(f.basis.columns == inputs, op, ": basis: expected ", inputs, " columns, found ", f.basis.columns);
    f.columns = f.inputs = f.basis.rows;
  } else {
    expect(op, names[6], t[6], ScalarType::Short, x, {f.n, -1});
    f.order = (const int16_t*)t[6].const_data_ptr();
    f.columns = t[6].size(1), f.inputs = inputs;
  }
  check((f.columns + 7) / 8 == f.blocks, op, ": width: expected ", (f.columns + 7) / 8, " blocks, found ", f.blocks);
  return f;
}

}  // namespace globe
