// CPU kernels for inference: matrix products of few rows (where reading the weights is the cost), routed experts,
// paged decode attention, norms, rotation, routing. FP32 or BF16 storage, FP32 arithmetic. Products with packed weights
// are in packed.cpp.
//
// Portable C++17 with GCC/Clang vector extensions: the compiler lowers 16-lane vectors to what the machine has.
// Each function's oracle is the torch reference in the Python file of the same operation. Loops that are worth it run on
// the pool of pool.h; small work stays on the calling thread.
// Legend: T tokens, S sequences, H heads, G key/value heads, E experts, K experts per token, D hidden, I width.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "numbers.h"
#include "packed.h"
#include "pool.h"

using namespace hadal;

namespace {

// BF16 is read 32 values at a time, as 16 words: the even values are the low halves (shifted up), the odd ones the high
// halves (masked), two cheap operations and no shuffle. FP32 vectors that meet BF16 therefore lie in that order: in
// each whole block of 32, evens before odds. `place` says where element i of n goes; FP32 against FP32 keeps its order.
template <class W> inline int64_t place(int64_t i, int64_t n) {
  if (sizeof(W) == 4 || i >= n / 32 * 32) return i;
  return (i & ~int64_t(31)) + (i & 1) * 16 + (i & 31) / 2;
}
struct Pair { vf even, odd; };
inline Pair load_pair(const bf16* p) {
  vu words;
  std::memcpy(&words, p, 64);
  vu low = words << 16, high = words & 0xffff0000u;
  Pair out;
  std::memcpy(&out.even, &low, 64);
  std::memcpy(&out.odd, &high, 64);
  return out;
}

// Weights or cached keys against a vector in `place` order.
inline float dot(const float* w, const float* x, int64_t n) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) { a += load(w + i) * load(x + i); b += load(w + i + LANES) * load(x + i + LANES); }
  for (; i + LANES <= n; i += LANES) a += load(w + i) * load(x + i);
  float s = sum(a + b);
  for (; i < n; ++i) s += w[i] * x[i];
  return s;
}
inline float dot(const bf16* w, const float* x, int64_t n) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) { Pair p = load_pair(w + i); a += p.even * load(x + i); b += p.odd * load(x + i + 16); }
  float s = sum(a + b);
  for (; i < n; ++i) s += widen(w[i]) * x[i];
  return s;
}
// acc (in `place` order) += p · w
inline void axpy(float p, const float* w, float* acc, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(acc + i, load(acc + i) + p * load(w + i));
  for (; i < n; ++i) acc[i] += p * w[i];
}
inline void axpy(float p, const bf16* w, float* acc, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Pair v = load_pair(w + i);
    store(acc + i, load(acc + i) + p * v.even);
    store(acc + i + 16, load(acc + i + 16) + p * v.odd);
  }
  for (; i < n; ++i) acc[i] += p * widen(w[i]);
}

// A row in FP32 and `place` order.
inline void widen_row(const float* w, float* out, int64_t n) { std::memcpy(out, w, n * 4); }
inline void widen_row(const bf16* w, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) { Pair p = load_pair(w + i); store(out + i, p.even); store(out + i + 16, p.odd); }
  for (; i < n; ++i) out[i] = widen(w[i]);
}

// out[r][c] = w_r · x_c for R weight rows and C inputs; meanwhile the rows at `next` are fetched.
template <int R, int C>
inline void tile(const float* w, int64_t stride, const float* const* x, int64_t n, float (*out)[8], const float* next) {
  vf acc[R][C] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vf row[R];
    for (int r = 0; r < R; ++r) row[r] = load(w + r * stride + i);
    if (next)
      for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * stride + i);
    for (int c = 0; c < C; ++c) {
      vf value = load(x[c] + i);
      for (int r = 0; r < R; ++r) acc[r][c] += row[r] * value;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float s = sum(acc[r][c]);
      for (int64_t j = i; j < n; ++j) s += w[r * stride + j] * x[c][j];
      out[r][c] = s;
    }
}
template <int R, int C>
inline void tile(const bf16* w, int64_t stride, const float* const* x, int64_t n, float (*out)[8], const bf16* next) {
  vf acc[R][C] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Pair row[R];
    for (int r = 0; r < R; ++r) row[r] = load_pair(w + r * stride + i);
    if (next)
      for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * stride + i);
    for (int c = 0; c < C; ++c) {
      vf even = load(x[c] + i), odd = load(x[c] + i + 16);
      for (int r = 0; r < R; ++r) { acc[r][c] += row[r].even * even; acc[r][c] += row[r].odd * odd; }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float s = sum(acc[r][c]);
      for (int64_t j = i; j < n; ++j) s += widen(w[r * stride + j]) * x[c][j];
      out[r][c] = s;
    }
}

