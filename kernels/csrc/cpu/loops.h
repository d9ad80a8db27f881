// The loops whose speed depends on the instruction set. loops.cpp is compiled four times; `loops()` gives the best
// set this processor has.
#pragma once
#include <stdint.h>

namespace treadle {

struct Encoder;
struct Source;

// Digest keys of a run of elements: that of element i is `key + i·φ`.
struct Keys {
    uint64_t key, k2;
};

constexpr int64_t PANEL = 32, ROWS_AT_ONCE = 4;

struct Loops {
    void (*digest)(const void* bits, int64_t n, int width, Keys keys, uint64_t* lanes);
    // Element i is at flat index index[i]; `keys.key` is k₁.
    void (*digest_at)(const int64_t* index, const void* bits, int64_t n, int width, Keys keys, uint64_t* lanes);
    // Returns how many elements changed.
    int64_t (*cast_diff)(const float* master, uint16_t* param, int64_t n, uint32_t* dirty, Keys keys,
                         uint64_t* lanes);
    // Elements [begin, end) of treadle_reduce.
    void (*reduce)(const int64_t* inputs, int64_t count, int64_t begin, int64_t end, int kind, void* out);
    // out[rows][0 … cols) of treadle_streamed_mm, its rows n elements apart, from a[rows][k] and `panels` of b in fp32:
    // k × PANEL numbers each, zero beyond cols. `scratch` holds ROWS_AT_ONCE · k floats.
    void (*multiply)(const void* a, int64_t rows, int64_t k, int kind, const float* panels, int64_t cols, void* out,
                     int64_t n, float* scratch);
    // Writes a block, with up to SLACK_BYTES in vain beyond it but nothing beyond `room`, and returns its entry in the
    // table. `next` is the block that comes after it.
    uint32_t (*encode_block)(Encoder& e, const Source& s, const Source& next, bool steps, uint8_t* out,
                             int64_t room);
};

extern const Loops loops_scalar, loops_avx2, loops_avx512, loops_vbmi2;
const Loops& loops();

}  // namespace treadle
