#define BATCHNORM_TABLE kernels_avx512
#include "kernels/kernels.inc"
#define BATCHNORM_FEATURE_TABLE features_avx512
#include "kernels/features.inc"