template <int R, class W>
inline void tile_columns(const W* w, int64_t stride, const float* const* x, int c, int64_t n, float (*out)[8], const W* next) {
  switch (c) {
    case 1: return tile<R, 1>(w, stride, x, n, out, next);
    case 2: return tile<R, 2>(w, stride, x, n, out, next);
    case 3: return tile<R, 3>(w, stride, x, n, out, next);
    case 4: return tile<R, 4>(w, stride, x, n, out, next);
    case 5: return tile<R, 5>(w, stride, x, n, out, next);
    default: return tile<R, 6>(w, stride, x, n, out, next);
  }
}

// Products of rows [first, last) of w with `count` inputs in `place` order; emit(row, column, value).
template <class W, class Emit>
void product(const W* w, int64_t stride, int64_t first, int64_t last, const float* const* x, int64_t count, int64_t n,
             Emit emit) {
  thread_local std::vector<float> scratch;
  for (int64_t r = first; r < last; r += 4) {
    int rows = int(std::min<int64_t>(4, last - r));
    const W* block = w + r * stride;
    const W* next = r + 8 <= last ? block + 4 * stride : nullptr;
    const float* wide = nullptr;
    if (sizeof(W) == 2 && count > 6) {  // widen the four rows once for all groups of inputs
      scratch.resize(4 * n);
      for (int i = 0; i < rows; ++i) widen_row(block + i * stride, &scratch[i * n], n);
      wide = scratch.data();
    }
    for (int64_t c = 0; c < count; c += 6) {
      int cols = int(std::min<int64_t>(6, count - c));
      float out[4][8];
      if (rows == 4) {
        if (wide) tile_columns<4, float>(wide, n, x + c, cols, n, out, nullptr);
        else tile_columns<4, W>(block, stride, x + c, cols, n, out, c ? nullptr : next);
      } else {
        for (int i = 0; i < rows; ++i) tile_columns<1, W>(block + i * stride, stride, x + c, cols, n, out + i, nullptr);
      }
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) emit(r + i, c + j, out[i][j]);
    }
  }
}

// FP32 rows of x in `place` order, one pointer a row; `keep` holds converted values where needed.
template <class T>
void rows_of(const T* x, int64_t rows, int64_t n, int64_t stride, std::vector<float>& keep, std::vector<const float*>& at) {
  at.resize(rows);
  if (sizeof(T) == 4) {
    for (int64_t t = 0; t < rows; ++t) at[t] = reinterpret_cast<const float*>(x + t * stride);
    return;
  }
  keep.resize(rows * n);
  for (int64_t t = 0; t < rows; ++t) {
    widen_row(x + t * stride, &keep[t * n], n);
    at[t] = &keep[t * n];
  }
}

template <class T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t outs, int64_t n, int64_t x_stride) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, rows, n, x_stride, keep, at);
  parallel((outs + 3) / 4, 4, worth_sharing(outs * n * int64_t(sizeof(T)), rows), [&](int64_t begin, int64_t end) {
    product(w, n, begin * 4, std::min(outs, end * 4), at.data(), rows, n, [&](int64_t o, int64_t t, float v) {
      narrow(bias ? v + widen(bias[o]) : v, out + t * outs + o);
    });
  });
}

// Every head's own matrix: out[s,h,o] = Σ_i x[s,h,i]·w[h,o,i].
template <class T>
void per_head(const T* x, const T* w, T* out, int64_t S, int64_t H, int64_t I, int64_t O, int64_t x_s, int64_t x_h,
              int64_t w_h) {
  parallel(H, 1, worth_sharing(H * I * O * int64_t(sizeof(T)), S), [&](int64_t begin, int64_t end) {
    std::vector<float> keep;
    std::vector<const float*> at;
    for (int64_t h = begin; h < end; ++h) {
      rows_of(x + h * x_h, S, I, x_s, keep, at);
      product(w + h * w_h, I, 0, O, at.data(), S, I,
              [&](int64_t o, int64_t s, float v) { narrow(v, out + (s * H + h) * O + o); });
    }
  });
}

// Jobs [begin, end), `blocks` of four rows an expert, as ranges of rows within one expert each.
template <class Body>
void each_expert(int64_t begin, int64_t end, int64_t blocks, int64_t rows, Body body) {
  while (begin < end) {
    int64_t u = begin / blocks, stop = std::min(end, (u + 1) * blocks);
    body(u, (begin - u * blocks) * 4, std::min(rows, (stop - u * blocks) * 4));
    begin = stop;
  }
}

