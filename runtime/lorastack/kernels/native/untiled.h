// What instruction sets without tiles share: LoRA and attention from their dot products.
#pragma once

#include "attention.h"
#include "lora.h"
#include "matmul.h"

namespace lorastack::LORASTACK_ISA {

template <class Isa>
struct Untiled {
  // A thread holds one while it multiplies.
  struct State {};

  INLINE int64_t shrunk_floats(int begin, int end, int rank) {
    return (int64_t)(end - begin) * rank;
  }

  template <class T, class X>
  INLINE void shrink(const LoraPart<T>& lora, int chunk, const X* x, size_t ldx, int k,
                     float* shrunk) {
    shrink_rows<Isa>(lora, chunk, x, ldx, k, shrunk);
  }

  template <class T>
  INLINE void expand(const LoraPart<T>* parts, int count, float* shrunk, const Panel (&panels)[2],
                     int row, int rows) {
    for (const Panel& panel : panels)
      expand_panel<Isa>(parts, count, shrunk, panel, row, rows, BLOCK_COLS);
  }

  template <class X, class T>
  INLINE void attend(const Query<X>* queries, int count, const RowCache<T>& kv, int size,
                     float scale, bool unread, int, float* scratch, int capacity) {
    attend_queries<Isa>(queries, count, kv, size, scale, unread, scratch, capacity);
  }
};

}  // namespace lorastack::LORASTACK_ISA
