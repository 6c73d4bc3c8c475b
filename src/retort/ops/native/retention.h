// Retention of packed ragged rows. A token at offset i of block b reads
//   y = read_i (q . S) + sum_j pair_ij (q . k_j) v_j,
// S the state at (b - 1) * block and j the tokens of blocks b - 1 and b up to itself. Every number is
// one sum in a fixed order (over the key's width, then over j), whatever the row's company, how the
// passes were cut and which columns a thread has: bits depend on the row's own tokens alone.
#pragma once
#include <stdlib.h>

#include "api.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int64_t STRIPE = 256;  // value columns of one unit of work: its state stays in L2

// Stripes of one head are about equally wide, whole vectors each.
INLINE int64_t stripe_width(const RetortRetention* s) {
  const int64_t stripes = ceil_div(s->value_width, STRIPE);
  return ceil_div(ceil_div(s->value_width, stripes), W) * W;
}

// q . k in W lanes of four interleaved sums: an order fixed by n alone.
INLINE float dot(const float* a, const float* b, int64_t n) {
  vf s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) s[c] = fma(load(a + i + c * W), load(b + i + c * W), s[c]);
  for (; i < n; i += W) {
    const bool full = i + W <= n;
    s[0] = fma(full ? load(a + i) : load_part(a + i, n - i),
               full ? load(b + i) : load_part(b + i, n - i), s[0]);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Where the keys or values of one head of a row lie: its new tokens, and the pages before them.
struct Tokens {
  const float *fresh, *before, *current;  // of the head
  int64_t stride, width, start, block;
  inline __attribute__((always_inline)) const float* at(int64_t pos) const {
    if (pos >= start) return fresh + (pos - start) * stride;
    return (pos / block == start / block ? current : before) + pos % block * width;
  }
};

INLINE const float* head_of(const float* page, int64_t head, int64_t size) {
  return page ? page + head * size : nullptr;
}

INLINE Tokens keys_of(const RetortRetentionCall* c, int64_t r, int64_t h) {
  const RetortRetention* s = c->shape;
  const int64_t w = s->key_width, page = s->block * w;
  return {c->k + (c->offsets[r] * s->heads + h) * w, head_of(c->before_k[r], h, page),
          head_of(c->current_k[r], h, page), s->heads * w, w, c->starts[r], s->block};
}

INLINE Tokens values_of(const RetortRetentionCall* c, int64_t r, int64_t h) {
  const RetortRetention* s = c->shape;
  const int64_t w = s->value_width, page = s->block * w;
  return {c->v + (c->offsets[r] * s->heads + h) * w, head_of(c->before_v[r], h, page),
          head_of(c->current_v[r], h, page), s->heads * w, w, c->starts[r], s->block};
}

// The decayed q . k of a token and its window.
static void score_token(const RetortRetentionCall* c, int64_t r, int64_t t) {
  const RetortRetention* s = c->shape;
  const int64_t L = s->block, pos = c->starts[r] + t, first = (pos / L - 1) * L;
  for (int64_t h = 0; h < s->heads; h++) {
    const int64_t at = (c->offsets[r] + t) * s->heads + h;
    const Tokens keys = keys_of(c, r, h);
    const float* power = s->pair + (h * L + pos % L) * 2 * L;
    float* scores = c->scores + at * 2 * L;
    for (int64_t p = most(0, first); p <= pos; p++)
      scores[p - first] = dot(c->q + at * s->key_width, keys.at(p), s->key_width) * power[p - first];
  }
}

// Some tokens of one block of one head.
struct Queries {
  const float *q, *scores;  // of the first token
  int64_t q_stride, score_stride, count;
  const float* read;        // of the first token
  int64_t low, high;        // positions of the window's first token and of the first query
};

// R queries by C vectors of columns (the last one `part` wide where C is 1).
template <int R, int C>
INLINE void output_tile(const Queries& g, int64_t key_width, const float* state, int64_t ld,
                        const Tokens& values, int64_t column, int64_t part, float* out,
                        int64_t ldo) {
  const bool full = C > 1 || part == W;
  vf acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) acc[r][c] = vf{};
  if (state) {
    for (int64_t k = 0; k < key_width; k++) {
      vf b[C];
      const float* row = state + k * ld;
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) {
        b[c] = full ? load(row + c * W) : load_part(row, part);
        if (W == 16 || c % 2 == 0) prefetch(row + 8 * ld + c * W);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vf a = splat(g.q[r * g.q_stride + k]);
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) acc[r][c] = fma(a, b[c], acc[r][c]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) acc[r][c] = acc[r][c] * splat(g.read[r]);
  }
  for (int64_t p = g.low; p < g.high + R; p++) {
    const float* row = values.at(p) + column;
    vf b[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) b[c] = full ? load(row + c * W) : load_part(row, part);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      if (p > g.high + r) continue;  // a later token
      const vf a = splat(g.scores[r * g.score_stride + p]);
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) acc[r][c] = fma(a, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      if (full)
        store(out + r * ldo + c * W, acc[r][c]);
      else
        store_part(out + r * ldo, acc[r][c], part);
    }
}

