// Encodes one block; included by loops.cpp inside its namespace.

constexpr int64_t MANY = SEGMENT / 512;  // changes in a segment from which whole vectors are faster than single bits
constexpr int64_t RICE_BITS_FIXED = 2 * RICE_LIMIT + DISTANCE_BITS + 1;  // of a change, besides its magnitude

// A block whose changes are being counted. S: steps.
template <class T>
struct Block {
    typedef typename SignedOf<T>::Type S;
    static constexpr int W = sizeof(T);

    Encoder& e;
    const Source& s;
    Ahead& ahead;
    Counts counts;
    Rice rice;

    T* values() const { return (T*)e.values; }
    S* steps() const { return (S*)e.steps; }
    T* magnitudes() const { return (T*)e.magnitudes; }
    int64_t begin(int64_t segment) const { return segment ? e.ends[segment - 1] : 0; }
    int64_t segments() const { return (s.n + SEGMENT - 1) / SEGMENT; }

    Segment<T> segment(int64_t g) const {
        int64_t base = g * SEGMENT, n = s.n - base < SEGMENT ? s.n - base : SEGMENT;
        const T* before = s.before ? (const T*)s.before + base : nullptr;
        return {(const T*)s.now + base, before, e.bitmap + base / 32, n, (int)base};
    }

    void copy_bitmap() {
        memcpy(e.bitmap, s.dirty, (size_t)(s.n + 31) / 32 * 4);
        if (s.n % 32) e.bitmap[s.n / 32] &= (1u << (s.n % 32)) - 1;
    }

    // The changes of all segments, one after the other, as steps or as values.
    template <bool STEPS>
    void list() {
        if (s.dirty) copy_bitmap();
        T* elements = STEPS ? (T*)steps() : values();
        int64_t m = 0;
        for (int64_t g = 0; g < segments(); ++g) {
            Segment<T> part = segment(g);
            bool many = e.found > MANY;  // neighbours are alike
            e.found = many ? list_many<T, STEPS>(part, e.found, e.positions + m, elements + m)
                           : list_few<T, STEPS>(part, e.positions + m, elements + m);
            e.ends[g] = m += e.found;
        }
        counts.changed = m;
        measure();
        if (STEPS) measure_steps();
    }

    // Distances, and gap bytes of 255.
    void measure() {
        const uint16_t* p = e.positions;
        uint16_t *d = e.distances, skips = 0;
        d[0] = p[0];
        for (int64_t i = 1; i < counts.changed; ++i) d[i] = (uint16_t)(p[i] - p[i - 1] - 1);
        for (int64_t i = 0; i < counts.changed; ++i) skips = (uint16_t)(skips + d[i] / 255);
        counts.skips = counts.changed ? skips : 0;
        for (int64_t g = 0; g < segments(); ++g)
            if (begin(g) < e.ends[g]) d[begin(g)] = (uint16_t)(p[begin(g)] - g * SEGMENT);
    }

    void measure_steps() {
        for (int64_t g = 0; g < segments(); ++g) {
            uint16_t escapes = 0;  // as narrow as steps mostly are
            for (int64_t i = begin(g); i < e.ends[g]; ++i) {
                S step = steps()[i];
                magnitudes()[i] = narrow_magnitude<T>(step);
                escapes = (uint16_t)(escapes + !is_nibble(step));
            }
            counts.escapes += escapes;
        }
    }

    // The values of changes that were listed as steps.
    __attribute__((cold)) void list_values() {
        for (int64_t g = 0; g < segments(); ++g) {
            int64_t from = begin(g);
            list_elements<T, false>(segment(g), e.positions + from, e.ends[g] - from, values() + from);
        }
    }

    // Elements between a change and the one before it.
    int gap(int64_t i) const { return e.positions[i] - (i ? e.positions[i - 1] + 1 : 0); }

    uint8_t* put(uint8_t* out, int64_t value, int bytes) const {
        for (int i = 0; i < bytes; ++i) *out++ = (uint8_t)(value >> (8 * i));
        return out;
    }

    uint8_t* put_list(uint8_t* out, const void* list, int64_t bytes) const {
        memcpy(out, list, (size_t)bytes);
        return out + bytes;
    }

