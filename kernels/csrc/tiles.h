// How tensors are cut into tiles for pack and unpack, and what becomes of one element.
//
// fp8 is always quantised from the bf16-rounded value: then neither codes nor scales change where the bf16 weight
// does not, which is what keeps fp8 deltas small.
#pragma once
#include "abi.h"
#include "maths.h"

namespace treadle {

constexpr int64_t TILE = 16384;
constexpr int SIDE = 128;
constexpr uint32_t BF16_INFINITY = 0x7F80;

TREADLE_HD int64_t segment_of(const TreadleSegment* segments, int64_t count, int64_t tile) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (segments[middle].first_tile <= tile) low = middle;
        else high = middle;
    }
    return low;
}

TREADLE_HD bool is_fp8(int64_t form) { return form >= TREADLE_FP8; }

TREADLE_HD int64_t bytes_in_bucket(int64_t form, int64_t width) { return form == TREADLE_COPY ? width : is_fp8(form) ? 1 : 2; }

// The part of a segment that one tile covers: a run of elements, or rows and columns of a block.
struct Tile {
    int64_t segment, first, last;            // elements of the segment, in row-major order
    int64_t row, rows, col, cols, scale;     // fp8

    TREADLE_HD Tile(const TreadleSegment* segments, int64_t count, int64_t tile, int64_t form) {
        segment = segment_of(segments, count, tile);
        const TreadleSegment& s = segments[segment];
        int64_t index = tile - s.first_tile, across = (s.cols + SIDE - 1) / SIDE;
        first = index * TILE;
        last = first + TILE < s.rows * s.cols ? first + TILE : s.rows * s.cols;
        row = col = rows = cols = scale = 0;
        if (!is_fp8(form)) return;
        row = index / across * SIDE;
        col = index % across * SIDE;
        rows = s.rows - row < SIDE ? s.rows - row : SIDE;
        cols = s.cols - col < SIDE ? s.cols - col : SIDE;
        scale = s.first_scale + index;
    }
};

// Where element i of a segment lies in its tensor.
TREADLE_HD int64_t in_tensor(const TreadleSegment& s, int64_t i) {
    return s.row_step == s.cols ? i : i / s.cols * s.row_step + i % s.cols;
}

TREADLE_HD uint16_t load_bf16(const void* tensor, int64_t i, int64_t width) {
    return width == 2 ? ((const uint16_t*)tensor)[i] : bf16_of(((const uint32_t*)tensor)[i]);
}

TREADLE_HD void store_float(void* tensor, int64_t i, int64_t width, float value) {
    if (width == 2) ((uint16_t*)tensor)[i] = bf16_of(bits_of(value));
    else ((uint32_t*)tensor)[i] = bits_of(value);
}

// A magnitude to take the largest of: infinities and NaNs do not count.
TREADLE_HD uint32_t finite_magnitude(uint16_t bf16) {
    uint32_t m = bf16 & 0x7FFFu;
    return m < BF16_INFINITY ? m : 0;
}

// The scale of a block whose largest magnitude is `largest`, as bf16 bits: 1 for a block of zeros.
TREADLE_HD float block_scale(uint32_t largest, int64_t form) {
    if (largest == 0) return 1.0f;
    float scale = float_of_bf16((uint16_t)largest) / 448.0f;
    if (form != TREADLE_FP8_POW2) return scale;
    uint32_t b = bits_of(scale);
    b = b & 0x7FFFFFu ? (b & 0x7F800000u) + 0x800000u : b;
    return float_of(b < 0x800000u ? 0x800000u : b);
}

// Calls add(chunk, bytes) for every chunk that the bytes [begin, end) of the bucket touch.
template <class Add>
TREADLE_HD void each_chunk(int64_t begin, int64_t end, int64_t chunk_bytes, Add add) {
    while (begin < end) {
        int64_t chunk = begin / chunk_bytes, stop = (chunk + 1) * chunk_bytes;
        if (stop > end) stop = end;
        add(chunk, stop - begin);
        begin = stop;
    }
}

}  // namespace treadle
