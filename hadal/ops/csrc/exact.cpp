// Exact mode on CPU: every operation of the network with sums in one fixed order (hadal/ops/invariant.py, docs/exact.md).
//
// A number of the result depends on its own row's data and length alone: not on how many rows there are, where in the
// batch or in memory the row lies, how the work was cut into tiles, or how many threads shared it. What makes it so:
//   * dot products run over 16 lanes, each a chain of fused multiply-adds over i, i + 16, i + 32, …; the lanes are added
//     by one tree (`sum4`). A tile of 4 × 6 products keeps 24 such chains, a single product keeps one: the same chain;
//   * sums of weighted rows (attention's values, the absorbed query) are one chain an element, in ascending order;
//   * attention walks its keys in blocks of 64 from position 0, whatever pages or chunks they came in;
//   * exp is one polynomial on 16 lanes, tails are padded with zeros: no scalar remainder with another rounding;
//   * this file is compiled without reassociation and without contraction: FMAs are where `fma` says so.
// Legend: T tokens, H heads, G key/value heads, E experts, K experts per token, D hidden, I width, L latent, V values.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "pool.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t KEYS = 64;   // of an attention block
constexpr int64_t PANEL = 32;  // weight rows of a job
constexpr int64_t CHUNK = 96;  // input rows of a job
#if defined(__AVX512F__)
constexpr int64_t TILE = 6;  // inputs of a tile: 24 accumulators of 32 registers
#else
constexpr int64_t TILE = 1;
#endif
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(32)));
struct bf16 { uint16_t bits; };

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void narrow(float v, float* to) { *to = v; }
inline void narrow(float v, bf16* to) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  uint16_t even = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16), nan = uint16_t((u >> 16) | 0x40);
  to->bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : even;
}
template <class T> inline float rounded(float v) { T t; narrow(v, &t); return widen(t); }

inline vf load(const float* p) { vf v; std::memcpy(&v, p, 64); return v; }
inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, p, 32);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  vh half;
  std::memcpy(&half, p, 32);
  return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}
template <class T> inline vf load_part(const T* p, int64_t n) {  // n < 16 values, then zeros
  T all[LANES] = {};
  std::memcpy(all, p, n * sizeof(T));
  return load(all);
}
template <class T> inline vf load_some(const T* p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n); }
inline void store(float* p, vf v) { std::memcpy(p, &v, 64); }
inline vf splat(float v) { return v - vf{}; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  vf out;
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&out, z, 64);
  return out;
