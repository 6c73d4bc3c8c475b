// All layers of a DenseRetNet in one parallel region: each step is split over the team, with a
// barrier between steps. The arithmetic of every step is that of the separate kernels and, between
// them, of single products and sums.
#pragma once
#include "activation.h"
#include "elementwise.h"
#include "linear.h"
#include "retention.h"

namespace RETORT_ISA {

// A pass: its sizes, its intermediate rows in one allocation, and where its rows' states lie.
struct RetNetPass {
  const RetortRetNetCall* c;
  const RetortRetNet* model;
  const RetortRetention* s;
  int64_t hidden, keys, values, m;
  float *normed, *query, *turned, *fused, *key, *value, *inner, *gate, *attended, *middle, *wide;
  float *stream, *scores, *ring, *memory;
  void** rows;   // for each layer [6, rows]
  char* wanted;  // of each token, in the last layer

  explicit RetNetPass(const RetortRetNetCall* call)
      : c(call), model(call->model), s(model->retention), m(call->total) {
    const RetortRetNetLayer *first = model->layers[0], *last = model->layers[model->count - 1];
    hidden = first->output->n, keys = s->heads * s->key_width, values = s->heads * s->value_width;
    const int64_t inner_width = last->key_gate ? last->key_gate->k + last->value_gate->k : 0;
    struct {
      float** at;
      int64_t width;
    } parts[] = {{&normed, hidden},
                 {&query, keys},
                 {&turned, keys},
                 {&fused, keys},
                 {&key, keys},
                 {&value, values},
                 {&inner, inner_width},
                 {&gate, last->key_gate ? keys + values : 0},
                 {&attended, values},
                 {&middle, hidden},
                 {&wide, first->gate ? first->gate->n : 0},
                 {&stream, hidden},
                 {&scores, s->heads * 2 * s->block},
                 {&ring, (model->window + 1) * (keys + 2 * values)}};
    int64_t total = 0;
    for (auto& p : parts) total += ceil_div(m * p.width, 16) * 16;
    float* at = memory = (float*)aligned_alloc(64, total * sizeof(float));
    for (auto& p : parts) *p.at = at, at += ceil_div(m * p.width, 16) * 16;
    rows = (void**)malloc(sizeof(void*) * 6 * model->count * c->rows);
    for (int64_t i = 0; i < model->count; i++) find_rows(i);
    wanted = (char*)calloc(m, 1);
    for (int64_t j = 0; j < c->wanted; j++) wanted[c->wanted_tokens[j]] = 1;
  }
  ~RetNetPass() {
    free(wanted);
    free(memory);
    free(rows);
  }

  // Keys of layer i before fusion; the features of the layers in the window stay in a ring.
  float* own_keys(int64_t i) const { return ring + i % (model->window + 1) * m * (keys + 2 * values); }
  // Values, then gates of the output, of each token.
  float* own_values(int64_t i) const { return own_keys(i) + m * keys; }

  // Whether layer i computes queries and results of the wanted tokens alone.
  bool chooses(int64_t i) const {
    return i == model->count - 1 && c->wanted < m && values % PANEL == 0;
  }

