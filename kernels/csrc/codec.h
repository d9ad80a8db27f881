// The encodings of a delta, and how one is chosen. A block is 65,536 elements of one tensor (its last one may be
// shorter); with w the element's bytes and m the number of changed elements, its bytes are
//
//   EMPTY                       nothing changed
//   DENSE     n·w               all elements
//   BITMAP    ⌈n/8⌉, m·w        a bit per element, then the values
//   INDEX     m·2, m·w          positions as 16-bit numbers, then the values
//   GAP       2, m·w, gaps      m − 1; values; per value the distance to its predecessor less one, where a byte of
//                               255 means "255 further on, the rest follows"
//   GAP_STEP  2, ⌈m/2⌉, e·w, gaps   m − 1; steps in ulps as signed nibbles, 0 for the e values given in full
//   RICE      2, S·2, streams   two parameters; the bytes of each of the S = ⌈n/8192⌉ streams; per change its
//                               distance and its step in ulps, as Rice codes
//
// All numbers are little-endian; bits count from the least significant one. A table holds 32 bits per block: the
// encoding in the highest four, the bytes in the others.
//
// Rice codes (R. F. Rice 1979; limited as in JPEG-LS, ITU-T T.87 A.5.3) suit the geometric distribution that
// distances between independent changes have: within 0.03 bits per change of its entropy.
#pragma once
#include "abi.h"
#include "maths.h"

namespace treadle {

constexpr int64_t BLOCK = 65536;
constexpr int WORDS = BLOCK / 32;
constexpr int SEGMENT = 8192;
constexpr int SEGMENTS = BLOCK / SEGMENT;
constexpr int SEGMENT_WORDS = SEGMENT / 32;

enum Encoding { EMPTY, DENSE, BITMAP, INDEX, GAP, GAP_STEP, RICE };
constexpr uint32_t BYTES_MASK = (1u << 28) - 1;

constexpr int RICE_LIMIT = 16;    // longer quotients are written as 16 ones and the number itself
constexpr int DISTANCE_BITS = 13;  // a distance less one within a segment

TREADLE_HD int64_t piece_of(const TreadlePiece* pieces, int64_t count, int64_t block) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (pieces[middle].first_block <= block) low = middle;
        else high = middle;
    }
    return low;
}

TREADLE_HD int rice_bits(uint32_t x, int k, int raw) {
    uint32_t q = x >> k;
    return q < (uint32_t)RICE_LIMIT ? (int)q + 1 + k : RICE_LIMIT + raw;
}

// The code of x in the low `rice_bits` bits.
TREADLE_HD uint64_t rice_code(uint32_t x, int k) {
    uint32_t q = x >> k;
    if (q >= (uint32_t)RICE_LIMIT) return ((uint64_t)x << RICE_LIMIT) | ((1u << RICE_LIMIT) - 1);
    uint64_t low = x & ((1u << k) - 1);
    return low << (q + 1) | ((1u << q) - 1);
}

// What a change knows about itself besides its value; a step is never 0.
TREADLE_HD uint32_t magnitude(int32_t step) { return (step < 0 ? 0u - (uint32_t)step : (uint32_t)step) - 1; }

TREADLE_HD bool is_nibble(int32_t step) { return step >= -8 && step <= 7; }

// What stands for all numbers of b bits.
TREADLE_HD uint32_t class_middle(int b) { return b < 2 ? (uint32_t)b : 3u << (b - 2); }

// The Rice parameter for numbers of which histogram[b] have b bits, from the middle of each class.
TREADLE_HD int rice_parameter(const uint32_t* histogram, int raw) {
    int best = 0;
    uint64_t least = ~0ull;
    for (int k = 0; k < raw; ++k) {
        uint64_t bits = 0;
        for (int b = 0; b <= raw; ++b) bits += (uint64_t)histogram[b] * (uint64_t)rice_bits(class_middle(b), k, raw);
        if (bits < least) least = bits, best = k;
    }
    return best;
}

struct Counts {
    int64_t n, changed;
    int64_t skips;       // gap bytes of 255
    int64_t escapes;     // steps that are no nibble
    int64_t rice_bytes;  // 0 where steps are not to be used or a stream is longer than 65,535 bytes
};

TREADLE_HD int64_t size_of(int encoding, const Counts& c, int width) {
    switch (encoding) {
        case EMPTY: return 0;
        case DENSE: return c.n * width;
        case BITMAP: return (c.n + 7) / 8 + c.changed * width;
        case INDEX: return c.changed * (2 + width);
        case GAP: return 2 + c.changed * (width + 1) + c.skips;
        case GAP_STEP: return 2 + (c.changed + 1) / 2 + c.escapes * width + c.changed + c.skips;
        default: return c.rice_bytes;
    }
}

