// Products with weights in packed codes, as globe.py's `unpack` and `decode_groups` define them: part of cpu_kernels.h.
//
// A vector is a block's eight columns in four or eight times eight rows: the trellis' parities come by tables of nibbles, or products
// of bits, of the bytes in it and of those in front, a number's bits as nibbles, and its level by one more table. Activations are
// rounded to 14 or 16 bits, by group of blocks of one width, with the columns' scales in them; levels are whole numbers of 8 bits, so
// that sums are exact.

constexpr int64_t OCTETS = LEVEL == 3 ? 8 : 4;  // of rows in a vector
constexpr int64_t MOST_BITS = 6;
constexpr int64_t AHEAD = 16;                   // blocks, where a matrix is decoded
#define INLINE_MEMBER inline __attribute__((always_inline))

// Asks for the memory that comes next, as much as a vector of each of K planes, and goes on behind it; null: does not
template <int K> INLINE void ask(const uint8_t*& next) {
  if (!next) return;
  for (int64_t i = 0; i < 8 * OCTETS * K; i += 64) __builtin_prefetch(next + i, 0, 2);
  next += 8 * OCTETS * K;
}

// 2^(i / 256) of i in [0, 256), and of i in [-2^15, 2^15)
static const float* fractions() {
  static const std::vector<float> parts = [] {
    std::vector<float> all(256);
    for (int64_t j = 0; j < 256; ++j) all[j] = std::exp2(j / 256.0f);
    return all;
  }();
  return parts.data();
}
INLINE float power(int32_t i, const float* parts) {
  const uint32_t bits = uint32_t(std::max(0, (i >> 8) + 127)) << 23;
  float whole;
  std::memcpy(&whole, &bits, 4);
  return whole * parts[i & 255];
}

// A group of blocks of one width, and what its activations are multiplied with
struct Group { int64_t block, blocks, width; float scale; };

// x (columns,) for the rows of each class, rounded in groups
struct CodedInput {
  std::vector<std::vector<Group>> groups;  // by class
  std::vector<int16_t> x;                  // (classes, 8 blocks)
};
constexpr int64_t MOST_BLOCKS = 16;                   // of a group
constexpr float LARGEST = LEVEL == 3 ? 32639 : 8191;  // of activations: two bytes of -128 to 127; or four blocks' products with 2^8
                                                      // levels, in pairs, stay below 2^31

// Levels in 8 bits: (width, number), 128 more than they are, over and over; and what one of them counts
struct Levels {
  int8_t level[MOST_BITS + 1][128];
  alignas(64) uint8_t raised[MOST_BITS + 1][128];
  float unit[MOST_BITS + 1];
};
static Levels rounded_levels(const float* levels) {
  Levels out = {};
  for (int64_t k = 1; k <= MOST_BITS; ++k) {
    const int64_t n = int64_t(2) << k;
    out.unit[k] = levels[128 * k + n - 1] / 127;
    for (int64_t i = 0; i < n; ++i) out.level[k][i] = int8_t(std::lrint(levels[128 * k + i] / out.unit[k]));
    for (int64_t i = 0; i < 128; ++i) out.raised[k][i] = uint8_t(out.level[k][i % std::max<int64_t>(16, n)] + 128);
  }
  return out;
}

// x of eight columns times `scale`, rounded
INLINE void rounded(const float* x, float scale, int16_t* out) {
#if LEVEL >= 1
  const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)));
  _mm_storeu_si128((__m128i*)out, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#else
  for (int i = 0; i < 8; ++i) out[i] = int16_t(std::lrint(x[i] * scale));
#endif
}
#if LEVEL == 3
// Eight numbers as 256 * upper + lower: the bytes of all upper ones, then those of the lower ones
INLINE void upper_and_lower(int16_t* x) {
  const __m128i v = _mm_loadu_si128((const __m128i*)x);
  const __m128i upper = _mm_srai_epi16(_mm_add_epi16(v, _mm_set1_epi16(128)), 8);
  _mm_storeu_si128((__m128i*)x, _mm_unpacklo_epi64(_mm_cvtepi16_epi8(upper), _mm_cvtepi16_epi8(v)));
}
#endif

// (classes, blocks) of a family: what its columns are multiplied with
static void column_scales(const CodedFamily& m, std::vector<float>& out) {
  const float* parts = fractions();
  out.resize(m.classes * m.blocks);
  for (size_t i = 0; i < out.size(); ++i) out[i] = power(m.column[i], parts);
}

static void check_order(const int16_t* order, int64_t n, int64_t inputs) {
  int wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong |= int(order[i] < 0) | int(order[i] >= inputs);
  check(!wrong, "globe: codes: order: expected numbers in [0, ", inputs, ")");
}

// `first`: of each class its first octet, where rows are known: classes without any are left out
static void coded_input(const Coded& m, const float* scales, const float* x, const Levels& levels, const std::vector<int64_t>* first,
                        CodedInput& out) {
  out.groups.resize(m.classes);
  for (auto& groups : out.groups) groups.clear();
  out.x.resize(m.classes * m.blocks * 8);
  // columns in order, and the largest of each block
  static thread_local std::vector<float> ordered, most;
  ordered.assign(m.blocks * 8, 0), most.assign(m.blocks, 0);
  check(m.order || m.columns <= m.inputs, "globe: codes: expected at most ", m.inputs, " columns, found ", m.columns);
  if (m.order) {
    check_order(m.order, m.columns, m.inputs);
    for (int64_t i = 0; i < m.columns; ++i) ordered[i] = x[m.order[i]];
  } else {
    std::copy(x, x + m.columns, ordered.begin());
  }
  for (int64_t b = 0; b < m.blocks; ++b)
    for (int i = 0; i < 8; ++i) most[b] = std::max(most[b], std::abs(ordered[8 * b + i]));
  for (int64_t c = 0; c < m.classes; ++c) {
    if (first && (*first)[c] == (*first)[c + 1]) continue;
    const uint8_t* width = m.width + c * m.blocks;
    for (int64_t b = 0, n; b < m.blocks; b += n) {
      n = 1;
      while ((b + n) % MOST_BLOCKS && b + n < m.blocks && width[b + n] == width[b]) ++n;  // of the same sixteen
      if (!width[b]) continue;
      const float* scale = scales + c * m.blocks + b;
      float largest = 1e-30f;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, scale[i] * most[b + i]);
      for (int64_t i = 0; i < n; ++i) {
        int16_t* to = &out.x[(c * m.blocks + b + i) * 8];
        rounded(&ordered[8 * (b + i)], scale[i] * (LARGEST / largest), to);
#if LEVEL == 3
        upper_and_lower(to);
#endif
      }
      out.groups[c].push_back({b, n, width[b], largest / LARGEST * levels.unit[width[b]]});
    }
  }
}

