// The arithmetic of one element, compiled into both libraries: what is equal here is equal on CPU and GPU.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define TREADLE_HD __host__ __device__ __forceinline__
#else
#define TREADLE_HD inline __attribute__((always_inline))
#endif

namespace treadle {

TREADLE_HD uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

TREADLE_HD float float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// Number of bits of x; 0 for 0.
TREADLE_HD int bit_length(uint32_t x) {
#ifdef __CUDA_ARCH__
    return 32 - __clz((int)x);
#else
    return x ? 32 - __builtin_clz(x) : 0;
#endif
}

// fp32 to bf16, nearest, ties to even. A NaN stays one with its sign and upper payload: adding the rounding bias
// could turn it into an infinity or a zero.
TREADLE_HD uint16_t bf16_of(uint32_t b) {
    uint32_t rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
    uint32_t quiet = (b >> 16) | 0x40u;
    return (uint16_t)((b & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

TREADLE_HD float float_of_bf16(uint16_t b) { return float_of((uint32_t)b << 16); }

// fp32 to e4m3 (no infinities, largest value 448), nearest, ties to even, saturating; NaN is 0x7F with its sign.
TREADLE_HD uint8_t e4m3_of(float x) {
    uint32_t b = bits_of(x);
    uint32_t sign = (b >> 24) & 0x80u, m = b & 0x7FFFFFFFu;
    if (m > 0x7F800000u) return (uint8_t)(sign | 0x7Fu);
    if (m >= 0x43E00000u) return (uint8_t)(sign | 0x7Eu);
    if (m < 0x3C800000u) {
        // Below 2⁻⁶ codes are multiples of 2⁻⁹: adding 2¹⁴ leaves those units, rounded, in the last bits.
        uint32_t units = bits_of(float_of(m) + 16384.0f) - 0x46800000u;
        return (uint8_t)(sign | units);
    }
    uint32_t rounded = m + 0x7FFFFu + ((m >> 20) & 1u);
    return (uint8_t)(sign | ((rounded >> 20) - (120u << 3)));
}

// fp16 to fp32: scaling by 2¹¹² turns its exponents, subnormal ones included, into those of fp32.
TREADLE_HD float float_of_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = h & 0x7FFFu;
    uint32_t special = 0x7F800000u | (m << 13);
    uint32_t number = bits_of(float_of(m << 13) * 5192296858534827628530496329220096.0f);
    return float_of((m >= 0x7C00u ? special : number) | sign);
}

// fp32 to fp16, nearest, ties to even.
TREADLE_HD uint16_t f16_of(uint32_t b) {
    uint32_t sign = (b >> 16) & 0x8000u, m = b & 0x7FFFFFFFu;
    // Below 2⁻¹⁴ numbers are multiples of 2⁻²⁴: adding ½ leaves those units, rounded, in the last bits.
    uint32_t small = bits_of(float_of(m < 0x38800000u ? m : 0) + 0.5f) - 0x3F000000u;
    uint32_t normal = (m + 0xC8000FFFu + ((m >> 13) & 1u)) >> 13;
    uint32_t finite = m < 0x38800000u ? small : m >= 0x47800000u ? 0x7C00u : normal;
    return (uint16_t)(sign | (m > 0x7F800000u ? 0x7E00u : finite));
}

// Sums have one NaN only: which of two payloads survives an addition depends on the processor.
constexpr uint32_t THE_NAN = 0x7FC00000u;
TREADLE_HD uint32_t without_payload(float x) { return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u ? THE_NAN : bits_of(x); }

// A float as the bits of kind 0 (fp32), 1 (bf16) or 2 (fp16), and back. NaNs lose sign and payload.
template <class T, int KIND>
TREADLE_HD float widen(T x) {
    return KIND == 0 ? float_of((uint32_t)x) : KIND == 1 ? float_of_bf16((uint16_t)x) : float_of_f16((uint16_t)x);
}
template <class T, int KIND>
TREADLE_HD T narrow(float x) {
    uint32_t b = without_payload(x);
    return (T)(KIND == 0 ? b : KIND == 1 ? bf16_of(b) : f16_of(b));
}

TREADLE_HD float float_of_e4m3(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80) << 24, m = b & 0x7Fu;
    if (m == 0x7Fu) return float_of(sign | 0x7FC00000u);
    // Below the smallest normal number the code counts multiples of 2⁻⁹.
    float magnitude = m < 8 ? (float)m * 0.001953125f : float_of((m << 20) + (120u << 23));
    return float_of(bits_of(magnitude) | sign);
}

// Bit patterns in the order of the values they stand for (sign and magnitude to two's complement), so that one ulp
// is a difference of one; -0 comes just before 0. `width` is in bytes. Signs of weights are random: a branch on one
// would be mispredicted half of the time, after waiting for the weight.
TREADLE_HD int32_t ordered(uint32_t b, int width) {
    uint32_t sign = 1u << (8 * width - 1), negative = 0u - (b >> (8 * width - 1) & 1u);
    return (int32_t)((b & (sign - 1)) ^ negative);
}

TREADLE_HD uint32_t unordered(int32_t o, int width) {
    uint32_t sign = 1u << (8 * width - 1), negative = (uint32_t)(o >> 31);
    return (((uint32_t)o ^ negative) & (sign - 1)) | (negative & sign);
}

// From `before` to `after` in ulps, wrapped into [-2^(8·width-1), 2^(8·width-1)).
TREADLE_HD int32_t ulp_step(uint32_t before, uint32_t after, int width) {
    uint32_t d = (uint32_t)ordered(after, width) - (uint32_t)ordered(before, width);
    int shift = 32 - 8 * width;
    return (int32_t)(d << shift) >> shift;
}

// The inverse: the bits that are `step` ulps from `before`.
TREADLE_HD uint32_t ulp_add(uint32_t before, int32_t step, int width) {
    int shift = 32 - 8 * width;
    uint32_t o = (uint32_t)ordered(before, width) + (uint32_t)step;
    return unordered((int32_t)(o << shift) >> shift, width);
}

// The digest's mix of one element; constants and proof of what it detects are in treadle/kernels/digest.py.
constexpr uint64_t PHI = 0x9E3779B97F4A7C15ull;
constexpr uint64_t MIX_1 = 0xBF58476D1CE4E5B9ull, MIX_2 = 0x94D049BB133111EBull, MIX_3 = 0xD6E8FEB86659FD93ull;

struct Lanes {
    uint64_t first, second;
};

TREADLE_HD Lanes mix(uint64_t bits, uint64_t key, uint64_t k2) {
    uint64_t x = (bits ^ key) * MIX_1;
    x ^= x >> 32;
    uint64_t h1 = x * MIX_2;
    uint64_t h2 = (x + k2) * MIX_3;
    return {h1 ^ (h1 >> 29), h2 ^ (h2 >> 31)};
}

// The digest reads elements as signed integers of their width.
TREADLE_HD uint64_t widened(uint32_t b, int width) {
    int shift = 32 - 8 * width;
    return (uint64_t)(int64_t)((int32_t)(b << shift) >> shift);
}

// What the digest gains when the element at `key` goes from `before` to `after`.
TREADLE_HD Lanes mix_change(uint32_t before, uint32_t after, int width, uint64_t key, uint64_t k2) {
    Lanes a = mix(widened(before, width), key, k2), b = mix(widened(after, width), key, k2);
    return {b.first - a.first, b.second - a.second};
}

}  // namespace treadle