// out[t] = Σ_k weight[t][k] · down_e(silu(gate_e x) ⊙ up_e x)
template <class T>
void experts(const T* x, const int64_t* expert, const float* weight, const T* gate_up, const T* down, T* out, int64_t T_,
             int64_t K, int64_t E, int64_t D, int64_t I) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
  if (T_ == 0) return;
  std::vector<std::vector<int64_t>> pairs(E);
  for (int64_t p = 0; p < T_ * K; ++p) pairs[expert[p]].push_back(p);
  std::vector<int64_t> used;
  for (int64_t e = 0; e < E; ++e)
    if (!pairs[e].empty()) used.push_back(e);
  std::vector<std::vector<const float*>> inputs(used.size()), middles(used.size());
  std::vector<float> hidden(T_ * K * I), y(T_ * K * D);
  for (size_t u = 0; u < used.size(); ++u)
    for (int64_t p : pairs[used[u]]) { inputs[u].push_back(at[p / K]); middles[u].push_back(&hidden[p * I]); }
  int64_t i_blocks = (I + 3) / 4, d_blocks = (D + 3) / 4, n_used = int64_t(used.size());
  bool worth = worth_sharing(n_used * 3 * D * I * int64_t(sizeof(T)), T_ * K / n_used);
  parallel(n_used * i_blocks, 4, worth, [&](int64_t begin, int64_t end) {
    std::vector<float> up;
    each_expert(begin, end, i_blocks, I, [&](int64_t u, int64_t first, int64_t last) {
      const T* w = gate_up + used[u] * 2 * I * D;
      const auto& mine = pairs[used[u]];
      int64_t count = int64_t(mine.size());
      up.resize((last - first) * count);
      product(w + I * D, D, first, last, inputs[u].data(), count, D,
              [&](int64_t i, int64_t c, float v) { up[(i - first) * count + c] = rounded<T>(v); });
      product(w, D, first, last, inputs[u].data(), count, D, [&](int64_t i, int64_t c, float v) {
        hidden[mine[c] * I + place<T>(i, I)] = rounded<T>(rounded<T>(silu(rounded<T>(v))) * up[(i - first) * count + c]);
      });
    });
  });
  parallel(n_used * d_blocks, 4, worth, [&](int64_t begin, int64_t end) {
    each_expert(begin, end, d_blocks, D, [&](int64_t u, int64_t first, int64_t last) {
      const auto& mine = pairs[used[u]];
      product(down + used[u] * D * I, I, first, last, middles[u].data(), int64_t(mine.size()), I,
              [&](int64_t d, int64_t c, float v) { y[mine[c] * D + d] = rounded<T>(v); });
    });
  });
  for (int64_t t = 0; t < T_; ++t)
    for (int64_t d = 0; d < D; ++d) {
      float s = 0;
      for (int64_t k = 0; k < K; ++k) s += weight[t * K + k] * y[(t * K + k) * D + d];
      narrow(s, out + t * D + d);
    }
}

// 16 values of a row in their order.
inline vf take(const float* p) { return load(p); }
inline vf take(const bf16* p) {
  float out[LANES];
  for (int i = 0; i < LANES; ++i) out[i] = widen(p[i]);
  return load(out);
}

template <class T>
void swiglu(const T* x, T* out, int64_t rows, int64_t width) {
  parallel(rows, 1, rows * width > 65536, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *gate = x + t * 2 * width, *up = gate + width;
      T* to = out + t * width;
      int64_t i = 0;
      for (; i + LANES <= width; i += LANES) {
        vf g = silu(take(gate + i));
        for (int l = 0; l < LANES; ++l) g[l] = rounded<T>(g[l]);
        g *= take(up + i);
        for (int l = 0; l < LANES; ++l) narrow(g[l], to + i + l);
      }
      for (; i < width; ++i) narrow(rounded<T>(silu(widen(gate[i]))) * widen(up[i]), to + i);
    }
  });
}

// delta may be null; else total = x + delta (rounded) is stored and normed.
template <class T>
void rms_norm(const T* x, const T* delta, const T* w, T* total, T* out, int64_t rows, int64_t n, int64_t stride, float eps) {
  parallel(rows, 8, rows * n > 65536, [&](int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* row = x + t * stride;
    if (delta) {
      for (int64_t i = 0; i < n; ++i) narrow(widen(row[i]) + widen(delta[t * n + i]), total + t * n + i);
      row = total + t * n;
    }
    float s = 0;
    for (int64_t i = 0; i < n; ++i) { float v = widen(row[i]); s += v * v; }
    float scale = 1.0f / std::sqrt(s / float(n) + eps);
    for (int64_t i = 0; i < n; ++i) narrow(widen(w[i]) * rounded<T>(widen(row[i]) * scale), out + t * n + i);
  }
  });
}

// x [T, H, 2·half] strided → out contiguous; rotation [T, 2, half] FP32.
template <class T>
void rotate(const T* x, const float* rotation, T* out, int64_t T_, int64_t H, int64_t half, int64_t t_stride,
            int64_t h_stride, bool interleaved) {
  parallel(T_, 8, T_ * H * half > 65536, [&](int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float *cos = rotation + t * 2 * half, *sin = cos + half;
    for (int64_t h = 0; h < H; ++h) {
      const T* from = x + t * t_stride + h * h_stride;
      T* to = out + (t * H + h) * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        int64_t p = interleaved ? 2 * i : i, q = interleaved ? 2 * i + 1 : i + half;
        float a = widen(from[p]), b = widen(from[q]);
        narrow(a * cos[i] - b * sin[i], to + p);
        narrow(b * cos[i] + a * sin[i], to + q);
      }
    }
  }
  });
}

