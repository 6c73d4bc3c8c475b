// Gradients of the selective scan of packed ragged rows, chunk by chunk and backwards in time. The
// states of a chunk are scanned again from the one before it, so that no more than a chunk's exist.
#pragma once
#include "scan.h"

namespace RETORT_ISA {

// One chunk of W channels and N states (n0 on) of one row. All blocks are of vectors [states][W],
// `h` and `d` of one chunk's tokens, `sums` [tokens][2 * states][W] of the gradients of b and c.
struct GradientBlocks {
  const float *a, *before;  // decay rates; states before the chunk
  float *flow, *grad_a;     // gradient of the state after the chunk, then of the one before it
  float *h, *d, *sums;
};

template <int N>
INLINE void rescan(const RetortScanGradientCall* c, const GradientBlocks& w, int64_t begin,
                   int64_t end, int64_t channel, int64_t part, int64_t n0, int64_t count) {
  const int64_t states = N ? N : count;
  vf h[STATES], a[STATES];
  for (int64_t n = 0; n < states; n++) {
    h[n] = load(w.before + (n0 + n) * W);
    a[n] = load(w.a + (n0 + n) * W);
  }
  float *to_h = w.h, *to_d = w.d;
  for (int64_t t = begin; t < end; t++, to_h += STATES * W, to_d += STATES * W) {
    const vf dt = load_some(c->dt + t * c->ld_dt + channel, part);
    const vf du = dt * load_some(c->u + t * c->ld_u + channel, part);
    const float* b = c->b + t * c->ld_b + n0;
#pragma GCC unroll 16
    for (int64_t n = 0; n < states; n++) {
      const vf decay = exp(dt * a[n]);
      h[n] = fma(decay, h[n], du * splat(b[n]));
      store(to_d + n * W, decay);
      store(to_h + n * W, h[n]);
    }
  }
}

// g_t = c_t y'_t + decay_{t+1} g_{t+1} is the gradient of h_t; that of dt a is g_t h_{t-1} decay_t.
template <int N>
INLINE void flow_back(const RetortScanGradientCall* c, const GradientBlocks& w, int64_t begin,
                      int64_t end, int64_t channel, int64_t part, int64_t n0, int64_t count) {
  const int64_t states = N ? N : count;
  vf g[STATES];
  for (int64_t n = 0; n < states; n++) g[n] = load(w.flow + (n0 + n) * W);
  for (int64_t t = end - 1; t >= begin; t--) {
    const int64_t i = (t - begin) * STATES * W;
    const vf dt = load_some(c->dt + t * c->ld_dt + channel, part);
    const vf u = load_some(c->u + t * c->ld_u + channel, part), du = dt * u;
    const vf y = load_some(c->grad + t * c->channels + channel, part);
    const float *b = c->b + t * c->ld_b + n0, *read = c->c + t * c->ld_c + n0;
    const float* before = t > begin ? w.h + i - STATES * W : w.before + n0 * W;
    float *sum_b = w.sums + ((t - begin) * 2 * c->states + n0) * W, *sum_c = sum_b + c->states * W;
    vf scaled = vf{}, rate = vf{};
#pragma GCC unroll 16
    for (int64_t n = 0; n < states; n++) {
      const vf own = fma(splat(read[n]), y, g[n]);
      store(sum_c + n * W, fma(load(w.h + i + n * W), y, load(sum_c + n * W)));
      store(sum_b + n * W, fma(own, du, load(sum_b + n * W)));
      scaled = fma(own, splat(b[n]), scaled);
      g[n] = own * load(w.d + i + n * W);
      const vf log = g[n] * load(before + n * W);
      float* grad_a = w.grad_a + (n0 + n) * W;
      rate = fma(log, load(w.a + (n0 + n) * W), rate);
      store(grad_a, fma(log, dt, load(grad_a)));
    }
    float *to_dt = c->grad_dt + t * c->channels + channel, *to_u = c->grad_u + (to_dt - c->grad_dt);
    const vf old_dt = n0 ? load_some(to_dt, part) : vf{}, old_u = n0 ? load_some(to_u, part) : vf{};
    store_some(to_dt, old_dt + fma(scaled, u, rate), part);
    store_some(to_u, old_u + scaled * dt, part);
  }
  for (int64_t n = 0; n < states; n++) store(w.flow + (n0 + n) * W, g[n]);
}

template <int N>
INLINE void chunk_gradient(const RetortScanGradientCall* c, const GradientBlocks& w, int64_t begin,
                           int64_t end, int64_t channel, int64_t part, int64_t n0, int64_t count) {
  rescan<N>(c, w, begin, end, channel, part, n0, count);
  flow_back<N>(c, w, begin, end, channel, part, n0, count);
}

// Sums over lanes of `n` vectors.
static void add_lanes(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf v[W];
    for (int64_t j = 0; j < W; j++) v[j] = load(from + (i + j) * W);
    store(to + i, sums<W / 2>(v));
  }
  for (; i < n; i++) to[i] = sum(load(from + i * W));
}

