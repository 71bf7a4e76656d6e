// CPU kernels for inference: matrix products of few rows (where reading the weights is the cost), routed experts,
// paged decode attention, norms, rotation, routing. FP32 or BF16 storage, FP32 arithmetic.
//
// Portable C++17 with GCC/Clang vector extensions: the compiler lowers 16-lane vectors to what the machine has.
// Each function's oracle is the torch reference in the Python file of the same operation. Parallel regions use the
// OpenMP runtime that torch has loaded; small work stays on the calling thread.
// Legend: T tokens, S sequences, H heads, G key/value heads, E experts, K experts per token, D hidden, I width.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16;
// Work is counted in weight bytes, times a quarter of the rows once they are several. Below this, one thread: waking
// the others costs microseconds on an idle machine and milliseconds on a busy one.
constexpr int64_t PARALLEL_WORK = 3 << 19;
inline bool worth_sharing(int64_t bytes, int64_t rows) { return bytes * std::max<int64_t>(1, rows / 4) > PARALLEL_WORK; }
typedef float vf __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(64)));
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
  if ((u & 0x7fffffffu) > 0x7f800000u) { to->bits = uint16_t((u >> 16) | 0x40); return; }
  to->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
template <class T> inline float rounded(float v) { T t; narrow(v, &t); return widen(t); }

inline vf load(const float* p) { vf v; std::memcpy(&v, p, 64); return v; }
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, 32);
  vu u = __builtin_convertvector(h, vu) << 16;
  vf v;
  std::memcpy(&v, &u, 64);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, 64); }
inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}

template <class W> float dot(const W* w, const float* x, int64_t n) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) { a += load(w + i) * load(x + i); b += load(w + i + LANES) * load(x + i + LANES); }
  for (; i + LANES <= n; i += LANES) a += load(w + i) * load(x + i);
  float s = sum(a + b);
  for (; i < n; ++i) s += widen(w[i]) * x[i];
  return s;
}

// out[r][c] = w_r · x_c for R weight rows and C inputs.
template <class W, int R, int C>
inline void tile(const W* w, int64_t stride, const float* const* x, int64_t n, float (*out)[8]) {
  vf acc[R][C] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vf row[R];
    for (int r = 0; r < R; ++r) row[r] = load(w + r * stride + i);
    for (int c = 0; c < C; ++c) {
      vf value = load(x[c] + i);
      for (int r = 0; r < R; ++r) acc[r][c] += row[r] * value;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float s = sum(acc[r][c]);
      for (int64_t j = i; j < n; ++j) s += widen(w[r * stride + j]) * x[c][j];
      out[r][c] = s;
    }
}

template <class W, int R>
inline void tile_columns(const W* w, int64_t stride, const float* const* x, int c, int64_t n, float (*out)[8]) {
  switch (c) {
    case 1: return tile<W, R, 1>(w, stride, x, n, out);
    case 2: return tile<W, R, 2>(w, stride, x, n, out);
    case 3: return tile<W, R, 3>(w, stride, x, n, out);
    case 4: return tile<W, R, 4>(w, stride, x, n, out);
    case 5: return tile<W, R, 5>(w, stride, x, n, out);
    default: return tile<W, R, 6>(w, stride, x, n, out);
  }
}

// Products of rows [first, last) of w with `count` inputs; emit(row, column, value).
template <class W, class Emit>
void product(const W* w, int64_t stride, int64_t first, int64_t last, const float* const* x, int64_t count, int64_t n,
             std::vector<float>& scratch, Emit emit) {
  for (int64_t r = first; r < last; r += 4) {
    int rows = int(std::min<int64_t>(4, last - r));
    const W* block = w + r * stride;
    const float* wide = nullptr;
    if (sizeof(W) == 2 && count > 6) {  // convert the four rows once for all groups of inputs
      scratch.resize(4 * n);
      for (int i = 0; i < rows; ++i) {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) store(&scratch[i * n + j], load(block + i * stride + j));
        for (; j < n; ++j) scratch[i * n + j] = widen(block[i * stride + j]);
      }
      wide = scratch.data();
    }
    for (int64_t c = 0; c < count; c += 6) {
      int cols = int(std::min<int64_t>(6, count - c));
      float out[4][8];
      if (rows == 4) {
        if (wide) tile_columns<float, 4>(wide, n, x + c, cols, n, out);
        else tile_columns<W, 4>(block, stride, x + c, cols, n, out);
      } else {
        for (int i = 0; i < rows; ++i) tile_columns<W, 1>(block + i * stride, stride, x + c, cols, n, out + i);
      }
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) emit(r + i, c + j, out[i][j]);
    }
  }
}

