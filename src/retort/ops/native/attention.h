// Ragged causal attention: packed queries of many rows, each over its own keys and values.
//
// A query's scores, maxima and sums run over blocks of BLOCK keys that start at multiples of BLOCK in
// the row, with an online softmax between blocks (Milakov and Gimelshein 2018, arXiv 1805.02867), so
// its bits depend on the row's keys only, not on how many other new tokens the pass has.
#pragma once
#include <stdlib.h>

#include "api.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int64_t BLOCK = 64;
constexpr int64_t CHUNK = 32;  // most new tokens of a task
constexpr int64_t SLICE = 4;   // and no fewer, where there are more: they share a read of the keys
constexpr int TILE = 4;        // query heads that share a read of the values

// What one row gives a task.
struct Task {
  int64_t row, kv_head, first, tokens;  // new tokens first .. first + tokens
};

// Scores of one query over keys a .. b of the W keys at `keys`; other lanes are unspecified.
INLINE vf score_group(const float* q, const float* keys, int64_t d, int64_t a, int64_t b) {
  vf acc[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; j++) acc[j] = vf{};
  const bool whole = a <= 0 && b >= W;
  int64_t c = 0;
  for (; c + W <= d; c += W) {
    const vf qv = load(q + c);
    if (whole) {
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) acc[j] = fma(qv, load(keys + j * d + c), acc[j]);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < W; j++)
        if (j >= a && j < b) acc[j] = fma(qv, load(keys + j * d + c), acc[j]);
    }
  }
  if (c < d) {
    const vf qv = load_part(q + c, d - c);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++)
      if (j >= a && j < b) acc[j] = fma(qv, load_part(keys + j * d + c, d - c), acc[j]);
  }
  return sums<W / 2>(acc);
}

// acc[NQ][NC * W] += Σ_j p[q][j] * values[j], in order of j.
template <int NQ, int NC>
INLINE void add_columns(const float* p, const float* values, int64_t a, int64_t b, int64_t dv,
                        float* acc, int64_t lda) {
  vf sum[NQ][NC];
#pragma GCC unroll 4
  for (int q = 0; q < NQ; q++)
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) sum[q][c] = load(acc + q * lda + c * W);
  for (int64_t j = a; j < b; j++) {
    vf v[NC];
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) v[c] = load(values + j * dv + c * W);
#pragma GCC unroll 4
    for (int q = 0; q < NQ; q++) {
      const vf w = splat(p[q * BLOCK + j]);
#pragma GCC unroll 4
      for (int c = 0; c < NC; c++) sum[q][c] = fma(w, v[c], sum[q][c]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < NQ; q++)
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) store(acc + q * lda + c * W, sum[q][c]);
}

template <int NQ>
static void add_values(const float* p, const float* values, int64_t a, int64_t b, int64_t dv,
                       float* acc, int64_t lda) {
  constexpr int NC = W == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + NC * W <= dv; c += NC * W)
    add_columns<NQ, NC>(p, values + c, a, b, dv, acc + c, lda);
  for (; c + W <= dv; c += W) add_columns<NQ, 1>(p, values + c, a, b, dv, acc + c, lda);
  if (c == dv) return;
  for (int q = 0; q < NQ; q++) {
    vf sum = load(acc + q * lda + c);
    for (int64_t j = a; j < b; j++)
      sum = fma(splat(p[q * BLOCK + j]), load_part(values + j * dv + c, dv - c), sum);
    store(acc + q * lda + c, sum);
  }
}

// Running softmax of one query: maximum, lane sums of the weights, weighted values.
struct Softmax {
  float top, total;  // total: the weight of the sink alone
  alignas(64) float lanes[W];
};

// Turns the scores of keys a .. b of a block into weights and rescales what came before.
INLINE void weigh(float* p, int64_t a, int64_t b, const RetortHeads* h, Softmax* s, float* acc,
                  int64_t dv) {
  const float none = -__builtin_inff();
  vf top = splat(none);
  for (int64_t g = a / W * W; g < b; g += W) {
    vf v = load(p + g) * splat(h->scaling);
    if (h->softcap != 0) v = tanh(v / splat(h->softcap)) * splat(h->softcap);
    store(p + g, v);
    for (int64_t j = g; j < g + W; j++)
      if (j < a || j >= b) p[j] = none;
    top = larger(load(p + g), top);
  }
  float lanes[W], best = s->top;
  store(lanes, top);
  for (int i = 0; i < W; i++) best = lanes[i] > best ? lanes[i] : best;
  const vf shrink = exp(splat(s->top - best));
  vf total = load(s->lanes) * shrink;
  for (int64_t g = a / W * W; g < b; g += W) {
    const vf w = exp(load(p + g) - splat(best));
    store(p + g, w);
    total = total + w;
  }
  store(s->lanes, total);
  s->total *= shrink[0];
  s->top = best;
  if (shrink[0] != 1.f)
    for (int64_t c = 0; c < dv; c += W) store(acc + c, load(acc + c) * shrink);
}

