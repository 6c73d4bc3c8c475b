// Single passes over rows: RMSNorm and rotary positions.
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

// x / rms(x) * (offset + weight); `out` may be `x`.
INLINE void norm_row(const float* x, const float* weight, int64_t n, float eps, float offset,
                     float* out) {
  const float scale = 1.f / __builtin_sqrtf(square_sum(x, n) / (float)n + eps);
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store(out + i, (splat(offset) + load(weight + i)) * (load(x + i) * splat(scale)));
  for (; i < n; i++) out[i] = (offset + weight[i]) * (x[i] * scale);
}

static void norm(const RetortNormCall* c) {
  run_team(useful_threads(c->threads, c->m * c->n), [&](const Team& team) {
    for (int64_t r = team.begin(c->m); r < team.end(c->m); r++)
      norm_row(c->x + r * c->ldx, c->weight, c->n, c->eps, c->offset, c->out + r * c->n);
  });
}

// x cos + rotate_half(x) sin of one head: pairs (i, i + rotated / 2); the rest is copied. `out` may
// be `x`.
INLINE void rotate_head(const float* x, const float* cs, const float* sn, int64_t rotated,
                        int64_t width, float* out) {
  const int64_t half = rotated / 2;
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
  if (out != x && rotated < width) memcpy(out + rotated, x + rotated, 4 * (width - rotated));
}

static void rotary(const RetortRotaryCall* c) {
  run_team(useful_threads(c->threads, c->total * c->heads * c->width), [&](const Team& team) {
    for (int64_t t = team.begin(c->total); t < team.end(c->total); t++)
      for (int64_t h = 0; h < c->heads; h++)
        rotate_head(c->x + t * c->x_token + h * c->x_head, c->cos + t * c->rotated,
                    c->sin + t * c->rotated, c->rotated, c->width,
                    c->out + (t * c->heads + h) * c->width);
  });
}

}  // namespace RETORT_ISA
