// Activations, angles, and rotary positions of neighbouring pairs. PyTorch's own kernels compute the
// last elements of a block with other code than the rest, so that an element's bits depend on its
// place; here they never do.
#pragma once
#include <math.h>

#include "api.h"
#include "elementwise.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

// log(x) for normal x > 0, about 1 ulp. Polynomial after Cephes' logf.
INLINE vf log(vf x) {
  const vi bits = (vi)x;
  vi e = (bits >> 23) - 126;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const vi low = (vi)(m < splat(0.707106781f));   // -1 where it holds
  e = e + low;
  m = m + (vf)((vi)m & low) - splat(1.f);
  const vf n = __builtin_convertvector(e, vf), s = m * m;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  p = p * m * s;
  p = fma(n, splat(-2.12194440e-4f), p);
  p = fma(s, splat(-0.5f), p);
  return fma(n, splat(0.693359375f), p + m);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|); the rounding of 1 + y is divided out again (Kahan).
INLINE vf softplus(vf x) {
  const vf y = exp(x < vf{} ? x : -x), w = splat(1.f) + y;
  const vf gap = w - splat(1.f);
  const vf l = gap > vf{} ? log(w) * (y / (gap > vf{} ? gap : w)) : y;
  return (x > vf{} ? x : vf{}) + l;
}

INLINE vf gelu(vf x) { return splat(0.5f) * x * (splat(1.f) + erf(x * splat(0.70710678f))); }

// Hendrycks and Gimpel's approximation, arXiv 1606.08415.
INLINE vf gelu_tanh(vf x) {
  const vf inner = splat(0.79788456f) * fma(splat(0.044715f), x * x * x, x);
  return splat(0.5f) * x * (splat(1.f) + tanh(inner));
}

INLINE vf each(vf x, float (*f)(float)) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < W; i++) lanes[i] = f(lanes[i]);
  return load(lanes);
}

template <class F>
INLINE void apply_row(const float* x, const float* other, int64_t n, float* out, const F& f) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t part = least(W, n - i);
    const bool full = part == W;
    vf v = f(full ? load(x + i) : load_part(x + i, part));
    if (other) v = v * (full ? load(other + i) : load_part(other + i, part));
    if (full)
      store(out + i, v);
    else
      store_part(out + i, v, part);
  }
}

static void activation_row(int64_t op, const float* x, const float* other, int64_t n,
                           float* out) {
  switch (op) {
    case RETORT_TANH: return apply_row(x, other, n, out, [](vf v) { return tanh(v); });
    case RETORT_SIGMOID: return apply_row(x, other, n, out, [](vf v) { return sigmoid(v); });
    case RETORT_SILU: return apply_row(x, other, n, out, [](vf v) { return silu(v); });
    case RETORT_GELU: return apply_row(x, other, n, out, [](vf v) { return gelu(v); });
    case RETORT_GELU_TANH: return apply_row(x, other, n, out, [](vf v) { return gelu_tanh(v); });
    case RETORT_SOFTPLUS: return apply_row(x, other, n, out, [](vf v) { return softplus(v); });
    // Angles reach the context's length, so their range reduction is left to the C library.
    case RETORT_COS: return apply_row(x, other, n, out, [](vf v) { return each(v, cosf); });
    case RETORT_SIN: return apply_row(x, other, n, out, [](vf v) { return each(v, sinf); });
  }
}

static void activation(const RetortActivationCall* c) {
  constexpr int64_t SPAN = 4096;  // long rows are cut, so that threads share them
  const int64_t cuts = ceil_div(c->n, SPAN), parts = c->m * cuts;
  run_team(useful_threads(c->threads, c->m * c->n), [&](const Team& team) {
    for (int64_t p = team.begin(parts); p < team.end(parts); p++) {
      const int64_t r = p / cuts, i = p % cuts * SPAN;
      const float* other = c->other ? c->other + r * c->ldother + i : nullptr;
      activation_row(c->op, c->x + r * c->ldx + i, other, least(SPAN, c->n - i),
                     c->out + r * c->n + i);
    }
  });
}

// Pairs (2i, 2i + 1) of a head turned by angle i; `out` is another row than `x`.
INLINE void rotate_pairs_head(const float* __restrict x, const float* cs, const float* sn,
                              int64_t half, float* __restrict out) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cs[i] - b * sn[i];
    out[2 * i + 1] = b * cs[i] + a * sn[i];
  }
}

static void rotate_pairs(const RetortRotaryCall* c) {
  const int64_t half = c->width / 2;
  run_team(useful_threads(c->threads, c->total * c->heads * c->width), [&](const Team& team) {
    for (int64_t t = team.begin(c->total); t < team.end(c->total); t++)
      for (int64_t h = 0; h < c->heads; h++)
        rotate_pairs_head(c->x + t * c->x_token + h * c->x_head, c->cos + t * half,
                          c->sin + t * half, half, c->out + (t * c->heads + h) * c->width);
  });
}

}  // namespace RETORT_ISA
