// Pieces of matrices as small products want them: rows of float32 for those below, pairs of rows of bfloat16 for
// oneDNN's, which use AMX where it is.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace lmssl {

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
template <typename S>
struct Rows {
  S* data;
  int64_t stride;

  S* at(int64_t row) const { return data + row * stride; }
};

// strides: of sequence, token and head.
template <typename S>
inline Rows<S> rows(const S* data, const int64_t* strides, int64_t sequence, int64_t head) {
  return {const_cast<S*>(data) + sequence * strides[0] + head * strides[2], strides[1]};
}

template <typename S>
inline void store_row(S* to, const float* from, int64_t width) {
  by_lanes(width, [&](int64_t d, auto there) { store(to + d, load(from + d, there), there); });
}

// parts [count, width], one after another, into the first.
inline void sum_parts(float* parts, int64_t count, int64_t width) {
  for (int64_t part = 1; part < count; ++part)
    for (int64_t d = 0; d < width; ++d) parts[d] += parts[part * width + d];
}

template <typename S>
inline float dot(const S* left, const S* right, int64_t width) {
  Vec found(0.f);
  by_lanes(width, [&](int64_t d, auto there) {
    found = found + load(left + d, there) * load(right + d, there);
  });
  return sum(found);
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

// Rows of the left side and registers of the right side of a block, whose sums stay in registers: of 32 with AVX-512,
// of 16 with AVX2.
constexpr int64_t HIGH = 6;
constexpr int64_t WIDE = LANES == 16 ? 4 : 2;

template <int64_t high, int64_t wide>
inline void multiply_block(int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b, float* c,
                           int64_t ld_c, bool more) {
  Vec sums[high][wide];
#pragma GCC unroll 8
  for (int64_t i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < wide; ++j) sums[i][j] = more ? Vec::loadu(c + i * ld_c + j * LANES) : Vec(0.f);
  for (int64_t l = 0; l < k; ++l) {
    Vec right[wide];
#pragma GCC unroll 8
    for (int64_t j = 0; j < wide; ++j) right[j] = Vec::loadu(b + l * ld_b + j * LANES);
#pragma GCC unroll 8
    for (int64_t i = 0; i < high; ++i) {
      const Vec left(a[i * ld_a + l]);
#pragma GCC unroll 8
      for (int64_t j = 0; j < wide; ++j) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < wide; ++j) sums[i][j].store(c + i * ld_c + j * LANES);
}

// The last rows, fewer than a block has.
template <int64_t high, int64_t wide, typename... Rest>
inline void multiply_last(int64_t m, Rest... rest) {
  if constexpr (high > 0) {
    if (m == high)
      multiply_block<high, wide>(rest...);
    else
      multiply_last<high - 1, wide>(m, rest...);
  }
}

template <int64_t wide>
inline void multiply_columns(int64_t m, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b, float* c,
                             int64_t ld_c, bool more) {
  int64_t i = 0;
  for (; i + HIGH <= m; i += HIGH) multiply_block<HIGH, wide>(k, a + i * ld_a, ld_a, b, ld_b, c + i * ld_c, ld_c, more);
  multiply_last<HIGH - 1, wide>(m - i, k, a + i * ld_a, ld_a, b, ld_b, c + i * ld_c, ld_c, more);
}

// C [m, n] = (more ? C : 0) + A [m, k] B [k, n]; n is a multiple of 16.
inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b,
                     float* c, int64_t ld_c, bool more) {
  int64_t j = 0;
  for (; j + WIDE * LANES <= n; j += WIDE * LANES) multiply_columns<WIDE>(m, k, a, ld_a, b + j, ld_b, c + j, ld_c, more);
  for (; j + 2 * LANES <= n; j += 2 * LANES) multiply_columns<2>(m, k, a, ld_a, b + j, ld_b, c + j, ld_c, more);
  for (; j < n; j += LANES) multiply_columns<1>(m, k, a, ld_a, b + j, ld_b, c + j, ld_c, more);
}

// Rows [start, start + count) as the right side of a product over the width: [width, padded], the rest zero.
inline void pack_transposed(const Rows<float>& from, int64_t start, int64_t count, int64_t width, int64_t padded,
                            float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t d = 0; d < width; d += 16) turn16(from.at(start + i) + d, from.stride, to + d * padded + i, padded);
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t j = i; j < count; ++j) to[d * padded + j] = from.at(start + j)[d];
    std::fill(to + d * padded + count, to + (d + 1) * padded, 0.f);
  }
}

// The same as its left side.
inline void pack_turned(const Rows<float>& from, int64_t start, int64_t count, int64_t width, int64_t padded,
                        float* to) {
  pack_transposed(from, start, count, width, padded, to);
}

// Rows [start, start + count) as the right side of a product over the rows: [padded, width], the rest zero.
inline void pack_rows(const Rows<float>& from, int64_t start, int64_t count, int64_t width, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(from.at(start + i), width, to + i * width);
  std::fill(to + count * width, to + padded * width, 0.f);
}

inline void release(const float*) {}

#if defined(LMSSL_BFLOAT16)

// Two rows as pairs: first[0], second[0], first[1], second[1], ...
inline void store_pairs(BF* to, __m256i first, __m256i second) {
  const __m512i low = _mm512_cvtepu16_epi32(first);
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
}

inline void store_pairs(BF* to, const Vec& first, const Vec& second) {
  store_pairs(to, narrowed(first), narrowed(second));
}

// The same, B in pairs of rows: [k / 2, ld_b, 2].
inline void multiply(int64_t m, int64_t n, int64_t k, const BF* a, int64_t ld_a, const BF* b, int64_t ld_b, float* c,
                     int64_t ld_c, bool more) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, more, a, b, c);
}

// [width / 2, padded, 2].
inline void pack_transposed(const Rows<BF>& from, int64_t start, int64_t count, int64_t width, int64_t padded, BF* to) {
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

// [padded / 2, width, 2].
inline void pack_rows(const Rows<BF>& from, int64_t start, int64_t count, int64_t width, int64_t padded, BF* to) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t i = 0; i < padded; i += 2)
    for (int64_t d = 0; d < width; d += LANES) {
      const auto load = [&](int64_t row) {
        return row < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.at(start + row) + d)) : zero;
      };
      store_pairs(to + i * width + 2 * d, load(i), load(i + 1));
    }
}

inline void pack_turned(const Rows<BF>& from, int64_t start, int64_t count, int64_t width, int64_t padded, BF* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t d = 0; d < width; d += LANES)
      at::vec::transpose_mxn<BF, 16, 16>(from.at(start + i) + d, from.stride, to + d * padded + i, padded);
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t j = i; j < count; ++j) to[d * padded + j] = from.at(start + j)[d];
    std::fill(to + d * padded + count, to + (d + 1) * padded, BF(0.f));
  }
}

inline void release(const BF*) { at::native::cpublas::brgemm_release(); }

#endif

}  // namespace lmssl
