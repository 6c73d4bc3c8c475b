// All layers of a DenseMamba in one parallel region: each step is split over the team, with a
// barrier between steps. The arithmetic of every step is that of the separate kernels and, between
// them, of single products and sums.
#pragma once
#include "activation.h"
#include "elementwise.h"
#include "linear.h"
#include "scan.h"

namespace RETORT_ISA {

// A pass: its sizes and its intermediate rows in one allocation.
struct MambaPass {
  const RetortMambaCall* c;
  const RetortMamba* model;
  int64_t hidden, channels, states, kernel, wide, m;  // wide: of the parameters of a token
  float *normed, *xz, *inner, *gate, *history, *y, *earlier, *stream, *ring, *memory;
  void** pointers;  // for each layer [rows] states before, then one for each kept state
  int64_t* none;    // [rows] zeros: no kept states

  explicit MambaPass(const RetortMambaCall* call)
      : c(call), model(call->model), states(model->states), kernel(model->kernel), m(call->total) {
    const RetortMambaLayer *first = model->layers[0], *last = model->layers[model->count - 1];
    hidden = first->output->n, channels = first->output->k, wide = first->parameters->n;
    struct {
      float** at;
      int64_t size;
    } parts[] = {{&normed, m * hidden},
                 {&xz, m * 2 * channels},
                 {&inner, last->gate ? m * last->gate->k : 0},
                 {&gate, last->gate ? m * channels : 0},
                 {&history, c->rows * (kernel - 1) * channels},
                 {&y, m * channels},
                 {&earlier, model->window ? 2 * m * channels : 0},
                 {&stream, m * hidden},
                 {&ring, (model->window + 1) * m * (2 * channels + wide)}};
    int64_t total = 0;
    for (auto& p : parts) total += ceil_div(p.size, 16) * 16;
    float* at = memory = (float*)aligned_alloc(64, total * sizeof(float));
    for (auto& p : parts) *p.at = at, at += ceil_div(p.size, 16) * 16;
    none = (int64_t*)calloc(c->rows, sizeof(int64_t));
    const int64_t kept = c->kept_ends[c->rows - 1];
    pointers = (void**)malloc(sizeof(void*) * model->count * (c->rows + kept));
    for (int64_t i = 0; i < model->count; i++) {
      for (int64_t r = 0; r < c->rows; r++) initial(i)[r] = state(i, c->initial[r]);
      for (int64_t j = 0; j < kept; j++) kept_states(i)[j] = state(i, c->kept[j]);
    }
  }
  ~MambaPass() {
    free(memory);
    free(pointers);
    free(none);
  }

  // What layer i fed its recurrence with; that of the layers in the window stays in a ring.
  float* dt(int64_t i) const {
    return ring + i % (model->window + 1) * m * (2 * channels + wide);
  }
  float* u(int64_t i) const { return dt(i) + m * channels; }
  float* parameters(int64_t i) const { return u(i) + m * channels; }
  int64_t rank() const { return wide - 2 * states; }

  float* state(int64_t i, int64_t index) const {
    return index < 0 ? nullptr : c->states + i * c->state_layer + index * states * channels;
  }
  float** initial(int64_t i) const {
    const int64_t kept = c->kept_ends[c->rows - 1];
    return (float**)pointers + i * (c->rows + kept);
  }
  float** kept_states(int64_t i) const { return initial(i) + c->rows; }

