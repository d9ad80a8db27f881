// Lists the changes of one segment: where they are, and either their values or their steps. Included by loops.cpp.

template <class T>
struct SignedOf;
template <>
struct SignedOf<uint8_t> {
    typedef int8_t Type;
};
template <>
struct SignedOf<uint16_t> {
    typedef int16_t Type;
};
template <>
struct SignedOf<uint32_t> {
    typedef int32_t Type;
};

// Fetches the next block into the cache, line by line, while the codes of this one are computed. Only `prefetcht0` does
// it: what is meant for outer caches is dropped by some processors where the page's address is not at hand.
struct Ahead {
    const char *now, *before;
    int64_t left;

    explicit Ahead(const Source& next)
        : now(next.now), before(next.before), left(next.before ? next.n * next.width : 0) {}
    // A few lines more than there are do no harm.
    template <int LINES>
    void step() {
        if (left <= 0) return;
        for (int i = 0; i < LINES; ++i, now += 64, before += 64, left -= 64) {
            __builtin_prefetch(now, 0, 3);
            __builtin_prefetch(before, 0, 3);
        }
    }
};

// A segment; in pair mode `dirty` is written, in dirty mode `before` is null.
template <class T>
struct Segment {
    const T *now, *before;
    uint32_t* dirty;
    int64_t n;
    int base;  // position of its first element in the block

    // Wherever a page begins: touches one that comes later, whose address is then at hand. The processor fetches lines
    // by itself, but its look ahead ends with a page. What lies beyond the tensor is not read.
    void look_ahead(int64_t at) const {
        constexpr int64_t page = 4096 / sizeof(T), pages = 8;
        if (at % page) return;
        __builtin_prefetch(now + at + pages * page, 0, 3);
        if (before) __builtin_prefetch(before + at + pages * page, 0, 3);
    }
    // The changes among the 32 elements from `at` on.
    uint32_t word(int64_t at) const {
        if (!before) return dirty[at / 32];
        return dirty[at / 32] = changed_word(now + at, before + at);
    }
    // The changes among fewer than 64 elements, the last ones.
    __attribute__((noinline)) uint64_t last_words(int64_t at) const {
        uint64_t words = 0;
        for (int64_t i = at; before && i < n; ++i) words |= (uint64_t)(now[i] != before[i]) << (i - at);
        if (before) memcpy(dirty + at / 32, &words, (size_t)(n - at + 31) / 32 * 4);
        else memcpy(&words, dirty + at / 32, (size_t)(n - at + 31) / 32 * 4);
        return words;
    }
};

// Positions of the bits of a word whose first element is `base`; returns how many. Four are written at least,
// whatever their number: guessing how often a loop runs would cost more than what is written in vain.
inline int64_t list_word(uint64_t word, int base, uint16_t* out) {
    int bits = __builtin_popcountll(word);
    for (int done = 0; done == 0 || done < bits; done += 4) {
        for (int i = 0; i < 4; ++i) {
            *out++ = (uint16_t)(base + __builtin_ctzll(word | 1ull << 63));
            word &= word - 1;
        }
    }
    return bits;
}

template <class T, bool STEPS>
void list_elements(const Segment<T>& s, const uint16_t* positions, int64_t m, T* elements) {
    for (int64_t i = 0; i < m; ++i) {
        int at = positions[i] - s.base;
        elements[i] = STEPS ? (T)ulp_step(s.before[at], s.now[at], sizeof(T)) : s.now[at];
    }
}

// Bit by bit, while memory is waited for: right where few elements change, and where there are no instructions for
// more. Returns the number of changes.
template <class T, bool STEPS>
int64_t list_few(const Segment<T>& s, uint16_t* positions, T* elements) {
    int64_t m = 0;
    for (int64_t at = 0; at < s.n; at += 64) {
        s.look_ahead(at);
        uint64_t word = at + 64 <= s.n ? s.word(at) | (uint64_t)s.word(at + 32) << 32 : s.last_words(at);
        m += list_word(word, s.base + (int)at, positions + m);
    }
    list_elements<T, STEPS>(s, positions, m, elements);
    return m;
}

