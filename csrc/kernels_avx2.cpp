#define BATCHNORM_TABLE kernels_avx2
#include "kernels/kernels.inc"
#define BATCHNORM_FEATURE_TABLE features_avx2
#include "kernels/features.inc"
