// Packed linear layers: weights stream once for all rows, split over the team by panels.
#pragma once
#include <stdlib.h>

#include "api.h"
#include "team.h"
#include "tile.h"

namespace RETORT_ISA {

constexpr int64_t BLOCK_BYTES = 400000;  // input rows that share the second-level cache with panels

// A panel of one of the layers of a call.
struct Panel {
  const RetortLinear* layer;
  int64_t segment, column;
};

INLINE Panel find_panel(const RetortLinear* layers, int64_t id) {
  int64_t s = 0;
  for (; id >= ceil_div(layers[s].n, PANEL); s++) id -= ceil_div(layers[s].n, PANEL);
  return {layers + s, s, id * PANEL};
}

INLINE int64_t step_bytes(const RetortLinear* l) { return PANEL * (l->bf16 ? 2 : 4); }
INLINE const char* panel_weight(const RetortLinear* l, int64_t column) {
  return (const char*)l->weight + column * l->k * (l->bf16 ? 2 : 4);
}

INLINE int64_t count_panels(const RetortLinear* layers, int64_t count) {
  int64_t n = 0;
  for (int64_t s = 0; s < count; s++) n += ceil_div(layers[s].n, PANEL);
  return n;
}

// A run of rows of a block: tile `index` of `count`.
struct Rows {
  const float* x;
  int64_t ld, n, index, count;
};

// A panel for `rows`, with `next` after it. A single tile fetches its own panel ahead and turns to
// the next one at the end; several tiles each fetch a part of the next panel.
INLINE Stream stream_of(const RetortLinear* l, int64_t column, const char* next, const Rows& rows,
                        float* buf) {
  const int64_t step = step_bytes(l), far = l->bf16 ? BF16::AHEAD : F32::AHEAD;
  const char* w = panel_weight(l, column);
  if (rows.count == 1) return {w, {w + far * step, step, most(0, l->k - far), next}, buf};
  const char* part = next + step * (l->k * rows.index / rows.count);
  return {w, {part, step / rows.count, -1, nullptr}, buf};
}

INLINE void run_tile(const RetortLinear* l, const Stream* s, int count, const Rows& rows) {
  const int n = (int)rows.n;
  const Tile run = l->bf16 ? choose_tile<BF16>(n, count) : choose_tile<F32>(n, count);
  run(rows.x, rows.ld, s, l->k);
}

// Input rows, copied where their distance would put all rows of a tile into the same cache sets.
struct Input {
  const float* x;
  int64_t ld;
  float* copy;
  Input(const float* from, int64_t ldx, int64_t rows, int64_t k) : x(from), ld(ldx), copy(nullptr) {
    if (rows <= 4 || ldx % 512) return;
    ld = k + 16;
    copy = (float*)malloc(sizeof(float) * ld * rows);
    for (int64_t r = 0; r < rows; r++) memcpy(copy + r * ld, from + r * ldx, sizeof(float) * k);
    x = copy;
  }
  ~Input() { free(copy); }
};

// A buffer for the results of two panels.
struct Buffers {
  alignas(64) float a[ROWS * PANEL], b[ROWS * PANEL];
};

// How the panels of a call go side by side: gate with up, or two plain ones.
enum Pairing { NONE, PLAIN, GATED };
INLINE Pairing pairing_of(const RetortLinear* layers, int64_t count) {
  const bool gated = layers->up;
  for (int64_t i = 0; i < count; i++) {
    const RetortLinear *l = layers + i, *up = l->up;
    if (!up == gated || l->bf16 != layers->bf16 || (up && up->bf16 != l->bf16)) return NONE;
  }
  return gated ? GATED : PLAIN;
}

// Panels lo .. hi in pairs: plain ones from both halves of the run, so that each stream of weights
// is one long read. Returns the panels done.
template <class Emit>
static int64_t sweep_pairs(const RetortLinear* layers, int64_t lo, int64_t hi, Pairing pairing,
                           int64_t first, const Rows& rows, Buffers& buf, const Emit& emit) {
  const bool gated = pairing == GATED;
  const int64_t count = gated ? hi - lo : (hi - lo) / 2;
  for (int64_t id = lo; id < lo + count; id++) {
    const int64_t more = id + 1 < lo + count;
    const Panel p = find_panel(layers, id), q = gated ? p : find_panel(layers, id + count);
    const Panel after = find_panel(layers, id + more);
    const Panel last = gated ? after : find_panel(layers, id + count + more);
    const RetortLinear *l = gated ? p.layer->up : q.layer;
    const RetortLinear *n = gated ? after.layer->up : last.layer;
    const Stream streams[] = {
        stream_of(p.layer, p.column, panel_weight(after.layer, after.column), rows, buf.a),
        stream_of(l, q.column, panel_weight(n, last.column), rows, buf.b)};
    run_tile(p.layer, streams, 2, rows);
    emit(p, first, rows.n, buf.a, buf.b);
    if (!gated) emit(q, first, rows.n, buf.b, nullptr);
  }
  return gated ? count : 2 * count;
}

// One panel at a time, for all rows in tiles.
template <class Emit>
static void sweep_single(const RetortLinear* layers, int64_t id, int64_t hi, int64_t first,
                         const Rows& rows, Buffers& buf, const Emit& emit) {
  const int64_t tiles = ceil_div(rows.n, ROWS);
  const bool alone = tiles == 1;
  for (; id < hi; id++) {
    const Panel p = find_panel(layers, id), next = id + 1 < hi ? find_panel(layers, id + 1) : p;
    const char* after = panel_weight(next.layer, next.column);
    const RetortLinear* up = p.layer->up;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t r = rows.n * t / tiles, n = rows.n * (t + 1) / tiles - r;
      const Rows run = {rows.x + r * rows.ld, rows.ld, n, t, tiles};
      const char* then = up && alone ? panel_weight(up, p.column) : after;
      const Stream one = stream_of(p.layer, p.column, then, run, buf.a);
      run_tile(p.layer, &one, 1, run);
      if (up) {
        then = alone ? after : panel_weight(up, next.column);
        const Stream two = stream_of(up, p.column, then, run, buf.b);
        run_tile(up, &two, 1, run);
      }
      emit(p, first + r, n, buf.a, buf.b);
    }
  }
}