#if defined(__AVX512VBMI2__)
// 32 elements, or steps.
template <class T>
struct Vectors;
template <>
struct Vectors<uint8_t> {
    typedef uint8_t Elements __attribute__((vector_size(32)));
    typedef int8_t Steps __attribute__((vector_size(32)));
};
template <>
struct Vectors<uint16_t> {
    typedef uint16_t Elements __attribute__((vector_size(64)));
    typedef int16_t Steps __attribute__((vector_size(64)));
};
template <>
struct Vectors<uint32_t> {
    typedef uint32_t Elements __attribute__((vector_size(128)));
    typedef int32_t Steps __attribute__((vector_size(128)));
};
template <class T>
using Elements = typename Vectors<T>::Elements;

template <class T>
inline Elements<T> load_elements(const T* from) {
    Elements<T> all;
    memcpy(&all, from, sizeof all);
    return all;
}

// ulp_step in lanes of the elements' width.
template <class T>
inline Elements<T> load_steps(const T* before, const T* now) {
    typedef typename Vectors<T>::Steps Steps;
    constexpr int sign = 8 * sizeof(T) - 1;
    constexpr T magnitude = (T)(((uint64_t)1 << sign) - 1);
    Elements<T> a = load_elements(before), b = load_elements(now);
    return ((b & magnitude) ^ (Elements<T>)((Steps)b >> sign)) - ((a & magnitude) ^ (Elements<T>)((Steps)a >> sign));
}

// Writes those of 32 elements whose bit is set one after the other, and whatever comes next: compressed in a register
// and stored from there, since some processors take a hundred times as long to compress into memory. `LANES` are
// stored: what is stored in vain costs as much as the rest, above all where it reaches into another cache line.
template <int LANES>
inline void keep(uint32_t word, Elements<uint8_t> from, uint8_t* to) {
    __m256i kept = _mm256_maskz_compress_epi8(word, (__m256i)from);
    if (LANES <= 16) _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(kept));
    else _mm256_storeu_si256((__m256i*)to, kept);
}
template <int LANES>
inline void keep(uint32_t word, Elements<uint16_t> from, uint16_t* to) {
    __m512i kept = _mm512_maskz_compress_epi16(word, (__m512i)from);
    if (LANES <= 8) _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(kept));
    else if (LANES <= 16) _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(kept));
    else _mm512_storeu_si512(to, kept);
}
template <int LANES>
inline void keep(uint32_t word, const Elements<uint32_t>& from, uint32_t* to) {
    __m512i halves[2];
    memcpy(halves, &from, sizeof halves);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)word, halves[0]));
    to += __builtin_popcount(word & 0xFFFF);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)(word >> 16), halves[1]));
}

// 32 elements at a time; of them seldom more than LANES changed. Elements are loaded before `word` writes the bitmap:
// the compiler would load them again afterwards.
template <class T, bool STEPS, int LANES>
int64_t list_vectors(const Segment<T>& s, uint16_t* positions, T* elements) {
    Elements<uint16_t> places;
    for (int i = 0; i < 32; ++i) places[i] = (uint16_t)(s.base + i);
    int64_t m = 0, at = 0;
    for (; at + 32 <= s.n; at += 32, places += 32) {
        s.look_ahead(at);
        Elements<T> found = STEPS ? load_steps(s.before + at, s.now + at) : load_elements(s.now + at);
        uint32_t word = s.word(at);
        int bits = __builtin_popcount(word);
        if (bits <= LANES) {
            keep<LANES>(word, places, positions + m);
            keep<LANES>(word, found, elements + m);
        } else {
            keep<32>(word, places, positions + m);
            keep<32>(word, found, elements + m);
        }
        m += bits;
    }
    if (at == s.n) return m;
    int64_t rest = list_word(s.last_words(at), s.base + (int)at, positions + m);
    list_elements<T, STEPS>(s, positions + m, rest, elements + m);
    return m + rest;
}

// Without a branch that is hard to predict where about `expected` elements of a segment change.
template <class T, bool STEPS>
int64_t list_many(const Segment<T>& s, int64_t expected, uint16_t* positions, T* elements) {
    if (expected < SEGMENT / 8) return list_vectors<T, STEPS, 8>(s, positions, elements);
    if (expected < SEGMENT / 3) return list_vectors<T, STEPS, 16>(s, positions, elements);
    return list_vectors<T, STEPS, 32>(s, positions, elements);
}
#else
template <class T, bool STEPS>
int64_t list_many(const Segment<T>& s, int64_t, uint16_t* positions, T* elements) {
    return list_few<T, STEPS>(s, positions, elements);
}
#endif