#elif defined(__aarch64__)
  vf out;
  float32x4_t x[4], y[4], z[4];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  for (int i = 0; i < 4; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  std::memcpy(&out, z, 64);
  return out;
#else
  return a * b + c;  // two roundings, everywhere
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (vector_of_4_ints){i, j, k, l})
typedef int32_t vector_of_4_ints __attribute__((vector_size(16)));
#endif
inline v4 quarter(vf v) {  // lanes i, i + 4, i + 8, i + 12 added
  v8 half[2];
  std::memcpy(half, &v, 64);
  v8 s = half[0] + half[1];
  v4 part[2];
  std::memcpy(part, &s, 32);
  return part[0] + part[1];
}
// The sums of four vectors, each by the same tree.
inline v4 sum4(vf a, vf b, vf c, vf d) {
  v4 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  v4 pq = PICK(p, q, 0, 4, 1, 5) + PICK(p, q, 2, 6, 3, 7), rs = PICK(r, s, 0, 4, 1, 5) + PICK(r, s, 2, 6, 3, 7);
  return PICK(pq, rs, 0, 1, 4, 5) + PICK(pq, rs, 2, 3, 6, 7);
}
inline float sum(vf v) { return sum4(v, v, v, v)[0]; }
inline float largest(vf v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x: x = n·ln 2 + r, a polynomial of degree 6 in r (Cephes' expf). 0 below −87.3, infinity above 88.3; NaN stays NaN.
inline vf exponential(vf x) {
  const vf low = splat(-87.3f), high = splat(88.3f), magic = splat(12582912.0f);
  vf y = x < low ? low : x;
  y = y > high ? high : y;
  vf n = fma(y, splat(1.44269504088896341f), magic) - magic;
  vf r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf value = p * (vf)power;
  value = x < low ? splat(0.0f) : value;
  return x > high ? splat(std::numeric_limits<float>::infinity()) : value;
}

// --- products -----------------------------------------------------------------------------------------------------
// out[c][r] = w_r · x_c for 4 weight rows and C inputs
template <int C, class W>
inline void tile(const W* const* w, const float* const* x, int64_t n, float (*out)[4]) {
  vf acc[C][4] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vf row[4];
    for (int r = 0; r < 4; ++r) row[r] = load(w[r] + i);
    for (int c = 0; c < C; ++c) {
      vf value = load(x[c] + i);
      for (int r = 0; r < 4; ++r) acc[c][r] = fma(row[r], value, acc[c][r]);
    }
  }
  if (i < n) {
    for (int c = 0; c < C; ++c) {
      vf value = load_part(x[c] + i, n - i);
      for (int r = 0; r < 4; ++r) acc[c][r] = fma(load_part(w[r] + i, n - i), value, acc[c][r]);
    }
  }
  for (int c = 0; c < C; ++c) {
    v4 s = sum4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    std::memcpy(out[c], &s, 16);
  }
}
template <class W>
inline void tile_of(int64_t c, const W* const* w, const float* const* x, int64_t n, float (*out)[4]) {
  switch (c) {
    case 1: return tile<1>(w, x, n, out);
    case 2: return tile<2>(w, x, n, out);
    case 3: return tile<3>(w, x, n, out);
    case 4: return tile<4>(w, x, n, out);
    case 5: return tile<5>(w, x, n, out);
    default: return tile<6>(w, x, n, out);
  }
}
// Four of `rows` pointers from r on; beyond the end the last one again (its products are not used).
template <class W> inline void four(const W* const* w, int64_t r, int64_t rows, const W** out) {
  for (int64_t i = 0; i < 4; ++i) out[i] = w[std::min(r + i, rows - 1)];
}

template <class W> const float* wide_row(const W* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
  return to;
}

// Products of at most PANEL rows [first, last) of w with `count` inputs; emit(row, input, four values, how many count).
template <class W, class Emit>
void product(const W* w, int64_t stride, int64_t first, int64_t last, const float* const* x, int64_t count, int64_t n, Emit emit) {
  thread_local std::vector<float> scratch;
  const W* at[PANEL];
  const float* wide[PANEL];
  int64_t rows = last - first;
  bool widened = sizeof(W) == 2 && count > TILE;
  if (widened) scratch.resize(PANEL * n);
  for (int64_t r = 0; r < rows; ++r) {
    at[r] = w + (first + r) * stride;
    if (widened) wide[r] = wide_row(at[r], n, &scratch[r * n]);
  }
  for (int64_t c = 0; c < count; c += TILE) {
    int64_t columns = std::min(TILE, count - c);
    for (int64_t r = 0; r < rows; r += 4) {
      float out[6][4];
      if (widened) {
        const float* block[4];
        four(wide, r, rows, block);
        tile_of(columns, block, x + c, n, out);
      } else {
        const W* block[4];
        four(at, r, rows, block);
        tile_of(columns, block, x + c, n, out);
      }
      for (int64_t j = 0; j < columns; ++j) emit(first + r, c + j, out[j], std::min<int64_t>(4, rows - r));
    }
  }
}

// FP32 rows of x, one pointer a row; `keep` holds converted values where needed.
template <class T>
void rows_of(const T* x, int64_t rows, int64_t n, int64_t stride, std::vector<float>& keep, std::vector<const float*>& at) {
  at.resize(rows);
  if (sizeof(T) == 4) {
    for (int64_t t = 0; t < rows; ++t) at[t] = reinterpret_cast<const float*>(x + t * stride);
    return;
  }
  keep.resize(rows * n);
  parallel(rows, 16, rows * n > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) at[t] = wide_row(x + t * stride, n, &keep[t * n]);
  });
}

template <class T, class O>
void linear(const T* x, const T* w, const T* bias, O* out, int64_t rows, int64_t outs, int64_t n, int64_t stride) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, rows, n, stride, keep, at);
  int64_t panels = (outs + PANEL - 1) / PANEL, chunks = (rows + CHUNK - 1) / CHUNK;
  parallel(panels * chunks, 1, outs * n * std::max<int64_t>(1, rows / 4) > 98304, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      int64_t first = job / chunks * PANEL, c = job % chunks * CHUNK;
      product(w, n, first, std::min(outs, first + PANEL), at.data() + c, std::min(CHUNK, rows - c), n,
              [&](int64_t o, int64_t t, const float* v, int64_t count) {
                O* to = out + (c + t) * outs + o;
                for (int64_t i = 0; i < count; ++i) narrow(bias ? v[i] + widen(bias[o + i]) : v[i], to + i);
              });
    }
  });
}

