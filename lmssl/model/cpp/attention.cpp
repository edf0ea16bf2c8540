// Attention within documents for CPUs with AMX, forward and backward, tile by tile.
//
// A tile of queries meets the tiles of keys that one of its queries may see, so that what packed documents do not
// share costs nothing and no mask exists. Scores and sums are float32; operands of products are bfloat16. In the
// backward pass tiles are held as keys x queries: then probabilities and their gradients are the left sides of the
// products for values and keys as they are, and nothing is transposed but a tile's queries.
//
// B sequences, H heads of queries, G of keys and values, T tokens, D width of a head.
#include <cmath>
#include <cstdint>
#include <limits>

#include "tiles.h"

namespace {

using namespace lmssl;

struct Problem {
  int64_t batch, heads, groups, length, width, window;
  bool causal;
  float scale;
  const int64_t* segments;  // [B, T], or null: a sequence is one document
  const float* cos;         // of rotary positions, [B or 1, T, D], or null: queries and keys are not rotated
  const float* sin;
  const float* bias;        // of queries of all heads, then keys, then values, or null
  int64_t rotation_stride;  // of sequences; 0: all have the same

  int64_t padded() const { return round_up(length, KEYS); }

  // What is added to the tokens of a head, counted from the first of queries, or null.
  const float* bias_of(int64_t head) const { return bias ? bias + head * width : nullptr; }
};

// sizes: B, H, G, T, D, window (0: none), causal, stride of rotation.
Problem problem(const int64_t* sizes, float scale, const int64_t* segments, const float* cos, const float* sin,
                const float* bias) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6] != 0, scale,
          segments, cos,      sin,      bias,     sizes[7]};
}

// Rotates halves of rows against each other by a position's angles, as transformers does; `back`: the other way round.
template <bool back>
inline void rotate(const Problem& p, int64_t sequence, int64_t position, Vec& first, Vec& second, int64_t d) {
  const int64_t half = p.width / 2, place = sequence * p.rotation_stride + position * p.width + d;
  const Vec cos_1 = Vec::loadu(p.cos + place), cos_2 = Vec::loadu(p.cos + place + half);
  const Vec sin_1 = Vec::loadu(p.sin + place), sin_2 = Vec::loadu(p.sin + place + half);
  const Vec before = first;
  first = back ? first * cos_1 + second * sin_2 : first * cos_1 - second * sin_1;
  second = back ? second * cos_2 - before * sin_1 : second * cos_2 + before * sin_2;
}

constexpr int64_t AHEAD = 12;  // tokens; a head's lie further apart than the processor looks ahead by itself

// Tokens of a head as products want them: with their bias, and rotated, in `room`, or as they are.
Rows prepared(const Problem& p, int64_t sequence, const Rows& from, const float* bias, bool turns, Buffer<BF>& room) {
  turns = turns && p.cos;
  if (!turns && !bias) return from;
  const int64_t half = p.width / 2;
  for (int64_t i = 0; i < p.length; ++i)
    for (int64_t d = 0; d < half; d += LANES) {
      _mm_prefetch(from.at(i + AHEAD) + 2 * d, _MM_HINT_T0);
      Vec first = load_bf16(from.at(i) + d, 0xffff), second = load_bf16(from.at(i) + d + half, 0xffff);
      if (bias) {
        first = first + Vec::loadu(bias + d);
        second = second + Vec::loadu(bias + d + half);
      }
      if (turns) rotate<false>(p, sequence, i, first, second, d);
      store_bf16(room.data() + i * p.width + d, first);
      store_bf16(room.data() + i * p.width + d + half, second);
    }
  return {room.data(), p.width};
}

// The gradient of a token from that of what it was rotated to, which is overwritten; added to the bias's, if any.
void store_gradient(const Problem& p, int64_t sequence, int64_t position, bool turns, float* from, BF* to,
                    float* sums) {
  const int64_t half = p.width / 2;
  if (turns && p.cos)
    for (int64_t d = 0; d < half; d += LANES) {
      Vec first = Vec::loadu(from + d), second = Vec::loadu(from + d + half);
      rotate<true>(p, sequence, position, first, second, d);
      first.store(from + d);
      second.store(from + d + half);
    }
  if (sums)
    for (int64_t d = 0; d < p.width; ++d) sums[d] += from[d];
  store_row(to, from, p.width);
}

// Which keys each query of a sequence sees, [first, end), none for what fills the last tile of queries.
struct Seen {
  std::vector<int32_t> first, end;

