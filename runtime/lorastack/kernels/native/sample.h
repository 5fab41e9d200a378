// Samples: the argmax of logit / T + Gumbel noise over the tokens that the filters leave.
//
// The noise is -log E with E = -log(uniform), which is at least 1 - uniform. So a token beats a score B
// only if 1 - uniform <= e^(logit / T - B): that takes the token's hash and a rough exponential, and the
// few tokens that pass are scored in float64 as the reference does it. Sums of probabilities are float64;
// their order depends on the row alone.
#pragma once

#include <float.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "abi.h"
#include "best.h"

namespace lorastack::LORASTACK_ISA {

constexpr uint64_t TOKEN_STEP = 0x9E3779B97F4A7C15, MULTIPLIER1 = 0xBF58476D1CE4E5B9,
                   MULTIPLIER2 = 0x94D049BB133111EB;

// splitmix64's output at a state.
INLINE uint64_t mix(uint64_t state) {
  state = (state ^ (state >> 30)) * MULTIPLIER1;
  state = (state ^ (state >> 27)) * MULTIPLIER2;
  return state ^ (state >> 31);
}

INLINE Longs mix(Longs state) {
  state = mul(bits_xor(state, shift_right<30>(state)), set_long(MULTIPLIER1));
  state = mul(bits_xor(state, shift_right<27>(state)), set_long(MULTIPLIER2));
  return bits_xor(state, shift_right<31>(state));
}

// 2^52 (1 - uniform) of 8 tokens, half a unit too small or less.
INLINE Longs rest_of(uint64_t start, Longs ids) {
  const Longs bits = mix(add(mul(ids, set_long(TOKEN_STEP)), set_long(start)));
  return shift_right<12>(bits_xor(bits, set_long(UINT64_MAX)));
}

// e^x for x <= 0 to 1e-15, by Taylor's series; 1 at 0, next to nothing below -700.
INLINE Doubles exp(Doubles x) {
  constexpr double INVERSE_FACTORIALS[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
      1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
      1.0 / 6,          1.0 / 2,         1.0,            1.0};
  x = max(x, set_double(-700.0));
  const Doubles n = round(mul(x, set_double(M_LOG2E)));
  Doubles r = fnma(n, set_double(6.93147180369123816490e-01), x);
  r = fnma(n, set_double(1.90821492927058770002e-10), r);
  Doubles p = set_double(0);
#pragma GCC unroll 14
  for (double c : INVERSE_FACTORIALS) p = fma(p, r, set_double(c));
  return scale_by_power(p, n);
}

// Tokens by rising id. ids: null where places are ids.
struct Tokens {
  const float* logits;
  const int32_t* ids;
  int count;

  INLINE_METHOD Ints ids_at(int i, Mask real) const {
    return ids ? load_ints(ids + i, real) : add(lanes(), set(i));
  }
};

// Tokens rank by logit, ties by the lower id.
struct TokenLogit {
  float logit;
  int32_t id;

  bool before(const TokenLogit& other) const {
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
  // Which of 16 tokens rank before this one.
  INLINE_METHOD Mask after(Floats logits, Ints ids, Mask real) const {
    const Floats own = set(logit);
    return real & (greater(logits, own) | (equal(logits, own) & less(ids, set(id))));
  }
};
constexpr TokenLogit BEHIND_ALL = {-INFINITY, INT32_MAX};

// The `num` tokens of a row that rank first.
class TopK {
 public:
  // num: 1 to columns - 1.
  TopK(const float* row, int columns, int num) {
    keep({row, nullptr, columns}, {bound(row, columns, num), INT32_MAX});
    std::vector<float> order = logits_;
    std::nth_element(order.begin(), order.begin() + num - 1, order.end(), std::greater<float>());
    const float cut = order[num - 1];
    int level = num;  // how many tokens at the cut are left
    for (float logit : logits_) level -= logit > cut;
    size_t kept = 0;
    for (size_t i = 0; i < logits_.size(); i++) {
      if (logits_[i] < cut || (logits_[i] == cut && level-- <= 0)) continue;
      logits_[kept] = logits_[i];
      ids_[kept++] = ids_[i];
    }
    logits_.resize(kept);
  }

  Tokens tokens() const { return {logits_.data(), ids_.data(), (int)logits_.size()}; }

 private:
  std::vector<float> logits_;
  std::vector<int32_t> ids_;

  // A bound not above the num-th logit, and mostly close: the num-th of the maxima of many groups.
  static float bound(const float* row, int columns, int num) {
    const int64_t groups = (4 * (int64_t)num + LANES - 1) / LANES * LANES;
    if (groups >= columns) return -INFINITY;
    std::vector<float> maxima(row, row + groups);
    for (int64_t at = groups; at < columns; at += groups)
      for (int i = 0; i < groups && at + i < columns; i += LANES) {
        const Mask real = first((int)(columns - at) - i);
        const Floats largest = load(maxima.data() + i);
        store(maxima.data() + i, select(real, max(largest, load(row + at + i, real)), largest));
      }
    std::nth_element(maxima.begin(), maxima.begin() + num - 1, maxima.end(),
                     std::greater<float>());
    return maxima[num - 1];
  }

