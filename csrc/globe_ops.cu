// GloBE's operators on CUDA: the twins of cpu_kernels.h. Compiled by the tests wherever nvcc is, run where a GPU is.
//
// All of them wait for memory, so threads read 16 bytes at a time, neighbours beside each other, and weights are indexed in
// place through the slot table. An index outside its range trips an assertion on the device, as in torch's own gathers.
#include "globe_ops.h"

#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cassert>
#include <cmath>
#include <type_traits>

namespace globe {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256, kWarp = 32;

template <class T> struct Wide { using w = float; };
template <> struct Wide<double> { using w = double; };
template <class T> constexpr int kVec = 16 / sizeof(T);  // elements in 16 bytes

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
int64_t blocks(int64_t n, int64_t each) { return (n + each - 1) / each; }
bool aligned(const void* p, int64_t stride_bytes) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0; }

template <class F> void by_type(Type type, const F& f) {
  switch (type) {
    case Type::f32: f(float()); break;
    case Type::bf16: f(BFloat16()); break;
    case Type::f16: f(Half()); break;
    case Type::f64: f(double()); break;
  }
}

template <class T> struct alignas(16) Vec { T v[kVec<T>]; };

// kVec<T> elements from p, of which n are there; `whole` says that 16-byte loads are allowed
template <class T> __device__ Vec<T> load(const T* p, int64_t n, bool whole) {
  if (whole && n >= kVec<T>) return *reinterpret_cast<const Vec<T>*>(p);
  Vec<T> x;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) x.v[i] = i < n ? p[i] : T(0);
  return x;
}