  Seen(const Problem& p, int64_t row) : first(round_up(p.length, QUERIES)), end(first.size()) {
    const int64_t* segments = p.segments ? p.segments + row * p.length : nullptr;
    for (int64_t start = 0, stop; start < p.length; start = stop) {
      stop = segments ? start + 1 : p.length;
      while (stop < p.length && segments[stop] == segments[start]) ++stop;
      for (int64_t query = start; query < stop; ++query) {
        first[query] = p.window ? std::max(start, query - p.window + 1) : start;
        end[query] = p.causal ? query + 1 : p.window ? std::min(stop, query + p.window) : stop;
      }
    }
  }

  // The keys that a tile of queries meets, from a whole tile of keys on.
  std::pair<int64_t, int64_t> of_tile(int64_t from, int64_t count) const {
    const auto low = *std::min_element(first.begin() + from, first.begin() + from + count);
    const auto high = *std::max_element(end.begin() + from, end.begin() + from + count);
    return {low / KEYS * KEYS, high};
  }
};

// Probabilities of a row of scores, unnormalised, for keys [from, to) of the tile; rescales what was summed before.
void soften(const float* scores, BF* powers, float* out, int64_t width, int64_t from, int64_t to, float scale,
            float& top, float& total) {
  Vec high(-std::numeric_limits<float>::infinity());
  for (int64_t j = from / LANES * LANES; j < to; j += LANES)
    high = Vec(_mm512_mask_max_ps(high, lanes(j, from, to), high, _mm512_loadu_ps(scores + j)));
  const float found = std::max(top, _mm512_reduce_max_ps(high) * scale);
  const float before = top == found ? 1.f : std::exp(top - found);
  const Vec steep(scale * LOG2_E), level(-found * LOG2_E);
  Vec sum(0.f);
  const int64_t begin = from / LANES * LANES, end = round_up(to, LANES);
  std::fill_n(powers, begin, BF(0.f));
  for (int64_t j = begin; j < end; j += LANES) {
    const __mmask16 kept = lanes(j, from, to);
    const __m512 zeroed = _mm512_maskz_mov_ps(kept, power_of_two(at::vec::fmadd(Vec::loadu(scores + j), steep, level)));
    sum = sum + Vec(zeroed);
    store_bf16(powers + j, zeroed);
  }
  std::fill_n(powers + end, KEYS - end, BF(0.f));
  if (before != 1.f)
    for (int64_t d = 0; d < width; ++d) out[d] *= before;
  total = total * before + _mm512_reduce_add_ps(sum);
  top = found;
}

struct Forward {
  const Problem& p;
  Buffer<BF> queries, keys, values, key_t, value_pairs, powers;
  Buffer<float> scores, out;

  explicit Forward(const Problem& p)
      : p(p), queries(p.length * p.width), keys(p.length * p.width), values(p.length * p.width),
        key_t(p.width * p.padded()), value_pairs(p.padded() * p.width), powers(QUERIES * KEYS),
        scores(QUERIES * KEYS), out(QUERIES * p.width) {}

  void head(const Rows& query, const Rows& to, const Seen& seen, float* lse) {
    for (int64_t start = 0; start < p.length; start += QUERIES)
      tile(query, to, seen, start, std::min(QUERIES, p.length - start), lse);
  }

  void tile(const Rows& query, const Rows& to, const Seen& seen, int64_t start, int64_t count, float* lse) {
    float top[QUERIES], total[QUERIES] = {};
    std::fill_n(top, QUERIES, -std::numeric_limits<float>::infinity());
    std::fill_n(out.data(), count * p.width, 0.f);
    const auto [low, high] = seen.of_tile(start, count);
    for (int64_t keys = low; keys < high; keys += KEYS) {
      multiply(count, KEYS, p.width, query.at(start), query.stride, key_t.data() + 2 * keys, p.padded(), scores.data(),
               KEYS, false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t from = std::max<int64_t>(seen.first[start + i] - keys, 0);
        const int64_t to_key = std::min<int64_t>(seen.end[start + i] - keys, KEYS);
        BF* row = powers.data() + i * KEYS;
        if (from >= to_key)
          std::fill_n(row, KEYS, BF(0.f));
        else
          soften(scores.data() + i * KEYS, row, out.data() + i * p.width, p.width, from, to_key, p.scale, top[i],
                 total[i]);
      }
      multiply(count, p.width, KEYS, powers.data(), KEYS, value_pairs.data() + keys * p.width, p.width, out.data(),
               p.width, true);
    }
    for (int64_t i = 0; i < count; ++i) {
      lse[start + i] = top[i] + std::log(total[i]);
      const Vec share(1.f / total[i]);
      for (int64_t d = 0; d < p.width; d += LANES)
        store_bf16(to.at(start + i) + d, Vec::loadu(out.data() + i * p.width + d) * share);
    }
  }
};