  void** rows_of(int64_t i, int64_t kind) const { return rows + (i * 6 + kind) * c->rows; }
  void find_rows(int64_t i) {
    const int64_t state = keys * s->value_width;
    const int64_t page_k = s->block * keys, page_v = s->block * values;
    const float *k = c->keys + i * c->key_layer, *v = c->values + i * c->value_layer;
    for (int64_t r = 0; r < c->rows; r++) {
      const auto place = [](const float* base, int64_t index, int64_t size) {
        return index < 0 ? nullptr : (void*)(base + index * size);
      };
      rows_of(i, 0)[r] = place(c->states + i * c->state_layer, c->state[r], state);
      rows_of(i, 1)[r] = place(k, c->before[r], page_k);
      rows_of(i, 2)[r] = place(v, c->before[r], page_v);
      rows_of(i, 3)[r] = place(k, c->current[r], page_k);
      rows_of(i, 4)[r] = place(v, c->current[r], page_v);
      rows_of(i, 5)[r] = place(c->moved + i * c->moved_layer, c->moved_to[r], state);
    }
  }
  RetortRetentionCall retention(int64_t i) const {
    const auto in = [&](int64_t kind) { return (const float* const*)rows_of(i, kind); };
    return {s,     c->rows, c->starts, c->counts, c->offsets, turned, key, value, in(0), in(1), in(2),
            in(3), in(4),   c->moved_block, (float* const*)rows_of(i, 5),
            chooses(i) ? wanted : nullptr, scores, attended, 0};
  }
};

// The linear layers of layer i as calls; `x` is its input. Where the layer chooses, `input` makes
// keys and values of all tokens, `asked` queries and gates of the wanted ones side by side, and
// what comes after the retention lies side by side too.
struct RetNetLinears {
  RetortLinear layers[4], asking[2];
  float *in_out[5], *asked_out[2], *gates[2];
  int64_t in_widths[5], asked_widths[2];
  RetortLinearCall input, asked, key_gate, value_gate, output, gate, down;
  RetNetLinears(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, const float* x) {
    const bool chooses = p.chooses(i);
    project(p, l, i);
    if (chooses) choose(p, l, i);
    const int64_t m = chooses ? p.c->wanted : p.m, hidden = p.hidden;
    float* const* out = l->gate ? &p.middle : &p.stream;
    output = {l->output, 1, chooses ? p.value : p.attended, p.values, m, out, &p.hidden,
              chooses ? p.normed : x, hidden, 0};
    if (!l->gate) return;
    gate = {l->gate, 1, p.normed, hidden, m, &p.wide, &l->gate->n, nullptr, 0, 0};
    down = {l->down, 1, p.wide, l->down->k, m, &p.stream, &p.hidden, p.middle, hidden, 0};
  }
  void project(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i) {
    const int64_t m = p.m;
    input = {l->input, l->key_gate ? 5 : 3, p.normed, p.hidden, m, in_out, in_widths, nullptr, 0, 0};
    in_out[0] = p.query, in_out[1] = p.own_keys(i), in_out[2] = p.own_values(i);
    in_out[3] = p.inner;
    for (int64_t j = 0; j < input.count; j++) in_widths[j] = l->input[j].n;
    if (!l->key_gate) return;
    float* inner_v = in_out[4] = p.inner + m * l->key_gate->k;
    gates[0] = p.gate, gates[1] = p.gate + m * p.keys;
    key_gate = {l->key_gate, 1, p.inner, l->key_gate->k, m, gates, &p.keys, nullptr, 0, 0};
    value_gate = {l->value_gate, 1,       inner_v, l->value_gate->k, m,
                  gates + 1,     &p.values, nullptr, 0,                0};
  }
  void choose(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i) {
    for (int64_t j = 1; j < input.count; j++) layers[j - 1] = l->input[j];
    asking[0] = l->input[0], asking[1] = l->input[2];
    layers[1].n = asking[1].n = p.values;
    asking[1].weight = panel_weight(l->input + 2, p.values);
    input.layers = layers, input.count--, input.out++, input.ldo++;
    asked_out[0] = p.query, asked_out[1] = p.attended;
    asked_widths[0] = p.keys, asked_widths[1] = p.values;
    asked = {asking,       2,       p.middle, p.hidden, p.c->wanted, asked_out,
             asked_widths, nullptr, 0,        0};
  }
};

// silu of a token's keys, which are scaled, and of `n` values (and gates of the output).
static void activate_token(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, int64_t t,
                           int64_t n) {
  const auto act = [](vf v) { return silu(v); };
  const vf scale = splat(p.model->scale);
  float *k = p.own_keys(i) + t * p.keys, *v = p.own_values(i) + t * 2 * p.values;
  apply_row(k, nullptr, p.keys, k, [&](vf x) { return silu(x) * scale; });
  apply_row(v, nullptr, n, v, act);
  if (!l->key_gate) return;
  const int64_t inner_k = l->key_gate->k, inner_v = l->value_gate->k;
  float *a = p.inner + t * inner_k, *b = p.inner + p.m * inner_k + t * inner_v;
  apply_row(a, nullptr, inner_k, a, act);
  apply_row(b, nullptr, inner_v, b, act);
}

// silu of a token's query, which is turned.
static void activate_query(const RetNetPass& p, float* q, int64_t t) {
  const int64_t width = p.s->key_width, half = width / 2;
  apply_row(q, nullptr, p.keys, q, [](vf v) { return silu(v); });
  for (int64_t h = 0; h < p.s->heads; h++)
    rotate_pairs_head(q + h * width, p.c->cos + t * half, p.c->sin + t * half, half,
                      p.turned + t * p.keys + h * width);
}

// own + silu(gate) * (the window's sum), without a gate own + the sum; `earlier` gives a layer's
// feature, the window is the layers `first` .. `end`.
template <class Feature>
INLINE void fuse_row(const float* own, const Feature& earlier, int64_t first, int64_t end,
                     const float* gate, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t part = least(W, n - i);
    const auto some = [&](const float* x) { return part == W ? load(x + i) : load_part(x + i, part); };
    vf sum = some(earlier(first));
    for (int64_t j = first + 1; j < end; j++) sum = sum + some(earlier(j));
    if (gate) sum = silu(some(gate)) * sum;
    const vf v = some(own) + sum;
    if (part == W)
      store(out + i, v);
    else
      store_part(out + i, v, part);
  }
}