#if LEVEL == 3
// Products of bits give the numbers' nibbles of rows 2 q and 2 q + 1; levels meet the activations' two
// bytes as 128 more than they are, which the sums start from.
typedef __m512i v64;
struct Nibbles {
  int64_t now[4], before[4], more[2][4];  // matrices of bits by q: of trellis bits, those of the octet before, and other bits
  explicit Nibbles(const int64_t* subsets) {
    auto matrix = [](auto&& bit) {  // bit(i, j): whether bit j of a byte counts for bit i of the result
      uint64_t out = 0;
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) out |= uint64_t(bit(i, j)) << (8 * (7 - i) + j);
      return int64_t(out);
    };
    for (int q = 0; q < 4; ++q) {
      // bits 4 and up belong to the odd row
      auto taps = [&](int i, int above) { return i % 4 < 2 && 0 <= above && above <= 8 && (subsets[1 << above] >> i % 4 & 1); };
      now[q] = matrix([&](int i, int j) { return taps(i, 2 * q + i / 4 - j); });
      before[q] = matrix([&](int i, int j) { return taps(i, 2 * q + i / 4 + 8 - j); });
      for (int u = 0; u < 2; ++u) more[u][q] = matrix([&](int i, int j) { return i % 4 == 2 + u && j == 2 * q + i / 4; });
    }
  }
};

template <int K> struct Tables {  // levels: each 64 numbers of six bits, of which fewer may count
  v64 of[2];
  explicit Tables(const Levels& levels) {
    for (int i = 0; i < 2; ++i) of[i] = _mm512_load_si512(levels.raised[K] + 64 * i);
  }
};

// A block's columns in n octets of rows from `at` on; K bits of each
template <int K> struct Octets {
  v64 bits, before, own[K];
  INLINE_MEMBER void read(const uint8_t* const* plane, int64_t at, int64_t n) {
    const __mmask8 there = __mmask8((1 << n) - 1);
    bits = _mm512_maskz_loadu_epi64(there, plane[0] + 8 * at);
    before = at ? _mm512_maskz_loadu_epi64(there, plane[0] + 8 * at - 8) : _mm512_maskz_expand_epi64(__mmask8(254), bits);
    for (int k = 1; k < K; ++k) own[k] = _mm512_maskz_loadu_epi64(there, plane[k] + 8 * at);
  }
  // the lowest bits of rows 2 q and 2 q + 1's numbers, in halves of a byte; then one row's levels
  INLINE_MEMBER v64 pair(const Nibbles& t, int q) const {
    auto product = [](v64 v, int64_t matrix) { return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(matrix), 0); };
    v64 out = _mm512_xor_si512(product(bits, t.now[q]), product(before, t.before[q]));
    for (int k = 1; k < K && k < 3; ++k) out = _mm512_xor_si512(out, product(own[k], t.more[k - 1][q]));
    return out;
  }
  INLINE_MEMBER v64 found(v64 pair, const Tables<K>& level, int q, int odd) const {
    v64 number = odd ? _mm512_srli_epi16(pair, 4) : pair;
    // bits beyond four; what else a byte holds above them, tables do not look at
#pragma GCC unroll 3
    for (int k = 3; k < K; ++k) {
      const int left = k + 1 - (2 * q + odd);
      const v64 moved = left > 0 ? _mm512_slli_epi16(own[k], left) : _mm512_srli_epi16(own[k], -left);
      number = _mm512_ternarylogic_epi64(_mm512_set1_epi8(char(2 << k)), moved, number, 0xCA);
    }
    return K < 6 ? _mm512_permutexvar_epi8(number, level.of[0]) : _mm512_permutex2var_epi8(level.of[0], number, level.of[1]);
  }
};
INLINE void signed_levels(v64 found, int8_t* to) { _mm512_storeu_si512(to, _mm512_xor_si512(found, _mm512_set1_epi8(-128))); }

// y (8, stride) += the product of a group's columns and rows [first, last), in octets; two sums of four columns for each row.
// next: memory that is read after the group's
template <int K> void group_product(const uint8_t* const (*planes)[MOST_BITS], const Group& g, const int16_t* x, int64_t first, int64_t last,
                                    const Nibbles& t, const Levels& levels, float* y, int64_t stride, const uint8_t*& next) {
  const v64 middle = _mm512_set1_epi8(-128);
  const Tables<K> level(levels);
  int64_t bytes[MOST_BLOCKS][2];
  std::memcpy(bytes, x + 8 * g.block, 16 * g.blocks);
  v64 start[2] = {};
  for (int64_t i = 0; i < g.blocks; ++i)
    for (int j = 0; j < 2; ++j) start[j] = _mm512_dpbusd_epi32(start[j], middle, _mm512_set1_epi64(bytes[i][j]));
  for (v64& sum : start) sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
  const __m512 s = _mm512_set1_ps(g.scale);
  for (int64_t at = first; at < last; at += OCTETS) {
    const int64_t n = std::min<int64_t>(OCTETS, last - at);
    v64 sum[8][2];
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) sum[row][0] = start[0], sum[row][1] = start[1];
    for (int64_t i = 0; i < g.blocks; ++i) {
      Octets<K> block;
      block.read(planes[g.block + i], at, n);
      ask<K>(next);
      const v64 upper = _mm512_set1_epi64(bytes[i][0]), lower = _mm512_set1_epi64(bytes[i][1]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const v64 pair = block.pair(t, q);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const v64 found = block.found(pair, level, q, odd);
          sum[2 * q + odd][0] = _mm512_dpbusd_epi32(sum[2 * q + odd][0], found, upper);
          sum[2 * q + odd][1] = _mm512_dpbusd_epi32(sum[2 * q + odd][1], found, lower);
        }
      }
    }
    const __mmask16 mine = __mmask16((1 << 2 * n) - 1);
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      float* to = y + row * stride + 2 * at;
      const v64 both = _mm512_add_epi32(_mm512_slli_epi32(sum[row][0], 8), sum[row][1]);
      _mm512_mask_storeu_ps(to, mine, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), s, _mm512_maskz_loadu_ps(mine, to)));
    }
  }
}
#elif LEVEL >= 1
typedef __m256i v32;
// What nibbles add to the numbers' nibbles of rows 2 q and 2 q + 1: [q][nibble: lower and upper one of the byte, of the byte before]
struct Nibbles {
  alignas(32) uint8_t parity[4][4][32] = {};
  alignas(32) uint8_t more[2][2][32] = {};  // [first or second bit that is not the trellis'][q % 2]
  explicit Nibbles(const int64_t* subsets) {
    for (int q = 0; q < 4; ++q)
      for (int from = 0; from < 4; ++from)
        for (int v = 0; v < 32; ++v)
          for (int bit = 0; bit < 4; ++bit)
            for (int odd = 0; odd < 2; ++odd) {
              const int at[4] = {bit, 4 + bit, bit - 8, bit - 4};
              const int above = 2 * q + odd - at[from];
              if (v >> bit & 1 && 0 <= above && above <= 8) parity[q][from][v] ^= uint8_t(subsets[1 << above] << 4 * odd);
            }
    for (int u = 0; u < 2; ++u)
      for (int half = 0; half < 2; ++half)
        for (int v = 0; v < 32; ++v)
          for (int odd = 0; odd < 2; ++odd) more[u][half][v] |= uint8_t((v >> (2 * half + odd) & 1) << (4 * odd + 2 + u));
  }
};

