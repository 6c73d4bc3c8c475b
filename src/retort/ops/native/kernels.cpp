// All kernels for one instruction set: compiled once for each, with RETORT_ISA as its name.
#include "activation.h"
#include "decoder.h"
#include "mamba.h"
#include "race.h"
#include "retention.h"
#include "retnet.h"
#include "scan.h"
#include "scan_gradient.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" const RetortKernels* JOIN(retort_kernels_, RETORT_ISA)() {
  static const RetortKernels kernels = {
      RETORT_ISA::linear, RETORT_ISA::linears, RETORT_ISA::argmax, RETORT_ISA::attention,
      RETORT_ISA::norm, RETORT_ISA::rotary, RETORT_ISA::decoder,
      RETORT_ISA::activation, RETORT_ISA::rotate_pairs, RETORT_ISA::retention,
      RETORT_ISA::fold, RETORT_ISA::retnet, RETORT_ISA::scan, RETORT_ISA::scan_gradient,
      RETORT_ISA::convolution, RETORT_ISA::mamba, RETORT_ISA::stack, RETORT_ISA::race,
  };
  return &kernels;
}
