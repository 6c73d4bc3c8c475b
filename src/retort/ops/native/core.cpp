// Entry points of the library and the choice of the instruction set.
#include <string.h>

#include "api.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define EXPORT __attribute__((visibility("default")))

extern "C" {

const RetortKernels* retort_kernels_portable();
#ifdef RETORT_X86
const RetortKernels* retort_kernels_avx2();
const RetortKernels* retort_kernels_avx512();
#endif

static const RetortKernels* chosen = nullptr;

// Digest of the sources of this library: a loader refuses one that was built from others.
EXPORT const char* retort_sources() { return RETORT_SOURCES; }

// Threads that the OpenMP runtime gives a parallel region, 1 in a build without OpenMP.
EXPORT int retort_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

static const RetortKernels* find(const char* isa) {
  if (!strcmp(isa, "portable")) return retort_kernels_portable();
#ifdef RETORT_X86
  if (!strcmp(isa, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return retort_kernels_avx2();
  if (!strcmp(isa, "avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return retort_kernels_avx512();
#endif
  return nullptr;
}

// Chooses "portable", "avx2" or "avx512" for the process; 0 where this processor lacks it.
EXPORT int retort_select(const char* isa) {
  const RetortKernels* found = find(isa);
  if (found) chosen = found;
  return found != nullptr;
}

EXPORT void retort_linear(const RetortLinearCall* call) { chosen->linear(call); }

// retort_linear for one layer and dense rows, without structures to fill in.
EXPORT void retort_linear_dense(const RetortLinear* layer, const float* x, int64_t m, float* out,
                                const float* residual, int32_t threads) {
  const int64_t n = layer->n;
  const RetortLinearCall call = {layer, 1, x, layer->k, m, &out, &n, residual, n, threads};
  chosen->linear(&call);
}
EXPORT void retort_linears(const RetortLinearsCall* call) { chosen->linears(call); }
EXPORT void retort_argmax(const RetortArgmaxCall* call) { chosen->argmax(call); }
EXPORT void retort_attention(const RetortAttentionCall* call) { chosen->attention(call); }
EXPORT void retort_norm(const RetortNormCall* call) { chosen->norm(call); }
EXPORT void retort_rotary(const RetortRotaryCall* call) { chosen->rotary(call); }
EXPORT void retort_decoder(const RetortDecoderCall* call) { chosen->decoder(call); }
EXPORT void retort_activation(const RetortActivationCall* call) { chosen->activation(call); }
EXPORT void retort_rotate_pairs(const RetortRotaryCall* call) { chosen->rotate_pairs(call); }
EXPORT void retort_retention(const RetortRetentionCall* call) { chosen->retention(call); }
EXPORT void retort_fold(const RetortFoldCall* call) { chosen->fold(call); }
EXPORT void retort_retnet(const RetortRetNetCall* call) { chosen->retnet(call); }
EXPORT void retort_scan(const RetortScanCall* call) { chosen->scan(call); }
EXPORT void retort_scan_gradient(const RetortScanGradientCall* call) {
  chosen->scan_gradient(call);
}
EXPORT void retort_convolution(const RetortConvCall* call) { chosen->convolution(call); }
EXPORT void retort_mamba(const RetortMambaCall* call) { chosen->mamba(call); }
EXPORT void retort_stack(const RetortStackCall* call) { chosen->stack(call); }
EXPORT void retort_race(const RetortRaceCall* call) { chosen->race(call); }
}
