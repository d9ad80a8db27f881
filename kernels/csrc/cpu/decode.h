// A part of loops.cpp: what a decode step of a transformer does to a row beside its matrix products. Sixteen lanes are
// summed in one order whatever the instruction set, and a row is computed by itself: its bits do not depend on its
// neighbours, nor on how far back those look.

struct Lanes16 {
    static constexpr int PARTS = 16 / FLOATS;
    Vector v[PARTS];

    static Lanes16 all(float x) {
        Lanes16 r;
        for (int i = 0; i < PARTS; ++i) r.v[i] = Vector{} + x;
        return r;
    }
    static Lanes16 load(const float* p) {
        Lanes16 r;
        memcpy(&r, p, sizeof r);
        return r;
    }
    void store(float* p) const { memcpy(p, this, sizeof *this); }
    Lanes16 operator+(const Lanes16& o) const {
        Lanes16 r;
        for (int i = 0; i < PARTS; ++i) r.v[i] = v[i] + o.v[i];
        return r;
    }
    Lanes16 operator-(const Lanes16& o) const {
        Lanes16 r;
        for (int i = 0; i < PARTS; ++i) r.v[i] = v[i] - o.v[i];
        return r;
    }
    Lanes16 operator*(const Lanes16& o) const {
        Lanes16 r;
        for (int i = 0; i < PARTS; ++i) r.v[i] = v[i] * o.v[i];
        return r;
    }
    Lanes16 operator/(const Lanes16& o) const {
        Lanes16 r;
        for (int i = 0; i < PARTS; ++i) r.v[i] = v[i] / o.v[i];
        return r;
    }
    // Halves are added to halves.
    float sum() const {
        typedef float Eight __attribute__((vector_size(32)));
        typedef float Four __attribute__((vector_size(16)));
        Eight eights[2];
        memcpy(eights, this, sizeof eights);
        eights[0] += eights[1];
        Four fours[2];
        memcpy(fours, eights, sizeof fours);
        fours[0] += fours[1];
        return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
    }
};

typedef int32_t Ints __attribute__((vector_size(4 * FLOATS)));

// exp(x) for |x| ≤ 87, clamped beyond, NaN for NaN; within 2 units in the last place. x = n·ln 2 + r with n an integer
// and |r| ≤ ln 2 / 2; exp(r) by the polynomial of Moshier's Cephes library (expf), 2ⁿ through the exponent's bits.
inline Lanes16 exponential(const Lanes16& given) {
    constexpr float ROUND = 12582912.0f;  // 1.5 · 2²³: adding it leaves the nearest integer in the last bits
    Lanes16 result;
    for (int i = 0; i < Lanes16::PARTS; ++i) {
        Vector x = given.v[i];
        x = x < -87.0f ? Vector{} - 87.0f : x;
        x = x > 87.0f ? Vector{} + 87.0f : x;
        Vector shifted = x * 1.44269504088896341f + ROUND;
        Vector n = shifted - ROUND;
        Vector r = x - n * 0.693359375f;
        r = r + n * 2.12194440e-4f;
        Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
        Ints bits;
        memcpy(&bits, &shifted, sizeof bits);
        Ints exponent = (bits - 0x4B400000 + 127) << 23;
        Vector power;
        memcpy(&power, &exponent, sizeof power);
        result.v[i] = p * power;
    }
    return result;
}

// out[size] = x / sqrt(mean x² + eps) · weight; size is a multiple of 16.
inline void normalise(const float* x, const float* weight, int64_t size, float eps, float* out) {
    Lanes16 squares = Lanes16::all(0.0f);
    for (int64_t i = 0; i < size; i += 16) {
        Lanes16 part = Lanes16::load(x + i);
        squares = squares + part * part;
    }
    Lanes16 factor = Lanes16::all(1.0f / __builtin_sqrtf(squares.sum() / (float)size + eps));
    for (int64_t i = 0; i < size; i += 16)
        (Lanes16::load(weight + i) * (Lanes16::load(x + i) * factor)).store(out + i);
}

void rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out) {
    for (int64_t row = 0; row < rows; ++row) normalise(x + row * size, weight, size, eps, out + row * size);
}

