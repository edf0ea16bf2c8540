// Attention within documents, forward and backward, tile by tile.
//
// A tile of queries meets the tiles of keys that one of its queries may see, so that what packed documents do not
// share costs nothing and no mask exists. Scores and sums are float32; operands of products have the type S of tokens,
// float32 or bfloat16. In the backward pass tiles are held as keys x queries: then probabilities and their gradients
// are the left sides of the products for values and keys as they are, and nothing is transposed but a tile's queries.
//
// B sequences, H heads of queries, G of keys and values, T tokens, D width of a head.
#include <cmath>
#include <cstdint>
#include <limits>

#include "tiles.h"

namespace {

using namespace lmssl;

// Of a tile, multiples of 16. Of bfloat16 it is large, for AMX is quick and what surrounds a product is not; of float32
// the product itself is what takes time, and small tiles multiply less that no query sees.
template <typename S>
constexpr int64_t QUERIES = std::is_same_v<S, float> ? 64 : 128;
template <typename S>
constexpr int64_t KEYS = std::is_same_v<S, float> ? 64 : 128;

struct Problem {
  int64_t batch, heads, groups, length, width, window;
  bool causal;
  float scale;
  const int64_t* segments;  // [B, T], or null: a sequence is one document
  const float* cos;         // of rotary positions, [B or 1, T, D], or null: queries and keys are not rotated
  const float* sin;
  const float* bias;        // of queries of all heads, then keys, then values, or null
  int64_t rotation_stride;  // of sequences; 0: all have the same

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
template <typename S>
Rows<S> prepared(const Problem& p, int64_t sequence, const Rows<S>& from, const float* bias, bool turns,
                 Buffer<S>& room) {
  turns = turns && p.cos;
  if (!turns && !bias) return from;
  const int64_t half = p.width / 2;
  for (int64_t i = 0; i < p.length; ++i)
    for (int64_t d = 0; d < half; d += LANES) {
      _mm_prefetch(from.at(i + AHEAD) + 2 * d, _MM_HINT_T0);
      Vec first = load(from.at(i) + d), second = load(from.at(i) + d + half);
      if (bias) {
        first = first + Vec::loadu(bias + d);
        second = second + Vec::loadu(bias + d + half);
      }
      if (turns) rotate<false>(p, sequence, i, first, second, d);
      store(room.data() + i * p.width + d, first);
      store(room.data() + i * p.width + d + half, second);
    }
  return {room.data(), p.width};
}

// The gradient of a token from that of what it was rotated to, which is overwritten; added to the bias's, if any.
template <typename S>
void store_gradient(const Problem& p, int64_t sequence, int64_t position, bool turns, float* from, S* to,
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

// Queries and keys of a tile, counted from its first.
struct Part {
  int64_t query, end_query, key, end_key;
};

// Which keys each query of a sequence sees, [first, end), none for what fills the last tile of queries.
template <typename S>
struct Seen {
  std::vector<int32_t> first, end;

  Seen(const Problem& p, int64_t row) : first(round_up(p.length, QUERIES<S>)), end(first.size()) {
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

  // The keys that queries [from, from + count) meet.
  std::pair<int64_t, int64_t> keys_of(int64_t from, int64_t count) const {
    return {*std::min_element(first.begin() + from, first.begin() + from + count),
            *std::max_element(end.begin() + from, end.begin() + from + count)};
  }

  // Queries that see a key of a tile, and the keys that they see; all in bfloat16, for oneDNN writes code by shapes.
  Part part_of(int64_t start, int64_t count, int64_t keys) const {
    if constexpr (!std::is_same_v<S, float>) return {0, count, 0, KEYS<S>};
    int64_t from = 0, to = count;
    const auto meets = [&](int64_t i) { return first[start + i] < keys + KEYS<S> && end[start + i] > keys; };
    while (from < to && !meets(from)) ++from;
    while (from < to && !meets(to - 1)) --to;
    if (from == to) return {};
    const auto [low, high] = keys_of(start + from, to - from);
    return {from, to, std::max<int64_t>(low - keys, 0), std::min<int64_t>(high - keys, KEYS<S>)};
  }
};

// Probabilities of a row of scores, unnormalised, for keys [from, to) of the tile; rescales what was summed before.
template <typename S>
void soften(const float* scores, S* powers, float* out, int64_t width, int64_t from, int64_t to, float scale,
            float& top, float& total) {
  const int64_t begin = from / LANES * LANES, end = round_up(to, LANES);
  const Vec least(-std::numeric_limits<float>::infinity());
  Vec high = least;
  for (int64_t j = begin; j < end; j += LANES)
    high = larger(high, choose(lanes(j, from, to), load(scores + j), least));
  const float found = std::max(top, largest(high) * scale);
  const float before = top == found ? 1.f : std::exp(top - found);
  const Vec steep(scale * LOG2_E), level(-found * LOG2_E);
  Vec part(0.f);
  std::fill_n(powers, begin, S(0.f));
  for (int64_t j = begin; j < end; j += LANES) {
    const Vec power = keep(lanes(j, from, to), power_of_two(at::vec::fmadd(load(scores + j), steep, level)));
    part = part + power;
    store(powers + j, power);
  }
  std::fill_n(powers + end, KEYS<S> - end, S(0.f));
  if (before != 1.f)
    for (int64_t d = 0; d < width; ++d) out[d] *= before;
  total = total * before + sum(part);
  top = found;
}

template <typename S>
struct Forward {
  static constexpr int64_t QUERIES = ::QUERIES<S>, KEYS = ::KEYS<S>;
  const Problem& p;
  Buffer<S> queries, keys, values, key_t, value_rows, powers;
  Buffer<float> scores, out;

  explicit Forward(const Problem& p)
      : p(p), queries(p.length * p.width), keys(p.length * p.width), values(p.length * p.width),
        key_t(round_up(p.length, KEYS) * p.width), value_rows(round_up(p.length, KEYS) * p.width),
        powers(QUERIES * KEYS), scores(QUERIES * KEYS), out(QUERIES * p.width) {}

  // Right sides of products, a tile of keys after the other.
  void pack(const Rows<S>& key, const Rows<S>& value) {
    for (int64_t start = 0; start < p.length; start += KEYS) {
      const int64_t count = std::min(KEYS, p.length - start);
      pack_transposed(key, start, count, p.width, KEYS, key_t.data() + start * p.width);
      pack_rows(value, start, count, p.width, KEYS, value_rows.data() + start * p.width);
    }
  }

  void head(const Rows<S>& query, const Rows<S>& to, const Seen<S>& seen, float* lse) {
    for (int64_t start = 0; start < p.length; start += QUERIES)
      tile(query, to, seen, start, std::min(QUERIES, p.length - start), lse);
  }

  void tile(const Rows<S>& query, const Rows<S>& to, const Seen<S>& seen, int64_t start, int64_t count, float* lse) {
    float top[QUERIES], total[QUERIES] = {};
    std::fill_n(top, QUERIES, -std::numeric_limits<float>::infinity());
    std::fill_n(out.data(), count * p.width, 0.f);
    const auto [low, high] = seen.keys_of(start, count);
    for (int64_t keys = low / KEYS * KEYS; keys < high; keys += KEYS) {
      const Part part = seen.part_of(start, count, keys);
      const int64_t asked = part.end_query - part.query, place = part.query * KEYS, column = part.key / 16 * 16;
      multiply(asked, round_up(part.end_key - column, 16), p.width, query.at(start + part.query), query.stride,
               key_t.data() + keys * p.width + column, KEYS, scores.data() + place + column, KEYS, false);
      for (int64_t i = part.query; i < part.end_query; ++i) {
        const int64_t from = std::max<int64_t>(seen.first[start + i] - keys, 0);
        const int64_t to_key = std::min<int64_t>(seen.end[start + i] - keys, KEYS);
        S* row = powers.data() + i * KEYS;
        float* sums = out.data() + i * p.width;
        if (from >= to_key)
          std::fill_n(row, KEYS, S(0.f));
        else
          soften(scores.data() + i * KEYS, row, sums, p.width, from, to_key, p.scale, top[i], total[i]);
      }
      multiply(asked, p.width, part.end_key - part.key, powers.data() + place + part.key, KEYS,
               value_rows.data() + (keys + part.key) * p.width, p.width, out.data() + part.query * p.width, p.width,
               true);
    }
    for (int64_t i = 0; i < count; ++i) {
      lse[start + i] = top[i] + std::log(total[i]);
      const Vec share(1.f / total[i]);
      for (int64_t d = 0; d < p.width; d += LANES)
        store(to.at(start + i) + d, load(out.data() + i * p.width + d) * share);
    }
  }
};

template <typename S>
struct Backward {
  static constexpr int64_t QUERIES = ::QUERIES<S>, KEYS = ::KEYS<S>;
  static constexpr bool PAIRS = !std::is_same_v<S, float>;  // whether a right side is another than its rows
  const Problem& p;
  Buffer<S> queries, keys, values, key_turned, query_t, grad_t, query_rows, grad_rows, probs, grad_scores, score_pairs;
  Buffer<float> scores, grad_probs, of_query_t, of_query, of_key, of_value, delta;

  explicit Backward(const Problem& p)
      : p(p), queries(p.length * p.width), keys(p.length * p.width), values(p.length * p.width),
        key_turned(round_up(p.length, KEYS) * p.width), query_t(p.width * QUERIES), grad_t(p.width * QUERIES),
        query_rows(QUERIES * p.width), grad_rows(QUERIES * p.width), probs(KEYS * QUERIES), grad_scores(KEYS * QUERIES),
        score_pairs(PAIRS ? KEYS * QUERIES : 0), scores(KEYS * QUERIES), grad_probs(KEYS * QUERIES),
        of_query_t(p.width * QUERIES), of_query(QUERIES * p.width), of_key(round_up(p.length, KEYS) * p.width),
        of_value(round_up(p.length, KEYS) * p.width), delta(QUERIES) {}

  // Keys as left sides of products over them, a tile after the other.
  void pack(const Rows<S>& key) {
    for (int64_t start = 0; start < p.length; start += KEYS)
      pack_turned(key, start, std::min(KEYS, p.length - start), p.width, KEYS, key_turned.data() + start * p.width);
  }

  void head(int64_t sequence, const Rows<S>& query, const Rows<S>& key, const Rows<S>& value, const Rows<S>& out,
            const Rows<S>& grad, const Rows<S>& to, const Seen<S>& seen, const float* lse, float* of_bias) {
    for (int64_t start = 0; start < p.length; start += QUERIES) {
      const int64_t count = std::min(QUERIES, p.length - start);
      pack_transposed(query, start, count, p.width, QUERIES, query_t.data());
      pack_transposed(grad, start, count, p.width, QUERIES, grad_t.data());
      pack_rows(query, start, count, p.width, QUERIES, query_rows.data());
      pack_rows(grad, start, count, p.width, QUERIES, grad_rows.data());
      for (int64_t i = 0; i < QUERIES; ++i)
        delta[i] = i < count ? dot(grad.at(start + i), out.at(start + i), p.width) : 0.f;
      float lse_tile[QUERIES] = {};
      for (int64_t i = 0; i < count; ++i) lse_tile[i] = lse[start + i] * LOG2_E;
      of_query_t.clear();
      const auto [low, high] = seen.keys_of(start, count);
      for (int64_t keys = low / KEYS * KEYS; keys < high; keys += KEYS)
        tile(key, value, seen, start, keys, seen.part_of(start, count, keys), lse_tile);
      turn(of_query_t.data(), p.width, QUERIES, of_query.data());
      for (int64_t i = 0; i < count; ++i)
        store_gradient(p, sequence, start + i, true, of_query.data() + i * p.width, to.at(start + i), of_bias);
    }
  }

  void tile(const Rows<S>& key, const Rows<S>& value, const Seen<S>& seen, int64_t start, int64_t keys, Part part,
            const float* lse) {
    const int64_t count = std::min(part.end_key, p.length - keys) - part.key, first = keys + part.key;
    const int64_t column = part.query / 16 * 16, asked = round_up(part.end_query - column, PAIRS ? QUERIES : 16);
    const int64_t place = part.key * QUERIES + column;
    multiply(count, asked, p.width, key.at(first), key.stride, query_t.data() + column, QUERIES, scores.data() + place,
             QUERIES, false);
    multiply(count, asked, p.width, value.at(first), value.stride, grad_t.data() + column, QUERIES,
             grad_probs.data() + place, QUERIES, false);
    soften(seen, start, keys, part, column, column + asked, lse);
    multiply(count, p.width, asked, probs.data() + place, QUERIES, grad_rows.data() + column * p.width, p.width,
             of_value.data() + first * p.width, p.width, true);
    multiply(count, p.width, asked, grad_scores.data() + place, QUERIES, query_rows.data() + column * p.width, p.width,
             of_key.data() + first * p.width, p.width, true);
    const S* of_scores = PAIRS ? score_pairs.data() : grad_scores.data() + place;
    multiply(p.width, asked, PAIRS ? KEYS : count, key_turned.data() + keys * p.width + part.key, KEYS, of_scores,
             QUERIES, of_query_t.data() + column, QUERIES, true);
  }

  // Probabilities and gradients of scores; two keys at a time where the queries' product reads pairs.
  void soften(const Seen<S>& seen, int64_t start, int64_t keys, Part part, int64_t column, int64_t end,
              const float* lse) {
    constexpr int64_t TIMES = PAIRS ? 2 : 1;
    const Vec scale(p.scale), steep(p.scale * LOG2_E);
    for (int64_t j = part.key; j < part.end_key; j += TIMES)
      for (int64_t i = column; i < end; i += LANES) {
        Vec found[TIMES];
        for (int64_t k = 0; k < TIMES; ++k) {
          const int64_t place = (j + k) * QUERIES + i, query = start + i;
          const Lanes kept = around(seen.first.data() + query, seen.end.data() + query, keys + j + k);
          Vec prob(0.f);
          found[k] = Vec(0.f);
          if (!none(kept)) {
            const Vec power = at::vec::fmsub(load(scores.data() + place), steep, load(lse + i));
            prob = keep(kept, power_of_two(power));
            const Vec centred = load(grad_probs.data() + place) - load(delta.data() + i);
            found[k] = keep(kept, prob * scale * centred);
          }
          store(probs.data() + place, prob);
          store(grad_scores.data() + place, found[k]);
        }
        if constexpr (PAIRS) store_pairs(score_pairs.data() + j * QUERIES + 2 * i, found[0], found[1]);
      }
  }
};

template <typename S>
void attend(const Problem& p, const int64_t* strides, const S* query, const S* key, const S* value, S* out, float* lse,
            int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Forward<S> forward(p);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.batch * p.groups; ++task) {
      const int64_t row = task / p.groups, group = task % p.groups, times = p.heads / p.groups;
      const int64_t key_at = p.heads + group, value_at = key_at + p.groups;  // among heads of all kinds
      const Seen<S> seen(p, row);
      forward.pack(prepared(p, row, rows(key, strides + 3, row, group), p.bias_of(key_at), true, forward.keys),
                   prepared(p, row, rows(value, strides + 6, row, group), p.bias_of(value_at), false, forward.values));
      for (int64_t head = group * times; head < (group + 1) * times; ++head)
        forward.head(prepared(p, row, rows(query, strides, row, head), p.bias_of(head), true, forward.queries),
                     rows(out, strides + 9, row, head), seen, lse + (row * p.heads + head) * p.length);
    }
    release(query);
  }
}

template <typename S>
void find_gradients(const Problem& p, const int64_t* strides, const S* query, const S* key, const S* value,
                    const S* out, const S* grad, const float* lse, S* of_query, S* of_key, S* of_value, float* of_bias,
                    int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Backward<S> backward(p);
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
      const Seen<S> seen(p, row);
      const Rows<S> keys = prepared(p, row, rows(key, strides + 3, row, group), p.bias_of(key_at), true, backward.keys);
      const Rows<S> values =
          prepared(p, row, rows(value, strides + 6, row, group), p.bias_of(value_at), false, backward.values);
      backward.pack(keys);
      backward.of_key.clear();
      backward.of_value.clear();
      for (int64_t head = group * times; head < (group + 1) * times; ++head)
        backward.head(row, prepared(p, row, rows(query, strides, row, head), p.bias_of(head), true, backward.queries),
                      keys, values, rows(out, strides + 9, row, head), rows(grad, strides + 12, row, head),
                      rows(of_query, strides + 15, row, head), seen, lse + (row * p.heads + head) * p.length,
                      sums(head));
      const auto key_to = rows(of_key, strides + 18, row, group), value_to = rows(of_value, strides + 21, row, group);
      float *of_key_bias = sums(key_at), *of_value_bias = sums(value_at);
      for (int64_t i = 0; i < p.length; ++i) {
        const int64_t place = i * p.width;
        store_gradient(p, row, i, true, backward.of_key.data() + place, key_to.at(i), of_key_bias);
        store_gradient(p, row, i, false, backward.of_value.data() + place, value_to.at(i), of_value_bias);
      }
    }
    release(query);
  }
}

}  // namespace

