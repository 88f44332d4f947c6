// bfloat16 and float16 in memory, computed in float. Included by simd.h alone.

namespace batchnorm {
namespace {

// Four values of two bytes, widened and narrowed. (The compiler would go through the lanes of a NEON vector one by one.)
#if defined(__aarch64__)
inline vu widened(vs v) { return (vu)vmovl_u16((uint16x4_t)v); }
inline vs narrowed(vu v) { return (vs)vmovn_u32((uint32x4_t)v); }
#else
inline vu widened(vs v) { return __builtin_convertvector(v, vu); }
inline vs narrowed(vu v) { return __builtin_convertvector(v, vs); }
#endif

inline vf load(const bf16* p) {
  return (vf)(widened(load_vec<vs>(p)) << 16);
}
inline void store(bf16* p, vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const vu nan = (u >> 16) | 0x40;                          // rounding could carry a NaN over to infinity
  const vu bits = (vu)(v != v) != 0 ? nan : rounded;
  store_vec(p, narrowed(bits));
}

#if defined(__F16C__) && defined(__AVX512F__)
inline vf load(const fp16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(fp16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vf load(const fp16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(fp16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
inline vf load(const fp16* p) { return (vf)vcvt_f32_f16((float16x4_t)load_vec<vs>(p)); }
inline void store(fp16* p, vf v) { store_vec(p, (vs)vcvt_f16_f32((float32x4_t)v)); }
#else
inline vf load(const fp16* p) {
  const vs all = load_vec<vs>(p);  // p may be odd
  vf v;
  for (int i = 0; i < W; ++i) {
    const uint32_t h = all[i], sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    uint32_t bits;
    if (exponent == 31) {
      bits = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
      bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {  // zero or subnormal: fraction * 2^-24, exact in float
      const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
      std::memcpy(&bits, &value, 4);
      bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    v[i] = f;
  }
  return v;
}
inline void store(fp16* p, vf v) {
  vs all;
  for (int i = 0; i < W; ++i) {
    uint32_t u;
    const float f = v[i];
    std::memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    uint32_t h;
    if (u > 0x7f800000u) {
      h = 0x7e00;
    } else if (u >= 0x477ff000u) {  // rounds to more than 65504
      h = 0x7c00;
    } else if (u >= 0x38800000u) {
      h = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13;
    } else {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
      float magic;
      std::memcpy(&magic, &u, 4);
      magic += 0.5f;
      std::memcpy(&h, &magic, 4);
      h -= 0x3f000000u;
    }
    all[i] = static_cast<uint16_t>(h | sign);
  }
  store_vec(p, all);
}
#endif

// The first `count` values, and `fill` beyond them; without a way through memory, where there are masked instructions.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline vf load_part(const bf16* p, int64_t count, bf16 fill) {
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  const __m256i bits = _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(fill.bits)), some, p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline vf load_part(const fp16* p, int64_t count, fp16 fill) {
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  return (vf)_mm512_cvtph_ps(_mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(fill.bits)), some, p));
}
template <class T>
inline void store_part_of_16_bits(T* p, vf v, int64_t count) {
  T all[W];
  store(all, v);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), load_vec<__m256i>(all));
}
inline void store_part(bf16* p, vf v, int64_t count) { store_part_of_16_bits(p, v, count); }
inline void store_part(fp16* p, vf v, int64_t count) { store_part_of_16_bits(p, v, count); }
#endif

}  // namespace
}  // namespace batchnorm
