// The activations and their derivatives, on vectors.

namespace batchnorm {
namespace {

template <class V>
inline V splat(double value) {
  return V{} + static_cast<std::remove_reference_t<decltype(V{}[0])>>(value);
}

// exp, within two roundings: 2^n times a polynomial on [-ln2 / 2, ln2 / 2] (Taylor to degree 7: 3e-9 there). Infinity and
// zero beyond float's range, which the activations' limits are made of.
inline vf exp(vf given) {
  vf x = given > 88.0f ? splat<vf>(88.0) : given;
  x = x < -87.0f ? splat<vf>(-87.0) : x;  // a NaN passes both
  const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part ends up in the low bits
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = splat<vf>(1.0 / 5040);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) p = p * r + c;
  const vi power = ((vi)shifted - 0x4b400000 + 127) << 23;
  const vf inside = p * (vf)power;
  const vf below = given < -87.0f ? vf{} : inside;
  return given > 88.0f ? splat<vf>(__builtin_inf()) : below;
}
inline vd exp(vd x) {
  for (int i = 0; i < W / 2; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
// erf, within 1.1 roundings (benchmarks/fit_erf.py fits the polynomials and measures that): x + x p(x^2) below 0.95 and
// 1 - exp(-|x| q(|x|)) above, which is 1 from 3.95 on.
inline vf erf(vf x) {
  constexpr float kSmall[] = {-0.000810985803f, 0.00519828638f, -0.0268583987f, 0.112836808f, -0.376126319f, 0.128379166f};
  constexpr float kLarge[] = {-1.13560627e-05f, 9.95433511e-05f, -0.000481383904f, 0.00118406094f, 0.000692334317f,
                              -0.0200623907f,   0.103365757f,    0.636405289f,     1.12841308f};
  vf a = x < vf{} ? -x : x;
  const vf square = a * a;
  vf p = splat<vf>(8.22734364e-05);
  for (const float c : kSmall) p = p * square + c;
  const vf small = p * a + a;
  const vf capped = a > 3.95f ? splat<vf>(3.95) : a;
  vf q = splat<vf>(5.66323024e-07);
  for (const float c : kLarge) q = q * capped + c;
  const vf large = 1.0f - exp(-(q * capped));
  a = a < 0.95f ? small : a == a ? large : a;
  return x < vf{} ? -a : a;
}
inline vd erf(vd x) {
  for (int i = 0; i < W / 2; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

template <Activation A, class V>
inline V activate(V z) {
  const V zero = {};
  if constexpr (A == Activation::relu) {
    return z <= zero ? zero : z;
  } else if constexpr (A == Activation::leaky_relu) {
    return z <= zero ? z * splat<V>(0.01) : z;
  } else if constexpr (A == Activation::silu) {
    return z / (splat<V>(1) + exp(-z));
  } else if constexpr (A == Activation::gelu) {
    return z * splat<V>(0.5) * (splat<V>(1) + erf(z * splat<V>(0.70710678118654752)));
  } else if constexpr (A == Activation::hardswish) {
    V gate = z + splat<V>(3);
    gate = gate < zero ? zero : gate;
    gate = gate > splat<V>(6) ? splat<V>(6) : gate;
    return z * gate * splat<V>(1.0 / 6);
  } else {
    return z;
  }
}

// grad * activation'(z)
template <Activation A, class V>
inline V activation_gradient(V grad, V z) {
  const V zero = {};
  if constexpr (A == Activation::relu) {
    return z <= zero ? zero : grad;
  } else if constexpr (A == Activation::leaky_relu) {
    return z <= zero ? grad * splat<V>(0.01) : grad;
  } else if constexpr (A == Activation::silu) {
    const V e = exp(-z);
    const V s = splat<V>(1) / (splat<V>(1) + e);
    // z (1 - s) as z e s, and 0 where e is infinite: z is far out on the left, and the slope is nothing there.
    const V slope = s * (splat<V>(1) + z * (e * s));
    return grad * (e > splat<V>(3e38) ? zero : slope);
  } else if constexpr (A == Activation::gelu) {
    const V phi = splat<V>(0.39894228040143268) * exp(z * z * splat<V>(-0.5));
    const V cdf = splat<V>(0.5) * (splat<V>(1) + erf(z * splat<V>(0.70710678118654752)));
    return grad * (phi == zero ? cdf : cdf + z * phi);  // far out z may be infinite
  } else if constexpr (A == Activation::hardswish) {
    const V inner = z <= splat<V>(-3) ? zero : z * splat<V>(1.0 / 3) + splat<V>(0.5);
    return grad * (z < splat<V>(3) ? inner : splat<V>(1));
  } else {
    return grad;
  }
}

}  // namespace
}  // namespace batchnorm
