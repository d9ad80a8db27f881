// treadle_delta_check and treadle_delta_apply: one decoder, which the check runs over a visitor that only looks.
#include "../abi.h"
#include "../codec.h"
#include "parallel.h"

namespace treadle {
namespace {

constexpr int64_t NONE = INT64_MAX;
constexpr int BATCH = 64;

struct Change {
    int64_t element;
    uint32_t value;
    bool is_step;
};

// The bytes of one block and what they are said to be.
struct Block {
    const uint8_t* bytes;
    int64_t size, n;
    int encoding, width;
};

// Every reader calls visit(position, is_step, value) in order and returns 0 or a TreadleVerdict. A position is
// within the block whenever it is visited, so that even corrupt input cannot lead outside.
template <class Visit>
int read_dense(const Block& b, Visit visit) {
    if (b.size != b.n * b.width) return TREADLE_CORRUPT;
    for (int64_t i = 0; i < b.n; ++i) visit(i, false, load_bits(b.bytes + i * b.width, b.width));
    return 0;
}

template <class Visit>
int read_bitmap(const Block& b, Visit visit) {
    int64_t head = (b.n + 7) / 8, count = 0;
    if (b.size < head) return TREADLE_CORRUPT;
    for (int64_t i = 0; i < head; ++i) count += __builtin_popcount(b.bytes[i]);
    if (b.size != head + count * b.width) return TREADLE_CORRUPT;
    if (b.n % 8 && b.bytes[head - 1] >> (b.n % 8)) return TREADLE_OUTSIDE;
    const uint8_t* value = b.bytes + head;
    for (int64_t i = 0; i < head; ++i)
        for (uint32_t byte = b.bytes[i]; byte; byte &= byte - 1, value += b.width)
            visit(8 * i + __builtin_ctz(byte), false, load_bits(value, b.width));
    return 0;
}

template <class Visit>
int read_index(const Block& b, Visit visit) {
    int64_t count = b.size / (2 + b.width), previous = -1;
    if (b.size != count * (2 + b.width)) return TREADLE_CORRUPT;
    for (int64_t i = 0; i < count; ++i) {
        int64_t position = load_bits(b.bytes + 2 * i, 2);
        if (position >= b.n) return TREADLE_OUTSIDE;
        if (position <= previous) return TREADLE_CORRUPT;
        visit(position, false, load_bits(b.bytes + 2 * count + i * b.width, b.width));
        previous = position;
    }
    return 0;
}

// Positions of GAP and GAP_STEP; `gaps` lie at the block's end. visit(position, i).
template <class Visit>
int read_gaps(const Block& b, const uint8_t* gaps, int64_t count, Visit visit) {
    const uint8_t* end = b.bytes + b.size;
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
        for (; gaps < end && *gaps == 255; ++gaps) next += 255;
        if (gaps == end) return TREADLE_CORRUPT;
        next += *gaps++;
        if (next >= b.n) return TREADLE_OUTSIDE;
        visit(next++, i);
    }
    return gaps == end ? 0 : TREADLE_CORRUPT;
}

template <class Visit>
int read_gap(const Block& b, Visit visit) {
    if (b.size < 2) return TREADLE_CORRUPT;
    int64_t count = load_bits(b.bytes, 2) + 1;
    if (b.size < 2 + count * b.width) return TREADLE_CORRUPT;
    const uint8_t* values = b.bytes + 2;
    return read_gaps(b, values + count * b.width, count, [&](int64_t position, int64_t i) {
        visit(position, false, load_bits(values + i * b.width, b.width));
    });
}

template <class Visit>
int read_gap_step(const Block& b, Visit visit) {
    if (b.size < 2) return TREADLE_CORRUPT;
    int64_t count = load_bits(b.bytes, 2) + 1, escapes = 0;
    const uint8_t* nibbles = b.bytes + 2;
    if (b.size < 2 + (count + 1) / 2) return TREADLE_CORRUPT;
    for (int64_t i = 0; i < count; ++i) escapes += (nibbles[i / 2] >> (4 * (i % 2)) & 15) == 0;
    const uint8_t* values = nibbles + (count + 1) / 2;
    if (b.size < values - b.bytes + escapes * b.width) return TREADLE_CORRUPT;
    return read_gaps(b, values + escapes * b.width, count, [&](int64_t position, int64_t i) {
        uint32_t nibble = nibbles[i / 2] >> (4 * (i % 2)) & 15;
        if (nibble) {
            visit(position, true, (uint32_t)((int32_t)(nibble << 28) >> 28));
        } else {
            visit(position, false, load_bits(values, b.width));
            values += b.width;
        }
    });
}

template <class Visit>
int read_rice_block(const Block& b, Visit visit) {
    int64_t streams = (b.n + SEGMENT - 1) / SEGMENT, at = 2 + 2 * streams;
    if (b.size < at || b.bytes[0] >= DISTANCE_BITS || b.bytes[1] >= 8 * b.width) return TREADLE_CORRUPT;
    for (int64_t s = 0; s < streams; ++s) {
        int64_t size = load_bits(b.bytes + 2 + 2 * s, 2), start = s * SEGMENT;
        int64_t n = b.n - start < SEGMENT ? b.n - start : SEGMENT;
        if (size > b.size - at) return TREADLE_CORRUPT;
        bool whole = read_stream(b.bytes + at, size, b.bytes[0], b.bytes[1], b.width, n,
                                 [&](int64_t position, int32_t step) { visit(start + position, true, (uint32_t)step); });
        if (!whole) return TREADLE_CORRUPT;
        at += size;
    }
    return at == b.size ? 0 : TREADLE_CORRUPT;
}

template <class Visit>
int read_block(const Block& b, Visit visit) {
    switch (b.encoding) {
        case EMPTY: return b.size ? TREADLE_CORRUPT : 0;
        case DENSE: return read_dense(b, visit);
        case BITMAP: return read_bitmap(b, visit);
        case INDEX: return read_index(b, visit);
        case GAP: return read_gap(b, visit);
        case GAP_STEP: return read_gap_step(b, visit);
        case RICE: return read_rice_block(b, visit);
        default: return TREADLE_CORRUPT;
    }
}

// Where elements of one rectangle live. Neighbours mostly share a row, which saves the division.
struct Cursor {
    const TreadleRectangle* r;
    void* base;
    int64_t low = 0, high = 0, row_offset = 0;