void silu_gate(const float* gate_up, int64_t rows, int64_t size, float* out) {
    Lanes16 zero = Lanes16::all(0.0f), one = Lanes16::all(1.0f);
    for (int64_t row = 0; row < rows; ++row, gate_up += 2 * size, out += size)
        for (int64_t i = 0; i < size; i += 16) {
            Lanes16 gate = Lanes16::load(gate_up + i), up = Lanes16::load(gate_up + size + i);
            (gate / (one + exponential(zero - gate)) * up).store(out + i);
        }
}

// A head turned to its position, after its norm if it has one, and times `scale`; out must not be x.
inline void turn(const DecodeAttention& a, const float* x, const float* norm, int64_t position, float scale, float* out) {
    float normed[MAX_HEAD];
    if (norm) normalise(x, norm, a.size, a.eps, normed), x = normed;
    const float *cos = a.cos + position * a.size, *sin = a.sin + position * a.size;
    int64_t half = a.size / 2;
    for (int64_t i = 0; i < half; ++i) {
        out[i] = (x[i] * cos[i] - x[half + i] * sin[i]) * scale;
        out[half + i] = (x[half + i] * cos[half + i] + x[i] * sin[half + i]) * scale;
    }
}

// scores[j·stride + t] = query j · key t for HEADS queries and all t < length; returns each query's largest.
template <int HEADS>
void score(const float* query, const float* keys, int64_t size, int64_t length, float* scores, int64_t stride,
           float* largest) {
    for (int j = 0; j < HEADS; ++j) largest[j] = -__builtin_inff();
    for (int64_t t = 0; t < length; ++t) {
        Lanes16 sums[HEADS];
        for (int j = 0; j < HEADS; ++j) sums[j] = Lanes16::all(0.0f);
        for (int64_t i = 0; i < size; i += 16) {
            Lanes16 key = Lanes16::load(keys + t * size + i);
            for (int j = 0; j < HEADS; ++j) sums[j] = sums[j] + Lanes16::load(query + j * size + i) * key;
        }
        for (int j = 0; j < HEADS; ++j) {
            float s = sums[j].sum();
            scores[j * stride + t] = s;
            largest[j] = s > largest[j] ? s : largest[j];
        }
    }
}

// scores[0 … length) to exp(score − largest), zeros up to the next multiple of 16; returns their sum.
inline float soften(float* scores, int64_t length, float largest) {
    Lanes16 total = Lanes16::all(0.0f), shift = Lanes16::all(largest);
    int64_t end = (length + 15) / 16 * 16;
    for (int64_t t = length; t < end; ++t) scores[t] = -__builtin_inff();
    for (int64_t t = 0; t < end; t += 16) exponential(Lanes16::load(scores + t) - shift).store(scores + t);
    for (int64_t t = length; t < end; ++t) scores[t] = 0.0f;
    for (int64_t t = 0; t < end; t += 16) total = total + Lanes16::load(scores + t);
    return total.sum();
}

// out[j·size …] = Σ weights[j·stride + t] · value t / sums[j], t in order.
template <int HEADS>
void mix_values(const float* weights, int64_t stride, const float* values, int64_t size, int64_t length, const float* sums,
                float* out) {
    for (int64_t i = 0; i < size; i += 16) {
        Lanes16 mixed[HEADS];
        for (int j = 0; j < HEADS; ++j) mixed[j] = Lanes16::all(0.0f);
        for (int64_t t = 0; t < length; ++t) {
            Lanes16 value = Lanes16::load(values + t * size + i);
            for (int j = 0; j < HEADS; ++j) mixed[j] = mixed[j] + Lanes16::all(weights[j * stride + t]) * value;
        }
        for (int j = 0; j < HEADS; ++j) (mixed[j] / Lanes16::all(sums[j])).store(out + j * size + i);
    }
}

template <int HEADS>
void attend_heads(const DecodeAttention& a, const float* query, const float* keys, const float* values, int64_t length,
                  float* scores, float* out) {
    int64_t stride = a.score_stride();
    float largest[HEADS], sums[HEADS];
    score<HEADS>(query, keys, a.size, length, scores, stride, largest);
    for (int j = 0; j < HEADS; ++j) sums[j] = soften(scores + j * stride, length, largest[j]);
    mix_values<HEADS>(scores, stride, values, a.size, length, sums, out);
}