  // The scan of layer j's inputs, read by layer i's C into `out`.
  RetortScanCall scan(int64_t i, int64_t j, float* out) const {
    const float *b = parameters(j) + rank(), *read = parameters(i) + rank() + states;
    return {c->rows, channels, states, c->counts, c->offsets, model->layers[j]->a, dt(j), u(j), b,
            read, channels, channels, wide, wide, (const float* const*)initial(j), c->kept_ends,
            c->kept_tokens, kept_states(j), out, 0};
  }
  RetortConvCall convolution(int64_t i) const {
    const RetortMambaLayer* l = model->layers[i];
    return {c->rows, channels, kernel, 1, c->counts, c->offsets, xz, 2 * channels, history,
            l->conv_weight, l->conv_bias, u(i), 0};
  }
};

// The linear layers of layer i as calls; `x` is its input.
struct MambaLinears {
  float* in_out[2];
  int64_t in_widths[2];
  float *parameters_out, *dt;
  RetortLinearCall input, gate, parameters, step, output;
  MambaLinears(const MambaPass& p, const RetortMambaLayer* l, int64_t i, const float* x)
      : in_out{p.xz, p.inner},
        in_widths{2 * p.channels, l->gate ? l->gate->k : 0},
        parameters_out(p.parameters(i)),
        dt(p.dt(i)) {
    const int64_t m = p.m, hidden = p.hidden;
    input = {l->input, l->gate ? 2 : 1, p.normed, hidden, m, in_out, in_widths, nullptr, 0, 0};
    if (l->gate)
      gate = {l->gate, 1, p.inner, l->gate->k, m, &p.gate, &p.channels, nullptr, 0, 0};
    parameters = {l->parameters, 1, p.u(i), p.channels, m, &parameters_out, &p.wide, nullptr, 0, 0};
    step = {l->step, 1, parameters_out, p.wide, m, &dt, &p.channels, nullptr, 0, 0};
    output = {l->output, 1, p.y, p.channels, m, &p.stream, &p.hidden, x, hidden, 0};
  }
};

// The convolution's inputs before each row, zeros before its first token.
static void gather_history(const MambaPass& p, int64_t i, const Team& team) {
  const int64_t n = p.c->rows * (p.kernel - 1);
  for (int64_t j = team.begin(n); j < team.end(n); j++) {
    const int64_t page = p.c->history_pages[j], D = p.channels;
    if (page < 0) {
      memset(p.history + j * D, 0, sizeof(float) * D);
      continue;
    }
    const int64_t at = page * p.c->page + p.c->history_offsets[j];
    memcpy(p.history + j * D, p.c->inputs + i * p.c->input_layer + at * D, sizeof(float) * D);
  }
}

// A token's columns onto its page.
INLINE void tape_columns(const MambaPass& p, int64_t i, int64_t t, int64_t column, int64_t n) {
  const int64_t page = p.c->tape_pages[t], D = p.channels;
  if (page < 0) return;
  const int64_t at = page * p.c->page + p.c->tape_offsets[t], size = sizeof(float) * n;
  float* fed = p.c->fed + i * p.c->fed_layer + at * (2 * D + p.states);
  memcpy(fed + column, p.dt(i) + t * D + column, size);
  memcpy(fed + D + column, p.u(i) + t * D + column, size);
  memcpy(p.c->inputs + i * p.c->input_layer + at * D + column, p.xz + t * 2 * D + column, size);
  if (!column)
    memcpy(fed + 2 * D, p.parameters(i) + t * p.wide + p.rank(), sizeof(float) * p.states);
}

// What C reads of a state that lies in memory: the sum that a scan would take, state after state.
INLINE void read_state(const float* h, const float* read, int64_t states, int64_t channels,
                       int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t part = least(W, n - i);
    vf y = vf{};
    for (int64_t s = 0; s < states; s++)
      y = fma(splat(read[s]), load_some(h + s * channels + i, part), y);
    store_some(out + i, y, part);
  }
}

// Columns `column` .. `column + n` of one row of layer j, read by layer i's C. Where the row has one
// token, layer j has left the state after it in memory.
static void read_earlier(const MambaPass& p, int64_t i, int64_t j, int64_t r, int64_t column,
                         int64_t n, float* out, float* scratch) {
  const int64_t t = p.c->offsets[r], D = p.channels;
  if (p.c->counts[r] == 1) {
    const float* read = p.parameters(i) + t * p.wide + p.rank() + p.states;
    read_state(p.state(j, p.c->last[r]) + column, read, p.states, D, n, out + t * D + column);
    return;
  }
  RetortScanCall call = p.scan(i, j, out);
  call.kept_ends = p.none;
  scan_row(&call, r, column, n, scratch, scratch + unit_states(p.states));
}