// Latent cache entries (hadal.ops.mla): the latent normed, the rope key rotated, kept and written to their slots.
template <class T>
void write_latent(const T* kv, const T* norm, const float* rotation, T* cache, const int64_t* slot, T* entry, int64_t T_,
                  int64_t rank, int64_t half, int64_t stride, float eps) {
  int64_t width = rank + 2 * half;
  for (int64_t t = 0; t < T_; ++t) {
    rms_norm<T>(kv + t * stride, nullptr, norm, nullptr, entry + t * width, 1, rank, stride, eps);
    rotate<T>(kv + t * stride + rank, rotation + t * 2 * half, entry + t * width + rank, 1, 1, half, 0, 0, true);
    std::memcpy(cache + slot[t] * width, entry + t * width, width * sizeof(T));
  }
}

// Absorbed queries: [across heads q_nope·W_UK; rotated q_rope].
template <class T>
void absorbed_query(const T* nope, const T* rope, const float* rotation, const T* up, T* out, int64_t S, int64_t H,
                    int64_t n, int64_t L, int64_t half, int64_t n_s, int64_t n_h, int64_t r_s, int64_t r_h, int64_t up_h) {
  int64_t C = L + 2 * half;
  parallel(H, 1, worth_sharing(H * n * L * int64_t(sizeof(T)), S), [&](int64_t begin, int64_t end) {
  std::vector<float> acc(L);
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t s = 0; s < S; ++s) {
      std::fill(acc.begin(), acc.end(), 0.0f);
      const T *x = nope + s * n_s + h * n_h, *w = up + h * up_h;
      for (int64_t i = 0; i < n; ++i) {
        float v = widen(x[i]);
        axpy(v, w + i * L, acc.data(), L);
      }
      T* to = out + (s * H + h) * C;
      for (int64_t o = 0; o < L; ++o) narrow(acc[place<T>(o, L)], to + o);
      rotate<T>(rope + s * r_s + h * r_h, rotation + s * 2 * half, to + L, 1, 1, half, 0, 0, true);
    }
  }
  });
}

// V3/V2 routing of `hadal.ops.gate`: logits are computed here too, in FP32.
template <class T>
void gate(const T* x, const T* w, const float* bias, int64_t* expert, float* weight, int64_t T_, int64_t D, int64_t E,
          int64_t K, int64_t groups, int64_t topk_group, int sigmoid, int sum_of_two, int normalise, float scale) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
  std::vector<float> score(T_ * E);
  product(w, D, 0, E, at.data(), T_, D, [&](int64_t e, int64_t t, float v) { score[t * E + e] = v; });
  const float NONE = -std::numeric_limits<float>::infinity();
  std::vector<float> choice(E), rank(groups);
  int64_t size = E / groups;
  for (int64_t t = 0; t < T_; ++t) {
    float* s = &score[t * E];
    if (sigmoid) {
      for (int64_t e = 0; e < E; ++e) s[e] = 1.0f / (1.0f + std::exp(-s[e]));
    } else {
      float peak = *std::max_element(s, s + E), total = 0;
      for (int64_t e = 0; e < E; ++e) total += s[e] = std::exp(s[e] - peak);
      for (int64_t e = 0; e < E; ++e) s[e] /= total;
    }
    for (int64_t e = 0; e < E; ++e) choice[e] = bias ? s[e] + bias[e] : s[e];
    if (topk_group < groups) {
      for (int64_t g = 0; g < groups; ++g) {
        float first = NONE, second = NONE;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
          if (choice[i] > first) { second = first; first = choice[i]; }
          else if (choice[i] > second) second = choice[i];
        }
        rank[g] = sum_of_two && size > 1 ? first + second : first;
      }
      std::vector<char> kept(groups, 0);
      for (int64_t n = 0; n < topk_group; ++n) {
        int64_t best = -1;
        for (int64_t g = 0; g < groups; ++g)
          if (!kept[g] && (best < 0 || rank[g] > rank[best])) best = g;
        kept[best] = 1;
      }
      for (int64_t e = 0; e < E; ++e)
        if (!kept[e / size]) choice[e] = NONE;
    }
    float total = 0;
    for (int64_t k = 0; k < K; ++k) {
      int64_t best = std::max_element(choice.begin(), choice.end()) - choice.begin();
      expert[t * K + k] = best;
      total += weight[t * K + k] = s[best];
      choice[best] = NONE;
    }
    for (int64_t k = 0; k < K; ++k) weight[t * K + k] *= normalise ? scale / (total + 1e-20f) : scale;
  }
}

