#define BATCHNORM_TABLE kernels_avx2
#include "kernels/kernels.inc"