    int64_t find(int64_t element) {
        if (element < low || element >= high) {
            int64_t d = element - r->start, row = d < 0 ? r->rows : d / r->stride;
            if (row >= r->rows || d - row * r->stride >= r->cols) return -1;
            low = r->start + row * r->stride;
            high = low + r->cols;
            row_offset = r->offset + row * r->row_step;
        }
        return row_offset + (element - low) * r->col_step;
    }
};

// All arguments of a call, and what its blocks have in common.
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

    // A block whose place in the payload is not where its predecessors' sizes put it has size -1.
    Block block(int64_t index, const TreadlePiece& piece) const {
        int64_t start = (index - piece.first_block) * BLOCK, bytes = table[index] & BYTES_MASK, at = offsets[index];
        int64_t next = index + 1 < blocks ? offsets[index + 1] : size;
        bool placed = at >= 0 && next <= size && next - at == bytes && (index > 0 || at == 0);
        int64_t n = piece.n - start < BLOCK ? piece.n - start : BLOCK;
        return {payload + (placed ? at : 0), placed ? bytes : -1, n, (int)(table[index] >> 28), (int)piece.width};
    }

    // visit(rectangle, base, place, change) for every rectangle that holds a changed element. Changes wait for each
    // other: the elements of many are fetched from memory at the same time.
    template <class Visit>
    int read(int64_t index, int64_t* elements, Visit visit) const {
        int64_t p = piece_of(pieces, count, index), start = (index - pieces[p].first_block) * BLOCK;
        Block b = block(index, pieces[p]);
        if (b.size < 0) return TREADLE_CORRUPT;
        int64_t r = first_rectangle[p], last = first_rectangle[p + 1];
        do {
            Cursor cursors[BATCH];
            Change changes[BATCH];
            int held = 0, waiting = 0;
            for (; r < last && held < BATCH; ++r) {
                const TreadleRectangle& q = rectangles[r];
                int64_t end = q.start + (q.rows - 1) * q.stride + q.cols;
                if (q.start < start + b.n && end > start)
                    cursors[held++] = {&q, (void*)destinations[q.destination]};
            }
            auto flush = [&] {
                for (int c = 0; c < held; ++c) visit_all(cursors[c], changes, waiting, b.width, visit);
                waiting = 0;
            };
            *elements = 0;
            int found = read_block(b, [&](int64_t position, bool is_step, uint32_t value) {
                ++*elements;
                changes[waiting++] = {start + position, value, is_step};
                if (waiting == BATCH) flush();
            });
            flush();
            if (found) return found;
        } while (r < last);
        return 0;
    }