// --- rows -----------------------------------------------------------------------------------------------------------
template <class T> inline float mean_square(const T* row, int64_t n) {
  vf acc = {};
  for (int64_t i = 0; i < n; i += LANES) { vf v = load_some(row + i, n - i); acc = fma(v, v, acc); }
  return sum(acc) / float(n);
}
template <class T>
void norm_row(const T* x, const T* w, T* out, int64_t n, float eps) {
  float scale = 1.0f / std::sqrt(mean_square(x, n) + eps);
  for (int64_t i = 0; i < n; ++i) narrow(widen(w[i]) * rounded<T>(widen(x[i]) * scale), out + i);
}
template <class T>
void rms_norm(const T* x, const T* w, T* out, int64_t rows, int64_t n, int64_t stride, float eps) {
  parallel(rows, 8, rows * n > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) norm_row(x + t * stride, w, out + t * n, n, eps);
  });
}

template <class T, class O>
inline void rotate_head(const T* from, const float* cos, const float* sin, O* to, int64_t half, bool interleaved) {
  for (int64_t i = 0; i < half; ++i) {
    int64_t p = interleaved ? 2 * i : i, q = interleaved ? 2 * i + 1 : i + half;
    float a = widen(from[p]), b = widen(from[q]);
    narrow(a * cos[i] - b * sin[i], to + p);
    narrow(b * cos[i] + a * sin[i], to + q);
  }
}
template <class T>
void rotate(const T* x, const float* rotation, T* out, int64_t T_, int64_t H, int64_t half, int64_t t_stride, int64_t h_stride,
            bool interleaved) {
  parallel(T_, 8, T_ * H * half > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < H; ++h)
        rotate_head(x + t * t_stride + h * h_stride, rotation + t * 2 * half, rotation + (t * 2 + 1) * half,
                    out + (t * H + h) * 2 * half, half, interleaved);
  });
}
// [RMSNorm(latent); rotated key] of each row of kv [T, rank + 2·half]
template <class T>
void latent(const T* kv, const T* w, const float* rotation, T* out, int64_t T_, int64_t rank, int64_t half, int64_t stride, float eps) {
  int64_t width = rank + 2 * half;
  parallel(T_, 8, T_ * width > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      norm_row(kv + t * stride, w, out + t * width, rank, eps);
      rotate_head(kv + t * stride + rank, rotation + t * 2 * half, rotation + (t * 2 + 1) * half, out + t * width + rank, half, true);
    }
  });
}

// silu(gate) ⊙ up of FP32 or BF16 rows [gate | up], rounded as T where the separate operations round
template <class T, class X, class O>
inline void swiglu_row(const X* x, O* out, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    int64_t n = std::min<int64_t>(LANES, width - i);
    vf g = load_some(x + i, n), up = load_some(x + width + i, n);
    vf s = g / (splat(1.0f) + exponential(-g));
    for (int64_t j = 0; j < n; ++j) narrow(rounded<T>(rounded<T>(s[j]) * up[j]), out + i + j);
  }
}
template <class T>
void swiglu(const T* x, T* out, int64_t rows, int64_t width) {
  parallel(rows, 8, rows * width > 16384, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) swiglu_row<T>(x + t * 2 * width, out + t * width, width);
  });
}

// log Σ exp of each row; FP32 over 1,024 values, these sums in FP64
void logsumexp(const float* x, float* out, int64_t rows, int64_t n, int64_t stride) {
  parallel(rows, 1, rows * n > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = x + t * stride;
      float peak = row[0];
      for (int64_t i = 1; i < n; ++i) peak = row[i] > peak ? row[i] : peak;
      double total = 0;
      for (int64_t at = 0; at < n; at += 1024) {
        vf acc = {};
        int64_t stop = std::min(n, at + 1024);
        for (int64_t i = at; i < stop; i += LANES) {
          vf e = exponential(load_some(row + i, stop - i) - splat(peak));
          if (stop - i < LANES) e = load_part((const float*)&e, stop - i);
          acc += e;
        }
        total += sum(acc);
      }
      out[t] = float(double(peak) + std::log(total));
    }
  });
}

