// Y = X W^T for 1 to a few hundred rows, at the speed at which W can be read.
//
// W is packed once: panels of 16 outputs, bfloat16 as [K/2][16][2], float32 as [K][16], K padded to
// K_STEP with zeros. X rows are padded likewise, and rows up to the next multiple of 32 may be read.
// A block of 32 rows by two panels is summed over k in order and handed to an epilogue.
#pragma once

#include <string.h>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

constexpr int BLOCK_ROWS = 32;
constexpr int BLOCK_COLS = 2 * LANES;
constexpr int PREFETCH = 1024;  // bytes ahead of the weights being read: the next tile

// Sums of a block, [BLOCK_ROWS][BLOCK_COLS].
struct alignas(64) Block {
  float sums[BLOCK_ROWS][BLOCK_COLS];
};

template <class E>
INLINE size_t panel_elements(int k) {
  return (size_t)k * LANES;
}

#ifdef __AVX512BF16__
struct Avx512Bf16 {
  using E = BF16;
  static constexpr bool tiles = false;

  template <int M>
  static void rows(const uint16_t* x, size_t ldx, const uint16_t* w0,
                              const uint16_t* w1, int k, Block* out, int row) {
    __m512 sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 2) {
      const uint16_t *p0 = w0 + (size_t)i * LANES, *p1 = w1 + (size_t)i * LANES;
      __m512bh v0 = (__m512bh)_mm512_loadu_si512(p0), v1 = (__m512bh)_mm512_loadu_si512(p1);
      _mm_prefetch((const char*)p0 + PREFETCH, _MM_HINT_T0);
      _mm_prefetch((const char*)p1 + PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        int pair;
        memcpy(&pair, x + m * ldx + i, 4);
        __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], v0, b);
        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], v1, b);
      }
    }
    for (int m = 0; m < M; m++) {
      _mm512_store_ps(out->sums[row + m], sums[m][0]);
      _mm512_store_ps(out->sums[row + m] + LANES, sums[m][1]);
    }
  }
};
#endif

struct Avx512F32 {
  using E = F32;
  static constexpr bool tiles = false;

  template <int M>
  static void rows(const float* x, size_t ldx, const float* w0, const float* w1, int k,
                              Block* out, int row) {
    __m512 sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int i = 0; i < k; i++) {
      const float *p0 = w0 + (size_t)i * LANES, *p1 = w1 + (size_t)i * LANES;
      __m512 v0 = _mm512_loadu_ps(p0), v1 = _mm512_loadu_ps(p1);
      _mm_prefetch((const char*)p0 + PREFETCH, _MM_HINT_T0);
      _mm_prefetch((const char*)p1 + PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        __m512 b = _mm512_set1_ps(x[m * ldx + i]);
        sums[m][0] = _mm512_fmadd_ps(v0, b, sums[m][0]);
        sums[m][1] = _mm512_fmadd_ps(v1, b, sums[m][1]);
      }
    }
    for (int m = 0; m < M; m++) {
      _mm512_store_ps(out->sums[row + m], sums[m][0]);
      _mm512_store_ps(out->sums[row + m] + LANES, sums[m][1]);
    }
  }
};

#ifdef __AMX_BF16__
struct AmxBf16 {
  using E = BF16;
  static constexpr bool tiles = true;
};
#endif

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles are 16 rows of 64 bytes. A thread calls it once before it multiplies.
template <class Isa>
INLINE void begin_tiles() {
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) {
    TileConfig config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
#endif
}

template <class Isa>
INLINE void end_tiles() {
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) _tile_release();
#endif
}

#ifdef __AMX_BF16__
// The compiler does not know that tile loads read memory: what was just written is written first.
INLINE void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

// TWO: rows 17 to 32 too.
template <bool TWO>
static void amx_block(const uint16_t* x, size_t ldx, const uint16_t* w0, const uint16_t* w1, int k,
                      Block* out) {
  const int stride = (int)ldx * 2;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < k; i += K_STEP) {
    const char* p0 = (const char*)(w0 + (size_t)i * LANES);
    const char* p1 = (const char*)(w1 + (size_t)i * LANES);
    for (int line = 0; line < 1024; line += 64) {
      _mm_prefetch(p0 + PREFETCH + line, _MM_HINT_T0);
      _mm_prefetch(p1 + PREFETCH + line, _MM_HINT_T0);
    }
    _tile_loadd(4, x + i, stride);
    if constexpr (TWO) _tile_loadd(5, x + 16 * ldx + i, stride);
    _tile_loadd(6, p0, 64);
    _tile_loadd(7, p1, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out->sums[0], sizeof out->sums[0]);
  _tile_stored(1, out->sums[0] + LANES, sizeof out->sums[0]);
  if constexpr (TWO) {
    _tile_stored(2, out->sums[16], sizeof out->sums[0]);
    _tile_stored(3, out->sums[16] + LANES, sizeof out->sums[0]);
  }
}
#endif

template <class Isa, class T>
INLINE void block(const T* x, size_t ldx, int rows, const T* w0, const T* w1, int k,
                             Block* out) {
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) {
    if (rows <= 16) return amx_block<false>(x, ldx, w0, w1, k, out);
    return amx_block<true>(x, ldx, w0, w1, k, out);
  }
#endif
  if constexpr (!Isa::tiles) {
    int m = 0;
    for (; rows - m >= 12; m += 12) Isa::template rows<12>(x + m * ldx, ldx, w0, w1, k, out, m);
    for (; rows - m >= 8; m += 8) Isa::template rows<8>(x + m * ldx, ldx, w0, w1, k, out, m);
    for (; rows - m >= 4; m += 4) Isa::template rows<4>(x + m * ldx, ldx, w0, w1, k, out, m);
    for (; rows - m >= 2; m += 2) Isa::template rows<2>(x + m * ldx, ldx, w0, w1, k, out, m);
    for (; rows - m >= 1; m += 1) Isa::template rows<1>(x + m * ldx, ldx, w0, w1, k, out, m);
  }
}

// One pair of panels of X W^T. epilogue(block, row, rows, panel): sums of rows row..row + rows and of
// panels panel and panel + 1.
template <class Isa, class T, class Epilogue>
INLINE void matmul(const T* x, size_t ldx, int rows, const T* w, int k, int pair,
                   Epilogue&& epilogue) {
  Block out;
  const size_t size = panel_elements<typename Isa::E>(k);
  const T* w0 = w + 2 * pair * size;
  for (int row = 0; row < rows; row += BLOCK_ROWS) {
    const int count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
    block<Isa>(x + row * ldx, ldx, count, w0, w0 + size, k, &out);
    epilogue(out, row, count, 2 * pair);
  }
}

}  // namespace lorastack::LORASTACK_ISA
