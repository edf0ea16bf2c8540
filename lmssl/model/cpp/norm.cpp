// Layer norm of a product, its bias and what goes around it, and root mean square norm of a product and what goes
// around it, forward and backward, in one pass over memory each.
//
// N rows, D width, a multiple of 16.
#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace {

using namespace lmssl;

struct Input {
  const BF* product;
  const float* bias;
  const float* around;
  int64_t width;

  Vec at(int64_t row, int64_t d) const {
    return load_bf16(product + row * width + d, 0xffff) + Vec::loadu(bias + d) + Vec::loadu(around + row * width + d);
  }
};

}  // namespace

extern "C" {

// statistics: [N, 2], mean and 1 / standard deviation.
void lmssl_norm(const BF* product, const float* bias, const float* around, const float* weight, const float* shift,
                float eps, int64_t rows, int64_t width, float* out, float* statistics, int32_t threads) {
  const Input input{product, bias, around, width};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * width;  // holds the sum first
    Vec sum(0.f), square(0.f);
    for (int64_t d = 0; d < width; d += LANES) {
      const Vec value = input.at(i, d);
      sum = sum + value;
      value.store(row + d);
    }
    const float mean = _mm512_reduce_add_ps(sum) / width;
    for (int64_t d = 0; d < width; d += LANES) {
      const Vec centred = Vec::loadu(row + d) - Vec(mean);
      square = square + centred * centred;
    }
    const float scale = 1.f / std::sqrt(_mm512_reduce_add_ps(square) / width + eps);
    for (int64_t d = 0; d < width; d += LANES)
      ((Vec::loadu(row + d) - Vec(mean)) * Vec(scale) * Vec::loadu(weight + d) + Vec::loadu(shift + d)).store(row + d);
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = scale;
  }
}

// of_vectors: [parts, 3, D], the first of which become the gradients of weight, shift and bias; rows next to each other
// are summed in a part.
void lmssl_norm_backward(const float* grad, const BF* product, const float* bias, const float* around,
                         const float* weight, const float* statistics, int64_t rows, int64_t width, int64_t parts,
                         BF* of_product, float* of_around, float* of_vectors, int32_t threads) {
  const Input input{product, bias, around, width};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float *of_weight = of_vectors + part * 3 * width, *of_shift = of_weight + width, *of_bias = of_shift + width;
    std::fill_n(of_weight, 3 * width, 0.f);
    Buffer<float> normal(width);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const Vec mean(statistics[2 * i]), scale(statistics[2 * i + 1]);
      Vec sum(0.f), along(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec x = (input.at(i, d) - mean) * scale, g = Vec::loadu(grad + i * width + d);
        const Vec weighted = g * Vec::loadu(weight + d);
        sum = sum + weighted;
        along = along + weighted * x;
        x.store(normal.data() + d);
        (Vec::loadu(of_weight + d) + g * x).store(of_weight + d);
        (Vec::loadu(of_shift + d) + g).store(of_shift + d);
      }
      const Vec level(_mm512_reduce_add_ps(sum) / width), slope(_mm512_reduce_add_ps(along) / width);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec weighted = Vec::loadu(grad + i * width + d) * Vec::loadu(weight + d);
        const Vec found = scale * (weighted - level - Vec::loadu(normal.data() + d) * slope);
        found.store(of_around + i * width + d);
        store_bf16(of_product + i * width + d, found);
        (Vec::loadu(of_bias + d) + found).store(of_bias + d);
      }
    }
  }
  sum_parts(of_vectors, parts, 3 * width);
}

// total [N, D]: the sum that is normalised; without a product it is what goes around, and not written.
void lmssl_rms_norm(const BF* product, const float* around, const float* weight, float eps, int64_t rows, int64_t width,
                    float* total, BF* out, float* scales, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t place = i * width;
    Vec square(0.f);
    for (int64_t d = 0; d < width; d += LANES) {
      Vec value = Vec::loadu(around + place + d);
      if (product) {
        value = value + load_bf16(product + place + d, 0xffff);
        value.store(total + place + d);
      }
      square = square + value * value;
    }
    const float scale = 1.f / std::sqrt(_mm512_reduce_add_ps(square) / width + eps);
    const float* row = (product ? total : around) + place;
    for (int64_t d = 0; d < width; d += LANES)
      store_bf16(out + place + d, Vec::loadu(row + d) * Vec(scale) * Vec::loadu(weight + d));
    scales[i] = scale;
  }
}

// of_total: what reaches the norm and what goes past it together; of_product: the same, or null.
// of_weight: [parts, D], the first of which becomes the gradient.
void lmssl_rms_norm_backward(const BF* grad, const float* past, const float* total, const float* weight,
                             const float* scales, int64_t rows, int64_t width, int64_t parts, float* of_total,
                             BF* of_product, float* of_weight, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = of_weight + part * width;
    std::fill_n(sums, width, 0.f);
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const int64_t place = i * width;
      const Vec scale(scales[i]);
      Vec along(0.f);
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec x = Vec::loadu(total + place + d) * scale, g = load_bf16(grad + place + d, 0xffff);
        along = along + g * Vec::loadu(weight + d) * x;
        (Vec::loadu(sums + d) + g * x).store(sums + d);
      }
      const Vec slope = Vec(_mm512_reduce_add_ps(along) / width) * scale;
      for (int64_t d = 0; d < width; d += LANES) {
        const Vec g = load_bf16(grad + place + d, 0xffff);
        const Vec through = scale * (g * Vec::loadu(weight + d) - Vec::loadu(total + place + d) * slope);
        const Vec found = through + Vec::loadu(past + place + d);
        found.store(of_total + place + d);
        if (of_product) store_bf16(of_product + place + d, found);
      }
    }
  }
  sum_parts(of_weight, parts, width);
}
}
