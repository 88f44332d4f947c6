#define BATCHNORM_TABLE kernels_baseline
#include "kernels/kernels.inc"