// FP32 rows of x, one pointer a row; `store` holds converted values where needed.
template <class T>
void rows_of(const T* x, int64_t rows, int64_t n, int64_t stride, std::vector<float>& keep, std::vector<const float*>& at) {
  at.resize(rows);
  if (sizeof(T) == 4) {
    for (int64_t t = 0; t < rows; ++t) at[t] = reinterpret_cast<const float*>(x + t * stride);
    return;
  }
  keep.resize(rows * n);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < n; ++i) keep[t * n + i] = widen(x[t * stride + i]);
    at[t] = &keep[t * n];
  }
}

template <class T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t outs, int64_t n, int64_t x_stride) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, rows, n, x_stride, keep, at);
  int64_t blocks = (outs + 3) / 4;
#pragma omp parallel if (worth_sharing(outs * n * int64_t(sizeof(T)), rows))
  {
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      product(w, n, b * 4, std::min(outs, b * 4 + 4), at.data(), rows, n, scratch, [&](int64_t o, int64_t t, float v) {
        narrow(bias ? v + widen(bias[o]) : v, out + t * outs + o);
      });
  }
}

// Every head's own matrix: out[s,h,o] = Σ_i x[s,h,i]·w[h,o,i].
template <class T>
void per_head(const T* x, const T* w, T* out, int64_t S, int64_t H, int64_t I, int64_t O, int64_t x_s, int64_t x_h,
              int64_t w_h) {
#pragma omp parallel if (worth_sharing(H * I * O * int64_t(sizeof(T)), S))
  {
    std::vector<float> keep, scratch;
    std::vector<const float*> at;
#pragma omp for schedule(static)
    for (int64_t h = 0; h < H; ++h) {
      rows_of(x + h * x_h, S, I, x_s, keep, at);
      product(w + h * w_h, I, 0, O, at.data(), S, I, scratch,
              [&](int64_t o, int64_t s, float v) { narrow(v, out + (s * H + h) * O + o); });
    }
  }
}

inline float silu(float v) { return v / (1.0f + std::exp(-v)); }

// out[t] = Σ_k weight[t][k] · down_e(silu(gate_e x) ⊙ up_e x)
template <class T>
void experts(const T* x, const int64_t* expert, const float* weight, const T* gate_up, const T* down, T* out, int64_t T_,
             int64_t K, int64_t E, int64_t D, int64_t I) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
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
#pragma omp parallel if (worth_sharing(n_used * 3 * D * I * int64_t(sizeof(T)), T_ * K / n_used))
  {
    std::vector<float> scratch, up;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < n_used * i_blocks; ++job) {
      int64_t u = job / i_blocks, first = (job % i_blocks) * 4, last = std::min(I, first + 4);
      const T* w = gate_up + used[u] * 2 * I * D;
      const auto& mine = pairs[used[u]];
      int64_t count = int64_t(mine.size());
      up.resize(4 * count);
      product(w + I * D, D, first, last, inputs[u].data(), count, D, scratch,
              [&](int64_t i, int64_t c, float v) { up[(i - first) * count + c] = rounded<T>(v); });
      product(w, D, first, last, inputs[u].data(), count, D, scratch, [&](int64_t i, int64_t c, float v) {
        hidden[mine[c] * I + i] = rounded<T>(rounded<T>(silu(rounded<T>(v))) * up[(i - first) * count + c]);
      });
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < n_used * d_blocks; ++job) {
      int64_t u = job / d_blocks, first = (job % d_blocks) * 4, last = std::min(D, first + 4);
      const auto& mine = pairs[used[u]];
      product(down + used[u] * D * I, I, first, last, middles[u].data(), int64_t(mine.size()), I, scratch,
              [&](int64_t d, int64_t c, float v) { y[mine[c] * D + d] = rounded<T>(v); });
    }
  }
  for (int64_t t = 0; t < T_; ++t)
    for (int64_t d = 0; d < D; ++d) {
      float s = 0;
      for (int64_t k = 0; k < K; ++k) s += weight[t * K + k] * y[(t * K + k) * D + d];
      narrow(s, out + t * D + d);
    }
}

template <class T>
void swiglu(const T* x, T* out, int64_t rows, int64_t width) {
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < width; ++i) {
      float g = rounded<T>(silu(widen(x[t * 2 * width + i])));
      narrow(g * widen(x[t * 2 * width + width + i]), out + t * width + i);
    }
}