INLINE v32 octets(const uint8_t* p, int64_t n) {
  if (n == OCTETS) return _mm256_loadu_si256((const __m256i*)p);
  alignas(32) uint8_t some[32] = {};
  std::memcpy(some, p, 8 * n);
  return _mm256_load_si256((const __m256i*)some);
}
INLINE v32 looked_up(const void* table, v32 at) { return _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)table), at); }
INLINE v32 lower(v32 v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE v32 upper(v32 v) { return lower(_mm256_srli_epi16(v, 4)); }

template <int K> struct Tables {  // levels, 16 at a time
  v32 of[K > 3 ? 1 << (K - 3) : 1];
  explicit Tables(const Levels& levels) {
    for (int i = 0; i < (K > 3 ? 1 << (K - 3) : 1); ++i)
      of[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(levels.level[K] + 16 * i)));
  }
};

// A block's columns in n octets of rows from `at` on: nibbles of the trellis bits, now and before, and the other bits
template <int K> struct Octets {
  v32 bits[4], own[K];
  INLINE_MEMBER void read(const uint8_t* const* plane, int64_t at, int64_t n) {
    const v32 now = octets(plane[0] + 8 * at, n);
    v32 before;
    if (at) before = octets(plane[0] + 8 * at - 8, n);
    else before = _mm256_blend_epi32(_mm256_permute4x64_epi64(now, 0x90), _mm256_setzero_si256(), 3);
    bits[0] = lower(now), bits[1] = upper(now), bits[2] = lower(before), bits[3] = upper(before);
    for (int k = 1; k < K; ++k) own[k] = octets(plane[k] + 8 * at, n);
  }
  // the lowest bits of rows 2 q and 2 q + 1's numbers, in halves of a byte; then one row's levels
  INLINE_MEMBER v32 pair(const Nibbles& t, int q) const {
    v32 out = _mm256_xor_si256(_mm256_xor_si256(looked_up(t.parity[q][0], bits[0]), looked_up(t.parity[q][3], bits[3])),
                               looked_up(t.parity[q][q < 2 ? 2 : 1], bits[q < 2 ? 2 : 1]));
    for (int k = 1; k < K && k < 3; ++k)
      out = _mm256_or_si256(out, looked_up(t.more[k - 1][q % 2], q < 2 ? lower(own[k]) : upper(own[k])));
    return out;
  }
  INLINE_MEMBER v32 found(v32 pair, const Tables<K>& level, int q, int odd) const {
    // tables look at the lowest four bits, and at the highest, which of numbers of three bits is 0
    const v32 mine = odd ? _mm256_srli_epi16(pair, 4) : pair;
    const v32 number = K < 3 ? mine : lower(mine);
    // of more than 16 levels the tables are chosen by the bits beyond four, which go to the top of their bytes
    v32 out[K > 3 ? 1 << (K - 3) : 1];
    for (int j = 0; j < (K > 3 ? 1 << (K - 3) : 1); ++j) out[j] = _mm256_shuffle_epi8(level.of[j], number);
    for (int k = K - 1; k >= 3; --k) {
      const v32 chosen = _mm256_slli_epi16(own[k], 7 - (2 * q + odd));
      for (int j = 0; j < 1 << (k - 3); ++j) out[j] = _mm256_blendv_epi8(out[j], out[j + (1 << (k - 3))], chosen);
    }
    return out[0];
  }
};
INLINE void signed_levels(v32 found, int8_t* to) { _mm256_storeu_si256((__m256i*)to, found); }

// y (8, stride) += the product of a group's columns and rows [first, last), in octets; two sums of four columns for each row.
// next: memory that is read after the group's
template <int K> void group_product(const uint8_t* const (*planes)[MOST_BITS], const Group& g, const int16_t* x, int64_t first, int64_t last,
                                    const Nibbles& t, const Levels& levels, float* y, int64_t stride, const uint8_t*& next) {
  if (g.blocks > 4) {
    group_product<K>(planes, {g.block, 4, g.width, g.scale}, x, first, last, t, levels, y, stride, next);
    return group_product<K>(planes, {g.block + 4, g.blocks - 4, g.width, g.scale}, x, first, last, t, levels, y, stride, next);
  }
  const Tables<K> level(levels);
  v32 xs[4];
  for (int64_t i = 0; i < g.blocks; ++i) xs[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 8 * (g.block + i))));
  for (int64_t at = first; at < last; at += OCTETS) {
    const int64_t n = std::min(OCTETS, last - at);
    Octets<K> block[4];
    for (int64_t i = 0; i < g.blocks; ++i) block[i].read(planes[g.block + i], at, n), ask<K>(next);
    // what stands behind the last octet is another class'
    alignas(32) float scale[8];
    for (int64_t i = 0; i < 8; ++i) scale[i] = i < 2 * n ? g.scale / 128 : 0;
    const __m256 s = _mm256_load_ps(scale);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      v32 sum[2][2] = {};
      for (int64_t i = 0; i < g.blocks; ++i) {
        const v32 pair = block[i].pair(t, q);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const v32 found = block[i].found(pair, level, q, odd);
          // 256 times the levels, in 16 bits: of the first and third octet, of the second and fourth
          const v32 even = _mm256_unpacklo_epi8(_mm256_setzero_si256(), found);
          const v32 other = _mm256_unpackhi_epi8(_mm256_setzero_si256(), found);
          sum[odd][0] = _mm256_add_epi32(sum[odd][0], _mm256_madd_epi16(even, xs[i]));
          sum[odd][1] = _mm256_add_epi32(sum[odd][1], _mm256_madd_epi16(other, xs[i]));
        }
      }
      for (int odd = 0; odd < 2; ++odd) {
        float* to = y + (2 * q + odd) * stride + 2 * at;
        // halves first: two sums might be too large for 32 bits
        const v32 both = _mm256_hadd_epi32(_mm256_srai_epi32(sum[odd][0], 1), _mm256_srai_epi32(sum[odd][1], 1));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), s, _mm256_loadu_ps(to)));
      }
    }
  }
}
#else
struct Nibbles {
  const int64_t* subsets;
  explicit Nibbles(const int64_t* subsets) : subsets(subsets) {}
};
// The trellis bits of a column before an octet, the newest lowest
INLINE int64_t window_before(const uint8_t* plane, int64_t at, int64_t column) {
  int64_t window = 0;
  for (int64_t r = 0; at && r < 8; ++r) window = window << 1 | (plane[8 * (at - 1) + column] >> r & 1);
  return window;
}

