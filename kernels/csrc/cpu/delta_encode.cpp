// treadle_delta_encode: every thread encodes a run of blocks into memory of its own; the runs are then put together.
#include "../abi.h"
#include "../codec.h"
#include "encoder.h"
#include "loops.h"
#include "parallel.h"

namespace treadle {
namespace {

uint32_t encode(Encoder& e, const TreadlePiece& piece, const int64_t* at, int64_t start, bool steps) {
    int64_t n = piece.n - start < BLOCK ? piece.n - start : BLOCK;
    int64_t offset = start * piece.width;
    Source s = {(const char*)at[0] + offset, at[1] ? (const char*)at[1] + offset : nullptr, n, (int)piece.width};
    if (!s.before) memcpy(e.bitmap, (const uint32_t*)at[2] + start / 32, (size_t)(n + 31) / 32 * 4);
    return loops().encode_block(e, s, steps && s.before);
}

// Concatenates what the threads encoded, and frees it.
void gather(Encoder** encoders, uint8_t* payload, int64_t capacity, int64_t* total) {
    total[0] = total[1] = 0;
    for (int t = 0; t < MAX_THREADS; ++t) {
        Encoder* e = encoders[t];
        if (!e) continue;
        if (e->size && total[0] + e->size <= capacity) memcpy(payload + total[0], e->bytes, (size_t)e->size);
        total[0] += e->size;
        total[1] += e->changed;
        free(e->bytes);
        free(e);
    }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int64_t treadle_delta_scratch(int64_t) { return 8; }

int treadle_delta_encode(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                         int64_t steps, uint32_t* table, uint8_t* payload, int64_t capacity, int64_t* total, void*,
                         uint64_t lane) {
    Encoder* encoders[MAX_THREADS] = {};
    int failed = 0;
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int index) {
        Encoder* e = encoders[index] = (Encoder*)malloc(sizeof(Encoder));
        if (!e) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        e->bytes = nullptr;
        e->size = e->capacity = e->changed = 0;
        for (int64_t b = begin; b < end; ++b) {
            if (!e->reserve()) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                break;
            }
            int64_t p = piece_of(pieces, count, b);
            table[b] = encode(*e, pieces[p], pointers + 3 * p, (b - pieces[p].first_block) * BLOCK, steps);
        }
    });
    gather(encoders, payload, capacity, total);
    return failed ? TREADLE_NO_MEMORY : TREADLE_OK;
}