// The token's keys as the retention wants them: fused, normed, turned.
static void fuse_keys(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, int64_t t) {
  const int64_t n = p.keys, width = p.s->key_width, half = width / 2;
  float* row = p.fused + t * n;
  const auto feature = [&](int64_t j) { return p.own_keys(j) + t * n; };
  if (l->window)
    fuse_row(feature(i), feature, i - l->window, i, l->key_gate ? p.gate + t * n : nullptr, n, row);
  else
    memcpy(row, feature(i), sizeof(float) * n);
  if (l->key_norm) norm_row(row, l->key_norm, n, p.model->eps, 0.f, row);
  for (int64_t h = 0; h < p.s->heads; h++)
    rotate_pairs_head(row + h * width, p.c->cos + t * half, p.c->sin + t * half, half,
                      p.key + t * n + h * width);
}

static void fuse_values(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, int64_t t) {
  const int64_t n = p.values;
  float* row = p.value + t * n;
  const float* gate = l->value_gate ? p.gate + p.m * p.keys + t * n : nullptr;
  const auto feature = [&](int64_t j) { return p.own_values(j) + t * 2 * n; };
  if (l->window)
    fuse_row(feature(i), feature, i - l->window, i, gate, n, row);
  else
    memcpy(row, feature(i), sizeof(float) * n);
  if (l->value_norm) norm_row(row, l->value_norm, n, p.model->eps, 0.f, row);
}

// A token's key and value onto its page.
static void tape_token(const RetNetPass& p, int64_t i, int64_t t) {
  const RetortRetention* s = p.s;
  const int64_t page = p.c->pages[t], offset = p.c->positions[t] % s->block;
  if (page < 0) return;
  for (int64_t h = 0; h < s->heads; h++) {
    const int64_t at = (page * s->heads + h) * s->block + offset;
    memcpy(p.c->keys + i * p.c->key_layer + at * s->key_width,
           p.key + (t * s->heads + h) * s->key_width, sizeof(float) * s->key_width);
    memcpy(p.c->values + i * p.c->value_layer + at * s->value_width,
           p.value + (t * s->heads + h) * s->value_width, sizeof(float) * s->value_width);
  }
}

// o = norm(Y / root) * g of a token.
static void gate_token(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, int64_t t) {
  const int64_t n = p.s->value_width;
  for (int64_t h = 0; h < p.s->heads; h++) {
    const vf root = splat(p.c->root[t * p.s->heads + h]);
    const float* g = p.own_values(i) + t * 2 * p.values + p.values + h * n;
    float* y = p.attended + t * p.values + h * n;
    apply_row(y, nullptr, n, y, [&](vf v) { return v / root; });
    norm_row(y, l->group_norm, n, p.model->eps, 0.f, y);
    apply_row(y, g, n, y, [](vf v) { return v; });
  }
}

static void norm_tokens(const RetNetPass& p, const float* x, int64_t m, const float* weight,
                        float* out, const Team& team) {
  for (int64_t t = team.begin(m); t < team.end(m); t++)
    norm_row(x + t * p.hidden, weight, p.hidden, p.model->eps, 0.f, out + t * p.hidden);
}

// Rows of the wanted tokens side by side.
static void gather_wanted(const RetNetPass& p, const float* from, int64_t n, float* to,
                          const Team& team) {
  for (int64_t j = team.begin(p.c->wanted); j < team.end(p.c->wanted); j++)
    memcpy(to + j * n, from + p.c->wanted_tokens[j] * n, sizeof(float) * n);
}

