#define BATCHNORM_TABLE kernels_baseline
#include "kernels/kernels.inc"
#define BATCHNORM_FEATURE_TABLE features_baseline
#include "kernels/features.inc"