  // Keeps the tokens that rank before `last`.
  void keep(const Tokens& tokens, const TokenLogit& last) {
    for (int i = 0; i < tokens.count; i += LANES) {
      const Mask real = first(tokens.count - i);
      const Floats logits = load(tokens.logits + i, real);
      const Ints ids = tokens.ids_at(i, real);
      const Mask kept = last.after(logits, ids, real);
      const size_t size = logits_.size(), count = __builtin_popcount(bits(kept));
      if (!count) continue;
      logits_.resize(size + count);
      ids_.resize(size + count);
      store_compressed(logits_.data() + size, logits, kept);
      store_compressed(ids_.data() + size, ids, kept);
    }
  }
};

class Sampling {
 public:
  // best: the row's first token, of finite logit / T.
  Sampling(const lorastack_sample& sample, const TokenLogit& best)
      : sample_(sample),
        best_(best),
        peak_(best.logit / sample.temperature),
        inverse_(std::min(1 / sample.temperature, DBL_MAX)) {}

  int32_t run(const Tokens& tokens) const {
    const bool limited = sample_.top_p < 1;
    const double total = limited ? weigh(tokens, BEHIND_ALL) : 0, enough = sample_.top_p * total;
    // A token inside top_p's run has more than 1 - top_p at and behind it, shared among at most all
    // tokens, none above its own. Lighter ones need no noise.
    const double share = (1 - sample_.top_p) * total / tokens.count * SLACK;
    const double least = std::max(log(std::max(sample_.min_p, share)), -NOISE_RANGE);
    TokenLogit winner = find(tokens, least, BEHIND_ALL);
    // Such a winner is outside the run, and so is all that ranks behind it.
    while (limited && winner.id != best_.id && weigh(tokens, winner) >= enough)
      winner = find(tokens, least, winner);
    return winner.id;
  }

 private:
  static constexpr double SLACK = 1 - 1e-6;  // for rounding of float64 sums
  static constexpr double NOISE_RANGE = 40.35;  // between the smallest and the largest noise
  static constexpr double UNIT = 0x1p-52;       // of a uniform
  const lorastack_sample& sample_;
  const TokenLogit best_;
  const double peak_, inverse_;

  // The sum of e^(logit / T - peak) of the tokens before `end`.
  double weigh(const Tokens& tokens, const TokenLogit& end) const {
    const Doubles top = set_double(best_.logit), inverse = set_double(inverse_);
    auto weights = [&](Doubles logits) { return exp(mul(sub(logits, top), inverse)); };
    Doubles low = set_double(0), high = set_double(0);
    for (int i = 0; i < tokens.count; i += LANES) {
      const Mask real = first(tokens.count - i);
      const Floats logits = load(tokens.logits + i, real);
      const Mask taken = end.after(logits, tokens.ids_at(i, real), real);
      if (!bits(taken)) continue;
      low = add(low, keep_low(taken, weights(low_doubles(logits))));
      high = add(high, keep_high(taken, weights(high_doubles(logits))));
    }
    return sum(add(low, high));
  }

  // The token with the best score of those that rank before `end`, or else the row's first token.
  TokenLogit find(const Tokens& tokens, double least, const TokenLogit& end) const {
    // Rounding in float32 is far below a thousandth.
    const Floats lowest = set((float)least - 1e-3f);
    const Floats inverse = set((float)std::min(inverse_, (double)FLT_MAX));
    TokenLogit winner = best_;
    double score = score_of(winner);
    Floats bound = bound_of(score);
    for (int i = 0; i < tokens.count; i += LANES) {
      const Mask real = first(tokens.count - i);
      const Floats logits = load(tokens.logits + i, real);
      // Finite, so that any inverse gives a number.
      const Floats x = mul(max(sub(logits, set(best_.logit)), set(-FLT_MAX)), inverse);
      const Mask left = real & at_least(x, lowest);
      if (!bits(left)) continue;
      const Ints ids = tokens.ids_at(i, real);
      const Floats rest = to_floats(rest_of(sample_.start, low_longs(ids)),
                                    rest_of(sample_.start, high_longs(ids)));
      unsigned passed =
          bits(end.after(logits, ids, left) & at_most(rest, mul(exp(x), bound)));
      for (; passed; passed &= passed - 1) {
        const int place = i + __builtin_ctz(passed);
        const TokenLogit token = {tokens.logits[place], tokens.ids ? tokens.ids[place] : place};
        if (std::exp(token.logit / sample_.temperature - peak_) < sample_.min_p) continue;
        const double other = score_of(token);
        if (other < score || (other == score && !token.before(winner))) continue;
        winner = token;
        score = other;
        bound = bound_of(score);
      }
    }
    return winner;
  }

  double score_of(const TokenLogit& token) const {
    const uint64_t bits = mix(sample_.start + token.id * TOKEN_STEP);
    const double uniform = ((double)(bits >> 12) + 0.5) * UNIT;
    return token.logit / sample_.temperature - log(-log(uniform));
  }

  // Times a token's weight it bounds the `rest` with which the token reaches the score.
  Floats bound_of(double score) const {
    return set((float)(std::exp(peak_ - score) * (1 + 1e-3) / UNIT));
  }
};

// The token that a sample takes from its row.
INLINE int64_t sample_of(const float* row, int columns, const lorastack_sample& sample) {
  float value;
  int64_t place;
  best_of(row, columns, &value, &place);
  // Nothing to draw from (NaN or infinite), or the temperature is 0 or next to it.
  if (!isfinite(value / sample.temperature)) return place;
  const Sampling sampling(sample, {value, (int32_t)place});
  if (sample.top_k <= 0 || sample.top_k >= columns) return sampling.run({row, nullptr, columns});
  return sampling.run(TopK(row, columns, sample.top_k).tokens());
}

}  // namespace lorastack::LORASTACK_ISA
