// treadle_pack and treadle_unpack: tiles in order, shared among threads.
#include "../abi.h"
#include "../tiles.h"
#include "parallel.h"

namespace treadle {
namespace {

void copy_elements(const TreadleSegment& s, const Tile& t, char* tensor, char* bucket, bool pack) {
    for (int64_t i = t.first; i < t.last;) {
        int64_t left = s.row_step == s.cols ? t.last - i : s.cols - i % s.cols;
        int64_t run = left < t.last - i ? left : t.last - i;
        char *a = tensor + in_tensor(s, i) * s.width, *b = bucket + i * s.width;
        memcpy(pack ? b : a, pack ? a : b, (size_t)(run * s.width));
        i += run;
    }
}

void round_elements(const TreadleSegment& s, const Tile& t, const uint32_t* tensor, uint8_t* bucket) {
    for (int64_t i = t.first; i < t.last; ++i) {
        uint16_t value = bf16_of(tensor[in_tensor(s, i)]);
        memcpy(bucket + 2 * i, &value, 2);
    }
}

void widen_elements(const TreadleSegment& s, const Tile& t, void* tensor, const uint8_t* bucket) {
    for (int64_t i = t.first; i < t.last; ++i) {
        uint16_t value;
        memcpy(&value, bucket + 2 * i, 2);
        // From bf16 to bf16 the bits stay: rounding would mark a NaN as quiet.
        if (s.width == 2) ((uint16_t*)tensor)[in_tensor(s, i)] = value;
        else ((uint32_t*)tensor)[in_tensor(s, i)] = (uint32_t)value << 16;
    }
}

float quantise(const TreadleSegment& s, const Tile& t, const void* tensor, uint8_t* bucket, int64_t form) {
    uint16_t values[SIDE];
    uint32_t largest = 0;
    auto load = [&](int64_t r) {
        int64_t at = (t.row + r) * s.row_step + t.col;
        for (int64_t c = 0; c < t.cols; ++c) values[c] = load_bf16(tensor, at + c, s.width);
    };
    for (int64_t r = 0; r < t.rows; ++r) {
        load(r);
        for (int64_t c = 0; c < t.cols; ++c) {
            uint32_t m = finite_magnitude(values[c]);
            largest = m > largest ? m : largest;
        }
    }
    float scale = block_scale(largest, form);
    for (int64_t r = 0; r < t.rows; ++r) {
        load(r);
        uint8_t* out = bucket + (t.row + r) * s.cols + t.col;
        for (int64_t c = 0; c < t.cols; ++c) out[c] = e4m3_of(float_of_bf16(values[c]) / scale);
    }
    return scale;
}

void dequantise(const TreadleSegment& s, const Tile& t, void* tensor, const uint8_t* bucket, float scale) {
    for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t c = 0; c < t.cols; ++c) {
            float value = float_of_e4m3(bucket[(t.row + r) * s.cols + t.col + c]) * scale;
            store_float(tensor, (t.row + r) * s.row_step + t.col + c, s.width, value);
        }
}

}  // namespace
}  // namespace treadle

using namespace treadle;

int treadle_pack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles, int64_t form,
                 uint8_t* bucket, float* scales, int64_t* progress, const int64_t* expected, uint32_t* flags,
                 int64_t chunks, int64_t chunk_bytes, int64_t epoch, uint64_t lane) {
    if (form < 0 || form > TREADLE_FP8_POW2 || chunk_bytes < 1) return TREADLE_BAD_ARGUMENT;
    memset(progress, 0, (size_t)chunks * sizeof(int64_t));
    parallel(lane, tiles, 1, [&](int64_t begin, int64_t end, int) {
        auto done = [&](int64_t chunk, int64_t bytes) {
            int64_t sum = __atomic_add_fetch(&progress[chunk], bytes, __ATOMIC_ACQ_REL);
            if (sum == expected[chunk]) __atomic_store_n(&flags[chunk], (uint32_t)epoch, __ATOMIC_RELEASE);
        };
        for (int64_t index = begin; index < end; ++index) {
            Tile t(segments, count, index, form);
            const TreadleSegment& s = segments[t.segment];
            void* tensor = (void*)tensors[t.segment];
            uint8_t* out = bucket + s.offset;
            int64_t bytes = bytes_in_bucket(form, s.width);
            if (form == TREADLE_COPY) copy_elements(s, t, (char*)tensor, (char*)out, true);
            if (form == TREADLE_BF16) round_elements(s, t, (const uint32_t*)tensor, out);
            if (!is_fp8(form)) each_chunk(s.offset + t.first * bytes, s.offset + t.last * bytes, chunk_bytes, done);
            if (!is_fp8(form)) continue;
            scales[t.scale] = quantise(s, t, tensor, out, form);
            for (int64_t r = t.row; r < t.row + t.rows; ++r) {
                int64_t first = s.offset + r * s.cols + t.col;
                each_chunk(first, first + t.cols, chunk_bytes, done);
            }
        }
    });
    return TREADLE_OK;
}

int treadle_unpack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles,
                   int64_t form, const uint8_t* bucket, const float* scales, uint64_t lane) {
    if (form < 0 || form > TREADLE_FP8_POW2) return TREADLE_BAD_ARGUMENT;
    parallel(lane, tiles, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t index = begin; index < end; ++index) {
            Tile t(segments, count, index, form);
            const TreadleSegment& s = segments[t.segment];
            void* tensor = (void*)tensors[t.segment];
            const uint8_t* in = bucket + s.offset;
            if (form == TREADLE_COPY) copy_elements(s, t, (char*)tensor, (char*)in, false);
            if (form == TREADLE_BF16) widen_elements(s, t, tensor, in);
            if (is_fp8(form)) dequantise(s, t, tensor, in, scales[t.scale]);
        }
    });
    return TREADLE_OK;
}
