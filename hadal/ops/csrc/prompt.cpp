// Prompts: products of many rows with plain weights, and feed-forward networks made of them. FP32 or BF16 storage, FP32
// arithmetic and intermediate values.
//
// Lanes are tokens. The input is transposed once, in panels of up to PANEL tokens: [panel][channel][token]. A weight
// stays as it is, row by row: DEPTH channels of R rows at a time are copied (BF16 is widened) beside each other, and
// every value is broadcast against a panel's tokens, so that R · V sums stay in registers. Nothing is summed across
// lanes, gate and up of the same channel meet in the same registers, and SwiGLU's output is already the transposed
// input of the next product.
// Its oracles are torch's products (hadal/ops/linear.py, hadal/ops/experts.py).
// Legend: T tokens, D hidden, I width, O outputs, n channels of a product.
#include <vector>

#include "numbers.h"
#include "pool.h"

using namespace hadal;

namespace {

#if defined(__AVX512F__)
constexpr int R = 12, V = 2;  // weight rows and vectors of tokens whose sums fit the registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int R = 6, V = 1;
#else
constexpr int R = 2, V = 1;
#endif
constexpr int64_t PANEL = LANES * V, DEPTH = 256;
constexpr int64_t STRIDE = DEPTH + LANES;    // between copied rows: not a power of two, for the caches' sake
constexpr int64_t GROUPS = 48 / R;           // groups of R rows in a job, while its input's DEPTH channels stay in L2
constexpr int64_t BLOCK = 256;               // tokens of a job
constexpr int64_t CHUNK = 1024;              // tokens that are transposed at once

typedef uint16_t vh __attribute__((vector_size(32)));
inline vf take(const float* p) { return load(p); }
inline vf take(const bf16* p) {
  vh half;
  std::memcpy(&half, p, 32);
  vu words = __builtin_convertvector(half, vu) << 16;
  vf out;
  std::memcpy(&out, &words, 64);
  return out;
}
template <class T> inline vf take(const T* p, int64_t n) {  // the first n, then zeros
  if (n >= LANES) return take(p);
  vf out = {};
  for (int64_t i = 0; i < n; ++i) out[i] = widen(p[i]);
  return out;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
// Swaps the off-diagonal quarters of every 2S × 2S block of 16 rows.
#define EXCHANGE(S, ...)                                                        \
  for (int i = 0; i < LANES; ++i)                                               \
    if (!(i & S)) {                                                             \
      vf a = rows[i], b = rows[i + S];                                          \
      rows[i] = SHUFFLE(a, b, __VA_ARGS__), rows[i + S] = SHUFFLE(b, a, OTHER); \
    }
inline void transpose(vf* rows) {
#define OTHER 17, 1, 19, 3, 21, 5, 23, 7, 25, 9, 27, 11, 29, 13, 31, 15
  EXCHANGE(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#undef OTHER
#define OTHER 18, 19, 2, 3, 22, 23, 6, 7, 26, 27, 10, 11, 30, 31, 14, 15
  EXCHANGE(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#undef OTHER
#define OTHER 20, 21, 22, 23, 4, 5, 6, 7, 28, 29, 30, 31, 12, 13, 14, 15
  EXCHANGE(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#undef OTHER
#define OTHER 24, 25, 26, 27, 28, 29, 30, 31, 8, 9, 10, 11, 12, 13, 14, 15
  EXCHANGE(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#undef OTHER
}

// Room for values whose vectors do not cross cache lines. Contents are lost as it grows.
class Buffer {
 public:
  float* of(int64_t size) {
    if (size > int64_t(keep_.size()) - LANES) keep_.resize(size + LANES);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(keep_.data()) + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<float> keep_;
};

// body(0 … count − 1), each on whichever thread is free.
template <class Body>
void share(int64_t count, Body body) {
  if (count > 0) Pool::instance().run(count, [](void* job, int64_t i) { (*static_cast<Body*>(job))(i); }, &body);
}

inline int64_t panels_of(int64_t tokens) { return (tokens + PANEL - 1) / PANEL; }
inline int64_t lanes_of(int64_t tokens) { return (tokens + LANES - 1) / LANES * LANES; }
inline int64_t panel_lanes(int64_t tokens, int64_t panel) { return std::min(PANEL, lanes_of(tokens) - panel * PANEL); }

// Transposes 16 rows: load(i) for the first `in` (the others are zeros), then save(i, row i) for the first `out`. The
// whole block is written apart: with constant bounds it stays in registers.
template <class Load, class Save>
inline void transpose(int64_t in, int64_t out, Load load, Save save) {
  vf v[LANES];
  if (in >= LANES && out >= LANES) {
    for (int i = 0; i < LANES; ++i) v[i] = load(i);
    transpose(v);
    for (int i = 0; i < LANES; ++i) save(i, v[i]);
    return;
  }
  vf part[LANES] = {};
  for (int i = 0; i < std::min<int64_t>(LANES, in); ++i) part[i] = load(i);
  transpose(part);
  for (int i = 0; i < std::min<int64_t>(LANES, out); ++i) save(i, part[i]);
}

// One panel of the transposed input: to[channel][token], absent tokens are zeros. `row(token)` is a row of n channels.
template <class Row>
void fill_panel(Row row, int64_t tokens, int64_t panel, int64_t n, float* to) {
  int64_t lanes = panel_lanes(tokens, panel);
  for (int64_t h = 0; h < lanes; h += LANES) {
    int64_t first = panel * PANEL + h;
    for (int64_t k = 0; k < n; k += LANES)
      transpose(tokens - first, n - k, [&](int t) { return take(row(first + t) + k, n - k); },
                [&](int j, vf v) { store(to + (k + j) * lanes + h, v); });
  }
}

// c[r][lane] (+)= Σ_k w[r][k] · x[k][lane] for R copied rows and VECTORS vectors of tokens. Meanwhile the rows that are
// copied next are fetched, 16 channels every k; null fetches nothing.
template <int VECTORS, class T>
inline void micro(const float* w, const float* x, int64_t n, float* c, int64_t stride, bool first, const T* const* next) {
  constexpr int64_t LINES = DEPTH / LANES;
  static_assert(R * LINES <= DEPTH, "a line is fetched every k");
  vf acc[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = first ? vf{} : load(c + r * stride + v * LANES);
  auto step = [&](int64_t k) {
    vf in[VECTORS];
    for (int v = 0; v < VECTORS; ++v) in[v] = load(x + k * VECTORS * LANES + v * LANES);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += w[r * STRIDE + k] * in[v];
  };
  int64_t k = 0;
  if (next)
    for (; k < std::min<int64_t>(n, R * LINES); ++k) __builtin_prefetch(next[k / LINES] + k % LINES * LANES), step(k);
  for (; k < n; ++k) step(k);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) store(c + r * stride + v * LANES, acc[r][v]);
}

// Channels [k, k + depth) of a row, in FP32; zeros in place of an absent one.
template <class T>
inline void copy_row(const T* row, int64_t k, int64_t depth, float* to) {
  if (row && depth == DEPTH) {
    for (int64_t i = 0; i < DEPTH; i += LANES) store(to + i, take(row + k + i));
  } else {
    for (int64_t i = 0; i < depth; i += LANES) store(to + i, row ? take(row + k + i, depth - i) : vf{});
  }
}

// c[g·R + r][lane] = w_{g,r} · x_lane: `groups` of R weight rows (null: absent, its sums mean nothing) against panels.
// The R rows at `then`, if not null, are those of the next call.
template <class T>
void product(const T* const* row, int64_t groups, int64_t n, const float* x, int64_t tokens, float* c, const T* const* then) {
  alignas(64) float copy[R * STRIDE];
  int64_t lanes = lanes_of(tokens);
  for (int64_t k = 0; k < n; k += DEPTH) {
    int64_t depth = std::min(DEPTH, n - k);
    for (int64_t g = 0; g < groups; ++g) {
      for (int r = 0; r < R; ++r) copy_row(row[g * R + r], k, depth, copy + r * STRIDE);
      const bool more = g + 1 < groups || k + DEPTH < n;
      const T* const* after = g + 1 < groups ? row + (g + 1) * R : more ? row : then;
      const T* next[R];
      for (int r = 0; r < R && after; ++r)
        next[r] = after[r] ? after[r] + (g + 1 < groups ? k : more ? k + DEPTH : 0) : row[0];
      for (int64_t p = 0; p < panels_of(tokens); ++p) {
        int64_t width = panel_lanes(tokens, p);
        const float* in = x + p * PANEL * n + k * width;
        float* to = c + g * R * lanes + p * PANEL;
        const T* const* fetch = p || !after ? nullptr : next;
        if (width == PANEL) micro<V>(copy, in, depth, to, lanes, k == 0, fetch);
        else micro<1>(copy, in, depth, to, lanes, k == 0, fetch);
      }
    }
  }
}

// Groups of R outputs as jobs: about GROUPS each, and as many for one thread as for the other.
inline int64_t jobs_of(int64_t groups) {
  int64_t threads = Pool::instance().threads(), jobs = (groups + GROUPS - 1) / GROUPS;
  return std::min(groups, (jobs + threads - 1) / threads * threads);
}

// emit(token, output of c, 16 values, how many count) for all of c [outs][lanes].
template <class Emit>
void by_token(const float* c, int64_t outs, int64_t tokens, Emit emit) {
  int64_t lanes = lanes_of(tokens);
  for (int64_t t = 0; t < tokens; t += LANES)
    for (int64_t o = 0; o < outs; o += LANES)
      transpose(outs - o, tokens - t, [&](int i) { return load(c + (o + i) * lanes + t); },
                [&](int i, vf v) { emit(t + i, o, v, std::min<int64_t>(LANES, outs - o)); });
}

inline void put(vf v, int64_t n, float* to) {
  if (n == LANES) return store(to, v);
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}
inline void put(vf v, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; ++i) narrow(v[i], to + i);
}

// out [T, O] = x·Wᵀ + b; rows of x lie `stride` apart.
template <class T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t T_, int64_t O, int64_t n, int64_t stride) {
  static thread_local Buffer wide;
  int64_t all = (O + R - 1) / R, jobs = jobs_of(all);
  for (int64_t first = 0; first < T_; first += CHUNK) {
    int64_t tokens = std::min(CHUNK, T_ - first), blocks = (tokens + BLOCK - 1) / BLOCK;
    float* input = wide.of(panels_of(tokens) * PANEL * n);
    share(panels_of(tokens), [&](int64_t p) {
      fill_panel([&](int64_t t) { return x + (first + t) * stride; }, tokens, p, n, input + p * PANEL * n);
    });
    share(blocks * jobs, [&](int64_t job) {
      int64_t b = job / jobs, begin = job % jobs * all / jobs, end = (job % jobs + 1) * all / jobs;
      int64_t here = std::min(BLOCK, tokens - b * BLOCK), o = begin * R, outs = std::min(O, end * R) - o;
      static thread_local Buffer sums;
      static thread_local std::vector<const T*> row;
      float* c = sums.of((end - begin) * R * lanes_of(here));
      row.resize((end - begin) * R);
      for (int64_t i = 0; i < int64_t(row.size()); ++i) row[i] = i < outs ? w + (o + i) * n : nullptr;
      product<T>(row.data(), end - begin, n, input + b * BLOCK * n, here, c, nullptr);
      by_token(c, outs, here, [&](int64_t t, int64_t i, vf v, int64_t count) {
        if (bias) v += take(bias + o + i, count);
        put(v, count, out + (first + b * BLOCK + t) * O + o + i);
      });
    });
  }
}

// Up to BLOCK tokens that go through the same network. Its hidden values [I][token], in panels, begin at `hidden`.
template <class T>
struct Segment {
  const T *gate_up, *down;
  int64_t width, hidden;
  std::vector<int64_t> token;
  std::vector<float> weight;
};

// hidden[i][token] = silu(gate_i · x) · (up_i · x) for i in [begin, end)
template <class T>
void hidden_values(const Segment<T>& s, const T* x, int64_t D, int64_t begin, int64_t end, float* hidden) {
  constexpr int HALF = R / 2;
  static thread_local Buffer wide, sums;
  static thread_local std::vector<const T*> row;
  int64_t tokens = int64_t(s.token.size()), lanes = lanes_of(tokens), groups = (end - begin + HALF - 1) / HALF;
  float *input = wide.of(panels_of(tokens) * PANEL * D), *c = sums.of(GROUPS * R * lanes);
  row.resize(groups * R);
  for (int64_t p = 0; p < panels_of(tokens); ++p)
    fill_panel([&](int64_t t) { return x + s.token[t] * D; }, tokens, p, D, input + p * PANEL * D);
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < R; ++r) {
      int64_t i = begin + g * HALF + r % HALF;
      row[g * R + r] = i < end ? s.gate_up + (i + (r < HALF ? 0 : s.width)) * D : nullptr;
    }
  for (int64_t first = 0; first < groups; first += GROUPS) {
    const T* const* then = first + GROUPS < groups ? &row[(first + GROUPS) * R] : nullptr;
    product(&row[first * R], std::min(GROUPS, groups - first), D, input, tokens, c, then);
    for (int64_t i = begin + first * HALF; i < std::min(end, begin + (first + GROUPS) * HALF); ++i) {
      int64_t at = i - begin - first * HALF;
      const float *gate = &c[(at / HALF * R + at % HALF) * lanes], *up = gate + HALF * lanes;
      for (int64_t t = 0; t < lanes; t += LANES) {
        int64_t p = t / PANEL;
        store(hidden + s.hidden + p * PANEL * s.width + i * panel_lanes(tokens, p) + t % PANEL,
              silu(load(gate + t)) * load(up + t));
      }
    }
  }
}

// out [T, D] = Σ over segments of weight · down(silu(gate·x) ⊙ up·x), + residual if not null.
template <class T>
void feed_forward(std::vector<Segment<T>>& segments, const T* x, const T* residual, T* out, int64_t tokens, int64_t D) {
  static thread_local Buffer middle;
  int64_t size = 0, work = 0;
  for (Segment<T>& s : segments) {
    int64_t lanes = lanes_of(int64_t(s.token.size()));
    s.hidden = size, size += panels_of(int64_t(s.token.size())) * PANEL * s.width, work += lanes * s.width;
  }
  float* hidden = middle.of(size);
  struct Job { int64_t segment, begin, end; };
  std::vector<Job> jobs;
  int64_t target = std::max<int64_t>(1, work / (Pool::instance().threads() * 8));
  for (int64_t s = 0; s < int64_t(segments.size()); ++s) {
    int64_t width = segments[s].width, own = lanes_of(int64_t(segments[s].token.size())) * width;
    int64_t pieces = std::max<int64_t>(1, std::min((own + target / 2) / target, width / 64));
    for (int64_t i = 0; i < pieces; ++i) jobs.push_back({s, i * width / pieces, (i + 1) * width / pieces});
  }
  share(int64_t(jobs.size()), [&](int64_t i) {
    hidden_values(segments[jobs[i].segment], x, D, jobs[i].begin, jobs[i].end, hidden);
  });
  int64_t all = (D + R - 1) / R, parts = jobs_of(all);
  share(parts, [&](int64_t job) {  // every token's outputs [first, first + outs): nobody else adds to them
    int64_t begin = job * all / parts, end = (job + 1) * all / parts, first = begin * R, outs = std::min(D, end * R) - first;
    static thread_local Buffer sums, totals;
    static thread_local std::vector<const T*> row;
    int64_t wide = ((end - begin) * R + LANES - 1) / LANES * LANES;
    float *c = sums.of((end - begin) * R * BLOCK), *total = totals.of(tokens * wide);
    std::fill(total, total + tokens * wide, 0.0f);
    row.resize((end - begin) * R);
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment<T>& s = segments[i];
      auto down = [&](const Segment<T>& s, int64_t o) { return o < outs ? s.down + (first + o) * s.width : nullptr; };
      for (int64_t o = 0; o < int64_t(row.size()); ++o) row[o] = down(s, o);
      const T* then[R];
      for (int r = 0; r < R && i + 1 < segments.size(); ++r) then[r] = down(segments[i + 1], r);
      int64_t here = int64_t(s.token.size());
      product(row.data(), end - begin, s.width, hidden + s.hidden, here, c, i + 1 < segments.size() ? then : nullptr);
      by_token(c, outs, here, [&](int64_t t, int64_t i, vf v, int64_t) {
        float* to = &total[s.token[t] * wide + i];
        store(to, load(to) + v * s.weight[t]);
      });
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < outs; i += LANES) {
        int64_t count = std::min<int64_t>(LANES, outs - i), at = t * D + first + i;
        vf v = load(&total[t * wide + i]);
        if (residual) v += take(residual + at, count);
        put(v, count, out + at);
      }
  });
}

// Networks for CHUNK tokens at a time. p: x, expert, weight, gate_up, down, dense gate_up, dense down, residual, out. d: T, K, E, D, I, dense I: a dense network (0: none) is one that every token goes through.
template <class T>
void networks(void** p, const int64_t* d) {
  const T *x = (T*)p[0], *gate_up = (T*)p[3], *down = (T*)p[4];
  const int64_t *expert = (int64_t*)p[1], K = d[1], E = d[2], D = d[3], I = d[4], dense = d[5];
  const float* weight = (float*)p[2];
  for (int64_t first = 0; first < d[0]; first += CHUNK) {
    int64_t tokens = std::min(CHUNK, d[0] - first);
    std::vector<Segment<T>> segments;
    std::vector<int64_t> open(E + 1, -1);  // the segment that an expert fills
    auto send = [&](int64_t t, int64_t e, float by) {
      if (open[e] < 0 || segments[open[e]].token.size() == size_t(BLOCK)) {
        open[e] = int64_t(segments.size());
        if (e == E) segments.push_back({(T*)p[5], (T*)p[6], dense, 0, {}, {}});
        else segments.push_back({gate_up + e * 2 * I * D, down + e * D * I, I, 0, {}, {}});
      }
      segments[open[e]].token.push_back(t), segments[open[e]].weight.push_back(by);
    };
    for (int64_t t = 0; t < tokens; ++t) {
      if (dense) send(t, E, 1.0f);
      for (int64_t k = 0; k < K; ++k) send(t, expert[(first + t) * K + k], weight[(first + t) * K + k]);
    }
    feed_forward(segments, x + first * D, p[7] ? (T*)p[7] + first * D : nullptr, (T*)p[8] + first * D, tokens, D);
  }
}

}  // namespace

extern "C" void prompt_linear_f32(void* x, void* w, void* b, void* out, int64_t rows, int64_t outs, int64_t n, int64_t stride) {
  linear<float>((float*)x, (float*)w, (float*)b, (float*)out, rows, outs, n, stride);
}
extern "C" void prompt_linear_bf16(void* x, void* w, void* b, void* out, int64_t rows, int64_t outs, int64_t n, int64_t stride) {
  linear<bf16>((bf16*)x, (bf16*)w, (bf16*)b, (bf16*)out, rows, outs, n, stride);
}
extern "C" void prompt_networks_f32(void** p, int64_t* d) { networks<float>(p, d); }
extern "C" void prompt_networks_bf16(void** p, int64_t* d) { networks<bf16>(p, d); }
