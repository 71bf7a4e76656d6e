// Products with packed weights: INT8 and INT4 groups against activations in 8 bits, FP8 blocks against FP32.
//
// Layout. A matrix is cut into tiles of 32 outputs. A tile is one stream, read from front to end: per group of input
// channels the scales of its 32 outputs, then its codes in steps of 128 bytes, two vectors of 16 outputs:
//     int8   group 128: 32 BF16 scales; a step is 4 channels, an output's four codes (q + 128) beside each other
//     int4   group  32: 32 BF16 scales; a step is 8 channels, the first four in the low nibbles (q + 8), then the high
//     fp8    group 128: 32 FP32 scales; a step is 4 channels; of a vector's 32 words the low bytes are channels 0
//            (16 outputs) and 1, the high bytes channels 2 and 3: a byte becomes FP16 by shift and mask alone
// So a dot-product instruction advances 16 outputs by 4 channels, with the activations broadcast. The last group may be
// short. Outputs beyond the last are zeros.
//
// Activations of integer weights are quantised per row and 128 channels: s = max|x| / 127, q = round(x / s). A group
// with NaN or infinity gets the scale NaN. Sums are exact in INT32 within a group and in FP32 across groups.
// Rows meet a tile in blocks of up to ROWS, interleaved so that a block's values of one step lie together.
// Legend: T tokens, K experts per token, D hidden, I width, R rows of a block, G groups.
#include "packed.h"

#include <vector>

#include "pool.h"

