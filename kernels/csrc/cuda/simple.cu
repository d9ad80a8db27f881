// Digest and cast_diff.
#include "../build_id.h"
#include "common.cuh"

namespace treadle {
namespace {

// What one of `threads` threads adds up over signed integers of an element's width; one vector is 16 bytes.
template <class T>
__device__ __forceinline__ Lanes digest_run(const T* bits, int64_t n, uint64_t key, uint64_t k2, int64_t thread,
                                            int64_t threads) {
    constexpr int PER = 16 / sizeof(T);
    int64_t head = (int64_t)((16 - (uintptr_t)bits % 16) % 16 / sizeof(T));
    if (head > n) head = n;
    int64_t vectors = (n - head) / PER, tail = head + vectors * PER;
    Lanes mine = {0, 0};
    auto add = [&](T element, int64_t i) {
        Lanes h = mix((uint64_t)(int64_t)element, key + (uint64_t)i * PHI, k2);
        mine.first += h.first;
        mine.second += h.second;
    };
    for (int64_t v = thread; v < vectors; v += threads) {
        int4 loaded = *(const int4*)(bits + head + v * PER);
        T elements[PER];
        memcpy(elements, &loaded, 16);
#pragma unroll
        for (int i = 0; i < PER; ++i) add(elements[i], head + v * PER + i);
    }
    if (thread < head) add(bits[thread], thread);
    if (thread < n - tail) add(bits[tail + thread], tail + thread);
    return mine;
}

template <class T>
__global__ void digest_kernel(const T* bits, int64_t n, uint64_t key, uint64_t k2, uint64_t* lanes) {
    int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, threads = (int64_t)gridDim.x * THREADS;
    add_lanes(lanes, digest_run(bits, n, key, k2, thread, threads));
}

// Segments are dealt to thread blocks in turns. Few thread blocks go through all of them, so that the sums of few meet
// in the lanes.
__global__ void digest_pieces_kernel(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                                     int64_t segments, uint64_t* lanes) {
    Lanes mine = {0, 0};
    for (int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
        BlockOf block(pieces, count, s / SEGMENTS);
        const TreadlePiece& piece = *block.piece;
        int64_t start = block.start + s % SEGMENTS * SEGMENT, n = piece.n - start < SEGMENT ? piece.n - start : SEGMENT;
        if (n <= 0) continue;
        const char* at = (const char*)pointers[block.index] + start * piece.width;
        uint64_t key = piece.k1 + (uint64_t)(piece.flat_offset + start) * PHI;
        Lanes part = {0, 0};
        int64_t thread = threadIdx.x;
        switch (piece.width) {
            case 1: part = digest_run((const int8_t*)at, n, key, piece.k2, thread, THREADS); break;
            case 2: part = digest_run((const int16_t*)at, n, key, piece.k2, thread, THREADS); break;
            case 4: part = digest_run((const int32_t*)at, n, key, piece.k2, thread, THREADS); break;
            case 8: part = digest_run((const int64_t*)at, n, key, piece.k2, thread, THREADS); break;
        }
        mine.first += part.first;
        mine.second += part.second;
    }
    add_lanes(lanes, mine);
}

template <class T>
__global__ void digest_at_kernel(const int64_t* index, const T* bits, int64_t n, uint64_t k1, uint64_t k2,
                                 uint64_t* lanes) {
    Lanes mine = {0, 0};
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        Lanes h = mix((uint64_t)(int64_t)bits[i], k1 + (uint64_t)index[i] * PHI, k2);
        mine.first += h.first;
        mine.second += h.second;
    }
    add_lanes(lanes, mine);
}

// A thread block takes a segment, a warp 32 words of it, a lane one element of a word: all accesses are of neighbours,
// and the dirty word is the warp's vote.
__global__ void cast_diff_kernel(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                                 uint64_t* lanes, int64_t* changed) {
    BlockOf block(pieces, count, blockIdx.x / SEGMENTS);
    const int64_t* at = pointers + 3 * block.index;
    const float* master = (const float*)at[0];
    uint16_t* param = (uint16_t*)at[1];
    uint32_t* dirty = (uint32_t*)at[2];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t start = block.start + (int64_t)(blockIdx.x % SEGMENTS) * SEGMENT + warp * (SEGMENT / WARPS);
    uint64_t key = block.piece->k1 + (uint64_t)block.piece->flat_offset * PHI;
    Lanes mine = {0, 0};
    int total = 0;
#pragma unroll 4
    for (int w = 0; w < SEGMENT / WARPS / 32; ++w) {
        int64_t i = start + 32 * w + lane;
        bool inside = i < block.piece->n;
        uint16_t before = inside ? param[i] : 0, after = inside ? bf16_of(bits_of(master[i])) : 0;
        uint32_t word = __ballot_sync(ALL, before != after);
        if (!word) continue;
        if (before != after) {
            param[i] = after;
            Lanes h = mix_change(before, after, 2, key + (uint64_t)i * PHI, block.piece->k2);
            mine.first += h.first;
            mine.second += h.second;
        }
        if (lane == 0) {
            dirty[i / 32] |= word;
            total += __popc(word);
        }
    }
    add_lanes(lanes, mine);
    if (total) atomicAdd((u64*)changed, (u64)total);
}

template <class T, int KIND>
__global__ void reduce_kernel(const int64_t* inputs, int64_t count, int64_t n, T* out) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        float sum = widen<T, KIND>(((const T*)inputs[0])[i]);
        for (int64_t k = 1; k < count; ++k) sum += widen<T, KIND>(((const T*)inputs[k])[i]);
        out[i] = narrow<T, KIND>(sum);
    }
}

