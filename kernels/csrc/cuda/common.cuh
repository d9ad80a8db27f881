// What the kernels share: launches, sums and scans over a thread block of THREADS threads.
#pragma once
#include <cuda_runtime.h>

#include "../abi.h"
#include "../codec.h"
#include "../maths.h"

#ifndef TREADLE_LAUNCH
#define TREADLE_LAUNCH(kernel, grid, lane, ...) \
    kernel<<<(unsigned)(grid), treadle::THREADS, 0, (cudaStream_t)(lane)>>>(__VA_ARGS__)
#endif

namespace treadle {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xFFFFFFFFu;
static_assert(THREADS == SEGMENT_WORDS, "a thread block goes through a segment word by word");

typedef unsigned long long u64;

inline int launched() {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? TREADLE_OK : TREADLE_CUDA + (int)error;
}

__device__ __forceinline__ void add_lanes(uint64_t* lanes, Lanes mine) {
    for (int offset = 16; offset; offset >>= 1) {
        mine.first += __shfl_down_sync(ALL, (u64)mine.first, offset);
        mine.second += __shfl_down_sync(ALL, (u64)mine.second, offset);
    }
    if (threadIdx.x % 32 == 0 && (mine.first | mine.second)) {
        atomicAdd((u64*)&lanes[0], (u64)mine.first);
        atomicAdd((u64*)&lanes[1], (u64)mine.second);
    }
}

struct Sum {
    __device__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Largest {
    __device__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};

// The combination of all threads before this one (0 for the first), and that of all in *total. `shared` holds
// WARPS numbers; no thread may be missing.
template <class Combine>
__device__ __forceinline__ u64 scan_before(u64 mine, u64* total, u64* shared, Combine combine) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = mine;
    for (int offset = 1; offset < 32; offset <<= 1) {
        u64 other = __shfl_up_sync(ALL, sum, offset);
        if (lane >= offset) sum = combine(other, sum);
    }
    u64 before = __shfl_up_sync(ALL, sum, 1);
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    u64 earlier = 0, whole = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) earlier = combine(earlier, shared[w]);
        whole = combine(whole, shared[w]);
    }
    __syncthreads();
    *total = whole;
    return lane ? combine(earlier, before) : earlier;
}

// The piece of a block, and what of it the block covers.
struct BlockOf {
    const TreadlePiece* piece;
    int64_t index, start, n;

    __device__ BlockOf(const TreadlePiece* pieces, int64_t count, int64_t block) {
        index = piece_of(pieces, count, block);
        piece = pieces + index;
        start = (block - piece->first_block) * BLOCK;
        n = piece->n - start < BLOCK ? piece->n - start : BLOCK;
    }
};

}  // namespace treadle
