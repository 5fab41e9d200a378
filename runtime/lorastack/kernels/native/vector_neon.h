// The vocabulary of vector.h in NEON (AArch64): a vector is four registers.
#pragma once

#include <arm_neon.h>

#include <utility>

#include "common.h"

namespace lorastack::LORASTACK_ISA {

struct Floats {
  float32x4_t a, b, c, d;
};
struct Ints {
  int32x4_t a, b, c, d;
};
// All bits of a lane, or none.
struct Mask {
  uint32x4_t a, b, c, d;
};

// A result of `call` for each register of `x`; of `x` and `y`; of all three.
#define LORASTACK_EACH_1(call, x) {call(x.a), call(x.b), call(x.c), call(x.d)}
#define LORASTACK_EACH_2(call, x, y) \
  {call(x.a, y.a), call(x.b, y.b), call(x.c, y.c), call(x.d, y.d)}
#define LORASTACK_EACH_3(call, x, y, z) \
  {call(x.a, y.a, z.a), call(x.b, y.b, z.b), call(x.c, y.c, z.c), call(x.d, y.d, z.d)}
#define LORASTACK_UNARY(Result, name, Vector, call) \
  INLINE Result name(Vector x) { return LORASTACK_EACH_1(call, x); }
#define LORASTACK_BINARY(Result, name, Vector, call) \
  INLINE Result name(Vector x, Vector y) { return LORASTACK_EACH_2(call, x, y); }

LORASTACK_UNARY(Floats, from_bits, Ints, vreinterpretq_f32_s32)
LORASTACK_UNARY(Ints, bits_of, Floats, vreinterpretq_s32_f32)

INLINE Ints set(int x) {
  const int32x4_t four = vdupq_n_s32(x);
  return {four, four, four, four};
}
INLINE Ints lanes() {
  return {int32x4_t{0, 1, 2, 3}, int32x4_t{4, 5, 6, 7}, int32x4_t{8, 9, 10, 11},
          int32x4_t{12, 13, 14, 15}};
}
LORASTACK_BINARY(Mask, less, Ints, vcltq_s32)

INLINE Mask first(int n) { return less(lanes(), set(n)); }
INLINE bool all(Mask m) {
  return vminvq_u32(vandq_u32(vandq_u32(m.a, m.b), vandq_u32(m.c, m.d)));
}
INLINE unsigned bits(Mask m) {
  constexpr uint8x8_t PLACES = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t low = vcombine_u16(vmovn_u32(m.a), vmovn_u32(m.b));
  const uint16x8_t high = vcombine_u16(vmovn_u32(m.c), vmovn_u32(m.d));
  return vaddv_u8(vand_u8(vmovn_u16(low), PLACES)) |
         (unsigned)vaddv_u8(vand_u8(vmovn_u16(high), PLACES)) << 8;
}
LORASTACK_BINARY(Mask, operator&, Mask, vandq_u32)
LORASTACK_BINARY(Mask, operator|, Mask, vorrq_u32)

INLINE Floats set(float x) {
  const float32x4_t four = vdupq_n_f32(x);
  return {four, four, four, four};
}
INLINE Floats zero() { return set(0.0f); }
INLINE Floats load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
INLINE void store(float* p, Floats v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
  vst1q_f32(p + 8, v.c);
  vst1q_f32(p + 12, v.d);
}
// There are no masked loads and stores: lanes go one by one.
INLINE Floats load(const float* p, Mask m) {
  if (all(m)) return load(p);
  float lanes[LANES] = {};
  for (unsigned left = bits(m); left; left &= left - 1)
    lanes[__builtin_ctz(left)] = p[__builtin_ctz(left)];
  return load(lanes);
}
INLINE void store(float* p, Floats v, Mask m) {
  if (all(m)) return store(p, v);
  float lanes[LANES];
  store(lanes, v);
  for (unsigned left = bits(m); left; left &= left - 1)
    p[__builtin_ctz(left)] = lanes[__builtin_ctz(left)];
}

// vmaxq_f32 and vminq_f32 would give NaN for any.
INLINE float32x4_t max_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
INLINE float32x4_t min_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
LORASTACK_BINARY(Floats, add, Floats, vaddq_f32)
LORASTACK_BINARY(Floats, sub, Floats, vsubq_f32)
LORASTACK_BINARY(Floats, mul, Floats, vmulq_f32)
LORASTACK_BINARY(Floats, div, Floats, vdivq_f32)
LORASTACK_BINARY(Floats, max, Floats, max_of)
LORASTACK_BINARY(Floats, min, Floats, min_of)
INLINE Floats fma(Floats x, Floats y, Floats z) { return LORASTACK_EACH_3(vfmaq_f32, z, x, y); }
INLINE Floats fnma(Floats x, Floats y, Floats z) { return LORASTACK_EACH_3(vfmsq_f32, z, x, y); }
LORASTACK_UNARY(Floats, abs, Floats, vabsq_f32)
LORASTACK_UNARY(Floats, round, Floats, vrndnq_f32)
LORASTACK_UNARY(Floats, floor, Floats, vrndmq_f32)
INLINE float32x4_t power_of_2(float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
INLINE Floats scale_by_power(Floats x, Floats n) {
  return mul(x, LORASTACK_EACH_1(power_of_2, n));
}
// Sums of lanes i, i + 4, i + 8 and i + 12.
INLINE float32x4_t quarter_sums(Floats x) {
  return vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
}
INLINE float sum(Floats x) {
  const float32x4_t four = quarter_sums(x);
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
INLINE float largest(Floats x) {
  const float32x4_t four = max_of(max_of(x.a, x.c), max_of(x.b, x.d));
  const float32x4_t two = max_of(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(max_of(two, vextq_f32(two, two, 1)), 0);
}

LORASTACK_BINARY(Mask, less, Floats, vcltq_f32)
LORASTACK_BINARY(Mask, greater, Floats, vcgtq_f32)
LORASTACK_BINARY(Mask, at_least, Floats, vcgeq_f32)
LORASTACK_BINARY(Mask, at_most, Floats, vcleq_f32)
LORASTACK_BINARY(Mask, equal, Floats, vceqq_f32)
LORASTACK_UNARY(Mask, negated, Mask, vmvnq_u32)
INLINE Mask not_less(Floats x, Floats y) { return negated(less(x, y)); }
INLINE Mask not_equal(Floats x, Floats y) { return negated(equal(x, y)); }
INLINE Mask unordered(Floats x, Floats y) { return negated(equal(x, x) & equal(y, y)); }
INLINE Floats select(Mask m, Floats x, Floats y) { return LORASTACK_EACH_3(vbslq_f32, m, x, y); }
INLINE Ints select(Mask m, Ints x, Ints y) { return LORASTACK_EACH_3(vbslq_s32, m, x, y); }
INLINE Floats keep(Mask m, Floats x) { return select(m, x, zero()); }

INLINE Ints load_ints(const void* p) {
  const uint8_t* const bytes = (const uint8_t*)p;  // which need no alignment
  return {vreinterpretq_s32_u8(vld1q_u8(bytes)), vreinterpretq_s32_u8(vld1q_u8(bytes + 16)),
          vreinterpretq_s32_u8(vld1q_u8(bytes + 32)), vreinterpretq_s32_u8(vld1q_u8(bytes + 48))};
}
INLINE Ints load_ints(const int32_t* p, Mask m) {
  int32_t lanes[LANES] = {};
  for (unsigned left = bits(m); left; left &= left - 1)
    lanes[__builtin_ctz(left)] = p[__builtin_ctz(left)];
  return load_ints(lanes);
}
INLINE void store_ints(void* p, Ints v) {
  uint8_t* const bytes = (uint8_t*)p;
  vst1q_u8(bytes, vreinterpretq_u8_s32(v.a));
  vst1q_u8(bytes + 16, vreinterpretq_u8_s32(v.b));
  vst1q_u8(bytes + 32, vreinterpretq_u8_s32(v.c));
  vst1q_u8(bytes + 48, vreinterpretq_u8_s32(v.d));
}
INLINE int32x4_t max_unsigned_of(int32x4_t x, int32x4_t y) {
  return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(x), vreinterpretq_u32_s32(y)));
}
LORASTACK_BINARY(Ints, add, Ints, vaddq_s32)
LORASTACK_BINARY(Ints, bits_and, Ints, vandq_s32)
LORASTACK_BINARY(Ints, max, Ints, vmaxq_s32)
LORASTACK_BINARY(Ints, min, Ints, vminq_s32)
LORASTACK_BINARY(Ints, max_unsigned, Ints, max_unsigned_of)
template <int N>
INLINE int32x4_t shifted_left(int32x4_t x) { return vshlq_n_s32(x, N); }
template <int N>
INLINE int32x4_t shifted_right(int32x4_t x) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), N));
}
template <int N>
INLINE Ints shift_left(Ints x) { return LORASTACK_EACH_1(shifted_left<N>, x); }
template <int N>
INLINE Ints shift_right(Ints x) { return LORASTACK_EACH_1(shifted_right<N>, x); }
LORASTACK_UNARY(Floats, to_floats, Ints, vcvtq_f32_s32)
LORASTACK_UNARY(Ints, to_ints, Floats, vcvtnq_s32_f32)

