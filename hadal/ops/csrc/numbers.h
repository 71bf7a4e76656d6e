// Numbers and vectors that the CPU kernels share: FP32 and BF16 storage, FP32 arithmetic in vectors of 16 lanes, which
// the compiler lowers to what the machine has.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hadal {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
struct bf16 { uint16_t bits; };

// Work is counted in weight bytes, times a quarter of the rows once they are several; below this, one thread.
constexpr int64_t PARALLEL_WORK = 384 << 10;
inline bool worth_sharing(int64_t bytes, int64_t rows) { return bytes * std::max<int64_t>(1, rows / 4) > PARALLEL_WORK; }

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
  uint32_t even = (u + 0x7fffu + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  to->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : even);
}
template <class T> inline float rounded(float v) { T t; narrow(v, &t); return widen(t); }

inline vf load(const float* p) { vf v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, 64); }
inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}

// e^x to about 2e-7, between −87 and 88; beyond that the value at the end. NaN gives some finite number.
inline vf exponential(vf x) {
  x = x < -87.0f ? vf{} - 87.0f : x;
  x = x > 88.0f ? vf{} + 88.0f : x;
  vf half = x < 0.0f ? vf{} - 0.5f : vf{} + 0.5f;
  vi n = __builtin_convertvector(x * 1.44269504f + half, vi);
  vf r = x - __builtin_convertvector(n, vf) * 0.693147181f;
  vf p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  vi bits;
  std::memcpy(&bits, &p, 64);
  bits += n << 23;
  std::memcpy(&p, &bits, 64);
  return p;
}
inline vf silu(vf v) { return v / (1.0f + exponential(-v)); }
inline float silu(float v) { return v / (1.0f + std::exp(-v)); }

}  // namespace hadal