template <int K> void group_product(const uint8_t* const (*planes)[MOST_BITS], const Group& g, const int16_t* x, int64_t first, int64_t last,
                                    const Nibbles& t, const Levels& levels, float* y, int64_t stride, const uint8_t*& next) {
  for (int64_t b = g.block; b < g.block + g.blocks; ++b)
    for (int64_t column = 0; column < 8; ++column) {
      int64_t window = window_before(planes[b][0], first, column);
      for (int64_t at = first; at < last; ++at)
        for (int64_t r = 0; r < 8; ++r) {
          window = (window << 1 | (planes[b][0][8 * at + column] >> r & 1)) & 511;
          int64_t number = t.subsets[window];
          for (int64_t i = 1; i < K; ++i) number |= int64_t(planes[b][i][8 * at + column] >> r & 1) << (i + 1);
          y[r * stride + 2 * at] += g.scale * levels.level[K][number] * x[8 * b + column];
        }
    }
}
#endif

// out (rows, stride) = a block's columns of rows [first, last), in octets: levels times `scale`
template <int K, class T> void block_values(const uint8_t* const* plane, int64_t first, int64_t last, const Nibbles& t, const Levels& levels,
                                            float scale, T* out, int64_t stride) {
#if LEVEL >= 1
  const Tables<K> level(levels);
  for (int64_t at = first; at < last; at += OCTETS) {
    const int64_t n = std::min<int64_t>(OCTETS, last - at);
    Octets<K> block;
    block.read(plane, at, n);
    for (int row = 0; row < 8; ++row) {
      int8_t found[8 * OCTETS];
      signed_levels(block.found(block.pair(t, row / 2), level, row / 2, row % 2), found);
      for (int64_t o = 0; o < n; ++o) {
        T* to = out + (8 * (at - first + o) + row) * stride;
#if LEVEL == 3
        if constexpr (sizeof(T) == 2) {
          const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(found + 8 * o))));
          _mm_storeu_si128((__m128i*)to, (__m128i)_mm256_cvtneps_pbh(_mm256_mul_ps(wide, _mm256_set1_ps(scale))));
          continue;
        }
#endif
        for (int64_t c = 0; c < 8; ++c) to[c] = found[8 * o + c] * scale;
      }
    }
  }
#else
  for (int64_t c = 0; c < 8; ++c) {
    int64_t window = window_before(plane[0], first, c);
    for (int64_t row = 8 * first; row < 8 * last; ++row) {
      const int64_t at = row / 8 * 8 + c, bit = row % 8;
      window = (window << 1 | (plane[0][at] >> bit & 1)) & 511;
      int64_t number = t.subsets[window];
      for (int64_t i = 1; i < K; ++i) number |= int64_t(plane[i][at] >> bit & 1) << (i + 1);
      out[(row - 8 * first) * stride + c] = levels.level[K][number] * scale;
    }
  }
#endif
}

// Where a matrix' rows and planes lie
struct CodedPlaces {
  std::vector<int64_t> order, first;   // rows by class; the first octet of each class, and the end
  std::vector<const uint8_t*> planes;  // (blocks, MOST_BITS)
  void find(const Coded& m) {
    order.resize(m.p), first.assign(m.classes + 1, 0), planes.resize(m.blocks * MOST_BITS);
    int64_t count[257] = {};  // kinds have 8 bits
    for (int64_t r = 0; r < m.p; ++r) {
      check(m.kind[r] < m.classes, "globe: codes: expected classes below ", m.classes, ", found ", int(m.kind[r]));
      ++count[m.kind[r] + 1];
    }
    for (int64_t c = 0; c < m.classes; ++c) count[c + 1] += count[c];
    for (int64_t c = 0; c <= m.classes; ++c) {
      check(count[c] % 8 == 0 || count[c] == m.p, "globe: codes: expected rows of a class in eights, found ", count[c], " down to class ", c);
      first[c] = (count[c] + 7) / 8;
    }
    for (int64_t r = 0; r < m.p; ++r) order[count[m.kind[r]]++] = r;
    const uint8_t* at = m.codes;
    for (int64_t b = 0; b < m.blocks; ++b)
      for (int64_t i = 0, c = m.classes; i < MOST_BITS; ++i) {
        planes[b * MOST_BITS + i] = at;
        while (c && m.width[(c - 1) * m.blocks + b] <= i) --c;  // of fewer bits
        at += 8 * first[c];
      }
    check(at - m.codes == m.bytes, "globe: codes: expected ", at - m.codes, " bytes of a matrix, found ", m.bytes);
  }
};

// out (p,) = W x of a matrix' rows in octets [begin, end); next: what is read after it
static void coded_rows(const Coded& m, const CodedPlaces& places, const CodedInput& in, const Nibbles& t, const Levels& levels,
                       int64_t begin, int64_t end, float* out, const uint8_t* next) {
  const int64_t stride = 2 * (end - begin) + 2 * OCTETS;
  static thread_local std::vector<float> y;  // what a call needs anew each time is kept, here and below
  y.assign(8 * stride, 0);
  float* from = y.data() - 2 * begin;
  const auto planes = (const uint8_t* const(*)[MOST_BITS])places.planes.data();
  // sixteen blocks after the other, as they lie in memory, for all classes
  size_t turn[256] = {};
  for (int64_t b = 0; b < m.blocks; b += MOST_BLOCKS) {
    // slices of a matrix do not read all of what follows
    const uint8_t* ahead = b + MOST_BLOCKS < m.blocks ? planes[b + MOST_BLOCKS][0] : next;
    if (end - begin < (m.p + 7) / 8) ahead = nullptr;
    for (int64_t c = 0; c < m.classes; ++c) {
      const int64_t first = std::max(begin, places.first[c]), last = std::min(end, places.first[c + 1]);
      const int16_t* x = in.x.data() + c * m.blocks * 8;
      const std::vector<Group>& groups = in.groups[c];
      for (; turn[c] < groups.size() && groups[turn[c]].block < b + MOST_BLOCKS; ++turn[c]) {
        const Group& g = groups[turn[c]];
        switch (first < last ? g.width : 0) {
          case 0: break;
          case 1: group_product<1>(planes, g, x, first, last, t, levels, from, stride, ahead); break;
          case 2: group_product<2>(planes, g, x, first, last, t, levels, from, stride, ahead); break;
          case 3: group_product<3>(planes, g, x, first, last, t, levels, from, stride, ahead); break;
          case 4: group_product<4>(planes, g, x, first, last, t, levels, from, stride, ahead); break;
          case 5: group_product<5>(planes, g, x, first, last, t, levels, from, stride, ahead); break;
          default: group_product<6>(planes, g, x, first, last, t, levels, from, stride, ahead);
        }
      }
    }
  }
  const float* parts = fractions();
  for (int64_t o = begin; o < end; ++o)
    for (int64_t r = 0; r < 8 && 8 * o + r < m.p; ++r) {
      const int64_t row = places.order[8 * o + r];
      out[row] = (from[r * stride + 2 * o] + from[r * stride + 2 * o + 1]) * power(32 * (m.row[row] - 128), parts);
    }
}

