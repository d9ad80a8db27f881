// treadle_streamed_mm: every thread owns columns of b, which it brings into panels while the first rows of a are on
// their way, and takes the chunks of a in the order in which they arrive.
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "../abi.h"
#include "../maths.h"
#include "loops.h"
#include "parallel.h"

namespace treadle {
namespace {

constexpr int64_t POLL_NS = 20000;

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

struct Product {
    const char *a, *b;
    char* out;
    int64_t m, n, k, kind, width;
    const uint32_t* ready;
    int64_t chunk_rows, chunks;
    uint32_t epoch;
    int64_t deadline_ns;
    int64_t* verdict;

    bool arrived(int64_t chunk) const {
        return (int32_t)(__atomic_load_n(&ready[chunk], __ATOMIC_ACQUIRE) - epoch) >= 0;
    }

    float of_b(int64_t index) const {
        if (kind == 0) return widen<uint32_t, 0>(((const uint32_t*)b)[index]);
        uint16_t half = ((const uint16_t*)b)[index];
        return kind == 1 ? widen<uint16_t, 1>(half) : widen<uint16_t, 2>(half);
    }

    void fill(float* panels, int64_t first, int64_t cols) const {
        for (int64_t col = 0; col < cols; col += PANEL)
            for (int64_t i = 0; i < k; ++i) {
                float* to = panels + col * k + i * PANEL;
                for (int64_t c = 0; c < PANEL; ++c) to[c] = col + c < cols ? of_b(i * n + first + col + c) : 0.0f;
            }
    }

    void multiply(int64_t chunk, const float* panels, int64_t first, int64_t cols, float* scratch) const {
        int64_t row = chunk * chunk_rows, rows = m - row < chunk_rows ? m - row : chunk_rows;
        loops().multiply(a + row * k * width, rows, k, (int)kind, panels, cols, out + (row * n + first) * width, n,
                         scratch);
    }

    // Columns [first, first + cols) of all chunks. False where the system has no memory.
    bool run(int64_t first, int64_t cols) const {
        int64_t floats = ((cols + PANEL - 1) / PANEL * PANEL + ROWS_AT_ONCE) * k;
        float* scratch = (float*)malloc((size_t)floats * sizeof(float) + (size_t)chunks + 1);
        if (!scratch) return false;
        float* panels = scratch + ROWS_AT_ONCE * k;
        char* done = (char*)(scratch + floats);
        memset(done, 0, (size_t)chunks + 1);
        fill(panels, first, cols);
        for (int64_t left = chunks; left;) {
            int64_t before = left, missing = -1;
            for (int64_t c = 0; c < chunks; ++c) {
                if (done[c]) continue;
                if (arrived(c)) multiply(c, panels, first, cols, scratch), done[c] = 1, --left;
                else if (missing < 0) missing = c;
            }
            if (left == before && !waited(missing)) break;
        }
        free(scratch);
        return true;
    }

    // Waits a moment for more rows; false when it is too late, and `missing` has not come.
    bool waited(int64_t missing) const {
        if (now_ns() > deadline_ns) {
            int64_t seen = __atomic_load_n(verdict, __ATOMIC_RELAXED);
            while (missing < seen && !__atomic_compare_exchange_n(verdict, &seen, missing, true, __ATOMIC_RELAXED,
                                                                  __ATOMIC_RELAXED)) {
            }
            return false;
        }
        timespec moment = {0, POLL_NS};
        nanosleep(&moment, nullptr);
        return true;
    }
};

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_streamed_mm(const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k, int64_t kind,
                        const uint32_t* ready, int64_t chunk_rows, int64_t epoch, int64_t deadline_us,
                        int64_t* verdict, uint64_t lane) {
    if (m < 0 || n < 0 || k < 0 || kind < 0 || kind > 2 || chunk_rows < 1) return TREADLE_BAD_ARGUMENT;
    Product product = {(const char*)a, (const char*)b, (char*)out, m,          n,
                       k,              kind,           kind ? 2 : 4, ready,    chunk_rows,
                       (m + chunk_rows - 1) / chunk_rows, (uint32_t)epoch, now_ns() + 1000 * deadline_us, verdict};
    int status = TREADLE_OK;
    parallel(lane, n, PANEL, [&](int64_t begin, int64_t end, int) {
        if (!product.run(begin, end - begin)) __atomic_store_n(&status, TREADLE_NO_MEMORY, __ATOMIC_RELAXED);
    });
    return status;
}