// y = (own + silu(gate) * (the window's sum) + D u) * silu(z) of a token's columns.
INLINE void read_out(const MambaPass& p, const RetortMambaLayer* l, int64_t i, int64_t t,
                     int64_t column, int64_t n) {
  const int64_t at = t * p.channels + column;
  const float *u = p.u(i) + at, *d = l->d + column, *z = p.xz + 2 * at - column + p.channels;
  for (int64_t k = 0; k < n; k += W) {
    const int64_t part = least(W, n - k);
    vf y = load_some(p.y + at + k, part);
    if (l->window) {
      const vf sum = load_some(p.earlier + at + k, part);
      y = y + (l->gate ? silu(load_some(p.gate + at + k, part)) * sum : sum);
    }
    y = y + load_some(d + k, part) * load_some(u + k, part);
    store_some(p.y + at + k, silu(load_some(z + k, part)) * y, part);
  }
}

// Columns of one row: step sizes, tape, the layer's own scan, the earlier layers', the output.
static void mix_unit(const MambaPass& p, const RetortMambaLayer* l, int64_t i, int64_t r,
                     int64_t column, int64_t n, float* scratch) {
  const int64_t lo = p.c->offsets[r], hi = lo + p.c->counts[r], D = p.channels;
  for (int64_t t = lo; t < hi; t++) {
    float* dt = p.dt(i) + t * D + column;
    apply_row(dt, nullptr, n, dt, [](vf v) { return softplus(v); });
    tape_columns(p, i, t, column, n);
  }
  const RetortScanCall own = p.scan(i, i, p.y);
  scan_row(&own, r, column, n, scratch, scratch + unit_states(p.states));
  for (int64_t j = i - l->window; j < i; j++) {
    float *sum = p.earlier, *more = p.earlier + p.m * D;
    read_earlier(p, i, j, r, column, n, j == i - l->window ? sum : more, scratch);
    if (j == i - l->window) continue;
    for (int64_t t = lo; t < hi; t++)
      for (int64_t k = t * D + column; k < t * D + column + n; k++) sum[k] = sum[k] + more[k];
  }
  for (int64_t t = lo; t < hi; t++) read_out(p, l, i, t, column, n);
}

static void mix_part(const MambaPass& p, const RetortMambaLayer* l, int64_t i, float* scratch,
                     const Team& team) {
  const int64_t parts = ceil_div(p.channels, CHANNELS);
  for (int64_t unit = team.rank; unit < p.c->rows * parts; unit += team.size) {
    const int64_t column = unit % parts * CHANNELS;
    mix_unit(p, l, i, unit / parts, column, least(CHANNELS, p.channels - column), scratch);
  }
}

static void norm_tokens(const MambaPass& p, const float* x, const float* weight, float* out,
                        const Team& team) {
  for (int64_t t = team.begin(p.m); t < team.end(p.m); t++)
    norm_row(x + t * p.hidden, weight, p.hidden, p.model->eps, 0.f, out + t * p.hidden);
}

// What one thread of a team does of layer i; `x` may be the stream that the result goes to.
static void mamba_part(const MambaPass& p, int64_t i, const float* x, float* scratch,
                       const Team& team) {
  const RetortMambaLayer* l = p.model->layers[i];
  const MambaLinears linears(p, l, i, x);
  const RetortConvCall convolution = p.convolution(i);
  norm_tokens(p, x, l->norm, p.normed, team);
  gather_history(p, i, team);
  team.barrier();
  linear_part(&linears.input, team);
  team.barrier();
  convolution_part(&convolution, scratch, team);
  if (l->gate)
    for (int64_t t = team.begin(p.m); t < team.end(p.m); t++) {
      float* row = p.inner + t * l->gate->k;
      apply_row(row, nullptr, l->gate->k, row, [](vf v) { return silu(v); });
    }
  team.barrier();
  linear_part(&linears.parameters, team);
  if (l->gate) linear_part(&linears.gate, team);
  team.barrier();
  linear_part(&linears.step, team);
  team.barrier();
  mix_part(p, l, i, scratch, team);
  team.barrier();
  linear_part(&linears.output, team);
  team.barrier();
}

static void mamba(const RetortMambaCall* c) {
  const MambaPass p(c);
  const int64_t scratch = most(2 * unit_states(p.states), p.kernel * CHANNELS);
  run_team(c->threads, [&](const Team& team) {
    float* mine = (float*)malloc(sizeof(float) * scratch);
    for (int64_t i = 0; i < p.model->count; i++)
      mamba_part(p, i, i ? p.stream : c->x, mine, team);
    norm_tokens(p, p.stream, p.model->norm, c->out, team);
    free(mine);
  });
}

}  // namespace RETORT_ISA
