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

// The arguments of treadle_decode_attention.
constexpr int64_t MAX_HEAD = 256, HEADS_AT_ONCE = 4;
struct DecodeAttention {
    const float* qkv;
    const int64_t* positions;
    const float *cos, *sin, *q_norm, *k_norm;
    float scale, eps;
    float *keys, *values, *out;
    int64_t heads, kv_heads, size, capacity;

    int64_t score_stride() const { return (capacity + 15) / 16 * 16; }
};

// The arguments of treadle_panel_product.
struct PanelProduct {
    const float *x, *panels, *bias, *residual;
    float* out;
    int64_t rows, k, cols;
};

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
    // Those of decode.cpp, without their threads.
    void (*rms_norm)(const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out);
    void (*silu_gate)(const float* gate_up, int64_t rows, int64_t size, float* out);
    void (*attend)(const DecodeAttention& a, int64_t row, float* scratch);
    void (*panel_product)(const PanelProduct& p, int64_t begin, int64_t end);
};

extern const Loops loops_scalar, loops_avx2, loops_avx512, loops_vbmi2;
const Loops& loops();

}  // namespace treadle
