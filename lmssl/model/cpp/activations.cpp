// GELU of a product and its bias, SiLU of a gate times what it lets through, and an embedding's gradient, in one pass
// over memory each.
//
// N rows, F width, V vocabulary.
#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace {

using namespace lmssl;

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
  return {choose(not_below(x, Vec(0.f)), Vec(1.f) - tail, tail), power * Vec(0.39894228f)};
}

template <typename S, typename There>
inline Vec with_bias(const S* row, const float* bias, int64_t column, There there) {
  const Vec value = load(row + column, there);
  return bias ? value + load(bias + column, there) : value;
}

// Beyond 80 an exponential is as good as infinite, and its reciprocal no number.
inline Vec sigmoid(const Vec& x) { return reciprocal(Vec(1.f) + exponential(smaller(Vec(80.f), Vec(0.f) - x))); }

template <typename S>
void gelu(const S* product, const float* bias, S* out, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    by_lanes(width, [&](int64_t j, auto there) {
      const Vec x = with_bias(product + i * width, bias, j, there);
      store(out + i * width + j, x * normal(x).below, there);
    });
}

// of_bias: [parts, F], the first of which becomes the sum of rows; rows next to each other are summed in a part.
template <typename S>
void gelu_backward(const S* grad, const S* product, const float* bias, S* of_product, float* of_bias, int64_t rows,
                   int64_t width, int64_t parts, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = of_bias + part * width;
    std::fill_n(sums, width, 0.f);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i)
      by_lanes(width, [&](int64_t j, auto there) {
        const Vec x = with_bias(product + i * width, bias, j, there);
        const Normal at = normal(x);
        const Vec found = load(grad + i * width + j, there) * (at.below + x * at.density);
        store(of_product + i * width + j, found, there);
        store(sums + j, load(sums + j, there) + found, there);
      });
  }
  sum_parts(of_bias, parts, width);
}

// product: [N, 2 F], gates before what they let through.
template <typename S>
void swiglu(const S* product, S* out, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const S *gate = product + 2 * i * width, *up = gate + width;
    by_lanes(width, [&](int64_t j, auto there) {
      const Vec x = load(gate + j, there);
      store(out + i * width + j, x * sigmoid(x) * load(up + j, there), there);
    });
  }
}

template <typename S>
void swiglu_backward(const S* grad, const S* product, S* of_product, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const S *gate = product + 2 * i * width, *up = gate + width;
    S *of_gate = of_product + 2 * i * width, *of_up = of_gate + width;
    by_lanes(width, [&](int64_t j, auto there) {
      const Vec x = load(gate + j, there), g = load(grad + i * width + j, there), share = sigmoid(x);
      store(of_up + j, g * x * share, there);
      store(of_gate + j, g * load(up + j, there) * share * (Vec(1.f) + x * (Vec(1.f) - share)), there);
    });
  }
}
}  // namespace

#define LMSSL_ACTIVATIONS(NAME, S)                                                                                    \
  void lmssl_gelu_##NAME(const S* product, const float* bias, S* out, int64_t rows, int64_t width, int32_t threads) { \
    gelu(product, bias, out, rows, width, threads);                                                                   \
  }                                                                                                                   \
  void lmssl_gelu_backward_##NAME(const S* grad, const S* product, const float* bias, S* of_product, float* of_bias,  \
                                  int64_t rows, int64_t width, int64_t parts, int32_t threads) {                      \
    gelu_backward(grad, product, bias, of_product, of_bias, rows, width, parts, threads);                             \
  }                                                                                                                   \
  void lmssl_swiglu_##NAME(const S* product, S* out, int64_t rows, int64_t width, int32_t threads) {                  \
    swiglu(product, out, rows, width, threads);                                                                       \
  }                                                                                                                   \
  void lmssl_swiglu_backward_##NAME(const S* grad, const S* product, S* of_product, int64_t rows, int64_t width,      \
                                    int32_t threads) {                                                                \
    swiglu_backward(grad, product, of_product, rows, width, threads);                                                 \
  }

extern "C" {

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

LMSSL_ACTIVATIONS(float32, float)
#if defined(LMSSL_BFLOAT16)
LMSSL_ACTIVATIONS(bfloat16, BF)
#endif
}