namespace hadal {
namespace {

constexpr int TILE = 32;
constexpr int64_t GROUP = 128, GROUP4 = 32;  // channels that share a scale: int8, fp8 and activations; int4

// --- the instruction sets: 16 outputs · 4 channels at once ---------------------------------------------------------
// Codes: 64 bytes of a step. Sums: 16 INT32. dot8 takes codes q + 128 and adds q·x, or (q + 128)·x where OFFSET8.
inline int32_t four(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return v; }
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
constexpr int ROWS = 12;
constexpr bool OFFSET8 = true;
const char* const ISA = "avx512-vnni";
typedef __m512i Codes;
typedef __m512i Sums;
inline Codes codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
inline Codes high(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15)); }
inline Sums sums(int32_t v) { return _mm512_set1_epi32(v); }
// Written out: the intrinsic makes GCC 12 copy every sum at every step, which halves the rate.
inline void dot4(Sums& s, Codes c, const int8_t* x) {
  Sums sum = s;  // a copy, for an operand of `asm` is kept in memory if it is part of an array
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(c), "m"(*reinterpret_cast<const int32_t*>(x)));
  s = sum;
}
inline void dot8(Sums& s, Codes c, const int8_t* x) { dot4(s, c, x); }
inline vf to_float(Sums s) { return (vf)_mm512_cvtepi32_ps(s); }
inline vf from_half(__m256i h) { return (vf)_mm512_cvtph_ps(h); }
inline void decode_fp8(const uint8_t* p, vf* out) {
  const __m512i keep = _mm512_set1_epi16(short(0xbf80));
  __m512i words = codes(p);
  __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 1), keep);
  __m512i odd = _mm512_and_si512(_mm512_srai_epi16(words, 1), keep);
  out[0] = from_half(_mm512_castsi512_si256(even)), out[1] = from_half(_mm512_extracti64x4_epi64(even, 1));
  out[2] = from_half(_mm512_castsi512_si256(odd)), out[3] = from_half(_mm512_extracti64x4_epi64(odd, 1));
}
#elif defined(__AVX2__) && defined(__F16C__)
constexpr int ROWS = 2;
constexpr bool OFFSET8 = false;
const char* const ISA = "avx2";
struct Codes { __m256i a, b; };
typedef Codes Sums;
inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Codes codes(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
inline __m256i nibble(__m256i c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
inline Codes low(Codes c) { return {nibble(c.a), nibble(c.b)}; }
inline Codes high(Codes c) { return {nibble(_mm256_srli_epi16(c.a, 4)), nibble(_mm256_srli_epi16(c.b, 4))}; }
inline Sums sums(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
// unsigned · signed bytes whose pairs of products fit 16 bits
inline __m256i dot_small(__m256i s, __m256i c, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(s, c, x);
#else
  return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), _mm256_set1_epi16(1)));
#endif
}
inline __m256i dot_signed(__m256i s, __m256i c, __m256i x) {  // |q| · (sign(q)·x), at most 2·127·127
  __m256i q = _mm256_xor_si256(c, _mm256_set1_epi8(char(0x80)));
  return dot_small(s, _mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
}
inline void dot4(Sums& s, Codes c, const int8_t* x) {
  __m256i v = _mm256_set1_epi32(four(x));
  s = {dot_small(s.a, c.a, v), dot_small(s.b, c.b, v)};
}
inline void dot8(Sums& s, Codes c, const int8_t* x) {
  __m256i v = _mm256_set1_epi32(four(x));
  s = {dot_signed(s.a, c.a, v), dot_signed(s.b, c.b, v)};
}
inline vf join(__m256 a, __m256 b) {
  vf v;
  std::memcpy(&v, &a, 32), std::memcpy(reinterpret_cast<char*>(&v) + 32, &b, 32);
  return v;
}
inline vf to_float(Sums s) { return join(_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)); }
inline void decode_fp8(const uint8_t* p, vf* out) {
  const __m256i keep = _mm256_set1_epi16(short(0xbf80));
  for (int i = 0; i < 2; ++i) {  // 32 bytes: channel i in the low bytes, 2 + i in the high ones
    __m256i words = load32(p + 32 * i);
    __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1), keep);
    __m256i odd = _mm256_and_si256(_mm256_srai_epi16(words, 1), keep);
    out[i] = join(_mm256_cvtph_ps(_mm256_castsi256_si128(even)), _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)));
    out[2 + i] = join(_mm256_cvtph_ps(_mm256_castsi256_si128(odd)), _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1)));
  }
}
#else
constexpr int ROWS = 2;
constexpr bool OFFSET8 = true;
const char* const ISA = "portable";
typedef vu Codes;
typedef vi Sums;
inline Codes codes(const uint8_t* p) { vu v; std::memcpy(&v, p, 64); return v; }
inline Codes low(Codes c) { return c & 0x0f0f0f0fu; }
inline Codes high(Codes c) { return (c >> 4) & 0x0f0f0f0fu; }
inline Sums sums(int32_t v) { return vi{} + v; }
inline void dot4(Sums& s, Codes c, const int8_t* x) {
  for (int i = 0; i < 4; ++i) s += (vi)((c >> (8 * i)) & 255u) * int32_t(x[i]);
}
inline void dot8(Sums& s, Codes c, const int8_t* x) { dot4(s, c, x); }
inline vf to_float(Sums s) { return __builtin_convertvector(s, vf); }
inline void decode_fp8(const uint8_t* p, vf* out) {  // a code's seven low bits as those of an FP32 number, times 2^-120
  for (int j = 0; j < 4; ++j)
    for (int o = 0; o < 16; ++o) {
      uint32_t code = p[2 * (16 * (j & 1) + o) + (j >> 1)], bits = (code & 0x78) ? ((code & 0x7f) << 20) + (112u << 23) : 0;
      float v;
      std::memcpy(&v, &bits, 4);
      if (!(code & 0x78)) v = float(code & 7) * 0x1p-17f;  // subnormal: m/8 · 2^-6, like the others times 2^-8
      out[j][o] = code & 0x80 ? -v : v;
    }
}
#endif

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// --- the layout ----------------------------------------------------------------------------------------------------
struct Layout { int64_t group, scale, channels; };  // channels of a group, bytes of its scales, channels of a step
inline Layout layout_of(Kind kind) {
  if (kind == INT4) return {GROUP4, TILE * 2, 8};
  return {GROUP, kind == FP8 ? TILE * 4 : TILE * 2, 4};
}
inline int64_t steps_of(int64_t channels, int64_t per) { return (channels + per - 1) / per; }

// Where the code of output o (of a tile), channel i (of a step) lies in the step; INT4: its low or high nibble by i / 4.
inline int64_t place(Kind kind, int64_t o, int64_t i) {
  if (kind == FP8) return o / 16 * 64 + 2 * (16 * (i & 1) + o % 16) + (i >> 1);
  return o / 16 * 64 + o % 16 * 4 + i % 4;
}

// --- activations ---------------------------------------------------------------------------------------------------
// Rows as the kernels read them. INT8: q padded with zeros to whole groups, a scale a group of 128, and what the codes'
// offsets add up to: −128·Σq over 128 channels, −8·Σq over 32. FP8: FP32 values, padded with zeros.
struct Input {
  int64_t rows = 0, width = 0, padded = 0;
  std::vector<int8_t> q;
  std::vector<float> scale, wide;
  std::vector<int32_t> offset8, offset4;

  void resize(int64_t rows_, int64_t width_, bool ints, bool floats) {
    rows = rows_, width = width_, padded = (width + GROUP - 1) / GROUP * GROUP;
    if (ints) {
      q.resize(rows * padded), scale.resize(rows * (padded / GROUP));
      offset8.resize(rows * (padded / GROUP)), offset4.resize(rows * (padded / GROUP4));
    }
    if (floats) wide.resize(rows * padded);
  }
};

