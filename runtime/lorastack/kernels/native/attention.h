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

// Products of NUM queries with the keys of up to 16 slots, [NUM][16].
template <class Isa, int NUM, class X, class T>
__attribute__((noinline)) void score(const Query<X>* queries, const T* keys, const int64_t* slots,
                                     int count, int size, Floats* scores) {
  constexpr int DIMS = Isa::DIMS;
  const int whole = size / DIMS * DIMS;
  Floats dots[NUM][LANES];
  for (int i = 0; i < LANES; i++) {
    Floats sums[NUM];
    unroll<NUM>([&](auto g) INLINE_LAMBDA { sums[g] = zero(); });
    const T* key = keys + slots[i < count ? i : 0];
    for (int d = 0; d < whole; d += DIMS) {
      const auto dims = Isa::load_weights(key + d);
      unroll<NUM>([&](auto g) INLINE_LAMBDA {
        sums[g] = Isa::dot(Isa::load_activations(queries[g].q + d), dims, sums[g]);
      });
    }
    if (whole < size) {
      const auto dims = Isa::load_weights(key + whole, size - whole);
      unroll<NUM>([&](auto g) INLINE_LAMBDA {
        const auto q = Isa::load_activations(queries[g].q + whole, size - whole);
        sums[g] = Isa::dot(q, dims, sums[g]);
      });
    }
    unroll<NUM>([&](auto g) INLINE_LAMBDA { dots[g][i] = sums[g]; });
  }
  for (int g = 0; g < NUM; g++) scores[g] = sums_16(dots[g]);
}