// One token's query heads head .. head + n over keys a .. b of one block.
static void attend_block(const RetortAttentionCall* c, const float* q, int n, const float* keys,
                         const float* values, int64_t a, int64_t b, Softmax* s, float* acc,
                         int64_t lda) {
  const int64_t dk = c->heads->key_width, dv = c->heads->value_width;
  alignas(64) float p[TILE * BLOCK];
  for (int i = 0; i < n; i++) {
    for (int64_t g = a / W * W; g < b; g += W)
      store(p + i * BLOCK + g,
            score_group(q + i * c->q_head, keys + g * dk, dk, a - g, b - g));
    weigh(p + i * BLOCK, a, b, c->heads, s + i, acc + i * lda, dv);
  }
  static void (*const add[])(const float*, const float*, int64_t, int64_t, int64_t, float*,
                             int64_t) = {add_values<1>, add_values<2>, add_values<3>,
                                         add_values<4>};
  add[n - 1](p, values, a, b, dv, acc, lda);
}

// Scratch of a task: for every (token, head) a running softmax and a row of weighted values.
struct Scratch {
  Softmax* states;
  float* acc;
  int64_t lda;
};

static void start_task(const RetortAttentionCall* c, const Task& t, const Scratch& w) {
  const int64_t group = c->heads->heads / c->heads->kv_heads;
  memset(w.acc, 0, sizeof(float) * w.lda * group * t.tokens);
  for (int64_t i = 0; i < t.tokens * group; i++) {
    Softmax* s = w.states + i;
    memset(s, 0, sizeof *s);
    s->top = -__builtin_inff();
    if (!c->heads->sinks) continue;
    s->top = c->heads->sinks[t.kv_head * group + i % group];
    s->total = 1;
  }
}

static void finish_task(const RetortAttentionCall* c, const Task& t, const Scratch& w) {
  const int64_t group = c->heads->heads / c->heads->kv_heads, dv = c->heads->value_width;
  const int64_t token = c->rows->offsets[t.row] + t.first;
  for (int64_t i = 0; i < t.tokens * group; i++) {
    const Softmax* s = w.states + i;
    const float scale = 1.f / (s->total + sum(load(s->lanes)));
    float* out = c->out + ((token + i / group) * c->heads->heads + t.kv_head * group + i % group) * dv;
    int64_t e = 0;
    for (; e + W <= dv; e += W) store(out + e, load(w.acc + i * w.lda + e) * splat(scale));
    if (e < dv) store_part(out + e, load(w.acc + i * w.lda + e) * splat(scale), dv - e);
  }
}

// Reads the row's keys and values of one head once, block by block, for all tokens of the task.
static void attend(const RetortAttentionCall* c, const Task& t, const Scratch& w) {
  const RetortHeads* h = c->heads;
  const int64_t group = h->heads / h->kv_heads, cap = c->rows->capacity[t.row];
  const float* keys = c->key_rows[t.row] + t.kv_head * cap * h->key_width;
  const float* values = c->value_rows[t.row] + t.kv_head * cap * h->value_width;
  const int64_t from = c->rows->starts[t.row] + t.first;
  const float* q = c->q + (c->rows->offsets[t.row] + t.first) * c->q_token +
                   t.kv_head * group * c->q_head;
  start_task(c, t, w);
  const int64_t oldest = h->window ? most(0, from - h->window + 1) : 0;
  for (int64_t base = oldest / BLOCK * BLOCK; base < from + t.tokens; base += BLOCK)
    for (int64_t i = 0; i < t.tokens; i++) {
      const int64_t end = from + i + 1, begin = h->window ? most(0, end - h->window) : 0;
      const int64_t a = most(0, begin - base), b = least(BLOCK, end - base);
      if (a >= b) continue;
      for (int64_t g = 0; g < group; g += TILE)
        attend_block(c, q + i * c->q_token + g * c->q_head, (int)least(TILE, group - g),
                     keys + base * h->key_width, values + base * h->value_width, a, b,
                     w.states + i * group + g, w.acc + (i * group + g) * w.lda, w.lda);
    }
  finish_task(c, t, w);
}

