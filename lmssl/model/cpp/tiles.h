// Pieces of matrices as oneDNN's small products want them, for processors with AVX-512, bfloat16 and AMX.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace lmssl {

using BF = at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t LANES = 16;
constexpr int64_t QUERIES = 128;  // of a tile; a multiple of 16
constexpr int64_t KEYS = 128;    // of a tile; a multiple of 16

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Memory of one thread, in whole cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : size_(size), data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T), 64)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  void clear() { std::fill_n(data_, size_, T(0)); }

 private:
  int64_t size_;
  T* data_;
};

// The tokens of one head of one sequence.
struct Rows {
  BF* data;
  int64_t stride;

  BF* at(int64_t row) const { return data + row * stride; }
};

// strides: of sequence, token and head.
inline Rows rows(const BF* data, const int64_t* strides, int64_t sequence, int64_t head) {
  return {const_cast<BF*>(data) + sequence * strides[0] + head * strides[2], strides[1]};
}

// Lanes of [at, at + 16) that lie in [from, to).
inline __mmask16 lanes(int64_t at, int64_t from, int64_t to) {
  const int64_t low = std::clamp<int64_t>(from - at, 0, LANES), high = std::clamp<int64_t>(to - at, 0, LANES);
  return high <= low ? 0 : static_cast<__mmask16>((0xffffu >> (LANES - high)) & (0xffffu << low));
}

// `body(from, which lanes)` for 16 numbers at a time.
template <typename Body>
inline void by_lanes(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) body(j, __mmask16(0xffff));
  if (j < count) body(j, lanes(j, 0, count));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x of 16 numbers: the whole part of x as an exponent, 2^fraction by a polynomial, minimax on [0, 1) with 1 at 0.
// Off by at most 2e-7 of itself; none of what is no number.
inline Vec power_of_two(const Vec& x) {
  const Vec fraction(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  Vec sum(1.8671223e-3f);
  for (const float term : {9.0170465e-3f, 5.5799901e-2f, 2.4016446e-1f, 6.9315130e-1f, 1.f})
    sum = at::vec::fmadd(sum, fraction, Vec(term));
  return _mm512_scalef_ps(sum, x);
}

// e^x; rounding of the product adds 1e-7 |x|.
inline Vec exponential(const Vec& x) { return power_of_two(x * Vec(LOG2_E)); }

// 16 numbers, zero where `there` says that there are none.
inline Vec load_bf16(const BF* from, __mmask16 there) {
  const __m256i half = _mm256_maskz_loadu_epi16(there, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store_bf16(BF* to, __m512 values, __mmask16 there) {
  _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(values));
}

inline __m256i store_bf16(BF* to, __m512 values) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(values);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  return half;
}

// Two rows as pairs: first[0], second[0], first[1], second[1], ...
inline void store_pairs(BF* to, __m256i first, __m256i second) {
  const __m512i low = _mm512_cvtepu16_epi32(first);
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
}

inline void store_row(BF* to, const float* from, int64_t width) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) store_bf16(to + d, _mm512_loadu_ps(from + d));
  for (; d < width; ++d) to[d] = BF(from[d]);
}

// parts [count, width], one after another, into the first.
inline void sum_parts(float* parts, int64_t count, int64_t width) {
  for (int64_t part = 1; part < count; ++part)
    for (int64_t d = 0; d < width; ++d) parts[d] += parts[part * width + d];
}

inline float dot(const BF* left, const BF* right, int64_t width) {
  Vec sum(0.f);
  by_lanes(width, [&](int64_t d, __mmask16 there) {
    sum = sum + load_bf16(left + d, there) * load_bf16(right + d, there);
  });
  return _mm512_reduce_add_ps(sum);
}

// C [m, n] = (more ? C : 0) + A [m, k] B, B in pairs of rows: [k / 2, ld_b, 2].
inline void multiply(int64_t m, int64_t n, int64_t k, const BF* a, int64_t ld_a, const BF* b, int64_t ld_b, float* c,
                     int64_t ld_c, bool more) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, more, a, b, c);
}

// 16 x 16 numbers of 32 bits, turned.
inline void turn16(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  at::vec::transpose_mxn<float, 16, 16>(static_cast<const float*>(from), from_stride, static_cast<float*>(to),
                                        to_stride);
}

// float [m, n] to [n, m]; both are multiples of 16.
inline void turn(const float* from, int64_t m, int64_t n, float* to) {
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < n; j += 16) turn16(from + i * n + j, n, to + j * m + i, m);
}

// Rows [start, start + count) as the right side of a product over the width: [width / 2, padded, 2], the rest zero.
inline void pack_transposed(const Rows& from, int64_t start, int64_t count, int64_t width, int64_t padded, BF* to) {
  auto* pairs = reinterpret_cast<uint32_t*>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t d = 0; d < width / 2; d += LANES)
      turn16(from.at(start + i) + 2 * d, from.stride / 2, pairs + d * padded + i, padded);
  for (int64_t d = 0; d < width / 2; ++d) {
    for (int64_t j = i; j < count; ++j)
      pairs[d * padded + j] = reinterpret_cast<const uint32_t*>(from.at(start + j))[d];
    std::fill(pairs + d * padded + count, pairs + (d + 1) * padded, 0u);
  }
}

// Rows [start, start + count) as the right side of a product over the rows: [padded / 2, width, 2], the rest zero.
inline void pack_pairs(const Rows& from, int64_t start, int64_t count, int64_t width, int64_t padded, BF* to) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t i = 0; i < padded; i += 2)
    for (int64_t d = 0; d < width; d += LANES) {
      const auto load = [&](int64_t row) {
        return row < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.at(start + row) + d)) : zero;
      };
      store_pairs(to + i * width + 2 * d, load(i), load(i + 1));
    }
}

// Keys as [width, padded], the rest zero.
inline void turn_keys(const Rows& from, int64_t count, int64_t width, int64_t padded, BF* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t d = 0; d < width; d += LANES)
      at::vec::transpose_mxn<BF, 16, 16>(from.at(i) + d, from.stride, to + d * padded + i, padded);
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t j = i; j < count; ++j) to[d * padded + j] = from.at(j)[d];
    std::fill(to + d * padded + count, to + (d + 1) * padded, BF(0.f));
  }
}

}  // namespace lmssl