// out (8 (end - begin), stride): W of a matrix' rows in octets [begin, end), as they lie, but for the rows' own scales
template <class T> static void coded_values_of(const Coded& m, const CodedPlaces& places, const Nibbles& t, const Levels& levels,
                                               int64_t begin, int64_t end, T* out, int64_t stride) {
  const float* parts = fractions();
  for (int64_t c = 0; c < m.classes; ++c) {
    const int64_t first = std::max(begin, places.first[c]), last = std::min(end, places.first[c + 1]);
    for (int64_t b = 0; b < m.blocks && first < last; ++b) {
      const int64_t at = c * m.blocks + b, width = m.width[at];
      // asks for the memory of a later block
      for (int64_t i = 0; b + AHEAD < m.blocks && i < m.width[at + AHEAD]; ++i) {
        const uint8_t* later = places.planes[(b + AHEAD) * MOST_BITS + i];
        __builtin_prefetch(later + 8 * first), __builtin_prefetch(later + 8 * last - 1);
      }
      const uint8_t* const* plane = &places.planes[b * MOST_BITS];
      const float scale = levels.unit[width] * power(m.column[at], parts);
      T* to = out + 8 * (first - begin) * stride + 8 * b;
      switch (width) {
        case 0: for (int64_t r = 0; r < 8 * (last - first); ++r) std::fill(to + r * stride, to + r * stride + 8, T(0.0f)); break;
        case 1: block_values<1>(plane, first, last, t, levels, scale, to, stride); break;
        case 2: block_values<2>(plane, first, last, t, levels, scale, to, stride); break;
        case 3: block_values<3>(plane, first, last, t, levels, scale, to, stride); break;
        case 4: block_values<4>(plane, first, last, t, levels, scale, to, stride); break;
        case 5: block_values<5>(plane, first, last, t, levels, scale, to, stride); break;
        default: block_values<6>(plane, first, last, t, levels, scale, to, stride);
      }
    }
  }
}

// ---- groups of 64 columns in 8 or 4 bits ---------------------------------------------------------------
constexpr int64_t GROUP = 64;
constexpr float LARGEST_16 = 32639;  // of activations: their lower bytes count from -128 to 127, as the upper ones

// x (columns,) in 16 bits by groups; beside codes of 4 bits a group's even columns come first
struct GroupInput {
  std::vector<int16_t> x;
  std::vector<float> scale;
  // for unsigned codes: upper and lower bytes (groups, 2, GROUP), and where a group's sum starts
  std::vector<int8_t> bytes;
  std::vector<int32_t> start;
  GroupInput(const float* from, int64_t columns, int64_t bits) : x((columns + GROUP - 1) / GROUP * GROUP), scale(x.size() / GROUP) {
    for (size_t g = 0; g < scale.size(); ++g) {
      float some[GROUP] = {}, most = 1e-30f;
      const int64_t n = std::min(GROUP, columns - int64_t(g) * GROUP);
      for (int64_t i = 0; i < n; ++i) {
        const float value = from[g * GROUP + i];
        some[bits == 4 ? i / 2 + i % 2 * 32 : i] = value;
        most = std::max(most, std::abs(value));
      }
      for (int64_t i = 0; i < GROUP; i += 8) rounded(some + i, LARGEST_16 / most, &x[g * GROUP + i]);
      scale[g] = most / LARGEST_16;
    }
#if LEVEL >= 1
    bytes.resize(2 * x.size()), start.resize(scale.size());
    for (size_t i = 0; i < x.size(); ++i) {
      int8_t* to = &bytes[i / GROUP * 2 * GROUP + i % GROUP];
      to[GROUP] = int8_t(x[i]);
      to[0] = int8_t((x[i] - to[GROUP]) / 256);
      start[i / GROUP] -= (bits == 8 ? 128 : 8) * x[i];
    }
#endif
  }
};

// sum + scale * (a group's 64 codes times its activations); of 4 bits, the even column's is in a byte's lower half
#if LEVEL == 3
typedef __m512 Sum;
INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
template <int BITS> INLINE Sum add_group(Sum sum, const uint8_t* from, const GroupInput& in, int64_t g, float scale) {
  __m512i codes;
  if (BITS == 8) {
    codes = _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
  } else {
    const __m256i both = _mm256_loadu_si256((const __m256i*)from);
    const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    codes = _mm512_and_si512(wide, _mm512_set1_epi8(15));
  }
  const int8_t* x = &in.bytes[2 * g * GROUP];
  const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x));
  const __m512i start = _mm512_maskz_set1_epi32(1, in.start[g]);
  const __m512i whole = _mm512_dpbusd_epi32(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), start), codes, _mm512_loadu_si512(x + GROUP));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale), sum);
}
#elif LEVEL >= 1
typedef __m256 Sum;
INLINE float total(Sum sum) {
  alignas(32) float parts[8];
  _mm256_store_ps(parts, sum);
  return parts[0] + parts[1] + parts[2] + parts[3] + parts[4] + parts[5] + parts[6] + parts[7];
}
template <int BITS> INLINE Sum add_group(Sum sum, const uint8_t* from, const GroupInput& in, int64_t g, float scale) {
  auto vector = [](const void* p) { return _mm256_loadu_si256((const __m256i*)p); };
  __m256i whole;
  if (BITS == 8) {
    const int16_t* x = &in.x[g * GROUP];
    auto product = [&](int64_t i) {
      const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + i)));
      return _mm256_madd_epi16(codes, vector(x + i));
    };
    whole = _mm256_add_epi32(_mm256_add_epi32(product(0), product(16)), _mm256_add_epi32(product(32), product(48)));
  } else {
    const int8_t* x = &in.bytes[2 * g * GROUP];
    const __m256i all = vector(from), low = _mm256_set1_epi8(15);
    const __m256i even = _mm256_and_si256(all, low), odd = _mm256_and_si256(_mm256_srli_epi16(all, 4), low);
    auto product = [&](const int8_t* x, int16_t factor) {
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, vector(x)), _mm256_maddubs_epi16(odd, vector(x + 32)));
      return _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
    };
    whole = _mm256_add_epi32(product(x, 256), product(x + GROUP, 1));
    whole = _mm256_add_epi32(whole, _mm256_zextsi128_si256(_mm_cvtsi32_si128(in.start[g])));
  }
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(scale), sum);
}
#else
typedef float Sum;
INLINE float total(Sum sum) { return sum; }
template <int BITS> INLINE Sum add_group(Sum sum, const uint8_t* from, const GroupInput& in, int64_t g, float scale) {
  int64_t whole = 0;
  for (int64_t i = 0; i < GROUP; ++i) {
    const int value = BITS == 8 ? int8_t(from[i]) : (from[i % 32] >> (i < 32 ? 0 : 4) & 15) - 8;
    whole += value * in.x[g * GROUP + i];
  }
  return sum + scale * whole;
}
#endif