// --- routing and experts ----------------------------------------------------------------------------------------------
// V3/V2 routing of `hadal.ops.gate` from FP32 logits in `s` [E], which becomes the scores.
struct Routing { int64_t E, K, groups, topk_group; bool sigmoid, sum_of_two, normalise; float scale; };
void route(float* s, const float* bias, int64_t* expert, float* weight, const Routing& r, float* choice, float* rank) {
  const float NONE = -std::numeric_limits<float>::infinity();
  float peak = r.sigmoid ? 0 : *std::max_element(s, s + r.E);
  vf acc = {};
  for (int64_t e = 0; e < r.E; e += LANES) {
    int64_t n = std::min<int64_t>(LANES, r.E - e);
    vf v = load_some(s + e, n);
    v = r.sigmoid ? splat(1.0f) / (splat(1.0f) + exponential(-v)) : exponential(v - splat(peak));
    std::memcpy(s + e, &v, n * 4);
    acc += load_some(s + e, n);
  }
  if (!r.sigmoid) {
    float total = sum(acc);
    for (int64_t e = 0; e < r.E; ++e) s[e] /= total;
  }
  for (int64_t e = 0; e < r.E; ++e) choice[e] = bias ? s[e] + bias[e] : s[e];
  int64_t size = r.E / r.groups;
  if (r.topk_group < r.groups) {
    for (int64_t g = 0; g < r.groups; ++g) {
      float first = NONE, second = NONE;
      for (int64_t i = g * size; i < (g + 1) * size; ++i) {
        if (choice[i] > first) { second = first; first = choice[i]; }
        else if (choice[i] > second) second = choice[i];
      }
      rank[g] = r.sum_of_two && size > 1 ? first + second : first;
    }
    for (int64_t dropped = r.groups - r.topk_group; dropped > 0; --dropped) {  // of equals, the later one goes
      int64_t worst = -1;
      for (int64_t g = 0; g < r.groups; ++g)
        if (rank[g] != std::numeric_limits<float>::infinity() && (worst < 0 || rank[g] <= rank[worst])) worst = g;
      if (worst < 0) break;
      rank[worst] = std::numeric_limits<float>::infinity();
      std::fill(choice + worst * size, choice + (worst + 1) * size, NONE);
    }
  }
  float total = 0;
  for (int64_t k = 0; k < r.K; ++k) {
    int64_t best = std::max_element(choice, choice + r.E) - choice;
    expert[k] = best;
    total += weight[k] = s[best];
    choice[best] = NONE;
  }
  for (int64_t k = 0; k < r.K; ++k) weight[k] *= r.normalise ? r.scale / (total + 1e-20f) : r.scale;
}
template <class T>
void gate(const T* x, const T* w, const float* bias, int64_t* expert, float* weight, float* score, int64_t T_, int64_t D, const Routing& r) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
  parallel(T_, 12, T_ * D * r.E > 65536, [&](int64_t begin, int64_t end) {
    std::vector<float> choice(r.E), rank(r.groups);
    for (int64_t first = 0; first < r.E; first += PANEL)
      product(w, D, first, std::min(r.E, first + PANEL), at.data() + begin, end - begin, D,
              [&](int64_t e, int64_t t, const float* v, int64_t n) { std::memcpy(score + (begin + t) * r.E + e, v, n * 4); });
    for (int64_t t = begin; t < end; ++t) route(score + t * r.E, bias, expert + t * r.K, weight + t * r.K, r, choice.data(), rank.data());
  });
}

struct Job { int64_t expert, first, last, from, to; };  // weight rows [first, last) on the expert's pairs [from, to)
std::vector<Job> jobs_of(const std::vector<std::vector<int64_t>>& pairs, int64_t rows) {
  std::vector<Job> jobs;
  for (int64_t e = 0; e < int64_t(pairs.size()); ++e)
    for (int64_t first = 0; first < rows && !pairs[e].empty(); first += PANEL)
      for (int64_t from = 0, n = int64_t(pairs[e].size()); from < n; from += CHUNK)
        jobs.push_back({e, first, std::min(rows, first + PANEL), from, std::min(n, from + CHUNK)});
  return jobs;
}

