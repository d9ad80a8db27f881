// treadle_delta_encode in four launches: mark what changed, measure every block, place the blocks, write them. A
// thread block takes a block of the delta and goes through its segments; a thread takes one word of 32 elements.
#include "common.cuh"

namespace treadle {
namespace {

// The caller's scratch.
struct Scratch {
    int64_t* offsets;      // [blocks]
    uint32_t* parameters;  // [blocks], k | j << 8
    uint32_t* bitmap;      // [blocks][WORDS], in pair mode

    __host__ __device__ Scratch(void* memory, int64_t blocks) {
        offsets = (int64_t*)memory;
        parameters = (uint32_t*)(offsets + blocks);
        bitmap = parameters + 2 * ((blocks + 1) / 2);
    }
};

// One block, and this thread's view of the segment at hand.
struct Reader {
    const void *now, *before;
    const uint32_t* words;
    int64_t n;
    int width;
    uint64_t* shared;
    uint32_t word;
    int at;        // position of the word's first element in the block
    int previous;  // last change before the word, -1 where there is none
    int carried;   // last change before the segment

    __device__ Reader(const BlockOf& block, const int64_t* pointers, uint32_t* bitmap, uint64_t* memory) {
        const int64_t* p = pointers + 3 * block.index;
        width = (int)block.piece->width;
        now = (const char*)p[0] + block.start * width;
        before = p[1] ? (const char*)p[1] + block.start * width : nullptr;
        words = p[1] ? bitmap + (int64_t)blockIdx.x * WORDS : (const uint32_t*)p[2] + block.start / 32;
        n = block.n;
        shared = memory;
        carried = -1;
    }
    // Loads the word of segment s; every thread takes part.
    __device__ void enter(int s) {
        at = s * SEGMENT + 32 * threadIdx.x;
        word = at < n ? words[at / 32] : 0;
        if (n - at < 32 && at < n) word &= (1u << (n - at)) - 1;
        u64 last = word ? (u64)(at + bit_length(word)) : 0, largest;
        u64 earlier = scan_before(last, &largest, (u64*)shared, Largest());
        previous = earlier ? (int)earlier - 1 : carried;
        if (largest) carried = (int)largest - 1;
    }
    // visit(position, gap, distance) for each change of the word, in order.
    template <class Visit>
    __device__ void each(Visit visit) const {
        int last = previous, start = at / SEGMENT * SEGMENT;
        for (uint32_t rest = word; rest; rest &= rest - 1) {
            int position = at + __ffs((int)rest) - 1;
            visit(position, position - last - 1, position - (last >= start ? last + 1 : start));
            last = position;
        }
    }
    __device__ uint32_t value(int position) const { return load_element(now, position, width); }
    __device__ int32_t step(int position) const {
        return ulp_step(load_element(before, position, width), value(position), width);
    }
    __device__ int segments() const { return (int)((n + SEGMENT - 1) / SEGMENT); }
};

__global__ void mark_kernel(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, uint32_t* bitmap) {
    int64_t index = blockIdx.x / SEGMENTS;
    BlockOf block(pieces, count, index);
    const int64_t* p = pointers + 3 * block.index;
    if (!p[1]) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = (int)block.piece->width;
    int first = (int)(blockIdx.x % SEGMENTS) * SEGMENT + warp * (SEGMENT / WARPS);
#pragma unroll 4
    for (int w = 0; w < SEGMENT / WARPS / 32; ++w) {
        int i = first + 32 * w + lane;
        bool differs = i < block.n && load_element((const void*)p[0], block.start + i, width) !=
                                          load_element((const void*)p[1], block.start + i, width);
        uint32_t word = __ballot_sync(ALL, differs);
        if (lane == 0) bitmap[index * WORDS + i / 32] = word;
    }
}

struct Histograms {
    uint32_t distances[DISTANCE_BITS + 1], magnitudes[33];
    uint64_t costs[2][32];
    int k, j;
};

// Both Rice parameters, from the middle of each class as rice_parameter does it, a candidate per thread.
__device__ void choose_parameters(Histograms& h, int width) {
    int t = threadIdx.x;
    if (t < 64) {
        int which = t / 32, k = t % 32, raw = which ? 8 * width : DISTANCE_BITS;
        const uint32_t* histogram = which ? h.magnitudes : h.distances;
        uint64_t bits = k < raw ? 0 : ~0ull;
        for (int b = 0; k < raw && b <= raw; ++b)
            bits += (uint64_t)histogram[b] * (uint64_t)rice_bits(class_middle(b), k, raw);
        h.costs[which][k] = bits;
    }
    __syncthreads();
    if (t < 2) {
        int best = 0;
        for (int k = 1; k < 32; ++k)
            if (h.costs[t][k] < h.costs[t][best]) best = k;
        (t ? h.j : h.k) = best;
    }
    __syncthreads();
}

__device__ int change_bits(int distance, int32_t step, int k, int j, int width) {
    return rice_bits((uint32_t)distance, k, DISTANCE_BITS) + rice_bits(magnitude(step), j, 8 * width) + 1;
}

__global__ void measure_kernel(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, bool steps,
                               uint32_t* table, Scratch scratch, int64_t* total) {
    __shared__ uint64_t shared[WARPS];
    __shared__ Histograms histograms;
    __shared__ u64 changed, skips, escapes, stream_bits[SEGMENTS];
    BlockOf block(pieces, count, blockIdx.x);
    Reader reader(block, pointers, scratch.bitmap, shared);
    steps = steps && reader.before;
    if (threadIdx.x < 33) histograms.magnitudes[threadIdx.x] = 0;
    if (threadIdx.x <= DISTANCE_BITS) histograms.distances[threadIdx.x] = 0;
    if (threadIdx.x < SEGMENTS) stream_bits[threadIdx.x] = 0;
    if (threadIdx.x == 0) changed = skips = escapes = 0;
    __syncthreads();
    for (int s = 0; s < reader.segments(); ++s) {
        reader.enter(s);
        u64 my_skips = 0, my_escapes = 0;
        reader.each([&](int position, int gap, int distance) {
            my_skips += gap / 255;
            if (!steps) return;
            int32_t step = reader.step(position);
            my_escapes += !is_nibble(step);
            atomicAdd(&histograms.distances[bit_length((uint32_t)distance)], 1u);
            atomicAdd(&histograms.magnitudes[bit_length(magnitude(step))], 1u);
        });
        if (reader.word) atomicAdd(&changed, (u64)__popc(reader.word));
        if (my_skips) atomicAdd(&skips, my_skips);
        if (my_escapes) atomicAdd(&escapes, my_escapes);
    }
    __syncthreads();
    if (steps) {
        choose_parameters(histograms, reader.width);
        reader.carried = -1;
        for (int s = 0; s < reader.segments(); ++s) {
            reader.enter(s);
            u64 bits = 0;
            reader.each([&](int position, int, int distance) {
                bits += change_bits(distance, reader.step(position), histograms.k, histograms.j, reader.width);
            });
            if (bits) atomicAdd(&stream_bits[s], bits);
        }
        __syncthreads();
    }
    if (threadIdx.x) return;
    int64_t rice = steps ? 2 + 2 * reader.segments() : 0;
    for (int s = 0; steps && rice && s < reader.segments(); ++s) {
        int64_t bytes = (int64_t)(stream_bits[s] + 7) / 8;
        rice = bytes <= 65535 ? rice + bytes : 0;
    }
    Counts counts = {block.n, (int64_t)changed, (int64_t)skips, (int64_t)escapes, rice};
    uint32_t entry = choose(counts, reader.width, steps);
    table[blockIdx.x] = entry;
    scratch.parameters[blockIdx.x] = steps ? (uint32_t)(histograms.k | histograms.j << 8) : 0;
    atomicAdd((u64*)&total[1], (entry >> 28) == DENSE ? (u64)block.n : changed);
}

// A single thread block: the table is small beside the weights.
__global__ void place_kernel(const uint32_t* table, int64_t blocks, int64_t* offsets, int64_t* total) {
    __shared__ u64 shared[WARPS];
    u64 placed = 0;
    for (int64_t tile = 0; tile < blocks; tile += THREADS) {
        int64_t b = tile + threadIdx.x;
        u64 sum;
        u64 before = scan_before(b < blocks ? table[b] & BYTES_MASK : 0, &sum, shared, Sum());
        if (b < blocks) offsets[b] = (int64_t)(placed + before);
        placed += sum;
    }
    if (threadIdx.x == 0) total[0] = (int64_t)placed;
}

// Bits are OR-ed into zeroed memory, since neighbours share words.
__device__ void put_bits(uint8_t* base, int64_t bit, uint64_t code, int count) {
    uintptr_t address = (uintptr_t)base + (uintptr_t)(bit / 8);
    uint32_t* word = (uint32_t*)(address & ~(uintptr_t)3);
    int shift = (int)(bit % 8) + 8 * (int)(address & 3);
    for (; count > 0; ++word) {
        uint32_t part = (uint32_t)(code << shift);
        if (part) atomicOr(word, part);
        int taken = 32 - shift;
        code = taken < 64 ? code >> taken : 0;
        count -= taken;
        shift = 0;
    }
}

__device__ void put_value(uint8_t* out, uint32_t value, int width) {
    for (int i = 0; i < width; ++i) out[i] = (uint8_t)(value >> (8 * i));
}

__device__ void put_gap(uint8_t* out, int gap) {
    for (; gap >= 255; gap -= 255) *out++ = 255;
    *out = (uint8_t)gap;
}

// Running totals of a block, 16 bits each, and those of one segment's stream: all scanned as one number.
constexpr int SKIPS = 15, ESCAPES = 29, BITS = 43;

__device__ void write_positions(Reader& r, uint8_t* out, int encoding, int64_t changed, int64_t escapes) {
    int64_t rank = 0, skips = 0, escaped = 0;
    uint8_t* values = out + (encoding == BITMAP ? (r.n + 7) / 8 : encoding == INDEX ? 2 * changed : 2);
    if (encoding == GAP_STEP) values += (changed + 1) / 2;
    uint8_t* gaps = values + (encoding == GAP_STEP ? escapes : changed) * r.width;
    if (threadIdx.x == 0 && encoding >= GAP) put_value(out, (uint32_t)(changed - 1), 2);
    for (int s = 0; s < r.segments(); ++s) {
        r.enter(s);
        u64 mine = (u64)__popc(r.word), all;
        r.each([&](int position, int gap, int) {
            mine += (u64)(gap / 255) << SKIPS;
            if (encoding == GAP_STEP) mine += (u64)!is_nibble(r.step(position)) << ESCAPES;
        });
        u64 before = scan_before(mine, &all, (u64*)r.shared, Sum());
        const u64 mask = (1u << 14) - 1;
        int64_t i = rank + (int64_t)(before & mask), g = skips + (int64_t)(before >> SKIPS & mask);
        int64_t e = escaped + (int64_t)(before >> ESCAPES & mask);
        if (encoding == BITMAP)
            for (int b = 0; b < 4 && r.at + 8 * b < r.n; ++b) out[r.at / 8 + b] = (uint8_t)(r.word >> (8 * b));
        r.each([&](int position, int gap, int) {
            int32_t step = encoding == GAP_STEP ? r.step(position) : 0;
            bool nibble = encoding == GAP_STEP && is_nibble(step);
            if (nibble) put_bits(out + 2, 4 * i, (uint64_t)(step & 15), 4);
            else put_value(values + (encoding == GAP_STEP ? e++ : i) * r.width, r.value(position), r.width);
            if (encoding == INDEX) put_value(out + 2 * i, (uint32_t)position, 2);
            if (encoding >= GAP) put_gap(gaps + i + g, gap);
            g += gap / 255;
            ++i;
        });
        rank += (int64_t)(all & mask);
        skips += (int64_t)(all >> SKIPS & mask);
        escaped += (int64_t)(all >> ESCAPES & mask);
    }
}

__device__ void write_rice(Reader& r, uint8_t* out, uint32_t parameters) {
    int k = (int)(parameters & 255), j = (int)(parameters >> 8), streams = r.segments();
    uint8_t* stream = out + 2 + 2 * streams;
    if (threadIdx.x == 0) put_value(out, parameters, 2);
    for (int s = 0; s < streams; ++s) {
        r.enter(s);
        u64 mine = 0, all;
        r.each([&](int position, int, int distance) {
            mine += change_bits(distance, r.step(position), k, j, r.width);
        });
        int64_t bit = (int64_t)scan_before(mine, &all, (u64*)r.shared, Sum());
        r.each([&](int position, int, int distance) {
            int32_t step = r.step(position);
            uint32_t m = magnitude(step);
            int head = rice_bits((uint32_t)distance, k, DISTANCE_BITS), tail = rice_bits(m, j, 8 * r.width);
            put_bits(stream, bit, rice_code((uint32_t)distance, k), head);
            put_bits(stream, bit + head, rice_code(m, j) | (uint64_t)(step < 0) << tail, tail + 1);
            bit += head + tail + 1;
        });
        int64_t bytes = (int64_t)(all + 7) / 8;
        if (threadIdx.x == 0) {
            put_value(out + 2 + 2 * s, (uint32_t)bytes, 2);
            int padding = (int)(8 * bytes - (int64_t)all);
            put_bits(stream, (int64_t)all, (1u << padding) - 1, padding);
        }
        stream += bytes;
    }
}

__global__ void write_kernel(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                             const uint32_t* table, Scratch scratch, uint8_t* payload, int64_t capacity) {
    __shared__ uint64_t shared[WARPS];
    BlockOf block(pieces, count, blockIdx.x);
    Reader reader(block, pointers, scratch.bitmap, shared);
    uint32_t entry = table[blockIdx.x];
    int encoding = (int)(entry >> 28);
    int64_t size = entry & BYTES_MASK, offset = scratch.offsets[blockIdx.x];
    if (offset + size > capacity) return;
    uint8_t* out = payload + offset;
    if (encoding == DENSE) {
        for (int64_t i = threadIdx.x; i < size; i += THREADS) out[i] = ((const uint8_t*)reader.now)[i];
    } else if (encoding == RICE) {
        write_rice(reader, out, scratch.parameters[blockIdx.x]);
    } else if (encoding != EMPTY) {
        u64 changed = 0, escapes = 0, all;
        for (int s = 0; s < reader.segments(); ++s) {
            reader.enter(s);
            changed += __popc(reader.word);
            if (encoding == GAP_STEP)
                reader.each([&](int position, int, int) { escapes += !is_nibble(reader.step(position)); });
        }
        scan_before(changed | escapes << 32, &all, (u64*)shared, Sum());
        reader.carried = -1;
        write_positions(reader, out, encoding, (int64_t)(all & 0xFFFFFFFFu), (int64_t)(all >> 32));
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int64_t treadle_delta_scratch(int64_t blocks) { return 8 * blocks + 8 * ((blocks + 1) / 2) + 4 * WORDS * blocks; }

int treadle_delta_encode(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                         int64_t steps, uint32_t* table, uint8_t* payload, int64_t capacity, int64_t* total,
                         void* memory, uint64_t lane) {
    if (blocks == 0) return TREADLE_OK;
    Scratch scratch(memory, blocks);
    cudaMemsetAsync(total, 0, 16, (cudaStream_t)lane);
    cudaMemsetAsync(payload, 0, (size_t)capacity, (cudaStream_t)lane);
    TREADLE_LAUNCH(mark_kernel, blocks * SEGMENTS, lane, pieces, pointers, count, scratch.bitmap);
    TREADLE_LAUNCH(measure_kernel, blocks, lane, pieces, pointers, count, steps != 0, table, scratch, total);
    TREADLE_LAUNCH(place_kernel, 1, lane, table, blocks, scratch.offsets, total);
    TREADLE_LAUNCH(write_kernel, blocks, lane, pieces, pointers, count, table, scratch, payload, capacity);
    return launched();
}
