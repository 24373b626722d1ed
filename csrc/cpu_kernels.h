// The CPU kernels, written once in the compilers' vector types and compiled once per instruction set: globe_ops.cpp
// includes this file with ISA naming the namespace, LEVEL the vectors' width, and the set's target options switched on.
//
// Sums are in float32 (double for double). All kernels are bound by memory, not by arithmetic, so the inner loops read
// whole cache lines in order and convert on the fly. Half types come in blocks of two vectors (Pair); for bfloat16 the
// two hold the even and the odd elements, since these are one shift and one mask away from float32, no shuffle needed.
#if LEVEL >= 2
#define VB 64
#elif LEVEL == 1
#define VB 32
#else
#define VB 16  // SSE2 and NEON, through the compiler
#endif
#define INLINE static inline __attribute__((always_inline))

namespace ISA {

// ---- vectors -----------------------------------------------------------------------------------------
typedef float vf __attribute__((vector_size(VB)));
typedef double vd __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef vu vu_mem __attribute__((aligned(1), may_alias));
typedef vf vf_mem __attribute__((aligned(1), may_alias));
typedef vd vd_mem __attribute__((aligned(1), may_alias));
typedef vi vi_mem __attribute__((aligned(1), may_alias));

template <class W> struct Vec;
template <> struct Vec<float> { typedef vf v; typedef vf_mem mem; typedef vi mask; };
template <> struct Vec<double> { typedef vd v; typedef vd_mem mem; };
template <class T> struct Wide { typedef float w; };
template <> struct Wide<double> { typedef double w; };

template <class W> struct Pair { typename Vec<W>::v a, b; };
template <class W> constexpr int64_t lanes = VB / sizeof(W);
template <class T> constexpr int64_t step = 2 * lanes<typename Wide<T>::w>;  // elements in a Pair

template <class W> INLINE typename Vec<W>::v splat(W x) { return x - typename Vec<W>::v{}; }
INLINE vf as_float(vu u) { return (vf)u; }

// Position in an arranged block of element i, for those who write single elements of what `load` will meet.
template <class T> INLINE int64_t place(int64_t i) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int64_t inner = step<T> - 1;
    return (i & ~inner) | ((i & 1) * lanes<float>) | ((i & inner) >> 1);
  }
  return i;
}

template <class T> INLINE Pair<T> load(const T* p) {  // float and double
  typedef typename Vec<T>::mem mem;
  return {*(const mem*)p, *(const mem*)(p + lanes<T>)};
}
INLINE Pair<float> load(const BFloat16* p) {
  vu u = *(const vu_mem*)p;
  return {as_float(u << 16), as_float(u & 0xffff0000u)};
}
INLINE Pair<float> load(const Half* p) {
#if VB == 64
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)))};
#elif VB == 32
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
#else
  Pair<float> x;
  for (int i = 0; i < lanes<float>; ++i) x.a[i] = float(p[i]), x.b[i] = float(p[i + lanes<float>]);
  return x;
#endif
}

// Two vectors of wide numbers that already stand in a Pair's order.
template <class T> INLINE Pair<typename Wide<T>::w> arranged(const typename Wide<T>::w* p) { return load(p); }

INLINE vu round_bf16(vf x) {  // to nearest even; in the upper half of each lane; NaN stays NaN
  vu u = (vu)x;
  vu r = u + 0x7fffu + ((u >> 16) & 1u);
  return x == x ? r : u | 0x400000u;
}
template <class T> INLINE void store(T* p, Pair<T> x) {  // float and double
  typedef typename Vec<T>::mem mem;
  *(mem*)p = x.a, *(mem*)(p + lanes<T>) = x.b;
}
#if LEVEL == 3  // two instructions in place of seventeen; subnormal numbers become 0
INLINE vu pack(const BFloat16*, Pair<float> x) {
  typedef uint16_t v16 __attribute__((vector_size(64)));
  const v16 order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(x.b, x.a));
}
#else
INLINE vu pack(const BFloat16*, Pair<float> x) { return (round_bf16(x.a) >> 16) | (round_bf16(x.b) & 0xffff0000u); }
#endif
INLINE void store(BFloat16* p, Pair<float> x) { *(vu_mem*)p = pack(p, x); }
INLINE void store(Half* p, Pair<float> x) {
#if VB == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.a, 0));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph(x.b, 0));
#elif VB == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = Half(x.a[i]), p[i + lanes<float>] = Half(x.b[i]);
#endif
}

// The last, partial block: through a padded copy, so that nothing outside the array is touched.
template <class T> INLINE Pair<typename Wide<T>::w> load_part(const T* p, int64_t n, T pad = T(0)) {
  T t[step<T>];
  for (int64_t i = 0; i < step<T>; ++i) t[i] = pad;
  std::memcpy(t, p, n * sizeof(T));
  return load(t);
}
template <class T> INLINE void store_part(T* p, Pair<typename Wide<T>::w> x, int64_t n) {
  T t[step<T>];
  store(t, x);
  std::memcpy(p, t, n * sizeof(T));
}
// Around the caches, for results larger than them: saves reading each line before it is overwritten.
INLINE void stream(vu* p, vu x) {
#if VB == 64
  _mm512_stream_si512((__m512i*)p, (__m512i)x);
#elif VB == 32
  _mm256_stream_si256((__m256i*)p, (__m256i)x);
#else
  *(vu_mem*)p = x;
#endif
}
template <class T> INLINE void stream(T* p, Pair<typename Wide<T>::w> x) {
  vu t[step<T> * sizeof(T) / VB];
  store((T*)t, x);
  for (size_t i = 0; i < sizeof(t) / VB; ++i) stream((vu*)p + i, t[i]);
}
INLINE void fence() {
#if VB >= 32
  _mm_sfence();
#endif
}

template <class W> INLINE W total(typename Vec<W>::v x) {
#if VB == 64
  if constexpr (std::is_same_v<W, float>) return _mm512_reduce_add_ps(x);
#endif
  W s = 0;
  for (int i = 0; i < lanes<W>; ++i) s += x[i];
  return s;
}
template <class W> INLINE W largest(typename Vec<W>::v x) {
#if VB == 64
  if constexpr (std::is_same_v<W, float>) return _mm512_reduce_max_ps(x);
#endif
  W s = x[0];
  for (int i = 1; i < lanes<W>; ++i) s = x[i] > s ? x[i] : s;
  return s;
}

// ---- activations -------------------------------------------------------------------------------------
INLINE vf exp(vf x) {  // 2^n e^r, |r| <= ln(2) / 2; relative error below 2e-7; |x| cut at 80
  x = x > 80.0f ? splat(80.0f) : x;  // written so that a NaN stays
  x = x < -80.0f ? splat(-80.0f) : x;
  vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf y = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333310e-3f + r * (1.3888889e-3f + r * 1.984127e-4f))))));
  return y * (vf)((vu)(n + 12583039.0f) << 23);  // the low bits of n + 127 + 1.5 * 2^23 are the exponent
}
INLINE vf reciprocal(vf x) {  // a guess and a Newton step: half the time of a division; x in [1, 1e35]
#if VB == 64
  vf y = _mm512_rcp14_ps(x);
  return y * (2.0f - x * y);
#elif VB == 32
  vf y = _mm256_rcp_ps(x);
  y = y * (2.0f - x * y);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}