    void put_gaps(uint8_t* out) const {
        constexpr int64_t AT_ONCE = 32;
        for (int64_t i = 0; i < counts.changed;) {
            if (i + AT_ONCE <= counts.changed) {
                uint16_t gaps[AT_ONCE], most = 0;
                for (int c = 0; c < AT_ONCE; ++c) gaps[c] = (uint16_t)gap(i + c);
                for (int c = 0; c < AT_ONCE; ++c) {
                    most = gaps[c] > most ? gaps[c] : most;
                    out[c] = (uint8_t)gaps[c];
                }
                if (most < 255) {
                    out += AT_ONCE;
                    i += AT_ONCE;
                    continue;
                }
            }
            for (int64_t end = i + AT_ONCE; i < end && i < counts.changed; ++i) {
                int rest = gap(i);
                for (; rest >= 255; rest -= 255) *out++ = 255;
                *out++ = (uint8_t)rest;
            }
        }
    }

    __attribute__((cold)) void put_gap_step(uint8_t* out) const {
        int64_t m = counts.changed;
        memset(out, 0, (size_t)(m + 1) / 2);
        for (int64_t i = 0; i < m; ++i)
            if (is_nibble(steps()[i])) out[i / 2] |= (uint8_t)((steps()[i] & 15) << (4 * (i % 2)));
        out += (m + 1) / 2;
        for (int64_t i = 0; i < m; ++i)
            if (!is_nibble(steps()[i])) out = put(out, values()[i], W);
        put_gaps(out);
    }

    // Bytes that Rice streams have at most.
    int64_t rice_limit() const { return 2 + 3 * segments() + counts.changed * (RICE_BITS_FIXED + 8 * W) / 8; }

    // Returns their bytes, or 0 when a stream is too long to say so.
    int64_t put_rice(uint8_t* start) const {
        uint8_t *sizes = put(start, rice.k | rice.j << 8, 2), *out = sizes + 2 * segments();
        bool fits = true;
        for (int64_t g = 0; g < segments(); ++g) {
            int64_t from = begin(g);
            uint8_t* end = put_stream(out, e.distances + from, steps() + from, e.ends[g] - from, rice, ahead);
            fits = fits && end - out <= 65535;
            sizes = put(sizes, end - out, 2);
            out = end;
        }
        return fits ? out - start : 0;
    }

    void write(uint8_t* out, uint32_t encoding) const {
        int64_t m = counts.changed;
        switch (encoding) {
            case DENSE: put_list(out, s.now, s.n * W); break;
            case BITMAP: put_list(put_list(out, e.bitmap, (s.n + 7) / 8), values(), m * W); break;
            case INDEX: put_list(put_list(out, e.positions, 2 * m), values(), m * W); break;
            case GAP: put_gaps(put_list(put(out, m - 1, 2), values(), m * W)); break;
            case GAP_STEP: put_gap_step(put(out, m - 1, 2)); break;
            default: break;  // RICE is written before it is chosen
        }
    }
};

__attribute__((noinline)) uint32_t chosen(const Counts& counts, int width, bool steps) {
    return choose(counts, width, steps);
}

// Writes nothing beyond `room`, which holds the block's elements at least.
template <class T>
uint32_t encode_block_of(Encoder& e, const Source& s, const Source& next, bool steps, uint8_t* out, int64_t room) {
    Ahead ahead(next);
    Block<T> block = {e, s, ahead, {s.n, 0, 0, 0, 0}, {0, 0, 0}};
    steps = steps && s.before;
    if (steps) block.template list<true>();
    else block.template list<false>();
    uint8_t* streams = out;
    uint32_t entry = chosen(block.counts, sizeof(T), steps);
    if (steps && entry) {
        block.rice = rice_of(e.distances, block.magnitudes(), block.counts.changed);
        // It mostly wins, and its size is known only when it is written.
        if (block.rice.least / 8 < (int64_t)(entry & BYTES_MASK)) {
            if (block.rice_limit() + SLACK_BYTES > room) streams = e.spare;
            block.counts.rice_bytes = block.put_rice(streams);
            entry = chosen(block.counts, sizeof(T), steps);
        }
    }
    int64_t size = entry & BYTES_MASK;
    if (entry >> 28 != RICE) {
        if (steps) block.list_values();
        streams = size + SLACK_BYTES <= room ? out : e.spare;
        block.write(streams, entry >> 28);
    }
    if (streams != out) memcpy(out, streams, (size_t)size);
    e.changed += (entry >> 28) == DENSE ? s.n : block.counts.changed;
    return entry;
}

uint32_t encode_block(Encoder& e, const Source& s, const Source& next, bool steps, uint8_t* out, int64_t room) {
    if (s.width == 1) return encode_block_of<uint8_t>(e, s, next, steps, out, room);
    if (s.width == 2) return encode_block_of<uint16_t>(e, s, next, steps, out, room);
    return encode_block_of<uint32_t>(e, s, next, steps, out, room);
}