// Replaces a query's scores by softmax weights and returns one over their sum.
template <class X>
float weigh(const Query<X>& query, float* scores, float scale) {
  const int start = query.first / LANES * LANES, length = query.length();
  Floats peak = set(MASKED);
  for (int at = start; at < length; at += LANES) {
    Floats all = mul(load(scores + at), set(scale));
    if (at < query.first || at + LANES > length) {
      all = select(first(length - at), all, set(MASKED));
      all = select(first(query.first - at), set(MASKED), all);
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

  // unread: no other pass has just read the same slots.
  void run(float scale, bool unread) {
    for (int at = begin_; at < linear_; at += LANES) {
      if (unread) {
        fetch(at + LANES, 0);
        fetch(at, kv_.value_offset);
      }
      Floats scores[COUNT];
      score<Isa, COUNT>(queries_, kv_.data, kv_.slots + at, std::min(linear_ - at, LANES), size_,
                        scores);
      for (int g = 0; g < COUNT; g++) store(scores_[g] + at, scores[g]);
    }
    for (int g = 0; g < COUNT; g++) {
      score_tail(queries_[g], scores_[g]);
      norms_[g] = weigh(queries_[g], scores_[g], scale);
    }
    constexpr int PARTS = parts_of(Isa::VALUE_SUMS);
    int d = 0;
    for (; size_ - d >= PARTS * LANES; d += PARTS * LANES) add_values<PARTS, true>(d);
    for (; size_ - d >= LANES; d += LANES) add_values<1, true>(d);
    if (d < size_) add_values<1, false>(d);
  }

 private:
  const Query<X>* queries_;
  const RowCache<T>& kv_;
  const int size_;
  int begin_ = INT32_MAX, linear_ = 0;     // of any query
  int all_from_ = 0, all_to_ = INT32_MAX;  // slots that all queries see
  float* scores_[COUNT];
  float norms_[COUNT];

  // 16 dimensions at a time, as many as there are sums left for each query.
  static constexpr int parts_of(int sums) {
    int parts = 4;
    while (parts > 1 && parts * COUNT > sums) parts /= 2;
    return parts;
  }

  // Prefetches the keys or values (at `offset`) of 16 slots.
  INLINE_METHOD void fetch(int at, int64_t offset) const {
    for (int i = at; i < std::min(at + LANES, linear_); i++) {
      const char* const row = (const char*)(kv_.data + kv_.slots[i] + offset);
      for (int line = 0; line < size_ * (int)sizeof(T); line += 64) prefetch(row + line);
    }
  }

  void score_tail(const Query<X>& query, float* scores) const {
    for (int t = 0; t < query.num_tail; t += LANES) {
      const int count = std::min(query.num_tail - t, LANES);
      int64_t slots[LANES];
      for (int i = 0; i < count; i++) slots[i] = kv_.slots[query.tail[t + i]];
      Floats found;
      score<Isa, 1>(&query, kv_.data, slots, count, size_, &found);
      store(scores + query.linear + t, found, LORASTACK_ISA::first(count));
    }
  }

  // Outputs of PARTS times 16 dimensions from d on, or of the first `left` of 16.
  template <int PARTS, bool WHOLE>
  __attribute__((noinline)) void add_values(int d) const {
    const Mask real = LORASTACK_ISA::first(size_ - d);
    Floats sums[COUNT * PARTS];
    unroll<COUNT * PARTS>([&](auto i) INLINE_LAMBDA { sums[i] = zero(); });
    for (int at = begin_; at < linear_; at++) {
      const T* const v = kv_.data + kv_.slots[at] + kv_.value_offset + d;
      const bool all = at >= all_from_ && at < all_to_;
      if (all)
        unroll<PARTS>([&](auto i) INLINE_LAMBDA {
          const Floats value = load_value<WHOLE>(v + i * LANES, real);
          unroll<COUNT>([&](auto g) INLINE_LAMBDA {
            Floats& sum = sums[g * PARTS + i];
            sum = fma(set(scores_[g][at]), value, sum);
          });
          // With few registers GCC would keep weights that it needs again, and spill sums.
          if constexpr (Isa::VALUE_SUMS < 16 && i + 1 < PARTS) read_nothing_ahead();
        });
      else
        unroll<COUNT>([&](auto g) INLINE_LAMBDA {
          if (at >= queries_[g].first && at < queries_[g].linear)
            add_value<PARTS, WHOLE, g.value>(v, real, scores_[g][at], sums);
        });
    }
    unroll<COUNT>([&](auto g) INLINE_LAMBDA {
      const Query<X>& query = queries_[g];
      for (int t = std::max(0, query.first - query.linear); t < query.num_tail; t++)
        add_value<PARTS, WHOLE, g.value>(
            kv_.data + kv_.slots[query.tail[t]] + kv_.value_offset + d, real,
            scores_[g][query.linear + t], sums);
      const Floats norm = set(norms_[g]);
      unroll<PARTS>([&](auto i) INLINE_LAMBDA {
        X* const out = query.out + d + i * LANES;
        const Floats mean = mul(sums[g * PARTS + i], norm);
        if constexpr (WHOLE)
          A::store(out, mean);
        else
          A::store(out, mean, real);
      });
    });
  }

  template <int PARTS, bool WHOLE, int G>
  INLINE void add_value(const T* v, Mask real, float weight, Floats (&sums)[COUNT * PARTS]) {
    unroll<PARTS>([&](auto i) INLINE_LAMBDA {
      Floats& sum = sums[G * PARTS + i];
      sum = fma(set(weight), load_value<WHOLE>(v + i * LANES, real), sum);
    });
  }

  template <bool WHOLE>
  INLINE Floats load_value(const T* v, Mask real) {
    if constexpr (WHOLE) return E::load(v);
    else return E::load(v, real);
  }
};

// Attention of one to MAX_QUERIES queries. scratch: as many rows of `capacity` floats.
template <class Isa, class X, class T>
void attend_queries(const Query<X>* queries, int count, const RowCache<T>& kv, int size,
                    float scale, bool unread, float* scratch, int capacity) {
  with_count<Isa::MAX_QUERIES>(count, [&](auto num) INLINE_LAMBDA {
    Pass<Isa, num.value>(queries, kv, size, scratch, capacity).run(scale, unread);
  });
}

}  // namespace lorastack::LORASTACK_ISA