INLINE vf tanh_(vf x) {
  vf u = x * x;  // near 0 the quotient would lose digits: the series
  vf small = x + x * u * (-0.33333333f + u * (0.13333333f + u * (-0.053968254f + u * (0.021869488f + u * -0.0088632355f))));
  vf y = 1.0f - 2.0f * reciprocal(exp(x + x) + 1.0f);
  return u < 0.09f ? small : y;
}
// For results that are rounded to a half type: relative error 1e-4, in half of the time.
INLINE vf rough_sigmoid(vf x) {
  vf y = x * -1.44269504f;
#if VB == 64  // 2^y = 2^floor(y) 2^f
  vf f = _mm512_reduce_ps(y, 9);  // 9: y - floor(y)
  vf p = 1.0000026f + f * (0.69300383f + f * (0.24144276f + f * (0.05201146f + f * 0.01353417f)));
  return _mm512_rcp14_ps(1.0f + _mm512_scalef_ps(p, y));
#else
#if VB == 32  // of two arguments the second stays where one is NaN
  y = _mm256_max_ps(splat(-115.0f), _mm256_min_ps(splat(115.0f), y));
#else
  y = y > 115.0f ? splat(115.0f) : y;
  y = y < -115.0f ? splat(-115.0f) : y;
#endif
  vf m = y + 12582912.0f, f = y - (m - 12582912.0f);
  vf p = 1.0f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * 0.00961812911f)));
  vf s = 1.0f + (vf)((vu)p + ((vu)m << 23));  // m's low bits are the exponent
#if VB == 32
  vf guess = _mm256_rcp_ps(s);
  return guess * (2.0f - s * guess);
#else
  return reciprocal(s);
#endif
#endif
}
INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp(-x)); }
#if VB == 64
INLINE vf root_(vf x) { return _mm512_sqrt_ps(x); }
INLINE vd root_(vd x) { return _mm512_sqrt_pd(x); }
#elif VB == 32
INLINE vf root_(vf x) { return _mm256_sqrt_ps(x); }
INLINE vd root_(vd x) { return _mm256_sqrt_pd(x); }
#else
template <class V> INLINE V root_(V x) {
  for (size_t i = 0; i < VB / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#endif
INLINE vd lanewise(vd x, double (*f)(double)) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = f(x[i]);
  return x;
}
INLINE vd tanh_(vd x) { return lanewise(x, std::tanh); }
INLINE vd sigmoid(vd x) { return 1.0 / (1.0 + lanewise(-x, std::exp)); }
template <class V> INLINE V activate(V z, Act act) {
  switch (act) {
    case Act::silu: return z * sigmoid(z);
    case Act::tanh: return tanh_(z);
    case Act::gelu_tanh: return z * (1 + tanh_(0.797884561f * z * (1 + 0.044715f * z * z))) / 2;
    case Act::relu: return z > 0 ? z : V{};
    default: return z;
  }
}
template <class V> INLINE V slope(V z, Act act) {  // the activation's derivative at z
  if (act == Act::silu) {
    V g = sigmoid(z);
    return g * (1 + z * (1 - g));
  }
  V t = tanh_(z);
  return act == Act::tanh ? 1 - t * t : 1 - V{};
}

// ---- compose -----------------------------------------------------------------------------------------
// The experts' supports, zeros left out. An entry's base stands at `far` in the bank, at `near` in a packed tile.
template <class W> struct Support {
  std::vector<int64_t> start, far, near, used;
  std::vector<W> a;
  std::vector<uint32_t> two, two_start;  // LEVEL 3: coefficients in bfloat16, two in one number, for each expert its own
  std::vector<int64_t> at;  // base -> its place in `used`, or -1
};

constexpr int R = 4;                                    // Pairs that one pass over a support keeps in registers
template <class T> constexpr int64_t block = R * step<T>;
constexpr int64_t K = 8;                                // blocks in a tile

// Bases meet two at a time where the CPU multiplies pairs of bfloat16: a third of the instructions. The coefficients are then
// rounded like the bases, and a Pair's vectors hold elements 0..3 and 4..7 of each 8, as `pack_by_two` expects them.
#if LEVEL == 3
template <class T> constexpr bool by_two = std::is_same_v<T, BFloat16>;
#else
template <class T> constexpr bool by_two = false;
#endif
template <class T, int N> INLINE void mix(const T* base, const int64_t* offset, const typename Wide<T>::w* a, const uint32_t* two, int64_t s,
                                          Pair<typename Wide<T>::w>* z) {  // z += a base
  typedef typename Wide<T>::w W;
#if LEVEL == 3
  if constexpr (by_two<T>) {
    for (int64_t j = 0; j < s; j += 2) {
      const T *p = base + offset[j], *q = base + offset[j + 1 < s ? j + 1 : j];
      const __m512bh w = (__m512bh)_mm512_set1_epi32(two[j / 2]);
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        const __m512i b = _mm512_loadu_si512(p + u * step<T>), c = _mm512_loadu_si512(q + u * step<T>);
        z[u].a = _mm512_dpbf16_ps(z[u].a, (__m512bh)_mm512_unpacklo_epi16(b, c), w);
        z[u].b = _mm512_dpbf16_ps(z[u].b, (__m512bh)_mm512_unpackhi_epi16(b, c), w);
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < s; ++j) {
    const T* p = base + offset[j];
    auto w = splat<W>(a[j]);
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) {
      auto b = load(p + u * step<T>);
      z[u].a += w * b.a, z[u].b += w * b.b;
    }
  }
}
template <bool mixed> INLINE vu pack_sum(Pair<float> x) {  // to bfloat16; mixed: in the order of `mix`
#if LEVEL == 3
  if (!mixed) return pack((const BFloat16*)nullptr, x);
  return (vu)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), (__m512i)_mm512_cvtne2ps_pbh(x.b, x.a));
#else  // a NaN of `mix` has nothing in its lower bits that rounding could carry into the exponent: no need to look for it
  vu a = (vu)x.a, b = (vu)x.b;
  return ((a + 0x7fffu + ((a >> 16) & 1u)) >> 16) | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
#endif
}
template <class T> INLINE Pair<typename Wide<T>::w> mix_part(const T* base, const int64_t* offset, const typename Wide<T>::w* a, int64_t s, int64_t n) {
  Pair<typename Wide<T>::w> z{};
  for (int64_t j = 0; j < s; ++j) {
    auto b = load_part(base + offset[j], n);
    z.a += a[j] * b.a, z.b += a[j] * b.b;
  }
  return z;
}
template <class T, bool mixed> INLINE void put(T* out, const Pair<typename Wide<T>::w>* z, int64_t n, Act act, bool around) {
  Pair<typename Wide<T>::w> y[R];
#pragma GCC unroll 8
  for (int u = 0; u < R; ++u)
    if constexpr (sizeof(T) == 2)
      y[u] = act == Act::silu ? Pair<float>{z[u].a * rough_sigmoid(z[u].a), z[u].b * rough_sigmoid(z[u].b)}
                              : Pair<float>{activate(z[u].a, act), activate(z[u].b, act)};
    else
      y[u] = {activate(z[u].a, act), activate(z[u].b, act)};
  if constexpr (std::is_same_v<T, BFloat16>) {
    vu v[R];
#pragma GCC unroll 8
    for (int u = 0; u < R; ++u) {
      v[u] = pack_sum<mixed>(y[u]);
      if (n == block<T>) around ? stream((vu*)out + u, v[u]) : (void)(((vu_mem*)out)[u] = v[u]);
    }
    if (n != block<T>) std::memcpy(out, v, n * sizeof(T));
  } else if (n == block<T>) {
#pragma GCC unroll 8
    for (int u = 0; u < R; ++u) around ? stream(out + u * step<T>, y[u]) : store(out + u * step<T>, y[u]);
  } else {
    T t[block<T>];
    for (int u = 0; u < R; ++u) store(t + u * step<T>, y[u]);
    std::memcpy(out, t, n * sizeof(T));
  }
}

