// The encoder of one block. Included by loops.cpp, and so compiled for every instruction set.
#pragma once
#include <stdlib.h>

#include "../codec.h"

namespace treadle {

constexpr int64_t WORST_BYTES = 4 * BLOCK;  // dense, of the widest type
constexpr int64_t SLACK_BYTES = 16;         // a stream's last eight bytes are written at once
constexpr int64_t LONGEST_RICE = 2 + 2 * SEGMENTS + BLOCK * 78 / 8 + SEGMENTS;  // 29 + 49 bits per change

// A thread's output and the working memory of one block.
struct Encoder {
    uint8_t* bytes;
    int64_t size, capacity, changed;

    uint32_t bitmap[WORDS];
    uint16_t positions[BLOCK + 64];
    uint16_t distances[BLOCK];
    int32_t steps[BLOCK];

    bool reserve() {
        int64_t needed = size + WORST_BYTES + LONGEST_RICE + SLACK_BYTES;
        if (needed <= capacity) return true;
        int64_t grown = 2 * capacity > needed ? 2 * capacity : needed;
        void* moved = realloc(bytes, (size_t)grown);
        if (!moved) return false;
        bytes = (uint8_t*)moved;
        capacity = grown;
        return true;
    }
};

// One block as the encoder sees it.
struct Source {
    const char* now;
    const char* before;  // null in dirty mode
    int64_t n;
    int width;
};

}  // namespace treadle