// One query token a sequence over pages. Keys are `width` values at row + k_offset, values `v_width` at row + v_offset
// of an entry of `entry` values; heads h·groups/H share a key/value head (MLA: one group, values inside the keys).
// acc[i] += Σ_t p[i][t] · value(t) for a few heads, 64 channels at a time, so that sums stay in registers while the
// values of all tokens pass. `values(t)` are those of token t, the first of a page; `acc` is in `place` order.
template <int N, class T, class Page>
void weighted_values(const float* p, int64_t length, int64_t page, int64_t entry, int64_t width, Page values, float* acc) {
  constexpr int64_t STEP = 64;
  int64_t c = 0;
  for (; c + STEP <= width; c += STEP) {
    vf sum[N][4] = {};
    for (int64_t first = 0; first < length; first += page) {
      const T* v = values(first) + c;
      for (int64_t t = first; t < std::min(length, first + page); ++t, v += entry) {
        vf part[4];
        if constexpr (sizeof(T) == 2) {
          Pair a = load_pair(reinterpret_cast<const bf16*>(v)), b = load_pair(reinterpret_cast<const bf16*>(v) + 32);
          part[0] = a.even, part[1] = a.odd, part[2] = b.even, part[3] = b.odd;
        } else {
          for (int j = 0; j < 4; ++j) part[j] = load(reinterpret_cast<const float*>(v) + 16 * j);
        }
        for (int i = 0; i < N; ++i)
          for (int j = 0; j < 4; ++j) sum[i][j] += p[i * length + t] * part[j];
      }
    }
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < 4; ++j) store(acc + i * width + c + 16 * j, sum[i][j]);
  }
  if (c == width) return;
  for (int i = 0; i < N; ++i) {
    std::fill(acc + i * width + c, acc + (i + 1) * width, 0.0f);
    for (int64_t t = 0; t < length; ++t)
      axpy(p[i * length + t], values(t / page * page) + t % page * entry + c, acc + i * width + c, width - c);
  }
}

template <class T>
void decode(const T* q, const T* cache, const int32_t* table, const int32_t* context, T* out, int64_t S, int64_t H,
            int64_t groups, int64_t width, int64_t v_width, int64_t entry, int64_t v_offset, int64_t page,
            int64_t table_stride, float scale) {
  int64_t per = H / groups, longest = 0;
  for (int64_t s = 0; s < S; ++s) longest = std::max<int64_t>(longest, context[s]);
  // Heads that share a pass over the keys: up to six, fewer while threads would stand idle.
  int64_t threads = Pool::instance().threads(), step = std::min<int64_t>(per, 6);
  while (step > 1 && S * groups * ((per + step - 1) / step) < threads) --step;
  int64_t head_jobs = (per + step - 1) / step, jobs = groups * head_jobs;
  parallel(S * jobs, 1, S * longest * H * width > 65536, [&](int64_t begin, int64_t end) {
    std::vector<float> wide, score, acc;
    std::vector<const float*> at;
    for (int64_t job = begin; job < end; ++job) {
      int64_t s = job / jobs, g = job % jobs / head_jobs, first = job % head_jobs * step, n = std::min(step, per - first);
      int64_t h0 = g * per + first, length = context[s];
      const int32_t* pages = table + s * table_stride;
      wide.resize(n * width), score.resize(n * length), acc.resize(n * v_width), at.resize(n);
      for (int64_t i = 0; i < n; ++i) {
        at[i] = &wide[i * width];
        for (int64_t c = 0; c < width; ++c)
          wide[i * width + place<T>(c, width)] = widen(q[(s * H + h0 + i) * width + c]) * scale;
      }
      for (int64_t t = 0; t < length; t += page)
        product(cache + pages[t / page] * page * entry + g * width, entry, 0, std::min(page, length - t), at.data(), n, width,
                [&](int64_t row, int64_t i, float v) { score[i * length + t + row] = v; });
      for (int64_t i = 0; i < n; ++i) {
        float* p = &score[i * length];
        float peak = *std::max_element(p, p + length), total = 0;
        int64_t t = 0;
        for (; t + LANES <= length; t += LANES) {
          vf e = exponential(load(p + t) - peak);
          store(p + t, e);
          total += sum(e);
        }
        for (; t < length; ++t) total += p[t] = std::exp(p[t] - peak);
        for (t = 0; t < length; ++t) p[t] = rounded<T>(p[t] / total);
      }
      auto values = [&](int64_t t) { return cache + pages[t / page] * page * entry + v_offset + g * v_width; };
      for (int64_t i = 0; i < n;) {
        float* to = &acc[i * v_width];
        const float* p = &score[i * length];
        if (n - i >= 4) weighted_values<4, T>(p, length, page, entry, v_width, values, to), i += 4;
        else if (n - i >= 2) weighted_values<2, T>(p, length, page, entry, v_width, values, to), i += 2;
        else weighted_values<1, T>(p, length, page, entry, v_width, values, to), i += 1;
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < v_width; ++c)
          narrow(acc[i * v_width + place<T>(c, v_width)], out + (s * H + h0 + i) * v_width + c);
    }
  });
}

