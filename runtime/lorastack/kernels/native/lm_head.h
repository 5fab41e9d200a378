// lm_head on rows of final states, as the end of a step or on its own.
#pragma once

#include <omp.h>

#include <vector>

#include "abi.h"

#include "lora.h"
#include "lora_tiles.h"

namespace lorastack::LORASTACK_ISA {

constexpr int LM_HEAD_PAIRS = 8;  // pairs of lm_head's panels in one chunk

struct PartCounts {
  int parts, chunks;  // chunks: of all their shrinks
};

// Lists the LoRA parts of every segment's targets first_target..first_target + count.
template <class T>
PartCounts list_parts(const lorastack_segment* segments, int num_segments, int first_target,
                      int count, LoraPart<T>* parts) {
  PartCounts counts = {0, 0};
  int64_t offset = 0;
  for (int s = 0; s < num_segments; s++) {
    const lorastack_segment& segment = segments[s];
    for (int i = 0; i < count; i++) {
      const lorastack_target& target = segment.targets[first_target + i];
      if (!target.rank || segment.start == segment.end) continue;
      LoraPart<T>& part = parts[counts.parts++];
      part = {segment.start,      segment.end,         i,
              target.rank,        (const T*)target.a,  (const T*)target.b,
              target.scale * segment.scale, offset};
      counts.chunks += shrink_chunks(part);
      offset += shrunk_floats(segment.start, segment.end, target.rank);
    }
  }
  return counts;
}

// Runs chunk number `chunk` of the shrinks of all parts.
template <class E>
INLINE void shrink_chunk(const LoraPart<typename E::T>* parts, int chunk, const typename E::T* x,
                         size_t ldx, int k, float* shrunk) {
  for (; chunk >= shrink_chunks(*parts); parts++) chunk -= shrink_chunks(*parts);
#ifdef __AMX_BF16__
  shrink_tiles(*parts, chunk, x, ldx, k, shrunk);
#else
  shrink<E>(*parts, chunk, x, ldx, k, shrunk);
#endif
}

// Adds all parts' updates to both panels of a block.
template <class E>
INLINE void expand_panels(const LoraPart<typename E::T>* parts, int count, float* shrunk,
                          const Panel (&panels)[2], int row, int rows) {
#ifdef __AMX_BF16__
  expand_tiles(parts, count, shrunk, panels, row, rows, BLOCK_COLS);
#else
  for (const Panel& panel : panels) expand<E>(parts, count, shrunk, panel, row, rows, BLOCK_COLS);
#endif
}

// lm_head and its LoRAs on rows of final states. parts: room for one a segment; unpacked: room for
// `unpacked_elements`.
template <class Isa>
void multiply_lm_head(const lorastack_lm_head& lm_head, Member& member,
                      LoraPart<typename Isa::E::T>* parts, typename Isa::E::T* unpacked) {
  using E = typename Isa::E;
  using T = typename E::T;
  const PartCounts counts = list_parts(lm_head.segments, lm_head.num_segments, 0, 1, parts);
  const T* x = (const T*)lm_head.x;
  if (counts.parts)
    member.phase(counts.chunks, [&](int chunk) {
      shrink_chunk<E>(parts, chunk, x, lm_head.inputs, lm_head.inputs, lm_head.scratch);
    });
  auto store = [&](Block& block, int row, int count, int panel) {
    if (counts.parts) {
      const Panel panels[2] = {{0, panel * LANES, lm_head.outputs, block.sums[0]},
                               {0, (panel + 1) * LANES, lm_head.outputs, block.sums[0] + LANES}};
      expand_panels<E>(parts, counts.parts, lm_head.scratch, panels, row, count);
    }
    for (int half = 0; half < 2; half++) {
      const int column = (panel + half) * LANES;
      if (column >= lm_head.outputs) continue;
      float* sums = &block.sums[0][half * LANES];
      const __mmask16 mask = first(lm_head.outputs - column);
      for (int m = 0; m < count; m++)
        _mm512_mask_storeu_ps(lm_head.out + (size_t)(row + m) * lm_head.outputs + column, mask,
                              _mm512_load_ps(sums + m * BLOCK_COLS));
    }
  };
  const int pairs = lm_head.rows ? lm_head.matrix.panels / 2 : 0;
  member.phase(ceil_div(pairs, LM_HEAD_PAIRS), [&](int chunk) {
    const int end = (chunk + 1) * LM_HEAD_PAIRS < pairs ? (chunk + 1) * LM_HEAD_PAIRS : pairs;
    for (int pair = chunk * LM_HEAD_PAIRS; pair < end; pair++)
      matmul<Isa>(x, lm_head.inputs, lm_head.rows, lm_head.matrix, pair, unpacked, store);
  });
}

template <class Isa>
void logits(lorastack_lm_head lm_head) {
  int64_t floats = 0;
  for (int s = 0; s < lm_head.num_segments; s++) {
    const lorastack_segment& segment = lm_head.segments[s];
    floats += shrunk_floats(segment.start, segment.end, segment.targets->rank);
  }
  std::vector<float> shrunk(floats);
  lm_head.scratch = shrunk.data();
  std::vector<LoraPart<typename Isa::E::T>> parts(
      (size_t)lm_head.num_threads * (lm_head.num_segments + 1));
  const size_t elements = unpacked_elements(lm_head.matrix);
  std::vector<typename Isa::E::T> unpacked(elements * lm_head.num_threads + LANES);
  std::vector<Counter> counters(num_counters(2, lm_head.num_threads));
  Team team{counters.data(), lm_head.num_threads};
#pragma omp parallel num_threads(lm_head.num_threads)
  {
    const int thread = omp_get_thread_num();
    Member member(team, thread);
    begin_tiles<Isa>();
    multiply_lm_head<Isa>(lm_head, member, &parts[(size_t)thread * (lm_head.num_segments + 1)],
                          unpacked.data() + thread * elements);
    end_tiles<Isa>();
  }
}

}  // namespace lorastack::LORASTACK_ISA
