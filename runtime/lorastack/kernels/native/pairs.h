// A pair of panels as tiles of bfloat16, for instruction sets that multiply pairs of inputs.
#pragma once

#include "matmul.h"
#include "quantised.h"

namespace lorastack::LORASTACK_ISA {

constexpr int PREFETCH = 1024;  // bytes ahead of the weights being read: the next tile

// A pair of panels that lies in memory as it is multiplied.
class PlainPair {
 public:
  PlainPair(const uint16_t* pair, int k) : panels_{pair, pair + (size_t)k * LANES} {}

  // K_STEP inputs, from k on, of panel `half`.
  INLINE_METHOD const uint16_t* tile(int k, int half) const {
    const uint16_t* tile = panels_[half] + (size_t)k * LANES;
    for (int line = 0; line < TILE * (int)sizeof *tile; line += 64)
      prefetch((const char*)tile + PREFETCH + line);
    return tile;
  }

 private:
  const uint16_t* const panels_[2];
};

// A pair of panels of codes, unpacked tile by tile, each while the one before it is multiplied.
template <class Kind>
class CodePair {
 public:
  CodePair(const lorastack_matrix& matrix, int pair)
      : end_(matrix.k), panels_{{matrix, 2 * pair}, {matrix, 2 * pair + 1}} {}

  INLINE_METHOD const uint16_t* tile(int k, int half) {
    if (k == 0) panels_[half].unpack(0, unpacked_[0][half]);
    const int next = k + K_STEP;
    if (next < end_) panels_[half].unpack(next, unpacked_[next / K_STEP % 2][half]);
    return unpacked_[k / K_STEP % 2][half];
  }

 private:
  const int end_;
  const CodePanel<Kind> panels_[2];
  alignas(64) uint16_t unpacked_[2][2][TILE];
};

// Calls work(pair, true): pairs fetch what they read. For few rows codes are unpacked on the way, for more once before.
template <int FEW_ROWS, class Work>
INLINE void with_pair(const lorastack_matrix& matrix, int pair, int rows, uint16_t* unpacked,
                      Work&& work) {
  const auto codes = [&](auto kind) {
    using Kind = decltype(kind);
    if (rows <= FEW_ROWS) {
      CodePair<Kind> panels(matrix, pair);
      return work(panels, true);
    }
    unpack_pair<Kind>(matrix, pair, unpacked);
    PlainPair panels(unpacked, matrix.k);
    work(panels, true);
  };
  if (matrix.kind == LORASTACK_INT8) return codes(Int8{});
  if (matrix.kind == LORASTACK_INT4) return codes(Int4{});
  PlainPair panels((const uint16_t*)matrix.weight + (size_t)pair * matrix.k * BLOCK_COLS, matrix.k);
  work(panels, true);
}

}  // namespace lorastack::LORASTACK_ISA
