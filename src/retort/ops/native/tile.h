// The inner product of packed linear layers: a few rows by one or two panels of 32 outputs. Every
// output is one sum in order of k, whatever the number of rows or panels.
#pragma once
#include "simd.h"

namespace RETORT_ISA {

constexpr int PANEL = 32;
constexpr int GROUPS = 16 / W;           // a group: W columns from g * W, and W from 16 + g * W
constexpr int ROWS = W == 16 ? 12 : 6;   // rows of a tile: the accumulators fill the registers
constexpr int SIDE = W == 16 ? 6 : 0;    // most rows for which two panels go side by side

// AHEAD: steps of k that the prefetch runs ahead; ALONE: most rows for which the processor's own
// prefetcher is faster without it. Both as measured.
struct F32 {
  typedef float type;
  static constexpr int AHEAD = 56, ALONE = SIDE;
  INLINE void read(const float* p, int g, vf& a, vf& b) {
    a = load(p + g * W);
    b = load(p + 16 + g * W);
  }
};
struct BF16 {
  typedef uint16_t type;
  static constexpr int AHEAD = 128, ALONE = SIDE / 2;
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

// A panel on its way through a tile, and where its results go, [rows][32].
struct Stream {
  const char* weight;
  Ahead ahead;
  float* buf;
};

// R rows by NG groups of S panels into their buffers.
template <class T, int R, int NG, int S>
INLINE void tile_groups(const float* x, int64_t ldx, const Stream* s, int64_t k, int g0) {
  constexpr bool FETCH = R > T::ALONE;
  const int64_t step = s->ahead.step, turn = s->ahead.turn;
  const typename T::type* w[S];
  const char* at[S];
  vf acc[S][R][2 * NG];
#pragma GCC unroll 2
  for (int p = 0; p < S; p++) {
    w[p] = (const typename T::type*)s[p].weight;
    at[p] = s[p].ahead.at;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < 2 * NG; c++) acc[p][r][c] = vf{};
  }
  for (int64_t i = 0; i < k; i++)
#pragma GCC unroll 2
    for (int p = 0; p < S; p++) {
      if (FETCH) {
        if (i == turn) at[p] = s[p].ahead.then;
        prefetch(at[p]);
        if (step > 64) prefetch(at[p] + 64);
        at[p] += step;
      }
      vf b[2 * NG];
#pragma GCC unroll 4
      for (int g = 0; g < NG; g++) T::read(w[p], g0 + g, b[2 * g], b[2 * g + 1]);
      w[p] += PANEL;
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const vf a = splat(x[r * ldx + i]);
#pragma GCC unroll 8
        for (int c = 0; c < 2 * NG; c++) acc[p][r][c] = fma(a, b[c], acc[p][r][c]);
      }
    }
#pragma GCC unroll 2
  for (int p = 0; p < S; p++)
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int g = 0; g < NG; g++) {
        store(s[p].buf + r * PANEL + (g0 + g) * W, acc[p][r][2 * g]);
        store(s[p].buf + r * PANEL + 16 + (g0 + g) * W, acc[p][r][2 * g + 1]);
      }
}

template <class T, int R, int S>
static void tile(const float* x, int64_t ldx, const Stream* s, int64_t k) {
  constexpr int FIT = 6 / R > 4 ? 4 : 6 / R > 1 ? (6 / R > 3 ? 4 : 2) : 1;
  constexpr int NG = GROUPS < FIT ? GROUPS : FIT;
  for (int g = 0; g < GROUPS; g += NG) tile_groups<T, R, NG, S>(x, ldx, s, k, g);
}

typedef void (*Tile)(const float*, int64_t, const Stream*, int64_t);
template <class T>
static Tile choose_tile(int rows, int streams) {
  static const Tile tiles[] = {
      tile<T, 1, 1>, tile<T, 2, 1>, tile<T, 3, 1>, tile<T, 4, 1>, tile<T, 5, 1>, tile<T, 6, 1>,
#if defined(__AVX512F__)
      tile<T, 7, 1>, tile<T, 8, 1>, tile<T, 9, 1>, tile<T, 10, 1>, tile<T, 11, 1>, tile<T, 12, 1>,
      // side by side
      tile<T, 1, 2>, tile<T, 2, 2>, tile<T, 3, 2>, tile<T, 4, 2>, tile<T, 5, 2>, tile<T, 6, 2>,
#endif
  };
  return tiles[(streams == 2 ? ROWS : 0) + rows - 1];
}

}  // namespace RETORT_ISA
