// treadle_pack and treadle_unpack: a thread block per tile, in order, so that the first chunks are ready first.
#include "../tiles.h"
#include "common.cuh"

namespace treadle {
namespace {

struct Bucket {
    uint8_t* bytes;
    float* scales;
    u64* progress;
    const int64_t* expected;
    uint32_t* flags;
    int64_t chunk_bytes;
    uint32_t epoch;

    // The bytes were written before, by this thread or by others before a barrier. Fences on both sides of the count
    // make them visible to whoever sees the flag, a copy engine or a CPU included.
    __device__ void done(int64_t begin, int64_t end) const {
        __threadfence_system();
        each_chunk(begin, end, chunk_bytes, [&](int64_t chunk, int64_t size) {
            u64 before = atomicAdd(&progress[chunk], (u64)size);
            if ((int64_t)(before + (u64)size) != expected[chunk]) return;
            __threadfence_system();
            *(volatile uint32_t*)&flags[chunk] = epoch;
        });
    }
};

// Elements are moved in units of their width; alignment beyond it is the allocator's gift, not the bucket's promise.
template <class T>
__device__ void move_elements(const TreadleSegment& s, const Tile& t, void* tensor, uint8_t* bucket, bool pack) {
    T *outside = (T*)tensor, *inside = (T*)bucket;
    for (int64_t i = t.first + threadIdx.x; i < t.last; i += THREADS) {
        if (pack) inside[i] = outside[in_tensor(s, i)];
        else outside[in_tensor(s, i)] = inside[i];
    }
}

__device__ void move_any(const TreadleSegment& s, const Tile& t, void* tensor, uint8_t* bucket, bool pack) {
    switch (s.width) {
        case 1: return move_elements<uint8_t>(s, t, tensor, bucket, pack);
        case 2: return move_elements<uint16_t>(s, t, tensor, bucket, pack);
        case 4: return move_elements<uint32_t>(s, t, tensor, bucket, pack);
        default: return move_elements<uint64_t>(s, t, tensor, bucket, pack);
    }
}

__device__ void quantise(const TreadleSegment& s, const Tile& t, const void* tensor, const Bucket& b, int64_t form) {
    __shared__ u64 shared[WARPS];
    uint8_t* out = b.bytes + s.offset;
    u64 mine = 0, largest;
    int64_t elements = t.rows * SIDE;
    for (int64_t i = threadIdx.x; i < elements; i += THREADS) {
        int64_t r = t.row + i / SIDE, c = i % SIDE;
        u64 m = c < t.cols ? finite_magnitude(load_bf16(tensor, r * s.row_step + t.col + c, s.width)) : 0;
        mine = m > mine ? m : mine;
    }
    scan_before(mine, &largest, shared, Largest());
    float scale = block_scale((uint32_t)largest, form);
    if (threadIdx.x == 0) b.scales[t.scale] = scale;
    for (int64_t i = threadIdx.x; i < elements; i += THREADS) {
        int64_t r = t.row + i / SIDE, c = i % SIDE;
        if (c >= t.cols) continue;
        uint16_t value = load_bf16(tensor, r * s.row_step + t.col + c, s.width);
        out[r * s.cols + t.col + c] = e4m3_of(float_of_bf16(value) / scale);
    }
}

__global__ void pack_kernel(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t form,
                            Bucket b) {
    Tile t(segments, count, blockIdx.x, form);
    const TreadleSegment& s = segments[t.segment];
    void* tensor = (void*)tensors[t.segment];
    uint8_t* out = b.bytes + s.offset;
    int64_t bytes = bytes_in_bucket(form, s.width);
    if (form == TREADLE_COPY) move_any(s, t, tensor, out, true);
    if (form == TREADLE_BF16)
        for (int64_t i = t.first + threadIdx.x; i < t.last; i += THREADS)
            ((uint16_t*)out)[i] = bf16_of(((const uint32_t*)tensor)[in_tensor(s, i)]);
    if (is_fp8(form)) quantise(s, t, tensor, b, form);
    __syncthreads();
    if (is_fp8(form)) {
        if (threadIdx.x >= t.rows) return;
        int64_t first = s.offset + (t.row + threadIdx.x) * s.cols + t.col;
        b.done(first, first + t.cols);
    } else if (threadIdx.x == 0) {
        b.done(s.offset + t.first * bytes, s.offset + t.last * bytes);
    }
}

__global__ void unpack_kernel(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t form,
                              const uint8_t* bucket, const float* scales) {
    Tile t(segments, count, blockIdx.x, form);
    const TreadleSegment& s = segments[t.segment];
    void* tensor = (void*)tensors[t.segment];
    const uint8_t* in = bucket + s.offset;
    if (form == TREADLE_COPY) move_any(s, t, tensor, (uint8_t*)in, false);
    if (form == TREADLE_BF16) {
        for (int64_t i = t.first + threadIdx.x; i < t.last; i += THREADS) {
            uint16_t value = ((const uint16_t*)in)[i];
            if (s.width == 2) ((uint16_t*)tensor)[in_tensor(s, i)] = value;
            else ((uint32_t*)tensor)[in_tensor(s, i)] = (uint32_t)value << 16;
        }
    }
    if (!is_fp8(form)) return;
    float scale = scales[t.scale];
    for (int64_t i = threadIdx.x; i < t.rows * SIDE; i += THREADS) {
        int64_t r = t.row + i / SIDE, c = t.col + i % SIDE;
        if (i % SIDE >= t.cols) continue;
        store_float(tensor, r * s.row_step + c, s.width, float_of_e4m3(in[r * s.cols + c]) * scale);
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_pack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles, int64_t form,
                 uint8_t* bucket, float* scales, int64_t* progress, const int64_t* expected, uint32_t* flags,
                 int64_t chunks, int64_t chunk_bytes, int64_t epoch, uint64_t lane) {
    if (form < 0 || form > TREADLE_FP8_POW2 || chunk_bytes < 1) return TREADLE_BAD_ARGUMENT;
    if (tiles == 0) return TREADLE_OK;
    cudaMemsetAsync(progress, 0, (size_t)chunks * sizeof(int64_t), (cudaStream_t)lane);
    Bucket b = {bucket, scales, (u64*)progress, expected, flags, chunk_bytes, (uint32_t)epoch};
    TREADLE_LAUNCH(pack_kernel, tiles, lane, segments, tensors, count, form, b);
    return launched();
}

int treadle_unpack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles,
                   int64_t form, const uint8_t* bucket, const float* scales, uint64_t lane) {
    if (form < 0 || form > TREADLE_FP8_POW2) return TREADLE_BAD_ARGUMENT;
    if (tiles == 0) return TREADLE_OK;
    TREADLE_LAUNCH(unpack_kernel, tiles, lane, segments, tensors, count, form, bucket, scales);
    return launched();
}