// --- a whole block for a few tokens: the functions above, one after the other, in one call --------------------------
// Arguments come as one list of numbers and addresses, read in order. A matrix is an address and its kind.
struct Args {
  const int64_t* at;
  int64_t number() { return *at++; }
  template <class P> P* pointer() { return reinterpret_cast<P*>(*at++); }
  Matrix matrix(int64_t outs, int64_t width) {
    const void* data = pointer<const void>();
    return {Kind(number()), data, outs, width};
  }
};

template <class T>
void multiply(const Matrix& m, const T* x, const T* bias, T* out, int64_t rows) {
  if (m.kind == PLAIN) return linear<T>(x, static_cast<const T*>(m.data), bias, out, rows, m.outs, m.width, m.width);
  Product<T> product{m, bias, out};
  packed_linear<T>(x, &product, 1, rows, m.width);
}
// Two matrices on the same x.
template <class T>
void multiply(const Matrix& a, T* out_a, const Matrix& b, T* out_b, const T* x, int64_t rows) {
  if (a.kind == PLAIN || b.kind == PLAIN) {
    multiply<T>(a, x, nullptr, out_a, rows);
    return multiply<T>(b, x, nullptr, out_b, rows);
  }
  Product<T> products[2] = {{a, nullptr, out_a}, {b, nullptr, out_b}};
  packed_linear<T>(x, products, 2, rows, a.width);
}

// x normed [T, width of gate_up] → down(swiglu(gate_up(x))).
template <class T>
void ffn(const Matrix& gate_up, const Matrix& down, const T* x, T* out, int64_t rows) {
  thread_local std::vector<T> pair, middle;
  pair.resize(rows * gate_up.outs), middle.resize(rows * down.width);
  multiply<T>(gate_up, x, nullptr, pair.data(), rows);
  swiglu<T>(pair.data(), middle.data(), rows, down.width);
  multiply<T>(down, middle.data(), nullptr, out, rows);
}

// x normed [T, D] → residual + Σ weight·expert(x) + shared(x); plain weights round where the separate operations do.
template <class T>
void moe_block(Args& a, const T* x, const T* residual, T* out, int64_t T_, int64_t D, float scale) {
  int64_t E = a.number(), K = a.number(), I = a.number(), wide = a.number(), settings[5];
  for (int64_t& s : settings) s = a.number();
  const T* w_gate = a.pointer<const T>();
  const float* bias = a.pointer<const float>();
  Matrix gate_up = a.matrix(2 * I, D), down = a.matrix(D, I), shared_gate_up = a.matrix(2 * wide, D), shared_down = a.matrix(D, wide);
  thread_local std::vector<int64_t> expert;
  thread_local std::vector<float> weight;
  thread_local std::vector<T> routed, shared;
  expert.resize(T_ * K), weight.resize(T_ * K);
  gate<T>(x, w_gate, bias, expert.data(), weight.data(), T_, D, E, K, settings[0], settings[1], int(settings[2]),
          int(settings[3]), int(settings[4]), scale);
  if (gate_up.kind != PLAIN) {
    Experts all{gate_up, down, shared_gate_up, shared_down, E, K};
    return packed_experts<T>(x, expert.data(), weight.data(), all, residual, out, T_);
  }
  routed.resize(T_ * D);
  experts<T>(x, expert.data(), weight.data(), (const T*)gate_up.data, (const T*)down.data, routed.data(), T_, K, E, D, I);
  if (wide) {
    shared.resize(T_ * D);
    ffn<T>(shared_gate_up, shared_down, x, shared.data(), T_);
  }
  for (int64_t i = 0; i < T_ * D; ++i) {
    float v = widen(routed[i]);
    if (wide) v = rounded<T>(v + widen(shared[i]));
    narrow(widen(residual[i]) + v, out + i);
  }
}

// Where a step's tokens lie in the paged cache, one token a sequence.
template <class T>
struct Step {
  int64_t S, D;
  const float* rotation;
  const int64_t* slot;
  const int32_t *table, *context;
  int64_t page, table_stride;
  T* cache;
  float eps, scale;
};