// Calls emit(panel, first row, rows, buf[rows][32], up[rows][32]) for this thread's panels and all
// rows; `up` is filled for gated layers.
template <class Emit>
static void sweep(const RetortLinear* layers, int64_t count, const float* x, int64_t ldx, int64_t m,
                  const Team& team, const Emit& emit) {
  const int64_t k = layers->k, panels = count_panels(layers, count);
  const int64_t lo = team.begin(panels), hi = team.end(panels);
  const int64_t fit = most(2, BLOCK_BYTES / (4 * ROWS * k)) * ROWS;
  const int64_t block = ceil_div(m, ceil_div(m, fit));
  const Pairing pairing = pairing_of(layers, count);
  Buffers buf;
  if (lo == hi) return;
  for (int64_t first = 0; first < m; first += block) {
    const int64_t n = least(block, m - first);
    Input in(x + first * ldx, ldx, n, k);
    const Rows rows = {in.x, in.ld, n, 0, 1};
    int64_t done = 0;
    if (n <= SIDE && pairing != NONE)
      done = sweep_pairs(layers, lo, hi, pairing, first, rows, buf, emit);
    sweep_single(layers, lo + done, hi, first, rows, buf, emit);
  }
}

// buf[rows][32] plus bias and residual into columns column.. of out.
static void put_plain(const RetortLinearCall* c, const Panel& p, int64_t row, int64_t rows,
                      const float* buf) {
  const int64_t n = least(PANEL, p.layer->n - p.column), ldo = c->ldo[p.segment];
  const float* bias = p.layer->bias ? p.layer->bias + p.column : nullptr;
  const bool add = c->residual && p.segment == 0;
  for (int64_t r = 0; r < rows; r++, buf += PANEL) {
    float* out = c->out[p.segment] + (row + r) * ldo + p.column;
    const float* res = add ? c->residual + (row + r) * c->ldr + p.column : nullptr;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      vf v = load(buf + i);
      if (bias) v = v + load(bias + i);
      if (res) v = v + load(res + i);
      store(out + i, v);
    }
    for (; i < n; i++) {
      float v = buf[i];
      if (bias) v = v + bias[i];
      if (res) v = v + res[i];
      out[i] = v;
    }
  }
}

