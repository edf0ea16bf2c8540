// Layer norm of a product, its bias and what goes around it, and root mean square norm of a product and what goes
// around it, forward and backward, in one pass over memory each.
//
// N rows, D width, a multiple of 16.
#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace {

using namespace lmssl;

template <typename S>
struct Input {
  const S* product;
  const float* bias;
  const float* around;
  int64_t width;

  Vec at(int64_t row, int64_t d) const {
    return load(product + row * width + d) + load(bias + d) + load(around + row * width + d);
  }
};

// statistics: [N, 2], mean and 1 / standard deviation.
template <typename S>
void norm(const S* product, const float* bias, const float* around, const float* weight, const float* shift, float eps,
          int64_t rows, int64_t width, float* out, float* statistics, int32_t threads) {
  const Input<S> input{product, bias, around, width};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * width;  // holds the sum first
    Vec whole(0.f), square(0.f);
    for (int64_t d = 0; d < width; d += LANES) {
      const Vec value = input.at(i, d);
      whole = whole + value;
      value.store(row + d);
    }
    const float mean = sum(whole) / width;
    for (int64_t d = 0; d < width; d += LANES) {
      const Vec centred = load(row + d) - Vec(mean);
      square = square + centred * centred;
    }
    const float scale = 1.f / std::sqrt(sum(square) / width + eps);
    for (int64_t d = 0; d < width; d += LANES)
      ((load(row + d) - Vec(mean)) * Vec(scale) * load(weight + d) + load(shift + d)).store(row + d);
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = scale;
  }
}

// of_vectors: [parts, 3, D], the first of which become the gradients of weight, shift and bias; rows next to each other
// are summed in a part. of_product: the same as of_around; null: not wanted.
template <typename S>
void norm_backward(const float* grad, const S* product, const float* bias, const float* around, const float* weight,
                   const float* statistics, int64_t rows, int64_t width, int64_t parts, S* of_product,
                   float* of_around, float* of_vectors, int32_t threads) {
  const Input<S> input{product, bias, around, width};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float *of_weight = of_vectors + part * 3 * width, *of_shift = of_weight + width, *of_bias = of_shift + width;
    std::fill_n(of_weight, 3 * width, 0.f);
    Buffer<float> normal(width);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const Vec mean(statistics[2 * i]), scale(statistics[2 * i + 1]);
      Vec whole(0.f), along(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec x = (input.at(i, d) - mean) * scale, g = load(grad + i * width + d);
        const Vec weighted = g * load(weight + d);
        whole = whole + weighted;
        along = along + weighted * x;
        x.store(normal.data() + d);
        (load(of_weight + d) + g * x).store(of_weight + d);
        (load(of_shift + d) + g).store(of_shift + d);
      }
      const Vec level(sum(whole) / width), slope(sum(along) / width);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec weighted = load(grad + i * width + d) * load(weight + d);
        const Vec found = scale * (weighted - level - load(normal.data() + d) * slope);
        found.store(of_around + i * width + d);
        if (of_product) store(of_product + i * width + d, found);
        (load(of_bias + d) + found).store(of_bias + d);
      }
    }
  }
  sum_parts(of_vectors, parts, 3 * width);
}

// total [N, D]: the sum that is normalised; without a product it is what goes around, and not written.
template <typename S>
void rms_norm(const S* product, const float* around, const float* weight, float eps, int64_t rows, int64_t width,
              float* total, S* out, float* scales, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t place = i * width;
    Vec square(0.f);
    for (int64_t d = 0; d < width; d += LANES) {
      Vec value = load(around + place + d);
      if (product) {
        value = value + load(product + place + d);
        value.store(total + place + d);
      }
      square = square + value * value;
    }
    const float scale = 1.f / std::sqrt(sum(square) / width + eps);
    const float* row = (product ? total : around) + place;
    for (int64_t d = 0; d < width; d += LANES)
      store(out + place + d, load(row + d) * Vec(scale) * load(weight + d));
    scales[i] = scale;
  }
}

// of_total: what reaches the norm and what goes past it together; of_product: the same, or null.
// of_weight: [parts, D], the first of which becomes the gradient.
template <typename S>
void rms_norm_backward(const S* grad, const float* past, const float* total, const float* weight, const float* scales,
                       int64_t rows, int64_t width, int64_t parts, float* of_total, S* of_product, float* of_weight,
                       int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = of_weight + part * width;
    std::fill_n(sums, width, 0.f);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const int64_t place = i * width;
      const Vec scale(scales[i]);
      Vec along(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec x = load(total + place + d) * scale, g = load(grad + place + d);
        along = along + g * load(weight + d) * x;
        (load(sums + d) + g * x).store(sums + d);
      }
      const Vec slope = Vec(sum(along) / width) * scale;
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec g = load(grad + place + d);
        const Vec through = scale * (g * load(weight + d) - load(total + place + d) * slope);
        const Vec found = through + load(past + place + d);
        found.store(of_total + place + d);
        if (of_product) store(of_product + place + d, found);
      }
    }
  }
  sum_parts(of_weight, parts, width);
}
}  // namespace

#define LMSSL_NORMS(NAME, S)                                                                                          \
  void lmssl_norm_##NAME(const S* product, const float* bias, const float* around, const float* weight,               \
                         const float* shift, float eps, int64_t rows, int64_t width, float* out, float* statistics,   \
                         int32_t threads) {                                                                           \
    norm(product, bias, around, weight, shift, eps, rows, width, out, statistics, threads);                           \
  }                                                                                                                   \
  void lmssl_norm_backward_##NAME(const float* grad, const S* product, const float* bias, const float* around,        \
                                  const float* weight, const float* statistics, int64_t rows, int64_t width,          \
                                  int64_t parts, S* of_product, float* of_around, float* of_vectors,                  \
                                  int32_t threads) {                                                                  \
    norm_backward(grad, product, bias, around, weight, statistics, rows, width, parts, of_product, of_around,         \
                  of_vectors, threads);                                                                               \
  }                                                                                                                   \
  void lmssl_rms_norm_##NAME(const S* product, const float* around, const float* weight, float eps, int64_t rows,     \
                             int64_t width, float* total, S* out, float* scales, int32_t threads) {                   \
    rms_norm(product, around, weight, eps, rows, width, total, out, scales, threads);                                 \
  }                                                                                                                   \
  void lmssl_rms_norm_backward_##NAME(const S* grad, const float* past, const float* total, const float* weight,      \
                                      const float* scales, int64_t rows, int64_t width, int64_t parts,                \
                                      float* of_total, S* of_product, float* of_weight, int32_t threads) {            \
    rms_norm_backward(grad, past, total, weight, scales, rows, width, parts, of_total, of_product, of_weight,         \
                      threads);                                                                                       \
  }

extern "C" {
LMSSL_NORMS(float32, float)
#if defined(LMSSL_BFLOAT16)
LMSSL_NORMS(bfloat16, BF)
#endif
}