template <class W> __device__ W activate(W z, Act act) {
  switch (act) {
    case Act::silu: return z / (W(1) + exp(-z));
    case Act::tanh: return tanh(z);
    case Act::gelu_tanh: return W(0.5) * z * (W(1) + tanh(W(0.7978845608028654) * z * (W(1) + W(0.044715) * z * z)));
    case Act::relu: return z > W(0) ? z : W(0);
    default: return z;
  }
}
template <class W> __device__ W slope(W z, Act act) {
  if (act == Act::silu) {
    const W g = W(1) / (W(1) + exp(-z));
    return g * (W(1) + z * (W(1) - g));
  }
  const W t = tanh(z);
  return act == Act::tanh ? W(1) - t * t : W(1);
}
template <class W> __device__ W warp_sum(W x) {
  for (int i = kWarp / 2; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
template <class W> __device__ W warp_max(W x) {
  for (int i = kWarp / 2; i; i /= 2) {
    const W y = __shfl_xor_sync(0xffffffffu, x, i);
    x = y > x ? y : x;
  }
  return x;
}

// ---- compose -----------------------------------------------------------------------------------------
// writes an expert's activated sums
template <class T, class W> __device__ void put(const Compose& c, int64_t e, int64_t pos, int64_t left, const W* z, bool whole) {
  Vec<T> y;
#pragma unroll
  for (int v = 0; v < kVec<T>; ++v) y.v[v] = T(activate(z[v], c.act));
  T* out = static_cast<T*>(c.out) + (c.slot ? c.slot[e] : e) * c.n + pos;
  if (whole && left >= kVec<T>) {
    *reinterpret_cast<Vec<T>*>(out) = y;
  } else {
    for (int v = 0; v < kVec<T> && v < left; ++v) out[v] = y.v[v];
  }
}

// Few experts: a block owns kThreads * kVec positions and passes over all experts.
template <class T> __global__ void compose_kernel(Compose c, bool whole) {
  using W = typename Wide<T>::w;
  const int64_t pos = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec<T>;
  if (pos >= c.n) return;
  const int64_t left = c.n - pos;
  for (int64_t e = 0; e < c.E; ++e) {
    W z[kVec<T>] = {};
    for (int64_t i = e * c.s; i < (e + 1) * c.s; ++i) {
      const W a = static_cast<const W*>(c.val)[i];
      const int64_t j = c.idx[i];
      assert(0 <= j && j < c.m && "globe::compose: index outside the bank");
      if (a == W(0)) continue;
      const Vec<T> b = load(static_cast<const T*>(c.bank) + j * c.n + pos, left, whole);
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) z[v] += a * W(b.v[v]);
    }
    put<T>(c, e, pos, left, z, whole);
  }
}

// Many experts: a block copies its `chunks` 16-byte columns of every basis into shared memory and mixes from there, so the bank
// crosses the second-level cache once and not once per use. Groups of `chunks` threads take an expert each.
constexpr int64_t kTile = 65536;  // bytes of shared memory that every GPU since sm_75 has; three such blocks fit on an H100's SM
template <class T> __global__ void __launch_bounds__(kThreads) compose_tiled_kernel(Compose c, int chunks, bool whole) {
  using W = typename Wide<T>::w;
  extern __shared__ uint4 room[];
  Vec<T>* tile = reinterpret_cast<Vec<T>*>(room);
  const int64_t first = int64_t(blockIdx.x) * chunks * kVec<T>;
  for (int64_t i = threadIdx.x; i < c.m * chunks; i += kThreads) {
    const int64_t at = first + i % chunks * kVec<T>, left = c.n - at;
    const T* from = static_cast<const T*>(c.bank) + i / chunks * c.n + at;
    if (whole && left >= kVec<T>) __pipeline_memcpy_async(tile + i, from, 16);
    else tile[i] = load(from, left, false);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  const int column = threadIdx.x % chunks;
  const int64_t pos = first + column * kVec<T>, left = c.n - pos;
  if (left <= 0) return;
  for (int64_t e = threadIdx.x / chunks; e < c.E; e += kThreads / chunks) {
    W z[kVec<T>] = {};
#pragma unroll 4
    for (int64_t i = e * c.s; i < (e + 1) * c.s; ++i) {
      const W a = static_cast<const W*>(c.val)[i];
      const int64_t j = c.idx[i];
      assert(0 <= j && j < c.m && "globe::compose: index outside the bank");
      const Vec<T> b = tile[j * chunks + column];
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) z[v] += a * W(b.v[v]);
    }
    put<T>(c, e, pos, left, z, whole);
  }
}

// A thread owns one position, so its sums over experts need no atomics; the inner products with the bases do.
template <class T> __global__ void compose_backward_kernel(Compose c) {
  using W = typename Wide<T>::w;
  const int64_t pos = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool here = pos < c.n;
  for (int64_t e = 0; e < c.E; ++e) {
    W z = 0, g = here ? W(static_cast<const T*>(c.grad)[e * c.n + pos]) : W(0);
    for (int64_t i = e * c.s; i < (e + 1) * c.s; ++i) {
      const int64_t j = c.idx[i];
      assert(0 <= j && j < c.m && "globe::compose: index outside the bank");
      if (here && c.act != Act::identity) z += static_cast<const W*>(c.val)[i] * W(static_cast<const T*>(c.bank)[j * c.n + pos]);
    }
    g *= slope(z, c.act);
    for (int64_t i = e * c.s; i < (e + 1) * c.s; ++i) {
      const int64_t at = c.idx[i] * c.n + pos;
      if (here) static_cast<W*>(c.dbank)[at] += static_cast<const W*>(c.val)[i] * g;
      const W dot = warp_sum(here ? g * W(static_cast<const T*>(c.bank)[at]) : W(0));
      if (threadIdx.x % kWarp == 0) atomicAdd(static_cast<W*>(c.dval) + i, dot);
    }
  }
}

void compose_out(Tensor bank, Tensor idx, Tensor val, std::string act, Tensor out, std::optional<Tensor> slot) {
  Compose c = compose_args(bank, idx, val, act);
  into(c, bank, idx, out, slot);
  if (!c.n || !c.E) return;
  torch::stable::accelerator::DeviceGuard guard(bank.get_device_index());
  by_type(c.type, [&](auto t) {
    using T = decltype(t);
    const bool whole = aligned(c.bank, c.n * sizeof(T)) && aligned(c.out, 16);
    int chunks = kWarp;
    while (chunks > 8 && c.m * chunks * 16 > kTile) chunks /= 2;  // not below 128 bytes side by side
    if (c.E > 1 && c.E * c.s >= c.m && c.m * chunks * 16 <= kTile) {
      const auto kernel = compose_tiled_kernel<T>;
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile));
      kernel<<<blocks(c.n, chunks * kVec<T>), kThreads, c.m * chunks * 16, stream_of(bank)>>>(c, chunks, whole);
    } else {
      compose_kernel<T><<<blocks(c.n, kThreads * kVec<T>), kThreads, 0, stream_of(bank)>>>(c, whole);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor compose(Tensor bank, Tensor idx, Tensor val, std::string act) {
  compose_args(bank, idx, val, act);
  Tensor out = torch::stable::new_empty(bank, {idx.size(0), bank.size(1), bank.size(2)});
  compose_out(bank, idx, val, act, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> compose_backward(Tensor grad, Tensor bank, Tensor idx, Tensor val, std::string act) {
  Compose c = compose_args(bank, idx, val, act);
  expect("globe::compose_backward", "grad", grad, bank.scalar_type(), bank, {idx.size(0), bank.size(1), bank.size(2)});
  torch::stable::accelerator::DeviceGuard guard(bank.get_device_index());
  Tensor sums = torch::stable::new_zeros(bank, {bank.size(0), bank.size(1), bank.size(2)}, wide(bank));
  Tensor dval = torch::stable::new_zeros(val, {val.size(0), val.size(1)});
  c.grad = grad.const_data_ptr(), c.dbank = sums.mutable_data_ptr(), c.dval = dval.mutable_data_ptr();
  if (c.n && c.E) {
    by_type(c.type, [&](auto t) { compose_backward_kernel<decltype(t)><<<blocks(c.n, kThreads), kThreads, 0, stream_of(bank)>>>(c); });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (sums.scalar_type() == bank.scalar_type()) return {sums, dval};
  Tensor dbank = torch::stable::empty_like(bank);
  torch::stable::copy_(dbank, sums);
  return {dbank, dval};
}

// ---- sparsemax and entmax-1.5: a warp a row; the CPU's Newton iteration --------------------------------------
template <class T> __global__ void simplex_kernel(const T* x, T* p, int64_t* size, int64_t rows, int64_t n, bool root) {
  using W = typename Wide<T>::w;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  x += row * n, p += row * n;
  const W inf = W(INFINITY), factor = root ? W(0.5) : W(1);
  W top = -inf, odd = 0;
  for (int64_t i = lane; i < n; i += kWarp) {
    const W v = W(x[i]);
    top = v > top ? v : top, odd += v == v ? W(0) : W(1);
  }
  top = warp_max(top), odd = warp_sum(odd);
  if (!(top > -inf && top < inf) || odd > W(0)) {
    for (int64_t i = lane; i < n; i += kWarp) p[i] = T(W(NAN));
    if (!lane) size[row] = 0;
    return;
  }
  W tau = -1;
  for (int round = 0; round < 100; ++round) {
    W f = 0, g = 0;
    for (int64_t i = lane; i < n; i += kWarp) {
      const W y = (W(x[i]) - top) * factor - tau;
      if (y > W(0)) f += root ? y * y : y, g += root ? W(2) * y : W(1);
    }
    const W next = tau + (warp_sum(f) - W(1)) / warp_sum(g);
    if (!(next > tau)) break;
    tau = next;
  }
  W count = 0;
  for (int64_t i = lane; i < n; i += kWarp) {
    const W y = (W(x[i]) - top) * factor - tau;
    const T q = T(y > W(0) ? (root ? y * y : y) : W(0));
    p[i] = q, count += W(q) > W(0) ? W(1) : W(0);
  }
  count = warp_sum(count);
  if (!lane) size[row] = int64_t(count);
}

template <class T> __global__ void simplex_backward_kernel(const T* grad, const T* p, T* dx, int64_t rows, int64_t n, bool root) {
  using W = typename Wide<T>::w;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  W sum = 0, dot = 0;
  auto weight = [&](int64_t i) { return root ? sqrt(W(p[row * n + i])) : W(p[row * n + i]) > W(0) ? W(1) : W(0); };
  for (int64_t i = lane; i < n; i += kWarp) sum += weight(i), dot += weight(i) * W(grad[row * n + i]);
  const W mean = warp_sum(dot) / warp_sum(sum);
  for (int64_t i = lane; i < n; i += kWarp) dx[row * n + i] = T(weight(i) * (W(grad[row * n + i]) - mean));
}

std::tuple<Tensor, Tensor> simplex(Tensor x, double alpha) {
  const Type type = simplex_type(x, alpha);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor p = torch::stable::empty_like(x), size = torch::stable::new_empty(x, support_shape(x), ScalarType::Long);
  const int64_t n = x.size(x.dim() - 1), rows = x.numel() / n;
  if (rows) by_type(type, [&](auto t) {
    using T = decltype(t);
    simplex_kernel<T><<<blocks(rows, kThreads / kWarp), kThreads, 0, stream_of(x)>>>(
        static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(p.mutable_data_ptr()), static_cast<int64_t*>(size.mutable_data_ptr()),
        rows, n, alpha == 1.5);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {p, size};
}

Tensor simplex_backward(Tensor grad, Tensor p, double alpha) {
  const Type type = simplex_type(p, alpha);
  check(grad.numel() == p.numel() && grad.is_contiguous() && grad.scalar_type() == p.scalar_type() && grad.is_cuda(),
        "globe::simplex_backward: grad: expected a contiguous tensor like p, of shape ", shape_of(p), ", found ", shape_of(grad));
  torch::stable::accelerator::DeviceGuard guard(p.get_device_index());
  Tensor dx = torch::stable::empty_like(p);
  const int64_t n = p.size(p.dim() - 1), rows = p.numel() / n;
  if (rows) by_type(type, [&](auto t) {
    using T = decltype(t);
    simplex_backward_kernel<T><<<blocks(rows, kThreads / kWarp), kThreads, 0, stream_of(p)>>>(
        static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(p.const_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()),
        rows, n, alpha == 1.5);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dx;
}

// ---- experts_decode: a warp a row --------------------------------------------------------------------------
// Launches: B~ x (only where a basis is held), act(gate) * up, down. Each is a grid over (row, routed token).

// <w, x> by a warp; x is float (h, z) or the weights' type
template <class T, class X> __device__ float dot(const T* w, const X* x, int64_t n, bool whole) {
  float s = 0;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = lane * kVec<T>; i < n; i += kWarp * kVec<T>) {
    const Vec<T> b = load(w + i, n - i, whole);
#pragma unroll
    for (int v = 0; v < kVec<T>; ++v)
      if (i + v < n) s += float(b.v[v]) * float(x[i + v]);
  }
  return warp_sum(s);
}
template <class T> __device__ float sum_of(const T* x, int64_t n) {
  float s = 0;
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp) s += float(x[i]);
  return warp_sum(s);
}
// the weights of routed token `i`'s expert, or null where that is another rank's
template <class T> __device__ const T* weight(const Decode& a, const Family& f, int64_t i, int64_t numel) {
  const int64_t e = a.index[i];
  assert(0 <= e && e <= a.E && "globe::experts_decode: expert out of range");
  if (e == a.E) return nullptr;
  const int64_t at = f.cached ? a.slot[e] : e;
  assert(0 <= at && at < f.W_n && "globe::experts_decode: slot out of range");
  return static_cast<const T*>(f.W) + at * numel;
}
template <class T> __device__ const T* adapter(const Decode& a, const Family& f, int64_t i) {
  const int64_t at = a.row[a.index[i]];
  assert(0 <= at && at < f.A_n && "globe::experts_decode: adapter out of range");
  return static_cast<const T*>(f.A) + at * a.p * f.q;
}
__device__ int64_t warp_row() { return (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp; }

template <class T> __global__ void basis_kernel(Decode a, Family f, float* h, bool whole) {
  const int64_t row = warp_row(), i = blockIdx.y;
  if (row >= f.q) return;
  const T* W = weight<T>(a, f, i, f.q * a.d);
  if (!W) return;
  const float y = dot(W + row * a.d, static_cast<const T*>(a.x) + i / a.k * a.d, a.d, whole);
  if (threadIdx.x % kWarp == 0) h[i * f.q + row] = y;
}

template <class T> __device__ float project(const Decode& a, const Family& f, const float* h, int64_t i, int64_t row, bool whole) {
  const T* x = static_cast<const T*>(a.x) + i / a.k * a.d;
  if (!f.A) return dot(weight<T>(a, f, i, a.p * a.d) + row * a.d, x, a.d, whole);
  const float y = f.scale * dot(adapter<T>(a, f, i) + row * f.q, h + i * f.q, f.q, whole);
  return f.shift != 0 ? y + f.shift * sum_of(x, a.d) : y;
}
template <class T> __global__ void hidden_kernel(Decode a, const float* gate, const float* up, float* z, bool whole) {
  const int64_t row = warp_row(), i = blockIdx.y;
  if (row >= a.p) return;
  float y = 0;
  if (a.index[i] < a.E) y = activate(project<T>(a, a.gate, gate, i, row, whole), a.act) * project<T>(a, a.up, up, i, row, whole);
  if (threadIdx.x % kWarp == 0) z[i * a.p + row] = y;
}

template <class T> __device__ float routing(const Decode& a, int64_t i) {
  return a.weights_wide ? static_cast<const float*>(a.weights)[i] : float(static_cast<const T*>(a.weights)[i]);
}
template <class T> __global__ void down_kernel(Decode a, const float* z, bool whole) {
  const int64_t row = warp_row(), t = blockIdx.y;
  if (row >= a.d) return;
  float y = 0;
  for (int64_t i = t * a.k; i < (t + 1) * a.k; ++i)
    if (const T* W = weight<T>(a, a.down, i, a.d * a.p)) y += routing<T>(a, i) * dot(W + row * a.p, z + i * a.p, a.p, whole);
  if (threadIdx.x % kWarp == 0) static_cast<T*>(a.out)[t * a.d + row] = T(y);
}
// A composed basis of down lies transposed: a thread owns a column, neighbours read neighbours.
template <class T> __global__ void down_adapter_kernel(Decode a, const float* z, float* u) {
  const int64_t col = int64_t(blockIdx.x) * kThreads + threadIdx.x, i = blockIdx.y;
  if (col >= a.down.q || a.index[i] >= a.E) return;
  const T* A = adapter<T>(a, a.down, i);
  float y = 0;
  for (int64_t r = 0; r < a.p; ++r) y += z[i * a.p + r] * float(A[r * a.down.q + col]);
  u[i * a.down.q + col] = y;
}
template <class T> __global__ void down_basis_kernel(Decode a, const float* z, const float* u) {
  const int64_t col = int64_t(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (col >= a.d) return;
  float out = 0;
  for (int64_t i = t * a.k; i < (t + 1) * a.k; ++i)
    if (const T* W = weight<T>(a, a.down, i, a.down.q * a.d)) {
      float y = 0;
      for (int64_t r = 0; r < a.down.q; ++r) y += u[i * a.down.q + r] * float(W[r * a.d + col]);
      y *= a.down.scale;
      if (a.down.shift != 0)
        for (int64_t r = 0; r < a.p; ++r) y += a.down.shift * z[i * a.p + r];
      out += routing<T>(a, i) * y;
    }
  static_cast<T*>(a.out)[t * a.d + col] = T(out);
}

Tensor experts_decode(Tensor x, Tensor index, Tensor weights, Tensor slot, Tensor row, Tensor gate, std::optional<Tensor> gate_A,
                      Tensor up, std::optional<Tensor> up_A, Tensor down, std::optional<Tensor> down_A, std::vector<int64_t> cached,
                      std::vector<double> scale, std::vector<double> shift, std::string act) {
  Decode a = decode_args(x, index, weights, slot, row, gate, gate_A, up, up_A, down, down_A, cached, scale, shift, act);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  a.out = out.mutable_data_ptr();
  const int64_t P = a.T * a.k, qg = a.gate.A ? a.gate.q : 0, qu = a.up.A ? a.up.q : 0, qd = a.down.A ? a.down.q : 0;
  if (!a.T || !a.d) return out;
  if (!P) return torch::stable::zero_(out);
  check(P < 65536, "globe::experts_decode: at most 65535 routed tokens on CUDA expected, found ", P);
  Tensor room = torch::stable::new_empty(x, {P * (qg + qu + qd + a.p)}, ScalarType::Float);
  float* h = static_cast<float*>(room.mutable_data_ptr());
  float *hu = h + P * qg, *u = hu + P * qu, *z = u + P * qd;
  const auto stream = stream_of(x);
  const int64_t warps = kThreads / kWarp;
  by_type(a.type, [&](auto t) {
    using T = decltype(t);
    auto fits = [&](const Family& f, int64_t cols) { return aligned(f.W, cols * sizeof(T)) && (!f.A || aligned(f.A, f.q * sizeof(T))); };
    const bool whole = fits(a.gate, a.d) && fits(a.up, a.d);
    if (qg) basis_kernel<T><<<dim3(blocks(qg, warps), P), kThreads, 0, stream>>>(a, a.gate, h, whole);
    if (qu) basis_kernel<T><<<dim3(blocks(qu, warps), P), kThreads, 0, stream>>>(a, a.up, hu, whole);
    hidden_kernel<T><<<dim3(blocks(a.p, warps), P), kThreads, 0, stream>>>(a, h, hu, z, whole);
    if (!a.down.A) {
      down_kernel<T><<<dim3(blocks(a.d, warps), a.T), kThreads, 0, stream>>>(a, z, aligned(a.down.W, a.p * sizeof(T)));
    } else {
      down_adapter_kernel<T><<<dim3(blocks(qd, kThreads), P), kThreads, 0, stream>>>(a, z, u);
      down_basis_kernel<T><<<dim3(blocks(a.d, kThreads), a.T), kThreads, 0, stream>>>(a, z, u);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace globe

STABLE_TORCH_LIBRARY_IMPL(globe, CUDA, m) {
  m.impl("compose", TORCH_BOX(&globe::compose));
  m.impl("compose_out", TORCH_BOX(&globe::compose_out));
  m.impl("compose_backward", TORCH_BOX(&globe::compose_backward));
  m.impl("simplex", TORCH_BOX(&globe::simplex));
  m.impl("simplex_backward", TORCH_BOX(&globe::simplex_backward));
  m.impl("experts_decode", TORCH_BOX(&globe::experts_decode));
}