struct Backward {
  const Problem& p;
  Buffer<BF> queries, keys, values, key_turned, query_t, grad_t, query_pairs, grad_pairs, probs, grad_scores,
      score_pairs;
  Buffer<float> scores, grad_probs, of_query_t, of_query, of_key, of_value, delta;

  explicit Backward(const Problem& p)
      : p(p), queries(p.length * p.width), keys(p.length * p.width), values(p.length * p.width),
        key_turned(p.width * p.padded()), query_t(p.width * QUERIES), grad_t(p.width * QUERIES),
        query_pairs(QUERIES * p.width), grad_pairs(QUERIES * p.width), probs(KEYS * QUERIES),
        grad_scores(KEYS * QUERIES), score_pairs(KEYS * QUERIES), scores(KEYS * QUERIES), grad_probs(KEYS * QUERIES),
        of_query_t(p.width * QUERIES), of_query(QUERIES * p.width), of_key(p.padded() * p.width),
        of_value(p.padded() * p.width), delta(QUERIES) {}

  void head(int64_t sequence, const Rows& query, const Rows& key, const Rows& value, const Rows& out, const Rows& grad,
            const Rows& to, const Seen& seen, const float* lse, float* of_bias) {
    for (int64_t start = 0; start < p.length; start += QUERIES) {
      const int64_t count = std::min(QUERIES, p.length - start);
      pack_transposed(query, start, count, p.width, QUERIES, query_t.data());
      pack_transposed(grad, start, count, p.width, QUERIES, grad_t.data());
      pack_pairs(query, start, count, p.width, QUERIES, query_pairs.data());
      pack_pairs(grad, start, count, p.width, QUERIES, grad_pairs.data());
      for (int64_t i = 0; i < QUERIES; ++i)
        delta[i] = i < count ? dot(grad.at(start + i), out.at(start + i), p.width) : 0.f;
      float lse_tile[QUERIES] = {};
      for (int64_t i = 0; i < count; ++i) lse_tile[i] = lse[start + i] * LOG2_E;
      const auto [low, high] = seen.of_tile(start, count);
      for (int64_t keys = low; keys < high; keys += KEYS)
        tile(key, value, seen, start, keys, keys != low, lse_tile);
      turn(of_query_t.data(), p.width, QUERIES, of_query.data());
      for (int64_t i = 0; i < count; ++i)
        store_gradient(p, sequence, start + i, true, of_query.data() + i * p.width, to.at(start + i), of_bias);
    }
  }

  void tile(const Rows& key, const Rows& value, const Seen& seen, int64_t start, int64_t keys, bool more,
            const float* lse) {
    const int64_t count = std::min(KEYS, p.length - keys);
    multiply(count, QUERIES, p.width, key.at(keys), key.stride, query_t.data(), QUERIES, scores.data(), QUERIES, false);
    multiply(count, QUERIES, p.width, value.at(keys), value.stride, grad_t.data(), QUERIES, grad_probs.data(), QUERIES,
             false);
    soften(seen, start, keys, count, lse);
    multiply(count, p.width, QUERIES, probs.data(), QUERIES, grad_pairs.data(), p.width,
             of_value.data() + keys * p.width, p.width, true);
    multiply(count, p.width, QUERIES, grad_scores.data(), QUERIES, query_pairs.data(), p.width,
             of_key.data() + keys * p.width, p.width, true);
    multiply(p.width, QUERIES, KEYS, key_turned.data() + keys, p.padded(), score_pairs.data(), QUERIES,
             of_query_t.data(), QUERIES, more);
  }

  // Probabilities and gradients of scores, two keys at a time: the pair is also what the queries' product reads.
  void soften(const Seen& seen, int64_t start, int64_t keys, int64_t count, const float* lse) {
    const __m512 scale = _mm512_set1_ps(p.scale);
    const Vec steep(p.scale * LOG2_E);
    for (int64_t j = 0; j < KEYS; j += 2)
      for (int64_t i = 0; i < QUERIES; i += LANES) {
        const __m512i first = _mm512_loadu_si512(seen.first.data() + start + i);
        const __m512i end = _mm512_loadu_si512(seen.end.data() + start + i);
        __m256i both[2];
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t place = (j + k) * QUERIES + i;
          const __m512i index = _mm512_set1_epi32(static_cast<int32_t>(keys + j + k));
          const __mmask16 kept = j + k < count
              ? _mm512_cmple_epi32_mask(first, index) & _mm512_cmplt_epi32_mask(index, end)
              : 0;
          if (!kept) {
            both[k] = store_bf16(probs.data() + place, _mm512_setzero_ps());
            store_bf16(grad_scores.data() + place, _mm512_setzero_ps());
            continue;
          }
          const Vec power = at::vec::fmsub(Vec::loadu(scores.data() + place), steep, Vec::loadu(lse + i));
          const __m512 prob = _mm512_maskz_mov_ps(kept, power_of_two(power));
          const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(grad_probs.data() + place),
                                               _mm512_loadu_ps(delta.data() + i));
          const __m512 grad = _mm512_maskz_mul_ps(kept, _mm512_mul_ps(prob, scale), centred);
          store_bf16(probs.data() + place, prob);
          both[k] = store_bf16(grad_scores.data() + place, grad);
        }
        store_pairs(score_pairs.data() + j * QUERIES + 2 * i, both[0], both[1]);
      }
  }
};

}  // namespace