inline void load_natural(const float* p, float* out) { std::memcpy(out, p, 64); }
inline void load_natural(const bf16* p, float* out) {
  for (int i = 0; i < LANES; ++i) out[i] = widen(p[i]);
}

// One group of 128 channels (fewer at the end, then zeros) of a row.
template <class T>
inline void quantise_group(const T* x, int64_t n, int8_t* q, float* scale, int32_t* offset8, int32_t* offset4) {
  float values[GROUP];
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) load_natural(x + i, values + i);
  for (; i < n; ++i) values[i] = widen(x[i]);
  for (; i < GROUP; ++i) values[i] = 0;
  vu most = {};
  for (i = 0; i < GROUP; i += LANES) {  // as integers, magnitudes keep their order, infinity and NaN above all
    vu bits;
    std::memcpy(&bits, values + i, 64);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t peak = 0;
  for (int l = 0; l < LANES; ++l) peak = std::max<uint32_t>(peak, most[l]);
  float amax;
  std::memcpy(&amax, &peak, 4);
  bool finite = peak < 0x7f800000u;
  float inverse = finite && amax > 1e-35f ? 127.0f / amax : 0.0f;
  uint32_t nan = 0x7fc00000u;
  if (finite) *scale = amax / 127.0f;
  else std::memcpy(scale, &nan, 4);
  int32_t all = 0;
  for (int64_t part = 0; part < GROUP; part += GROUP4) {
    vi total = {};
    for (i = part; i < part + GROUP4; i += LANES) {
      vf scaled = load(values + i) * inverse;
      asm("" : "+m"(scaled));  // rounded here: a fused multiply-add would decide ties otherwise than the reference does
      vf magic = scaled + 12582912.0f;  // 1.5 · 2^23: the low bits hold the integer
      vi integer;
      std::memcpy(&integer, &magic, 64);
      integer -= 0x4b400000;
      if (!finite) integer = vi{};
      total += integer;
      typedef int8_t small __attribute__((vector_size(16)));
      small bytes = __builtin_convertvector(integer, small);
      std::memcpy(q + i, &bytes, 16);
    }
    int32_t s = 0;
    for (int l = 0; l < LANES; ++l) s += total[l];
    offset4[part / GROUP4] = -8 * s;
    all += s;
  }
  *offset8 = OFFSET8 ? -128 * all : 0;
}

template <class T>
void fill_row(Input& in, int64_t row, const T* x, bool ints, bool floats) {
  if (ints)
    for (int64_t g = 0; g * GROUP < in.padded; ++g) {
      int64_t at = row * (in.padded / GROUP) + g;
      quantise_group(x + g * GROUP, std::min(GROUP, in.width - g * GROUP), &in.q[row * in.padded + g * GROUP], &in.scale[at],
                     &in.offset8[at], &in.offset4[at * (GROUP / GROUP4)]);
    }
  if (floats) {
    float* to = &in.wide[row * in.padded];
    for (int64_t i = 0; i < in.width; ++i) to[i] = widen(x[i]);
    std::fill(to + in.width, to + in.padded, 0.0f);
  }
}

// Up to ROWS rows that meet a tile together. `q` and `wide`: step by step, the rows' values of it beside each other.
struct Block {
  int rows;
  const int8_t* q;
  const float* wide;
  const float* scale[ROWS];
  const int32_t *offset8[ROWS], *offset4[ROWS];
  int64_t row[ROWS];  // where the result goes
};

// Blocks of equal height (±1) of a list of rows, and room for the interleaved values of those with several rows.
struct Blocks {
  std::vector<Block> block;
  std::vector<int8_t> q;
  std::vector<float> wide;
  std::vector<int64_t> source;  // input rows, in the order of the blocks
  void clear() { block.clear(), source.clear(); }

  // Rows source[i] of the input → rows first + i of the result.
  void add(const int64_t* from, int64_t count, int64_t first) {
    int64_t n = (count + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < n; ++b) {
      int64_t begin = b * count / n, end = (b + 1) * count / n;
      Block one;
      one.rows = int(end - begin);
      for (int64_t i = begin; i < end; ++i) one.row[i - begin] = first + i, source.push_back(from ? from[i] : i);
      block.push_back(one);
    }
  }

