// treadle_delta_check and treadle_delta_apply. A thread block takes a block of the delta. Every reader calls
// visit(position, is_step, value) with positions within the block, in any order, and notes what is wrong; which of
// several defects of one block is reported is left open.
#include "common.cuh"

namespace treadle {
namespace {

constexpr long long NONE = INT64_MAX;

struct Job {
    const TreadlePiece* pieces;
    int64_t count, blocks;
    const uint32_t* table;
    const int64_t* offsets;
    const uint8_t* payload;
    int64_t size;
    const TreadleRectangle* rectangles;
    const int64_t* first_rectangle;
    const int64_t* destinations;
};

// The bytes of one block and what they are said to be; `found` and `shared` are the thread block's.
struct Input {
    const uint8_t* bytes;
    int64_t size, n;
    int encoding, width;
    int* found;
    u64* shared;

    __device__ void fail(int verdict) const { atomicMax(found, verdict); }
};

template <class Visit>
__device__ void read_dense(const Input& b, Visit visit) {
    if (b.size != b.n * b.width) return b.fail(TREADLE_CORRUPT);
    for (int64_t i = threadIdx.x; i < b.n; i += THREADS)
        visit(i, false, load_bits(b.bytes + i * b.width, b.width));
}

__device__ uint32_t bitmap_word(const Input& b, int64_t w, int64_t head) {
    int64_t left = head - 4 * w;
    return left > 0 ? load_bits(b.bytes + 4 * w, left < 4 ? (int)left : 4) : 0;
}

template <class Visit>
__device__ int64_t read_bitmap(const Input& b, Visit visit) {
    int64_t head = (b.n + 7) / 8, count = 0;
    u64 all, mine = 0;
    if (b.size < head) return b.fail(TREADLE_CORRUPT), 0;
    for (int64_t w = threadIdx.x; 4 * w < head; w += THREADS) mine += __popc(bitmap_word(b, w, head));
    scan_before(mine, &all, b.shared, Sum());
    if (b.size != head + (int64_t)all * b.width) return b.fail(TREADLE_CORRUPT), 0;
    if (b.n % 8 && b.bytes[head - 1] >> (b.n % 8)) return b.fail(TREADLE_OUTSIDE), 0;
    for (int64_t tile = 0; 4 * tile < head; tile += THREADS) {
        uint32_t word = bitmap_word(b, tile + threadIdx.x, head);
        int64_t i = count + (int64_t)scan_before(__popc(word), &all, b.shared, Sum());
        for (; word; word &= word - 1, ++i)
            visit(32 * (tile + threadIdx.x) + __ffs((int)word) - 1, false,
                  load_bits(b.bytes + head + i * b.width, b.width));
        count += (int64_t)all;
    }
    return count;
}

template <class Visit>
__device__ int64_t read_index(const Input& b, Visit visit) {
    int64_t count = b.size / (2 + b.width);
    if (b.size != count * (2 + b.width)) return b.fail(TREADLE_CORRUPT), 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) {
        int64_t position = load_bits(b.bytes + 2 * i, 2);
        int64_t previous = i ? (int64_t)load_bits(b.bytes + 2 * (i - 1), 2) : -1;
        if (position >= b.n) b.fail(TREADLE_OUTSIDE);
        else if (position <= previous) b.fail(TREADLE_CORRUPT);
        else visit(position, false, load_bits(b.bytes + 2 * count + i * b.width, b.width));
    }
    return count;
}

// visit(position, i) for the gaps that lie at the block's end; all threads call `visit`, those without an element
// with i = -1, so that it may scan.
template <class Visit>
__device__ void read_gaps(const Input& b, const uint8_t* gaps, int64_t count, Visit visit) {
    int64_t bytes = b.bytes + b.size - gaps, reached = 0, rank = 0;
    if (bytes > 0 && gaps[bytes - 1] == 255) return b.fail(TREADLE_CORRUPT);
    for (int64_t tile = 0; tile < bytes; tile += THREADS) {
        int64_t at = tile + threadIdx.x;
        u64 all, byte = at < bytes ? gaps[at] : 255;
        u64 advance = at >= bytes ? 0 : byte == 255 ? 255 : byte + 1, emits = byte != 255;
        u64 before = scan_before(advance | emits << 32, &all, b.shared, Sum());
        int64_t position = reached + (int64_t)(before & 0xFFFFFFFFu) + (int64_t)byte;
        int64_t i = rank + (int64_t)(before >> 32);
        if (emits && i < count && position >= b.n) b.fail(TREADLE_OUTSIDE);
        visit(position, emits && i < count && position < b.n ? i : -1);
        reached += (int64_t)(all & 0xFFFFFFFFu);
        rank += (int64_t)(all >> 32);
    }
    if (rank != count) b.fail(TREADLE_CORRUPT);
}

template <class Visit>
__device__ int64_t read_gap(const Input& b, Visit visit) {
    int64_t count = b.size < 2 ? 0 : load_bits(b.bytes, 2) + 1;
    if (b.size < 2 + count * b.width || count == 0) return b.fail(TREADLE_CORRUPT), 0;
    const uint8_t* values = b.bytes + 2;
    read_gaps(b, values + count * b.width, count, [&](int64_t position, int64_t i) {
        if (i >= 0) visit(position, false, load_bits(values + i * b.width, b.width));
    });
    return count;
}

__device__ uint32_t nibble_at(const uint8_t* nibbles, int64_t i) { return nibbles[i / 2] >> (4 * (i % 2)) & 15; }

template <class Visit>
__device__ int64_t read_gap_step(const Input& b, Visit visit) {
    int64_t count = b.size < 2 ? 0 : load_bits(b.bytes, 2) + 1, escaped = 0;
    const uint8_t* nibbles = b.bytes + 2;
    if (b.size < 2 + (count + 1) / 2 || count == 0) return b.fail(TREADLE_CORRUPT), 0;
    u64 mine = 0, escapes;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) mine += nibble_at(nibbles, i) == 0;
    scan_before(mine, &escapes, b.shared, Sum());
    const uint8_t* values = nibbles + (count + 1) / 2;
    if (b.size < values - b.bytes + (int64_t)escapes * b.width) return b.fail(TREADLE_CORRUPT), 0;
    // Nibbles of elements that are refused would shift the values of later ones: nothing is written then.
    read_gaps(b, values + (int64_t)escapes * b.width, count, [&](int64_t position, int64_t i) {
        uint32_t nibble = i >= 0 ? nibble_at(nibbles, i) : 1;
        u64 all;
        int64_t e = escaped + (int64_t)scan_before(nibble == 0, &all, b.shared, Sum());
        escaped += (int64_t)all;
        if (i >= 0 && nibble) visit(position, true, (uint32_t)((int32_t)(nibble << 28) >> 28));
        if (i >= 0 && !nibble) visit(position, false, load_bits(values + e * b.width, b.width));
    });
    return count;
}