// out[t] = Σ_k weight[t][k] · down_e(silu(gate_e x) ⊙ up_e x), k ascending
template <class T>
void experts(const T* x, const int64_t* expert, const float* weight, const T* gate_up, const T* down, T* out, int64_t T_, int64_t K,
             int64_t E, int64_t D, int64_t I) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
  int64_t P = T_ * K;
  std::vector<std::vector<int64_t>> pairs(E);
  for (int64_t p = 0; p < P; ++p) pairs[expert[p]].push_back(p);
  std::vector<float> both(P * 2 * I), hidden(P * I), y(P * D);
  bool worth = P * 3 * D * I > 98304;
  // weight rows on the rows of `input`; results to `to`, `width` a pair
  auto multiply = [&](const T* w, int64_t rows, int64_t n, auto input, float* to) {
    std::vector<Job> jobs = jobs_of(pairs, rows);
    parallel(int64_t(jobs.size()), 1, worth, [&](int64_t begin, int64_t end) {
      const float* rows_x[CHUNK];
      for (int64_t j = begin; j < end; ++j) {
        const Job& job = jobs[j];
        const int64_t* mine = pairs[job.expert].data() + job.from;
        for (int64_t i = 0; i < job.to - job.from; ++i) rows_x[i] = input(mine[i]);
        product(w + job.expert * rows * n, n, job.first, job.last, rows_x, job.to - job.from, n,
                [&](int64_t r, int64_t c, const float* v, int64_t count) {
                  for (int64_t i = 0; i < count; ++i) to[mine[c] * rows + r + i] = rounded<T>(v[i]);
                });
      }
    });
  };
  multiply(gate_up, 2 * I, D, [&](int64_t p) { return at[p / K]; }, both.data());
  parallel(P, 8, P * I > 16384, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) swiglu_row<T>(&both[p * 2 * I], &hidden[p * I], I);
  });
  multiply(down, D, I, [&](int64_t p) { return &hidden[p * I]; }, y.data());
  parallel(T_, 8, P * D > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t d = 0; d < D; d += LANES) {
        vf s = {};
        int64_t n = std::min<int64_t>(LANES, D - d);
        for (int64_t k = 0; k < K; ++k) s = fma(splat(weight[t * K + k]), load_some(&y[(t * K + k) * D + d], n), s);
        for (int64_t j = 0; j < n; ++j) narrow(s[j], out + t * D + d + j);
      }
  });
}