// silu(gate + bias) * (up + bias) of a gated panel; overwrites the gate's buffer.
static void put_gated(const RetortLinearCall* c, const Panel& p, int64_t row, int64_t rows,
                      float* gate, const float* up) {
  const RetortLinear *a = p.layer, *b = p.layer->up;
  const int64_t n = least(PANEL, a->n - p.column), ldo = c->ldo[p.segment];
  for (int64_t r = 0; r < rows; r++, gate += PANEL, up += PANEL) {
    float* out = c->out[p.segment] + (row + r) * ldo + p.column;
    for (int64_t i = 0; i < n; i += W) {
      const int64_t part = least(W, n - i);
      vf g = load(gate + i), u = load(up + i);
      if (a->bias) g = g + load_part(a->bias + p.column + i, part);
      if (b->bias) u = u + load_part(b->bias + p.column + i, part);
      store(gate + i, silu(g) * u);
    }
    memcpy(out, gate, sizeof(float) * n);
  }
}

// What one thread of a team does of a call.
static void linear_part(const RetortLinearCall* c, const Team& team) {
  sweep(c->layers, c->count, c->x, c->ldx, c->m, team,
        [&](const Panel& p, int64_t row, int64_t rows, float* buf, const float* up) {
          if (p.layer->up)
            put_gated(c, p, row, rows, buf, up);
          else
            put_plain(c, p, row, rows, buf);
        });
}

static void linear(const RetortLinearCall* c) {
  run_team((int)least(c->threads, count_panels(c->layers, c->count)),
           [&](const Team& team) { linear_part(c, team); });
}

static void linears(const RetortLinearsCall* c) {
  run_team(c->threads, [&](const Team& team) {
    for (int64_t i = 0; i < c->count; i++) {
      linear_part(c->calls + i, team);
      team.barrier();
    }
  });
}

struct Best {
  float value;
  int64_t index;
  // The first of equal values wins; NaN beats every number, as in torch.argmax.
  INLINE bool beats(float a, float b) { return a > b || (a != a && b == b); }
};

static void argmax(const RetortArgmaxCall* c) {
  const int threads = c->threads > 1 ? c->threads : 1;
  const RetortLinear* layer = c->layer;
  Best* best = (Best*)malloc(sizeof(Best) * c->m * threads);
  for (int64_t i = 0; i < c->m * threads; i++) best[i] = {0, -1};
  run_team(threads, [&](const Team& team) {
    Best* mine = best + team.rank * c->m;
    sweep(layer, 1, c->x, c->ldx, c->m, team,
          [&](const Panel& p, int64_t row, int64_t rows, const float* buf, const float*) {
            const int64_t n = least(PANEL, layer->n - p.column);
            for (int64_t r = 0; r < rows; r++, buf += PANEL) {
              Best b = mine[row + r];
              for (int64_t i = 0; i < n; i++) {
                const float v = layer->bias ? buf[i] + layer->bias[p.column + i] : buf[i];
                if (b.index < 0 || Best::beats(v, b.value)) b = {v, p.column + i};
              }
              mine[row + r] = b;
            }
          });
  });
  for (int64_t r = 0; r < c->m; r++) {
    Best b = best[r];
    for (int t = 1; t < threads; t++) {
      const Best other = best[t * c->m + r];
      if (other.index >= 0 && (b.index < 0 || Best::beats(other.value, b.value))) b = other;
    }
    c->index[r] = b.index;
    c->value[r] = b.value;
  }
  free(best);
}

}  // namespace RETORT_ISA
