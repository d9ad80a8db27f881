// Encodes one block; included by loops.cpp inside its namespace.

// Fetches the next block into the cache, line by line, while the work on this one leaves memory idle.
struct Ahead {
    const char *now, *before;
    int64_t at, end;

    explicit Ahead(const Source& s) : now(s.now), before(s.before), at(s.n * s.width), end(2 * s.n * s.width) {}
    void step() {
        if (at >= end) return;
        __builtin_prefetch(now + at, 0, 2);
        if (before) __builtin_prefetch(before + at, 0, 2);
        at += 64;
    }
};

// Positions of the bits of a word whose first element is `base`; returns how many. Four are written at least,
// whatever their number: guessing how often a loop runs would cost more than what is written in vain.
inline int64_t list_word(uint64_t word, int64_t base, uint16_t* out) {
    int bits = __builtin_popcountll(word);
    for (int done = 0; done == 0 || done < bits; done += 4) {
        for (int i = 0; i < 4; ++i) {
            *out++ = (uint16_t)(base + __builtin_ctzll(word | 1ull << 63));
            word &= word - 1;
        }
    }
    return bits;
}

int64_t list_positions(const uint32_t* bitmap, int64_t n, uint16_t* positions, Ahead& ahead) {
    int64_t count = 0;
    for (int64_t at = 0; at < n; at += 64) {
        ahead.step();
        uint64_t word = bitmap[at / 32];
        if (at + 32 < n) word |= (uint64_t)bitmap[at / 32 + 1] << 32;
        if (n - at < 64) word &= (1ull << (n - at)) - 1;
        count += list_word(word, at, positions + count);
    }
    return count;
}

// The same of what differs, whose bitmap it writes: listing costs nothing while memory is waited for.
template <class T>
int64_t list_differences(const T* now, const T* before, int64_t n, uint32_t* bitmap, uint16_t* positions) {
    int64_t count = 0, whole = n / 64 * 64;
    for (int64_t at = 0; at < whole; at += 64) {
        uint64_t word = changed_word(now + at, before + at);
        word |= (uint64_t)changed_word(now + at + 32, before + at + 32) << 32;
        memcpy(bitmap + at / 32, &word, 8);
        count += list_word(word, at, positions + count);
    }
    uint64_t rest = 0;
    for (int64_t i = whole; i < n; ++i) rest |= (uint64_t)(now[i] != before[i]) << (i - whole);
    memcpy(bitmap + whole / 32, &rest, (size_t)(n - whole + 31) / 32 * 4);
    return count + list_word(rest, whole, positions + count);
}

inline uint8_t* put(uint8_t* out, uint32_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) *out++ = (uint8_t)(value >> (8 * i));
    return out;
}

template <class T>
uint8_t* put_values(uint8_t* out, const Encoder& e, const Source& s, int64_t changed) {
    const T* now = (const T*)s.now;
    for (int64_t i = 0; i < changed; ++i, out += sizeof(T)) memcpy(out, now + e.positions[i], sizeof(T));
    return out;
}

uint8_t* put_gaps(uint8_t* out, const Encoder& e, int64_t changed) {
    int next = 0;
    for (int64_t i = 0; i < changed; ++i) {
        int gap = e.positions[i] - next;
        for (; gap >= 255; gap -= 255) *out++ = 255;
        *out++ = (uint8_t)gap;
        next = e.positions[i] + 1;
    }
    return out;
}

template <class T>
void put_gap_step(uint8_t* out, const Encoder& e, const Source& s, int64_t changed) {
    out = put(out, (uint32_t)(changed - 1), 2);
    memset(out, 0, (size_t)(changed + 1) / 2);
    for (int64_t i = 0; i < changed; ++i)
        if (is_nibble(e.steps[i])) out[i / 2] |= (uint8_t)((e.steps[i] & 15) << (4 * (i % 2)));
    out += (changed + 1) / 2;
    const T* now = (const T*)s.now;
    for (int64_t i = 0; i < changed; ++i) {
        if (is_nibble(e.steps[i])) continue;
        memcpy(out, now + e.positions[i], sizeof(T));
        out += sizeof(T);
    }
    put_gaps(out, e, changed);
}

// Bits of one stream, lowest first.
struct BitWriter {
    uint8_t* out;
    uint64_t pending = 0;
    int filled = 0;

    // Up to 56 bits; writes eight bytes, of which the unfinished ones are written again.
    void append(uint64_t code, int bits) {
        pending |= code << filled;
        filled += bits;
        memcpy(out, &pending, 8);
        out += filled >> 3;
        pending = (filled & ~7) == 64 ? 0 : pending >> (filled & ~7);
        filled &= 7;
    }
    void close() {
        if (filled) *out++ = (uint8_t)(pending | 0xFFu << filled);
    }
};