// bfloat16.
INLINE float32x4_t widened(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
INLINE Floats load_halves(const uint16_t* p) {
  return {widened(vld1_u16(p)), widened(vld1_u16(p + 4)), widened(vld1_u16(p + 8)),
          widened(vld1_u16(p + 12))};
}
INLINE uint16x4_t upper_half(int32x4_t x) { return vshrn_n_u32(vreinterpretq_u32_s32(x), 16); }
INLINE void store_upper_halves(uint16_t* p, Ints v) {
  vst1q_u16(p, vcombine_u16(upper_half(v.a), upper_half(v.b)));
  vst1q_u16(p + 8, vcombine_u16(upper_half(v.c), upper_half(v.d)));
}
INLINE int32x4_t joined(float32x4_t even, float32x4_t odd) {
  return vreinterpretq_s32_u32(
      vsriq_n_u32(vreinterpretq_u32_f32(odd), vreinterpretq_u32_f32(even), 16));
}
LORASTACK_BINARY(Ints, join_halves, Floats, joined)

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
INLINE float32x4_t added_dots(float32x4_t sums, int32x4_t x, int32x4_t y) {
  return vbfdotq_f32(sums, vreinterpretq_bf16_s32(x), vreinterpretq_bf16_s32(y));
}
// Sums + x y of each pair of bfloat16.
INLINE Floats add_dots(Ints x, Ints y, Floats sums) {
  return LORASTACK_EACH_3(added_dots, sums, x, y);
}
#endif

// The second of each word of two.
INLINE Floats odd_halves(Ints words) { return from_bits(bits_and(words, set((int)0xffff0000))); }

// Codes.
INLINE Ints load_bytes(const void* p) {
  const int8x16_t bytes = vld1q_s8((const int8_t*)p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
          vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
}
template <int J>
INLINE float32x4_t nibble(int32x4_t x) {
  return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(x, 28 - 4 * J), 28));
}
template <int J>
INLINE Floats nibbles(Ints x) { return LORASTACK_EACH_1(nibble<J>, x); }
INLINE int8x16_t bytes_of(Ints x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
  return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
}
INLINE void store_bytes_in_turn(int8_t* p, Ints even, Ints odd) {
  const int8x16x2_t both = {bytes_of(even), bytes_of(odd)};
  vst2q_s8(p, both);
}