// One row of treadle_decode_attention. `scratch` holds HEADS_AT_ONCE · (MAX_HEAD + score_stride) floats.
void attend(const DecodeAttention& a, int64_t row, float* scratch) {
    int64_t position = a.positions[row], group = a.heads / a.kv_heads;
    const float* line = a.qkv + row * (a.heads + 2 * a.kv_heads) * a.size;
    float *query = scratch, *scores = scratch + HEADS_AT_ONCE * MAX_HEAD;
    for (int64_t kv = 0; kv < a.kv_heads; ++kv) {
        float* keys = a.keys + (row * a.kv_heads + kv) * a.capacity * a.size;
        float* values = a.values + (row * a.kv_heads + kv) * a.capacity * a.size;
        turn(a, line + (a.heads + kv) * a.size, a.k_norm, position, 1.0f, keys + position * a.size);
        memcpy(values + position * a.size, line + (a.heads + a.kv_heads + kv) * a.size, (size_t)a.size * sizeof(float));
        for (int64_t done = 0; done < group; done += HEADS_AT_ONCE) {
            int64_t held = group - done < HEADS_AT_ONCE ? group - done : HEADS_AT_ONCE, first = kv * group + done;
            for (int64_t j = 0; j < held; ++j)
                turn(a, line + (first + j) * a.size, a.q_norm, position, a.scale, query + j * a.size);
            float* out = a.out + (row * a.heads + first) * a.size;
            if (held == 4) attend_heads<4>(a, query, keys, values, position + 1, scores, out);
            if (held == 3) attend_heads<3>(a, query, keys, values, position + 1, scores, out);
            if (held == 2) attend_heads<2>(a, query, keys, values, position + 1, scores, out);
            if (held == 1) attend_heads<1>(a, query, keys, values, position + 1, scores, out);
        }
    }
}

// sum + a · x, rounded once where the processor can: twice as fast, and the one place where instruction sets differ.
inline Vector added(float a, Vector x, Vector sum) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)x, (__m512)sum);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)x, (__m256)sum);
#else
    return sum + a * x;
#endif
}

// sums[r][2 · FLOATS] of ROWS rows, k numbers apart, and two vectors of a panel; every element in the order of k.
template <int ROWS>
inline void panel_sums(const float* rows, int64_t k, const float* panel, Vector (&sums)[ROWS][2]) {
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = Vector{};
    for (int64_t i = 0; i < k; ++i) {
        Vector left = load_floats(panel + i * PANEL), right = load_floats(panel + i * PANEL + FLOATS);
        for (int r = 0; r < ROWS; ++r) {
            float a = rows[r * k + i];
            sums[r][0] = added(a, left, sums[r][0]);
            sums[r][1] = added(a, right, sums[r][1]);
        }
    }
}

template <int ROWS>
void panel_rows(const PanelProduct& p, int64_t row, int64_t col, const float* panel) {
    constexpr int64_t WIDTH = 2 * FLOATS;
    Vector sums[ROWS][2];
    panel_sums<ROWS>(p.x + row * p.k, p.k, panel, sums);
    int64_t width = p.cols - col < WIDTH ? p.cols - col : WIDTH;
    for (int64_t r = 0; r < ROWS; ++r) {
        float line[WIDTH];
        memcpy(line, sums[r], sizeof line);
        int64_t at = (row + r) * p.cols + col;
        for (int64_t c = 0; c < width; ++c) {
            float sum = line[c];
            if (p.bias) sum += p.bias[col + c];
            if (p.residual) sum += p.residual[at + c];
            p.out[at + c] = sum;
        }
    }
}

// Columns [begin, end) of treadle_panel_product: every panel comes from memory once, for all rows.
void panel_product(const PanelProduct& p, int64_t begin, int64_t end) {
    constexpr int64_t MANY = FLOATS == 16 ? 8 : 4;  // as many as the registers hold
    for (int64_t col = begin; col < end; col += 2 * FLOATS) {
        const float* panel = p.panels + col / PANEL * PANEL * p.k + col % PANEL;
        int64_t row = 0;
        for (; row + MANY <= p.rows; row += MANY) panel_rows<MANY>(p, row, col, panel);
        if (row + 4 <= p.rows) panel_rows<4>(p, row, col, panel), row += 4;
        if (row + 2 <= p.rows) panel_rows<2>(p, row, col, panel), row += 2;
        if (row < p.rows) panel_rows<1>(p, row, col, panel);
    }
}
