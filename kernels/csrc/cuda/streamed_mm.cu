// treadle_streamed_mm: a thread block per tile of 128 × 64, in the order of the rows. It waits for the chunks its rows
// lie in and multiplies with tensor cores; whoever fills `a` must not need a multiprocessor for it (copy engines do
// not), or waiting blocks could keep it from running until the deadline.
#include <time.h>

#include "common.cuh"

namespace treadle {
namespace {

constexpr int64_t NONE = INT64_MAX;
constexpr int TILE_M = 128, TILE_N = 64, TILE_K = 32, PITCH = TILE_K + 8;  // the pitch spreads rows over the banks
constexpr int COLUMNS = TILE_N / 8;  // products of 16 × 8 × 16 side by side, which a warp does for its 16 rows
static_assert(WARPS * 16 == TILE_M, "a warp takes 16 rows");

__device__ uint32_t load_acquire(const uint32_t* p) {
#ifdef __CUDA_ARCH__
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
#else
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

__device__ int64_t now_ns() {
#ifdef __CUDA_ARCH__
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return (int64_t)t;
#else
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
#endif
}

// Past the first cache: a line of it may hold the end of one chunk and what the next one was before it came.
__device__ int4 load_arrived(const uint16_t* p) {
#ifdef __CUDA_ARCH__
    return __ldcg((const int4*)p);
#else
    return *(const int4*)p;
#endif
}

struct Product {
    const uint16_t *a, *b;
    uint16_t* out;
    int64_t m, n, k;
    const uint32_t* ready;
    int64_t chunk_rows;
    uint32_t epoch;
    int64_t deadline_ns;
    int64_t* verdict;

    // Whether rows [row, row + TILE_M) have all come before the deadline, or another block's has passed.
    __device__ bool wait(int64_t row) const {
        int64_t last = (row + TILE_M < m ? row + TILE_M : m) - 1, start = now_ns();
        for (int64_t c = row / chunk_rows; c <= last / chunk_rows; ++c)
            while ((int32_t)(load_acquire(&ready[c]) - epoch) < 0) {
                if (*(volatile int64_t*)verdict != NONE) return false;
                if (now_ns() - start > deadline_ns) {
                    atomicMin((long long*)verdict, (long long)c);
                    return false;
                }
#ifdef __CUDA_ARCH__
                __nanosleep(200);
#endif
            }
        return true;
    }
};

struct Tiles {
    alignas(16) uint16_t a[TILE_M][PITCH];
    alignas(16) uint16_t b[TILE_N][PITCH];  // transposed: neighbours in k are neighbours in memory
};

__device__ void load_tiles(Tiles& tiles, const Product& p, int64_t row, int64_t col, int64_t from) {
    const int4 zero = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < TILE_M * TILE_K / 8; i += THREADS) {
        int r = i / (TILE_K / 8), c = i % (TILE_K / 8) * 8;
        bool inside = row + r < p.m && from + c < p.k;
        *(int4*)&tiles.a[r][c] = inside ? load_arrived(p.a + (row + r) * p.k + from + c) : zero;
    }
    for (int i = threadIdx.x; i < TILE_K * TILE_N / 8; i += THREADS) {
        int r = i / (TILE_N / 8), c = i % (TILE_N / 8) * 8;
        bool inside = from + r < p.k && col + c < p.n;
        int4 loaded = inside ? *(const int4*)(p.b + (from + r) * p.n + col + c) : zero;
        uint16_t elements[8];
        memcpy(elements, &loaded, 16);
#pragma unroll
        for (int e = 0; e < 8; ++e) tiles.b[c + e][r] = elements[e];
    }
}

__device__ __forceinline__ uint32_t pair_at(const uint16_t* p) { return *(const uint32_t*)p; }

// sums += a · b for 16 rows of a and 8 columns of b, over 16 of k; the layout of a lane's four sums is that of
// mma.m16n8k16: rows lane / 4 and 8 further on, columns lane % 4 · 2 and the next.
template <int KIND>
__device__ __forceinline__ void multiply_add(float* sums, const uint16_t (*a)[PITCH], const uint16_t (*b)[PITCH],
                                             int from) {
    int lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
#ifdef __CUDA_ARCH__
    uint32_t a0 = pair_at(&a[row][from + pair]), a1 = pair_at(&a[row + 8][from + pair]);
    uint32_t a2 = pair_at(&a[row][from + pair + 8]), a3 = pair_at(&a[row + 8][from + pair + 8]);
    uint32_t b0 = pair_at(&b[row][from + pair]), b1 = pair_at(&b[row][from + pair + 8]);
    if (KIND == 1)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    for (int s = 0; s < 4; ++s)
        for (int i = from; i < from + 16; ++i)
            sums[s] += widen<uint16_t, KIND>(a[row + s / 2 * 8][i]) * widen<uint16_t, KIND>(b[pair + s % 2][i]);
#endif
}

template <int KIND>
__global__ void streamed_kernel(Product p) {
    __shared__ Tiles tiles;
    __shared__ int late;
    int64_t across = (p.n + TILE_N - 1) / TILE_N;
    int64_t row = blockIdx.x / across * TILE_M, col = blockIdx.x % across * TILE_N;
    if (threadIdx.x == 0) late = !p.wait(row);
    __syncthreads();
    if (late) return;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    float sums[COLUMNS][4] = {};
    for (int64_t from = 0; from < p.k; from += TILE_K) {
        load_tiles(tiles, p, row, col, from);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE_K; i += 16)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) multiply_add<KIND>(sums[c], &tiles.a[first], &tiles.b[8 * c], i);
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            int64_t r = row + first + lane / 4 + s / 2 * 8, n = col + 8 * c + lane % 4 * 2 + s % 2;
            if (r < p.m && n < p.n) p.out[r * p.n + n] = narrow<uint16_t, KIND>(sums[c][s]);
        }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_streamed_mm(const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k, int64_t kind,
                        const uint32_t* ready, int64_t chunk_rows, int64_t epoch, int64_t deadline_us,
                        int64_t* verdict, uint64_t lane) {
    if (m < 0 || n < 0 || k < 0 || kind < 1 || kind > 2 || chunk_rows < 1) return TREADLE_BAD_ARGUMENT;
    if (n % 8 || k % 8 || ((uintptr_t)a | (uintptr_t)b) % 16) return TREADLE_BAD_ARGUMENT;
    int64_t grid = (m + TILE_M - 1) / TILE_M * ((n + TILE_N - 1) / TILE_N);
    if (grid == 0) return TREADLE_OK;
    Product p = {(const uint16_t*)a, (const uint16_t*)b, (uint16_t*)out, m,     n, k, ready, chunk_rows,
                 (uint32_t)epoch,    1000 * deadline_us, verdict};
    auto bf16 = streamed_kernel<1>, f16 = streamed_kernel<2>;
    if (kind == 1) TREADLE_LAUNCH(bf16, grid, lane, p);
    else TREADLE_LAUNCH(f16, grid, lane, p);
    return launched();
}