// Squares.
INLINE float32x4_t low_pairs(float32x4_t x, float32x4_t y) {
  return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
}
INLINE float32x4_t high_pairs(float32x4_t x, float32x4_t y) {
  return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
}
INLINE void transpose_4(float32x4_t& x, float32x4_t& y, float32x4_t& z, float32x4_t& w) {
  const float32x4_t xy = vtrn1q_f32(x, y), yx = vtrn2q_f32(x, y);
  const float32x4_t zw = vtrn1q_f32(z, w), wz = vtrn2q_f32(z, w);
  x = low_pairs(xy, zw);
  y = low_pairs(yx, wz);
  z = high_pairs(xy, zw);
  w = high_pairs(yx, wz);
}
INLINE void transpose_16(Floats v[16]) {
  for (int i = 0; i < 16; i += 4) {
    transpose_4(v[i].a, v[i + 1].a, v[i + 2].a, v[i + 3].a);
    transpose_4(v[i].b, v[i + 1].b, v[i + 2].b, v[i + 3].b);
    transpose_4(v[i].c, v[i + 1].c, v[i + 2].c, v[i + 3].c);
    transpose_4(v[i].d, v[i + 1].d, v[i + 2].d, v[i + 3].d);
  }
  // Squares trade places across the diagonal.
  for (int i = 0; i < 4; i++) {
    std::swap(v[i].b, v[i + 4].a);
    std::swap(v[i].c, v[i + 8].a);
    std::swap(v[i].d, v[i + 12].a);
    std::swap(v[i + 4].c, v[i + 8].b);
    std::swap(v[i + 4].d, v[i + 12].b);
    std::swap(v[i + 8].d, v[i + 12].c);
  }
}
// Lanes i and i + 2 of both.
INLINE float32x4_t half_sums(float32x4_t x, float32x4_t y) {
  return vaddq_f32(low_pairs(x, y), high_pairs(x, y));
}
INLINE float32x4_t sums_4(const Floats v[4]) {
  return vpaddq_f32(half_sums(quarter_sums(v[0]), quarter_sums(v[1])),
                    half_sums(quarter_sums(v[2]), quarter_sums(v[3])));
}
INLINE Floats sums_16(const Floats v[16]) {
  return {sums_4(v), sums_4(v + 4), sums_4(v + 8), sums_4(v + 12)};
}