extern "C" {

// strides: of sequence, token and head of query, key, value, out.
void lmssl_attention(const int64_t* sizes, float scale, const int64_t* segments, const float* cos, const float* sin,
                     const float* bias, const int64_t* strides, const BF* query, const BF* key, const BF* value,
                     BF* out, float* lse, int32_t threads) {
  const Problem p = problem(sizes, scale, segments, cos, sin, bias);
#pragma omp parallel num_threads(threads)
  {
    Forward forward(p);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.batch * p.groups; ++task) {
      const int64_t row = task / p.groups, group = task % p.groups, times = p.heads / p.groups;
      const int64_t key_at = p.heads + group, value_at = key_at + p.groups;  // among heads of all kinds
      const Seen seen(p, row);
      const Rows keys = prepared(p, row, rows(key, strides + 3, row, group), p.bias_of(key_at), true, forward.keys);
      const Rows values =
          prepared(p, row, rows(value, strides + 6, row, group), p.bias_of(value_at), false, forward.values);
      pack_transposed(keys, 0, p.length, p.width, p.padded(), forward.key_t.data());
      pack_pairs(values, 0, p.length, p.width, p.padded(), forward.value_pairs.data());
      for (int64_t head = group * times; head < (group + 1) * times; ++head)
        forward.head(prepared(p, row, rows(query, strides, row, head), p.bias_of(head), true, forward.queries),
                     rows(out, strides + 9, row, head), seen, lse + (row * p.heads + head) * p.length);
    }
    at::native::cpublas::brgemm_release();
  }
}

// Strides of query, key, value, out, grad, of_query, of_key, of_value. of_bias: [B, (H + 2 G) * D], by sequences, or
// null.
void lmssl_attention_backward(const int64_t* sizes, float scale, const int64_t* segments, const float* cos,
                              const float* sin, const float* bias, const int64_t* strides, const BF* query,
                              const BF* key, const BF* value, const BF* out, const BF* grad, const float* lse,
                              BF* of_query, BF* of_key, BF* of_value, float* of_bias, int32_t threads) {
  const Problem p = problem(sizes, scale, segments, cos, sin, bias);
#pragma omp parallel num_threads(threads)
  {
    Backward backward(p);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.batch * p.groups; ++task) {
      const int64_t row = task / p.groups, group = task % p.groups, times = p.heads / p.groups;
      const int64_t key_at = p.heads + group, value_at = key_at + p.groups;
      const auto sums = [&](int64_t head) {
        if (!of_bias) return of_bias;
        float* found = of_bias + (row * (p.heads + 2 * p.groups) + head) * p.width;
        std::fill_n(found, p.width, 0.f);
        return found;
      };
      const Seen seen(p, row);
      const Rows keys = prepared(p, row, rows(key, strides + 3, row, group), p.bias_of(key_at), true, backward.keys);
      const Rows values =
          prepared(p, row, rows(value, strides + 6, row, group), p.bias_of(value_at), false, backward.values);
      turn_keys(keys, p.length, p.width, p.padded(), backward.key_turned.data());
      backward.of_key.clear();
      backward.of_value.clear();
      for (int64_t head = group * times; head < (group + 1) * times; ++head)
        backward.head(row, prepared(p, row, rows(query, strides, row, head), p.bias_of(head), true, backward.queries),
                      keys, values, rows(out, strides + 9, row, head), rows(grad, strides + 12, row, head),
                      rows(of_query, strides + 15, row, head), seen, lse + (row * p.heads + head) * p.length,
                      sums(head));
      const Rows key_to = rows(of_key, strides + 18, row, group), value_to = rows(of_value, strides + 21, row, group);
      float *of_key_bias = sums(key_at), *of_value_bias = sums(value_at);
      for (int64_t i = 0; i < p.length; ++i) {
        const int64_t place = i * p.width;
        store_gradient(p, row, i, true, backward.of_key.data() + place, key_to.at(i), of_key_bias);
        store_gradient(p, row, i, false, backward.of_value.data() + place, value_to.at(i), of_value_bias);
      }
    }
    at::native::cpublas::brgemm_release();
  }
}
}
