// Some numbers at a time: 16 with AVX-512, 8 with AVX2. Numbers are float32 in registers; in memory they are float32
// or, where the processor rounds to it, bfloat16.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lmssl {

using BF = at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t LANES = Vec::size();
constexpr float LOG2_E = 1.44269504f;
constexpr float LOG2_E_REST = 1.925963e-8f;  // of its float32

// All numbers of a register, where others take those of some lanes.
struct Every {};

#if defined(CPU_CAPABILITY_AVX512)

using Lanes = __mmask16;

// Lanes of [at, at + LANES) that lie in [from, to).
inline Lanes lanes(int64_t at, int64_t from, int64_t to) {
  const int64_t low = std::clamp<int64_t>(from - at, 0, LANES), high = std::clamp<int64_t>(to - at, 0, LANES);
  return high <= low ? 0 : static_cast<Lanes>((0xffffu >> (LANES - high)) & (0xffffu << low));
}

// Lanes whose numbers [first, end) contain the index.
inline Lanes around(const int32_t* first, const int32_t* end, int32_t index) {
  const __m512i here = _mm512_set1_epi32(index);
  return _mm512_cmple_epi32_mask(_mm512_loadu_si512(first), here) &
         _mm512_cmplt_epi32_mask(here, _mm512_loadu_si512(end));
}

inline bool none(Lanes kept) { return !kept; }
inline int64_t count(Lanes kept) { return __builtin_popcount(kept); }
inline Lanes both(Lanes left, Lanes right) { return left & right; }
inline Lanes not_below(const Vec& left, const Vec& right) { return _mm512_cmp_ps_mask(left, right, _CMP_GE_OQ); }

// Zero elsewhere.
inline Vec keep(Lanes kept, const Vec& x) { return _mm512_maskz_mov_ps(kept, x); }
inline Vec choose(Lanes kept, const Vec& x, const Vec& otherwise) { return _mm512_mask_mov_ps(otherwise, kept, x); }

inline Vec load(const float* from, Lanes there) { return _mm512_maskz_loadu_ps(there, from); }
inline void store(float* to, const Vec& x, Lanes there) { _mm512_mask_storeu_ps(to, there, x); }

// Of a number and what is none, the right one.
inline Vec larger(const Vec& left, const Vec& right) { return _mm512_max_ps(left, right); }
inline Vec smaller(const Vec& left, const Vec& right) { return _mm512_min_ps(left, right); }

inline float sum(const Vec& x) { return _mm512_reduce_add_ps(x); }
inline float largest(const Vec& x) { return _mm512_reduce_max_ps(x); }
inline Vec reciprocal_estimate(const Vec& x) { return _mm512_rcp14_ps(x); }

inline Vec fraction_of(const Vec& x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vec times_power(const Vec& factor, const Vec& x) { return _mm512_scalef_ps(factor, x); }

#else

using Lanes = __m256;

inline Lanes around(const int32_t* first, const int32_t* end, int32_t index) {
  const __m256i here = _mm256_set1_epi32(index);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)), here);
  const __m256i within = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(end)), here);
  return _mm256_castsi256_ps(_mm256_andnot_si256(before, within));
}

inline Lanes lanes(int64_t at, int64_t from, int64_t to) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto low = static_cast<int32_t>(std::clamp<int64_t>(from - at, 0, LANES));
  const auto high = static_cast<int32_t>(std::clamp<int64_t>(to - at, 0, LANES));
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), index);
  return _mm256_castsi256_ps(_mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), index)));
}

inline bool none(Lanes kept) { return !_mm256_movemask_ps(kept); }
inline int64_t count(Lanes kept) { return __builtin_popcount(_mm256_movemask_ps(kept)); }
inline Lanes both(Lanes left, Lanes right) { return _mm256_and_ps(left, right); }
inline Lanes not_below(const Vec& left, const Vec& right) { return _mm256_cmp_ps(left, right, _CMP_GE_OQ); }