// Scratch of one thread: blocks of a unit's channels, then those of a chunk.
struct GradientScratch {
  float *a, *before, *flow, *grad_a, *h, *d, *sums;
};

// One row, channels `channel` .. `channel + n`, into this unit's parts of the gradients.
static void row_gradient(const RetortScanGradientCall* c, int64_t r, int64_t unit, int64_t n,
                         const GradientScratch& s) {
  const int64_t N = c->states, D = c->channels, channel = unit * c->part, block = N * W;
  const int64_t first = c->offsets[r], end = first + c->counts[r];
  float* grad_bc = c->grad_bc + unit * c->total * 2 * N;
  gather_states(c->a + channel, D, N, n, s.a);
  gather_states(nullptr, D, N, n, s.flow);
  gather_states(nullptr, D, N, n, s.grad_a);
  for (int64_t j = ceil_div(c->counts[r], c->chunk) - 1; j >= 0; j--) {
    const int64_t t = first + j * c->chunk, stop = least(end, t + c->chunk);
    const float* kept = j ? c->kept + (c->first_kept[r] + j - 1) * N * D + channel : nullptr;
    gather_states(kept, D, N, n, s.before);
    memset(s.sums, 0, sizeof(float) * (stop - t) * 2 * N * W);
    for (int64_t i = 0, v = 0; i < n; i += W, v += block) {
      const GradientBlocks w = {s.a + v, s.before + v, s.flow + v, s.grad_a + v, s.h, s.d, s.sums};
      for (int64_t n0 = 0; n0 < N; n0 += STATES) {
        const int64_t count = least(STATES, N - n0), part = least(W, n - i);
        if (count == STATES)
          chunk_gradient<STATES>(c, w, t, stop, channel + i, part, n0, count);
        else
          chunk_gradient<0>(c, w, t, stop, channel + i, part, n0, count);
      }
    }
    add_lanes(s.sums, (stop - t) * 2 * N, grad_bc + t * 2 * N);
  }
  scatter_states(s.grad_a, D, N, n, c->grad_a + r * N * D + channel);
}

static void scan_gradient(const RetortScanGradientCall* c) {
  const int64_t parts = ceil_div(c->channels, c->part), units = c->rows * parts;
  const int64_t size = unit_states(c->states, c->part), chunk = c->chunk * STATES * W;
  const int64_t floats = 4 * size + 2 * chunk + c->chunk * 2 * c->states * W;
  run_team((int)least(c->threads, units), [&](const Team& team) {
    float* p = (float*)malloc(sizeof(float) * floats);
    const GradientScratch s = {p,        p + size,         p + 2 * size,
                               p + 3 * size, p + 4 * size, p + 4 * size + chunk,
                               p + 4 * size + 2 * chunk};
    for (int64_t u = team.rank; u < units; u += team.size) {
      const int64_t unit = u % parts;
      row_gradient(c, u / parts, unit, least(c->part, c->channels - unit * c->part), s);
    }
    free(p);
  });
}

}  // namespace RETORT_ISA
