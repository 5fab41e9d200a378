// Attention of up to 16 queries of one row and key-value head on AMX tiles.
//
// Positions are taken 32 at a time from position 0, in logical order. What a query does not see has
// weight 0 there, which changes no bit of a sum, so a query's bits depend on its own past alone.
#pragma once

#include "attention.h"
#include "tiles.h"

namespace lorastack::LORASTACK_ISA {

constexpr int TILE_QUERIES = 16;  // that one call takes
constexpr int SPAN = 32;          // positions: the inner side of a tile

// What one call works in. Everything is a tile, or rows of them.
struct alignas(64) TileScratch {
  uint16_t queries[MAX_HEAD_DIM / SPAN][16][SPAN];  // [pair of dimensions][query][2]
  uint16_t gathered[2][16 * MAX_HEAD_DIM];          // keys or values that do not lie together
  uint16_t values[4][16][SPAN];                     // [pair of positions][dimension][2]
  uint16_t weights[TILE_QUERIES][SPAN];
  float scores[2][16][TILE_QUERIES];
  float sums[4][TILE_QUERIES][LANES];
};

// Keys or values (at `offset`) of 16 positions from `at` on, [16][size]. viewer: a query whose
// ancestors are the last positions; null: position p is slot p. Rows from `limit` on hold anything.
INLINE const uint16_t* rows_of_16(const RowCache<uint16_t>& kv, const Query<uint16_t>* viewer,
                                  int at, int limit, int64_t offset, int size, bool together,
                                  uint16_t* scratch) {
  if (at >= limit) return scratch;
  if (!viewer && together) return kv.data + kv.slots[at] + offset;
  for (int i = 0; i < 16 && at + i < limit; i++) {
    const bool ancestor = viewer && at + i >= viewer->linear;
    const int slot = ancestor ? viewer->tail[at + i - viewer->linear] : at + i;
    memcpy(scratch + i * size, kv.data + kv.slots[slot] + offset, sizeof(uint16_t) * size);
  }
  return scratch;
}

// Prefetches 32 rows of keys or values from `at` on, if they lie together.
INLINE void prefetch_span(const RowCache<uint16_t>& kv, int at, int limit, int64_t offset, int size,
                          bool together) {
  for (int half = at; together && half < at + SPAN && half < limit; half += 16) {
    const char* rows = (const char*)(kv.data + kv.slots[half] + offset);
    for (int line = 0; line < 16 * size * (int)sizeof(uint16_t); line += 64)
      prefetch(rows + line);
  }
}

// Columns begin..end of a tile of scores [position][query] into the queries' rows, from `at` on.
INLINE void scatter_scores(const float (*tile)[TILE_QUERIES], int begin, int end, float* scores,
                           int capacity, int at) {
  Floats columns[LANES];
  tile_columns(tile, begin, end, columns);
  for (int g = begin; g < end; g++) store(scores + (size_t)g * capacity + at, columns[g]);
}

// Scores of 32 positions from `at` for queries begin..end.
INLINE void score_span(const RowCache<uint16_t>& kv, const Query<uint16_t>* viewer, int at,
                       int limit, int size, bool together, int begin, int end, TileScratch& s,
                       float* scores, int capacity) {
  const uint16_t* low = rows_of_16(kv, viewer, at, limit, 0, size, together, s.gathered[0]);
  const uint16_t* high = rows_of_16(kv, viewer, at + 16, limit, 0, size, together, s.gathered[1]);
  before_tile_loads();
  _tile_zero(0);
  _tile_zero(1);
  for (int d = 0; d < size; d += SPAN) {
    _tile_loadd(4, low + d, size * 2);
    _tile_loadd(5, high + d, size * 2);
    _tile_loadd(6, s.queries[d / SPAN], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, s.scores[0], 64);
  _tile_stored(1, s.scores[1], 64);
  scatter_scores(s.scores[0], begin, end, scores, capacity, at);
  scatter_scores(s.scores[1], begin, end, scores, capacity, at + 16);
}

// 2^x for x <= 0 to 5e-5, which bfloat16 does not see; 0 below -126; NaN stays NaN.
INLINE Floats exp2(Floats x) {
  const Floats live = set(-126.0f);  // smaller results cost a hundred cycles each
  const Mask alive = not_less(x, live);
  x = max(live, x);  // keeps NaN
  const Floats n = round(x), r = sub(x, n);
  Floats p = fma(set(9.61812910e-3f), r, set(5.55041086e-2f));
  p = fma(p, r, set(2.40226507e-1f));
  p = fma(p, r, set(6.93147180e-1f));
  return keep(alive, scale_by_power(fma(p, r, set(1.0f)), n));
}

// Replaces a query's scores by softmax weights in bfloat16 and returns one over their sum. What the
// query does not see of [begin, end) gets 0.
INLINE float weigh(const Query<uint16_t>& query, float* scores, int begin, int end, float scale) {
  const int length = query.length();
  Floats peak = set(MASKED);
  for (int at = begin; at < end; at += LANES) {
    Floats all = load(scores + at);
    if (at < query.first || at + LANES > length) {
      all = select(first(length - at), all, set(MASKED));
      all = select(first(query.first - at), set(MASKED), all);
      store(scores + at, all);
    }
    peak = max(peak, all);
  }
  const Floats log2e = set(scale * 1.44269504f);
  const Floats top = mul(set(largest(peak)), log2e);
  Floats total = zero();
  uint16_t* weights = (uint16_t*)scores;  // each lies before the scores still to be read
  for (int at = begin; at < end; at += LANES) {
    const Floats weight = exp2(_mm512_fmsub_ps(load(scores + at), log2e, top));
    BF16::store(weights + at, weight);
    total = add(total, weight);
  }
  return 1.0f / sum(total);
}

// Values of 32 positions as tiles [pair of positions][dimension][2]: `halves` times 32 dimensions
// from `d` on, two tiles each. Positions outside from..to are zeros.
INLINE void interleave(const uint16_t* low, const uint16_t* high, int size, int d, int halves,
                       int from, int to, TileScratch& s) {
  for (int r = 0; r < 16; r++) {
    const uint16_t* rows = (r < 8 ? low : high) + (2 * r % 16) * size + d;
    const __mmask32 even = 2 * r >= from && 2 * r < to ? ~0u : 0;
    const __mmask32 odd = 2 * r + 1 >= from && 2 * r + 1 < to ? ~0u : 0;
    for (int h = 0; h < halves; h++) {
      const __m512i a = _mm512_maskz_loadu_epi16(even, rows + h * SPAN);
      const __m512i b = _mm512_maskz_loadu_epi16(odd, rows + size + h * SPAN);
      _mm512_store_si512(s.values[2 * h][r], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(s.values[2 * h + 1][r], _mm512_unpackhi_epi16(a, b));
    }
  }
}

INLINE void add_values(const uint16_t* weights, int stride, int halves, const TileScratch& s) {
  before_tile_loads();
  _tile_loadd(4, weights, stride);
  _tile_loadd(5, s.values[0], 64);
  _tile_loadd(6, s.values[1], 64);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  if (halves == 1) return;
  _tile_loadd(5, s.values[2], 64);
  _tile_loadd(6, s.values[3], 64);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
}

// Stores a query's output: undoes the order of dimensions that `interleave` left and multiplies by
// `norm`. False if any sum is NaN.
INLINE bool store_context(const TileScratch& s, int g, int halves, float norm, uint16_t* out) {
  const Ints even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const Ints odd = add(even, set(8));
  const Floats share = set(norm);
  Mask wild = 0;
  for (int h = 0; h < halves; h++) {
    const Floats a = load(s.sums[2 * h][g]), b = load(s.sums[2 * h + 1][g]);
    wild |= unordered(a, b);
    BF16::store(out + h * SPAN, mul(_mm512_permutex2var_ps(a, even, b), share));
    BF16::store(out + h * SPAN + LANES, mul(_mm512_permutex2var_ps(a, odd, b), share));
  }
  return !wild;
}

// The end of the queries from `begin` on that belong to one token: they see the same.
INLINE int same_view(const Query<uint16_t>* queries, int begin, int count) {
  int end = begin + 1;
  while (end < count && queries[end].linear == queries[begin].linear &&
         queries[end].tail == queries[begin].tail &&
         queries[end].num_tail == queries[begin].num_tail)
    end++;
  return end;
}

// Attention of one to 16 queries of a kv head, in a chain or a tree. scratch: 16 rows of `capacity` floats, a
// multiple of 32. together: 16 positions from a multiple of 16 on lie in one page.
static void attend_tiles(const Query<uint16_t>* queries, int count, const RowCache<uint16_t>& kv,
                         int size, float scale, bool together, float* scratch, int capacity) {
  TileScratch s;
  int begin = 1 << 30, longest = 0, linear = 1 << 30;
  bool tree = false;
  for (int g = 0; g < count; g++) {
    const int length = queries[g].length();
    begin = std::min(begin, queries[g].first / SPAN * SPAN);
    longest = std::max(longest, length);
    linear = std::min(linear, queries[g].linear);
    tree |= queries[g].num_tail > 0;
  }
  // Before it position p is slot p for every query that sees it; in a chain everywhere.
  const int shared = tree ? linear / SPAN * SPAN : longest;
  const int end = (longest + SPAN - 1) / SPAN * SPAN;
  const bool one_view = same_view(queries, 0, count) == count;

  for (int d = 0; d < size; d += SPAN) {
    Floats dims[16];
    for (int g = 0; g < 16; g++)
      dims[g] = g < count ? from_bits(load_ints(queries[g].q + d)) : zero();
    transpose_16(dims);
    for (int i = 0; i < 16; i++) store((float*)s.queries[d / SPAN][i], dims[i]);
  }
  for (int at = begin; at < end; at += SPAN) {
    if (at < shared) {
      if (count < TILE_QUERIES) {  // else another pass has just read them
        prefetch_span(kv, at + SPAN, shared, 0, size, together);
        prefetch_span(kv, at, shared, kv.value_offset, size, together);
      }
      score_span(kv, nullptr, at, longest, size, together, 0, count, s, scratch, capacity);
      continue;
    }
    for (int g = 0, next; g < count; g = next) {
      next = same_view(queries, g, count);
      score_span(kv, queries + g, at, queries[g].length(), size, together, g,
                 next, s, scratch, capacity);
    }
  }
  float norms[TILE_QUERIES];
  for (int g = 0; g < count; g++)
    norms[g] = weigh(queries[g], scratch + (size_t)g * capacity, begin, end, scale);

  const auto* weights = (const uint16_t*)scratch;
  const int stride = capacity * (int)sizeof(float);
  bool numbers = true;
  for (int d = 0; d < size; d += 2 * SPAN) {
    const int halves = size - d > SPAN ? 2 : 1;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int at = begin; at < end; at += SPAN) {
      for (int g = 0, next; g < count; g = next) {
        const Query<uint16_t>* viewer = at < shared ? nullptr : queries + g;
        next = viewer ? same_view(queries, g, count) : count;
        const int limit = viewer ? viewer->length() : longest;
        const uint16_t* low =
            rows_of_16(kv, viewer, at, limit, kv.value_offset, size, together, s.gathered[0]);
        const uint16_t* high =
            rows_of_16(kv, viewer, at + 16, limit, kv.value_offset, size, together, s.gathered[1]);
        const int from = one_view ? queries[0].first : 0;
        interleave(low, high, size, d, halves, from - at, limit - at, s);
        if (!viewer) {
          add_values(weights + at, stride, halves, s);
          continue;
        }
        memset(s.weights, 0, sizeof s.weights);
        for (int i = g; i < next; i++)
          memcpy(s.weights[i], weights + (size_t)i * capacity * 2 + at, sizeof s.weights[i]);
        add_values(s.weights[0], sizeof s.weights[0], halves, s);
      }
    }
    _tile_stored(0, s.sums[0], 64);
    _tile_stored(1, s.sums[1], 64);
    _tile_stored(2, s.sums[2], 64);
    _tile_stored(3, s.sums[3], 64);
    for (int g = 0; g < count; g++)
      numbers &= store_context(s, g, halves, norms[g], queries[g].out + d);
  }
  if (numbers || one_view) return;
  // Zero times infinity is NaN even for a query that does not look there: token by token.
  for (int g = 0, next; g < count; g = next) {
    next = same_view(queries, g, count);
    attend_tiles(queries + g, next - g, kv, size, scale, together, scratch, capacity);
  }
}

}  // namespace lorastack::LORASTACK_ISA