  void fill(const Input& in, bool ints, bool floats) {
    if (ints) q.resize(source.size() * in.padded);
    if (floats) wide.resize(source.size() * in.padded);
    std::vector<int64_t> start(block.size() + 1, 0);
    for (size_t b = 0; b < block.size(); ++b) start[b + 1] = start[b] + block[b].rows;
    parallel(int64_t(block.size()), 1, int64_t(source.size()) * in.padded > 65536, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) interleave(in, block[b], start[b], ints, floats);
    });
  }

 private:
  void interleave(const Input& in, Block& b, int64_t start, bool ints, bool floats) {
    const int64_t* from = &source[start];
    int64_t groups = in.padded / GROUP;
    for (int r = 0; r < b.rows && ints; ++r) {
      b.scale[r] = &in.scale[from[r] * groups];
      b.offset8[r] = &in.offset8[from[r] * groups];
      b.offset4[r] = &in.offset4[from[r] * groups * (GROUP / GROUP4)];
    }
    if (ints) {
      b.q = b.rows == 1 ? &in.q[from[0] * in.padded] : &q[start * in.padded];
      for (int r = 0; r < b.rows && b.rows > 1; ++r) {
        const int8_t* row = &in.q[from[r] * in.padded];
        int8_t* to = &q[start * in.padded] + 4 * r;
        for (int64_t i = 0; i < in.padded; i += 4) std::memcpy(to + i * b.rows, row + i, 4);
      }
    }
    if (floats) {
      b.wide = b.rows == 1 ? &in.wide[from[0] * in.padded] : &wide[start * in.padded];
      for (int r = 0; r < b.rows && b.rows > 1; ++r) {
        const float* row = &in.wide[from[r] * in.padded];
        float* to = &wide[start * in.padded] + r;
        for (int64_t i = 0; i < in.padded; ++i) to[i * b.rows] = row[i];
      }
    }
  }
};

// --- a tile against a block ----------------------------------------------------------------------------------------
typedef float Out[ROWS][TILE];
constexpr int64_t AHEAD = 2048;  // bytes of the stream to fetch ahead

inline vf bf16_scales(const uint8_t* p) {
  vf out;
  for (int i = 0; i < LANES; ++i) {
    bf16 v;
    std::memcpy(&v, p + 2 * i, 2);
    out[i] = widen(v);
  }
  return out;
}

// y[r] += s_x · s_w · sums, or = for the first group
template <int R>
inline void add_group(Sums (*acc)[2], const vf* s_w, const Block& b, int64_t group, bool first, Out y) {
  for (int r = 0; r < R; ++r) {
    float s_x = b.scale[r][group];
    for (int h = 0; h < 2; ++h) {
      vf v = to_float(acc[r][h]) * (s_w[h] * s_x);
      store(y[r] + 16 * h, first ? v : load(y[r] + 16 * h) + v);
    }
  }
}

template <int R>
void tile_int8(const uint8_t* w, const Block& b, int64_t width, Out y) {
  const int8_t* x = b.q;
  for (int64_t g = 0; g * GROUP < width; ++g) {
    vf s_w[2] = {bf16_scales(w), bf16_scales(w + 32)};
    w += 64;
    Sums acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = sums(b.offset8[r][g]);
    int64_t steps = steps_of(std::min(GROUP, width - g * GROUP), 4);
    for (int64_t s = 0; s < steps; ++s, w += 128, x += 4 * R) {
      Codes w0 = codes(w), w1 = codes(w + 64);
      if (R <= 4) prefetch(w + AHEAD), prefetch(w + AHEAD + 64);
      for (int r = 0; r < R; ++r) {
        dot8(acc[r][0], w0, x + 4 * r), dot8(acc[r][1], w1, x + 4 * r);
      }
    }
    add_group<R>(acc, s_w, b, g, g == 0, y);
  }
}

template <int R>
void tile_int4(const uint8_t* w, const Block& b, int64_t width, Out y) {
  const int8_t* x = b.q;
  for (int64_t g = 0; g * GROUP4 < width; ++g) {
    vf s_w[2] = {bf16_scales(w), bf16_scales(w + 32)};
    w += 64;
    Sums acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = sums(b.offset4[r][g]);
    int64_t steps = steps_of(std::min(GROUP4, width - g * GROUP4), 8);
    for (int64_t s = 0; s < steps; ++s, w += 128, x += 8 * R) {
      Codes w0 = codes(w), w1 = codes(w + 64);
      if (R <= 4) prefetch(w + AHEAD), prefetch(w + AHEAD + 64);
      Codes low0 = low(w0), low1 = low(w1), high0 = high(w0), high1 = high(w1);
      for (int r = 0; r < R; ++r) {
        dot4(acc[r][0], low0, x + 4 * r), dot4(acc[r][1], low1, x + 4 * r);
        dot4(acc[r][0], high0, x + 4 * R + 4 * r), dot4(acc[r][1], high1, x + 4 * R + 4 * r);
      }
    }
    add_group<R>(acc, s_w, b, g / (GROUP / GROUP4), g == 0, y);
  }
}