// Returns the bytes written, or 0 when a stream is too long to say so.
template <class T>
int64_t put_rice(uint8_t* start, const Encoder& e, int64_t n, int64_t changed, int k, int j, Ahead& ahead) {
    constexpr int W = sizeof(T);
    int64_t streams = (n + SEGMENT - 1) / SEGMENT, i = 0;
    uint8_t* out = start + 2 + 2 * streams;
    bool fits = true;
    put(start, (uint32_t)(k | j << 8), 2);
    for (int64_t s = 0; s < streams; ++s) {
        BitWriter bits{out};
        for (; i < changed && e.positions[i] < (s + 1) * SEGMENT; ++i) {
            ahead.step();
            uint32_t distance = e.distances[i], m = magnitude(e.steps[i]);
            uint64_t sign = e.steps[i] < 0;
            int head = rice_bits(distance, k, DISTANCE_BITS), tail = rice_bits(m, j, 8 * W);
            uint64_t first = rice_code(distance, k), second = rice_code(m, j) | sign << tail;
            if (head + tail < 56) {
                bits.append(first | second << head, head + tail + 1);
            } else {
                bits.append(first, head);
                bits.append(second, tail + 1);
            }
        }
        bits.close();
        int64_t size = bits.out - out;
        fits = fits && size <= 65535;
        put(start + 2 + 2 * s, (uint32_t)size, 2);
        out = bits.out;
    }
    return fits ? out - start : 0;
}

// Fills distances and steps, and chooses the two Rice parameters. Two histograms of each kind: most changes fall in
// one class, and a counter that waits for itself is slow.
template <class T>
void measure_steps(Encoder& e, const Source& s, Counts& c, int* k, int* j, Ahead& ahead) {
    constexpr int W = sizeof(T);
    uint32_t distances[2][DISTANCE_BITS + 1] = {}, magnitudes[2][33] = {};
    const T *now = (const T*)s.now, *before = (const T*)s.before;
    int next = 0;
    int64_t escapes = 0;
    for (int64_t i = 0; i < c.changed; ++i) {
        ahead.step();
        int position = e.positions[i], start = position & ~(SEGMENT - 1);
        int distance = position - (next > start ? next : start);
        int32_t step = ulp_step(before[position], now[position], W);
        next = position + 1;
        e.distances[i] = (uint16_t)distance;
        e.steps[i] = step;
        escapes += !is_nibble(step);
        ++distances[i & 1][bit_length((uint32_t)distance)];
        ++magnitudes[i & 1][bit_length(magnitude(step))];
    }
    c.escapes = escapes;
    for (int b = 0; b <= DISTANCE_BITS; ++b) distances[0][b] += distances[1][b];
    for (int b = 0; b <= 32; ++b) magnitudes[0][b] += magnitudes[1][b];
    *k = rice_parameter(distances[0], DISTANCE_BITS);
    *j = rice_parameter(magnitudes[0], 8 * W);
}

template <class T>
void write_block(uint8_t* out, const Encoder& e, const Source& s, int64_t m, uint32_t encoding) {
    switch (encoding) {
        case DENSE: memcpy(out, s.now, (size_t)s.n * sizeof(T)); break;
        case BITMAP:
            memcpy(out, e.bitmap, (size_t)(s.n + 7) / 8);
            if (s.n % 8) out[s.n / 8] &= (uint8_t)((1 << (s.n % 8)) - 1);
            put_values<T>(out + (s.n + 7) / 8, e, s, m);
            break;
        case INDEX:
            memcpy(out, e.positions, (size_t)(2 * m));
            put_values<T>(out + 2 * m, e, s, m);
            break;
        case GAP: put_gaps(put_values<T>(put(out, (uint32_t)(m - 1), 2), e, s, m), e, m); break;
        case GAP_STEP: put_gap_step<T>(out, e, s, m); break;
        default: break;
    }
}

template <class T>
uint32_t encode_block_of(Encoder& e, const Source& s, bool steps) {
    constexpr int W = sizeof(T);
    Ahead ahead(s);
    Counts c = {s.n, 0, 0, 0, 0};
    if (s.before) c.changed = list_differences((const T*)s.now, (const T*)s.before, s.n, e.bitmap, e.positions);
    else c.changed = list_positions(e.bitmap, s.n, e.positions, ahead);
    int next = 0;
    for (int64_t i = 0; i < c.changed; ++i) {
        int gap = e.positions[i] - next;
        if (gap >= 255) c.skips += gap / 255;
        next = e.positions[i] + 1;
    }
    uint8_t* out = e.bytes + e.size;
    if (steps && c.changed) {
        int k, j;
        measure_steps<T>(e, s, c, &k, &j, ahead);
        // Written at once where it belongs: it mostly wins, and its size is known only then.
        c.rice_bytes = put_rice<T>(out, e, s.n, c.changed, k, j, ahead);
    }
    uint32_t entry = choose(c, W, steps);
    write_block<T>(out, e, s, c.changed, entry >> 28);
    e.size += entry & BYTES_MASK;
    e.changed += (entry >> 28) == DENSE ? s.n : c.changed;
    return entry;
}

uint32_t encode_block(Encoder& e, const Source& s, bool steps) {
    if (s.width == 1) return encode_block_of<uint8_t>(e, s, steps);
    if (s.width == 2) return encode_block_of<uint16_t>(e, s, steps);
    return encode_block_of<uint32_t>(e, s, steps);
}
