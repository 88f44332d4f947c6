#define BATCHNORM_TABLE kernels_avx512
#include "kernels/kernels.inc"