// Projections of the normed input through silu.
static void project_part(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i,
                         const RetNetLinears& linears, const Team& team) {
  const bool chooses = p.chooses(i);
  const int64_t lo = team.begin(p.m), hi = team.end(p.m), n = p.values;
  linear_part(&linears.input, team);
  if (chooses && p.c->wanted) linear_part(&linears.asked, team);
  team.barrier();
  for (int64_t t = lo; t < hi; t++) activate_token(p, l, i, t, chooses ? n : 2 * n);
  if (!chooses)
    for (int64_t t = lo; t < hi; t++) activate_query(p, p.query + t * p.keys, t);
  else
    for (int64_t j = team.begin(p.c->wanted); j < team.end(p.c->wanted); j++) {
      const int64_t t = p.c->wanted_tokens[j];
      activate_query(p, p.query + j * p.keys, t);
      apply_row(p.attended + j * n, nullptr, n, p.own_values(i) + (2 * t + 1) * n,
                [](vf v) { return silu(v); });
    }
}

// Fused keys and values of the tokens, which go on the tape.
static void fuse_part(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i,
                      const RetNetLinears& linears, const Team& team) {
  if (l->key_gate) {
    team.barrier();
    linear_part(&linears.key_gate, team);
    linear_part(&linears.value_gate, team);
    team.barrier();
  }
  for (int64_t t = team.begin(p.m); t < team.end(p.m); t++) {
    fuse_keys(p, l, i, t);
    fuse_values(p, l, i, t);
    tape_token(p, i, t);
  }
}

// From the retention to the layer's result.
static void output_part(const RetNetPass& p, const RetortRetNetLayer* l, int64_t i, const float* x,
                        const RetNetLinears& linears, const Team& team) {
  const bool chooses = p.chooses(i);
  for (int64_t t = team.begin(p.m); t < team.end(p.m); t++)
    if (!chooses || p.wanted[t]) gate_token(p, l, i, t);
  if (chooses) {
    team.barrier();
    gather_wanted(p, p.attended, p.values, p.value, team);
    gather_wanted(p, x, p.hidden, p.normed, team);
  }
  team.barrier();
  const int64_t m = linears.output.m;
  if (m) linear_part(&linears.output, team);
  team.barrier();
  if (!l->gate || !m) return;
  norm_tokens(p, p.middle, m, l->mlp_norm, p.normed, team);
  team.barrier();
  linear_part(&linears.gate, team);
  team.barrier();
  linear_part(&linears.down, team);
  team.barrier();
}

// What one thread of a team does of layer i; `x` may be the stream that the result goes to.
static void retnet_part(const RetNetPass& p, int64_t i, const float* x, const FoldScratch& scratch,
                        const Team& team) {
  const RetortRetNetLayer* l = p.model->layers[i];
  const RetNetLinears linears(p, l, i, x);
  const RetortRetentionCall retention = p.retention(i);
  norm_tokens(p, x, p.m, l->norm, p.normed, team);
  team.barrier();
  if (p.chooses(i)) {
    gather_wanted(p, p.normed, p.hidden, p.middle, team);
    team.barrier();
  }
  project_part(p, l, i, linears, team);
  fuse_part(p, l, i, linears, team);
  team.barrier();
  score_part(&retention, team);
  team.barrier();
  retain_part(&retention, scratch, team);
  team.barrier();
  output_part(p, l, i, x, linears, team);
}

// The last norm of the wanted tokens, whose results lie side by side where the last layer chose.
static void finish_part(const RetNetPass& p, const Team& team) {
  const bool chosen = p.chooses(p.model->count - 1);
  for (int64_t j = team.begin(p.c->wanted); j < team.end(p.c->wanted); j++)
    norm_row(p.stream + (chosen ? j : p.c->wanted_tokens[j]) * p.hidden, p.model->norm, p.hidden,
             p.model->eps, 0.f, p.c->out + j * p.hidden);
}

static void retnet(const RetortRetNetCall* c) {
  const RetNetPass p(c);
  run_team(c->threads, [&](const Team& team) {
    const FoldScratch scratch(p.s);
    for (int64_t i = 0; i < p.model->count; i++)
      retnet_part(p, i, i ? p.stream : c->x, scratch, team);
    finish_part(p, team);
  });
}

}  // namespace RETORT_ISA
