// The selective scan and the causal convolution of packed ragged rows, token after token. A state's
// bits depend on the row's own inputs alone, and a replay from a kept state repeats them.
#pragma once
#include <stdlib.h>

#include "activation.h"
#include "api.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int64_t CHANNELS = 128;     // channels of one unit of work
constexpr int64_t SCAN_TOKENS = 32;   // tokens that a unit takes at a time, so that lines are reused
constexpr int STATES = 16;            // states that stay in registers

INLINE vf load_some(const float* p, int64_t part) {
  return part == W ? load(p) : load_part(p, part);
}
INLINE void store_some(float* p, vf v, int64_t part) {
  if (part == W)
    store(p, v);
  else
    store_part(p, v, part);
}

// Tokens begin .. end of W channels and N states (n0 on) of one row; h lies in scratch [states][W].
template <int N>
INLINE void scan_tokens(const RetortScanCall* c, int64_t begin, int64_t end, int64_t channel,
                        int64_t part, int64_t n0, int64_t count, float* scratch,
                        const float* decay) {
  const int64_t states = N ? N : count;
  vf h[STATES], a[STATES];
  for (int64_t n = 0; n < states; n++) {
    h[n] = load(scratch + (n0 + n) * W);
    a[n] = load(decay + (n0 + n) * W);
  }
  for (int64_t t = begin; t < end; t++) {
    const vf dt = load_some(c->dt + t * c->ld_dt + channel, part);
    const vf du = dt * load_some(c->u + t * c->ld_u + channel, part);
    const float *b = c->b + t * c->ld_b + n0, *read = c->c ? c->c + t * c->ld_c + n0 : nullptr;
    float* out = c->c ? c->y + t * c->channels + channel : nullptr;
    vf y = out && n0 ? load_some(out, part) : vf{};
#pragma GCC unroll 16
    for (int64_t n = 0; n < states; n++) {
      h[n] = fma(exp(dt * a[n]), h[n], du * splat(b[n]));
      if (read) y = fma(splat(read[n]), h[n], y);
    }
    if (out) store_some(out, y, part);
  }
  for (int64_t n = 0; n < states; n++) store(scratch + (n0 + n) * W, h[n]);
}

// The same for all states.
static void scan_piece(const RetortScanCall* c, int64_t begin, int64_t end, int64_t channel,
                       int64_t part, float* scratch, const float* decay) {
  for (int64_t n0 = 0; n0 < c->states; n0 += STATES) {
    const int64_t count = least(STATES, c->states - n0);
    if (count == STATES)
      scan_tokens<STATES>(c, begin, end, channel, part, n0, count, scratch, decay);
    else
      scan_tokens<0>(c, begin, end, channel, part, n0, count, scratch, decay);
  }
}

// [states][channels] to or from [vectors][states][W] for one unit's channels.
INLINE void gather_states(const float* from, int64_t channels, int64_t states, int64_t n,
                          float* to) {
  for (int64_t i = 0; i < n; i += W)
    for (int64_t s = 0; s < states; s++, to += W)
      store(to, from ? load_some(from + s * channels + i, least(W, n - i)) : vf{});
}
INLINE void scatter_states(const float* from, int64_t channels, int64_t states, int64_t n,
                           float* to) {
  for (int64_t i = 0; i < n; i += W)
    for (int64_t s = 0; s < states; s++, from += W)
      store_some(to + s * channels + i, load(from), least(W, n - i));
}

// One row, channels `channel` .. `channel + n`.
static void scan_row(const RetortScanCall* c, int64_t r, int64_t channel, int64_t n, float* h,
                     float* decay) {
  const int64_t end = c->offsets[r] + c->counts[r], size = c->states * W;
  const float* initial = c->initial[r];
  gather_states(c->a + channel, c->channels, c->states, n, decay);
  gather_states(initial ? initial + channel : nullptr, c->channels, c->states, n, h);
  int64_t kept = r ? c->kept_ends[r - 1] : 0;
  for (int64_t t = c->offsets[r]; t < end;) {
    int64_t stop = least(end, t + SCAN_TOKENS);
    const bool keeps = kept < c->kept_ends[r] && c->kept_tokens[kept] < stop;
    if (keeps) stop = c->kept_tokens[kept] + 1;
    for (int64_t i = 0; i < n; i += W)
      scan_piece(c, t, stop, channel + i, least(W, n - i), h + i / W * size, decay + i / W * size);
    if (keeps) scatter_states(h, c->channels, c->states, n, c->kept[kept++] + channel);
    t = stop;
  }
}

// Floats of scratch for the states of a unit, and for their decays.
INLINE int64_t unit_states(int64_t states, int64_t channels = CHANNELS) {
  return (channels / W + 1) * W * states;
}

static void scan(const RetortScanCall* c) {
  const int64_t parts = ceil_div(c->channels, CHANNELS), units = c->rows * parts;
  const int64_t size = unit_states(c->states);
  run_team((int)least(c->threads, units), [&](const Team& team) {
    float* scratch = (float*)malloc(2 * sizeof(float) * size);
    for (int64_t u = team.rank; u < units; u += team.size) {
      const int64_t channel = u % parts * CHANNELS;
      scan_row(c, u / parts, channel, least(CHANNELS, c->channels - channel), scratch,
               scratch + size);
    }
    free(scratch);
  });
}

// Tokens of one row, channels `channel` .. `channel + n`; `weight` lies as [kernel][CHANNELS].
static void convolve_row(const RetortConvCall* c, int64_t r, int64_t channel, int64_t n,
                         const float* weight) {
  const int64_t K = c->kernel, D = c->channels, first = c->offsets[r];
  const float* history = c->history + r * (K - 1) * D + channel;
  for (int64_t t = 0; t < c->counts[r]; t++)
    for (int64_t i = 0; i < n; i += W) {
      const int64_t part = least(W, n - i);
      vf y = vf{};
      for (int64_t j = 0; j < K; j++) {  // the oldest of K inputs first
        const int64_t s = t - (K - 1) + j;
        const float* x = s < 0 ? history + (s + K - 1) * D : c->x + (first + s) * c->ldx + channel;
        y = fma(load_some(x + i, part), load(weight + j * CHANNELS + i), y);
      }
      if (c->bias) y = y + load_some(c->bias + channel + i, part);
      store_some(c->out + (first + t) * D + channel + i, c->silu ? silu(y) : y, part);
    }
}

// What one thread of a team does of a call; `weight` is scratch [kernel][CHANNELS].
static void convolution_part(const RetortConvCall* c, float* weight, const Team& team) {
  for (int64_t u = team.rank; u < ceil_div(c->channels, CHANNELS); u += team.size) {
    const int64_t channel = u * CHANNELS, n = least(CHANNELS, c->channels - channel);
    for (int64_t i = 0; i < CHANNELS; i++)
      for (int64_t j = 0; j < c->kernel; j++)
        weight[j * CHANNELS + i] = i < n ? c->weight[(channel + i) * c->kernel + j] : 0.f;
    for (int64_t r = 0; r < c->rows; r++) convolve_row(c, r, channel, n, weight);
  }
}

static void convolution(const RetortConvCall* c) {
  run_team((int)least(c->threads, ceil_div(c->channels, CHANNELS)), [&](const Team& team) {
    float* weight = (float*)malloc(sizeof(float) * c->kernel * CHANNELS);
    convolution_part(c, weight, team);
    free(weight);
  });
}

}  // namespace RETORT_ISA
