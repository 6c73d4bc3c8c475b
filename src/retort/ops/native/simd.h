// Vectors of W floats: 16 (AVX-512), 8 (AVX2) or 4 (compiler vectors on anything else).
// Everything lives in a namespace of its own instruction set and no standard library template is
// used, so that the linker cannot merge code of one instruction set into another.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace RETORT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE vi load_bits(const void* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - vf{}; }

// The first n floats, zeros after them; nothing beyond is read.
INLINE vf load_part(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  float lanes[W] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
#endif
}
INLINE void store_part(float* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  float lanes[W];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
#endif
}

// a * b + c. Contraction is off: where an instruction set has a fused product it is named here, so
// that every path of one instruction set rounds alike.
INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

template <int... I>
struct Index {};
template <int N, int... I>
struct Iota : Iota<N - 1, N - 1, I...> {};
template <int... I>
struct Iota<0, I...> {
  typedef Index<I...> type;
};

// Lane i of halve<H>: the lower (OFF = 0) or upper (OFF = H) halves of the 2H-wide lane blocks of a,
// then of b.
template <int H, int OFF>
constexpr int lane(int i) {
  return (i / H < W / (2 * H) ? i / H * 2 * H : W + (i / H - W / (2 * H)) * 2 * H) + i % H + OFF;
}
template <int H, int... I>
INLINE vf halve(vf a, vf b, Index<I...>) {
  return __builtin_shufflevector(a, b, lane<H, 0>(I)...) +
         __builtin_shufflevector(a, b, lane<H, H>(I)...);
}

// Sums of W vectors as the lanes of one, by a tree that is the same for every lane.
template <int H>
INLINE vf sums(vf* v) {
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) v[i] = halve<H>(v[2 * i], v[2 * i + 1], typename Iota<W>::type());
  if constexpr (H > 1) return sums<H / 2>(v);
  return v[0];
}

INLINE float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int h = W / 2; h; h /= 2)
    for (int i = 0; i < h; i++) lanes[i] += lanes[i + h];
  return lanes[0];
}

// e^x, about 1 ulp; 0 below -87.3, finite (2.4e38) above 88.3. Range reduction and polynomial after
// Cephes' expf.
INLINE vf exp(vf x) {
  const vf low = splat(-87.33654f), high = splat(88.37626f);
  vf r = x > high ? high : x;
  r = r < low ? low : r;
  const vf magic = splat(12582912.f);
  vf t = fma(r, splat(1.44269504f), magic);
  vf n = t - magic;
  r = fma(n, splat(-0.693359375f), r);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.f));
  vi power = ((vi)t - (vi)magic + 127) << 23;
  p = p * (vf)power;
  return x < low ? vf{} : p;
}

// tanh(x): a polynomial near 0 (Cephes' tanhf), else from e^2x.
INLINE vf tanh(vf x) {
  vf a = x < vf{} ? -x : x, s = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, s, splat(2.06390887954e-2f));
  p = fma(p, s, splat(-5.37397155531e-2f));
  p = fma(p, s, splat(1.33314422036e-1f));
  p = fma(p, s, splat(-3.33332819422e-1f));
  vf small = fma(p * s, x, x);
  vf large = splat(1.f) - splat(2.f) / (exp(a + a) + splat(1.f));
  large = x < vf{} ? -large : large;
  return a < splat(0.625f) ? small : large;
}

// erf(x): three ranges, after Cephes' erff and erfcf.
INLINE vf erf(vf x) {
  const vf a = x < vf{} ? -x : x, s = x * x;
  vf p = splat(7.853861353153693e-5f);
  p = fma(p, s, splat(-8.010193625184903e-4f));
  p = fma(p, s, splat(5.188327685732524e-3f));
  p = fma(p, s, splat(-2.685381193529856e-2f));
  p = fma(p, s, splat(1.128358514861418e-1f));
  p = fma(p, s, splat(-3.761262582423300e-1f));
  p = fma(p, s, splat(1.128379165726710e0f));
  const vf small = x * p;
  const vf safe = a < splat(1.f) ? splat(1.f) : a, q = splat(1.f) / safe, y = q * q;
  vf m = splat(2.326819970068386e-2f);
  m = fma(m, y, splat(-1.387039388740657e-1f));
  m = fma(m, y, splat(3.687424674597105e-1f));
  m = fma(m, y, splat(-5.824733027278666e-1f));
  m = fma(m, y, splat(6.210004621745983e-1f));
  m = fma(m, y, splat(-4.944515323274145e-1f));
  m = fma(m, y, splat(3.404879937665872e-1f));
  m = fma(m, y, splat(-2.741127028184656e-1f));
  m = fma(m, y, splat(5.638259427386472e-1f));
  vf l = splat(-1.047766399936249e1f);
  l = fma(l, y, splat(1.297719955372516e1f));
  l = fma(l, y, splat(-7.495518717768503e0f));
  l = fma(l, y, splat(2.921019019210786e0f));
  l = fma(l, y, splat(-1.015265279202700e0f));
  l = fma(l, y, splat(4.218463358204948e-1f));
  l = fma(l, y, splat(-2.820767439740514e-1f));
  l = fma(l, y, splat(5.641895067754075e-1f));
  vf large = splat(1.f) - exp(-s) * q * (a < splat(2.f) ? m : l);
  large = x < vf{} ? -large : large;
  return a < splat(1.f) ? small : large;
}

INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + exp(-x)); }
INLINE vf silu(vf x) { return x / (splat(1.f) + exp(-x)); }

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace RETORT_ISA
