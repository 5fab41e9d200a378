// lm_head on rows of final states, as the end of a step or on its own.
#pragma once

#include <vector>

#include "lora.h"
#include "team.h"

namespace lorastack::LORASTACK_ISA {

constexpr int LM_HEAD_PAIRS = 8;  // pairs of lm_head's panels in one chunk

struct PartCounts {
  int parts, chunks;  // chunks: of all their shrinks
};

// Lists the LoRA parts of every segment's targets first_target..first_target + count.
template <class Isa, class T>
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
      offset += Isa::shrunk_floats(segment.start, segment.end, target.rank);
    }
  }
  return counts;
}

// Runs chunk number `chunk` of the shrinks of all parts.
template <class Isa, class T, class X>
INLINE void shrink_chunk(const LoraPart<T>* parts, int chunk, const X* x, size_t ldx, int k,
                         float* shrunk) {
  for (; chunk >= shrink_chunks(*parts); parts++) chunk -= shrink_chunks(*parts);
  Isa::shrink(*parts, chunk, x, ldx, k, shrunk);
}

// What lm_head needs besides its arguments. states: [rows][padded inputs], for traits that pad
// them; parts: one a segment; unpacked: `unpacked_elements`.
template <class Isa>
struct LmHeadRoom {
  typename Isa::A::T* states;
  LoraPart<typename Isa::E::T>* parts;
  typename Isa::E::T* unpacked;
};

// The rows as activations, padded.
template <class Isa>
INLINE void pad_states(const lorastack_lm_head& lm_head, int row, typename Isa::A::T* out) {
  using E = typename Isa::E;
  const auto* x = (const typename E::T*)lm_head.x + (size_t)row * lm_head.inputs;
  out += (size_t)row * lm_head.matrix.k;
  for (int i = 0; i < lm_head.matrix.k; i += LANES)
    Isa::A::store(out + i, E::load(x + i, first(lm_head.inputs - i)));
}

// lm_head and its LoRAs on rows of final states.
template <class Isa>
void multiply_lm_head(const lorastack_lm_head& lm_head, Member& member,
                      const LmHeadRoom<Isa>& room) {
  using X = typename Isa::A::T;
  auto* const parts = room.parts;
  const PartCounts counts = list_parts<Isa>(lm_head.segments, lm_head.num_segments, 0, 1, parts);
  const X* x = (const X*)lm_head.x;
  int ldx = lm_head.inputs;
  if constexpr (Isa::PADS_STATES) {
    member.phase(lm_head.rows, [&](int row) { pad_states<Isa>(lm_head, row, room.states); });
    x = room.states;
    ldx = lm_head.matrix.k;
  }
  if (counts.parts)
    member.phase(counts.chunks, [&](int chunk) {
      shrink_chunk<Isa>(parts, chunk, x, ldx, lm_head.inputs, lm_head.scratch);
    });
  auto store = [&](Block& block, int row, int count, int panel) {
    if (counts.parts) {
      const Panel panels[2] = {{0, panel * LANES, lm_head.outputs, block.sums[0]},
                               {0, (panel + 1) * LANES, lm_head.outputs, block.sums[0] + LANES}};
      Isa::expand(parts, counts.parts, lm_head.scratch, panels, row, count);
    }
    for (int half = 0; half < 2; half++) {
      const int column = (panel + half) * LANES;
      if (column >= lm_head.outputs) continue;
      float* sums = &block.sums[0][half * LANES];
      const Mask mask = first(lm_head.outputs - column);
      for (int m = 0; m < count; m++)
        LORASTACK_ISA::store(lm_head.out + (size_t)(row + m) * lm_head.outputs + column,
                             load(sums + m * BLOCK_COLS), mask);
    }
  };
  const int pairs = lm_head.rows ? lm_head.matrix.panels / 2 : 0;
  member.phase(ceil_div(pairs, LM_HEAD_PAIRS), [&](int chunk) {
    const int end = (chunk + 1) * LM_HEAD_PAIRS < pairs ? (chunk + 1) * LM_HEAD_PAIRS : pairs;
    for (int pair = chunk * LM_HEAD_PAIRS; pair < end; pair++)
      matmul<Isa>(x, ldx, lm_head.rows, lm_head.matrix, pair, room.unpacked, store);
  });
}

template <class Isa>
void logits(lorastack_lm_head lm_head) {
  using T = typename Isa::E::T;
  int64_t floats = 0;
  for (int s = 0; s < lm_head.num_segments; s++) {
    const lorastack_segment& segment = lm_head.segments[s];
    floats += Isa::shrunk_floats(segment.start, segment.end, segment.targets->rank);
  }
  std::vector<float> shrunk(floats);
  lm_head.scratch = shrunk.data();
  const size_t num_parts = lm_head.num_segments + 1;
  std::vector<LoraPart<T>> parts(num_parts * lm_head.num_threads);
  const size_t elements = unpacked_elements(lm_head.matrix);
  std::vector<T> unpacked(elements * lm_head.num_threads + LANES);
  std::vector<typename Isa::A::T> states(
      Isa::PADS_STATES ? (size_t)lm_head.rows * lm_head.matrix.k : 0);
  std::vector<Counter> counters(num_counters(3, lm_head.num_threads));
  Team team{counters.data(), lm_head.num_threads};
#pragma omp parallel num_threads(lm_head.num_threads)
  {
    const int thread = omp_get_thread_num();
    Member member(team, thread);
    [[maybe_unused]] const typename Isa::State state;
    multiply_lm_head<Isa>(lm_head, member,
                          {states.data(), &parts[num_parts * thread], &unpacked[elements * thread]});
  }
}

}  // namespace lorastack::LORASTACK_ISA