// A thread per stream; the count of changes is this thread's own.
template <class Visit>
__device__ int64_t read_rice(const Input& b, Visit visit) {
    int64_t streams = (b.n + SEGMENT - 1) / SEGMENT, at = 2 + 2 * streams, count = 0;
    if (b.size < at || b.bytes[0] >= DISTANCE_BITS || b.bytes[1] >= 8 * b.width)
        return b.fail(TREADLE_CORRUPT), 0;
    int64_t mine = threadIdx.x, my_start = 0, my_size = 0;
    for (int64_t s = 0; s < streams; ++s) {
        int64_t size = load_bits(b.bytes + 2 + 2 * s, 2);
        if (s == mine) my_start = at, my_size = size;
        at += size;
    }
    if (at != b.size) return b.fail(TREADLE_CORRUPT), 0;
    if (mine >= streams) return 0;
    int64_t start = mine * SEGMENT, n = b.n - start < SEGMENT ? b.n - start : SEGMENT;
    bool whole = read_stream(b.bytes + my_start, my_size, b.bytes[0], b.bytes[1], b.width, n,
                             [&](int64_t position, int32_t step) {
                                 ++count;
                                 visit(start + position, true, (uint32_t)step);
                             });
    if (!whole) b.fail(TREADLE_CORRUPT);
    return count;
}

// Reads a block and returns this thread's share of its elements.
template <class Visit>
__device__ int64_t read_block(const Input& b, Visit visit) {
    int64_t elements = 0;
    switch (b.encoding) {
        case EMPTY:
            if (b.size) b.fail(TREADLE_CORRUPT);
            return 0;
        case DENSE: read_dense(b, visit); elements = b.n; break;
        case BITMAP: elements = read_bitmap(b, visit); break;
        case INDEX: elements = read_index(b, visit); break;
        case GAP: elements = read_gap(b, visit); break;
        case GAP_STEP: elements = read_gap_step(b, visit); break;
        case RICE: return read_rice(b, visit);
        default: b.fail(TREADLE_CORRUPT);
    }
    return threadIdx.x == 0 ? elements : 0;
}