template <int R>
void tile_fp8(const uint8_t* w, const Block& b, int64_t width, Out y) {
  const float* x = b.wide;
  for (int64_t g = 0; g * GROUP < width; ++g) {
    vf s_w[2], acc[R][2] = {};
    std::memcpy(s_w, w, 128);
    w += 128;
    int64_t steps = steps_of(std::min(GROUP, width - g * GROUP), 4);
    for (int64_t s = 0; s < steps; ++s, w += 128, x += 4 * R) {
      vf w0[4], w1[4];
      decode_fp8(w, w0), decode_fp8(w + 64, w1);
      if (R <= 4) prefetch(w + AHEAD), prefetch(w + AHEAD + 64);
      for (int i = 0; i < 4; ++i)
        for (int r = 0; r < R; ++r) acc[r][0] += w0[i] * x[i * R + r], acc[r][1] += w1[i] * x[i * R + r];
    }
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h) {
        vf v = acc[r][h] * 256.0f * s_w[h];
        store(y[r] + 16 * h, g ? load(y[r] + 16 * h) + v : v);
      }
  }
}

template <int R>
void tile_rows(Kind kind, const uint8_t* w, const Block& b, int64_t width, Out y) {
  if (b.rows != R) {
    if constexpr (R > 1) tile_rows<R - 1>(kind, w, b, width, y);
    return;
  }
  if (kind == INT8) tile_int8<R>(w, b, width, y);
  else if (kind == INT4) tile_int4<R>(w, b, width, y);
  else tile_fp8<R>(w, b, width, y);
}
inline void tile(Kind kind, const uint8_t* w, const Block& b, int64_t width, Out y) { tile_rows<ROWS>(kind, w, b, width, y); }

inline bool is_int(const Matrix& m) { return m.kind != FP8; }
inline const uint8_t* tile_at(const Matrix& m, int64_t tile) {
  return static_cast<const uint8_t*>(m.data) + tile * tile_bytes(m.kind, m.width);
}
inline int64_t tiles_of(int64_t outs) { return (outs + TILE - 1) / TILE; }

template <class T>
void fill_input(Input& in, const T* x, int64_t rows, int64_t width, int64_t stride, bool ints, bool floats) {
  in.resize(rows, width, ints, floats);
  parallel(rows, 1, rows * width > 32768, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) fill_row(in, t, x + t * stride, ints, floats);
  });
}

// Jobs of one tile each, taken one by one: rows that meet them may be few or many.
template <class Body>
void each_tile(int64_t count, int64_t bytes, int64_t rows, Body body) {
  int64_t grain = std::max<int64_t>(1, std::min(count / (Pool::instance().threads() * 8), 1 + (128 << 10) * count / std::max<int64_t>(1, bytes * rows)));
  Pool& pool = Pool::instance();
  if (!worth_sharing(bytes, rows) || pool.threads() == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Job { Body* body; int64_t count, grain; } job{&body, count, grain};
  pool.run((count + grain - 1) / grain, [](void* data, int64_t index) {
    Job* j = static_cast<Job*>(data);
    for (int64_t i = index * j->grain; i < std::min(j->count, (index + 1) * j->grain); ++i) (*j->body)(i);
  }, &job);
}

// Buffers of a calling thread, kept from call to call.
struct Scratch {
  Input in, mid;
  Blocks blocks, mid_blocks;
};

}  // namespace

int64_t tile_bytes(Kind kind, int64_t width) {
  Layout l = layout_of(kind);
  return (width + l.group - 1) / l.group * l.scale + steps_of(width, l.channels) * 128;
}
int64_t matrix_bytes(Kind kind, int64_t outs, int64_t width) { return tiles_of(outs) * tile_bytes(kind, width); }

