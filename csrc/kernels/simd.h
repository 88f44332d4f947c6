// Vectors of the instruction set that this file is compiled for, through the compiler's own vector types.
//
// Included by one source file for each instruction set. Everything lies in an unnamed namespace and nothing of std:: is
// instantiated: a weak symbol compiled for AVX-512 could be the copy that the linker keeps for everyone.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "problem.h"

namespace batchnorm {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int W = kBytes / 4;  // floats in a vector

typedef float vf __attribute__((vector_size(kBytes)));
typedef float vfh __attribute__((vector_size(kBytes / 2)));
typedef double vd __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef int64_t vl __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vbh __attribute__((vector_size(W / 2)));
typedef uint16_t vs __attribute__((vector_size(kBytes / 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type that data of type T are computed in, its vector, and how many values that holds.
template <class T>
struct Compute {
  using scalar = float;
  using vec = vf;
  using mask = vi;
  static constexpr int lanes = W;
};
template <>
struct Compute<double> {
  using scalar = double;
  using vec = vd;
  using mask = vl;
  static constexpr int lanes = W / 2;
};

template <class V>
inline V load_vec(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_vec(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline vf load(const float* p) { return load_vec<vf>(p); }
inline vd load(const double* p) { return load_vec<vd>(p); }
inline void store(float* p, vf v) { store_vec(p, v); }
inline void store(double* p, vd v) { store_vec(p, v); }

}  // namespace
}  // namespace batchnorm

#include "halves.h"

namespace batchnorm {
namespace {

// Past the cache, where the address allows: memory that is written whole is then not read first.
template <class T, class V>
inline void store_past_cache(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  } else if constexpr (sizeof(T) == 2) {
    T all[W];
    store(all, v);
    if (reinterpret_cast<uintptr_t>(p) % 32 == 0) {
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_vec<__m256i>(all));
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if (reinterpret_cast<uintptr_t>(p) % 32 == 0) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  } else if constexpr (sizeof(T) == 2) {
    T all[W];
    store(all, v);
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      return _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_vec<__m128i>(all));
    }
  }
#endif
  store(p, v);
}

// Such stores are not in order with others: to be called when a range is done, before another thread is told.
inline void finish_stores_past_cache() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` values, and `fill` beyond them.
template <class T>
inline auto load_part(const T* p, int64_t count, T fill) {
  T all[Compute<T>::lanes];
  for (T& value : all) value = fill;
  std::memcpy(all, p, count * sizeof(T));
  return load(all);
}
template <class T, class V>
inline void store_part(T* p, V v, int64_t count) {
  T all[Compute<T>::lanes];
  store(all, v);
  std::memcpy(p, all, count * sizeof(T));
}
#if defined(__AVX512F__)
inline auto load_part(const float* p, int64_t count, float fill) {
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1), p);
}
inline void store_part(float* p, vf v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
#endif

// Whole vectors where there is room, otherwise the part that is there.
template <class T>
inline auto load_some(const T* p, int64_t count, T fill = T{}) {
  return count >= Compute<T>::lanes ? load(p) : load_part(p, count, fill);
}
template <class T, class V>
inline void store_some(T* p, V v, int64_t count) {
  if (count >= Compute<T>::lanes) {
    store(p, v);
  } else {
    store_part(p, v, count);
  }
}

// The two halves of a vector of floats, as doubles. (Said in the processor's own words: the compiler's general conversion goes
// through memory.)
#if defined(__AVX512F__)
inline vd low(vf v) { return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
inline vd high(vf v) { return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
#elif defined(__AVX2__)
inline vd low(vf v) { return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
inline vd high(vf v) { return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#elif defined(__SSE2__)
inline vd low(vf v) { return (vd)_mm_cvtps_pd((__m128)v); }
inline vd high(vf v) { return (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v)); }
#elif defined(__aarch64__)
inline vd low(vf v) { return (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)v)); }
inline vd high(vf v) { return (vd)vcvt_high_f64_f32((float32x4_t)v); }
#else
inline vd low(vf v) { return __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), vd); }
inline vd high(vf v) { return __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), vd); }
#endif

// And back.
#if defined(__AVX512F__)
inline vf narrowed(vd a, vd b) {
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)a)), _mm512_cvtpd_ps((__m512d)b), 1);
}
#elif defined(__AVX2__)
inline vf narrowed(vd a, vd b) {
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)a)), _mm256_cvtpd_ps((__m256d)b), 1);
}
#elif defined(__aarch64__)
inline vf narrowed(vd a, vd b) { return (vf)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)a), (float64x2_t)b); }
#else
inline vf narrowed(vd a, vd b) {
  const vfh first = __builtin_convertvector(a, vfh), second = __builtin_convertvector(b, vfh);
  vf both;
  std::memcpy(&both, &first, sizeof first);
  std::memcpy(reinterpret_cast<char*>(&both) + sizeof first, &second, sizeof second);
  return both;
}
#endif

inline double total(vd v) {
  double sum = 0;
  for (int i = 0; i < W / 2; ++i) sum += v[i];
  return sum;
}

// Lanes whose bit (lane 0 the lowest) is set.
inline vi lanes_of(uint32_t bits, vf) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = 1 << i;
  return (lane & static_cast<int32_t>(bits)) != 0;
}
inline vl lanes_of(uint32_t bits, vd) {
  vl lane;
  for (int i = 0; i < W / 2; ++i) lane[i] = 1 << i;
  return (lane & static_cast<int64_t>(bits)) != 0;
}

// One bit a lane: not z <= 0. (So a NaN counts as above, as it does in torch's own backward of ReLU.)
#if defined(__AVX512F__)
inline uint32_t bits_above(vf z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ); }
inline uint32_t bits_above(vd z) { return _mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_NLE_UQ); }
#elif defined(__AVX2__)
inline uint32_t bits_above(vf z) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
inline uint32_t bits_above(vd z) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)z, _mm256_setzero_pd(), _CMP_NLE_UQ));
}
#elif defined(__aarch64__)
inline uint32_t bits_above(vf z) {
  const vi lane = {1, 2, 4, 8};
  return vaddvq_u32((uint32x4_t)(~(z <= 0) & lane));
}
inline uint32_t bits_above(vd z) {
  const vl lane = {1, 2};
  return static_cast<uint32_t>(vaddvq_u64((uint64x2_t)(~(z <= 0) & lane)));
}
#else
template <class V>
inline uint32_t bits_above(V z) {
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof z / sizeof z[0]; ++i) bits |= static_cast<uint32_t>(!(z[i] <= 0)) << i;
  return bits;
}
#endif

// Bits of the values [i, i + lanes) of a run that begins at `bytes`; i is a multiple of lanes.
template <int lanes>
inline uint32_t read_bits(const uint8_t* bytes, int64_t i, int64_t count) {
  const uint8_t* at = bytes + i / 8;
  if constexpr (lanes < 8) return at[0] >> (i % 8);
  uint32_t bits = at[0];
  if (lanes > 8 && count > 8) bits |= static_cast<uint32_t>(at[1]) << 8;
  return bits;
}
template <int lanes>
inline void write_bits(uint8_t* bytes, int64_t i, int64_t count, uint32_t bits) {
  uint8_t* at = bytes + i / 8;
  if (count < lanes) bits &= (1u << count) - 1;
  if constexpr (lanes < 8) {
    at[0] = static_cast<uint8_t>((i % 8 == 0 ? 0 : at[0]) | bits << (i % 8));
    return;
  }
  at[0] = static_cast<uint8_t>(bits);
  if (lanes > 8 && count > 8) at[1] = static_cast<uint8_t>(bits >> 8);
}

// Lanes of the values [0, count) whose byte of the mask is not zero; lanes beyond count are off.
template <class Bytes>
inline Bytes load_bytes(const uint8_t* mask, int64_t count) {
  constexpr int64_t all = sizeof(Bytes);
  Bytes bytes = {};
  if (count >= all) {
    std::memcpy(&bytes, mask, all);
  } else {
    std::memcpy(&bytes, mask, count);
  }
  return bytes;
}
#if defined(__aarch64__)
inline uint16x4_t pairs_of(uint32_t bytes) { return vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)))); }
inline vi lanes_real(const uint8_t* mask, int64_t count, vf) {
  return (vi)vmovl_u16(pairs_of(load_bytes<uint32_t>(mask, count))) != 0;
}
inline vl lanes_real(const uint8_t* mask, int64_t count, vd) {
  return (vl)vmovl_u32(vget_low_u32(vmovl_u16(pairs_of(load_bytes<uint16_t>(mask, count))))) != 0;
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline vi lanes_real(const uint8_t* mask, int64_t count, vf) {
  return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_bytes<int64_t>(mask, count))) != 0;
}
inline vl lanes_real(const uint8_t* mask, int64_t count, vd) {
  return (vl)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load_bytes<int32_t>(mask, count))) != 0;
}
#elif defined(__SSE2__) && !defined(__AVX512F__)
inline __m128i pairs_of(int32_t bytes) { return _mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), _mm_setzero_si128()); }
inline vi lanes_real(const uint8_t* mask, int64_t count, vf) {
  return (vi)_mm_unpacklo_epi16(pairs_of(load_bytes<int32_t>(mask, count)), _mm_setzero_si128()) != 0;
}
inline vl lanes_real(const uint8_t* mask, int64_t count, vd) {
  const __m128i zero = _mm_setzero_si128();
  return (vl)_mm_unpacklo_epi32(_mm_unpacklo_epi16(pairs_of(load_bytes<uint16_t>(mask, count)), zero), zero) != 0;
}
#else
inline vi lanes_real(const uint8_t* mask, int64_t count, vf) {
  return __builtin_convertvector(load_bytes<vb>(mask, count), vi) != 0;
}
inline vl lanes_real(const uint8_t* mask, int64_t count, vd) {
  return __builtin_convertvector(load_bytes<vbh>(mask, count), vl) != 0;
}
#endif

// v in those lanes, and `other` elsewhere.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline uint32_t bits_real(const uint8_t* mask, int64_t count, int lanes) {
  const auto inside = static_cast<__mmask16>((1u << (count < lanes ? count : lanes)) - 1);
  const __m128i bytes = _mm_maskz_loadu_epi8(inside, mask);
  return _mm_test_epi8_mask(bytes, bytes);
}
inline vf where_real(const uint8_t* mask, int64_t count, vf v, vf other) {
  return (vf)_mm512_mask_mov_ps((__m512)other, static_cast<__mmask16>(bits_real(mask, count, W)), (__m512)v);
}
inline vd where_real(const uint8_t* mask, int64_t count, vd v, vd other) {
  return (vd)_mm512_mask_mov_pd((__m512d)other, static_cast<__mmask8>(bits_real(mask, count, W / 2)), (__m512d)v);
}
#else
template <class V>
inline V where_real(const uint8_t* mask, int64_t count, V v, V other) {
  return lanes_real(mask, count, v) ? v : other;
}
#endif

}  // namespace
}  // namespace batchnorm
