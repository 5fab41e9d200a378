// Attention over paged KV for one row and one key-value head.
//
// Positions are taken in logical order, whatever the step, the chunk or the tree around them: a query's
// bits depend on its own past alone. A query sees the slots of a linear prefix (slot s holds position
// s) and, in a tree, its own ancestors behind it.
#pragma once

#include <math.h>

#include <algorithm>

#include "vector.h"

namespace lorastack::LORASTACK_ISA {

constexpr int MAX_HEAD_DIM = 256;
constexpr float MASKED = -INFINITY;

// A row's KV. slots[s]: element offset of the keys of logical slot s, of the first kv head.
template <class T>
struct RowCache {
  const T* data;         // of the layer
  const int64_t* slots;  // [num_slots]
  int64_t value_offset;  // from keys to values
};

// One query: its head's vector, where its output goes, and what it sees.
template <class X>
struct Query {
  const X* q;
  X* out;
  int linear;       // positions 0..linear - 1 are slots 0..linear - 1
  int first;        // positions before it are outside the window
  int num_tail;     // ancestors behind the linear prefix, itself last
  const int* tail;  // their logical slots, by position

  int length() const { return linear + num_tail; }
};

// Calls work(std::integral_constant<int, count>) for a count of 1 to MAX.
template <int MAX, class Work>
INLINE void with_count(int count, Work&& work) {
  if constexpr (MAX > 1)
    if (count < MAX) return with_count<MAX - 1>(count, work);
  work(std::integral_constant<int, MAX>{});
}

// Queries of one row and kv head, COUNT of them, that share each pass over keys and values.
template <class Isa, int COUNT>
class Pass {
  using E = typename Isa::E;
  using A = typename Isa::A;
  using T = typename E::T;
  using X = typename A::T;

 public:
  // scratch: COUNT rows of `capacity` floats, a multiple of 32 above every query's length.
  Pass(const Query<X>* queries, const RowCache<T>& kv, int size, float* scratch, int capacity)
      : queries_(queries), kv_(kv), size_(size) {
    for (int g = 0; g < COUNT; g++) {
      scores_[g] = scratch + (size_t)g * capacity;
      begin_ = std::min(begin_, queries[g].first / LANES * LANES);
      linear_ = std::max(linear_, queries[g].linear);
      all_from_ = std::max(all_from_, queries[g].first);
      all_to_ = std::min(all_to_, queries[g].linear);
    }
  }

  void run(float scale) {
    for (int at = begin_; at < linear_; at += LANES) {
      Floats scores[COUNT];
      score<COUNT>(queries_, kv_.slots + at, std::min(linear_ - at, LANES), scores);
      for (int g = 0; g < COUNT; g++) store(scores_[g] + at, scores[g]);
    }
    for (int g = 0; g < COUNT; g++) {
      score_tail(queries_[g], scores_[g]);
      norms_[g] = weigh(queries_[g], scores_[g], scale);
    }
    constexpr int PARTS = Isa::VALUE_PARTS;
    int d = 0;
    for (; size_ - d >= PARTS * LANES; d += PARTS * LANES) add_values<PARTS>(d);
    for (; d < size_; d += LANES) add_values<1>(d);
  }

 private:
  const Query<X>* queries_;
  const RowCache<T>& kv_;
  const int size_;
  int begin_ = INT32_MAX, linear_ = 0;  // of any query
  int all_from_ = 0, all_to_ = INT32_MAX;  // slots that all queries see
  float* scores_[COUNT];
  float norms_[COUNT];

  // Products of NUM queries with the keys of up to 16 slots.
  template <int NUM>
  INLINE_METHOD void score(const Query<X>* queries, const int64_t* slots, int count,
                           Floats (&scores)[NUM]) const {
    constexpr int DIMS = Isa::DIMS;
    const int whole = size_ / DIMS * DIMS;
    Floats dots[NUM][LANES];
    for (int i = 0; i < LANES; i++) {
      Floats sums[NUM];
      for (int g = 0; g < NUM; g++) sums[g] = zero();
      if (i < count) {
        const T* key = kv_.data + slots[i];
        for (int d = 0; d < whole; d += DIMS) {
          const auto dims = Isa::load_weights(key + d);
          for (int g = 0; g < NUM; g++)
            sums[g] = Isa::dot(Isa::load_activations(queries[g].q + d), dims, sums[g]);
        }
        if (whole < size_) {
          const auto dims = Isa::load_weights(key + whole, size_ - whole);
          for (int g = 0; g < NUM; g++)
            sums[g] = Isa::dot(Isa::load_activations(queries[g].q + whole, size_ - whole), dims,
                               sums[g]);
        }
      }
      for (int g = 0; g < NUM; g++) dots[g][i] = sums[g];
    }
    for (int g = 0; g < NUM; g++) scores[g] = sums_16(dots[g]);
  }

