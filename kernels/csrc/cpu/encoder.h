// The encoder of one block. Included by loops.cpp, and so compiled for every instruction set.
#pragma once
#include "../codec.h"

namespace treadle {

constexpr int64_t WORST_BYTES = 10 * BLOCK;  // Rice streams with 78 bits per change, and their sizes
constexpr int64_t SLACK_BYTES = 64;         // what is written beyond the end: whole vectors
constexpr int64_t SLACK = 64;               // the same of lists, in elements

// The working memory of one block: its changes as lists, in order. Lists of elements are of the block's type.
struct Encoder {
    int64_t changed;         // elements in all blocks so far
    int64_t found;           // changes in the last segment
    int64_t ends[SEGMENTS];  // changes up to the end of each segment
    alignas(64) uint32_t bitmap[WORDS];
    alignas(64) uint16_t positions[BLOCK + SLACK];
    alignas(64) uint16_t distances[BLOCK + SLACK];  // to the predecessor or the start of the segment, less one
    alignas(64) uint8_t values[4 * (BLOCK + SLACK)];
    alignas(64) uint8_t steps[4 * (BLOCK + SLACK)];
    alignas(64) uint8_t magnitudes[4 * (BLOCK + SLACK)];  // of the steps
    alignas(64) uint8_t spare[WORST_BYTES + SLACK_BYTES];
};

// One block as the encoder sees it.
struct Source {
    const char* now;
    const char* before;     // null in dirty mode
    const uint32_t* dirty;  // null in pair mode
    int64_t n;
    int width;
};

}  // namespace treadle