// One expert, or experts that share nothing: each reads its bases straight from the bank, G at a time along a tile whose sums
// stay in the second cache. That many streams at once are what the hardware's own prefetching follows; bases stand a large power
// of two apart, so more than a set of the first cache has places would evict each other's lines.
template <class T> void compose_each(const Compose& c, const Support<typename Wide<T>::w>& S, int64_t begin, int64_t end, bool around) {
  typedef Pair<typename Wide<T>::w> Sum;
  constexpr int64_t B = block<T>, G = 6, tile = 128;
  std::vector<typename Wide<T>::w> room(tile * B + 64);
  Sum* acc = (Sum*)(((uintptr_t)room.data() + 63) / 64 * 64);
  for (int64_t e = 0; e < c.E; ++e) {
    const int64_t first = S.start[e], s = S.start[e + 1] - first;
    const int64_t* far = S.far.data() + first;
    const typename Wide<T>::w* a = S.a.data() + first;
    const uint32_t* two = S.two.data() + S.two_start[e];
    T* out = (T*)c.out + (c.slot ? c.slot[e] : e) * c.n;
    for (int64_t lo = begin; lo < end; lo += tile * B) {
      const int64_t blocks = std::min(tile, (end - lo) / B), pos = lo + blocks * B;
      for (int64_t j = 0; j == 0 || j < s; j += G)
        for (int64_t k = 0; k < blocks; ++k) {
          Sum z[R] = {};
#pragma GCC unroll 8
          for (int u = 0; u < R && j; ++u) z[u] = acc[k * R + u];
          mix<T, R>((const T*)c.bank + lo + k * B, far + j, a + j, by_two<T> ? two + j / 2 : nullptr, std::min(G, s - j), z);
          if (j + G >= s) {
            put<T, true>(out + lo + k * B, z, B, c.act, around);
            continue;
          }
#pragma GCC unroll 8
          for (int u = 0; u < R; ++u) acc[k * R + u] = z[u];
        }
      if (blocks < tile && pos < end) {
        Sum z[R] = {};
        for (int64_t u = 0; pos + u * step<T> < end; ++u)
          z[u] = mix_part((const T*)c.bank + pos + u * step<T>, far, a, s, std::min(step<T>, end - pos - u * step<T>));
        put<T, false>(out + pos, z, end - pos, c.act, around);
      }
    }
  }
}

// Many experts: the bank crosses the memory bus once. A tile (K blocks of every base in use) is copied side by side into
// a buffer, where all experts pass over it: in the bank the bases stand a large power of two apart, so the same lines of
// all of them would fight for the same few places of a cache. The next tile is copied, a slice a step, meanwhile.
template <class T> void compose_shared(const Compose& c, const Support<typename Wide<T>::w>& S, int64_t begin, int64_t end, bool around) {
  typedef typename Wide<T>::w W;
  constexpr int64_t B = block<T>;
  constexpr uint64_t ahead = 16;  // slices (of a block) to prefetch before they are copied
  const int64_t U = S.used.size(), steps = K * c.E;
  const uint64_t slices = U * K, share = (slices << 24) / steps + 1;  // slices to copy in a step, times 2^24
  std::vector<T> room(2 * slices * B + 64);
  std::vector<const T*> bases(U + ahead / K + 1, (const T*)c.bank);
  for (int64_t u = 0; u < U; ++u) bases[u] += S.used[u] * c.n;
  T* tile = (T*)(((uintptr_t)room.data() + 63) / 64 * 64);
  T* next = tile + slices * B;
  auto copy = [&](T* to, int64_t lo, uint64_t from, uint64_t until) {  // slices in memory order: base by base
    const bool whole = lo + K * B <= end;
    for (uint64_t i = from; i < until; ++i) {
      const char* soon = (const char*)(bases[(i + ahead) / K] + lo + (i + ahead) % K * B);
      for (int64_t line = 0; line < B * int64_t(sizeof(T)); line += 64) __builtin_prefetch(soon + line);
      const int64_t n = whole ? B : std::clamp<int64_t>(end - lo - int64_t(i % K) * B, 0, B);
      const T* p = bases[i / K] + lo + i % K * B;
      T* q = to + (i % K * U + i / K) * B;
      if (n == B) std::memcpy(q, p, B * sizeof(T));
      else std::memcpy(q, p, n * sizeof(T));  // what follows is stale and never stored
    }
  };
  copy(tile, begin, 0, slices);
  for (int64_t lo = begin; lo < end; lo += K * B) {
    const bool more = lo + K * B < end;
    uint64_t done = 0, quota = 0;
    for (int64_t k = 0; k < K && lo + k * B < end; ++k)
      for (int64_t e = 0; e < c.E; ++e) {
        const int64_t pos = lo + k * B;
        quota += share;
        if (more) {
          const uint64_t until = std::min(quota >> 24, slices);
          copy(next, lo + K * B, done, until);
          done = until;
        }
        Pair<W> z[R] = {};
        mix<T, R>(tile + k * U * B, S.near.data() + S.start[e], S.a.data() + S.start[e], S.two.data() + S.two_start[e], S.start[e + 1] - S.start[e], z);
        put<T, true>((T*)c.out + (c.slot ? c.slot[e] : e) * c.n + pos, z, std::min(B, end - pos), c.act, around);
      }
    std::swap(tile, next);
  }
}

// One pass over bank and grad: g = grad * phi'(z); dval_ej = <g, B_j>; dB_j = sum_e val_ej g, summed in a tile of float.
template <class T> void compose_backward_range(const Compose& c, const Support<typename Wide<T>::w>& S, int64_t begin, int64_t end, typename Wide<T>::w* dval) {
  typedef typename Wide<T>::w W;
  const int64_t U = S.used.size(), t = block<T>;
  std::vector<W> sums(U * t);
  for (int64_t lo = begin; lo < end; lo += t) {
    const int64_t hi = std::min(lo + t, end);
    std::fill(sums.begin(), sums.end(), W(0));
    for (int64_t e = 0; e < c.E; ++e) {
      const int64_t first = S.start[e], s = S.start[e + 1] - first;
      for (int64_t pos = lo; pos < hi; pos += step<T>) {
        const int64_t n = std::min(step<T>, hi - pos);
        const bool whole = n == step<T>;
        const T* grad = (const T*)c.grad + e * c.n + pos;
        auto g = whole ? load(grad) : load_part(grad, n);
        if (c.act != Act::identity) {
          auto z = mix_part((const T*)c.bank + pos, S.far.data() + first, S.a.data() + first, s, n);
          g.a *= slope(z.a, c.act), g.b *= slope(z.b, c.act);
        }
        for (int64_t j = first; j < first + s; ++j) {
          const T* p = (const T*)c.bank + S.far[j] + pos;
          auto b = whole ? load(p) : load_part(p, n);
          dval[j] += total<W>(g.a * b.a + g.b * b.b);
          W* sum = &sums[S.near[j] + pos - lo];
          auto old = load(sum);
          store(sum, {old.a + S.a[j] * g.a, old.b + S.a[j] * g.b});
        }
      }
    }
    for (int64_t u = 0; u < U; ++u)
      for (int64_t pos = lo; pos < hi; pos += step<T>)
        store_part((T*)c.dbank + S.used[u] * c.n + pos, arranged<T>(&sums[u * t + pos - lo]), std::min(step<T>, hi - pos));
  }
}

inline uint32_t bf16_bits(float a) { return BFloat16(a).x; }