// Eight lanes of 64 bits.
struct Longs {
  uint64x2_t a, b, c, d;
};
struct Doubles {
  float64x2_t a, b, c, d;
};

INLINE Longs set_long(uint64_t x) {
  const uint64x2_t two = vdupq_n_u64(x);
  return {two, two, two, two};
}
INLINE uint64x2_t long_of(int32x2_t x) { return vreinterpretq_u64_s64(vmovl_s32(x)); }
INLINE Longs longs_of(int32x4_t low, int32x4_t high) {
  return {long_of(vget_low_s32(low)), long_of(vget_high_s32(low)), long_of(vget_low_s32(high)),
          long_of(vget_high_s32(high))};
}
INLINE Longs low_longs(Ints x) { return longs_of(x.a, x.b); }
INLINE Longs high_longs(Ints x) { return longs_of(x.c, x.d); }
INLINE uint64x2_t product_of(uint64x2_t x, uint64x2_t y) {
  const uint32x4_t cross = vmulq_u32(vreinterpretq_u32_u64(x),
                                     vrev64q_u32(vreinterpretq_u32_u64(y)));
  return vmlal_u32(vshlq_n_u64(vpaddlq_u32(cross), 32), vmovn_u64(x), vmovn_u64(y));
}
LORASTACK_BINARY(Longs, add, Longs, vaddq_u64)
LORASTACK_BINARY(Longs, mul, Longs, product_of)
LORASTACK_BINARY(Longs, bits_xor, Longs, veorq_u64)
template <int N>
INLINE Longs shift_right(Longs x) {
  return {vshrq_n_u64(x.a, N), vshrq_n_u64(x.b, N), vshrq_n_u64(x.c, N),
          vshrq_n_u64(x.d, N)};
}
// Of numbers below 2^52, exact in float64.
INLINE float32x4_t floats_of(uint64x2_t low, uint64x2_t high) {
  return vcvt_high_f32_f64(vcvt_f32_f64(vcvtq_f64_u64(low)), vcvtq_f64_u64(high));
}
INLINE Floats to_floats(Longs low, Longs high) {
  return {floats_of(low.a, low.b), floats_of(low.c, low.d),
          floats_of(high.a, high.b), floats_of(high.c, high.d)};
}