template <class T>
void packed_linear(const T* x, const Product<T>* products, int count, int64_t rows, int64_t stride) {
  static thread_local Scratch scratch;
  Input& in = scratch.in;  // by reference: in a lambda on another thread the name would be that thread's own
  Blocks& blocks = scratch.blocks;
  int64_t width = products[0].matrix.width, tiles = 0, bytes = 0;
  bool ints = false, floats = false;
  for (int p = 0; p < count; ++p) {
    const Matrix& m = products[p].matrix;
    (is_int(m) ? ints : floats) = true;
    tiles += tiles_of(m.outs), bytes += matrix_bytes(m.kind, m.outs, width);
  }
  fill_input(in, x, rows, width, stride, ints, floats);
  blocks.clear();
  blocks.add(nullptr, rows, 0);
  blocks.fill(in, ints, floats);
  const std::vector<Block>& all = blocks.block;
  // Rows in chunks whose values stay in the second cache while the tiles pass.
  int64_t n = int64_t(all.size()), chunk = std::max<int64_t>(1, (512 << 10) / (in.padded * (floats ? 4 : 1) * ROWS));
  int64_t chunks = (n + chunk - 1) / chunk;
  each_tile(chunks * tiles, bytes * chunks, (rows + chunks - 1) / std::max<int64_t>(1, chunks), [&](int64_t job) {
    int64_t t = job % tiles, c = job / tiles;
    const Product<T>* p = products;
    while (t >= tiles_of(p->matrix.outs)) t -= tiles_of((p++)->matrix.outs);
    const uint8_t* w = tile_at(p->matrix, t);
    int64_t outs = p->matrix.outs, o = t * TILE, here = std::min<int64_t>(TILE, outs - o);
    for (int64_t b = c * chunk; b < std::min(n, (c + 1) * chunk); ++b) {
      Out y;
      tile(p->matrix.kind, w, all[b], width, y);
      for (int r = 0; r < all[b].rows; ++r) {
        T* to = p->out + all[b].row[r] * outs + o;
        for (int64_t i = 0; i < here; ++i) narrow(p->bias ? y[r][i] + widen(p->bias[o + i]) : y[r][i], to + i);
      }
    }
  });
}

namespace {

// The rows of one expert: those of the pairs sorted by expert, from `first` on. The shared expert has all tokens.
struct Segment { Matrix gate_up, down; int64_t first, count, hidden; };  // hidden: where its rows begin in `pre`

inline Matrix one_of(const Matrix& stack, int64_t e) {
  return {stack.kind, static_cast<const uint8_t*>(stack.data) + e * matrix_bytes(stack.kind, stack.outs, stack.width), stack.outs, stack.width};
}

struct ExpertScratch : Scratch {
  std::vector<int64_t> source, slot, begin, end, job_segment, job_tile;
  std::vector<float> pre, y;
  std::vector<Segment> segments;
};

}  // namespace

