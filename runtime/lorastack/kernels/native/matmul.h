// Y = X W^T for 1 to a few hundred rows, at the speed at which W can be read.
//
// W is packed once: panels of 16 outputs, bfloat16 as [K/2][16][2], float32 as [K][16], K padded to
// K_STEP with zeros. X rows are padded likewise, and rows up to the next multiple of 32 may be read.
// Quantised weights are unpacked to the bfloat16 panels of their values, see quantised.h.
// A block of 32 rows by two panels is summed over k in order and handed to an epilogue.
#pragma once

#include <string.h>

#include <initializer_list>

#include "common.h"
#include "abi.h"

namespace lorastack::LORASTACK_ISA {

constexpr int BLOCK_ROWS = 32;
constexpr int BLOCK_COLS = 2 * LANES;
constexpr int MANY_INPUTS = 2048;
constexpr int PREFETCH = 1024;  // bytes ahead of the weights being read: the next tile

// Sums of a block, [BLOCK_ROWS][BLOCK_COLS].
struct alignas(64) Block {
  float sums[BLOCK_ROWS][BLOCK_COLS];
};

// K_STEP inputs of two panels.
template <class T>
struct Tiles {
  const T *first, *second;
};

// A pair of panels that lies in memory as it is multiplied.
template <class T>
class Plain {
 public:
  Plain(const T* pair, int k) : first_(pair), second_(pair + (size_t)k * LANES) {}

  INLINE_METHOD Tiles<T> at(int k) const {
    const Tiles<T> tiles = {first_ + (size_t)k * LANES, second_ + (size_t)k * LANES};
    for (int line = 0; line < K_STEP * LANES * (int)sizeof(T); line += 64) {
      _mm_prefetch((const char*)tiles.first + PREFETCH + line, _MM_HINT_T0);
      _mm_prefetch((const char*)tiles.second + PREFETCH + line, _MM_HINT_T0);
    }
    return tiles;
  }

 private:
  const T *first_, *second_;
};

}  // namespace lorastack::LORASTACK_ISA

#include "quantised.h"

namespace lorastack::LORASTACK_ISA {

#ifdef __AVX512BF16__
struct Avx512Bf16 {
  using E = BF16;
  static constexpr bool tiles = false;
  static constexpr int FEW_ROWS = 12;  // up to so many rows, weights are read once

  template <int M, class Source>
  static void rows(const uint16_t* x, size_t ldx, Source& source, int k, Block* out, int row) {
    __m512 sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += K_STEP) {
      const Tiles<uint16_t> tiles = source.at(i);
      for (int j = 0; j < K_STEP; j += 2) {
        __m512bh v0 = (__m512bh)_mm512_loadu_si512(tiles.first + j * LANES);
        __m512bh v1 = (__m512bh)_mm512_loadu_si512(tiles.second + j * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          int pair;
          memcpy(&pair, x + m * ldx + i + j, 4);
          __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
          sums[m][0] = _mm512_dpbf16_ps(sums[m][0], v0, b);
          sums[m][1] = _mm512_dpbf16_ps(sums[m][1], v1, b);
        }
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

  template <int M, class Source>
  static void rows(const float* x, size_t ldx, Source& source, int k, Block* out, int row) {
    __m512 sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += K_STEP) {
      const Tiles<float> tiles = source.at(i);
      for (int j = 0; j < K_STEP; j++) {
        __m512 v0 = _mm512_loadu_ps(tiles.first + j * LANES);
        __m512 v1 = _mm512_loadu_ps(tiles.second + j * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          __m512 b = _mm512_set1_ps(x[m * ldx + i + j]);
          sums[m][0] = _mm512_fmadd_ps(v0, b, sums[m][0]);
          sums[m][1] = _mm512_fmadd_ps(v1, b, sums[m][1]);
        }
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
  static constexpr int FEW_ROWS = BLOCK_ROWS;
};
#endif

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifdef __AMX_BF16__
// Tiles of 64 bytes a row. rows: of X; its first 16 and their sums are tiles 4, 0 and 1, those behind
// them 5, 2 and 3. The others have 16 rows.
INLINE void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  const int last = (rows - 1) % 16 + 1;
  for (int i : {0, 1, 4}) config.rows[i] = rows > 16 ? 16 : last;
  for (int i : {2, 3, 5}) config.rows[i] = last;
  _tile_loadconfig(&config);
}
#endif

// All eight tiles have 16 rows. A thread calls it once before it multiplies.
template <class Isa>
INLINE void begin_tiles() {
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) configure_tiles(BLOCK_ROWS);
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
template <bool TWO, class Source>
static void amx_block(const uint16_t* x, size_t ldx, Source& source, int k, Block* out) {
  const int stride = (int)ldx * 2;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < k; i += K_STEP) {
    const Tiles<uint16_t> weights = source.at(i);
    before_tile_loads();
    _tile_loadd(4, x + i, stride);
    if constexpr (TWO) _tile_loadd(5, x + 16 * ldx + i, stride);
    _tile_loadd(6, weights.first, 64);
    _tile_loadd(7, weights.second, 64);
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

template <class Isa, class T, class Source>
INLINE void block(const T* x, size_t ldx, int rows, Source& source, int k, Block* out) {
#ifdef __AMX_BF16__
  if constexpr (Isa::tiles) {
    // Where X does not fit the first cache, rows of padding are not read. Setting the tiles up takes
    // as long as reading a dozen.
    const bool exact = k >= MANY_INPUTS && rows % 16;
    if (exact) configure_tiles(rows);
    if (rows <= 16)
      amx_block<false>(x, ldx, source, k, out);
    else
      amx_block<true>(x, ldx, source, k, out);
    if (exact) configure_tiles(BLOCK_ROWS);
  }
#endif
  if constexpr (!Isa::tiles) {
    int m = 0;
    for (; rows - m >= 12; m += 12) Isa::template rows<12>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 8; m += 8) Isa::template rows<8>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 4; m += 4) Isa::template rows<4>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 2; m += 2) Isa::template rows<2>(x + m * ldx, ldx, source, k, out, m);
    for (; rows - m >= 1; m += 1) Isa::template rows<1>(x + m * ldx, ldx, source, k, out, m);
  }
}

// Elements that `matmul` needs for unpacked weights.
INLINE size_t unpacked_elements(const lorastack_matrix& matrix) {
  return matrix.kind == LORASTACK_PLAIN ? 0 : (size_t)matrix.k * BLOCK_COLS;
}

// Multiplies sums of int8 codes by their outputs' scales.
INLINE void scale_sums(const lorastack_matrix& matrix, int pair, int rows, Block* out) {
  const uint16_t* scales = (const uint16_t*)matrix.scales + pair * BLOCK_COLS;
  for (int column = 0; column < BLOCK_COLS; column += LANES) {
    const __m512 scale = load_scales(scales + column);
    for (int m = 0; m < rows; m++) {
      float* sums = &out->sums[m][column];
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), scale));
    }
  }
}