INLINE Doubles set_double(double x) {
  const float64x2_t two = vdupq_n_f64(x);
  return {two, two, two, two};
}
INLINE Doubles doubles_of(float32x4_t low, float32x4_t high) {
  return {vcvt_f64_f32(vget_low_f32(low)), vcvt_high_f64_f32(low),
          vcvt_f64_f32(vget_low_f32(high)), vcvt_high_f64_f32(high)};
}
INLINE Doubles low_doubles(Floats x) { return doubles_of(x.a, x.b); }
INLINE Doubles high_doubles(Floats x) { return doubles_of(x.c, x.d); }
INLINE float64x2_t max_of(float64x2_t x, float64x2_t y) { return vbslq_f64(vcgtq_f64(x, y), x, y); }
LORASTACK_BINARY(Doubles, add, Doubles, vaddq_f64)
LORASTACK_BINARY(Doubles, sub, Doubles, vsubq_f64)
LORASTACK_BINARY(Doubles, mul, Doubles, vmulq_f64)
LORASTACK_BINARY(Doubles, max, Doubles, max_of)
INLINE Doubles fma(Doubles x, Doubles y, Doubles z) { return LORASTACK_EACH_3(vfmaq_f64, z, x, y); }
INLINE Doubles fnma(Doubles x, Doubles y, Doubles z) {
  return LORASTACK_EACH_3(vfmsq_f64, z, x, y);
}
LORASTACK_UNARY(Doubles, round, Doubles, vrndnq_f64)
INLINE float64x2_t power_of_2(float64x2_t n) {
  const int64x2_t exponent = vaddq_s64(vcvtnq_s64_f64(n), vdupq_n_s64(1023));
  return vreinterpretq_f64_s64(vshlq_n_s64(exponent, 52));
}
INLINE Doubles scale_by_power(Doubles x, Doubles n) {
  return mul(x, LORASTACK_EACH_1(power_of_2, n));
}
INLINE float64x2_t kept(uint64x2_t m, float64x2_t x) {
  return vreinterpretq_f64_u64(vandq_u64(m, vreinterpretq_u64_f64(x)));
}
INLINE Doubles keep_lanes(uint32x4_t low, uint32x4_t high, Doubles x) {
  const Longs m = longs_of(vreinterpretq_s32_u32(low), vreinterpretq_s32_u32(high));
  return LORASTACK_EACH_2(kept, m, x);
}
INLINE Doubles keep_low(Mask m, Doubles x) { return keep_lanes(m.a, m.b, x); }
INLINE Doubles keep_high(Mask m, Doubles x) { return keep_lanes(m.c, m.d, x); }
INLINE double sum(Doubles x) {
  return vpaddd_f64(vaddq_f64(vaddq_f64(x.a, x.c), vaddq_f64(x.b, x.d)));
}

#undef LORASTACK_EACH_1
#undef LORASTACK_EACH_2
#undef LORASTACK_EACH_3
#undef LORASTACK_UNARY
#undef LORASTACK_BINARY

}  // namespace lorastack::LORASTACK_ISA

#include "vector_partial.h"
