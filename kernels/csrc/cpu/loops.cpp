// Compiled four times, with TREADLE_LOOPS naming the table and the flags naming the instruction set. All but the
// bit masks is left to the compiler's vectoriser.
#include "loops.h"

#include "../maths.h"
#include "encoder.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace treadle {
namespace {

// One bit for each of 32 elements: whether a and b differ.
template <class T>
inline uint32_t changed_word(const T* a, const T* b) {
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= (uint32_t)(a[i] != b[i]) << i;
    return word;
}

#if defined(__AVX512BW__)
template <>
inline uint32_t changed_word(const uint8_t* a, const uint8_t* b) {
    __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
    return _mm256_cmpneq_epu8_mask(x, y);
}
template <>
inline uint32_t changed_word(const uint16_t* a, const uint16_t* b) {
    return _mm512_cmpneq_epu16_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
template <>
inline uint32_t changed_word(const uint32_t* a, const uint32_t* b) {
    uint32_t low = _mm512_cmpneq_epu32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
    uint32_t high = _mm512_cmpneq_epu32_mask(_mm512_loadu_si512(a + 16), _mm512_loadu_si512(b + 16));
    return low | high << 16;
}
#elif defined(__AVX2__)
inline __m256i load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
template <>
inline uint32_t changed_word(const uint8_t* a, const uint8_t* b) {
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(load(a), load(b)));
}
template <>
inline uint32_t changed_word(const uint16_t* a, const uint16_t* b) {
    __m256i low = _mm256_cmpeq_epi16(load(a), load(b)), high = _mm256_cmpeq_epi16(load(a + 16), load(b + 16));
    // Packing interleaves the halves of its arguments; the permutation undoes it.
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    return ~(uint32_t)_mm256_movemask_epi8(packed);
}
template <>
inline uint32_t changed_word(const uint32_t* a, const uint32_t* b) {
    uint32_t equal = 0;
    for (int i = 0; i < 4; ++i) {
        __m256i e = _mm256_cmpeq_epi32(load(a + 8 * i), load(b + 8 * i));
        equal |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(e)) << (8 * i);
    }
    return ~equal;
}
#endif

#if defined(__AVX512DQ__)
inline __m512i widened(const int8_t* p) { return _mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i*)p)); }
inline __m512i widened(const int16_t* p) { return _mm512_cvtepi16_epi64(_mm_loadu_si128((const __m128i*)p)); }
inline __m512i widened(const int32_t* p) { return _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512i widened(const int64_t* p) { return _mm512_loadu_si512(p); }

// `mix` of eight elements at once. The compiler would compute every key with a multiplication and widen elements in
// two steps, which takes a fifth more time.
struct EightMixes {
    __m512i key, k2, first, second;

    EightMixes(Keys keys) {
        __m512i ramp = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        key = _mm512_add_epi64(_mm512_mullo_epi64(ramp, all(PHI)), all(keys.key));
        k2 = all(keys.k2);
        first = second = _mm512_setzero_si512();
    }
    static __m512i all(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
    static uint64_t sum(__m512i lanes) {
        uint64_t parts[8], total = 0;
        _mm512_storeu_si512(parts, lanes);
        for (uint64_t part : parts) total += part;
        return total;
    }

    void add(__m512i bits) {
        __m512i x = _mm512_mullo_epi64(_mm512_xor_si512(bits, key), all(MIX_1));
        key = _mm512_add_epi64(key, all(8 * PHI));
        x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 32));
        __m512i h1 = _mm512_mullo_epi64(x, all(MIX_2)), h2 = _mm512_mullo_epi64(_mm512_add_epi64(x, k2), all(MIX_3));
        first = _mm512_add_epi64(first, _mm512_xor_si512(h1, _mm512_srli_epi64(h1, 29)));
        second = _mm512_add_epi64(second, _mm512_xor_si512(h2, _mm512_srli_epi64(h2, 31)));
    }
};
#endif

template <class T>
void digest_of(const T* bits, int64_t n, Keys keys, uint64_t* lanes) {
    uint64_t first = 0, second = 0;
    int64_t i = 0;
#if defined(__AVX512DQ__)
    EightMixes mixes(keys);
    for (; i + 32 <= n; i += 32)
        for (int part = 0; part < 32; part += 8) mixes.add(widened(bits + i + part));
    first = EightMixes::sum(mixes.first);
    second = EightMixes::sum(mixes.second);
#endif
    for (; i < n; ++i) {
        Lanes h = mix((uint64_t)(int64_t)bits[i], keys.key + (uint64_t)i * PHI, keys.k2);
        first += h.first;
        second += h.second;
    }
    lanes[0] += first;
    lanes[1] += second;
}