inline Vec keep(Lanes kept, const Vec& x) { return _mm256_and_ps(kept, x); }
inline Vec choose(Lanes kept, const Vec& x, const Vec& otherwise) { return _mm256_blendv_ps(otherwise, x, kept); }

inline Vec load(const float* from, Lanes there) { return _mm256_maskload_ps(from, _mm256_castps_si256(there)); }
inline void store(float* to, const Vec& x, Lanes there) { _mm256_maskstore_ps(to, _mm256_castps_si256(there), x); }

inline Vec larger(const Vec& left, const Vec& right) { return _mm256_max_ps(left, right); }
inline Vec smaller(const Vec& left, const Vec& right) { return _mm256_min_ps(left, right); }

inline float sum(const Vec& x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline float largest(const Vec& x) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline Vec reciprocal_estimate(const Vec& x) { return _mm256_rcp_ps(x); }
inline Vec bounded(const Vec& x) { return smaller(Vec(128.f), larger(Vec(-127.f), x)); }
inline Vec fraction_of(const Vec& x) { return bounded(x) - bounded(x).floor(); }
inline Vec times_power(const Vec& factor, const Vec& x) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(bounded(x).floor()), _mm256_set1_epi32(127));
  return factor * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

#endif

inline Vec keep(Every, const Vec& x) { return x; }
inline Vec choose(Every, const Vec& x, const Vec&) { return x; }
inline int64_t count_in(Every, Lanes kept) { return count(kept); }
inline int64_t count_in(Lanes there, Lanes kept) { return count(both(there, kept)); }
inline Vec load(const float* from, Every = {}) { return Vec::loadu(from); }
inline void store(float* to, const Vec& x, Every = {}) { x.store(to); }

// 2^x of [0, 1), minimax with 1 at 0; off by at most 2e-7 of itself.
inline Vec power_of_fraction(const Vec& fraction) {
  Vec found(1.8671223e-3f);
  for (const float term : {9.0170465e-3f, 5.5799901e-2f, 2.4016446e-1f, 6.9315130e-1f, 1.f})
    found = at::vec::fmadd(found, fraction, Vec(term));
  return found;
}

// 2^x: the whole part of x as an exponent, the rest by the polynomial; none of what is no number.
inline Vec power_of_two(const Vec& x) { return times_power(power_of_fraction(fraction_of(x)), x); }

// e^x of x below 88, 0 from -104 on. The rest of its product with log2(e) is not rounded, which far from 0 would show.
inline Vec exponential(const Vec& x) {
  const Vec y = larger(Vec(-104.f), x), whole = (y * Vec(LOG2_E)).floor();
  const Vec fraction = at::vec::fmadd(y, Vec(LOG2_E_REST), at::vec::fmsub(y, Vec(LOG2_E), whole));
  return times_power(power_of_fraction(fraction), whole);
}

inline Vec reciprocal(const Vec& x) {
  const Vec first = reciprocal_estimate(x);
  return first * at::vec::fnmadd(x, first, Vec(2.f));
}

// `body(from, which lanes)` for some numbers at a time.
template <typename Body>
inline void by_lanes(int64_t size, const Body& body) {
  int64_t j = 0;
  for (; j + LANES <= size; j += LANES) body(j, Every{});
  if (j < size) body(j, lanes(j, 0, size));
}

#if defined(__AVX512BF16__)

#define LMSSL_BFLOAT16 1

inline Vec widened(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
inline __m256i narrowed(const Vec& x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline Vec load(const BF* from, Lanes there) { return widened(_mm256_maskz_loadu_epi16(there, from)); }
inline Vec load(const BF* from, Every = {}) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(BF* to, const Vec& x, Lanes there) { _mm256_mask_storeu_epi16(to, there, narrowed(x)); }
inline void store(BF* to, const Vec& x, Every = {}) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(x));
}

#endif

}  // namespace lmssl
