// Cross-entropy of bfloat16 logits and its gradient, row by row while the row is in the cache.
//
// N rows, V vocabulary.
#include <cmath>
#include <cstdint>
#include <limits>

#include "tiles.h"

namespace {

using namespace lmssl;

struct Row {
  float loss, correct;
};

// Logits of 16 words in float32, with their bias.
inline Vec logits(const BF* row, const float* bias, int64_t word, __mmask16 there) {
  const Vec value = load_bf16(row + word, there);
  return bias ? value + Vec(_mm512_maskz_loadu_ps(there, bias + word)) : value;
}

// The gradient takes the place of the logits; `powers` has room for a row.
Row softmax_row(BF* row, const float* bias, int64_t vocabulary, int64_t target, float* powers) {
  Vec high(-std::numeric_limits<float>::infinity());
  by_lanes(vocabulary, [&](int64_t v, __mmask16 there) {
    high = _mm512_mask_max_ps(high, there, high, logits(row, bias, v, there));
  });
  const float top = _mm512_reduce_max_ps(high);
  Vec sum(0.f);
  int64_t ties = 0;
  by_lanes(vocabulary, [&](int64_t v, __mmask16 there) {
    const Vec value = logits(row, bias, v, there);
    ties += __builtin_popcount(_mm512_mask_cmp_ps_mask(there, value, _mm512_set1_ps(top), _CMP_GE_OQ));
    const Vec power = _mm512_maskz_mov_ps(there, exponential(value - Vec(top)));
    sum = sum + power;
    _mm512_mask_storeu_ps(powers + v, there, power);
  });
  const float total = _mm512_reduce_add_ps(sum), picked = float(row[target]) + (bias ? bias[target] : 0.f);
  const __m512 share = _mm512_set1_ps(1.f / total);
  by_lanes(vocabulary, [&](int64_t v, __mmask16 there) {
    store_bf16(row + v, _mm512_mul_ps(_mm512_maskz_loadu_ps(there, powers + v), share), there);
  });
  row[target] = BF(powers[target] / total - 1.f);
  return {std::log(total) + top - picked, ties == 1 && picked == top ? 1.f : 0.f};
}

}  // namespace

extern "C" {

// A row without a target (negative) has neither loss nor gradient.
void lmssl_head(BF* logits, const float* bias, const int64_t* targets, int64_t rows, int64_t vocabulary,
                float* losses, float* correct, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> powers(vocabulary);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      BF* row = logits + i * vocabulary;
      Row found{0.f, 0.f};
      if (targets[i] < 0)
        std::fill_n(row, vocabulary, BF(0.f));
      else
        found = softmax_row(row, bias, vocabulary, targets[i], powers.data());
      losses[i] = found.loss;
      correct[i] = found.correct;
    }
  }
}

// out [V, D] = factor * product [D, V], turned; D and V are multiples of 16.
void lmssl_turn(const BF* product, const float* factor, int64_t width, int64_t vocabulary, float* out,
                int32_t threads) {
  constexpr int64_t WORDS = 64;  // two cache lines of a row of the product
  const Vec scale(*factor);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < vocabulary; start += WORDS)
    for (int64_t d = 0; d < width; d += LANES)
      for (int64_t v = start; v < std::min(start + WORDS, vocabulary); v += LANES) {
        float tile[LANES * LANES];
        for (int64_t i = 0; i < LANES; ++i)
          (load_bf16(product + (d + i) * vocabulary + v, 0xffff) * scale).store(tile + i * LANES);
        turn16(tile, LANES, out + v * width + d, width);
      }
}
}