template <class T> Support<typename Wide<T>::w> support_of(const Compose& c) {
  typedef typename Wide<T>::w W;
  Support<W> S;
  S.at.assign(c.m, -1);
  S.start.push_back(0);
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t i = e * c.s; i < (e + 1) * c.s; ++i) {
      const int64_t j = c.idx[i];
      const W given = ((const W*)c.val)[i], a = given == given ? given : std::numeric_limits<W>::quiet_NaN();
      check(0 <= j && j < c.m, "globe::compose: index in [0, ", c.m, ") expected, found ", j);
      if (a == 0 && !c.backward) continue;  // the backward needs every entry: a zero has a gradient
      const W kept = by_two<T> && !c.backward ? W(BFloat16(float(a))) : a;  // as the pairs have it
      if (S.at[j] < 0) S.at[j] = S.used.size(), S.used.push_back(j);
      S.far.push_back(j * c.n), S.near.push_back(S.at[j] * block<T>), S.a.push_back(kept);
    }
    S.two_start.push_back(S.two.size());
    for (size_t i = S.start.back(); by_two<T> && i < S.a.size(); i += 2)
      S.two.push_back(bf16_bits(S.a[i]) | (i + 1 < S.a.size() ? bf16_bits(S.a[i + 1]) << 16 : 0));
    S.start.push_back(S.a.size());
  }
  return S;
}

template <class T> void compose_as(const Compose& c) {
  typedef typename Wide<T>::w W;
  const auto S = support_of<T>(c);
  const int64_t t = K * block<T>, tiles = (c.n + t - 1) / t, J = S.a.size();
  if (!c.backward) {
    const bool around = c.E * c.n * int64_t(sizeof(T)) > (int64_t(16) << 20) && (uintptr_t)c.out % VB == 0 && c.n * sizeof(T) % VB == 0;
    parallel(tiles, t * (J + c.E) / 16, [&](int64_t a, int64_t b) {
      if (J > int64_t(S.used.size())) compose_shared<T>(c, S, a * t, std::min(b * t, c.n), around);
      else compose_each<T>(c, S, a * t, std::min(b * t, c.n), around);
      if (around) fence();
    });
    return;
  }
  if (c.m * c.n) std::memset(c.dbank, 0, c.m * c.n * sizeof(T));
  const int64_t chunks = std::clamp<int64_t>(tiles, 1, threads());
  std::vector<W> dval(chunks * J);  // one row per chunk, so that the sum does not depend on timing
  parallel(chunks, 1 << 20, [&](int64_t a, int64_t b) {
    for (; a < b; ++a) compose_backward_range<T>(c, S, tiles * a / chunks * t, std::min(tiles * (a + 1) / chunks * t, c.n), dval.data() + a * J);
  });
  for (int64_t j = 0; j < J; ++j) {
    W sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += dval[i * J + j];
    ((W*)c.dval)[j] = sum;
  }
}

void compose(const Compose& c) {
  switch (c.type) {
    case Type::f32: return compose_as<float>(c);
    case Type::bf16: return compose_as<BFloat16>(c);
    case Type::f16: return compose_as<Half>(c);
    case Type::f64: return compose_as<double>(c);
  }
}

// ---- sparsemax and entmax-1.5 --------------------------------------------------------------------------
// The threshold tau solves f(tau) = sum max(z - tau, 0)^e = 1, e = 1 or 2. f is convex and falling, so Newton's steps from
// the left never overshoot: they end, after a few passes over a row in cache, where tau no longer grows. For e = 1 a step
// is exactly "mean over the current support", which is finite. No sorting, and ties need no care.
template <class W, int e, int Q> INLINE void thresholds(const W* z, int64_t n, int64_t len, W* tau) {  // z: Q rows, shifted to maximum 0, padded with -inf
  typedef typename Vec<W>::v V;
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    V sum = {};
    for (int64_t i = q * len; i < (q + 1) * len; i += lanes<W>) sum += *(const V*)(z + i) > W(-4) ? *(const V*)(z + i) : splat<W>(W(-4));
    // two bounds from below: the largest alone in the support, and (Jensen) the whole row in it
    tau[q] = std::max(W(-1), (total<W>(sum) + 4 * (len - n)) / n - (e == 1 ? W(1) / n : W(1) / std::sqrt(W(n))));
  }
  bool grew = true;
  for (int round = 0; round < 100 && grew; ++round) {
    W next[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      V f = {}, g = {}, t = splat<W>(tau[q]);
      for (int64_t i = q * len; i < (q + 1) * len; i += lanes<W>) {
        V y = *(const V*)(z + i) - t;
        y = y > 0 ? y : V{};
        if (e == 1) f += y, g += y > 0 ? 1 - V{} : V{};
        else f += y * y, g += 2 * y;
      }
      next[q] = tau[q] + (total<W>(f) - 1) / total<W>(g);
    }
    grew = false;
    for (int q = 0; q < Q; ++q)
      if (next[q] > tau[q]) tau[q] = next[q], grew = true;
  }
}

// Q rows together: a row's steps wait for each other (a sum over lanes, a quotient), those of several rows need not.
template <class T, int e, int Q> void simplex_rows(const T* x, T* p, int64_t* size, int64_t n, int64_t len, typename Wide<T>::w* room) {
  typedef typename Wide<T>::w W;
  typedef typename Vec<W>::v V;
  const W inf = std::numeric_limits<W>::infinity();
  W tau[Q];
  bool usable[Q];
  for (int q = 0; q < Q; ++q) {
    const T* in = x + q * n;
    W* z = room + q * len;
    V top = splat<W>(-inf), odd = {};
    for (int64_t i = 0; i < len; i += step<T>) {
      auto v = i + step<T> <= n ? load(in + i) : load_part(in + i, n - i, T(-inf));
      top = v.a > top ? v.a : top, top = v.b > top ? v.b : top;
      odd += v.a == v.a ? V{} : 1 - V{}, odd += v.b == v.b ? V{} : 1 - V{};
      *(V*)(z + i) = v.a, *(V*)(z + i + lanes<W>) = v.b;
    }
    const W high = largest<W>(top);
    usable[q] = high > -inf && high < inf && total<W>(odd) == 0;  // else there is nothing to choose from, or NaN
    const V shift = splat<W>(high);
    for (int64_t i = 0; i < len; i += lanes<W>) *(V*)(z + i) = usable[q] ? (*(V*)(z + i) - shift) * (e == 1 ? W(1) : W(0.5)) : V{};
  }
  thresholds<W, e, Q>(room, n, len, tau);
  for (int q = 0; q < Q; ++q) {
    T* out = p + q * n;
    const W* z = room + q * len;
    if (!usable[q]) {  // as torch's form says it
      for (int64_t i = 0; i < n; ++i) out[i] = T(std::numeric_limits<W>::quiet_NaN());
      size[q] = 0;
      continue;
    }
    V count = {}, t = splat<W>(tau[q]);
    for (int64_t i = 0; i < len; i += step<T>) {
      Pair<W> y = {*(V*)(z + i) - t, *(V*)(z + i + lanes<W>) - t};
      y.a = y.a > 0 ? (e == 1 ? y.a : y.a * y.a) : V{}, y.b = y.b > 0 ? (e == 1 ? y.b : y.b * y.b) : V{};
      T rounded[step<T>];
      store(rounded, y);
      auto r = load(rounded);  // the support that the caller will see
      count += r.a > 0 ? 1 - V{} : V{}, count += r.b > 0 ? 1 - V{} : V{};
      if (i + step<T> <= n) std::memcpy(out + i, rounded, sizeof(rounded));  // of a known size: no call
      else std::memcpy(out + i, rounded, (n - i) * sizeof(T));
    }
    size[q] = int64_t(total<W>(count));
  }
}

