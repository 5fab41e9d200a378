// bfloat16 weights to codes and scales, with the bits of the plain reference in quantize.py: sums are
// taken in the order that is defined there, and no product is fused with them.
#pragma once

#include <math.h>

#include <algorithm>

#include "abi.h"
#include "vector.h"

namespace lorastack::LORASTACK_ISA {

constexpr int GROUP = 32;  // inputs that share a scale in int4

// Weights begin..begin + 32 of a row as words of two, zeros behind its end.
INLINE Ints load_group(const uint16_t* row, int inputs, int begin) {
  return load_pairs(row + begin, std::max(inputs - begin, 0));
}

INLINE Ints even_bits(Ints words) { return shift_left<16>(words); }
INLINE Ints odd_bits(Ints words) { return bits_and(words, set((int)0xffff0000)); }

INLINE Floats without_tiny(Floats scale) {
  return keep(not_less(abs(scale), set(0x1p-100f)), scale);
}

// A positive scale rounded up to bfloat16.
INLINE Floats rounded_up(Floats scale) {
  return from_bits(odd_bits(add(bits_of(scale), set(0xffff))));
}

// The nearest number of 5 significant bits, of two the even one. Subnormal numbers are tiny anyway.
INLINE Floats shortened(Floats scale) {
  constexpr int DROPPED = 19;  // of the 23 bits that follow the first
  const Ints bits = bits_of(scale);
  const Ints last = bits_and(shift_right<DROPPED>(bits), set(1));
  const Ints half = add(last, set((1 << (DROPPED - 1)) - 1));
  return from_bits(shift_left<DROPPED>(shift_right<DROPPED>(add(bits, half))));
}

INLINE Floats inverse_of(Floats scale) {
  return keep(not_equal(scale, zero()), div(set(1.0f), scale));
}

INLINE Floats squared_error(Floats weight, Floats inverse) {
  const Floats exact = mul(weight, inverse);
  const Floats code = min(max(round(exact), set(-8.0f)), set(7.0f));
  const Floats off = sub(code, exact);
  return mul(off, off);
}

// Sums for 16 groups, in units of their scales: neighbours are added first, then neighbouring sums.
template <int NUM>
static Floats squared_errors(const Ints* words, Floats inverse) {
  if constexpr (NUM == 1)
    return add(squared_error(even_halves(*words), inverse),
               squared_error(odd_halves(*words), inverse));
  else
    return add(squared_errors<NUM / 2>(words, inverse),
               squared_errors<NUM / 2>(words + NUM / 2, inverse));
}

// bfloat16 scales of the 16 groups from `begin` on, one a lane.
INLINE Floats int4_scales(const uint16_t* row, int inputs, int begin) {
  Floats groups[LANES];
  for (int i = 0; i < LANES; i++)
    groups[i] = from_bits(load_group(row, inputs, begin + i * GROUP));
  transpose_16(groups);
  // Bits are a sign and a magnitude: the lowest negative number is the largest unsigned integer.
  // Where there is none, `low` is `high`.
  Ints words[LANES], lowest = set(0), highest = lowest;
  for (int i = 0; i < LANES; i++) {
    words[i] = bits_of(groups[i]);
    lowest = max_unsigned(lowest, max_unsigned(even_bits(words[i]), odd_bits(words[i])));
    highest = max(highest, max(even_bits(words[i]), odd_bits(words[i])));
  }
  const Floats low = from_bits(lowest), high = from_bits(highest);
  const Floats extreme = select(less(bits_of(abs(low)), highest), high, low);
  const Floats largest = abs(extreme);
  Floats best = set(INFINITY);
  Floats scale = largest;  // stays where all weights are 0 or one is not finite
  for (const float code : {8.8f, 8.2f, 7.6f, 7.0f}) {
    const Floats tried = without_tiny(shortened(div(extreme, set(-code))));
    const Floats step = div(tried, largest);  // so that no square overflows or vanishes
    const Floats error =
        mul(squared_errors<LANES>(words, inverse_of(tried)), mul(step, step));
    const Mask better = less(error, best);
    best = select(better, error, best);
    scale = select(better, tried, scale);
  }
  return scale;
}

// The bfloat16 scale of a whole row, in every lane.
INLINE Floats int8_scale(const uint16_t* row, int inputs) {
  Ints most = set(0);
  for (int i = 0; i < inputs; i += GROUP) {
    const Ints sizes = bits_and(load_group(row, inputs, i), set(0x7fff7fff));
    most = max(most, max(even_bits(sizes), odd_bits(sizes)));
  }
  alignas(64) int32_t lane_bits[LANES];
  store_ints(lane_bits, most);
  const Floats largest = from_bits(set(*std::max_element(lane_bits, lane_bits + LANES)));
  return without_tiny(rounded_up(div(largest, set(127.0f))));
}

INLINE Ints code_of(Floats weight, Floats inverse, int least, int most) {
  return min(max(to_ints(mul(weight, inverse)), set(least)), set(most));
}

// Stores 32 codes.
INLINE void store_codes(Ints words, Floats inverse, int least, int most, int8_t* codes) {
  store_bytes_in_turn(codes, code_of(even_halves(words), inverse, least, most),
                      code_of(odd_halves(words), inverse, least, most));
}

INLINE void store_scales(Floats scales, int num, uint16_t* out) {
  store_upper_halves(out, bits_of(scales), first(num));
}

INLINE void quantise_int8(const uint16_t* row, int inputs, int8_t* codes, uint16_t* scales) {
  const Floats scale = int8_scale(row, inputs), inverse = inverse_of(scale);
  store_scales(scale, 1, scales);
  for (int i = 0; i < inputs; i += GROUP)
    store_codes(load_group(row, inputs, i), inverse, -127, 127, codes + i);
}

INLINE void quantise_int4(const uint16_t* row, int inputs, int8_t* codes, uint16_t* scales) {
  for (int begin = 0; begin < inputs; begin += LANES * GROUP) {
    const int num = std::min(LANES, ceil_div(inputs - begin, GROUP));
    const Floats group_scales = int4_scales(row, inputs, begin);
    store_scales(group_scales, num, scales + begin / GROUP);
    alignas(64) float inverses[LANES];
    store(inverses, inverse_of(group_scales));
    for (int i = 0; i < num; i++) {
      const int place = begin + i * GROUP;
      store_codes(load_group(row, inputs, place), set(inverses[i]), -8, 7, codes + place);
    }
  }
}

INLINE void quantise_row(const uint16_t* row, int inputs, int kind, int8_t* codes, uint16_t* scales) {
  if (kind == LORASTACK_INT8)
    quantise_int8(row, inputs, codes, scales);
  else
    quantise_int4(row, inputs, codes, scales);
}

}  // namespace lorastack::LORASTACK_ISA