// The smallest encoding; of two equal ones the simpler. `steps`: whether those that need the old value may be used.
TREADLE_HD uint32_t choose(const Counts& c, int width, bool steps) {
    if (c.changed == 0) return EMPTY;
    int best = DENSE;
    for (int e = BITMAP; e <= (steps ? RICE : GAP); ++e) {
        if (e == RICE && c.rice_bytes == 0) continue;
        if (size_of(e, c, width) < size_of(best, c, width)) best = e;
    }
    return (uint32_t)best << 28 | (uint32_t)size_of(best, c, width);
}

TREADLE_HD uint32_t load_bits(const uint8_t* p, int width) {
    uint32_t b = 0;
    for (int i = 0; i < width; ++i) b |= (uint32_t)p[i] << (8 * i);
    return b;
}

TREADLE_HD uint32_t load_element(const void* base, int64_t index, int width) {
    if (width == 1) return ((const uint8_t*)base)[index];
    if (width == 2) return ((const uint16_t*)base)[index];
    return ((const uint32_t*)base)[index];
}

TREADLE_HD void store_element(void* base, int64_t index, int width, uint32_t b) {
    if (width == 1) ((uint8_t*)base)[index] = (uint8_t)b;
    else if (width == 2) ((uint16_t*)base)[index] = (uint16_t)b;
    else ((uint32_t*)base)[index] = b;
}

// Reads a stream of bits and never beyond its end: `bits` counts down, and what is missing reads as zero.
struct BitReader {
    const uint8_t* next;
    int64_t bits;       // not consumed yet, those in `window` included
    uint64_t window;
    int filled;

    TREADLE_HD BitReader(const uint8_t* bytes, int64_t size) : next(bytes), bits(8 * size), window(0), filled(0) {}

    // At least 57 bits afterwards, or all that are left. A processor reads eight bytes at once where as many are left:
    // how many it needs is random, and a loop over them would be mispredicted.
    TREADLE_HD void fill() {
#ifndef __CUDA_ARCH__
        if (bits - filled >= 64) {
            uint64_t ahead;
            memcpy(&ahead, next, 8);
            window |= ahead << filled;
            next += (63 - filled) >> 3;
            filled |= 56;
            return;
        }
#endif
        while (filled <= 56 && bits > filled) {
            window |= (uint64_t)*next++ << filled;
            filled += 8;
        }
    }
    // `count` bits of the window, or all that are left. After a `fill` that is mostly so already.
    TREADLE_HD void need(int count) {
        if (filled < count) fill();
    }
    TREADLE_HD uint32_t take(int count) {
        uint32_t value = (uint32_t)(window & ((1ull << count) - 1));
        window >>= count;
        filled -= count;
        bits -= count;
        return value;
    }
    // The padding of a stream: up to seven ones and nothing else.
    TREADLE_HD bool at_end() const { return bits <= 7 && window == (1ull << bits) - 1; }
};

// A number, or -1 where the stream ends within its code. At most 48 bits.
TREADLE_HD int64_t read_rice(BitReader& in, int k, int raw) {
    in.need(RICE_LIMIT + raw);
    uint64_t zeros = ~in.window | 1u << RICE_LIMIT;
#ifdef __CUDA_ARCH__
    int q = __ffsll((long long)zeros) - 1;
#else
    int q = __builtin_ctzll(zeros);
#endif
    bool limited = q >= RICE_LIMIT;
    int bits = limited ? RICE_LIMIT + raw : q + 1 + k;
    if (in.bits < bits) return -1;
    if (limited) {
        in.take(RICE_LIMIT);
        return (int64_t)in.take(raw);
    }
    in.take(q + 1);
    return (int64_t)((uint64_t)q << k | in.take(k));
}

// The changes of one RICE stream, in order, to visit(position, step) with positions in [0, n). Returns false where
// the stream is not one that an encoder writes.
template <class Visit>
TREADLE_HD bool read_stream(const uint8_t* bytes, int64_t size, int k, int j, int width, int64_t n, Visit visit) {
    BitReader in(bytes, size);
    int64_t position = -1;
    for (;;) {
        in.fill();
        if (in.at_end()) return true;
        int64_t distance = read_rice(in, k, DISTANCE_BITS);
        if (distance < 0) return false;
        position += distance + 1;
        if (position >= n) return false;
        int64_t size_of_step = read_rice(in, j, 8 * width);
        if (size_of_step < 0 || in.bits < 1 || size_of_step >= (int64_t)1 << (8 * width - 1)) return false;
        in.need(1);
        uint32_t negative = 0u - in.take(1);
        visit(position, (int32_t)((((uint32_t)size_of_step + 1) ^ negative) - negative));
    }
}

}  // namespace treadle