void digest(const void* bits, int64_t n, int width, Keys keys, uint64_t* lanes) {
    if (width == 1) digest_of((const int8_t*)bits, n, keys, lanes);
    if (width == 2) digest_of((const int16_t*)bits, n, keys, lanes);
    if (width == 4) digest_of((const int32_t*)bits, n, keys, lanes);
    if (width == 8) digest_of((const int64_t*)bits, n, keys, lanes);
}

template <class T>
void digest_at_of(const int64_t* index, const T* bits, int64_t n, Keys keys, uint64_t* lanes) {
    uint64_t first = 0, second = 0;
    for (int64_t i = 0; i < n; ++i) {
        Lanes h = mix((uint64_t)(int64_t)bits[i], keys.key + (uint64_t)index[i] * PHI, keys.k2);
        first += h.first;
        second += h.second;
    }
    lanes[0] += first;
    lanes[1] += second;
}

void digest_at(const int64_t* index, const void* bits, int64_t n, int width, Keys keys, uint64_t* lanes) {
    if (width == 1) digest_at_of(index, (const int8_t*)bits, n, keys, lanes);
    if (width == 2) digest_at_of(index, (const int16_t*)bits, n, keys, lanes);
    if (width == 4) digest_at_of(index, (const int32_t*)bits, n, keys, lanes);
    if (width == 8) digest_at_of(index, (const int64_t*)bits, n, keys, lanes);
}

// Few elements change: what a change costs is paid per changed element, outside the vector loop.
int64_t note_changes(uint32_t word, const uint16_t* before, const uint16_t* after, uint64_t key, uint64_t k2,
                     uint64_t* lanes) {
    int64_t count = __builtin_popcount(word);
    for (; word; word &= word - 1) {
        int i = __builtin_ctz(word);
        Lanes h = mix_change(before[i], after[i], 2, key + (uint64_t)i * PHI, k2);
        lanes[0] += h.first;
        lanes[1] += h.second;
    }
    return count;
}

int64_t cast_diff(const float* master, uint16_t* param, int64_t n, uint32_t* dirty, Keys keys, uint64_t* lanes) {
    int64_t count = 0;
    uint16_t cast[32], old[32];
    for (int64_t start = 0; start < n; start += 32) {
        int64_t length = n - start < 32 ? n - start : 32;
        if (length == 32) {
            for (int i = 0; i < 32; ++i) cast[i] = bf16_of(bits_of(master[start + i]));
        } else {
            memset(cast, 0, sizeof cast);
            for (int64_t i = 0; i < length; ++i) cast[i] = bf16_of(bits_of(master[start + i]));
        }
        memcpy(old, cast, sizeof old);
        memcpy(old, param + start, 2 * (size_t)length);
        uint32_t word = changed_word(cast, old);
        if (!word) continue;
        memcpy(param + start, cast, 2 * (size_t)length);
        dirty[start / 32] |= word;
        count += note_changes(word, old, cast, keys.key + (uint64_t)start * PHI, keys.k2, lanes);
    }
    return count;
}

constexpr int64_t SUMS = 2048;  // accumulators that stay in a core's first cache

template <class T, int KIND>
void reduce_of(const int64_t* inputs, int64_t count, int64_t begin, int64_t end, void* out) {
    float sums[SUMS];
    for (int64_t start = begin; start < end; start += SUMS) {
        int64_t n = end - start < SUMS ? end - start : SUMS;
        const T* first = (const T*)inputs[0] + start;
        for (int64_t i = 0; i < n; ++i) sums[i] = widen<T, KIND>(first[i]);
        for (int64_t k = 1; k < count; ++k) {
            const T* input = (const T*)inputs[k] + start;
            for (int64_t i = 0; i < n; ++i) sums[i] += widen<T, KIND>(input[i]);
        }
        T* written = (T*)out + start;
        for (int64_t i = 0; i < n; ++i) written[i] = narrow<T, KIND>(sums[i]);
    }
}

void reduce(const int64_t* inputs, int64_t count, int64_t begin, int64_t end, int kind, void* out) {
    if (kind == 0) reduce_of<uint32_t, 0>(inputs, count, begin, end, out);
    if (kind == 1) reduce_of<uint16_t, 1>(inputs, count, begin, end, out);
    if (kind == 2) reduce_of<uint16_t, 2>(inputs, count, begin, end, out);
}

#include "list_changes.h"
#include "put_rice.h"
#include "encode_block.h"
#include "multiply.h"
#include "decode.h"

}  // namespace

extern const Loops TREADLE_LOOPS = {digest,   digest_at,    cast_diff, reduce,    multiply,
                                     encode_block, rms_norm,  silu_gate, attend,    panel_product};

}  // namespace treadle