// dx = g * (grad - <g, grad> / sum(g)), g = p^(2 - alpha): 1 on the support (sparsemax), sqrt(p) (entmax-1.5)
template <class T, int e> void simplex_backward_rows(const T* grad, const T* p, T* dx, int64_t n, int64_t begin, int64_t end) {
  typedef typename Wide<T>::w W;
  typedef typename Vec<W>::v V;
  auto root = [](V q) { return e == 1 ? (q > 0 ? 1 - V{} : V{}) : root_(q); };
  for (int64_t row = begin; row < end; ++row) {
    V s = {}, dot = {};
    for (int64_t i = 0; i < n; i += step<T>) {
      const int64_t k = std::min(step<T>, n - i), at = row * n + i;
      auto q = k == step<T> ? load(p + at) : load_part(p + at, k);
      auto g = k == step<T> ? load(grad + at) : load_part(grad + at, k);
      q = {root(q.a), root(q.b)};
      s += q.a + q.b, dot += q.a * g.a + q.b * g.b;
    }
    const V mean = splat<W>(total<W>(dot) / total<W>(s));
    for (int64_t i = 0; i < n; i += step<T>) {
      const int64_t k = std::min(step<T>, n - i), at = row * n + i;
      auto q = k == step<T> ? load(p + at) : load_part(p + at, k);
      auto g = k == step<T> ? load(grad + at) : load_part(grad + at, k);
      Pair<W> y = {root(q.a) * (g.a - mean), root(q.b) * (g.b - mean)};
      k == step<T> ? store(dx + at, y) : store_part(dx + at, y, k);
    }
  }
}

template <class T> void simplex_as(const void* x, void* p, int64_t* size, int64_t rows, int64_t n, int e) {
  parallel(rows, n * 16, [&](int64_t a, int64_t b) {
    constexpr int Q = 4;
    typedef typename Wide<T>::w W;
    const int64_t len = (n + step<T> - 1) / step<T> * step<T>;
    std::vector<W> space(Q * len + lanes<W>);
    W* room = (W*)(((uintptr_t)space.data() + VB - 1) / VB * VB);
    auto run = [&](auto alone, auto together) {
      for (; a + Q <= b && len <= 512; a += Q) together((const T*)x + a * n, (T*)p + a * n, size + a, n, len, room);
      for (; a < b; ++a) alone((const T*)x + a * n, (T*)p + a * n, size + a, n, len, room);
    };
    e == 1 ? run(simplex_rows<T, 1, 1>, simplex_rows<T, 1, Q>) : run(simplex_rows<T, 2, 1>, simplex_rows<T, 2, Q>);
  });
}
template <class T> void simplex_backward_as(const void* grad, const void* p, void* dx, int64_t rows, int64_t n, int e) {
  parallel(rows, n * 4, [&](int64_t a, int64_t b) {
    e == 1 ? simplex_backward_rows<T, 1>((const T*)grad, (const T*)p, (T*)dx, n, a, b)
           : simplex_backward_rows<T, 2>((const T*)grad, (const T*)p, (T*)dx, n, a, b);
  });
}
void simplex(Type type, const void* x, void* p, int64_t* size, int64_t rows, int64_t n, int e) {
  switch (type) {
    case Type::f32: return simplex_as<float>(x, p, size, rows, n, e);
    case Type::bf16: return simplex_as<BFloat16>(x, p, size, rows, n, e);
    case Type::f16: return simplex_as<Half>(x, p, size, rows, n, e);
    case Type::f64: return simplex_as<double>(x, p, size, rows, n, e);
  }
}
void simplex_backward(Type type, const void* grad, const void* p, void* dx, int64_t rows, int64_t n, int e) {
  switch (type) {
    case Type::f32: return simplex_backward_as<float>(grad, p, dx, rows, n, e);
    case Type::bf16: return simplex_backward_as<BFloat16>(grad, p, dx, rows, n, e);
    case Type::f16: return simplex_backward_as<Half>(grad, p, dx, rows, n, e);
    case Type::f64: return simplex_backward_as<double>(grad, p, dx, rows, n, e);
  }
}

// ---- experts_decode ------------------------------------------------------------------------------------
// Every weight is read once for all the tokens of its expert. One token is bound by memory: all that counts is to read the
// weights in order, with all threads. Many are bound by arithmetic: tiles of rows x tokens stay in registers.

// Activations that meet rows of weights: bfloat16 where the CPU multiplies pairs of them (LEVEL 3), else float in the order
// in which `load` delivers the weights.
#if LEVEL == 3
template <class T> using Kept = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
#else
template <class T> using Kept = float;
#endif
template <class T> constexpr bool pairs = std::is_same_v<Kept<T>, BFloat16>;
template <class T> constexpr int kRows = pairs<T> ? 6 : LEVEL >= 2 ? 4 : 2;  // of a tile; its accumulators fill the registers
constexpr int kTokens = 4;
template <class T> INLINE void keep(Kept<T>* row, int64_t i, float v) { row[pairs<T> ? i : place<T>(i)] = Kept<T>(v); }

// y[row][t] = <w[row], x[t]>, while `rows` rows at `next` are fetched; one row and one token take four chains, or the sums
// would wait for each other
template <class T, int M, int N>
INLINE void dot(const T* w, int64_t stride, const Kept<T>* const* x, int64_t n, const T* next, int64_t rows, float (*y)[kTokens]) {
  constexpr int C = M * N == 1 ? 4 : 1;
  const int64_t s = step<T>;
  typename Vec<float>::v sum[C][M][N] = {};
  for (int64_t i = 0; i < n; i += C * s) {
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) __builtin_prefetch(next + r * stride + i + c * s, 0, 2);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int64_t at = i + c * s, left = n - at;
      if (C > 1 && left <= 0) break;
#if LEVEL == 3
      if constexpr (pairs<T>) {
        const __mmask32 part = left >= s ? ~0u : (1u << left) - 1;
        __m512i b[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) b[t] = _mm512_maskz_loadu_epi16(part, x[t] + at);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m512i a = _mm512_maskz_loadu_epi16(part, w + m * stride + at);
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t) sum[c][m][t] = _mm512_dpbf16_ps(sum[c][m][t], (__m512bh)a, (__m512bh)b[t]);
        }
        continue;
      }
#endif
      if constexpr (!pairs<T>) {
        Pair<float> b[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) b[t] = load(x[t] + at);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const T* p = w + m * stride + at;
          const auto a = left >= s ? load(p) : load_part(p, left);
#pragma GCC unroll 8
          for (int t = 0; t < N; ++t) sum[c][m][t] += a.a * b[t].a, sum[c][m][t] += a.b * b[t].b;
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < N; ++t) {
      for (int c = 1; c < C; ++c) sum[0][m][t] += sum[c][m][t];
      y[m][t] = total<float>(sum[0][m][t]);
    }
}
// take(row, t, <W[row], x[t]>) for rows [begin, end) of W (., n). Rows stay in a cache for all the tokens; the next ones are
// fetched meanwhile, a few in each tile. One token takes long rows singly, in the order of memory.
template <class T, class F> INLINE void dots(const T* W, int64_t n, int64_t begin, int64_t end, const Kept<T>* const* x, int64_t tokens, const F& take) {
  constexpr int M = kRows<T>;
  const int64_t tiles = (tokens + kTokens - 1) / kTokens;
  for (int64_t row = begin; row < end;) {
    const int64_t rows = (tokens > 1 || n < 512) && end - row >= M ? M : 1, ahead = std::min<int64_t>(rows, end - row - rows);
    const T* w = W + row * n;
    for (int64_t i = 0; i < tiles; ++i) {
      float y[M][kTokens];
      const int64_t t = i * kTokens, left = std::min<int64_t>(kTokens, tokens - t), first = ahead * i / tiles, count = ahead * (i + 1) / tiles - first;
      const T* next = w + (rows + first) * n;
      if (rows == 1) switch (left) {
        case 1: dot<T, 1, 1>(w, n, x + t, n, next, count, y); break;
        case 2: dot<T, 1, 2>(w, n, x + t, n, next, count, y); break;
        case 3: dot<T, 1, 3>(w, n, x + t, n, next, count, y); break;
        default: dot<T, 1, 4>(w, n, x + t, n, next, count, y);
      } else switch (left) {
        case 1: dot<T, M, 1>(w, n, x + t, n, next, count, y); break;
        case 2: dot<T, M, 2>(w, n, x + t, n, next, count, y); break;
        case 3: dot<T, M, 3>(w, n, x + t, n, next, count, y); break;
        default: dot<T, M, 4>(w, n, x + t, n, next, count, y);
      }
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < left; ++j) take(row + m, t + j, y[m][j]);
    }
    row += rows;
  }
}
// y += a * w, y in float and in load's order
template <class T> INLINE void axpy(float* y, float a, const T* w, int64_t n) {
  for (int64_t i = 0; i < n; i += step<T>) {
    auto b = i + step<T> <= n ? load(w + i) : load_part(w + i, n - i);
    auto s = load(y + i);
    store(y + i, {s.a + a * b.a, s.b + a * b.b});
  }
}
// y[t] += a[t] * sum_k c[t][k] W[k], for N tokens and two blocks of columns at `col`; y and c in load's order
template <class T, int N> INLINE void columns(const T* W, int64_t n, int64_t K, int64_t col, const float* const* c, const float* a, float* const* y) {
  Pair<float> sum[N][2] = {};
  for (int64_t k = 0; k < K; ++k) {
    Pair<float> w[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int64_t at = col + v * step<T>;
      const T* p = W + k * n + at;
      __builtin_prefetch((const char*)(p + 8 * n), 0, 2);
      w[v] = at + step<T> <= n ? load(p) : at < n ? load_part(p, n - at) : Pair<float>{};
    }
    const int64_t pos = place<T>(k);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[t][v].a += c[t][pos] * w[v].a, sum[t][v].b += c[t][pos] * w[v].b;
  }
  for (int t = 0; t < N; ++t)
    for (int v = 0; v < 2; ++v) {
      const int64_t at = col + v * step<T>;
      if (at >= n) continue;
      auto s = load(y[t] + at);
      store(y[t] + at, {s.a + a[t] * sum[t][v].a, s.b + a[t] * sum[t][v].b});
    }
}

