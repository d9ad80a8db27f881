// treadle_scatter_rows and treadle_combine_rows: tokens, shared among threads.
#include "../abi.h"
#include "../maths.h"
#include "parallel.h"

namespace treadle {
namespace {

constexpr int64_t ROWS_PER_THREAD = 16;

template <class T, int KIND>
void combine(const T* rows, const int32_t* row_of, const float* weights, int64_t k, int64_t width, T* out) {
    for (int64_t c = 0; c < width; ++c) {
        float sum = 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            if (row_of[j] < 0) continue;
            float value = widen<T, KIND>(rows[row_of[j] * width + c]);
            sum += weights ? weights[j] * value : value;
        }
        out[c] = narrow<T, KIND>(sum);
    }
}

template <class T, int KIND>
void combine_all(const void* rows, const int32_t* row_of, const float* weights, int64_t tokens, int64_t k,
                 int64_t width, void* out, uint64_t lane) {
    parallel(lane, tokens, ROWS_PER_THREAD, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t)
            combine<T, KIND>((const T*)rows, row_of + t * k, weights ? weights + t * k : nullptr, k, width,
                             (T*)out + t * width);
    });
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_scatter_rows(const uint8_t* rows, int64_t row_bytes, const int32_t* row_of, const int32_t* expert_of,
                         int64_t pairs, int64_t k, uint8_t* out, int32_t* missing, uint32_t* flags, int64_t experts,
                         int64_t epoch, uint64_t lane) {
    if (k < 1 || row_bytes < 0) return TREADLE_BAD_ARGUMENT;
    for (int64_t e = 0; e < experts; ++e)
        if (missing[e] == 0) __atomic_store_n(&flags[e], (uint32_t)epoch, __ATOMIC_RELEASE);
    parallel(lane, pairs, ROWS_PER_THREAD, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            if (row_of[i] < 0) continue;
            memcpy(out + row_of[i] * row_bytes, rows + i / k * row_bytes, (size_t)row_bytes);
            int32_t e = expert_of[i];
            if (__atomic_sub_fetch(&missing[e], 1, __ATOMIC_ACQ_REL) == 0)
                __atomic_store_n(&flags[e], (uint32_t)epoch, __ATOMIC_RELEASE);
        }
    });
    return TREADLE_OK;
}

int treadle_combine_rows(const void* rows, int64_t kind, const int32_t* row_of, const float* weights, int64_t tokens,
                         int64_t k, int64_t width, void* out, uint64_t lane) {
    switch (kind) {
        case 0: combine_all<uint32_t, 0>(rows, row_of, weights, tokens, k, width, out, lane); break;
        case 1: combine_all<uint16_t, 1>(rows, row_of, weights, tokens, k, width, out, lane); break;
        case 2: combine_all<uint16_t, 2>(rows, row_of, weights, tokens, k, width, out, lane); break;
        default: return TREADLE_BAD_ARGUMENT;
    }
    return TREADLE_OK;
}
