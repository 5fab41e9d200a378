// Samples: the argmax of logit / T + Gumbel noise over the tokens that the filters leave.
//
// The noise is -log E with E = -log(uniform), which is at least 1 - uniform. So a token beats a score B
// only if 1 - uniform <= e^(logit / T - B): that takes the token's hash and a rough exponential, and the
// few tokens that pass are scored in float64 as the reference does it. Sums of probabilities are float64;
// their order depends on the row alone.
#pragma once

#include <float.h>
#include <math.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "best.h"
#include "abi.h"

namespace lorastack::LORASTACK_ISA {

constexpr uint64_t TOKEN_STEP = 0x9E3779B97F4A7C15, MULTIPLIER1 = 0xBF58476D1CE4E5B9,
                   MULTIPLIER2 = 0x94D049BB133111EB;

// splitmix64's output at a state.
INLINE uint64_t mix(uint64_t state) {
  state = (state ^ (state >> 30)) * MULTIPLIER1;
  state = (state ^ (state >> 27)) * MULTIPLIER2;
  return state ^ (state >> 31);
}

INLINE __m512i mix_512(__m512i state) {
  state = _mm512_xor_si512(state, _mm512_srli_epi64(state, 30));
  state = _mm512_mullo_epi64(state, _mm512_set1_epi64((int64_t)MULTIPLIER1));
  state = _mm512_xor_si512(state, _mm512_srli_epi64(state, 27));
  state = _mm512_mullo_epi64(state, _mm512_set1_epi64((int64_t)MULTIPLIER2));
  return _mm512_xor_si512(state, _mm512_srli_epi64(state, 31));
}

// 2^52 (1 - uniform) of 8 tokens, half a unit too small or less.
INLINE __m256 rest_256(uint64_t start, __m256i ids) {
  const __m512i steps =
      _mm512_mullo_epi64(_mm512_cvtepi32_epi64(ids), _mm512_set1_epi64((int64_t)TOKEN_STEP));
  const __m512i bits = mix_512(_mm512_add_epi64(steps, _mm512_set1_epi64((int64_t)start)));
  const __m512i inverted = _mm512_xor_si512(bits, _mm512_set1_epi64(-1));
  return _mm512_cvtepi64_ps(_mm512_srli_epi64(inverted, 12));
}

// e^x for x <= 0 to 1e-15, by Taylor's series; 1 at 0, next to nothing below -700.
INLINE __m512d exp_512(__m512d x) {
  constexpr double INVERSE_FACTORIALS[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
      1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
      1.0 / 6,          1.0 / 2,         1.0,            1.0};
  x = _mm512_max_pd(x, _mm512_set1_pd(-700.0));
  const __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(M_LOG2E)), 0);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(6.93147180369123816490e-01), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(1.90821492927058770002e-10), r);
  __m512d p = _mm512_setzero_pd();
#pragma GCC unroll 14
  for (double c : INVERSE_FACTORIALS) p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(c));
  return _mm512_scalef_pd(p, n);
}

// Tokens by rising id. ids: null where places are ids.
struct Tokens {
  const float* logits;
  const int32_t* ids;
  int count;

  INLINE_METHOD __m512i ids_at(int i, __mmask16 real) const {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return ids ? _mm512_maskz_loadu_epi32(real, ids + i)
               : _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
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
  INLINE_METHOD __mmask16 after(__m512 logits, __m512i ids, __mmask16 real) const {
    const __m512 own = _mm512_set1_ps(logit);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(real, logits, own, _CMP_GT_OQ);
    const __mmask16 level = _mm512_mask_cmp_ps_mask(real, logits, own, _CMP_EQ_OQ);
    return above | _mm512_mask_cmplt_epi32_mask(level, ids, _mm512_set1_epi32(id));
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
        const __mmask16 real = first((int)(columns - at) - i);
        float* const largest = maxima.data() + i;
        const __m512 logits = _mm512_maskz_loadu_ps(real, row + at + i);
        _mm512_storeu_ps(largest, _mm512_mask_max_ps(_mm512_loadu_ps(largest), real,
                                                     _mm512_loadu_ps(largest), logits));
      }
    std::nth_element(maxima.begin(), maxima.begin() + num - 1, maxima.end(),
                     std::greater<float>());
    return maxima[num - 1];
  }

