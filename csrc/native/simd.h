// Vectors of float32, and of pairs of bfloat16 values: all that differs between instruction sets.
//
// This header and those that include it are compiled once for each instruction set, in a namespace of its own: see
// instruction_sets/. Vector arithmetic is the compiler's own; intrinsics are used in this file only.
#pragma once

#include "../adam.h"
#include "../instruction_sets/shared_headers.h"

namespace bhfast::native::BHFAST_ISA {

constexpr int kLanes = BHFAST_LANES;

typedef float f32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));  // as pairs: the lower half is the first value
typedef int32_t i32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16 __attribute__((vector_size(2 * kLanes)));

#if BHFAST_LANES == 16 || defined __aarch64__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr uint32_t kPairOfOnes = 0x3f803f80;  // the pair (1, 1)

// -------------------------------------------------------------------------------------------------------------------
// Instructions

// a * b + c, rounded once if the instruction set has a fused multiply-add.
BHFAST_INLINE f32 fma(f32 a, f32 b, f32 c) {
#if BHFAST_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif BHFAST_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined BHFAST_NEON
  return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// sum + a.first * b.first + a.second * b.second, in each lane. Dot-product instructions take subnormal values for
// zeros, and each rounds sums in its own way.
BHFAST_INLINE f32 dot(f32 sum, u32 a, u32 b) {
#if defined BHFAST_BFLOAT16_DOT && defined BHFAST_NEON
  asm("bfdot %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(a), "w"(b));  // GCC 12 miscompiles vbfdotq_f32 of ones
  return sum;
#elif defined BHFAST_BFLOAT16_DOT
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  sum = fma((f32)(a << 16), (f32)(b << 16), sum);
  return fma((f32)(a & 0xffff0000), (f32)(b & 0xffff0000), sum);
#endif
}

// GCC converts half a vector at a time.
BHFAST_INLINE u32 widened(u16 v) {
#if BHFAST_LANES == 16
  return (u32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#else
  return __builtin_convertvector(v, u32);
#endif
}

BHFAST_INLINE u16 narrowed(u32 v) {
#if BHFAST_LANES == 16
  return (u16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, u16);
#endif
}

// The second one if either is NaN.
BHFAST_INLINE f32 max(f32 a, f32 b) {
#if BHFAST_LANES == 16
  return _mm512_maskz_max_ps(0xffff, a, b);
#else
  return a > b ? a : b;
#endif
}

BHFAST_INLINE f32 min(f32 a, f32 b) {
#if BHFAST_LANES == 16
  return _mm512_maskz_min_ps(0xffff, a, b);
#else
  return a < b ? a : b;
#endif
}

// -------------------------------------------------------------------------------------------------------------------
// Memory

template <class Vector, class T>
BHFAST_INLINE Vector load_as(const T* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

BHFAST_INLINE f32 load(const float* from) { return load_as<f32>(from); }
BHFAST_INLINE u32 load(const uint32_t* from) { return load_as<u32>(from); }
BHFAST_INLINE f32 load(const bfloat16* from) { return (f32)(widened(load_as<u16>(from)) << 16); }

BHFAST_INLINE void store(float* to, f32 v) { __builtin_memcpy(to, &v, sizeof v); }
BHFAST_INLINE void store(uint32_t* to, u32 v) { __builtin_memcpy(to, &v, sizeof v); }

BHFAST_INLINE f32 splat(float x) { return x - f32{}; }
BHFAST_INLINE u32 splat(uint32_t x) { return x - u32{}; }

// -------------------------------------------------------------------------------------------------------------------
// Rounding to bfloat16, ties to even; see adam.h

// The upper half of each lane is the result; the lower half is not cleared.
BHFAST_INLINE u32 rounded_bits(f32 x) {
  const u32 bits = (u32)x;
  return bits + 0x7fff + (bits >> 16 & 1);
}

BHFAST_INLINE f32 rounded(f32 x) { return (f32)(rounded_bits(x) & 0xffff0000); }

#if defined BHFAST_BFLOAT16_DOT && BHFAST_LANES == 16

// These instructions make zeros of results below the smallest normal number, as dot() does of its factors.
BHFAST_INLINE u16 to_bfloat16(f32 x) { return (u16)_mm512_cvtneps_pbh(x); }

// Both vectors, one after the other.
BHFAST_INLINE u32 to_bfloat16(f32 first, f32 second) { return (u32)_mm512_cvtne2ps_pbh(second, first); }

// Pairs of the values of both.
BHFAST_INLINE u32 interleaved(u32 both) {
  u32 index;  // two in a lane
  for (uint32_t i = 0; i < kLanes; ++i) index[i] = i | (i + kLanes) << 16;
  return (u32)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)index, (__m512i)both);
}

BHFAST_INLINE u32 pack(f32 first, f32 second) { return interleaved(to_bfloat16(first, second)); }

#else

BHFAST_INLINE u16 to_bfloat16(f32 x) { return narrowed(rounded_bits(x) >> 16); }

BHFAST_INLINE u32 pack(f32 first, f32 second) {
  return (rounded_bits(first) >> 16) | (rounded_bits(second) & 0xffff0000);
}

#endif

BHFAST_INLINE void store(bfloat16* to, f32 x) {
  const u16 v = to_bfloat16(x);
  __builtin_memcpy(to, &v, sizeof v);
}

// -------------------------------------------------------------------------------------------------------------------
// Functions

// Lane i of the result is lane kIndex(i) of a, or lane kIndex(i) - kLanes of b.
template <auto kIndex, class Vector, int... i>
BHFAST_INLINE Vector shuffled(Vector a, Vector b, std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kIndex(i)...);
#else
  return __builtin_shuffle(a, b, i32{kIndex(i)...});
#endif
}

template <auto kIndex, class Vector>
BHFAST_INLINE Vector shuffled(Vector a, Vector b) {
  return shuffled<kIndex>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Lane i of the result is lane i ^ distance of v.
template <int kDistance, class Vector>
BHFAST_INLINE Vector exchanged(Vector v) {
  return shuffled<[](int i) { return i ^ kDistance; }>(v, v);
}

template <int kDistance = kLanes / 2>
BHFAST_INLINE float reduce_sum(f32 v) {
  v += exchanged<kDistance>(v);
  if constexpr (kDistance > 1) return reduce_sum<kDistance / 2>(v);
  return v[0];
}

template <int kDistance = kLanes / 2>
BHFAST_INLINE float reduce_max(f32 v) {
  v = max(v, exchanged<kDistance>(v));
  if constexpr (kDistance > 1) return reduce_max<kDistance / 2>(v);
  return v[0];
}

// 1 / x for a normal x whose inverse is normal, within an ulp.
BHFAST_INLINE f32 inverse(f32 x) {
#if BHFAST_LANES == 16
  const f32 estimate = _mm512_maskz_rcp14_ps(0xffff, x);
  return fma(estimate, fma(-x, estimate, splat(1.0f)), estimate);  // a step of Newton's method
#else
  return 1 / x;
#endif
}

// e^x, within two ulp. It is 0 where the exact result is below the smallest normal number.
BHFAST_INLINE f32 exp(f32 x) {
  const float lowest = -87.336544f, highest = 88.37f;
  const f32 clamped = min(splat(highest), max(splat(lowest), x));        // NaN stays NaN
  const float shift = 0x1.8p23f;                                         // adding it rounds to an integer
  const f32 shifted = fma(clamped, splat(0x1.715476p0f), splat(shift));  // x / ln 2
  const f32 n = shifted - shift;
  f32 r = fma(n, splat(-0x1.62e400p-1f), clamped);  // minus n * ln 2, in two parts
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  f32 p = splat(1.0f / 720);  // Taylor's series: |r| < 0.35
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const f32 power = (f32)(((u32)shifted << 23) + 0x3f800000);  // 2^n
  const f32 result = p * power;
  return x < lowest ? f32{} : result;
}

// Transpose kLanes vectors as the rows of a square matrix: exchange blocks of kDistance lanes, then larger ones.
template <int kDistance = 1>
BHFAST_INLINE void transpose(u32 (&v)[kLanes]) {
  // Indices into two vectors: the lanes of both whose bit kDistance is 0, and those where it is 1.
  constexpr auto low = [](int i) { return i & kDistance ? kLanes + (i ^ kDistance) : i; };
  constexpr auto high = [](int i) { return i & kDistance ? kLanes + i : i ^ kDistance; };
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const u32 a = v[i], b = v[i + kDistance];
    v[i] = shuffled<low>(a, b);
    v[i + kDistance] = shuffled<high>(a, b);
  }
  if constexpr (2 * kDistance < kLanes) transpose<2 * kDistance>(v);
}

}  // namespace bhfast::native::BHFAST_ISA
