// Rice streams: their parameters, their size, their bits. Included by loops.cpp.

struct Rice {
    int k, j;       // of distances, of magnitudes
    int64_t least;  // bits that the codes have at least
};

template <class S>
inline uint32_t magnitude_of(S step) {
    return magnitude((int32_t)step);
}

// The same in the steps' own width.
template <class U, class S>
inline U narrow_magnitude(S step) {
    S sign = (S)(step >> (8 * sizeof(S) - 1));
    return (U)((S)(step ^ sign) + (S)~sign);
}

#if defined(__AVX512BW__)
constexpr int VECTOR = 64;
#elif defined(__AVX2__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif

// counts[b] += how many numbers of up to 15 · 16 vectors have more than b bits. All bits of a number below its highest
// one are set, and then each bit is counted by itself: every fourth one at a time in counters of four bits, which hold 15
// vectors and are then added to counters of a lane each.
template <class U>
void count_bits(const U* list, int64_t vectors, uint32_t* counts) {
    typedef U Lanes __attribute__((vector_size(VECTOR)));
    constexpr int lanes = VECTOR / sizeof(U), raw = 8 * sizeof(U);
    constexpr U nibbles = (U)0x11111111u;
    Lanes totals[raw] = {};
    while (vectors > 0) {
        int64_t some = vectors < 15 ? vectors : 15;
        Lanes a = {}, b = {}, c = {}, d = {};
        for (int64_t v = 0; v < some; ++v, list += lanes) {
            Lanes x;
            memcpy(&x, list, VECTOR);
#pragma GCC unroll 5
            for (int shift = 1; shift < raw; shift *= 2) x |= x >> shift;
            a += x & nibbles;
            b += x >> 1 & nibbles;
            c += x >> 2 & nibbles;
            d += x >> 3 & nibbles;
        }
        vectors -= some;
#pragma GCC unroll 8
        for (int bit = 0; bit < raw; bit += 4) {
            totals[bit] += a >> bit & (U)15;
            totals[bit + 1] += b >> bit & (U)15;
            totals[bit + 2] += c >> bit & (U)15;
            totals[bit + 3] += d >> bit & (U)15;
        }
    }
    for (int bit = 0; bit < raw; ++bit)
        for (int lane = 0; lane < lanes; ++lane) counts[bit] += totals[bit][lane];
}

// histogram[b] becomes how many of m numbers have b bits. Numbers beyond the list's end are overwritten.
template <class U>
void count_lengths(U* list, int64_t m, uint32_t* histogram) {
    constexpr int64_t raw = 8 * sizeof(U), lanes = VECTOR / sizeof(U), most = 15 * 16;
    uint32_t longer[raw + 1] = {};
    memset(list + m, 0, VECTOR);
    for (int64_t left = (m + lanes - 1) / lanes; left > 0; left -= most, list += most * lanes)
        count_bits(list, left < most ? left : most, longer);
    histogram[0] = (uint32_t)m - longer[0];
    for (int b = 1; b <= raw; ++b) histogram[b] = longer[b - 1] - longer[b];
}

// The best parameter for numbers as long as `histogram` says. Adds the bits that their codes have at least: each number
// could be the smallest of its length.
__attribute__((noinline)) int parameter_of(const uint32_t* histogram, int raw, int64_t* least) {
    int k = rice_parameter(histogram, raw);
    for (int b = 0; b <= raw; ++b) *least += (int64_t)histogram[b] * rice_bits(b ? 1u << (b - 1) : 0, k, raw);
    return k;
}

template <class T>
Rice rice_of(uint16_t* distances, T* magnitudes, int64_t m) {
    uint32_t histogram[33];
    Rice r = {0, 0, m};
    count_lengths(distances, m, histogram);
    r.k = parameter_of(histogram, DISTANCE_BITS, &r.least);
    count_lengths(magnitudes, m, histogram);
    r.j = parameter_of(histogram, 8 * sizeof(T), &r.least);
    return r;
}

