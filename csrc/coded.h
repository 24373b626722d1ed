// Products with weights in packed codes, as globe.py's `unpack` and `decode_groups` define them: part of cpu_kernels.h.
//
// A vector is a block's eight columns in four times eight rows: the trellis' parities come by tables of nibbles, of the bytes in it
// and of those in front, a number's bits as nibbles, and its level by one more table. Activations are rounded to 14 bits, by group
// of blocks of one width, with the columns' scales in them; levels are whole numbers of 8 bits, so that sums are exact.

constexpr int64_t OCTETS = 4;      // of rows in a vector
constexpr int64_t MOST_BITS = 6;

// 2^(i / 256), i in [-2^15, 2^15)
INLINE float power(int64_t i) {
  static const std::vector<float> parts = [] {
    std::vector<float> all(256);
    for (int64_t j = 0; j < 256; ++j) all[j] = std::exp2(j / 256.0f);
    return all;
  }();
  const uint32_t bits = uint32_t(std::max<int64_t>(0, (i >> 8) + 127)) << 23;
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
constexpr float LARGEST = 8191;  // of activations: four products of 2^8 levels with these, in pairs, stay below 2^31

// Levels in 8 bits: (width, number), and the largest
struct Levels { int8_t level[MOST_BITS + 1][128]; float unit[MOST_BITS + 1]; };
static Levels rounded_levels(const float* levels) {
  Levels out;
  for (int64_t k = 1; k <= MOST_BITS; ++k) {
    const int64_t n = int64_t(2) << k;
    out.unit[k] = levels[128 * k + n - 1] / 127;
    for (int64_t i = 0; i < n; ++i) out.level[k][i] = int8_t(std::lrint(levels[128 * k + i] / out.unit[k]));
  }
  return out;
}

// x of eight columns times `scale`, rounded
INLINE void rounded(const float* x, float scale, int16_t* out) {
  for (int i = 0; i < 8; ++i) {
    const float shifted = x[i] * scale + 12582912.0f;  // whole numbers are its lowest bits
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    out[i] = int16_t(bits);
  }
}

static void coded_input(const Coded& m, const float* x, const Levels& levels, CodedInput& out) {
  out.groups.assign(m.classes, {});
  out.x.assign(m.classes * m.blocks * 8, 0);
  // columns in order, and the largest of each block
  std::vector<float> ordered(m.blocks * 8), most(m.blocks);
  for (int64_t i = 0; i < m.columns; ++i) {
    const int64_t from = m.order ? m.order[i] : i;
    check(0 <= from && from < m.inputs, "globe: codes: order in [0, ", m.inputs, ") expected, found ", from);
    ordered[i] = x[from];
  }
  for (int64_t b = 0; b < m.blocks; ++b)
    for (int i = 0; i < 8; ++i) most[b] = std::max(most[b], std::abs(ordered[8 * b + i]));
  for (int64_t c = 0; c < m.classes; ++c) {
    const uint8_t* width = m.width + c * m.blocks;
    const int16_t* column = m.column + c * m.blocks;
    for (int64_t b = 0, n; b < m.blocks; b += n) {
      n = 1;
      while ((b + n) % 4 && b + n < m.blocks && width[b + n] == width[b]) ++n;  // of the same four
      if (!width[b]) continue;
      float scale[4], largest = 1e-30f;
      for (int64_t i = 0; i < n; ++i) {
        scale[i] = power(column[b + i]);
        largest = std::max(largest, scale[i] * most[b + i]);
      }
      for (int64_t i = 0; i < n; ++i)
        rounded(&ordered[8 * (b + i)], scale[i] * (LARGEST / largest), &out.x[(c * m.blocks + b + i) * 8]);
      out.groups[c].push_back({b, n, width[b], largest / LARGEST * levels.unit[width[b]]});
    }
  }
}

#if LEVEL >= 1
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

// y (8, stride) += the product of a group's columns and rows [first, last), in octets; two sums of four columns for each row
template <int K> void group_product(const uint8_t* const (*planes)[MOST_BITS], const Group& g, const int16_t* x, int64_t first, int64_t last,
                                    const Nibbles& t, const Levels& levels, float* y, int64_t stride) {
  constexpr int TABLES = K > 3 ? 1 << (K - 3) : 1;  // of 16 levels
  const v32 low = _mm256_set1_epi8(15);
  auto lower = [&](v32 v) { return _mm256_and_si256(v, low); };
  auto upper = [&](v32 v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), low); };
  v32 level[TABLES], xs[4];
  for (int i = 0; i < TABLES; ++i) level[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(levels.level[K] + 16 * i)));
  for (int64_t i = 0; i < g.blocks; ++i) xs[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 8 * (g.block + i))));
  for (int64_t at = first; at < last; at += OCTETS) {
    const int64_t n = std::min(OCTETS, last - at);
    // nibbles of the trellis bits, now and before, and the other bits
    v32 bits[4][4], own[4][MOST_BITS];
    for (int64_t i = 0; i < g.blocks; ++i) {
      const uint8_t* const* plane = planes[g.block + i];
      const v32 now = octets(plane[0] + 8 * at, n);
      v32 before;
      if (at) before = octets(plane[0] + 8 * at - 8, n);
      else before = _mm256_blend_epi32(_mm256_permute4x64_epi64(now, 0x90), _mm256_setzero_si256(), 3);
      bits[i][0] = lower(now), bits[i][1] = upper(now), bits[i][2] = lower(before), bits[i][3] = upper(before);
      for (int k = 1; k < K; ++k) own[i][k] = octets(plane[k] + 8 * at, n);
    }
    // what stands behind the last octet is another class'
    alignas(32) float scale[8];
    for (int64_t i = 0; i < 8; ++i) scale[i] = i < 2 * n ? g.scale / 128 : 0;
    const __m256 s = _mm256_load_ps(scale);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      v32 sum[2][2] = {};
      for (int64_t i = 0; i < g.blocks; ++i) {
        v32 pair = _mm256_xor_si256(_mm256_xor_si256(looked_up(t.parity[q][0], bits[i][0]), looked_up(t.parity[q][3], bits[i][3])),
                                    looked_up(t.parity[q][q < 2 ? 2 : 1], bits[i][q < 2 ? 2 : 1]));
        for (int k = 1; k < K && k < 3; ++k)
          pair = _mm256_or_si256(pair, looked_up(t.more[k - 1][q % 2], q < 2 ? lower(own[i][k]) : upper(own[i][k])));
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const v32 number = odd ? upper(pair) : lower(pair);
          // of more than 16 levels the tables are chosen by the bits beyond four, which go to the top of their bytes
          v32 found[TABLES];
          for (int j = 0; j < TABLES; ++j) found[j] = _mm256_shuffle_epi8(level[j], number);
          for (int k = K - 1; k >= 3; --k) {
            const v32 chosen = _mm256_slli_epi16(own[i][k], 7 - (2 * q + odd));
            for (int j = 0; j < 1 << (k - 3); ++j) found[j] = _mm256_blendv_epi8(found[j], found[j + (1 << (k - 3))], chosen);
          }
          // 256 times the levels, in 16 bits: of the first and third octet, of the second and fourth
          const v32 even = _mm256_unpacklo_epi8(_mm256_setzero_si256(), found[0]);
          const v32 other = _mm256_unpackhi_epi8(_mm256_setzero_si256(), found[0]);
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

template <int K> void group_product(const uint8_t* const (*planes)[MOST_BITS], const Group& g, const int16_t* x, int64_t first, int64_t last,
                                    const Nibbles& t, const Levels& levels, float* y, int64_t stride) {
  for (int64_t b = g.block; b < g.block + g.blocks; ++b)
    for (int64_t column = 0; column < 8; ++column) {
      int64_t window = 0;  // the trellis bits so far, the newest lowest
      if (first)
        for (int64_t r = 0; r < 8; ++r) window = window << 1 | (planes[b][0][8 * (first - 1) + column] >> r & 1);
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

// Where a matrix' rows and planes lie
struct CodedPlaces {
  std::vector<int64_t> order, first;   // rows by class; the first octet of each class, and the end
  std::vector<const uint8_t*> planes;  // (blocks, MOST_BITS)
  CodedPlaces() = default;
  explicit CodedPlaces(const Coded& m) : order(m.p), first(m.classes + 1), planes(m.blocks * MOST_BITS) {
    std::vector<int64_t> count(m.classes + 1);
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

// out (p,) = W x of a matrix' rows in octets [begin, end)
static void coded_rows(const Coded& m, const CodedPlaces& places, const CodedInput& in, const Nibbles& t, const Levels& levels,
                       int64_t begin, int64_t end, float* out) {
  const int64_t stride = 2 * (end - begin) + 8;
  std::vector<float> y(8 * stride);
  float* from = y.data() - 2 * begin;
  const auto planes = (const uint8_t* const(*)[MOST_BITS])places.planes.data();
  // four blocks after the other, as they lie in memory, for all classes
  std::vector<size_t> next(m.classes);
  for (int64_t b = 0; b < m.blocks; b += 4) {
#if LEVEL >= 1
    const int64_t ahead = std::min(b + 4, m.blocks - 1) * MOST_BITS, behind = std::min(b + 8, m.blocks - 1) * MOST_BITS;
    if (begin == 0)
      for (const uint8_t* at = places.planes[ahead]; at < places.planes[behind]; at += 64) _mm_prefetch((const char*)at, _MM_HINT_T0);
#endif
    for (int64_t c = 0; c < m.classes; ++c) {
      const int64_t first = std::max(begin, places.first[c]), last = std::min(end, places.first[c + 1]);
      const int16_t* x = in.x.data() + c * m.blocks * 8;
      const std::vector<Group>& groups = in.groups[c];
      for (; next[c] < groups.size() && groups[next[c]].block < b + 4; ++next[c]) {
        const Group& g = groups[next[c]];
        switch (first < last ? g.width : 0) {
          case 0: break;
          case 1: group_product<1>(planes, g, x, first, last, t, levels, from, stride); break;
          case 2: group_product<2>(planes, g, x, first, last, t, levels, from, stride); break;
          case 3: group_product<3>(planes, g, x, first, last, t, levels, from, stride); break;
          case 4: group_product<4>(planes, g, x, first, last, t, levels, from, stride); break;
          case 5: group_product<5>(planes, g, x, first, last, t, levels, from, stride); break;
          default: group_product<6>(planes, g, x, first, last, t, levels, from, stride);
        }
      }
    }
  }
  for (int64_t o = begin; o < end; ++o)
    for (int64_t r = 0; r < 8 && 8 * o + r < m.p; ++r) {
      const int64_t row = places.order[8 * o + r];
      out[row] = (from[r * stride + 2 * o] + from[r * stride + 2 * o + 1]) * power(32 * (m.row[row] - 128));
    }
}

// ---- groups of 64 columns in 8 or 4 bits ---------------------------------------------------------------
constexpr int64_t GROUP = 64;

// x (columns,) in 16 bits by groups; beside codes of 4 bits a group's even columns come first
struct GroupInput {
  std::vector<int16_t> x;
  std::vector<float> scale;
  GroupInput(const float* from, int64_t columns, int64_t bits) : x((columns + GROUP - 1) / GROUP * GROUP), scale(x.size() / GROUP) {
    for (size_t g = 0; g < scale.size(); ++g) {
      float some[GROUP] = {}, most = 1e-30f;
      const int64_t n = std::min(GROUP, columns - int64_t(g) * GROUP);
      for (int64_t i = 0; i < n; ++i) {
        const float value = from[g * GROUP + i];
        some[bits == 4 ? i / 2 + i % 2 * 32 : i] = value;
        most = std::max(most, std::abs(value));
      }
      for (int64_t i = 0; i < GROUP; i += 8) rounded(some + i, 32767 / most, &x[g * GROUP + i]);
      scale[g] = most / 32767;
    }
  }
};

// One row's product; codes of 8 bits, or two of 4 in a byte, the even column's in the lower half
static float group_row(const GroupCoded& m, int64_t row, const GroupInput& in) {
  const uint8_t* codes = m.codes + row * m.columns * m.bits / 8;
  const int64_t groups = in.scale.size(), bytes = GROUP * m.bits / 8;
#if LEVEL >= 1
  __m256 sum = _mm256_setzero_ps();
#else
  float sum = 0;
#endif
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = power(m.scale[row * groups + g]) * in.scale[g];
    const int16_t* x = &in.x[g * GROUP];
    alignas(32) uint8_t some[GROUP] = {};
    const uint8_t* from = codes + g * bytes;
    if (g == groups - 1) {  // columns that there are
      std::memcpy(some, from, m.columns * m.bits / 8 - g * bytes);
      from = some;
    }
#if LEVEL >= 1
    v32 a, b;
    if (m.bits == 8) {
      a = _mm256_loadu_si256((const v32*)from), b = _mm256_loadu_si256((const v32*)(from + 32));
    } else {
      const v32 both = _mm256_loadu_si256((const v32*)from), low = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(8);
      a = _mm256_sub_epi8(_mm256_and_si256(both, low), middle);
      b = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), middle);
    }
    auto product = [](__m128i v, const int16_t* x) {
      return _mm256_madd_epi16(_mm256_cvtepi8_epi16(v), _mm256_loadu_si256((const v32*)x));
    };
    const v32 first = _mm256_add_epi32(product(_mm256_castsi256_si128(a), x), product(_mm256_extracti128_si256(a, 1), x + 16));
    const v32 second = _mm256_add_epi32(product(_mm256_castsi256_si128(b), x + 32), product(_mm256_extracti128_si256(b, 1), x + 48));
    const v32 whole = _mm256_add_epi32(first, second);
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(scale), sum);
#else
    int64_t whole = 0;
    for (int64_t i = 0; i < GROUP; ++i) {
      const int value = m.bits == 8 ? int8_t(from[i]) : (from[i % 32] >> (i < 32 ? 0 : 4) & 15) - 8;
      whole += value * x[i];
    }
    sum += scale * whole;
#endif
  }
#if LEVEL >= 1
  alignas(32) float parts[8];
  _mm256_store_ps(parts, sum);
  return parts[0] + parts[1] + parts[2] + parts[3] + parts[4] + parts[5] + parts[6] + parts[7];
#else
  return sum;
#endif
}

// out (tokens, rows) = x W^T + bias
void coded_linear(const GroupCoded& m, const float* x, const float* bias, float* out, int64_t tokens) {
  std::vector<GroupInput> in;
  for (int64_t t = 0; t < tokens; ++t) in.emplace_back(x + t * m.columns, m.columns, m.bits);
  parallel(m.rows, tokens * m.columns / 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t < tokens; ++t) out[t * m.rows + r] = group_row(m, r, in[t]) + (bias ? bias[r] : 0);
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

void coded_experts(const CodedExperts& a) {
  const char* op = "globe::coded_experts";
  const Nibbles nibbles(a.subsets);
  const Levels levels = rounded_levels(a.levels);
  struct Routed { int64_t token, expert; float weight; };
  std::vector<Routed> routed;
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
    coded_linear(family.basis, a.x, nullptr, acted[f].data(), a.T);
    inputs[f] = acted[f].data();
  }

  // activations rounded: for each token, or each expert where its columns have an order of its own
  std::vector<CodedInput> in[3];
  std::vector<CodedPlaces> places[3];
  for (int f = 0; f < 3; ++f) in[f].resize(P), places[f].resize(P);
  auto first_of_token = [&](int64_t i) { return !i || routed[i].token != routed[i - 1].token; };
  std::vector<int64_t> told(P);
  for (int64_t i = 0; i < P; ++i) told[i] = first_of_token(i) ? i : told[i - 1];
  parallel_checked(3 * P, 20000, [&](int64_t j) {
    const int64_t f = j / P, i = j % P;
    const Coded m = families[f]->matrix(routed[i].expert);
    places[f][i] = CodedPlaces(m);
    if (f < 2 && (m.order || told[i] == i)) coded_input(m, inputs[f] + routed[i].token * m.inputs, levels, in[f][i]);
  });

  // rows of some matrices, in slices
  auto products = [&](int f0, int f1, std::vector<float>* out) {
    // whole matrices, or, of few, slices of them
    const int64_t octets = (families[f0]->p + 7) / 8;
    const int64_t slices = std::min(octets, 1 + 2 * threads() / ((f1 - f0) * P)), size = (octets + slices - 1) / slices;
    parallel((f1 - f0) * P * slices, 50000, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t f = f0 + j / (P * slices), i = j / slices % P, slice = j % slices;
        const Coded m = families[f]->matrix(routed[i].expert);
        const CodedInput& x = in[f][f < 2 && !m.order ? told[i] : i];
        coded_rows(m, places[f][i], x, nibbles, levels, slice * size, std::min(octets, (slice + 1) * size), out[f].data() + i * m.p);
      }
    });
  };
  std::vector<float> y[3];
  for (int f = 0; f < 3; ++f) y[f].resize(P * families[f]->p);
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
    coded_input(a.down.matrix(routed[i].expert), h, levels, in[2][i]);
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
