// Single passes over rows: RMSNorm (with the residual sum before it), rotary positions, SiLU gates.
#pragma once
#include <math.h>

#include "api.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int64_t GRAIN = 16384;  // elements below which a second thread costs more than it saves

INLINE int useful_threads(int threads, int64_t elements) {
  return (int)least(threads, most(1, elements / GRAIN));
}

// Σ x² in W lanes of four interleaved sums: an order fixed by n alone.
INLINE float square_sum(const float* x, int64_t n) {
  vf s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const vf v = load(x + i + c * W);
      s[c] = fma(v, v, s[c]);
    }
  for (; i < n; i += W) {
    const vf v = i + W <= n ? load(x + i) : load_part(x + i, n - i);
    s[0] = fma(v, v, s[0]);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

INLINE void norm_row(const RetortNormCall* c, int64_t row) {
  const int64_t n = c->n;
  const float* x = c->x + row * c->ldx;
  float* out = c->out + row * n;
  if (c->residual) {
    float* total = c->sum + row * n;
    for (int64_t i = 0; i < n; i++) total[i] = x[i] + c->residual[row * c->ldr + i];
    x = total;
  }
  const float scale = 1.f / __builtin_sqrtf(square_sum(x, n) / (float)n + c->eps);
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store(out + i, (splat(c->offset) + load(c->weight + i)) * (load(x + i) * splat(scale)));
  for (; i < n; i++) out[i] = (c->offset + c->weight[i]) * (x[i] * scale);
}

static void norm(const RetortNormCall* c) {
  run_team(useful_threads(c->threads, c->m * c->n), [&](const Team& team) {
    for (int64_t r = team.begin(c->m); r < team.end(c->m); r++) norm_row(c, r);
  });
}

// x cos + rotate_half(x) sin: pairs (i, i + rotated / 2) of each head; the rest is copied.
static void rotary_token(const RetortRotaryCall* c, int64_t token) {
  const int64_t half = c->rotated / 2;
  const float *cs = c->cos + token * c->rotated, *sn = c->sin + token * c->rotated;
  for (int64_t h = 0; h < c->heads; h++) {
    const float* x = c->x + token * c->x_token + h * c->x_head;
    float* out = c->out + (token * c->heads + h) * c->width;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
      const vf a = load(x + i), b = load(x + half + i);
      store(out + i, a * load(cs + i) - b * load(sn + i));
      store(out + half + i, b * load(cs + half + i) + a * load(sn + half + i));
    }
    for (; i < half; i++) {
      const float a = x[i], b = x[half + i];
      out[i] = a * cs[i] - b * sn[i];
      out[half + i] = b * cs[half + i] + a * sn[half + i];
    }
    for (i = c->rotated; i < c->width; i++) out[i] = x[i];
  }
}

static void rotary(const RetortRotaryCall* c) {
  run_team(useful_threads(c->threads, c->total * c->heads * c->width), [&](const Team& team) {
    for (int64_t t = team.begin(c->total); t < team.end(c->total); t++) rotary_token(c, t);
  });
}

static void gate(const RetortGateCall* c) {
  run_team(useful_threads(c->threads, c->count), [&](const Team& team) {
    const int64_t blocks = ceil_div(c->count, W);
    for (int64_t b = team.begin(blocks); b < team.end(blocks); b++) {
      const int64_t i = b * W, n = c->count - i;
      if (n >= W)
        store(c->out + i, silu(load(c->gate + i)) * load(c->up + i));
      else
        store_part(c->out + i, silu(load_part(c->gate + i, n)) * load_part(c->up + i, n), n);
    }
  });
}

}  // namespace RETORT_ISA