// x normed [S, D] → attention output [S, D]: absorbed MLA on the paged latent cache.
template <class T>
void mla_block(Args& a, const Step<T>& step, const T* x, T* out) {
  int64_t S = step.S, D = step.D, H = a.number(), q_rank = a.number(), rank = a.number(), n = a.number(), R = a.number(), v = a.number();
  int64_t C = rank + R, head = n + R, up = (n + v) * rank;
  Matrix q_a = a.matrix(q_rank, D);
  const T* q_norm = a.pointer<const T>();
  Matrix q_b = a.matrix(H * head, q_rank ? q_rank : D), kv_a = a.matrix(C, D);
  const T *kv_norm = a.pointer<const T>(), *kv_b = a.pointer<const T>();
  Matrix o = a.matrix(D, H * v);
  thread_local std::vector<T> low, low_normed, q, kv, entry, absorbed, z, heads;
  q.resize(S * H * head), kv.resize(S * C), entry.resize(S * C), absorbed.resize(S * H * C), z.resize(S * H * rank),
      heads.resize(S * H * v);
  if (q_rank) {
    low.resize(S * q_rank), low_normed.resize(S * q_rank);
    multiply<T>(q_a, low.data(), kv_a, kv.data(), x, S);
    rms_norm<T>(low.data(), nullptr, q_norm, nullptr, low_normed.data(), S, q_rank, q_rank, step.eps);
    multiply<T>(q_b, low_normed.data(), nullptr, q.data(), S);
  } else {
    multiply<T>(q_b, q.data(), kv_a, kv.data(), x, S);
  }
  write_latent<T>(kv.data(), kv_norm, step.rotation, step.cache, step.slot, entry.data(), S, rank, R / 2, C, step.eps);
  absorbed_query<T>(q.data(), q.data() + n, step.rotation, kv_b, absorbed.data(), S, H, n, rank, R / 2, H * head, head, H * head,
                    head, up);
  decode<T>(absorbed.data(), step.cache, step.table, step.context, z.data(), S, H, 1, C, rank, C, 0, step.page,
            step.table_stride, step.scale);
  per_head<T>(z.data(), kv_b + n * rank, heads.data(), S, H, rank, v, H * rank, rank, up);
  multiply<T>(o, heads.data(), nullptr, out, S);
}

// The same for grouped queries: a cache entry is G keys, then G values.
template <class T>
void gqa_block(Args& a, const Step<T>& step, const T* x, T* out) {
  int64_t S = step.S, D = step.D, H = a.number(), G = a.number(), C = a.number(), wide = (H + 2 * G) * C, entry = 2 * G * C;
  Matrix qkv = a.matrix(wide, D);
  const T* bias = a.pointer<const T>();
  Matrix o = a.matrix(D, H * C);
  thread_local std::vector<T> all, q, heads;
  all.resize(S * wide), q.resize(S * H * C), heads.resize(S * H * C);
  multiply<T>(qkv, x, bias, all.data(), S);
  rotate<T>(all.data(), step.rotation, q.data(), S, H, C / 2, wide, C, false);
  for (int64_t s = 0; s < S; ++s) {
    T* to = step.cache + step.slot[s] * entry;
    rotate<T>(&all[s * wide + H * C], step.rotation + s * C, to, 1, G, C / 2, wide, C, false);
    std::memcpy(to + G * C, &all[s * wide + (H + G) * C], G * C * sizeof(T));
  }
  decode<T>(q.data(), step.cache, step.table, step.context, heads.data(), S, H, G, C, C, entry, G * C, step.page,
            step.table_stride, step.scale);
  multiply<T>(o, heads.data(), nullptr, out, S);
}

// x [S, D] → x + Attention(norm(x)), then that + FFN(norm(that)): one block of hadal/model/block.py.
template <class T>
void block(Args a, const float* f) {
  const T* x = a.pointer<const T>();
  T* out = a.pointer<T>();
  Step<T> step;
  step.S = a.number(), step.D = a.number();
  step.rotation = a.pointer<const float>(), step.slot = a.pointer<const int64_t>();
  step.table = a.pointer<const int32_t>(), step.context = a.pointer<const int32_t>();
  step.page = a.number(), step.table_stride = a.number(), step.cache = a.pointer<T>();
  step.eps = f[0], step.scale = f[1];
  const T *norm = a.pointer<const T>(), *norm_after = a.pointer<const T>();
  int64_t size = step.S * step.D;
  thread_local std::vector<T> normed, attended, total;
  normed.resize(size), attended.resize(size), total.resize(size);
  rms_norm<T>(x, nullptr, norm, nullptr, normed.data(), step.S, step.D, step.D, step.eps);
  if (a.number()) mla_block<T>(a, step, normed.data(), attended.data());
  else gqa_block<T>(a, step, normed.data(), attended.data());
  rms_norm<T>(x, attended.data(), norm_after, total.data(), normed.data(), step.S, step.D, step.D, step.eps);
  if (a.number()) return moe_block<T>(a, normed.data(), total.data(), out, step.S, step.D, f[2]);
  int64_t width = a.number();
  Matrix gate_up = a.matrix(2 * width, step.D), down = a.matrix(step.D, width);
  ffn<T>(gate_up, down, normed.data(), out, step.S);
  for (int64_t i = 0; i < size; ++i) narrow(widen(total[i]) + widen(out[i]), out + i);
}

