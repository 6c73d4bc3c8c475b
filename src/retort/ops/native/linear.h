// Packed linear layers: weights stream once, every output is one sum in order of k whatever the
// number of rows, so a row has the same bits in any company.
#pragma once
#include <stdlib.h>

#include "api.h"
#include "simd.h"
#include "team.h"

namespace RETORT_ISA {

constexpr int PANEL = 32;
constexpr int GROUPS = 16 / W;           // a group: W columns from g * W, and W from 16 + g * W
constexpr int ROWS = W == 16 ? 12 : 6;   // rows of a tile: the accumulators fill the registers
constexpr int64_t BLOCK_BYTES = 400000;  // input rows that share the second-level cache with panels

struct F32 {
  typedef float type;
  static constexpr int AHEAD = 48;  // steps of k that the prefetch runs ahead, as measured
  INLINE void read(const float* p, int g, vf& a, vf& b) {
    a = load(p + g * W);
    b = load(p + 16 + g * W);
  }
};
struct BF16 {
  typedef uint16_t type;
  static constexpr int AHEAD = 128;
  INLINE void read(const uint16_t* p, int g, vf& a, vf& b) {
    vi bits = load_bits(p + 2 * g * W);
    a = (vf)(bits << 16);
    b = (vf)(bits & (int32_t)0xffff0000);
  }
};

// Where the weights to fetch now lie: `step` bytes more for every k, from k = turn on at `then`.
struct Ahead {
  const char* at;
  int64_t step, turn;
  const char* then;
};

// R rows by NG groups of one panel into buf[R][32].
template <class T, int R, int NG>
INLINE void tile_groups(const float* x, int64_t ldx, const typename T::type* w, int64_t k, int g0,
                        Ahead ahead, float* buf) {
  vf acc[R][2 * NG];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * NG; c++) acc[r][c] = vf{};
  const char* at = ahead.at;
  const bool wide = ahead.step > 64;
  for (int64_t i = 0; i < k; i++, w += PANEL, at += ahead.step) {
    if (i == ahead.turn) at = ahead.then;
    prefetch(at);
    if (wide) prefetch(at + 64);
    vf b[2 * NG];
#pragma GCC unroll 4
    for (int g = 0; g < NG; g++) T::read(w, g0 + g, b[2 * g], b[2 * g + 1]);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vf a = splat(x[r * ldx + i]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * NG; c++) acc[r][c] = fma(a, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int g = 0; g < NG; g++) {
      store(buf + r * PANEL + (g0 + g) * W, acc[r][2 * g]);
      store(buf + r * PANEL + 16 + (g0 + g) * W, acc[r][2 * g + 1]);
    }
}

template <class T, int R>
static void tile(const float* x, int64_t ldx, const void* w, int64_t k, Ahead ahead, float* buf) {
  constexpr int FIT = 6 / R > 4 ? 4 : 6 / R > 1 ? (6 / R > 3 ? 4 : 2) : 1;
  constexpr int NG = GROUPS < FIT ? GROUPS : FIT;
  for (int g = 0; g < GROUPS; g += NG)
    tile_groups<T, R, NG>(x, ldx, (const typename T::type*)w, k, g, ahead, buf);
}

typedef void (*Tile)(const float*, int64_t, const void*, int64_t, Ahead, float*);
template <class T>
static Tile choose_tile(int rows) {
  static const Tile tiles[] = {
      tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>,
#if defined(__AVX512F__)
      tile<T, 7>, tile<T, 8>, tile<T, 9>, tile<T, 10>, tile<T, 11>, tile<T, 12>,
#endif
  };
  return tiles[rows - 1];
}

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

// One tile of one panel. A single tile fetches its own panel ahead and turns to the next one at the
// end; several tiles each fetch a part of the next panel.
INLINE void run_tile(const RetortLinear* l, int64_t column, const char* next, const Rows& rows,
                     float* buf) {
  const int64_t step = step_bytes(l), far = l->bf16 ? BF16::AHEAD : F32::AHEAD;
  const char* w = panel_weight(l, column);
  Ahead ahead = {w + far * step, step, most(0, l->k - far), next};
  if (rows.count > 1)
    ahead = {next + step * (l->k * rows.index / rows.count), step / rows.count, -1, nullptr};
  (l->bf16 ? choose_tile<BF16>(rows.n) : choose_tile<F32>(rows.n))(rows.x, rows.ld, w, l->k, ahead,
                                                                  buf);
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

// Calls emit(panel, first row, rows, buf[rows][32], up[rows][32]) for this thread's panels and all
// rows; `up` is filled for gated layers.
template <class Emit>
static void sweep(const RetortLinear* layers, int64_t count, const float* x, int64_t ldx, int64_t m,
                  const Team& team, const Emit& emit) {
  const int64_t k = layers->k, panels = count_panels(layers, count);
  const int64_t lo = team.begin(panels), hi = team.end(panels);
  const int64_t fit = most(2, BLOCK_BYTES / (4 * ROWS * k)) * ROWS;
  const int64_t block = ceil_div(m, ceil_div(m, fit));
  alignas(64) float buf[ROWS * PANEL], up[ROWS * PANEL];
  if (lo == hi) return;
  for (int64_t first = 0; first < m; first += block) {
    const int64_t rows = least(block, m - first), tiles = ceil_div(rows, ROWS);
    Input in(x + first * ldx, ldx, rows, k);
    for (int64_t id = lo; id < hi; id++) {
      const Panel p = find_panel(layers, id);
      const Panel next = id + 1 < hi ? find_panel(layers, id + 1) : p;
      const char* after = panel_weight(next.layer, next.column);
      const RetortLinear* pair = p.layer->up;
      const char* after_up = pair ? panel_weight(pair, next.column) : nullptr;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t r = rows * t / tiles, n = rows * (t + 1) / tiles - r;
        const Rows run = {in.x + r * in.ld, in.ld, n, t, tiles};
        const bool alone = tiles == 1;
        run_tile(p.layer, p.column, pair && alone ? panel_weight(pair, p.column) : after, run, buf);
        if (pair) run_tile(pair, p.column, alone ? after : after_up, run, up);
        emit(p, first + r, n, buf, up);
      }
    }
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
