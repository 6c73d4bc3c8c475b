// Gumbel races: which tokens of a row of scores may be argmax(score + noise). Noise is that of
// decode/sampling.py; its logarithms are good to 1e-9 here, so a shortlist of all tokens within a
// wider margin of the best holds the exact winner, and whoever calls compares those few exactly.
#pragma once
#include "api.h"
#include "elementwise.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int L = W / 2;  // lanes of 64 bits
typedef double vd __attribute__((vector_size(8 * L)));
typedef uint64_t vu __attribute__((vector_size(8 * L)));

INLINE vd wide(double x) { return x - vd{}; }

// The splitmix64 finaliser.
INLINE vu mix(vu x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// log x of positive normal numbers: exponent, and the series of atanh for the mantissa around 1, so
// that logarithms of numbers close to 1 keep their relative precision.
INLINE vd log(vd x) {
  const vu shifted = (vu)x - 0x3FE6A09E667F3BCDu;  // mantissas from sqrt(1/2) to sqrt(2)
  const vd power = __builtin_convertvector((decltype((vu)x < vu{}))shifted >> 52, vd);
  const vd m = (vd)((vu)x - (shifted & 0xFFF0000000000000u));
  const vd s = (m - 1.0) / (m + 1.0), t = s * s;
  vd p = wide(1.0 / 13);
  for (int odd = 11; odd > 0; odd -= 2) p = p * t + 1.0 / odd;
  return power * 0.6931471805599453 + 2.0 * s * p;
}

INLINE vd gumbel(vu token, uint64_t state) {
  const vu bits = mix(token * 0x9E3779B97F4A7C15u + state) >> 11;
  const vd uniform = (__builtin_convertvector(bits, vd) + 0.5) * 0x1p-53;
  return -log(-log(uniform));
}

// The tokens of one part of a row's scores that lie within `margin` of its best.
struct Shortlist {
  int64_t* tokens;
  double totals[RETORT_SHORTLIST];
  double margin, best = -__builtin_inf();
  int64_t count = 0;

  void add(int64_t token, double total) {
    if (!(total > best - margin)) return;  // also for -inf and NaN
    if (total > best) {
      best = total;
      keep_near();
    }
    if (count < RETORT_SHORTLIST) tokens[count] = token, totals[count] = total;
    count++;
  }
  void keep_near() {
    int64_t kept = 0;
    if (count > RETORT_SHORTLIST) return;  // it stays too long
    for (int64_t i = 0; i < count; i++)
      if (totals[i] > best - margin) tokens[kept] = tokens[i], totals[kept++] = totals[i];
    count = kept;
  }
};

static void race_part(const double* scores, uint64_t state, int64_t lo, int64_t hi,
                      Shortlist& list) {
  vu token;
  for (int i = 0; i < L; i++) token[i] = lo + i;
  for (int64_t at = lo; at < hi; at += L, token += L) {
    vd score = wide(-__builtin_inf());
    if (at + L <= hi) memcpy(&score, scores + at, sizeof score);
    for (int64_t i = 0; at + L > hi && i < hi - at; i++) score[i] = scores[at + i];
    const vd total = score + gumbel(token, state);
    const auto near = total > wide(list.best - list.margin);
    int64_t any = 0;
    for (int i = 0; i < L; i++) any |= near[i];
    for (int i = 0; any && i < L; i++) list.add(at + i, total[i]);
  }
}

static void race(const RetortRaceCall* c) {
  run_team(useful_threads(c->threads, c->rows * c->vocab), [&](const Team& team) {
    const int64_t tasks = c->rows * c->parts;
    for (int64_t t = team.begin(tasks); t < team.end(tasks); t++) {
      const int64_t row = t / c->parts, part = t % c->parts;
      Shortlist list{c->tokens + t * RETORT_SHORTLIST, {}, c->margin};
      race_part(c->scores + row * c->ld, c->states[row], c->vocab * part / c->parts,
                c->vocab * (part + 1) / c->parts, list);
      c->counts[t] = list.count;
    }
  });
}

}  // namespace RETORT_ISA