template <class T>
void packed_experts(const T* x, const int64_t* expert, const float* weight, const Experts& e, const T* residual, T* out,
                    int64_t tokens) {
  static thread_local ExpertScratch kept;
  ExpertScratch& scratch = kept;
  auto& [in, mid, blocks, mid_blocks] = static_cast<Scratch&>(scratch);
  auto &source = scratch.source, &slot = scratch.slot, &begin = scratch.begin, &end = scratch.end;
  auto &job_segment = scratch.job_segment, &job_tile = scratch.job_tile;
  auto &pre = scratch.pre, &y = scratch.y;
  auto& segments = scratch.segments;
  if (tokens == 0) return;
  int64_t D = e.gate_up.width, K = e.per_token, wide = e.shared_down.data ? e.shared_down.width : 0, pairs = tokens * K;

  // Pairs sorted by expert; slot[pair] is its row. The shared expert's rows come last.
  source.resize(pairs + (wide ? tokens : 0)), slot.resize(pairs), segments.clear();
  std::vector<int64_t> offset(e.count + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++offset[expert[p] + 1];
  for (int64_t i = 0; i < e.count; ++i) offset[i + 1] += offset[i];
  for (int64_t i = 0; i < e.count; ++i)
    if (offset[i + 1] > offset[i])
      segments.push_back({one_of(e.gate_up, i), one_of(e.down, i), offset[i], offset[i + 1] - offset[i], offset[i] * e.gate_up.outs});
  for (int64_t p = 0; p < pairs; ++p) source[slot[p] = offset[expert[p]]++] = p / K;
  if (wide) {
    segments.push_back({e.shared_gate_up, e.shared_down, pairs, tokens, pairs * e.gate_up.outs});
    for (int64_t t = 0; t < tokens; ++t) source[pairs + t] = t;
  }
  int64_t rows = int64_t(source.size()), most = std::max(e.down.width, wide);
  bool ints = is_int(e.gate_up) || is_int(e.down), floats = !ints;

  fill_input(in, x, tokens, D, D, ints, floats);
  blocks.clear(), begin.clear(), end.clear();
  for (const Segment& s : segments) {
    begin.push_back(int64_t(blocks.block.size()));
    blocks.add(&source[s.first], s.count, s.first);
    end.push_back(int64_t(blocks.block.size()));
  }
  blocks.fill(in, ints, floats);

  // The long list of (segment, tile), the widest segment first: it would hold everybody up at the end.
  int64_t bytes = 0;
  auto list_jobs = [&](bool down) {
    job_segment.clear(), job_tile.clear(), bytes = 0;
    for (int64_t s = int64_t(segments.size()) - 1; s >= 0; --s) {
      const Matrix& m = down ? segments[s].down : segments[s].gate_up;
      bytes += matrix_bytes(m.kind, m.outs, m.width);
      for (int64_t t = 0; t < tiles_of(m.outs); ++t) job_segment.push_back(s), job_tile.push_back(t);
    }
  };
  auto product = [&](bool down, const Blocks& from, std::vector<float>& to) {
    list_jobs(down);
    each_tile(int64_t(job_segment.size()), bytes, std::max<int64_t>(1, rows / int64_t(segments.size())), [&](int64_t job) {
      const Segment& s = segments[job_segment[job]];
      const Matrix& m = down ? s.down : s.gate_up;
      const uint8_t* w = tile_at(m, job_tile[job]);
      int64_t o = job_tile[job] * TILE, here = std::min<int64_t>(TILE, m.outs - o);
      for (int64_t b = begin[job_segment[job]]; b < end[job_segment[job]]; ++b) {
        const Block& block = from.block[b];
        Out v;
        tile(m.kind, w, block, m.width, v);
        for (int r = 0; r < block.rows; ++r) {
          float* at = down ? &to[block.row[r] * D] : &to[s.hidden + (block.row[r] - s.first) * m.outs];
          std::memcpy(at + o, v[r], here * 4);
        }
      }
    });
  };
  pre.resize(pairs * e.gate_up.outs + (wide ? tokens * e.shared_gate_up.outs : 0));
  product(false, blocks, pre);

  // silu(gate) ⊙ up, quantised again. Rows of narrower segments are padded with zeros.
  mid.resize(rows, most, ints, floats);
  parallel(rows, 1, rows * most > 16384, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> row;
    row.resize(mid.padded + LANES);
    for (int64_t i = first; i < last; ++i) {
      bool shared = i >= pairs;
      int64_t I = shared ? wide : e.down.width;
      const float* gate = &pre[shared ? pairs * e.gate_up.outs + (i - pairs) * 2 * I : i * 2 * I];
      int64_t c = 0;
      for (; c + LANES <= I; c += LANES) store(&row[c], silu(load(gate + c)) * load(gate + I + c));
      for (; c < I; ++c) row[c] = silu(gate[c]) * gate[I + c];
      std::fill(row.begin() + I, row.end(), 0.0f);
      fill_row(mid, i, row.data(), ints, floats);
    }
  });
  mid_blocks.clear();
  for (const Segment& s : segments) {
    std::vector<int64_t> own(s.count);
    for (int64_t i = 0; i < s.count; ++i) own[i] = s.first + i;
    mid_blocks.add(own.data(), s.count, s.first);
  }
  mid_blocks.fill(mid, ints, floats);
  y.resize(rows * D);
  product(true, mid_blocks, y);

  parallel(tokens, 1, rows * D > 16384, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> total;
    total.resize(D);
    for (int64_t t = first; t < last; ++t) {
      if (wide) std::copy(&y[(pairs + t) * D], &y[(pairs + t) * D] + D, total.begin());
      else std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t k = 0; k < K; ++k) {
        float p = weight[t * K + k];
        const float* row = &y[slot[t * K + k] * D];
        for (int64_t d = 0; d < D; ++d) total[d] += p * row[d];
      }
      for (int64_t d = 0; d < D; ++d) narrow(residual ? total[d] + widen(residual[t * D + d]) : total[d], out + t * D + d);
    }
  });
}

template void packed_linear<float>(const float*, const Product<float>*, int, int64_t, int64_t);
template void packed_linear<bf16>(const bf16*, const Product<bf16>*, int, int64_t, int64_t);
template void packed_experts<float>(const float*, const int64_t*, const float*, const Experts&, const float*, float*, int64_t);
template void packed_experts<bf16>(const bf16*, const int64_t*, const float*, const Experts&, const bf16*, bf16*, int64_t);