template <class X> struct Grid {  // arrays of `rows` padded rows, zero where nothing was written
  int64_t cols;
  std::vector<X> data;
  Grid(int64_t rows, int64_t n, int64_t pad) : cols((n + pad - 1) / pad * pad), data(rows * cols) {}
  X* operator[](int64_t i) { return data.data() + i * cols; }
};

template <class T> void decode_as(const Decode& a) {
  const char* op = "globe::experts_decode";
  struct Routed { int64_t e, token; float weight; };
  std::vector<Routed> routed;  // by expert: an expert's weights are read once for all its tokens
  for (int64_t i = 0; i < a.T * a.k; ++i) {
    const int64_t e = a.index[i];
    check(0 <= e && e <= a.E, op, ": expert in [0, ", a.E, "] expected, found ", e);  // E: another rank's, skipped
    if (e < a.E) routed.push_back({e, i / a.k, a.weights_wide ? ((const float*)a.weights)[i] : float(((const T*)a.weights)[i])});
  }
  std::stable_sort(routed.begin(), routed.end(), [](const Routed& l, const Routed& r) { return l.e < r.e; });
  const int64_t P = routed.size();
  std::vector<int64_t> group;  // first of each expert's run in `routed`, and the end
  for (int64_t i = 0; i < P; ++i)
    if (!i || routed[i].e != routed[i - 1].e) group.push_back(i);
  const int64_t G = group.size(), work = std::max<int64_t>(G, P / 8);
  group.push_back(P);
  auto count = [&](int64_t g) { return group[g + 1] - group[g]; };
  auto weight = [&](const Family& f, int64_t g, int64_t numel) {
    const int64_t e = routed[group[g]].e, i = f.cached ? a.slot[e] : e;
    check(0 <= i && i < f.W_n, op, ": expert ", e, ": slot in [0, ", f.W_n, ") expected, found ", i);
    return (const T*)f.W + i * numel;
  };
  auto adapter = [&](const Family& f, int64_t g) {
    const int64_t e = routed[group[g]].e, i = a.row[e];
    check(0 <= i && i < f.A_n, op, ": expert ", e, ": adapter in [0, ", f.A_n, ") expected, found ", i);
    return (const T*)f.A + i * a.p * f.q;
  };
  const Family* in[2] = {&a.gate, &a.up};
  std::vector<const T*> W[2], A[2], D, DA;
  for (int64_t g = 0; g < G; ++g) {
    for (int f = 0; f < 2; ++f) {
      W[f].push_back(in[f]->idx ? nullptr : weight(*in[f], g, in[f]->q * a.d));
      A[f].push_back(in[f]->A ? adapter(*in[f], g) : nullptr);
    }
    D.push_back(a.down.idx ? nullptr : weight(a.down, g, a.down.q * (a.down.A ? a.d : a.p)));
    DA.push_back(a.down.A ? adapter(a.down, g) : nullptr);
  }
  // Of a bank: the bases in use, and each expert's (place among them, share) pairs
  struct Mixed { std::vector<const T*> base; std::vector<std::vector<std::pair<int64_t, float>>> of; };
  auto mixtures = [&](const Family& f, Mixed m = {}) {  // m: whose bases come first, of the same bank
    std::vector<int64_t> at(f.idx ? f.W_n : 0, -1);
    for (size_t b = 0; b < m.base.size(); ++b) at[(m.base[b] - (const T*)f.W) / (f.q * a.d)] = b;
    m.of.clear();
    for (int64_t g = 0; g < G && f.idx; ++g) {
      const int64_t first = a.row[routed[group[g]].e] * f.s;
      m.of.emplace_back();
      for (int64_t i = first; i < first + f.s; ++i) {
        if (f.val[i] == 0) continue;
        if (at[f.idx[i]] < 0) at[f.idx[i]] = m.base.size(), m.base.push_back((const T*)f.W + f.idx[i] * f.q * a.d);
        m.of.back().push_back({at[f.idx[i]], f.val[i]});
      }
    }
    return m;
  };

  // x as the products take it, and its sums where a shift needs them
  Grid<Kept<T>> wide(pairs<T> ? 0 : a.T, a.d, step<T>);
  std::vector<const Kept<T>*> row_of(a.T), xs(P);
  std::vector<float> sum(a.T);
  const bool shifted = (a.gate.A && a.gate.shift != 0) || (a.up.A && a.up.shift != 0);
  parallel(a.T, a.d / 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* p = (const T*)a.x + t * a.d;
      typename Vec<float>::v total_ = {};
      for (int64_t i = 0; i < a.d && (shifted || !pairs<T>); i += step<T>) {
        auto v = i + step<T> <= a.d ? load(p + i) : load_part(p + i, a.d - i);
        if constexpr (!pairs<T>) store(wide[t] + i, v);
        total_ += v.a + v.b;
      }
      sum[t] = total<float>(total_);
      if constexpr (pairs<T>) row_of[t] = p;
      else row_of[t] = wide[t];
    }
  });
  for (int64_t i = 0; i < P; ++i) xs[i] = row_of[routed[i].token];

  // B~ x, of gate and up. A thread has its rows of every expert: experts differ in their number of tokens.
  const int64_t q[2] = {a.gate.A ? a.gate.q : 0, a.up.A ? a.up.q : 0};
  Grid<Kept<T>> h[2] = {{q[0] ? P : 0, q[0], step<T>}, {q[1] ? P : 0, q[1], step<T>}};
  std::vector<const Kept<T>*> hs[2] = {xs, xs};
  for (int f = 0; f < 2; ++f)
    for (int64_t i = 0; i < P && q[f]; ++i) hs[f][i] = h[f][i];
  const bool one_bank = a.gate.idx && a.up.idx && a.gate.W == a.up.W && a.gate.W_n == a.up.W_n && q[0] == q[1];  // a base then acts once for both
  Mixed mixed[2] = {mixtures(a.gate), {}};
  mixed[1] = mixtures(a.up, one_bank ? mixed[0] : Mixed{});
  if (one_bank) mixed[0].base = mixed[1].base;
  const int64_t bases = std::max(mixed[0].base.size(), mixed[1].base.size());
  parallel(q[0] + (one_bank ? 0 : q[1]), std::max(work, bases) * a.d / 8, [&](int64_t begin, int64_t end) {
    auto part = [&](int f) { return std::pair{std::max<int64_t>(begin - f * q[0], 0), std::min(end - f * q[0], q[f])}; };
    for (int f = 0; f < (one_bank ? 1 : 2); ++f)
      if (in[f]->idx) {  // rows of every base for all tokens, then each expert's mixture of them
        const auto [from, to] = part(f);
        const auto& base = mixed[f].base;
        const int64_t block = std::max<int64_t>(std::min<int64_t>(a.T > 1 ? 48 : to - from, to - from), 0);
        std::vector<float> y(base.size() * a.T * block), sums(block);
        for (int64_t row = from; row < to; row += block) {
          const int64_t n = std::min(block, to - row);
          for (size_t b = 0; b < base.size(); ++b)
            dots(base[b], a.d, row, row + n, row_of.data(), a.T, [&](int64_t r, int64_t t, float v) { y[(b * a.T + t) * block + r - row] = v; });
          for (int of = f; of < (one_bank ? 2 : f + 1); ++of)
            for (int64_t g = 0; g < G; ++g)
              for (int64_t i = group[g]; i < group[g + 1]; ++i) {
                std::fill(sums.begin(), sums.end(), 0.0f);
                for (const auto& [b, share] : mixed[of].of[g]) {
                  const float* seen = &y[(b * a.T + routed[i].token) * block];
                  for (int64_t r = 0; r < n; ++r) sums[r] += share * seen[r];
                }
                for (int64_t r = 0; r < n; ++r) keep<T>(h[of][i], row + r, sums[r]);
              }
        }
      }
    for (int64_t g = 0; g < G; ++g)
      for (int f = 0; f < 2; ++f) {
        if (in[f]->idx) continue;
        const auto [from, to] = part(f);
        dots(W[f][g], a.d, from, to, &xs[group[g]], count(g), [&](int64_t r, int64_t t, float y) { keep<T>(h[f][group[g] + t], r, y); });
      }
  });

  // act(gate) * up, kept for down's rows, or as the coefficients of a basis
  Grid<Kept<T>> z(a.down.A ? 0 : P, a.p, step<T>);
  Grid<float> c(a.down.A ? P : 0, a.p, step<T>);
  parallel(a.p, work * (a.d + q[0]) / 4, [&](int64_t begin, int64_t end) {
    constexpr int64_t block = 64;
    std::vector<float> y[2];
    for (int64_t g = 0; g < G; ++g)
      for (int64_t row = begin; row < end; row += block) {
        const int64_t n = std::min(block, end - row), first = group[g];
        for (int f = 0; f < 2; ++f) {
          y[f].resize(count(g) * block);
          dots(q[f] ? A[f][g] : W[f][g], q[f] ? q[f] : a.d, row, row + n, &hs[f][first], count(g), [&](int64_t r, int64_t t, float v) {
            y[f][t * block + r - row] = q[f] ? in[f]->scale * v + in[f]->shift * sum[routed[first + t].token] : v;
          });
        }
        for (int64_t t = 0; t < count(g); ++t)
          for (int64_t r = 0; r < n; r += step<float>) {
            auto gate = load(&y[0][t * block + r]), up = load(&y[1][t * block + r]);  // block is a multiple of the step
            float v[step<float>];
            store(v, {activate(gate.a, a.act) * up.a, activate(gate.b, a.act) * up.b});
            for (int64_t l = 0; l < std::min(step<float>, n - r); ++l)
              if (a.down.A) c[first + t][place<T>(row + r + l)] = v[l];
              else keep<T>(z[first + t], row + r + l, v[l]);
          }
      }
  });

  T* out = (T*)a.out;
  if (!a.down.A) {  // each thread has its own rows of every expert's down, so its own columns of the result
    std::vector<const Kept<T>*> zs(P);
    for (int64_t i = 0; i < P; ++i) zs[i] = z[i];
    parallel(a.d, work * a.p / 8, [&](int64_t begin, int64_t end) {
      std::vector<float> part(a.T * (end - begin));
      for (int64_t g = 0; g < G; ++g)
        dots(D[g], a.p, begin, end, &zs[group[g]], count(g), [&](int64_t r, int64_t t, float v) {
          part[routed[group[g] + t].token * (end - begin) + r - begin] += routed[group[g] + t].weight * v;
        });
      for (int64_t t = 0; t < a.T; ++t)
        for (int64_t r = begin; r < end; ++r) out[t * a.d + r] = T(part[t * (end - begin) + r - begin]);
    });
    return;
  }
  // down's basis lies transposed: sums of its rows. Few tokens: each thread has a chunk of the rows, with sums of its own that
  // are added up in order afterwards. Many: each has its columns, in tiles of columns x tokens.
  // With a bank, one such sum for every base in use: its coefficients are the tokens' mixtures of the first product.
  struct Runs { std::vector<const T*> M; std::vector<int64_t> first; };  // matrices, and the first coefficients of each
  const Runs adapters{DA, group};
  Runs last{D, group};
  const Mixed mix = mixtures(a.down);
  if (a.down.idx) {
    last = {mix.base, {}};
    for (size_t b = 0; b <= mix.base.size(); ++b) last.first.push_back(b * a.T);
  }
  const bool many = P > 4 * G;
  const int64_t chunks = many ? 1 : threads(), tile = 2 * step<T>;
  auto rows_sum = [&](const Runs& runs, int64_t rows, Grid<float>& parts, int64_t each, auto&& body) {
    const int64_t all = runs.M.size() * rows;
    parallel(chunks, 1 << 20, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin)
        for (int64_t i = all * begin / chunks; i < all * (begin + 1) / chunks; ++i) body(i / rows, i % rows, begin * each);
    });
    for (int64_t k = 1; k < chunks; ++k)
      for (int64_t i = 0; i < each * parts.cols; ++i) parts[0][i] += parts[k * each][i];
  };
  auto columns_sum = [&](const Runs& runs, int64_t K, int64_t n, Grid<float>& coefficients, auto&& target, auto&& factor) {
    constexpr int N = LEVEL >= 2 ? 6 : 2;
    parallel((n + tile - 1) / tile, runs.first.back() * K * 4, [&](int64_t begin, int64_t end) {
      for (size_t g = 0; g < runs.M.size(); ++g)
        for (int64_t col = begin * tile; col < std::min(end * tile, n); col += tile)
          for (int64_t t = runs.first[g]; t < runs.first[g + 1];) {
            const float* from[N];
            float factors[N], *to[N];
            const int64_t tokens = runs.first[g + 1] - t >= N ? N : 1;
            for (int64_t i = 0; i < tokens; ++i) from[i] = coefficients[t + i], factors[i] = factor(t + i), to[i] = target(t + i);
            tokens == N ? columns<T, N>(runs.M[g], n, K, col, from, factors, to) : columns<T, 1>(runs.M[g], n, K, col, from, factors, to);
            t += tokens;
          }
    });
  };
  Grid<float> u(chunks * P, a.down.q, step<T>), total_(chunks * a.T, a.d, step<T>);
  auto one = [](int64_t) { return 1.0f; };
  if (many) {
    columns_sum(adapters, a.p, a.down.q, c, [&](int64_t i) { return u[i]; }, one);
  } else {
    rows_sum(adapters, a.p, u, P, [&](int64_t g, int64_t r, int64_t first) {
      for (int64_t i = group[g]; i < group[g + 1]; ++i) axpy(u[first + i], c[i][place<T>(r)], DA[g] + r * a.down.q, a.down.q);
    });
  }
  auto factor = [&](int64_t i) { return routed[i].weight * a.down.scale; };
  Grid<float> shares(last.M.size() * (a.down.idx ? a.T : 0), a.down.q, step<T>);
  for (int64_t g = 0; g < G && a.down.idx; ++g)
    for (int64_t i = group[g]; i < group[g + 1]; ++i)
      for (const auto& [b, share] : mix.of[g]) {
        float* to = shares[b * a.T + routed[i].token];
        for (int64_t r = 0; r < u.cols; ++r) to[r] += factor(i) * share * u[i][r];
      }
  Grid<float>& coefficients = a.down.idx ? shares : u;
  auto token = [&](int64_t i) { return a.down.idx ? i % a.T : routed[i].token; };
  auto by = [&](int64_t i) { return a.down.idx ? 1.0f : factor(i); };
  if (many)
    columns_sum(last, a.down.q, a.d, coefficients, [&](int64_t i) { return total_[token(i)]; }, by);
  else
    rows_sum(last, a.down.q, total_, a.T, [&](int64_t g, int64_t r, int64_t first) {
      for (int64_t i = last.first[g]; i < last.first[g + 1]; ++i)
        axpy(total_[first + token(i)], by(i) * coefficients[i][place<T>(r)], last.M[g] + r * a.d, a.d);
    });
  std::vector<float> shift(a.T);
  if (a.down.shift != 0)
    for (int64_t i = 0; i < P; ++i)
      for (int64_t r = 0; r < a.p; ++r) shift[routed[i].token] += routed[i].weight * a.down.shift * c[i][place<T>(r)];
  for (int64_t t = 0; t < a.T; ++t)
    for (int64_t r = 0; r < a.d; ++r) out[t * a.d + r] = T(total_[t][place<T>(r)] + shift[t]);
}