// Bits of one stream, lowest first.
struct BitWriter {
    static constexpr int MOST = 56;

    uint8_t* out;
    uint64_t pending = 0, filled = 0;

    // Up to MOST bits; writes eight bytes, of which the unfinished ones are written again.
    void append(uint64_t code, uint64_t bits) {
        pending |= code << filled;
        memcpy(out, &pending, 8);
        filled += bits;
        out += filled >> 3;
        pending >>= filled & ~7ull;
        filled &= 7;
    }
    // Pads with ones up to a whole byte.
    void close() {
        if (filled) *out++ = (uint8_t)(pending | 0xFFull << filled);
    }
};

// Change by change. By value: a writer whose address is taken would live in memory.
template <class S>
__attribute__((noinline)) BitWriter append_changes(BitWriter bits, const uint16_t* distances, const S* steps, int64_t m,
                                                   Rice r) {
    constexpr int raw = 8 * sizeof(S);
    for (int64_t i = 0; i < m; ++i) {
        uint32_t size = magnitude_of(steps[i]);
        uint32_t head = (uint32_t)rice_bits(distances[i], r.k, DISTANCE_BITS);
        uint32_t tail = (uint32_t)rice_bits(size, r.j, raw);
        uint64_t first = rice_code(distances[i], r.k), second = rice_code(size, r.j) | (uint64_t)(steps[i] < 0) << tail;
        if (head + tail < BitWriter::MOST) {
            bits.append(first | second << head, head + tail + 1);
        } else {
            bits.append(first, head);
            bits.append(second, tail + 1);
        }
    }
    return bits;
}

