// A part of loops.cpp: the matrix product of treadle_streamed_mm, four rows and two vectors of columns at a time. Every
// element is summed in the order of k, so that all instruction sets give the same bits.

#if defined(__AVX512F__)
constexpr int FLOATS = 16;
#elif defined(__AVX2__)
constexpr int FLOATS = 8;
#else
constexpr int FLOATS = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * FLOATS)));

inline Vector load_floats(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

// sums[4][2 · FLOATS] of four rows, k numbers apart, and two vectors of a panel.
inline void multiply_four(const float* rows, int64_t k, const float* panel, float* sums) {
    Vector s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
    for (int64_t i = 0; i < k; ++i) {
        Vector left = load_floats(panel + i * PANEL), right = load_floats(panel + i * PANEL + FLOATS);
        float a0 = rows[i], a1 = rows[k + i], a2 = rows[2 * k + i], a3 = rows[3 * k + i];
        s00 += a0 * left, s01 += a0 * right;
        s10 += a1 * left, s11 += a1 * right;
        s20 += a2 * left, s21 += a2 * right;
        s30 += a3 * left, s31 += a3 * right;
    }
    Vector all[8] = {s00, s01, s10, s11, s20, s21, s30, s31};
    memcpy(sums, all, sizeof all);
}

template <class T, int KIND>
void multiply_of(const T* a, int64_t rows, int64_t k, const float* panels, int64_t cols, T* out, int64_t n,
                 float* scratch) {
    constexpr int WIDTH = 2 * FLOATS;
    float sums[ROWS_AT_ONCE * WIDTH];
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
        int64_t held = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
        memset(scratch, 0, (size_t)(ROWS_AT_ONCE * k) * sizeof(float));
        for (int64_t i = 0; i < held * k; ++i) scratch[i] = widen<T, KIND>(a[row * k + i]);
        for (int64_t col = 0; col < cols; col += WIDTH) {
            multiply_four(scratch, k, panels + col / PANEL * PANEL * k + col % PANEL, sums);
            int64_t width = cols - col < WIDTH ? cols - col : WIDTH;
            for (int64_t r = 0; r < held; ++r)
                for (int64_t c = 0; c < width; ++c)
                    out[(row + r) * n + col + c] = narrow<T, KIND>(sums[r * WIDTH + c]);
        }
    }
}

void multiply(const void* a, int64_t rows, int64_t k, int kind, const float* panels, int64_t cols, void* out, int64_t n,
              float* scratch) {
    const uint16_t* half = (const uint16_t*)a;
    uint16_t* to = (uint16_t*)out;
    if (kind == 0) multiply_of<uint32_t, 0>((const uint32_t*)a, rows, k, panels, cols, (uint32_t*)out, n, scratch);
    if (kind == 1) multiply_of<uint16_t, 1>(half, rows, k, panels, cols, to, n, scratch);
    if (kind == 2) multiply_of<uint16_t, 2>(half, rows, k, panels, cols, to, n, scratch);
}