// --- weighted sums of rows, and attention -----------------------------------------------------------------------------
// acc[r][at … at + 16·V) += Σ_j p[r][j] · v_j, j ascending; `part`: columns of the last vector if they are fewer than 16.
template <int R, int V, class W>
inline void outer(const float* const* p, const W* const* v, int64_t count, int64_t at, float* const* acc, int64_t part) {
  vf s[R][V];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < V; ++c) s[r][c] = load(acc[r] + at + c * LANES);
  for (int64_t j = 0; j < count; ++j) {
    vf row[V];
    for (int c = 0; c < V; ++c) row[c] = part ? load_part(v[j] + at, part) : load(v[j] + at + c * LANES);
    for (int r = 0; r < R; ++r) {
      vf value = splat(p[r][j]);
      for (int c = 0; c < V; ++c) s[r][c] = fma(value, row[c], s[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < V; ++c) store(acc[r] + at + c * LANES, s[r][c]);
}
template <int R, class W>
inline void outer_rows(const float* const* p, const W* const* v, int64_t count, int64_t width, float* const* acc) {
  constexpr int V = TILE > 1 ? 4 : 1;
  int64_t at = 0;
  for (; at + V * LANES <= width; at += V * LANES) outer<R, V>(p, v, count, at, acc, 0);
  for (; at + LANES <= width; at += LANES) outer<R, 1>(p, v, count, at, acc, 0);
  if (at < width) outer<R, 1>(p, v, count, at, acc, width - at);
}
// For up to 6 rows; `acc` rows have room for a multiple of 16 values.
template <class W>
inline void weighted(int64_t rows, const float* const* p, const W* const* v, int64_t count, int64_t width, float* const* acc) {
  switch (rows) {
    case 1: return outer_rows<1>(p, v, count, width, acc);
    case 2: return outer_rows<2>(p, v, count, width, acc);
    case 3: return outer_rows<3>(p, v, count, width, acc);
    case 4: return outer_rows<4>(p, v, count, width, acc);
    case 5: return outer_rows<5>(p, v, count, width, acc);
    default: return outer_rows<6>(p, v, count, width, acc);
  }
}
constexpr int64_t GROUP = 6;  // rows that share a pass over keys or values
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Where the cached (or packed) entry of a position lies.
template <class T> struct Entries {
  const T* base;
  const int32_t* table;  // pages of the sequence; null: packed, one after the other
  int64_t page, entry;
  const T* at(int64_t t) const { return base + (table ? table[t / page] * page + t % page : t) * entry; }
};

struct Scratch { std::vector<float> keys, values, score, q, acc; };

// Softmax of one block for one row: scores become weights, the running peak and total advance. Returns the decay.
inline float advance(float* score, int64_t valid, float* peak, float* total) {
  const float NONE = -std::numeric_limits<float>::infinity();
  for (int64_t j = valid; j < KEYS; ++j) score[j] = NONE;
  vf top = load(score);
  for (int64_t j = LANES; j < KEYS; j += LANES) { vf v = load(score + j); top = v > top ? v : top; }
  float next = std::max(*peak, largest(top));
  float decay = exponential(splat(*peak - next))[0];
  vf acc = {};
  for (int64_t j = 0; j < KEYS; j += LANES) {
    vf p = exponential(load(score + j) - splat(next));
    store(score + j, p);
    acc += p;
  }
  *total = *total * decay + sum(acc);
  *peak = next;
  return decay;
}

// z[r] = softmax(q_r · keys)·values for rows that see the first len[r] entries; q in s.q [rows][padded width], scaled already;
// z in s.acc [rows][padded v_width].
template <class T>
void attend(Scratch& s, int64_t rows, const int64_t* len, const Entries<T>& keys, int64_t width, int64_t k_offset, int64_t v_width,
            int64_t v_offset) {
  int64_t qw = padded(width), vw = padded(v_width), longest = *std::max_element(len, len + rows);
  s.acc.assign(rows * vw, 0.0f);
  s.score.resize(rows * KEYS);
  std::vector<float> peak(rows, -std::numeric_limits<float>::infinity()), total(rows, 0.0f);
  bool widened = sizeof(T) == 2 && rows > GROUP;
  if (widened) s.keys.resize(KEYS * width), s.values.resize(KEYS * v_width);
  for (int64_t first = 0; first < longest; first += KEYS) {
    int64_t count = std::min(KEYS, longest - first);
    const T *k[KEYS], *v[KEYS];
    const float *wk[KEYS], *wv[KEYS];
    for (int64_t j = 0; j < count; ++j) {
      const T* at = keys.at(first + j);
      k[j] = at + k_offset, v[j] = at + v_offset;
      if (widened) {
        wk[j] = wide_row(k[j], width, &s.keys[j * width]);
        wv[j] = v_offset == k_offset ? wk[j] : wide_row(v[j], v_width, &s.values[j * v_width]);
      }
    }
    for (int64_t r = 0; r < rows; r += GROUP) {
      const float *q[GROUP], *p[GROUP];
      float* acc[GROUP];
      int64_t n = 0, most = 0, index[GROUP];
      for (int64_t i = r; i < std::min(rows, r + GROUP); ++i) {
        if (len[i] <= first) continue;
        index[n] = i, q[n] = &s.q[i * qw], p[n] = &s.score[i * KEYS], acc[n] = &s.acc[i * vw];
        most = std::max(most, std::min(KEYS, len[i] - first)), ++n;
      }
      if (n == 0) continue;
      for (int64_t j = 0; j < most; j += 4)
        for (int64_t c = 0; c < n; c += TILE) {
          float out[6][4];
          int64_t columns = std::min(TILE, n - c);
          if (widened) {
            const float* block[4];
            four(wk, j, count, block);
            tile_of(columns, block, q + c, width, out);
          } else {
            const T* block[4];
            four(k, j, count, block);
            tile_of(columns, block, q + c, width, out);
          }
          for (int64_t i = 0; i < columns; ++i) std::memcpy(&s.score[index[c + i] * KEYS + j], out[i], 16);
        }
      for (int64_t i = 0; i < n; ++i) {
        int64_t row = index[i];
        float decay = advance(&s.score[row * KEYS], std::min(KEYS, len[row] - first), &peak[row], &total[row]);
        for (int64_t c = 0; c < vw; c += LANES) store(acc[i] + c, load(acc[i] + c) * splat(decay));
      }
      if (widened) weighted(n, p, wv, most, v_width, acc);
      else weighted(n, p, v, most, v_width, acc);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < vw; c += LANES)  // + 0: zeros lose their sign
      store(&s.acc[r * vw + c], load(&s.acc[r * vw + c]) / splat(total[r]) + splat(0.0f));
}

// Sequences: tokens [start[s], start[s + 1]) of the stream; the first of them stands at position begin[s] of its sequence.
struct Stream { const int64_t *start, *begin; const int32_t* table; int64_t S, stride, page; };
struct Piece { int64_t s, t, count, h; };  // `count` tokens from t of sequence s, head (or group) block h
std::vector<Piece> pieces_of(const Stream& stream, int64_t tokens, int64_t blocks) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < stream.S; ++s)
    for (int64_t t = stream.start[s]; t < stream.start[s + 1]; t += tokens)
      for (int64_t h = 0; h < blocks; ++h) pieces.push_back({s, t, std::min(tokens, stream.start[s + 1] - t), h});
  std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) {  // the long ones first
    return stream.begin[a.s] + a.t - stream.start[a.s] > stream.begin[b.s] + b.t - stream.start[b.s];
  });
  return pieces;
}
template <class T> Entries<T> entries_of(const T* base, const Stream& m, int64_t s, int64_t entry) {
  if (m.table) return {base, m.table + s * m.stride, m.page, entry};
  return {base + m.start[s] * entry, nullptr, 0, entry};
}
// Each piece by whoever is free: their costs differ by orders of magnitude.
template <class Body> void share(const std::vector<Piece>& pieces, bool worth, Body body) {
  int64_t n = int64_t(pieces.size());
  std::atomic<int64_t> next{0};
  int64_t hands = worth ? std::min<int64_t>(n, Pool::instance().threads()) : 1;
  parallel(hands, 1, worth, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1)) < n;) body(pieces[i], scratch);
  });
}