INLINE void append_head(const float* from, int64_t stride, float* to, int64_t width, int64_t n) {
  for (int64_t i = 0; i < n; i++) memcpy(to + i * width, from + i * stride, sizeof(float) * width);
}

// Copies the new keys and values of this thread's (row, head) pairs to the ends of their rows.
static void append_rows(const RetortAttentionCall* c, const Team& team) {
  const RetortRows* rows = c->rows;
  const RetortHeads* h = c->heads;
  const int64_t pairs = rows->rows * h->kv_heads;
  for (int64_t id = team.begin(pairs); id < team.end(pairs); id++) {
    const int64_t r = id / h->kv_heads, head = id % h->kv_heads;
    const int64_t at = head * rows->capacity[r] + rows->starts[r], token = rows->offsets[r];
    append_head(c->k + token * c->k_token + head * c->k_head, c->k_token,
                c->key_rows[r] + at * h->key_width, h->key_width, rows->counts[r]);
    append_head(c->v + token * c->v_token + head * c->v_head, c->v_token,
                c->value_rows[r] + at * h->value_width, h->value_width, rows->counts[r]);
  }
}

// How many new tokens of a row with `tokens` of them go into a task, so that a team finds about four
// tasks of equal size a thread. A query's bits are the same in any task.
INLINE int64_t chunk_of(const RetortAttentionCall* c, int64_t tokens, int64_t threads) {
  if (threads == 1) return CHUNK;
  const int64_t even = ceil_div(tokens * c->heads->kv_heads, 4 * threads);
  const int64_t chunks = ceil_div(tokens, most(SLICE, least(CHUNK, even)));
  return ceil_div(tokens, chunks);
}

// Task `id`: rows in falling cost, then heads, then the latest chunk first (it has the most keys).
static Task find_task(const RetortAttentionCall* c, int64_t id, int64_t threads) {
  const RetortRows* rows = c->rows;
  int64_t i = 0;
  for (;; i++) {
    const int64_t tokens = rows->counts[rows->order[i]];
    const int64_t tasks = c->heads->kv_heads * ceil_div(tokens, chunk_of(c, tokens, threads));
    if (id < tasks) break;
    id -= tasks;
  }
  const int64_t row = rows->order[i], tokens = rows->counts[row];
  const int64_t chunk = chunk_of(c, tokens, threads), chunks = ceil_div(tokens, chunk);
  const int64_t first = (chunks - 1 - id / c->heads->kv_heads) * chunk;
  return {row, id % c->heads->kv_heads, first, least(chunk, tokens - first)};
}

INLINE int64_t count_tasks(const RetortAttentionCall* c, int64_t threads) {
  int64_t tasks = 0;
  for (int64_t r = 0; r < c->rows->rows; r++) {
    const int64_t tokens = c->rows->counts[r];
    tasks += c->heads->kv_heads * ceil_div(tokens, chunk_of(c, tokens, threads));
  }
  return tasks;
}

// What one of a team's `threads` does, once all new keys and values are in the buffers; `next` is
// the team's counter of tasks taken.
static void attention_part(const RetortAttentionCall* c, int64_t threads, int64_t* next) {
  const int64_t tasks = count_tasks(c, threads), group = c->heads->heads / c->heads->kv_heads;
  int64_t longest = 0;
  for (int64_t r = 0; r < c->rows->rows; r++)
    longest = most(longest, least(CHUNK, c->rows->counts[r]));
  const int64_t lda = ceil_div(c->heads->value_width, W) * W, queries = group * longest;
  void* memory = aligned_alloc(64, ceil_div(queries * (sizeof(Softmax) + 4 * lda), 64) * 64);
  const Scratch w = {(Softmax*)memory, (float*)((Softmax*)memory + queries), lda};
  for (;;) {
    const int64_t id = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (id >= tasks) break;
    attend(c, find_task(c, id, threads), w);
  }
  free(memory);
}

static void attention(const RetortAttentionCall* c) {
  int64_t next = 0;
  run_team((int)least(c->threads, count_tasks(c, c->threads)), [&](const Team& team) {
    if (c->k) {
      append_rows(c, team);
      team.barrier();
    }
    attention_part(c, team.size, &next);
  });
}

}  // namespace RETORT_ISA
