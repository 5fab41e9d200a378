// The best of a row of logits, and their log-probabilities.
#pragma once

#include <cmath>
#include <vector>

#include "vector.h"

namespace lorastack::LORASTACK_ISA {

// One of a head's best outputs. value: its logit; place: its row of the output matrix.
struct TopToken {
  float value = -INFINITY;
  int32_t place = INT32_MAX;

  bool before(const TopToken& other) const {
    return value > other.value || (value == other.value && place < other.place);
  }
};

// Inserts a token into the `num` best; tokens may come in any order.
INLINE void offer(TopToken* best, int num, TopToken token) {
  if (!token.before(best[num - 1])) return;
  int at = num - 1;
  for (; at > 0 && token.before(best[at - 1]); at--) best[at] = best[at - 1];
  best[at] = token;
}

// e^(logit - peak) to 3e-6; NaN for a logit that is not finite. peak: not below a finite logit.
INLINE Floats share_of(Floats logit, Floats peak) {
  const Floats x = mul(sub(logit, peak), set(1.44269504f));
  const Floats n = floor(x);
  const Floats f = sub(x, n);  // NaN for minus infinity
  Floats p = set(0.0135341659f);  // 2^f on [0, 1], of least relative error
  p = fma(p, f, set(0.0520114712f));
  p = fma(p, f, set(0.241442740f));
  p = fma(p, f, set(0.693003833f));
  p = fma(p, f, set(1.00000262f));
  // Minus infinity would make NaN 0, and a result below 2^-126 costs a hundred cycles.
  return scale_by_power(p, max(n, set(-126.0f)));
}

// The `num` best of a row of logits and their log-probabilities, see abi.h. ids: of the columns, or
// null.
INLINE void top_of(const float* row, int columns, int num, const int64_t* ids, int64_t* out,
                   float* logprobs) {
  std::vector<TopToken> best(num);
  for (int i = 0; i < columns; i += LANES) {
    const Mask real = first(columns - i);
    const Floats logits = max(load(row + i, real), set(-INFINITY));  // instead of NaN
    unsigned better = bits(real & at_least(logits, set(best[num - 1].value)));
    if (!better) continue;
    alignas(64) float lane_logits[LANES];
    store(lane_logits, logits);
    for (; better; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      offer(best.data(), num, {lane_logits[lane], i + lane});
    }
  }
  const Floats peak = set(best[0].value);
  Floats total = zero();
  for (int i = 0; i < columns; i += LANES) {
    const Mask real = first(columns - i);
    total = select(real, add(total, share_of(load(row + i, real), peak)), total);
  }
  const float log_total = std::log(sum(total));
  for (int i = 0; i < num; i++) {
    const TopToken& token = best[i].place == INT32_MAX ? best[0] : best[i];
    out[i] = ids ? ids[token.place] : token.place;
    logprobs[i] = token.value - best[0].value - log_total;
  }
}

}  // namespace lorastack::LORASTACK_ISA