  // Keeps the tokens that rank before `last`.
  void keep(const Tokens& tokens, const TokenLogit& last) {
    for (int i = 0; i < tokens.count; i += LANES) {
      const __mmask16 real = first(tokens.count - i);
      const __m512 logits = _mm512_maskz_loadu_ps(real, tokens.logits + i);
      const __m512i ids = tokens.ids_at(i, real);
      const __mmask16 kept = last.after(logits, ids, real);
      if (!kept) continue;
      const size_t size = logits_.size(), count = __builtin_popcount(kept);
      logits_.resize(size + count);
      ids_.resize(size + count);
      _mm512_mask_compressstoreu_ps(logits_.data() + size, kept, logits);
      _mm512_mask_compressstoreu_epi32(ids_.data() + size, kept, ids);
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
    const __m512d top = _mm512_set1_pd(best_.logit), inverse = _mm512_set1_pd(inverse_);
    auto weights = [&](__m256 logits) {
      return exp_512(_mm512_mul_pd(_mm512_sub_pd(_mm512_cvtps_pd(logits), top), inverse));
    };
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int i = 0; i < tokens.count; i += LANES) {
      const __mmask16 real = first(tokens.count - i);
      const __m512 logits = _mm512_maskz_loadu_ps(real, tokens.logits + i);
      const __mmask16 taken = end.after(logits, tokens.ids_at(i, real), real);
      if (!taken) continue;
      low = _mm512_mask_add_pd(low, taken, low, weights(_mm512_castps512_ps256(logits)));
      high = _mm512_mask_add_pd(high, taken >> 8, high,
                                weights(_mm512_extractf32x8_ps(logits, 1)));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }

  // The token with the best score of those that rank before `end`, or else the row's first token.
  TokenLogit find(const Tokens& tokens, double least, const TokenLogit& end) const {
    // Rounding in float32 is far below a thousandth.
    const __m512 lowest = _mm512_set1_ps((float)least - 1e-3f);
    const __m512 inverse = _mm512_set1_ps((float)std::min(inverse_, (double)FLT_MAX));
    TokenLogit winner = best_;
    double score = score_of(winner);
    __m512 bound = bound_of(score);
    for (int i = 0; i < tokens.count; i += LANES) {
      const __mmask16 real = first(tokens.count - i);
      const __m512 logits = _mm512_maskz_loadu_ps(real, tokens.logits + i);
      __m512 x = _mm512_sub_ps(logits, _mm512_set1_ps(best_.logit));
      // Finite, so that any inverse gives a number.
      x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-FLT_MAX)), inverse);
      const __mmask16 left = _mm512_mask_cmp_ps_mask(real, x, lowest, _CMP_GE_OQ);
      if (!left) continue;
      const __m512i ids = tokens.ids_at(i, real);
      const __m512 rest = _mm512_insertf32x8(
          _mm512_castps256_ps512(rest_256(sample_.start, _mm512_castsi512_si256(ids))),
          rest_256(sample_.start, _mm512_extracti32x8_epi32(ids, 1)), 1);
      unsigned passed = _mm512_mask_cmp_ps_mask(end.after(logits, ids, left), rest,
                                                _mm512_mul_ps(exp_512(x), bound), _CMP_LE_OQ);
      for (; passed; passed &= passed - 1) {
        const int place = i + __builtin_ctz(passed);
        const TokenLogit token = {tokens.logits[place], tokens.ids ? tokens.ids[place] : place};
        if (exp(token.logit / sample_.temperature - peak_) < sample_.min_p) continue;
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
  __m512 bound_of(double score) const {
    return _mm512_set1_ps((float)(exp(peak_ - score) * (1 + 1e-3) / UNIT));
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