void decode(const Decode& a) {
  switch (a.type) {
    case Type::bf16: return decode_as<BFloat16>(a);
    case Type::f16: return decode_as<Half>(a);
    default: return decode_as<float>(a);
  }
}

template <class T> void linear_as(const void* x_, const void* W, const void* bias, void* out_, int64_t T_, int64_t rows, int64_t n) {
  Grid<Kept<T>> wide(pairs<T> ? 0 : T_, n, step<T>);
  std::vector<const Kept<T>*> x(T_);
  T* out = (T*)out_;
  for (int64_t t = 0; t < T_; ++t) {
    const T* p = (const T*)x_ + t * n;
    if constexpr (pairs<T>) x[t] = p;
    else {
      for (int64_t i = 0; i < n; i += step<T>) store(wide[t] + i, i + step<T> <= n ? load(p + i) : load_part(p + i, n - i));
      x[t] = wide[t];
    }
  }
  parallel(rows, T_ * n / 8, [&](int64_t begin, int64_t end) {
    dots((const T*)W, n, begin, end, x.data(), T_,
         [&](int64_t r, int64_t t, float v) { out[t * rows + r] = T(bias ? v + float(((const T*)bias)[r]) : v); });
  });
}

void linear(Type type, const void* x, const void* W, const void* bias, void* out, int64_t tokens, int64_t rows, int64_t n) {
  switch (type) {
    case Type::bf16: return linear_as<BFloat16>(x, W, bias, out, tokens, rows, n);
    case Type::f16: return linear_as<Half>(x, W, bias, out, tokens, rows, n);
    default: return linear_as<float>(x, W, bias, out, tokens, rows, n);
  }
}