// delta may be null; else total = x + delta (rounded) is stored and normed.
template <class T>
void rms_norm(const T* x, const T* delta, const T* w, T* total, T* out, int64_t rows, int64_t n, int64_t stride, float eps) {
#pragma omp parallel for schedule(static) if (rows * n > 65536)
  for (int64_t t = 0; t < rows; ++t) {
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
}

// x [T, H, 2·half] strided → out contiguous; rotation [T, 2, half] FP32.
template <class T>
void rotate(const T* x, const float* rotation, T* out, int64_t T_, int64_t H, int64_t half, int64_t t_stride,
            int64_t h_stride, bool interleaved) {
#pragma omp parallel for schedule(static) if (T_ * H * half > 65536)
  for (int64_t t = 0; t < T_; ++t) {
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
#pragma omp parallel for schedule(static) if (worth_sharing(H * n * L * int64_t(sizeof(T)), S))
  for (int64_t h = 0; h < H; ++h) {
    std::vector<float> acc(L);
    for (int64_t s = 0; s < S; ++s) {
      std::fill(acc.begin(), acc.end(), 0.0f);
      const T *x = nope + s * n_s + h * n_h, *w = up + h * up_h;
      for (int64_t i = 0; i < n; ++i) {
        float v = widen(x[i]);
        int64_t o = 0;
        for (; o + LANES <= L; o += LANES) store(&acc[o], load(&acc[o]) + v * load(w + i * L + o));
        for (; o < L; ++o) acc[o] += v * widen(w[i * L + o]);
      }
      T* to = out + (s * H + h) * C;
      for (int64_t o = 0; o < L; ++o) narrow(acc[o], to + o);
      rotate<T>(rope + s * r_s + h * r_h, rotation + s * 2 * half, to + L, 1, 1, half, 0, 0, true);
    }
  }
}

// V3/V2 routing of `hadal.ops.gate`: logits are computed here too, in FP32.
template <class T>
void gate(const T* x, const T* w, const float* bias, int64_t* expert, float* weight, int64_t T_, int64_t D, int64_t E,
          int64_t K, int64_t groups, int64_t topk_group, int sigmoid, int sum_of_two, int normalise, float scale) {
  std::vector<float> keep;
  std::vector<const float*> at;
  rows_of(x, T_, D, D, keep, at);
  std::vector<float> score(T_ * E), scratch;
  product(w, D, 0, E, at.data(), T_, D, scratch, [&](int64_t e, int64_t t, float v) { score[t * E + e] = v; });
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
template <class T>
void decode(const T* q, const T* cache, const int32_t* table, const int32_t* context, T* out, int64_t S, int64_t H,
            int64_t groups, int64_t width, int64_t v_width, int64_t entry, int64_t v_offset, int64_t page,
            int64_t table_stride, float scale) {
  int64_t per = H / groups, longest = 0;
  for (int64_t s = 0; s < S; ++s) longest = std::max<int64_t>(longest, context[s]);
  int64_t step = groups > 1 ? per : std::max<int64_t>(1, std::min<int64_t>(4, per));  // heads that share one pass over keys
  int64_t head_jobs = H / step + (H % step ? 1 : 0);
#pragma omp parallel if (S * longest * H * width > 1048576)
  {
    std::vector<float> wide, score, acc;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < S * head_jobs; ++job) {
      int64_t s = job / head_jobs, h0 = (job % head_jobs) * step, n = std::min(step, H - h0);
      int64_t length = context[s], g = h0 / per;
      wide.resize(n * width);
      for (int64_t i = 0; i < n * width; ++i) wide[i] = widen(q[(s * H + h0) * width + i]) * scale;
      score.resize(n * length);
      for (int64_t t = 0; t < length; ++t) {
        int64_t at = table[s * table_stride + t / page] * page + t % page;
        const T* key = cache + at * entry + g * width;
        for (int64_t i = 0; i < n; ++i) score[i * length + t] = dot(key, &wide[i * width], width);
      }
      for (int64_t i = 0; i < n; ++i) {
        float* p = &score[i * length];
        float peak = *std::max_element(p, p + length), total = 0;
        for (int64_t t = 0; t < length; ++t) total += p[t] = std::exp(p[t] - peak);
        for (int64_t t = 0; t < length; ++t) p[t] = rounded<T>(p[t] / total);
      }
      acc.assign(n * v_width, 0.0f);
      for (int64_t t = 0; t < length; ++t) {
        int64_t at = table[s * table_stride + t / page] * page + t % page;
        const T* value = cache + at * entry + v_offset + g * v_width;
        for (int64_t i = 0; i < n; ++i) {
          float p = score[i * length + t];
          float* a = &acc[i * v_width];
          int64_t j = 0;
          for (; j + LANES <= v_width; j += LANES) store(a + j, load(a + j) + p * load(value + j));
          for (; j < v_width; ++j) a[j] += p * widen(value[j]);
        }
      }
      for (int64_t i = 0; i < n * v_width; ++i) narrow(acc[i], out + (s * H + h0) * v_width + i);
    }
  }
}

}  // namespace

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