template <class T>
void moe_entry(Args a, float scale) {
  const T *x = a.pointer<const T>(), *residual = a.pointer<const T>();
  T* out = a.pointer<T>();
  int64_t T_ = a.number(), D = a.number();
  moe_block<T>(a, x, residual, out, T_, D, scale);
}

}  // namespace

extern "C" void set_threads(int threads) { Pool::instance().resize(threads); }

#define BOTH(NAME, PARAMS, ARGS_F, ARGS_H)                    \
  extern "C" void NAME##_f32 PARAMS { typedef float T; ARGS_F; } \
  extern "C" void NAME##_bf16 PARAMS { typedef bf16 T; ARGS_H; }
#define P(x) (T*)(x)

BOTH(linear, (void* x, void* w, void* b, void* out, int64_t rows, int64_t outs, int64_t n, int64_t stride),
     linear<T>(P(x), P(w), P(b), P(out), rows, outs, n, stride), linear<T>(P(x), P(w), P(b), P(out), rows, outs, n, stride))
BOTH(experts, (void* x, int64_t* e, float* wt, void* gu, void* dn, void* out, int64_t t, int64_t k, int64_t E, int64_t d, int64_t i),
     experts<T>(P(x), e, wt, P(gu), P(dn), P(out), t, k, E, d, i), experts<T>(P(x), e, wt, P(gu), P(dn), P(out), t, k, E, d, i))
BOTH(swiglu, (void* x, void* out, int64_t rows, int64_t width), swiglu<T>(P(x), P(out), rows, width),
     swiglu<T>(P(x), P(out), rows, width))
BOTH(rms_norm, (void* x, void* delta, void* w, void* total, void* out, int64_t rows, int64_t n, int64_t stride, float eps),
     rms_norm<T>(P(x), P(delta), P(w), P(total), P(out), rows, n, stride, eps),
     rms_norm<T>(P(x), P(delta), P(w), P(total), P(out), rows, n, stride, eps))
BOTH(rotate, (void* x, float* r, void* out, int64_t t, int64_t h, int64_t half, int64_t ts, int64_t hs, int inter),
     rotate<T>(P(x), r, P(out), t, h, half, ts, hs, inter), rotate<T>(P(x), r, P(out), t, h, half, ts, hs, inter))
BOTH(gate, (void* x, void* w, float* bias, int64_t* e, float* wt, int64_t t, int64_t d, int64_t E, int64_t k, int64_t g,
            int64_t tg, int sig, int two, int norm, float scale),
     gate<T>(P(x), P(w), bias, e, wt, t, d, E, k, g, tg, sig, two, norm, scale),
     gate<T>(P(x), P(w), bias, e, wt, t, d, E, k, g, tg, sig, two, norm, scale))
BOTH(decode, (void* q, void* c, int32_t* table, int32_t* len, void* out, int64_t s, int64_t h, int64_t g, int64_t w, int64_t vw,
              int64_t entry, int64_t vo, int64_t page, int64_t ts, float scale),
     decode<T>(P(q), P(c), table, len, P(out), s, h, g, w, vw, entry, vo, page, ts, scale),
     decode<T>(P(q), P(c), table, len, P(out), s, h, g, w, vw, entry, vo, page, ts, scale))
BOTH(per_head, (void* x, void* w, void* out, int64_t s, int64_t h, int64_t i, int64_t o, int64_t xs, int64_t xh, int64_t wh),
     per_head<T>(P(x), P(w), P(out), s, h, i, o, xs, xh, wh), per_head<T>(P(x), P(w), P(out), s, h, i, o, xs, xh, wh))
BOTH(write_latent, (void* kv, void* norm, float* r, void* cache, int64_t* slot, void* entry, int64_t t, int64_t rank, int64_t half,
                    int64_t stride, float eps),
     write_latent<T>(P(kv), P(norm), r, P(cache), slot, P(entry), t, rank, half, stride, eps),
     write_latent<T>(P(kv), P(norm), r, P(cache), slot, P(entry), t, rank, half, stride, eps))
BOTH(absorbed_query, (void* n, void* q, float* r, void* up, void* out, int64_t s, int64_t h, int64_t w, int64_t l, int64_t half,
                      int64_t ns, int64_t nh, int64_t rs, int64_t rh, int64_t uh),
     absorbed_query<T>(P(n), P(q), r, P(up), P(out), s, h, w, l, half, ns, nh, rs, rh, uh),
     absorbed_query<T>(P(n), P(q), r, P(up), P(out), s, h, w, l, half, ns, nh, rs, rh, uh))
BOTH(moe_block, (int64_t* args, float scale), moe_entry<T>({args}, scale), moe_entry<T>({args}, scale))
BOTH(block, (int64_t* args, float* f), block<T>({args}, f), block<T>({args}, f))