// MLA in absorbed form: q [T, H, n + R] (not rotated), entries [·, L + R], kv_b [H·(n + v), L] → out [T, H·v].
template <class T>
void mla(const T* q, const float* rotation, const T* base, const T* kv_b, T* out, const Stream& stream, int64_t H, int64_t n, int64_t R,
         int64_t L, int64_t V, int64_t q_stride, float scale) {
  int64_t C = L + R, cw = padded(C), lw = padded(L), T_ = stream.start[stream.S];
  int64_t tokens = std::max<int64_t>(1, 96 / H), heads = H, threads = Pool::instance().threads();
  int64_t whole = 0;
  for (int64_t s = 0; s < stream.S; ++s) whole += (stream.start[s + 1] - stream.start[s] + tokens - 1) / tokens;
  while (heads > 1 && whole * ((H + heads - 1) / heads) < 2 * threads) heads = (heads + 1) / 2;
  std::vector<Piece> pieces = pieces_of(stream, tokens, (H + heads - 1) / heads);
  share(pieces, T_ * H * L * (n + V) > 32768, [&](const Piece& piece, Scratch& s) {
    int64_t h0 = piece.h * heads, m = std::min(heads, H - h0), rows = piece.count * m;
    std::vector<int64_t> len(rows);
    std::vector<const float*> x(piece.count);
    std::vector<float> wide(GROUP * n), sums(GROUP * lw);
    s.q.assign(rows * cw, 0.0f);
    for (int64_t i = 0; i < rows; ++i) len[i] = stream.begin[piece.s] + piece.t - stream.start[piece.s] + i / m + 1;
    for (int64_t h = 0; h < m; ++h) {
      std::vector<const T*> up(n);
      for (int64_t j = 0; j < n; ++j) up[j] = kv_b + ((h0 + h) * (n + V) + j) * L;
      for (int64_t t = 0; t < piece.count; t += GROUP) {
        int64_t count = std::min(GROUP, piece.count - t);
        const float* p[GROUP];
        float* acc[GROUP];
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t i = 0; i < count; ++i) {
          p[i] = wide_row(q + (piece.t + t + i) * q_stride + (h0 + h) * (n + R), n, &wide[i * n]);
          acc[i] = &sums[i * lw];
        }
        weighted(count, p, up.data(), n, L, acc);
        for (int64_t i = 0; i < count; ++i) {
          float* row = &s.q[((t + i) * m + h) * cw];
          std::memcpy(row, acc[i], L * 4);
          int64_t token = piece.t + t + i;
          rotate_head(q + token * q_stride + (h0 + h) * (n + R) + n, rotation + token * R, rotation + token * R + R / 2, row + L, R / 2, true);
          for (int64_t c = 0; c < cw; c += LANES) store(row + c, load(row + c) * splat(scale));
        }
      }
    }
    attend(s, rows, len.data(), entries_of(base, stream, piece.s, C), C, 0, L, 0);
    for (int64_t h = 0; h < m; ++h) {
      for (int64_t t = 0; t < piece.count; ++t) x[t] = &s.acc[(t * m + h) * lw];
      const T* down = kv_b + ((h0 + h) * (n + V) + n) * L;
      for (int64_t first = 0; first < V; first += PANEL)
        product(down, L, first, std::min(V, first + PANEL), x.data(), piece.count, L, [&](int64_t o, int64_t t, const float* v, int64_t count) {
          T* to = out + ((piece.t + t) * H + h0 + h) * V + o;
          for (int64_t i = 0; i < count; ++i) narrow(v[i], to + i);
        });
    }
  });
}

