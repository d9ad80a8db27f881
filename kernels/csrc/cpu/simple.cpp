// Choice of the instruction set; digest and cast_diff: loops over pieces, shared among threads.
#include "../abi.h"
#include "../build_id.h"
#include "../codec.h"
#include "../maths.h"
#include "loops.h"
#include "parallel.h"

namespace treadle {
namespace {

const Loops* chosen = nullptr;

const Loops* pick(int isa) {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
    bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2");
    if (isa == 1) return &loops_scalar;
    if (isa == 2) return avx2 ? &loops_avx2 : nullptr;
    if (isa == 3) return avx512 ? &loops_avx512 : nullptr;
    if (isa == 4) return vbmi2 ? &loops_vbmi2 : nullptr;
    return vbmi2 ? &loops_vbmi2 : avx512 ? &loops_avx512 : avx2 ? &loops_avx2 : &loops_scalar;
}

void add(uint64_t* lanes, const uint64_t* part) {
    __atomic_fetch_add(&lanes[0], part[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(&lanes[1], part[1], __ATOMIC_RELAXED);
}

bool is_width(int64_t width) { return width == 1 || width == 2 || width == 4 || width == 8; }

}  // namespace

const Loops& loops() { return *(chosen ? chosen : pick(0)); }

}  // namespace treadle

using namespace treadle;

int treadle_ready(int isa) {
    const Loops* found = isa >= 0 && isa <= 4 ? pick(isa) : nullptr;
    if (!found) return TREADLE_NO_DEVICE;
    chosen = found;
    return TREADLE_OK;
}

int treadle_digest(const void* bits, int64_t n, int64_t width, int64_t flat_offset, uint64_t k1, uint64_t k2,
                   uint64_t* lanes, uint64_t lane) {
    if (n < 0 || !is_width(width)) return TREADLE_BAD_ARGUMENT;
    const Loops& l = loops();
    parallel(lane, n, BLOCK, [&](int64_t begin, int64_t end, int) {
        uint64_t part[2] = {0, 0};
        Keys keys = {k1 + (uint64_t)(flat_offset + begin) * PHI, k2};
        l.digest((const char*)bits + begin * width, end - begin, (int)width, keys, part);
        add(lanes, part);
    });
    return TREADLE_OK;
}

int treadle_digest_at(const int64_t* index, const void* bits, int64_t n, int64_t width, uint64_t k1, uint64_t k2,
                      uint64_t* lanes, uint64_t lane) {
    if (n < 0 || !is_width(width)) return TREADLE_BAD_ARGUMENT;
    const Loops& l = loops();
    parallel(lane, n, BLOCK, [&](int64_t begin, int64_t end, int) {
        uint64_t part[2] = {0, 0};
        l.digest_at(index + begin, (const char*)bits + begin * width, end - begin, (int)width, {k1, k2}, part);
        add(lanes, part);
    });
    return TREADLE_OK;
}

int treadle_digest_pieces(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                          uint64_t* lanes, uint64_t lane) {
    for (int64_t p = 0; p < count; ++p)
        if (pieces[p].n < 0 || !is_width(pieces[p].width)) return TREADLE_BAD_ARGUMENT;
    const Loops& l = loops();
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int) {
        uint64_t part[2] = {0, 0};
        int64_t p = piece_of(pieces, count, begin);
        for (int64_t b = begin; b < end; ++b) {
            while (p + 1 < count && pieces[p + 1].first_block <= b) ++p;
            const TreadlePiece& piece = pieces[p];
            int64_t start = (b - piece.first_block) * BLOCK;
            int64_t length = piece.n - start < BLOCK ? piece.n - start : BLOCK;
            Keys keys = {piece.k1 + (uint64_t)(piece.flat_offset + start) * PHI, piece.k2};
            l.digest((const char*)pointers[p] + start * piece.width, length, (int)piece.width, keys, part);
        }
        add(lanes, part);
    });
    return TREADLE_OK;
}

int treadle_cast_diff(const TreadlePiece* pieces, const int64_t* pointers, int64_t count, int64_t blocks,
                      uint64_t* lanes, int64_t* changed, uint64_t lane) {
    const Loops& l = loops();
    parallel(lane, blocks, 1, [&](int64_t begin, int64_t end, int) {
        uint64_t part[2] = {0, 0};
        int64_t total = 0;
        for (int64_t b = begin; b < end; ++b) {
            int64_t p = piece_of(pieces, count, b);
            const TreadlePiece& piece = pieces[p];
            int64_t start = (b - piece.first_block) * BLOCK;
            int64_t length = piece.n - start < BLOCK ? piece.n - start : BLOCK;
            const int64_t* at = pointers + 3 * p;
            Keys keys = {piece.k1 + (uint64_t)(piece.flat_offset + start) * PHI, piece.k2};
            total += l.cast_diff((const float*)at[0] + start, (uint16_t*)at[1] + start, length,
                                 (uint32_t*)at[2] + start / 32, keys, part);
        }
        add(lanes, part);
        __atomic_fetch_add(changed, total, __ATOMIC_RELAXED);
    });
    return TREADLE_OK;
}

int treadle_reduce(const int64_t* inputs, int64_t count, int64_t n, int64_t kind, void* out, uint64_t lane) {
    if (count < 1 || kind < 0 || kind > 2) return TREADLE_BAD_ARGUMENT;
    const Loops& l = loops();
    parallel(lane, n, BLOCK, [&](int64_t begin, int64_t end, int) {
        l.reduce(inputs, count, begin, end, (int)kind, out);
    });
    return TREADLE_OK;
}