    template <class Visit>
    static void visit_all(Cursor& cursor, const Change* changes, int count, int width, Visit visit) {
        int64_t places[BATCH];
        for (int i = 0; i < count; ++i) {
            places[i] = cursor.find(changes[i].element);
            if (places[i] >= 0) __builtin_prefetch((const char*)cursor.base + places[i] * width, 1);
        }
        for (int i = 0; i < count; ++i)
            if (places[i] >= 0) visit(*cursor.r, cursor.base, places[i], changes[i]);
    }
};

void note(int64_t* verdict, int64_t block, int found) {
    int64_t mine = 4 * block + found, seen = __atomic_load_n(verdict, __ATOMIC_RELAXED);
    while (mine < seen &&
           !__atomic_compare_exchange_n(verdict, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_delta_check(const TreadlePiece* pieces, int64_t count, int64_t blocks, const uint32_t* table,
                        const int64_t* offsets, const uint8_t* payload, int64_t size,
                        const TreadleRectangle* rectangles, const int64_t* first_rectangle,
                        const int64_t* destinations, uint64_t* lanes, int64_t* verdict, uint64_t lane) {
    Job job = {pieces, count, blocks, table, offsets, payload, size, rectangles, first_rectangle, destinations};
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int) {
        uint64_t first = 0, second = 0;
        int64_t total = 0;
        for (int64_t b = begin; b < end; ++b) {
            const TreadlePiece& piece = pieces[piece_of(pieces, count, b)];
            int width = (int)piece.width;
            int64_t elements = 0;
            int found = job.read(b, &elements, [&](const TreadleRectangle& r, void* base, int64_t place, const Change& change) {
                if (!r.counted) return;
                uint32_t before = load_element(base, place, width);
                uint32_t after = change.is_step ? ulp_add(before, (int32_t)change.value, width) : change.value;
                uint64_t key = piece.k1 + (uint64_t)(piece.flat_offset + change.element) * PHI;
                Lanes h = mix_change(before, after, width, key, piece.k2);
                first += h.first;
                second += h.second;
            });
            if (found) note(verdict, b, found);
            total += elements;
        }
        __atomic_fetch_add(&lanes[0], first, __ATOMIC_RELAXED);
        __atomic_fetch_add(&lanes[1], second, __ATOMIC_RELAXED);
        __atomic_fetch_add(&verdict[1], total, __ATOMIC_RELAXED);
    });
    return TREADLE_OK;
}

int treadle_delta_apply(const TreadlePiece* pieces, int64_t count, int64_t blocks, const uint32_t* table,
                        const int64_t* offsets, const uint8_t* payload, int64_t size,
                        const TreadleRectangle* rectangles, const int64_t* first_rectangle,
                        const int64_t* destinations, const uint64_t* lanes, const uint64_t* expected,
                        int64_t* verdict, uint64_t lane) {
    if (verdict[0] != NONE) return TREADLE_OK;
    if (expected && (expected[0] != lanes[0] || expected[1] != lanes[1])) {
        verdict[0] = TREADLE_MISMATCH;
        return TREADLE_OK;
    }
    Job job = {pieces, count, blocks, table, offsets, payload, size, rectangles, first_rectangle, destinations};
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            int width = (int)pieces[piece_of(pieces, count, b)].width;
            int64_t elements = 0;
            int found = job.read(b, &elements, [&](const TreadleRectangle&, void* base, int64_t place, const Change& change) {
                uint32_t before = change.is_step ? load_element(base, place, width) : 0;
                uint32_t after = change.is_step ? ulp_add(before, (int32_t)change.value, width) : change.value;
                store_element(base, place, width, after);
            });
            if (found) note(verdict, b, found);
        }
    });
    return TREADLE_OK;
}