// out (tokens, rows) = x W^T + bias, of rows [begin, end)
template <int BITS> static void group_rows(const GroupCoded& m, const std::vector<GroupInput>& in, const float* bias, int64_t begin,
                                           int64_t end, float* out) {
  const int64_t groups = in[0].scale.size(), bytes = m.columns * BITS / 8, full = m.columns / GROUP;
  const float* parts = fractions();
  std::vector<float> scale(groups);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* codes = m.codes + r * bytes;
    for (int64_t g = 0; g < groups; ++g) scale[g] = power(m.scale[r * groups + g], parts);
    uint8_t last[GROUP] = {};  // with columns that there are not
    if (full < groups) std::memcpy(last, codes + full * GROUP * BITS / 8, bytes - full * GROUP * BITS / 8);
    for (size_t t = 0; t < in.size(); ++t) {
      Sum sum = {};
      for (int64_t g = 0; g < full; ++g) sum = add_group<BITS>(sum, codes + g * GROUP * BITS / 8, in[t], g, scale[g] * in[t].scale[g]);
      if (full < groups) sum = add_group<BITS>(sum, last, in[t], full, scale[full] * in[t].scale[full]);
      out[t * m.rows + r] = total(sum) + (bias ? bias[r] : 0);
    }
  }
}

// y (ROWS, PANEL) = rows of W (ROWS, n) times x, a column for each token, of which V vectors are in use. bfloat16 comes in pairs:
// x (n / 2, PANEL, 2)
constexpr int64_t PANEL = 2 * lanes<float>, ROWS = LEVEL >= 2 ? 8 : 4;
template <class T> constexpr int64_t per = sizeof(float) / sizeof(T);  // columns that lie together
template <int V, class T> INLINE void panel_product(const T* W, int64_t stride, const T* x, int64_t n, float (*y)[PANEL]) {
  vf sum[ROWS][V] = {};
  for (int64_t k = 0; k < n; k += per<T>) {
    vf xs[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&xs[v], x + (k * PANEL + v * lanes<float> * per<T>), sizeof(vf));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      float w;
      std::memcpy(&w, W + r * stride + k, sizeof(float));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
#if LEVEL == 3
        if constexpr (per<T> == 2) sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)_mm512_set1_ps(w), (__m512bh)xs[v]);
        else
#endif
          sum[r][v] += w * xs[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(y[r] + v * lanes<float>, &sum[r][v], sizeof(vf));
}

// Where column k of a panel starts
template <class T> INLINE T* panel_column(T* x, int64_t k) { return x + (k - k % per<T>) * PANEL + k % per<T>; }

// put(row, y (tokens,)) of a tile W (rows, pitch) times a panel x of so many tokens; W has a multiple of ROWS of rows
template <class T, class F> INLINE void tile_product(const T* W, int64_t pitch, int64_t rows, const T* x, int64_t n, int64_t tokens, const F& put) {
  for (int64_t r = 0; r < rows; r += ROWS) {
    float found[ROWS][PANEL];
    if (tokens <= lanes<float>) panel_product<1>(W + r * pitch, pitch, x, n, found);
    else panel_product<2>(W + r * pitch, pitch, x, n, found);
    for (int64_t q = 0; q < std::min(ROWS, rows - r); ++q) put(r + q, found[q]);
  }
}

// The same of many tokens: rows are decoded, in tiles that stay in a cache, and meet all tokens
template <class T> static void linear_prompt(const GroupCoded& m, const float* x, const float* bias, float* out, int64_t tokens) {
  constexpr int64_t TILE = 32;  // rows
  const int64_t n = (m.columns + 1) / 2 * 2, panels = (tokens + PANEL - 1) / PANEL, groups = (m.columns + GROUP - 1) / GROUP;
  const int64_t pitch = n + 64 / sizeof(T);  // rows of a power of two would share a cache's few places
  std::vector<T> in(panels * n * PANEL);
  parallel(panels, n * PANEL, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < m.columns; ++k) {
        T* to = panel_column(&in[i * n * PANEL], k);
        for (int64_t t = i * PANEL; t < std::min(tokens, (i + 1) * PANEL); ++t) to[(t - i * PANEL) * per<T>] = x[t * m.columns + k];
      }
  });
  parallel((m.rows + TILE - 1) / TILE, TILE * tokens * n / 32, [&](int64_t begin, int64_t end) {
    std::vector<T> tile(TILE * pitch);
    const float* parts = fractions();
    for (int64_t at = begin * TILE; at < std::min(end * TILE, m.rows); at += TILE) {
      const int64_t rows = std::min(TILE, m.rows - at);
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* codes = m.codes + (at + r) * (m.columns * m.bits / 8);
        for (int64_t g = 0; g < groups; ++g) {
          const float scale = power(m.scale[(at + r) * groups + g], parts);
          for (int64_t k = g * GROUP; k < std::min(m.columns, (g + 1) * GROUP); ++k)
            tile[r * pitch + k] = scale * (m.bits == 8 ? int8_t(codes[k]) : (codes[k / 2] >> 4 * (k % 2) & 15) - 8);
        }
      }
      for (int64_t i = 0; i < panels; ++i)
        tile_product(tile.data(), pitch, rows, &in[i * n * PANEL], n, std::min(PANEL, tokens - i * PANEL), [&](int64_t r, const float* y) {
          for (int64_t t = i * PANEL; t < std::min(tokens, (i + 1) * PANEL); ++t)
            out[t * m.rows + at + r] = y[t - i * PANEL] + (bias ? bias[at + r] : 0);
        });
    }
  });
}