#if defined(__AVX512F__)
constexpr int TALL = 4, TALL_WIDTH = 4, FLAT = 8;
#else
constexpr int TALL = 4, TALL_WIDTH = 2, FLAT = 8;
#endif

// R queries, all columns of a stripe.
template <int R, int C>
static void output_rows(const Queries& g, int64_t key_width, const float* state, int64_t ld,
                        const Tokens& values, int64_t column, int64_t n, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + C * W <= n; i += C * W)
    output_tile<R, C>(g, key_width, state ? state + i : nullptr, ld, values, column + i, W, out + i,
                      ldo);
  for (; i < n; i += W)
    output_tile<R, 1>(g, key_width, state ? state + i : nullptr, ld, values, column + i,
                      least(W, n - i), out + i, ldo);
}

// All queries of one block of one head, one stripe of columns.
static void output_block(Queries g, int64_t key_width, const float* state, int64_t ld,
                         const Tokens& values, int64_t column, int64_t n, float* out, int64_t ldo) {
  while (g.count > 0) {
    const int64_t step = g.count >= TALL ? TALL : 1;
    if (step == TALL)
      output_rows<TALL, TALL_WIDTH>(g, key_width, state, ld, values, column, n, out, ldo);
    else
      output_rows<1, FLAT>(g, key_width, state, ld, values, column, n, out, ldo);
    g.q += step * g.q_stride;
    g.scores += step * g.score_stride;
    g.read += step;
    g.high += step;
    g.count -= step;
    out += step * ldo;
  }
}

