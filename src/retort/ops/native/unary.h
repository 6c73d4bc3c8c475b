// Activations and angles. PyTorch's own kernels compute the last elements of a block with other code
// than the rest, so that an element's bits depend on its place; here they never do.
#pragma once
#include <math.h>

#include "api.h"
#include "elementwise.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

INLINE vf gelu(vf x) { return splat(0.5f) * x * (splat(1.f) + erf(x * splat(0.70710678f))); }

// Hendrycks and Gimpel's approximation, arXiv 1606.08415.
INLINE vf gelu_tanh(vf x) {
  const vf inner = splat(0.79788456f) * fma(splat(0.044715f), x * x * x, x);
  return splat(0.5f) * x * (splat(1.f) + tanh(inner));
}

template <class F>
INLINE vf each(vf x, const F& f) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < W; i++) lanes[i] = f(lanes[i]);
  return load(lanes);
}

template <class F>
INLINE void map(const float* x, float* out, int64_t lo, int64_t hi, const F& f) {
  int64_t i = lo;
  for (; i + W <= hi; i += W) store(out + i, f(load(x + i)));
  if (i < hi) store_part(out + i, f(load_part(x + i, hi - i)), hi - i);
}

static void unary_part(const RetortUnaryCall* c, int64_t lo, int64_t hi) {
  const float* x = c->x;
  float* out = c->out;
  switch (c->op) {
    case RETORT_TANH: return map(x, out, lo, hi, [](vf v) { return tanh(v); });
    case RETORT_SIGMOID: return map(x, out, lo, hi, [](vf v) { return sigmoid(v); });
    case RETORT_SILU: return map(x, out, lo, hi, [](vf v) { return silu(v); });
    case RETORT_GELU: return map(x, out, lo, hi, [](vf v) { return gelu(v); });
    case RETORT_GELU_TANH: return map(x, out, lo, hi, [](vf v) { return gelu_tanh(v); });
    // Angles reach the context's length, so their range reduction is left to the C library.
    case RETORT_COS:
      return map(x, out, lo, hi, [](vf v) { return each(v, [](float a) { return cosf(a); }); });
    case RETORT_SIN:
      return map(x, out, lo, hi, [](vf v) { return each(v, [](float a) { return sinf(a); }); });
  }
}

static void unary(const RetortUnaryCall* c) {
  run_team(useful_threads(c->threads, c->count), [&](const Team& team) {
    unary_part(c, team.begin(c->count), team.end(c->count));
  });
}

}  // namespace RETORT_ISA
