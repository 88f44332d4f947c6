// The types of two bytes: every value of theirs through the kernels, whole vectors and parts, exact and rounded.

#include "../dispatch.h"
#include "parts.h"
#include "values.h"

using namespace batchnorm;

namespace {

constexpr int64_t kAll = 65536;

// y = x * scale, rounded once to float and then to the type.
void scaled_by(float factor, DType dtype, int64_t channels) {
  const Data x(kAll, dtype), y(kAll, dtype);
  for (uint32_t i = 0; i < kAll; ++i) std::memcpy(x.get(i), &i, 2);  // little-endian, as all processors here are
  const std::vector<float> center(64), scale(64, factor), shift(64, -0.0f);  // the last leaves the sign of a zero alone
  Forward forward{};
  forward.at = {kAll / channels, channels, 1, true};
  forward.x = x.get();
  forward.center = center.data();
  forward.scale = scale.data();
  forward.shift = shift.data();
  forward.y = y.get();
  kernels(dtype).normalize(forward, {0, channels, 0, forward.at.units()});
  for (int64_t i = 0; i < forward.at.n * channels; ++i) {
    const float product = static_cast<float>(x[i]) * factor;
    const double exact = nearest(product, dtype);
    expect_close("rounded", y[i], exact, 0);
    expect_close("sign of a rounded value", std::signbit(y[i]), std::signbit(exact), std::isnan(exact));
  }
}

}  // namespace

void check_halves() {
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    // The values themselves, rounded ones, ties (x 1.5, x 1.25), subnormal ones and those too large.
    for (const float factor : {1.0f, 0.1f, 1.5f, 1.25f, -0.75f, 3e-6f, 0x1p-14f, 0x1p-133f, 3e5f, 0x1.fffffep+0f}) {
      scaled_by(factor, dtype, 64);
      scaled_by(factor, dtype, 3);  // parts of vectors; all values but the last
    }
  }
}