// Attention's strides: of sequence, token and head of query, key, value, out; its gradients' of query, key, value, out,
// grad, of_query, of_key, of_value. of_bias: [B, (H + 2 G) * D], by sequences, or null.
#define LMSSL_ATTENTION(NAME, S)                                                                                      \
  void lmssl_attention_##NAME(const int64_t* sizes, float scale, const int64_t* segments, const float* cos,           \
                              const float* sin, const float* bias, const int64_t* strides, const S* query,            \
                              const S* key, const S* value, S* out, float* lse, int32_t threads) {                    \
    attend(problem(sizes, scale, segments, cos, sin, bias), strides, query, key, value, out, lse, threads);           \
  }                                                                                                                   \
  void lmssl_attention_backward_##NAME(const int64_t* sizes, float scale, const int64_t* segments, const float* cos,  \
                                       const float* sin, const float* bias, const int64_t* strides, const S* query,   \
                                       const S* key, const S* value, const S* out, const S* grad, const float* lse,   \
                                       S* of_query, S* of_key, S* of_value, float* of_bias, int32_t threads) {        \
    find_gradients(problem(sizes, scale, segments, cos, sin, bias), strides, query, key, value, out, grad, lse,       \
                   of_query, of_key, of_value, of_bias, threads);                                                     \
  }

extern "C" {
LMSSL_ATTENTION(float32, float)
#if defined(LMSSL_BFLOAT16)
LMSSL_ATTENTION(bfloat16, BF)
#endif
}