  INLINE_METHOD void score_tail(const Query<X>& query, float* scores) const {
    for (int t = 0; t < query.num_tail; t += LANES) {
      const int count = std::min(query.num_tail - t, LANES);
      int64_t slots[LANES];
      for (int i = 0; i < count; i++) slots[i] = kv_.slots[query.tail[t + i]];
      Floats found[1];
      score<1>(&query, slots, count, found);
      store(scores + query.linear + t, found[0], LORASTACK_ISA::first(count));
    }
  }

  // Replaces a query's scores by softmax weights and returns one over their sum.
  INLINE_METHOD float weigh(const Query<X>& query, float* scores, float scale) const {
    const int start = query.first / LANES * LANES, length = query.length();
    Floats peak = set(MASKED);
    for (int at = start; at < length; at += LANES) {
      Floats all = mul(load(scores + at), set(scale));
      if (at < query.first || at + LANES > length) {
        all = select(LORASTACK_ISA::first(length - at), all, set(MASKED));
        all = select(LORASTACK_ISA::first(query.first - at), set(MASKED), all);
      }
      store(scores + at, all);
      peak = max(peak, all);
    }
    const Floats top = set(largest(peak));
    Floats total = zero();
    for (int at = start; at < length; at += LANES) {
      const Floats weights = exp(sub(load(scores + at), top));
      store(scores + at, weights);
      total = add(total, weights);
    }
    return 1.0f / sum(total);
  }

  // Outputs of PARTS times 16 dimensions from d on; of the last part, those that there are.
  template <int PARTS>
  INLINE_METHOD void add_values(int d) const {
    const int left = size_ - d;
    Floats sums[COUNT][PARTS];
    for (int g = 0; g < COUNT; g++)
      for (int i = 0; i < PARTS; i++) sums[g][i] = zero();
    for (int at = begin_; at < linear_; at++) {
      Floats values[PARTS];
      load_values<PARTS>(kv_.slots[at], d, left, values);
      const bool all = at >= all_from_ && at < all_to_;
      for (int g = 0; g < COUNT; g++) {
        if (!all && (at < queries_[g].first || at >= queries_[g].linear)) continue;
        const Floats weight = set(scores_[g][at]);
        for (int i = 0; i < PARTS; i++) sums[g][i] = fma(weight, values[i], sums[g][i]);
      }
    }
    for (int g = 0; g < COUNT; g++) {
      const Query<X>& query = queries_[g];
      for (int t = std::max(0, query.first - query.linear); t < query.num_tail; t++) {
        Floats values[PARTS];
        load_values<PARTS>(kv_.slots[query.tail[t]], d, left, values);
        const Floats weight = set(scores_[g][query.linear + t]);
        for (int i = 0; i < PARTS; i++) sums[g][i] = fma(weight, values[i], sums[g][i]);
      }
      for (int i = 0; i < PARTS; i++) {
        X* const out = query.out + d + i * LANES;
        const Floats mean = mul(sums[g][i], set(norms_[g]));
        if (left >= PARTS * LANES)
          A::store(out, mean);
        else
          A::store(out, mean, LORASTACK_ISA::first(left));
      }
    }
  }

  template <int PARTS>
  INLINE_METHOD void load_values(int64_t slot, int d, int left, Floats (&values)[PARTS]) const {
    const T* v = kv_.data + slot + kv_.value_offset + d;
    if (left >= PARTS * LANES)
      for (int i = 0; i < PARTS; i++) values[i] = E::load(v + i * LANES);
    else
      values[0] = E::load(v, LORASTACK_ISA::first(left));
  }
};

// Attention of one to MAX_QUERIES queries. scratch: as many rows of `capacity` floats.
template <class Isa, class X, class T>
void attend_queries(const Query<X>* queries, int count, const RowCache<T>& kv, int size,
                    float scale, float* scratch, int capacity) {
  with_count<Isa::MAX_QUERIES>(count, [&](auto num) {
    Pass<Isa, num.value>(queries, kv, size, scratch, capacity).run(scale);
  });
}

}  // namespace lorastack::LORASTACK_ISA