namespace {

// Moves every code and scale between the plain layout and tiles; `count` matrices, `rows` of an FP8 block.
template <bool PACK>
void convert(Kind kind, uint8_t* plain, uint8_t* scale, uint8_t* tiles, int64_t count, int64_t outs, int64_t width, int64_t rows) {
  Layout l = layout_of(kind);
  int64_t groups = (width + l.group - 1) / l.group, size = tile_bytes(kind, width), per = tiles_of(outs);
  int64_t line = kind == INT4 ? (width + 1) / 2 : width, scale_size = kind == FP8 ? 4 : 2;
  int64_t scale_rows = (outs + rows - 1) / rows;
  const uint8_t zero = kind == INT8 ? 0x80 : kind == INT4 ? 8 : 0;
  parallel(count * per, 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      uint8_t* at = tiles + job * size;
      if (PACK) std::memset(at, kind == INT4 ? 0x88 : zero, size);
      int64_t e = job / per, first = job % per * TILE;
      for (int64_t g = 0; g < groups; ++g) {
        if (PACK) std::memset(at, 0, l.scale);
        int64_t channels = std::min(l.group, width - g * l.group);
        for (int64_t o = 0; o < std::min<int64_t>(TILE, outs - first); ++o) {
          uint8_t* s = scale + ((e * scale_rows + (first + o) / rows) * groups + g) * scale_size;
          if (PACK) std::memcpy(at + o * scale_size, s, scale_size);
          else if ((first + o) % rows == 0) std::memcpy(s, at + o * scale_size, scale_size);
          uint8_t* row = plain + (e * outs + first + o) * line;
          uint8_t* step = at + l.scale;
          if (kind != INT4) {
            for (int64_t i = 0; i < channels; ++i) {
              uint8_t *code = step + i / 4 * 128 + place(kind, o, i % 4), *p = row + g * l.group + i;
              if (PACK) *code = uint8_t(*p ^ zero);
              else *p = uint8_t(*code ^ zero);
            }
            continue;
          }
          // two plain bytes are channels 0 … 3, the low nibbles of a step; the next two the high ones
          row += g * l.group / 2;
          for (int64_t i = 0; i < channels; i += 2) {
            uint8_t *codes = step + i / 8 * 128 + place(kind, o, i % 4), *p = row + i / 2;
            int high = i % 8 / 4 * 4;
            uint8_t keep = uint8_t(0xf0 >> high);
            if (PACK) {
              codes[0] = uint8_t((codes[0] & keep) | (*p & 15) << high);
              codes[1] = uint8_t((codes[1] & keep) | (*p >> 4) << high);
            } else {
              *p = uint8_t((codes[0] >> high & 15) | (codes[1] >> high & 15) << 4);
            }
          }
        }
        at += l.scale + steps_of(channels, l.channels) * 128;
      }
    }
  });
}

}  // namespace
}  // namespace hadal

using namespace hadal;

extern "C" const char* packed_isa() { return ISA; }
extern "C" int64_t packed_bytes(int64_t kind, int64_t outs, int64_t width) { return matrix_bytes(Kind(kind), outs, width); }
extern "C" void pack_tiles(int64_t kind, void* codes, void* scale, void* tiles, int64_t count, int64_t outs, int64_t width, int64_t rows) {
  convert<true>(Kind(kind), (uint8_t*)codes, (uint8_t*)scale, (uint8_t*)tiles, count, outs, width, rows);
}
extern "C" void unpack_tiles(int64_t kind, void* codes, void* scale, void* tiles, int64_t count, int64_t outs, int64_t width, int64_t rows) {
  convert<false>(Kind(kind), (uint8_t*)codes, (uint8_t*)scale, (uint8_t*)tiles, count, outs, width, rows);
}

namespace {
template <class T>
void linear_entry(void* x, void* data, void* bias, void* out, int64_t kind, int64_t rows, int64_t outs, int64_t width, int64_t stride) {
  Product<T> p{{Kind(kind), data, outs, width}, (T*)bias, (T*)out};
  packed_linear<T>((T*)x, &p, 1, rows, stride);
}
// p: x, expert, weight, gate_up, down, shared gate_up, shared down, residual, out; d: T, K, E, D, I, shared I, and kinds
template <class T>
void experts_entry(void** p, const int64_t* d) {
  int64_t D = d[3], I = d[4], wide = d[5];
  Experts e{{Kind(d[6]), p[3], 2 * I, D}, {Kind(d[7]), p[4], D, I}, {Kind(d[8]), p[5], 2 * wide, D}, {Kind(d[9]), p[6], D, wide}, d[2], d[1]};
  packed_experts<T>((T*)p[0], (int64_t*)p[1], (float*)p[2], e, (T*)p[7], (T*)p[8], d[0]);
}
}  // namespace

extern "C" void packed_linear_f32(void* x, void* w, void* b, void* out, int64_t kind, int64_t rows, int64_t outs, int64_t n, int64_t stride) {
  linear_entry<float>(x, w, b, out, kind, rows, outs, n, stride);
}
extern "C" void packed_linear_bf16(void* x, void* w, void* b, void* out, int64_t kind, int64_t rows, int64_t outs, int64_t n, int64_t stride) {
  linear_entry<bf16>(x, w, b, out, kind, rows, outs, n, stride);
}
extern "C" void packed_experts_f32(void** p, int64_t* d) { experts_entry<float>(p, d); }
extern "C" void packed_experts_bf16(void** p, int64_t* d) { experts_entry<bf16>(p, d); }
