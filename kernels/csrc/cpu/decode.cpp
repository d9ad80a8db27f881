// A decode step's work beside its matrix products, shared among threads by rows.
#include <stdlib.h>

#include "../abi.h"
#include "loops.h"
#include "parallel.h"

using namespace treadle;

namespace {

constexpr int64_t NUMBERS_WORTH_A_THREAD = 65536;  // read: starting a thread takes as long

uint64_t threads_for(uint64_t lane, int64_t numbers) {
    uint64_t worth = (uint64_t)(numbers / NUMBERS_WORTH_A_THREAD);
    return worth < lane ? (worth ? worth : 1) : lane;
}

}  // namespace

int treadle_rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, const float* eps, float* out,
                     uint64_t lane) {
    if (rows < 0 || size < 16 || size % 16) return TREADLE_BAD_ARGUMENT;
    parallel(threads_for(lane, rows * size), rows, 1, [&](int64_t begin, int64_t end, int) {
        loops().rms_norm(x + begin * size, weight, end - begin, size, *eps, out + begin * size);
    });
    return TREADLE_OK;
}

int treadle_silu_gate(const float* gate_up, int64_t rows, int64_t size, float* out, uint64_t lane) {
    if (rows < 0 || size < 16 || size % 16) return TREADLE_BAD_ARGUMENT;
    parallel(threads_for(lane, 2 * rows * size), rows, 1, [&](int64_t begin, int64_t end, int) {
        loops().silu_gate(gate_up + 2 * begin * size, end - begin, size, out + begin * size);
    });
    return TREADLE_OK;
}

int treadle_decode_attention(const float* qkv, const int64_t* positions, const float* cos, const float* sin,
                             const float* q_norm, const float* k_norm, const float* scale_eps, float* keys, float* values,
                             float* out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity,
                             uint64_t lane) {
    if (rows < 0 || kv_heads < 1 || heads < kv_heads || heads % kv_heads || size < 32 || size % 32 || size > MAX_HEAD)
        return TREADLE_BAD_ARGUMENT;
    int64_t read = 0;
    for (int64_t row = 0; row < rows; ++row) {
        if (positions[row] < 0 || positions[row] >= capacity) return TREADLE_BAD_ARGUMENT;
        read += 2 * (positions[row] + 1) * heads * size;
    }
    DecodeAttention a = {qkv,  positions, cos,  sin,   q_norm,   k_norm, scale_eps[0], scale_eps[1],
                         keys, values,    out,  heads, kv_heads, size,   capacity};
    int status = TREADLE_OK;
    parallel(threads_for(lane, read), rows, 1, [&](int64_t begin, int64_t end, int) {
        float* scratch = (float*)malloc((size_t)(HEADS_AT_ONCE * (MAX_HEAD + a.score_stride())) * sizeof(float));
        if (!scratch) return __atomic_store_n(&status, TREADLE_NO_MEMORY, __ATOMIC_RELAXED);
        for (int64_t row = begin; row < end; ++row) loops().attend(a, row, scratch);
        free(scratch);
    });
    return status;
}

int treadle_panel_product(const float* x, const float* panels, const float* bias, const float* residual, float* out,
                          int64_t rows, int64_t k, int64_t cols, uint64_t lane) {
    if (rows < 0 || k < 1 || cols < 1) return TREADLE_BAD_ARGUMENT;
    PanelProduct p = {x, panels, bias, residual, out, rows, k, cols};
    parallel(threads_for(lane, k * cols), cols, PANEL,
             [&](int64_t begin, int64_t end, int) { loops().panel_product(p, begin, end); });
    return TREADLE_OK;
}