#if defined(__AVX2__)
#if defined(__AVX512BW__)
constexpr int LANES = 16;
inline __m512i wide_lanes(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512i wide_lanes(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline __m512i wide_lanes(const int16_t* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512i wide_lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
inline __m512i at_most(__m512i a, __m512i b) { return _mm512_min_epu32(a, b); }
inline __m512i without_sign(__m512i a) { return _mm512_abs_epi32(a); }
typedef __m512i Raw;
#else
constexpr int LANES = 8;
inline __m256i wide_lanes(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline __m256i wide_lanes(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline __m256i wide_lanes(const int16_t* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline __m256i wide_lanes(const int32_t* p) { return load(p); }
inline __m256i at_most(__m256i a, __m256i b) { return _mm256_min_epu32(a, b); }
inline __m256i without_sign(__m256i a) { return _mm256_abs_epi32(a); }
typedef __m256i Raw;
#endif
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));

// Codes of a run of changes, of two and of four neighbours together: fewer, longer codes are appended. Where `bits` is
// more than MOST, the code is not valid. In memory, because elements of vectors are slow to get at otherwise.
constexpr int64_t RUN = 256;
struct Codes {
    alignas(64) uint64_t two[RUN / 2], bits_of_two[RUN / 2], four[RUN / 4], bits_of_four[RUN / 4];
};

// A short code of x is its lowest k bits after a 0 after x >> k ones:
// (2·(x mod 2^k) + 1) · 2^(x >> k) - 1.
constexpr uint32_t INVALID = 64;

template <class S>
TREADLE_HD void codes_of(const uint16_t* distances, const S* steps, Rice r, Pairs* code, Pairs* bits) {
    constexpr uint32_t raw = 8 * sizeof(S), limit = RICE_LIMIT;
    constexpr uint64_t low = 0xFFFFFFFFu;
    uint32_t k = (uint32_t)r.k, j = (uint32_t)r.j;
    Words d = (Words)wide_lanes(distances), step = (Words)wide_lanes(steps);
    Words q = (Words)at_most((Raw)(d >> k), (Raw)((Words){} + limit));
    Words head = ((((d + d) & ((2u << k) - 1)) | 1) << q) - 1, head_bits = q + (k + 1);
    Words m = (Words)without_sign((Raw)step) - 1, negative = step >> 31;
    Words t = (Words)at_most((Raw)(m >> j), (Raw)((Words){} + limit));
    // A limited magnitude of 16 bits has 32 bits: its highest one is 0, so its code has room.
    Words tail = t == limit ? m << limit | 0xFFFFu : ((((m + m) & ((2u << j) - 1)) | 1) << t) - 1;
    Words tail_bits = t == limit ? (Words){} + (limit + raw) : t + (j + 1);
    Words at_sign = head_bits + tail_bits, all = at_sign + 1;
    all = q == limit ? (Words){} + INVALID : all;
    if (raw == 32) all = t == limit ? (Words){} + INVALID : all;
    Pairs first = ((Pairs)tail & low) << ((Pairs)head_bits & low) | ((Pairs)negative & low) << ((Pairs)at_sign & 63);
    Pairs second = (Pairs)tail >> 32 << ((Pairs)head_bits >> 32) | (Pairs)negative >> 32 << ((Pairs)at_sign >> 32 & 63);
    first |= (Pairs)head & low;
    second |= (Pairs)head >> 32;
    *code = first | second << ((Pairs)all & 63);
    *bits = ((Pairs)all & low) + ((Pairs)all >> 32);
}

// Those of up to RUN changes. Lists are read to the end of a vector.
template <class S>
void codes_of_run(const uint16_t* distances, const S* steps, int64_t m, Rice r, Ahead& ahead, Codes* codes) {
    Pairs even, odd, code[2], bits[2];
    for (int i = 0; i < LANES / 2; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    for (int64_t i = 0; i < m; i += 2 * LANES) {
        ahead.step<4>();
        codes_of(distances + i, steps + i, r, &code[0], &bits[0]);
        codes_of(distances + i + LANES, steps + i + LANES, r, &code[1], &bits[1]);
        memcpy(codes->two + i / 2, code, sizeof code);
        memcpy(codes->bits_of_two + i / 2, bits, sizeof bits);
        Pairs shift = __builtin_shuffle(bits[0], bits[1], even);
        Pairs sum = shift + __builtin_shuffle(bits[0], bits[1], odd);
        Pairs four = __builtin_shuffle(code[0], code[1], odd) << (shift & 63);
        four |= __builtin_shuffle(code[0], code[1], even);
        memcpy(codes->four + i / 4, &four, sizeof four);
        memcpy(codes->bits_of_four + i / 4, &sum, sizeof sum);
    }
}

template <class S>
TREADLE_HD void append_fours(BitWriter& bits, const uint16_t* distances, const S* steps, int64_t fours, Rice r,
                             Ahead& ahead) {
    Codes of;
    codes_of_run(distances, steps, 4 * fours, r, ahead, &of);
    for (int64_t i = 0; i < fours; ++i) {
        uint64_t first = of.bits_of_two[2 * i], second = of.bits_of_two[2 * i + 1];
        if (of.bits_of_four[i] <= BitWriter::MOST) {
            bits.append(of.four[i], of.bits_of_four[i]);
        } else if (first <= BitWriter::MOST && second <= BitWriter::MOST) {
            bits.append(of.two[2 * i], first);
            bits.append(of.two[2 * i + 1], second);
        } else {
            bits = append_changes(bits, distances + 4 * i, steps + 4 * i, 4, r);
        }
    }
}
#endif

// Writes one stream and returns its end.
template <class S>
uint8_t* put_stream(uint8_t* out, const uint16_t* distances, const S* steps, int64_t m, Rice r, Ahead& ahead) {
    BitWriter bits{out};
    int64_t i = 0;
#if defined(__AVX2__)
    for (int64_t some; (some = (m - i < RUN ? m - i : RUN) / 4); i += 4 * some)
        append_fours(bits, distances + i, steps + i, some, r, ahead);
#else
    (void)ahead;
#endif
    bits = append_changes(bits, distances + i, steps + i, m - i, r);
    bits.close();
    return bits.out;
}
