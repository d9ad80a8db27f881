// treadle_delta_encode: every thread encodes a run of blocks where they would lie if all were dense, which none
// exceeds; the runs are then moved together.
#include <stdlib.h>

#include "../abi.h"
#include "encoder.h"
#include "loops.h"
#include "parallel.h"

namespace treadle {
namespace {

struct Pieces {
    const TreadlePiece* rows;
    const int64_t* pointers;
    int64_t count, blocks;

    Source source(int64_t block) const {
        if (block >= blocks) return {nullptr, nullptr, nullptr, 0, 1};
        int64_t p = piece_of(rows, count, block), start = (block - rows[p].first_block) * BLOCK;
        int64_t n = rows[p].n - start, offset = start * rows[p].width;
        const int64_t* at = pointers + 3 * p;
        const char *now = (const char*)at[0], *before = (const char*)at[1];
        const uint32_t* dirty = before ? nullptr : (const uint32_t*)at[2] + start / 32;
        return {now + offset, before ? before + offset : nullptr, dirty, n < BLOCK ? n : BLOCK, (int)rows[p].width};
    }
    // Bytes of the elements before a block.
    int64_t bytes_before(int64_t block) const {
        int64_t bytes = 0;
        for (int64_t p = 0; p < count && rows[p].first_block < block; ++p) {
            int64_t elements = (block - rows[p].first_block) * BLOCK;
            bytes += (elements < rows[p].n ? elements : rows[p].n) * rows[p].width;
        }
        return bytes;
    }
};

// What one thread writes.
struct Run {
    uint8_t* bytes;
    int64_t room, size, changed;
    void* own;  // to be freed, where the payload has no room for dense blocks

    bool encode(const Pieces& pieces, int64_t begin, int64_t end, bool steps, uint32_t* table) {
        Encoder* e = (Encoder*)aligned_alloc(64, (sizeof(Encoder) + 63) / 64 * 64);
        if (!e) return false;
        e->changed = e->found = 0;
        Source s = pieces.source(begin);
        for (int64_t b = begin; b < end; ++b) {
            Source next = pieces.source(b + 1);
            table[b] = loops().encode_block(*e, s, next, steps, bytes + size, room - size);
            size += table[b] & BYTES_MASK;
            s = next;
        }
        changed = e->changed;
        free(e);
        return true;
    }
};

// Moves together what the threads wrote.
void gather(const Run* runs, uint8_t* payload, int64_t capacity, int64_t* total) {
    total[0] = total[1] = 0;
    for (int t = 0; t < MAX_THREADS; ++t) {
        const Run& run = runs[t];
        if (run.size && total[0] + run.size <= capacity && payload + total[0] != run.bytes)
            memmove(payload + total[0], run.bytes, (size_t)run.size);
        total[0] += run.size;
        total[1] += run.changed;
        free(run.own);
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int64_t treadle_delta_scratch(int64_t) { return 8; }

int treadle_delta_encode(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                         int64_t steps, uint32_t* table, uint8_t* payload, int64_t capacity, int64_t* total, void*,
                         uint64_t lane) {
    Pieces all = {pieces, pointers, count, blocks};
    bool in_place = all.bytes_before(blocks) <= capacity;
    Run runs[MAX_THREADS] = {};
    int failed = 0;
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int index) {
        int64_t offset = all.bytes_before(begin);
        Run& run = runs[index];
        run.room = all.bytes_before(end) - offset;
        run.own = in_place ? nullptr : malloc((size_t)run.room);
        run.bytes = in_place ? payload + offset : (uint8_t*)run.own;
        if (!run.bytes || !run.encode(all, begin, end, steps, table)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    });
    gather(runs, payload, capacity, total);
    return failed ? TREADLE_NO_MEMORY : TREADLE_OK;
}