constexpr int64_t MOST_BLOCKS = 4096;  // enough to fill any GPU

// Few enough thread blocks that each has work.
unsigned grid_for(int64_t n) {
    int64_t blocks = (n + 16 * THREADS - 1) / (16 * THREADS);
    return (unsigned)(blocks < 1 ? 1 : blocks > MOST_BLOCKS ? MOST_BLOCKS : blocks);
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_ready(int) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return TREADLE_CUDA + (int)error;
    return devices ? TREADLE_OK : TREADLE_NO_DEVICE;
}

int treadle_digest(const void* bits, int64_t n, int64_t width, int64_t flat_offset, uint64_t k1, uint64_t k2,
                   uint64_t* lanes, uint64_t lane) {
    uint64_t key = k1 + (uint64_t)flat_offset * PHI;
    if (n < 0) return TREADLE_BAD_ARGUMENT;
    if (n == 0) return TREADLE_OK;
    switch (width) {
        case 1: TREADLE_LAUNCH(digest_kernel, grid_for(n), lane, (const int8_t*)bits, n, key, k2, lanes); break;
        case 2: TREADLE_LAUNCH(digest_kernel, grid_for(n), lane, (const int16_t*)bits, n, key, k2, lanes); break;
        case 4: TREADLE_LAUNCH(digest_kernel, grid_for(n), lane, (const int32_t*)bits, n, key, k2, lanes); break;
        case 8: TREADLE_LAUNCH(digest_kernel, grid_for(n), lane, (const int64_t*)bits, n, key, k2, lanes); break;
        default: return TREADLE_BAD_ARGUMENT;
    }
    return launched();
}

int treadle_digest_pieces(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                          uint64_t* lanes, uint64_t lane) {
    if (blocks == 0) return TREADLE_OK;
    int64_t segments = blocks * SEGMENTS, grid = segments < MOST_BLOCKS ? segments : MOST_BLOCKS;
    TREADLE_LAUNCH(digest_pieces_kernel, grid, lane, pieces, pointers, count, segments, lanes);
    return launched();
}

int treadle_digest_at(const int64_t* index, const void* bits, int64_t n, int64_t width, uint64_t k1, uint64_t k2,
                      uint64_t* lanes, uint64_t lane) {
    if (n < 0) return TREADLE_BAD_ARGUMENT;
    if (n == 0) return TREADLE_OK;
    unsigned grid = grid_for(n);
    switch (width) {
        case 1: TREADLE_LAUNCH(digest_at_kernel, grid, lane, index, (const int8_t*)bits, n, k1, k2, lanes); break;
        case 2: TREADLE_LAUNCH(digest_at_kernel, grid, lane, index, (const int16_t*)bits, n, k1, k2, lanes); break;
        case 4: TREADLE_LAUNCH(digest_at_kernel, grid, lane, index, (const int32_t*)bits, n, k1, k2, lanes); break;
        case 8: TREADLE_LAUNCH(digest_at_kernel, grid, lane, index, (const int64_t*)bits, n, k1, k2, lanes); break;
        default: return TREADLE_BAD_ARGUMENT;
    }
    return launched();
}

int treadle_cast_diff(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                      uint64_t* lanes, int64_t* changed, uint64_t lane) {
    if (blocks == 0) return TREADLE_OK;
    TREADLE_LAUNCH(cast_diff_kernel, blocks * SEGMENTS, lane, pieces, pointers, count, lanes, changed);
    return launched();
}

int treadle_reduce(const int64_t* inputs, int64_t count, int64_t n, int64_t kind, void* out, uint64_t lane) {
    if (count < 1 || kind < 0 || kind > 2) return TREADLE_BAD_ARGUMENT;
    if (n == 0) return TREADLE_OK;
    unsigned grid = grid_for(n);
    // In variables of their own: a launch is a macro, which would take the comma for one between its arguments.
    auto full = reduce_kernel<uint32_t, 0>;
    auto bf16 = reduce_kernel<uint16_t, 1>, f16 = reduce_kernel<uint16_t, 2>;
    if (kind == 0) TREADLE_LAUNCH(full, grid, lane, inputs, count, n, (uint32_t*)out);
    if (kind == 1) TREADLE_LAUNCH(bf16, grid, lane, inputs, count, n, (uint16_t*)out);
    if (kind == 2) TREADLE_LAUNCH(f16, grid, lane, inputs, count, n, (uint16_t*)out);
    return launched();
}
