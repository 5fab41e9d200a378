// Y = X W^T for 1 to a few hundred rows, at the speed at which W can be read.
//
// W is packed once: panels of 16 outputs, bfloat16 as [K/2][16][2], float32 as [K][16], K padded to
// K_STEP with zeros. X rows are padded likewise; tiles may read rows up to the next multiple of 32.
// Quantised weights are codes, see quantised.h.
// A block of 32 rows by two panels is summed over k in order and handed to an epilogue. How an
// instruction set reads panels and multiplies a block is its trait's: wide.h, dot.h or amx.h.
#pragma once

#include "abi.h"
#include "vector.h"

namespace lorastack::LORASTACK_ISA {

constexpr int BLOCK_ROWS = 32;
constexpr int BLOCK_COLS = 2 * LANES;

// Sums of a block, [BLOCK_ROWS][BLOCK_COLS].
struct alignas(64) Block {
  float sums[BLOCK_ROWS][BLOCK_COLS];
};

// Elements of the weights that unpacked codes of a pair of panels take.
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

// One pair of panels of X W^T. unpacked: room for `unpacked_elements`.
// epilogue(block, row, rows, panel): sums of rows row..row + rows and of panels panel and panel + 1.
template <class Isa, class X, class Epilogue>
INLINE void matmul(const X* x, size_t ldx, int rows, const lorastack_matrix& matrix, int pair,
                   typename Isa::E::T* unpacked, Epilogue&& epilogue) {
  Isa::with_panels(matrix, pair, rows, unpacked, [&](auto&& panels, bool fetch) {
    Block out;
    for (int row = 0; row < rows; row += BLOCK_ROWS) {
      const int count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
      Isa::block(x + row * ldx, ldx, count, panels, matrix.k, fetch && row == 0, &out);
      if (matrix.kind == LORASTACK_INT8) scale_sums(matrix, pair, count, &out);
      epilogue(out, row, count, 2 * pair);
    }
  });
}

}  // namespace lorastack::LORASTACK_ISA