// q [T, H, C] (rotated already), entries [·, 2, G, C] → out [T, H, C].
template <class T>
void gqa(const T* q, const T* base, T* out, const Stream& stream, int64_t H, int64_t G, int64_t C, int64_t t_stride, int64_t h_stride,
         float scale) {
  int64_t per = H / G, cw = padded(C), tokens = std::max<int64_t>(1, 48 / per), T_ = stream.start[stream.S];
  std::vector<Piece> pieces = pieces_of(stream, tokens, G);
  share(pieces, T_ * H * C > 4096, [&](const Piece& piece, Scratch& s) {
    int64_t rows = piece.count * per;
    std::vector<int64_t> len(rows);
    s.q.assign(rows * cw, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      len[i] = stream.begin[piece.s] + piece.t - stream.start[piece.s] + i / per + 1;
      wide_row(q + (piece.t + i / per) * t_stride + (piece.h * per + i % per) * h_stride, C, &s.q[i * cw]);
      for (int64_t c = 0; c < cw; c += LANES) store(&s.q[i * cw + c], load(&s.q[i * cw + c]) * splat(scale));
    }
    attend(s, rows, len.data(), entries_of(base, stream, piece.s, 2 * G * C), C, piece.h * C, C, (G + piece.h) * C);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < C; ++c) narrow(s.acc[i * cw + c], out + ((piece.t + i / per) * H + piece.h * per + i % per) * C + c);
  });
}

}  // namespace

extern "C" void set_threads(int threads) { Pool::instance().resize(threads); }

// Each operation for both types: <name>_f32 and <name>_bf16.
#define BOTH(NAME, PARAMS, CALL)                                  \
  extern "C" void NAME##_f32 PARAMS { typedef float T; CALL; }    \
  extern "C" void NAME##_bf16 PARAMS { typedef bf16 T; CALL; }
#define P(x) (T*)(x)
typedef int64_t n64;

BOTH(linear, (void* x, void* w, void* b, void* out, n64 rows, n64 outs, n64 n, n64 stride, int wide),
     if (wide) linear<T>(P(x), P(w), P(b), (float*)out, rows, outs, n, stride);
     else linear<T>(P(x), P(w), P(b), P(out), rows, outs, n, stride))
BOTH(rms_norm, (void* x, void* w, void* out, n64 rows, n64 n, n64 stride, float eps), rms_norm<T>(P(x), P(w), P(out), rows, n, stride, eps))
BOTH(rotate, (void* x, float* r, void* out, n64 t, n64 h, n64 half, n64 ts, n64 hs, int inter),
     rotate<T>(P(x), r, P(out), t, h, half, ts, hs, inter))
BOTH(latent, (void* kv, void* w, float* r, void* out, n64 t, n64 rank, n64 half, n64 stride, float eps),
     latent<T>(P(kv), P(w), r, P(out), t, rank, half, stride, eps))
BOTH(swiglu, (void* x, void* out, n64 rows, n64 width), swiglu<T>(P(x), P(out), rows, width))
BOTH(gate, (void* x, void* w, float* bias, n64* e, float* wt, float* score, n64 t, n64 d, n64 E, n64 k, n64 g, n64 tg, int sig, int two,
            int norm, float scale),
     gate<T>(P(x), P(w), bias, e, wt, score, t, d, {E, k, g, tg, bool(sig), bool(two), bool(norm), scale}))
BOTH(experts, (void* x, n64* e, float* wt, void* gu, void* dn, void* out, n64 t, n64 k, n64 E, n64 d, n64 i),
     experts<T>(P(x), e, wt, P(gu), P(dn), P(out), t, k, E, d, i))
BOTH(mla, (void* q, float* r, void* base, void* kv_b, void* out, n64* start, n64* begin, int32_t* table, n64 S, n64 stride, n64 page, n64 H,
           n64 n, n64 R, n64 L, n64 V, n64 q_stride, float scale),
     mla<T>(P(q), r, P(base), P(kv_b), P(out), {start, begin, table, S, stride, page}, H, n, R, L, V, q_stride, scale))
BOTH(gqa, (void* q, void* base, void* out, n64* start, n64* begin, int32_t* table, n64 S, n64 stride, n64 page, n64 H, n64 G, n64 C, n64 ts,
           n64 hs, float scale),
     gqa<T>(P(q), P(base), P(out), {start, begin, table, S, stride, page}, H, G, C, ts, hs, scale))
extern "C" void logsumexp_f32(float* x, float* out, n64 rows, n64 n, n64 stride) { logsumexp(x, out, rows, n, stride); }
