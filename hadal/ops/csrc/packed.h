// Products with packed weights (hadal/ops/packed.py) on CPU, as the kernels of packed.cpp lay them out.
#pragma once
#include "numbers.h"

namespace hadal {

enum Kind : int64_t { PLAIN = 0, INT8 = 1, INT4 = 2, FP8 = 3 };

// A weight [outs, width], or a stack of them: plain (row-major, in the type of the activations) or in packed tiles.
struct Matrix {
  Kind kind;
  const void* data;
  int64_t outs, width;
};

// Bytes of one tile of 32 outputs, and of a whole matrix.
int64_t tile_bytes(Kind kind, int64_t width);
int64_t matrix_bytes(Kind kind, int64_t outs, int64_t width);

// out [rows, outs] = x·Wᵀ (+ bias): several matrices on the same x, quantised once.
template <class T>
struct Product { Matrix matrix; const T* bias; T* out; };
template <class T>
void packed_linear(const T* x, const Product<T>* products, int count, int64_t rows, int64_t stride);

// residual + Σ_k weight_k · expert_k(x) + shared(x): residual and the shared matrices may be absent. T tokens.
struct Experts {
  Matrix gate_up, down;                // of one expert: gate_up [2I, D], down [D, I]
  Matrix shared_gate_up, shared_down;  // data null without them
  int64_t count, per_token;
};
template <class T>
void packed_experts(const T* x, const int64_t* expert, const float* weight, const Experts& experts, const T* residual, T* out,
                    int64_t tokens);

}  // namespace hadal
