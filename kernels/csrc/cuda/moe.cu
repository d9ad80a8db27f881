// treadle_scatter_rows and treadle_combine_rows: a thread block per pair, or per token.
#include "common.cuh"

namespace treadle {
namespace {

__global__ void scatter_kernel(const uint8_t* rows, int64_t row_bytes, const int32_t* row_of,
                               const int32_t* expert_of, int64_t pairs, int64_t k, uint8_t* out, int* missing,
                               uint32_t* flags, int64_t experts, uint32_t epoch) {
    int64_t i = blockIdx.x;
    if (i == pairs) {
        // Experts without rows. One that others have just finished is found finished here too.
        for (int64_t e = threadIdx.x; e < experts; e += THREADS)
            if (atomicAdd(&missing[e], 0) == 0) *(volatile uint32_t*)&flags[e] = epoch;
        return;
    }
    if (row_of[i] < 0) return;
    const uint8_t* from = rows + i / k * row_bytes;
    uint8_t* to = out + row_of[i] * row_bytes;
    if (((uintptr_t)rows | (uintptr_t)out | (uintptr_t)row_bytes) % 16 == 0) {
        for (int64_t b = threadIdx.x; b < row_bytes / 16; b += THREADS) ((int4*)to)[b] = ((const int4*)from)[b];
    } else {
        for (int64_t b = threadIdx.x; b < row_bytes; b += THREADS) to[b] = from[b];
    }
    // Every thread's part must be visible before the count, and the count before the flag.
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x) return;
    if (atomicAdd(&missing[expert_of[i]], -1) != 1) return;
    __threadfence_system();
    *(volatile uint32_t*)&flags[expert_of[i]] = epoch;
}

template <class T, int KIND>
__global__ void combine_kernel(const T* rows, const int32_t* row_of, const float* weights, int64_t k, int64_t width,
                               T* out) {
    int64_t t = blockIdx.x;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        float sum = 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            int64_t row = row_of[t * k + j];
            if (row < 0) continue;
            float value = widen<T, KIND>(rows[row * width + c]);
            sum += weights ? weights[t * k + j] * value : value;
        }
        out[t * width + c] = narrow<T, KIND>(sum);
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_scatter_rows(const uint8_t* rows, int64_t row_bytes, const int32_t* row_of, const int32_t* expert_of,
                         int64_t pairs, int64_t k, uint8_t* out, int32_t* missing, uint32_t* flags, int64_t experts,
                         int64_t epoch, uint64_t lane) {
    if (k < 1 || row_bytes < 0) return TREADLE_BAD_ARGUMENT;
    TREADLE_LAUNCH(scatter_kernel, pairs + 1, lane, rows, row_bytes, row_of, expert_of, pairs, k, out, missing, flags,
                   experts, (uint32_t)epoch);
    return launched();
}

int treadle_combine_rows(const void* rows, int64_t kind, const int32_t* row_of, const float* weights, int64_t tokens,
                         int64_t k, int64_t width, void* out, uint64_t lane) {
    if (kind < 0 || kind > 2) return TREADLE_BAD_ARGUMENT;
    if (tokens == 0) return TREADLE_OK;
    auto full = combine_kernel<uint32_t, 0>;
    auto bf16 = combine_kernel<uint16_t, 1>, f16 = combine_kernel<uint16_t, 2>;
    const uint16_t* half = (const uint16_t*)rows;
    if (kind == 0)
        TREADLE_LAUNCH(full, tokens, lane, (const uint32_t*)rows, row_of, weights, k, width, (uint32_t*)out);
    if (kind == 1) TREADLE_LAUNCH(bf16, tokens, lane, half, row_of, weights, k, width, (uint16_t*)out);
    if (kind == 2) TREADLE_LAUNCH(f16, tokens, lane, half, row_of, weights, k, width, (uint16_t*)out);
    return launched();
}
