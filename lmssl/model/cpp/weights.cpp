// Gradient of a linear layer's weight, [O, I] in float32: what reaches its output, [N, O], turned, times its input,
// [N, I].
//
// Tokens come in groups; each is turned and paired in the cache of the thread that multiplies it, for what one thread
// packs another would have to fetch from there. So threads divide the weight, and both sides once more for each thread.
#include <cstdint>

#include "tiles.h"

#if defined(LMSSL_BFLOAT16)

namespace {

using namespace lmssl;

constexpr int64_t TOKENS = 256;          // of a group; a multiple of 32
constexpr int64_t STRIDE = TOKENS + 32;  // of turned rows: a power of two would fall on few sets of the cache
constexpr int64_t OUTPUTS = 128;         // of a product's left side
constexpr int64_t INPUTS = 64;           // of its right side
constexpr int64_t MOST = 640;            // outputs and inputs whose sums a thread holds at a time

struct Range {
  int64_t from, to;

  int64_t count() const { return to - from; }
};

// One of `parts` parts of a range, in multiples of 32: whole cache lines.
Range part(Range whole, int64_t index, int64_t parts) {
  const int64_t step = round_up((whole.count() + parts - 1) / parts, 2 * LANES);
  return {std::min(whole.from + index * step, whole.to), std::min(whole.from + (index + 1) * step, whole.to)};
}

int64_t pieces(Range whole) { return (whole.count() + MOST - 1) / MOST; }

inline __m256i half_row(const BF* from, bool there) {
  return there ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_setzero_si256();
}

struct Gradient {
  const BF *grad, *hidden;
  int64_t tokens, outputs, inputs;
  float* out;
  Buffer<BF> turned{MOST * STRIDE}, paired{MOST * TOKENS};
  Buffer<float> sums{MOST * MOST};

  void block(Range rows, Range columns) {
    for (int64_t start = 0; start < tokens; start += TOKENS) {
      const int64_t count = std::min(TOKENS, tokens - start), padded = round_up(count, 32);
      for (int64_t n = 0; n < padded; n += 32) {
        turn32(start + n, count - n, rows, n);
        pair32(start + n, count - n, columns, n);
      }
      each(rows, columns, [&](Range o, Range i, float* to) {
        multiply(o.count(), i.count(), padded, turned.data() + (o.from - rows.from) * STRIDE, STRIDE,
                 paired.data() + (i.from - columns.from) * TOKENS, i.count(), to, i.count(), start > 0);
      });
    }
    each(rows, columns, [&](Range o, Range i, const float* from) {
      for (int64_t row = o.from; row < o.to; ++row, from += i.count())
        std::copy_n(from, i.count(), out + row * inputs + i.from);
    });
  }

  // `body(outputs, inputs, their sums)` for each product of a block.
  template <typename Body>
  void each(Range rows, Range columns, const Body& body) {
    float* at = sums.data();
    for (int64_t o = rows.from; o < rows.to; o += OUTPUTS)
      for (int64_t i = columns.from; i < columns.to; i += INPUTS) {
        const Range left{o, std::min(o + OUTPUTS, rows.to)}, right{i, std::min(i + INPUTS, columns.to)};
        body(left, right, at);
        at += left.count() * right.count();
      }
  }

  // 32 tokens from `first` on, of which `count` are there, as columns `to` and on of the left side. Whole cache lines
  // of a token at a time: where rows are a power of two long, the next token's takes their place in the cache.
  void turn32(int64_t first, int64_t count, Range rows, int64_t to) {
    alignas(64) BF pairs[2][16 * 32];
    for (int64_t o = rows.from; o < rows.to; o += 2 * LANES) {
      const int64_t lines = o + LANES < rows.to ? 2 : 1;
      const BF* from = grad + first * outputs + o;
      for (int64_t n = 0; n < 32; n += 2, from += 2 * outputs)
        for (int64_t line = 0; line < lines; ++line)
          store_pairs(pairs[line] + n * 16, half_row(from + line * LANES, n < count),
                      half_row(from + outputs + line * LANES, n + 1 < count));
      for (int64_t line = 0; line < lines; ++line)
        turn16(pairs[line], 16, turned.data() + (o + line * LANES - rows.from) * STRIDE + to, STRIDE / 2);
    }
  }

  // The same tokens as rows of the right sides, which are apart.
  void pair32(int64_t first, int64_t count, Range columns, int64_t to) {
    for (int64_t n = 0; n < 32; n += 2) {
      const BF* from = hidden + (first + n) * inputs;
      for (int64_t i = columns.from; i < columns.to; i += INPUTS) {
        const int64_t width = std::min(INPUTS, columns.to - i);
        BF* place = paired.data() + (i - columns.from) * TOKENS + (to + n) * width;
        for (int64_t j = 0; j < width; j += LANES)
          store_pairs(place + 2 * j, half_row(from + i + j, n < count), half_row(from + inputs + i + j, n + 1 < count));
      }
    }
  }
};

// Parts of the outputs, so that what is packed for all threads is least.
int64_t parts_of_outputs(int64_t outputs, int64_t inputs, int64_t threads) {
  const auto packed = [&](int64_t parts) { return outputs / parts + inputs / (threads / parts); };
  int64_t best = threads;
  for (int64_t parts = 1; parts <= threads; ++parts)
    if (threads % parts == 0 && packed(parts) < packed(best)) best = parts;
  return best;
}

}  // namespace

extern "C" {

// O and I are multiples of 16.
void lmssl_weight_gradient_bfloat16(const BF* grad, const BF* hidden, int64_t tokens, int64_t outputs, int64_t inputs,
                                    float* out, int32_t threads) {
  if (!tokens) {
    std::fill_n(out, outputs * inputs, 0.f);
    return;
  }
  const int64_t high = parts_of_outputs(outputs, inputs, threads), wide = threads / high;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const Range rows = part({0, outputs}, thread / wide, high), columns = part({0, inputs}, thread % wide, wide);
    Gradient gradient{grad, hidden, tokens, outputs, inputs, out};
    for (int64_t o = 0; o < pieces(rows); ++o)
      for (int64_t i = 0; i < pieces(columns); ++i)
        gradient.block(part(rows, o, pieces(rows)), part(columns, i, pieces(columns)));
    at::native::cpublas::brgemm_release();
  }
}
}

#endif
