// Y = X W^T for 1 to a few hundred rows, at the speed at which W can be read.
//
// W is packed once: panels of 16 outputs, bfloat16 as [K/2][16][2], float32 as [K][16], K padded to
// K_STEP with zeros. X rows are padded likewise; tiles may read rows up to the next multiple of 32.
// Quantised weights are unpacked to the bfloat16 panels of their values, see quantised.h.
// A block of 32 rows by two panels is summed over k in order and handed to an epilogue. How an
// instruction set multiplies a block is its trait's: wide.h, dot.h or amx.h.
#pragma once

#include "abi.h"
#include "vector.h"

namespace lorastack::LORASTACK_ISA {

constexpr int BLOCK_ROWS = 32;
constexpr int BLOCK_COLS = 2 * LANES;
constexpr int PREFETCH = 1024;  // bytes ahead of the weights being read: the next tile

// Sums of a block, [BLOCK_ROWS][BLOCK_COLS].
struct alignas(64) Block {
  float sums[BLOCK_ROWS][BLOCK_COLS];
};

// A pair of panels that lies in memory as it is multiplied.
template <class T>
class Plain {
 public:
  Plain(const T* pair, int k) : panels_{pair, pair + (size_t)k * LANES} {}

  // K_STEP inputs, from k on, of panel `half` of the pair.
  INLINE_METHOD const T* tile(int k, int half) const {
    const T* tile = panels_[half] + (size_t)k * LANES;
    for (int line = 0; line < K_STEP * LANES * (int)sizeof(T); line += 64)
      prefetch((const char*)tile + PREFETCH + line);
    return tile;
  }

 private:
  const T* const panels_[2];
};

}  // namespace lorastack::LORASTACK_ISA

#include "quantised.h"

namespace lorastack::LORASTACK_ISA {

// Elements that `matmul` needs for unpacked weights.
INLINE size_t unpacked_elements(const lorastack_matrix& matrix) {
  return matrix.kind == LORASTACK_PLAIN ? 0 : (size_t)matrix.k * BLOCK_COLS;
}

// Multiplies sums of int8 codes by their outputs' scales.
INLINE void scale_sums(const lorastack_matrix& matrix, int pair, int rows, Block* out) {
  const uint16_t* scales = (const uint16_t*)matrix.scales + pair * BLOCK_COLS;
  for (int column = 0; column < BLOCK_COLS; column += LANES) {
    const Floats scale = load_halves(scales + column);
    for (int m = 0; m < rows; m++) {
      float* sums = &out->sums[m][column];
      store(sums, mul(load(sums), scale));
    }
  }
}

// A pair of panels times all rows, block by block.
template <class Isa, class X, class Source, class Epilogue>
INLINE void blocks(const X* x, size_t ldx, int rows, Source& source, const lorastack_matrix& matrix,
                   int pair, Epilogue&& epilogue) {
  Block out;
  for (int row = 0; row < rows; row += BLOCK_ROWS) {
    const int count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
    Isa::block(x + row * ldx, ldx, count, source, matrix.k, &out);
    if (matrix.kind == LORASTACK_INT8) scale_sums(matrix, pair, count, &out);
    epilogue(out, row, count, 2 * pair);
  }
}

// For few rows weights are unpacked on the way, for more once before.
template <class Isa, class Kind, class X, class Epilogue>
INLINE void multiply_codes(const X* x, size_t ldx, int rows, const lorastack_matrix& matrix,
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
template <class Isa, class X, class Epilogue>
INLINE void matmul(const X* x, size_t ldx, int rows, const lorastack_matrix& matrix, int pair,
                   typename Isa::E::T* unpacked, Epilogue&& epilogue) {
  using T = typename Isa::E::T;
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