// R rows of the state by C vectors of columns: to = from * carry + sum_i weight_i[k] v_i.
template <int R, int C>
INLINE void fold_tile(const float* from, int64_t ld, vf carry, const float* weights, int64_t width,
                      const float* const* values, int64_t block, int64_t column, int64_t part,
                      float* to, int64_t ldt) {
  const bool full = C > 1 || part == W;
  vf acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      if (!from)
        acc[r][c] = vf{};
      else
        acc[r][c] = carry * (full ? load(from + r * ld + c * W) : load_part(from + r * ld, part));
    }
  for (int64_t i = 0; i < block; i++) {
    vf b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const float* row = values[i] + column + c * W;
      b[c] = full ? load(row) : load_part(row, part);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf a = splat(weights[i * width + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) acc[r][c] = fma(a, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      if (full)
        store(to + r * ldt + c * W, acc[r][c]);
      else
        store_part(to + r * ldt, acc[r][c], part);
    }
}

template <int R>
INLINE void fold_rows(const float* from, int64_t ld, vf carry, const float* weights, int64_t width,
                      const float* const* values, int64_t block, int64_t column, int64_t n,
                      float* to, int64_t ldt) {
  int64_t i = 0;
  for (; i + TALL_WIDTH * W <= n; i += TALL_WIDTH * W)
    fold_tile<R, TALL_WIDTH>(from ? from + i : nullptr, ld, carry, weights, width, values, block,
                             column + i, W, to + i, ldt);
  for (; i < n; i += W)
    fold_tile<R, 1>(from ? from + i : nullptr, ld, carry, weights, width, values, block, column + i,
                    least(W, n - i), to + i, ldt);
}

// One stripe of a head's state one block later; `to` may be `from`, which is null for zeros.
// `weights` is scratch [block, key_width], `rows` scratch [block].
static void fold_stripe(const RetortRetention* s, int64_t h, const float* from, int64_t ld,
                        const Tokens& keys, const Tokens& values, int64_t first, int64_t column,
                        int64_t n, float* to, int64_t ldt, float* weights, const float** rows) {
  const int64_t L = s->block, width = s->key_width;
  const vf carry = splat(s->carry[h]);
  for (int64_t i = 0; i < L; i++) {
    rows[i] = values.at(first + i);
    const float* key = keys.at(first + i);
    const float power = s->write[h * L + i];
    for (int64_t k = 0; k < width; k++) weights[i * width + k] = key[k] * power;
  }
  int64_t k = 0;
  for (; k + TALL <= width; k += TALL)
    fold_rows<TALL>(from ? from + k * ld : nullptr, ld, carry, weights + k, width, rows, L, column, n,
                    to + k * ldt, ldt);
  for (; k < width; k++)
    fold_rows<1>(from ? from + k * ld : nullptr, ld, carry, weights + k, width, rows, L, column, n,
                 to + k * ldt, ldt);
}

// What a thread needs besides: a stripe of a state, the weights of a fold, pointers to its values.
struct FoldScratch {
  float *state, *weights;
  const float** rows;
  explicit FoldScratch(const RetortRetention* s) {
    state = (float*)malloc(sizeof(float) * s->key_width * STRIPE);
    weights = (float*)malloc(sizeof(float) * s->key_width * s->block);
    rows = (const float**)malloc(sizeof(float*) * s->block);
  }
  ~FoldScratch() {
    free(state);
    free(weights);
    free(rows);
  }
};

// One past the last of the tokens from t on that are wanted as t is.
INLINE int64_t run_end(const char* wanted, int64_t t, int64_t end) {
  if (!wanted) return end;
  int64_t z = t + 1;
  while (z < end && wanted[z] == wanted[t]) z++;
  return z;
}

// Positions `begin` .. `end` of one row and head, all in one block; columns as below.
static void retain_block(const RetortRetentionCall* c, int64_t r, int64_t h, int64_t begin,
                         int64_t end, int64_t column, int64_t n, const float* state, int64_t ld,
                         const Tokens& values) {
  const RetortRetention* s = c->shape;
  const int64_t L = s->block, dv = s->value_width, first = (begin / L - 1) * L;
  const int64_t shift = c->offsets[r] - c->starts[r];  // from positions to packed tokens
  for (int64_t pos = begin, stop; pos < end; pos = stop) {
    stop = run_end(c->wanted, pos + shift, end + shift) - shift;
    if (c->wanted && !c->wanted[pos + shift]) continue;
    const int64_t at = (pos + shift) * s->heads + h;
    const Queries g = {c->q + at * s->key_width, c->scores + at * 2 * L - first,
                       s->heads * s->key_width, s->heads * 2 * L, stop - pos,
                       s->read + h * L + pos % L, most(0, first), pos};
    output_block(g, s->key_width, state, ld, values, column, n, c->out + at * dv + column,
                 s->heads * dv);
  }
}

// All blocks of one row and head, columns `column` .. `column + n`.
static void retain_stripe(const RetortRetentionCall* c, int64_t r, int64_t h, int64_t column,
                          int64_t n, const FoldScratch& scratch) {
  const RetortRetention* s = c->shape;
  const int64_t L = s->block, start = c->starts[r], end = start + c->counts[r];
  const int64_t size = s->key_width * s->value_width, dv = s->value_width;
  const Tokens keys = keys_of(c, r, h), values = values_of(c, r, h);
  const float* state = start / L >= 2 ? c->states[r] + h * size + column : nullptr;
  int64_t ld = dv;
  for (int64_t pos = start; pos < end;) {
    const int64_t b = pos / L, stop = least(end, (b + 1) * L), first = (b - 1) * L;
    retain_block(c, r, h, pos, stop, column, n, state, ld, values);
    pos = stop;
    if (pos == end) break;
    if (b >= 1) {
      fold_stripe(s, h, state, ld, keys, values, first, column, n, scratch.state, STRIPE,
                  scratch.weights, scratch.rows);
      state = scratch.state;
      ld = STRIPE;
    }
    if (!c->moved[r] || c->moved_block[r] != b + 1) continue;
    for (int64_t k = 0; k < s->key_width; k++) {
      float* to = c->moved[r] + h * size + k * dv + column;
      if (state)
        memcpy(to, state + k * ld, sizeof(float) * n);
      else
        memset(to, 0, sizeof(float) * n);
    }
  }
}

// What one thread of a team does of a call, in two steps with a barrier between.
static void score_part(const RetortRetentionCall* c, const Team& team) {
  for (int64_t r = 0; r < c->rows; r++)
    for (int64_t t = team.begin(c->counts[r]); t < team.end(c->counts[r]); t++)
      if (!c->wanted || c->wanted[c->offsets[r] + t]) score_token(c, r, t);
}

static void retain_part(const RetortRetentionCall* c, const FoldScratch& scratch,
                        const Team& team) {
  const RetortRetention* s = c->shape;
  const int64_t stripe = stripe_width(s), stripes = ceil_div(s->value_width, stripe);
  const int64_t per_row = s->heads * stripes;
  for (int64_t u = team.rank; u < c->rows * per_row; u += team.size) {
    const int64_t column = u % stripes * stripe;
    retain_stripe(c, u / per_row, u % per_row / stripes, column,
                  least(stripe, s->value_width - column), scratch);
  }
}

static void retention(const RetortRetentionCall* c) {
  const RetortRetention* s = c->shape;
  const int64_t per_row = s->heads * ceil_div(s->value_width, STRIPE);
  run_team((int)least(c->threads, c->rows * per_row), [&](const Team& team) {
    score_part(c, team);
    team.barrier();
    retain_part(c, FoldScratch(s), team);
  });
}

static void fold(const RetortFoldCall* c) {
  const RetortRetention* s = c->shape;
  const int64_t L = s->block, dk = s->key_width, dv = s->value_width;
  const int64_t stripes = ceil_div(dv, STRIPE), per_row = s->heads * stripes;
  run_team((int)least(c->threads, c->count * per_row), [&](const Team& team) {
    const FoldScratch scratch(s);
    for (int64_t u = team.rank; u < c->count * per_row; u += team.size) {
      const int64_t r = u / per_row, h = u % per_row / stripes, column = u % stripes * STRIPE;
      const Tokens keys = {c->keys[r] + h * L * dk, nullptr, nullptr, dk, dk, 0, L};
      const Tokens values = {c->values[r] + h * L * dv, nullptr, nullptr, dv, dv, 0, L};
      float* state = c->states[r] + h * dk * dv + column;
      fold_stripe(s, h, c->fresh ? nullptr : state, dv, keys, values, 0, column,
                  least(STRIPE, dv - column), state, dv, scratch.weights, scratch.rows);
    }
  });
}

}  // namespace RETORT_ISA
