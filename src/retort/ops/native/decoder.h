// A whole decoder layer, or all of them, in one parallel region: each step is split over the team, with a barrier
// between steps. The arithmetic of every step is that of the separate kernels.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace RETORT_ISA {

// Intermediate rows of a layer, in one allocation.
struct Work {
  float *normed, *query, *key, *value, *attended, *middle, *inner, *stream, *memory;
  Work(const RetortDecoder* d, int64_t m) {
    const RetortHeads* h = d->heads;
    const int64_t hidden = d->query->k;
    const int64_t widths[] = {hidden,
                              h->heads * h->key_width,
                              h->kv_heads * h->key_width,
                              h->kv_heads * h->value_width,
                              h->heads * h->value_width,
                              hidden,
                              d->gate->n,
                              hidden};
    float** fields[] = {&normed, &query, &key, &value, &attended, &middle, &inner, &stream};
    int64_t total = 0;
    for (int64_t w : widths) total += ceil_div(m * w, 16) * 16;
    float* at = memory = (float*)aligned_alloc(64, total * sizeof(float));
    for (int i = 0; i < 8; i++) {
      *fields[i] = at;
      at += ceil_div(m * widths[i], 16) * 16;
    }
  }
  ~Work() { free(memory); }
};

static void norm_part(const float* x, const float* weight, int64_t m, int64_t n, float eps,
                      float offset, float* out, const Team& team) {
  for (int64_t r = team.begin(m); r < team.end(m); r++)
    norm_row(x + r * n, weight, n, eps, offset, out + r * n);
}

// Head norms and rotary of queries and keys, and the new keys and values into their rows' buffers.
static void place_token(const RetortDecoderCall* c, const Work& w, int64_t row, int64_t i) {
  const RetortDecoder* d = c->layer;
  const RetortHeads* h = d->heads;
  const int64_t token = c->rows->offsets[row] + i, at = c->rows->starts[row] + i;
  const float *cs = c->cos + token * c->rotated, *sn = c->sin + token * c->rotated;
  const int64_t dk = h->key_width, dv = h->value_width, cap = c->rows->capacity[row];
  for (int64_t j = 0; j < h->heads; j++) {
    float* q = w.query + (token * h->heads + j) * dk;
    if (d->query_norm) norm_row(q, d->query_norm, dk, d->query_eps, d->query_offset, q);
    rotate_head(q, cs, sn, c->rotated, dk, q);
  }
  for (int64_t j = 0; j < h->kv_heads; j++) {
    float* k = w.key + (token * h->kv_heads + j) * dk;
    if (d->key_norm) norm_row(k, d->key_norm, dk, d->key_eps, d->key_offset, k);
    rotate_head(k, cs, sn, c->rotated, dk, c->key_rows[row] + (j * cap + at) * dk);
    memcpy(c->value_rows[row] + (j * cap + at) * dv, w.value + (token * h->kv_heads + j) * dv,
           sizeof(float) * dv);
  }
}

static void place_part(const RetortDecoderCall* c, const Work& w, const Team& team) {
  const int64_t lo = team.begin(c->total), hi = team.end(c->total);
  for (int64_t r = 0; r < c->rows->rows; r++) {
    const int64_t first = c->rows->offsets[r], end = first + c->rows->counts[r];
    for (int64_t t = most(lo, first); t < least(hi, end); t++) place_token(c, w, r, t - first);
  }
}

// The linear layers of a decoder layer, as calls.
struct Linears {
  float* projected[3];
  int64_t widths[3];
  RetortLinearCall query, output, gate, down;
  Linears(const RetortDecoderCall* c, Work& w)
      : projected{w.query, w.key, w.value},
        widths{c->layer->query[0].n, c->layer->query[1].n, c->layer->query[2].n} {
    const RetortDecoder* d = c->layer;
    const int64_t hidden = d->query->k, m = c->total;
    query = {d->query, 3, w.normed, hidden, m, projected, widths, nullptr, 0, 0};
    output = {d->output, 1, w.attended, d->output->k, m, &w.middle, &d->output->n, c->x, hidden, 0};
    gate = {d->gate, 1, w.normed, hidden, m, &w.inner, &d->gate->n, nullptr, 0, 0};
    down = {d->down, 1, w.inner, d->down->k, m, &c->out, &d->down->n, w.middle, hidden, 0};
  }
};

INLINE RetortAttentionCall attention_call(const RetortDecoderCall* c, const Work& w) {
  const RetortHeads* h = c->layer->heads;
  RetortAttentionCall a = {};
  a.rows = c->rows, a.heads = h, a.q = w.query, a.out = w.attended;
  a.q_token = h->heads * h->key_width, a.q_head = h->key_width;
  a.key_rows = c->key_rows, a.value_rows = c->value_rows;
  return a;
}

// What one thread of a team does of a layer. `out` may be `x`: the input is read for the last time
// before the result is written, with a barrier between.
static void decoder_part(const RetortDecoderCall* c, Work& w, int64_t* next, const Team& team) {
  const RetortDecoder* d = c->layer;
  const int64_t hidden = d->query->k, m = c->total;
  const Linears l(c, w);
  const RetortAttentionCall attention = attention_call(c, w);
  norm_part(c->x, d->attention_norm, m, hidden, d->attention_eps, d->attention_offset, w.normed,
            team);
  team.barrier();
  linear_part(&l.query, team);
  team.barrier();
  place_part(c, w, team);
  team.barrier();
  attention_part(&attention, team.size, next);
  team.barrier();
  linear_part(&l.output, team);
  team.barrier();
  norm_part(w.middle, d->mlp_norm, m, hidden, d->mlp_eps, d->mlp_offset, w.normed, team);
  team.barrier();
  linear_part(&l.gate, team);
  team.barrier();
  linear_part(&l.down, team);
}

static void decoder(const RetortDecoderCall* c) {
  Work w(c->layer, c->total);
  int64_t next = 0;
  run_team(c->threads, [&](const Team& team) { decoder_part(c, w, &next, team); });
}

// All layers in one parallel region.
static void stack(const RetortStackCall* c) {
  const RetortStack* s = c->stack;
  const int64_t hidden = s->layers[0]->query->k;
  Work w(s->layers[0], c->total);
  int64_t* next = (int64_t*)calloc(s->count, sizeof(int64_t));
  run_team(c->threads, [&](const Team& team) {
    for (int64_t i = 0; i < s->count; i++) {
      const float* x = i ? w.stream : c->x;
      const RetortDecoderCall call = {s->layers[i], c->rows,  c->key_rows[i], c->value_rows[i],
                                      c->cos,       c->sin,   c->rotated,     c->total,
                                      x,            w.stream, 0};
      decoder_part(&call, w, next + i, team);
      team.barrier();
    }
    norm_part(w.stream, s->norm, c->total, hidden, s->eps, s->offset, c->out, team);
  });
  free(next);
}

}  // namespace RETORT_ISA