// ---- trellis_encode ------------------------------------------------------------------------------------
// Viterbi's algorithm: a state is the last 8 trellis bits, a window has the bit that leaves in front of them. Each window stands
// for one of four subsets of the levels, of which the nearest is taken. Two windows lead to a state: the one lost is kept.
constexpr int64_t STATES = 256;

INLINE vf shuffled(vf v, vi at) {
#if defined(__clang__)
  vf out;
  for (int i = 0; i < VB / 4; ++i) out[i] = v[at[i]];
  return out;
#else
  return __builtin_shuffle(v, at);
#endif
}

// Where `lost` has what belongs to a state: four vectors' are the bytes of one.
INLINE int64_t lost_place(int64_t state) {
  constexpr int64_t n = VB / 4;
  return state / (4 * n) * (4 * n) + state % n * 4 + state / n % 4;
}

// Of 2^(k - 1) levels, four numbers apart, the nearest to x
INLINE int64_t nearest(const float* levels, int64_t k, float x) {
  int64_t best = 0;
  for (int64_t u = 1; u < int64_t(1) << (k - 1); ++u)
    if (std::abs(x - levels[4 * u]) < std::abs(x - levels[4 * best])) best = u;
  return best;
}

// d: what each subset costs; of: the subset of each window
static void trellis_step(const float* cost, float* next, uint8_t* lost, vf d, const int32_t* of) {
  constexpr int64_t n = VB / 4;
  vi twice[2];  // lane i of either half of a vector whose lanes come twice
  for (int i = 0; i < n; ++i) twice[0][i] = i / 2, twice[1][i] = (n + i) / 2;
  for (int64_t first = 0; first < STATES; first += 4 * n) {
    vi all = {};
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t state = first + q * n;
      const int64_t from = (state - q % 2 * n) / 2;
      const vf a = shuffled(*(const vf_mem*)(cost + from), twice[q % 2]) + shuffled(d, *(const vi_mem*)(of + state));
      const vf b = shuffled(*(const vf_mem*)(cost + STATES / 2 + from), twice[q % 2]) + shuffled(d, *(const vi_mem*)(of + STATES + state));
      const vi less = b < a;
      *(vf_mem*)(next + state) = less ? b : a;
      all |= less & (1 << 8 * q);
    }
    std::memcpy(lost + first, &all, sizeof all);
  }
}

// sequences x (rows, columns), widths 0 to 6, weights of squared errors, levels (7, 128), subsets (512,) -> states (rows, columns):
// windows, above them what is left of a level's number. A column of no width leaves the trellis as it is.
void trellis(const float* x, const uint8_t* width, const float* weight, const float* levels, const int64_t* subsets, int16_t* states,
             int64_t rows, int64_t columns) {
  std::vector<int32_t> of(subsets, subsets + 2 * STATES);
  parallel(rows, columns * STATES, [&](int64_t begin, int64_t end) {
    std::vector<float> cost(STATES), next(STATES);
    std::vector<uint8_t> lost(columns * STATES);
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* w = width + row * columns;
      std::fill(cost.begin(), cost.end(), std::numeric_limits<float>::infinity());
      cost[0] = 0;
      uint8_t* to = lost.data();
      for (int64_t t = 0; t < columns; ++t) {
        if (!w[t]) continue;
        const float at = x[row * columns + t];
        vf d = {};
        for (int64_t z = 0; z < 4; ++z) {
          const float* of_subset = levels + 128 * w[t] + z;
          const float error = at - of_subset[4 * nearest(of_subset, w[t], at)];
          d[z] = weight[row * columns + t] * error * error;
        }
        trellis_step(cost.data(), next.data(), to, d, of.data());
        to += STATES;
        cost.swap(next);
      }
      // back from the cheapest end
      int64_t state = std::min_element(cost.begin(), cost.end()) - cost.begin();
      for (int64_t t = columns; t-- > 0;) {
        states[row * columns + t] = 0;
        if (!w[t]) continue;
        to -= STATES;
        const int64_t window = to[lost_place(state)] * STATES + state;
        const int64_t more = nearest(levels + 128 * w[t] + of[window], w[t], x[row * columns + t]);
        states[row * columns + t] = int16_t(window | more << 9);
        state = window >> 1;
      }
    }
  });
}

#include "coded.h"

}  // namespace ISA
#undef VB
#undef INLINE
