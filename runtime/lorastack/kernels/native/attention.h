// Attention over paged KV for one row and one key-value head.
//
// Positions are taken in logical order, 16 at a time from position 0, whatever the step, the chunk
// or the tree around them: a query's bits depend on its own past alone. A query sees the slots of a
// linear prefix (slot s holds position s) and, in a tree, its own ancestors behind it.
#pragma once

#include <math.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

constexpr int MAX_QUERIES = 4;  // queries that share one pass over keys and values
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
template <class T>
struct Query {
  const T* q;
  T* out;
  int linear;       // positions 0..linear - 1 are slots 0..linear - 1
  int first;        // positions before it are outside the window
  int num_tail;     // ancestors behind the linear prefix, itself last
  const int* tail;  // their logical slots, by position
};

// Sum of the 16 lanes of each of 16 vectors, as one vector.
INLINE __m512 reduce_16(__m512 v[16]) {
  for (int i = 0; i < 8; i++) {
    __m512 a = v[i], b = v[i + 8];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++) {
    __m512 a = v[i], b = v[i + 4];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // Lanes of 128 bits now belong to v[i], v[i + 4], v[i + 8], v[i + 12].
  __m512 lo = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[2]), _mm512_unpackhi_ps(v[0], v[2]));
  __m512 hi = _mm512_add_ps(_mm512_unpacklo_ps(v[1], v[3]), _mm512_unpackhi_ps(v[1], v[3]));
  __m512 all = _mm512_add_ps(_mm512_unpacklo_ps(lo, hi), _mm512_unpackhi_ps(lo, hi));
  const __m512i order =
      _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(order, all);
}

template <class E>
INLINE __m512 dot(const typename E::T* a, const typename E::T* b, int size) {
  __m512 sum = _mm512_setzero_ps();
  if constexpr (E::half) {
    for (int i = 0; i < size; i += 32)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i),
                             (__m512bh)_mm512_loadu_si512(b + i));
  } else {
    for (int i = 0; i < size; i += 16)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
  }
  return sum;
}

// Scores of the 16 positions whose offsets begin at `at`; only the first `count` are read.
template <class E>
INLINE __m512 scores_16(const typename E::T* q, const RowCache<typename E::T>& kv,
                        const int64_t* at, int count, int size) {
  __m512 dots[16];
  for (int i = 0; i < 16; i++)
    dots[i] = i < count ? dot<E>(q, kv.data + at[i], size) : _mm512_setzero_ps();
  return reduce_16(dots);
}

// Attention of one to MAX_QUERIES queries of a kv head. scratch: MAX_QUERIES rows of `capacity` floats.
template <class E>
void attend(const Query<typename E::T>* queries, int count, const RowCache<typename E::T>& kv,
            int size, float scale, float* scratch, int capacity) {
  using T = typename E::T;
  int linear = 0, begin = 1 << 30;
  float norm[MAX_QUERIES];
  int length[MAX_QUERIES];
  for (int g = 0; g < count; g++) {
    const Query<T>& query = queries[g];
    float* scores = scratch + (size_t)g * capacity;
    length[g] = query.linear + query.num_tail;
    if (query.linear > linear) linear = query.linear;
    int start = query.first / LANES * LANES;
    if (start < begin) begin = start;
    int64_t tail[LANES];
    __m512 peak = _mm512_set1_ps(MASKED);
    for (int at = start; at < length[g]; at += LANES) {
      int valid = length[g] - at < LANES ? length[g] - at : LANES;
      const int64_t* slots = kv.slots + at;
      if (at + valid > query.linear) {
        for (int i = 0; i < valid; i++)
          tail[i] = at + i < query.linear ? kv.slots[at + i]
                                          : kv.slots[query.tail[at + i - query.linear]];
        slots = tail;
      }
      __m512 lane_scores = _mm512_mul_ps(scores_16<E>(query.q, kv, slots, valid, size),
                                         _mm512_set1_ps(scale));
      __mmask16 seen = first(valid);
      if (at < query.first) seen &= (__mmask16)(0xffff << (query.first - at));
      lane_scores = _mm512_mask_mov_ps(_mm512_set1_ps(MASKED), seen, lane_scores);
      _mm512_storeu_ps(scores + at, lane_scores);
      peak = _mm512_max_ps(peak, lane_scores);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(peak));
    __m512 total = _mm512_setzero_ps();
    for (int at = start; at < length[g]; at += LANES) {
      __m512 weight = exp_512(_mm512_sub_ps(_mm512_loadu_ps(scores + at), top));
      _mm512_storeu_ps(scores + at, weight);
      total = _mm512_add_ps(total, weight);
    }
    norm[g] = 1.0f / _mm512_reduce_add_ps(total);
  }
  for (int d = 0; d < size; d += 64) {
    const int parts = (size - d < 64 ? size - d : 64) / LANES;
    __m512 sums[MAX_QUERIES][4];
    for (int g = 0; g < MAX_QUERIES; g++)
      for (int i = 0; i < 4; i++) sums[g][i] = _mm512_setzero_ps();
    for (int at = begin; at < linear; at++) {
      const T* v = kv.data + kv.slots[at] + kv.value_offset + d;
      __m512 values[4];
      for (int i = 0; i < parts; i++) values[i] = E::load(v + i * LANES);
      for (int g = 0; g < count; g++) {
        if (at >= queries[g].linear || at < queries[g].first) continue;
        __m512 weight = _mm512_set1_ps(scratch[(size_t)g * capacity + at]);
        for (int i = 0; i < parts; i++)
          sums[g][i] = _mm512_fmadd_ps(weight, values[i], sums[g][i]);
      }
    }
    for (int g = 0; g < count; g++) {
      const Query<T>& query = queries[g];
      for (int t = 0; t < query.num_tail; t++) {
        const int at = query.linear + t;
        if (at < query.first) continue;
        const T* v = kv.data + kv.slots[query.tail[t]] + kv.value_offset + d;
        __m512 weight = _mm512_set1_ps(scratch[(size_t)g * capacity + at]);
        for (int i = 0; i < parts; i++)
          sums[g][i] = _mm512_fmadd_ps(weight, E::load(v + i * LANES), sums[g][i]);
      }
      __m512 share = _mm512_set1_ps(norm[g]);
      for (int i = 0; i < parts; i++)
        E::store(query.out + d + i * LANES, _mm512_mul_ps(sums[g][i], share));
    }
  }
}

}  // namespace lorastack::LORASTACK_ISA