__device__ int64_t place_in(const TreadleRectangle& r, int64_t element) {
    int64_t d = element - r.start;
    if (d < 0 || d >= (r.rows - 1) * r.stride + r.cols) return -1;
    int64_t row = r.rows == 1 ? 0 : d / r.stride, col = d - row * r.stride;
    return col < r.cols ? r.offset + row * r.row_step + col * r.col_step : -1;
}

template <bool WRITE>
__global__ void delta_kernel(Job job, uint64_t* lanes, const uint64_t* wanted, const uint64_t* expected,
                             int64_t* verdict) {
    __shared__ u64 shared[WARPS];
    __shared__ int found, refused;
    if (threadIdx.x == 0) {
        // One thread decides for its thread block: others may change the verdict meanwhile.
        found = 0;
        refused = WRITE && verdict[0] != NONE;
        if (WRITE && expected && (expected[0] != wanted[0] || expected[1] != wanted[1])) {
            refused = 1;
            if (verdict[0] == NONE) atomicMin((long long*)verdict, (long long)TREADLE_MISMATCH);
        }
    }
    __syncthreads();
    if (refused) return;
    int64_t index = blockIdx.x, at = job.offsets[index], bytes = job.table[index] & BYTES_MASK;
    int64_t next = index + 1 < job.blocks ? job.offsets[index + 1] : job.size;
    BlockOf block(job.pieces, job.count, index);
    const TreadlePiece& piece = *block.piece;
    int width = (int)piece.width;
    Input input = {job.payload + at, bytes, block.n, (int)(job.table[index] >> 28), width, &found, shared};
    int64_t first = job.first_rectangle[block.index], last = job.first_rectangle[block.index + 1], elements = 0;
    Lanes mine = {0, 0};
    if (at < 0 || next > job.size || next - at != bytes || (index == 0 && at)) {
        input.fail(TREADLE_CORRUPT);
    } else {
        elements = read_block(input, [&](int64_t position, bool is_step, uint32_t value) {
            int64_t element = block.start + position;
            for (int64_t i = first; i < last; ++i) {
                const TreadleRectangle& r = job.rectangles[i];
                int64_t place = WRITE || r.counted ? place_in(r, element) : -1;
                if (place < 0) continue;
                void* base = (void*)job.destinations[r.destination];
                uint32_t before = WRITE && !is_step ? 0 : load_element(base, place, width);
                uint32_t after = is_step ? ulp_add(before, (int32_t)value, width) : value;
                if (WRITE) {
                    store_element(base, place, width, after);
                    continue;
                }
                uint64_t key = piece.k1 + (uint64_t)(piece.flat_offset + element) * PHI;
                Lanes h = mix_change(before, after, width, key, piece.k2);
                mine.first += h.first;
                mine.second += h.second;
            }
        });
    }
    __syncthreads();
    if (threadIdx.x == 0 && found) atomicMin((long long*)verdict, (long long)(4 * index + found));
    if (WRITE) return;
    add_lanes(lanes, mine);
    if (elements && !found) atomicAdd((u64*)&verdict[1], (u64)elements);
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_delta_check(const TreadlePiece* pieces, int64_t count, int64_t blocks, const uint32_t* table,
                        const int64_t* offsets, const uint8_t* payload, int64_t size,
                        const TreadleRectangle* rectangles, const int64_t* first_rectangle,
                        const int64_t* destinations, uint64_t* lanes, int64_t* verdict, uint64_t lane) {
    if (blocks == 0) return TREADLE_OK;
    Job job = {pieces, count, blocks, table, offsets, payload, size, rectangles, first_rectangle, destinations};
    const uint64_t* none = nullptr;
    TREADLE_LAUNCH(delta_kernel<false>, blocks, lane, job, lanes, none, none, verdict);
    return launched();
}

int treadle_delta_apply(const TreadlePiece* pieces, int64_t count, int64_t blocks, const uint32_t* table,
                        const int64_t* offsets, const uint8_t* payload, int64_t size,
                        const TreadleRectangle* rectangles, const int64_t* first_rectangle,
                        const int64_t* destinations, const uint64_t* lanes, const uint64_t* expected,
                        int64_t* verdict, uint64_t lane) {
    if (blocks == 0) return TREADLE_OK;
    Job job = {pieces, count, blocks, table, offsets, payload, size, rectangles, first_rectangle, destinations};
    uint64_t* unused = nullptr;
    TREADLE_LAUNCH(delta_kernel<true>, blocks, lane, job, unused, lanes, expected, verdict);
    return launched();
}
