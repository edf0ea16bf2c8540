// GELU of a product and its bias, SiLU of a gate times what it lets through, and an embedding's gradient, in one pass
// over memory each.
//
// N rows, F width, V vocabulary.
#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace {

using namespace lmssl;

inline Vec reciprocal(const Vec& value) {
  const __m512 first = _mm512_rcp14_ps(value);
  return _mm512_mul_ps(first, _mm512_fnmadd_ps(value, first, _mm512_set1_ps(2.f)));
}

struct Normal {
  Vec below, density;  // the normal distribution's integral up to a value, and its density there
};

// Abramowitz and Stegun 7.1.26, within 1.5e-7 of the error function; the exponential serves both.
inline Normal normal(const Vec& x) {
  const Vec power = exponential(x * x * Vec(-0.5f));
  const Vec t = reciprocal(Vec(1.f) + x.abs() * Vec(0.3275911f * 0.70710678f));
  Vec sum(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + Vec(factor);
  const Vec tail = sum * t * power * Vec(0.5f);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_mask_mov_ps(Vec(1.f) - tail, negative, tail), power * Vec(0.39894228f)};
}

inline Vec with_bias(const BF* row, const float* bias, int64_t column, __mmask16 there) {
  const Vec value = load_bf16(row + column, there);
  return bias ? value + Vec(_mm512_maskz_loadu_ps(there, bias + column)) : value;
}

// Beyond 80 an exponential is as good as infinite, and its reciprocal no number; the order keeps what is none.
inline Vec sigmoid(const Vec& x) {
  return reciprocal(Vec(1.f) + Vec(exponential(_mm512_min_ps(_mm512_set1_ps(80.f), Vec(0.f) - x))));
}

}  // namespace

extern "C" {

void lmssl_gelu(const BF* product, const float* bias, BF* out, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    by_lanes(width, [&](int64_t j, __mmask16 there) {
      const Vec x = with_bias(product + i * width, bias, j, there);
      store_bf16(out + i * width + j, x * normal(x).below, there);
    });
}

// of_bias: [parts, F], the first of which becomes the sum of rows; rows next to each other are summed in a part.
void lmssl_gelu_backward(const BF* grad, const BF* product, const float* bias, BF* of_product, float* of_bias,
                         int64_t rows, int64_t width, int64_t parts, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = of_bias + part * width;
    std::fill_n(sums, width, 0.f);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i)
      by_lanes(width, [&](int64_t j, __mmask16 there) {
        const Vec x = with_bias(product + i * width, bias, j, there);
        const Normal at = normal(x);
        const Vec found = load_bf16(grad + i * width + j, there) * (at.below + x * at.density);
        store_bf16(of_product + i * width + j, found, there);
        _mm512_mask_storeu_ps(sums + j, there, Vec(_mm512_maskz_loadu_ps(there, sums + j)) + found);
      });
  }
  sum_parts(of_bias, parts, width);
}

// out [V, D] = (more ? out : 0) + the gradients [N, D] of looked up rows, summed in the order of tokens; none for
// `padding`. Each part of the vocabulary is one thread's.
void lmssl_embedding_gradient(const float* grad, const int64_t* ids, int64_t tokens, int64_t width, int64_t vocabulary,
                              int64_t padding, int64_t more, float* out, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t low = vocabulary * part / threads, high = vocabulary * (part + 1) / threads;
    if (!more) std::fill(out + low * width, out + high * width, 0.f);
    for (int64_t i = 0; i < tokens; ++i)
      if (ids[i] >= low && ids[i] < high && ids[i] != padding)
        for (int64_t d = 0; d < width; ++d) out[ids[i] * width + d] += grad[i * width + d];
  }
}

// product: [N, 2 F], gates before what they let through.
void lmssl_swiglu(const BF* product, BF* out, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const BF *gate = product + 2 * i * width, *up = gate + width;
    by_lanes(width, [&](int64_t j, __mmask16 there) {
      const Vec x = load_bf16(gate + j, there);
      store_bf16(out + i * width + j, x * sigmoid(x) * load_bf16(up + j, there), there);
    });
  }
}

void lmssl_swiglu_backward(const BF* grad, const BF* product, BF* of_product, int64_t rows, int64_t width,
                           int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const BF *gate = product + 2 * i * width, *up = gate + width;
    BF *of_gate = of_product + 2 * i * width, *of_up = of_gate + width;
    by_lanes(width, [&](int64_t j, __mmask16 there) {
      const Vec x = load_bf16(gate + j, there), g = load_bf16(grad + i * width + j, there), share = sigmoid(x);
      store_bf16(of_up + j, g * x * share, there);
      store_bf16(of_gate + j, g * load_bf16(up + j, there) * share * (Vec(1.f) + x * (Vec(1.f) - share)), there);
    });
  }
}
}
