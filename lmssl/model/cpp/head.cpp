// Cross-entropy of logits and its gradient, row by row while the row is in the cache.
//
// N rows, V vocabulary.
#include <cmath>
#include <cstdint>
#include <limits>

#include "tiles.h"

namespace {

using namespace lmssl;

constexpr int64_t WORDS = 1024;  // whose probabilities are summed apart, for a long sum is rounded often

struct Row {
  float loss, correct;
};

// Logits of some words in float32, with their bias.
template <typename S, typename There>
inline Vec logits(const S* row, const float* bias, int64_t word, There there) {
  const Vec value = load(row + word, there);
  return bias ? value + load(bias + word, there) : value;
}

// The gradient takes the place of the logits; `powers` has room for a row.
template <typename S>
Row softmax_row(S* row, const float* bias, int64_t vocabulary, int64_t target, float* powers) {
  const Vec least(-std::numeric_limits<float>::infinity());
  Vec high = least;
  by_lanes(vocabulary, [&](int64_t v, auto there) {
    high = larger(high, choose(there, logits(row, bias, v, there), least));
  });
  const float top = largest(high);
  Vec whole(0.f);
  int64_t ties = 0;
  const float picked = float(row[target]) + (bias ? bias[target] : 0.f);
  for (int64_t start = 0; start < vocabulary; start += WORDS) {
    Vec part(0.f);
    by_lanes(std::min(WORDS, vocabulary - start), [&](int64_t j, auto there) {
      const Vec value = logits(row, bias, start + j, there);
      ties += count_in(there, not_below(value, Vec(top)));
      const Vec power = keep(there, exponential(value - Vec(top)));
      part = part + power;
      store(powers + start + j, power, there);
    });
    whole = whole + part;
  }
  const float total = sum(whole);
  const Vec share(1.f / total);
  by_lanes(vocabulary, [&](int64_t v, auto there) { store(row + v, load(powers + v, there) * share, there); });
  row[target] = S(powers[target] / total - 1.f);
  return {std::log(total) + top - picked, ties == 1 && picked == top ? 1.f : 0.f};
}

// A row without a target (negative) has neither loss nor gradient.
template <typename S>
void losses_and_gradient(S* logits, const float* bias, const int64_t* targets, int64_t rows, int64_t vocabulary,
                         float* losses, float* correct, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> powers(vocabulary);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      S* row = logits + i * vocabulary;
      Row found{0.f, 0.f};
      if (targets[i] < 0)
        std::fill_n(row, vocabulary, S(0.f));
      else
        found = softmax_row(row, bias, vocabulary, targets[i], powers.data());
      losses[i] = found.loss;
      correct[i] = found.correct;
    }
  }
}

// out [V, D] = factor * product [D, V], turned; D and V are multiples of 16.
template <typename S>
void turn_scaled(const S* product, const float* factor, int64_t width, int64_t vocabulary, float* out,
                 int32_t threads) {
  constexpr int64_t STEP = 64;  // words: two cache lines or more of a row of the product
  const Vec scale(*factor);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < vocabulary; start += STEP)
    for (int64_t d = 0; d < width; d += 16)
      for (int64_t v = start; v < std::min(start + STEP, vocabulary); v += 16) {
        float tile[16 * 16];
        for (int64_t i = 0; i < 16; ++i)
          for (int64_t j = 0; j < 16; j += LANES)
            store(tile + i * 16 + j, load(product + (d + i) * vocabulary + v + j) * scale);
        turn16(tile, 16, out + v * width + d, width);
      }
}

}  // namespace

#define LMSSL_HEAD(NAME, S)                                                                                        \
  void lmssl_head_##NAME(S* logits, const float* bias, const int64_t* targets, int64_t rows, int64_t vocabulary,   \
                         float* losses, float* correct, int32_t threads) {                                         \
    losses_and_gradient(logits, bias, targets, rows, vocabulary, losses, correct, threads);                        \
  }                                                                                                                \
  void lmssl_turn_##NAME(const S* product, const float* factor, int64_t width, int64_t vocabulary, float* out,     \
                         int32_t threads) {                                                                        \
    turn_scaled(product, factor, width, vocabulary, out, threads);                                                 \
  }

extern "C" {
LMSSL_HEAD(float32, float)
#if defined(LMSSL_BFLOAT16)
LMSSL_HEAD(bfloat16, BF)
#endif
}