// A pair of panels times all rows, block by block.
template <class Isa, class T, class Source, class Epilogue>
INLINE void blocks(const T* x, size_t ldx, int rows, Source& source, const lorastack_matrix& matrix,
                   int pair, Epilogue&& epilogue) {
  Block out;
  for (int row = 0; row < rows; row += BLOCK_ROWS) {
    const int count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
    block<Isa>(x + row * ldx, ldx, count, source, matrix.k, &out);
    if (matrix.kind == LORASTACK_INT8) scale_sums(matrix, pair, count, &out);
    epilogue(out, row, count, 2 * pair);
  }
}

// For few rows weights are unpacked on the way, for more once before.
template <class Isa, class Kind, class Epilogue>
INLINE void multiply_codes(const uint16_t* x, size_t ldx, int rows, const lorastack_matrix& matrix,
                           int pair, uint16_t* unpacked, Epilogue&& epilogue) {
  if (rows <= Isa::FEW_ROWS) {
    Codes<Kind> codes(matrix, pair);
    return blocks<Isa>(x, ldx, rows, codes, matrix, pair, epilogue);
  }
  unpack_pair<Kind>(matrix, pair, unpacked);
  Plain<uint16_t> panels(unpacked, matrix.k);
  blocks<Isa>(x, ldx, rows, panels, matrix, pair, epilogue);
}

// One pair of panels of X W^T. unpacked: room for `unpacked_elements`.
// epilogue(block, row, rows, panel): sums of rows row..row + rows and of panels panel and panel + 1.
template <class Isa, class T, class Epilogue>
INLINE void matmul(const T* x, size_t ldx, int rows, const lorastack_matrix& matrix, int pair,
                   T* unpacked, Epilogue&& epilogue) {
  if constexpr (Isa::E::half) {
    if (matrix.kind == LORASTACK_INT8)
      return multiply_codes<Isa, Int8>(x, ldx, rows, matrix, pair, unpacked, epilogue);
    if (matrix.kind == LORASTACK_INT4)
      return multiply_codes<Isa, Int4>(x, ldx, rows, matrix, pair, unpacked, epilogue);
  }
  Plain<T> panels((const T*)matrix.weight + (size_t)pair * matrix.k * BLOCK_COLS, matrix.k);
  blocks<Isa>(x, ldx, rows, panels, matrix, pair, epilogue);
}

}  // namespace lorastack::LORASTACK_ISA