// half: whether many tokens may be multiplied in bfloat16
void coded_linear(const GroupCoded& m, const float* x, const float* bias, float* out, int64_t tokens, bool half) {
  if (tokens > 12) {  // decoding costs as much as so many products with codes
#if LEVEL == 3
    if (half) return linear_prompt<BFloat16>(m, x, bias, out, tokens);
#endif
    return linear_prompt<float>(m, x, bias, out, tokens);
  }
  std::vector<GroupInput> in;
  for (int64_t t = 0; t < tokens; ++t) in.emplace_back(x + t * m.columns, m.columns, m.bits);
  parallel(m.rows, tokens * m.columns / 16, [&](int64_t begin, int64_t end) {
    if (m.bits == 8) group_rows<8>(m, in, bias, begin, end, out);
    else group_rows<4>(m, in, bias, begin, end, out);
  });
}

// ---- a layer's experts -------------------------------------------------------------------------------
// parallel, whose own errors do not tell what is wrong
template <class F> static void parallel_checked(int64_t n, int64_t cost, const F& f) {
  std::vector<std::string> wrong(n);
  parallel(n, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) try {
        f(i);
      } catch (const std::exception& e) {
        wrong[i] = e.what();
      }
  });
  for (const std::string& text : wrong) check(text.empty(), text);
}

struct CodedRouted { int64_t token, expert; float weight; };

// Many tokens: rows of an expert's matrices are decoded, in tiles that stay in a cache, and meet all its tokens, in float or bfloat16.
// inputs: x, or what a basis made of it, of gate and up; group: the first of each expert's run in `routed`, and the end
template <class T> static void coded_prompt(const CodedExperts& a, const std::vector<CodedRouted>& routed, const std::vector<int64_t>& group,
                                            const float* const* inputs, const Nibbles& nibbles, const Levels& levels) {
  constexpr int64_t TILE = OCTETS;  // of a tile
  const CodedFamily* families[3] = {&a.gate, &a.up, &a.down};
  const int64_t P = routed.size(), G = group.size() - 1;
  std::vector<CodedPlaces> places[3];
  for (int f = 0; f < 3; ++f) places[f].resize(G);
  parallel_checked(3 * G, 20000, [&](int64_t j) { places[j / G][j % G].find(families[j / G]->matrix(routed[group[j % G]].expert)); });

  // tokens of an expert in panels, a column each: (first of `routed`, behind the last, expert's number here)
  struct Panel { int64_t begin, end, g; };
  std::vector<Panel> panels;
  std::vector<int64_t> first(1);  // of each expert
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t i = group[g]; i < group[g + 1]; i += PANEL) panels.push_back({i, std::min(i + PANEL, group[g + 1]), g});
    first.push_back(panels.size());
  }

  // y (P, p) = W x of each pair's own expert, x from(pair); a thread has its rows of every expert
  auto products = [&](int f, auto&& from, Grid<float>& y) {
    const CodedFamily& family = *families[f];
    const int64_t octets = (family.p + 7) / 8, stride = 8 * family.blocks;
    const int64_t pitch = stride + 64 / sizeof(T);  // of a tile's rows, which else would share a cache's few places
    std::vector<T> x(panels.size() * stride * PANEL);
    parallel_checked(panels.size(), stride * PANEL, [&](int64_t i) {
      const Panel& panel = panels[i];
      const int16_t* order = family.order ? family.order + routed[panel.begin].expert * family.columns : nullptr;
      if (order) check_order(order, family.columns, family.inputs);
      for (int64_t k = 0; k < family.columns; ++k) {
        const int64_t at = order ? order[k] : k;
        T* to = panel_column(&x[i * stride * PANEL], k);
        for (int64_t j = panel.begin; j < panel.end; ++j) to[(j - panel.begin) * per<T>] = from(j)[at];
      }
    });
    parallel((octets + TILE - 1) / TILE, P * stride, [&](int64_t begin, int64_t end) {
      std::vector<T> tile(8 * TILE * pitch);
      const float* parts = fractions();
      for (int64_t g = 0; g < G; ++g)
        for (int64_t at = begin * TILE; at < std::min(end * TILE, octets); at += TILE) {
          const Coded m = family.matrix(routed[group[g]].expert);
          const int64_t rows = std::min(8 * TILE, m.p - 8 * at);
          coded_values_of(m, places[f][g], nibbles, levels, at, std::min(at + TILE, octets), tile.data(), pitch);
          for (int64_t i = first[g]; i < first[g + 1]; ++i) {
            const int64_t n = panels[i].end - panels[i].begin;
            tile_product(tile.data(), pitch, rows, &x[i * stride * PANEL], stride, n, [&](int64_t r, const float* found) {
              const int64_t row = places[f][g].order[8 * at + r];
              const float scale = power(32 * (m.row[row] - 128), parts);
              for (int64_t j = 0; j < n; ++j) y[panels[i].begin + j][row] = scale * found[j];
            });
          }
        }
    });
  };
  Grid<float> y[2] = {{P, a.gate.p, step<float>}, {P, a.gate.p, step<float>}};
  for (int f = 0; f < 2; ++f) products(f, [&](int64_t i) { return inputs[f] + routed[i].token * families[f]->inputs; }, y[f]);
  parallel(P, 20 * a.gate.p, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < y[0].cols; j += lanes<float>) {
        vf z[2];
        std::memcpy(&z[0], y[0][i] + j, sizeof(vf));
        std::memcpy(&z[1], y[1][i] + j, sizeof(vf));
        z[0] = activate(z[0], a.act) * z[1];
        std::memcpy(y[0][i] + j, &z[0], sizeof(vf));
      }
  });
  Grid<float> out(P, a.d, step<float>);
  products(2, [&](int64_t i) { return y[0][i]; }, out);
  parallel(a.d, P, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < P; ++i)
      for (int64_t j = begin; j < end; ++j) a.out[routed[i].token * a.d + j] += routed[i].weight * out[i][j];
  });
}

void coded_experts(const CodedExperts& a) {
  const char* op = "globe::coded_experts";
  const Nibbles nibbles(a.subsets);
  const Levels levels = rounded_levels(a.levels);
  std::vector<CodedRouted> routed;
  for (int64_t i = 0; i < a.T * a.k; ++i) {
    const int64_t e = a.index[i];
    check(0 <= e && e <= a.E, op, ": expert in [0, ", a.E, "] expected, found ", e);  // E: another rank's, skipped
    if (e == a.E) continue;
    check(0 <= a.row[e] && a.row[e] < a.gate.n, op, ": expert ", e, ": row in [0, ", a.gate.n, ") expected, found ", a.row[e]);
    routed.push_back({i / a.k, a.row[e], a.weights[i]});
  }
  const int64_t P = routed.size(), p = a.gate.p;
  std::fill(a.out, a.out + a.T * a.down.p, 0.0f);
  if (!P) return;
  const CodedFamily* families[3] = {&a.gate, &a.up, &a.down};

  // the bases act on each token once
  std::vector<float> acted[2];
  const float* inputs[2] = {a.x, a.x};
  for (int f = 0; f < 2; ++f) {
    const CodedFamily& family = *families[f];
    if (!family.basis.codes) continue;
    if (f && family.basis.codes == a.gate.basis.codes) {
      inputs[f] = inputs[0];
      continue;
    }
    acted[f].resize(a.T * family.columns);
    coded_linear(family.basis, a.x, nullptr, acted[f].data(), a.T, a.half);
    inputs[f] = acted[f].data();
  }

  // decoding a matrix costs about as much as three products with its codes
  std::vector<CodedRouted> sorted = routed;
  std::stable_sort(sorted.begin(), sorted.end(), [](const CodedRouted& l, const CodedRouted& r) { return l.expert < r.expert; });
  std::vector<int64_t> group;
  for (int64_t i = 0; i < P; ++i)
    if (!i || sorted[i].expert != sorted[i - 1].expert) group.push_back(i);
  if (P > 3 * int64_t(group.size())) {
    group.push_back(P);
#if LEVEL == 3
    if (a.half) return coded_prompt<BFloat16>(a, sorted, group, inputs, nibbles, levels);
#endif
    return coded_prompt<float>(a, sorted, group, inputs, nibbles, levels);
  }

  // activations rounded: for each token, or each expert where its columns have an order of its own
  struct Kept {
    std::vector<CodedInput> in[3];
    std::vector<CodedPlaces> places[3];
    std::vector<float> y[3], scales[3];
  };
  static thread_local Kept kept;
  auto& in = kept.in;
  auto& places = kept.places;
  auto& y = kept.y;
  auto& scales = kept.scales;
  for (int f = 0; f < 3; ++f) {
    if (int64_t(in[f].size()) < P) in[f].resize(P), places[f].resize(P);
    y[f].resize(P * families[f]->p);
    column_scales(*families[f], kept.scales[f]);
  }
  auto first_of_token = [&](int64_t i) { return !i || routed[i].token != routed[i - 1].token; };
  std::vector<int64_t> told(P);
  for (int64_t i = 0; i < P; ++i) told[i] = first_of_token(i) ? i : told[i - 1];
  parallel_checked(3 * P, 20000, [&](int64_t j) {
    const int64_t f = j / P, i = j % P;
    const Coded m = families[f]->matrix(routed[i].expert);
    places[f][i].find(m);
    if (f < 2 && (m.order || told[i] == i)) coded_input(m, scales[f].data(), inputs[f] + routed[i].token * m.inputs, levels, m.order ? &places[f][i].first : nullptr, in[f][i]);
  });

  // rows of some matrices, in slices
  auto products = [&](int f0, int f1, std::vector<float>* out) {
    // whole matrices, or, of few, slices of them
    const int64_t octets = (families[f0]->p + 7) / 8;
    const int64_t slices = std::min(octets, (2 * threads() - 1) / ((f1 - f0) * P) + 1), size = (octets + slices - 1) / slices;
    parallel((f1 - f0) * P * slices, 50000, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t f = f0 + j / (P * slices), i = j / slices % P, slice = j % slices;
        const Coded m = families[f]->matrix(routed[i].expert);
        const CodedInput& x = in[f][f < 2 && !m.order ? told[i] : i];
        const uint8_t* next = j + 1 < end ? families[f0 + (j + 1) / (P * slices)]->matrix(routed[(j + 1) / slices % P].expert).codes : nullptr;
        coded_rows(m, places[f][i], x, nibbles, levels, slice * size, std::min(octets, (slice + 1) * size), out[f].data() + i * m.p, next);
      }
    });
  };
  products(0, 2, y);
  parallel_checked(P, 20000, [&](int64_t i) {
    float* h = y[0].data() + i * p;
    for (int64_t j = 0; j < p; j += lanes<float>) {
      const int64_t n = std::min(lanes<float>, p - j);
      vf z[2] = {};
      std::memcpy(&z[0], h + j, n * sizeof(float));
      std::memcpy(&z[1], &y[1][i * p + j], n * sizeof(float));
      z[0] = activate(z[0], a.act) * z[1];
      std::memcpy(h + j, &z[0], n * sizeof(float));
    }
    coded_input(a.down.matrix(routed[i].expert), scales[2].data(), h, levels, &places[2][i].first, in[2][i]);
  });
  products(2, 3, y);
  for (int64_t i = 0; i < P; ++i)
    for (int64_t j = 0; j < a.down.p; ++j) a.out[routed[i].token * a.down.p + j] += routed[i].weight * y[2][i * a.down.p + j];
}

// ---- decoded -----------------------------------------------------------------------------------------
// Values (rows, 8 blocks) of a matrix whose rows come in order: what unpack says
void coded_values(const uint8_t* codes, int64_t bytes, const uint8_t* width, int64_t rows, int64_t blocks, const float* levels,
                  const int64_t* subsets, float* out) {
  // planes' places: a later row has no more bits
  std::vector<const uint8_t*> planes(blocks * MOST_BITS);
  const uint8_t* at = codes;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0, n = rows; i < MOST_BITS; ++i) {
      planes[b * MOST_BITS + i] = at;
      while (n && width[(n - 1) * blocks + b] <= i) --n;
      at += (n + 7) / 8 * 8;
    }
  check(at - codes == bytes, "globe::unpack: expected ", at - codes, " bytes, found ", bytes);
  parallel(blocks, rows * 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* const* plane = &planes[b * MOST_BITS];
      int64_t window[8] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t k = width[r * blocks + b], at = r / 8 * 8, bit = r % 8;
        for (int64_t c = 0; c < 8; ++c) {
          float& value = out[(r * blocks + b) * 8 + c];
          value = 0;
          if (!k) continue;
          window[c] = (window[c] << 1 | (plane[0][at + c] >> bit & 1)) & 511;
          int64_t number = subsets[window[c]];
          for (int64_t i = 1; i < k; ++i) number |= int64_t(plane[i][at + c] >> bit & 1) << (i + 1);
          value = levels[128 * k + number];
        }
      }
    }
  });
}
