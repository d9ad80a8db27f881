// The C interface of both libraries: libtreadle_kernels_cpu.so and libtreadle_kernels_cuda.so export the same
// functions, so that one binding serves both. Plain pointers and integers only: no C++ type, no exception and no
// torch type crosses it.
//
// `lane` is where the work runs: the number of threads for the CPU library, the cudaStream_t for the CUDA library,
// which only enqueues and never waits. Every pointer is memory of the library's device. Functions return a status;
// what only the device can find out (corrupt input) is written to a `verdict` instead.
#pragma once
#include <stdint.h>

#define TREADLE_API extern "C" __attribute__((visibility("default")))
#define TREADLE_ABI 2

enum TreadleStatus {
    TREADLE_OK = 0,
    TREADLE_BAD_ARGUMENT = 1,
    TREADLE_NO_MEMORY = 2,
    TREADLE_NO_DEVICE = 3,
    TREADLE_CUDA = 1000,  // + cudaError_t
};

// What `treadle_delta_check` and `treadle_delta_apply` find. verdict[0] is 4·block + TreadleVerdict of the first
// defective block; INT64_MAX, which the caller puts there, means that none is known.
enum TreadleVerdict {
    TREADLE_CORRUPT = 1,   // an encoding that no encoder writes, or that ends too early or too late
    TREADLE_OUTSIDE = 2,   // an element beyond its tensor
    TREADLE_MISMATCH = 3,  // well-formed, but the result would not have the expected digest
};

// One tensor, or a run of consecutive elements of one; a row of six int64 in Python's tables.
struct TreadlePiece {
    int64_t n;            // elements
    int64_t width;        // bytes per element: 1, 2 or 4; for a digest also 8
    int64_t first_block;  // blocks of 65,536 elements in the pieces before this one
    uint64_t k1, k2;      // the digest's keys of the tensor
    int64_t flat_offset;  // of element 0 in the whole tensor
};

// Elements [start + r·stride, start + r·stride + cols) of a piece, r < rows, live at
// destinations[destination] + (offset + r·row_step + c·col_step)·width. Nine int64 in Python's tables.
struct TreadleRectangle {
    int64_t start, rows, cols, stride;
    int64_t destination, offset, row_step, col_step;
    int64_t counted;  // 0 for a further copy of elements that another rectangle counts in the digest
};

// A matrix with neighbouring columns, and its place in a bucket; a row of seven int64 in Python's tables.
struct TreadleSegment {
    int64_t rows, cols, row_step;  // of the tensor, in elements
    int64_t width;                 // bytes per element of the tensor
    int64_t offset;                // of its first byte in the bucket, where it lies row by row
    int64_t first_scale;           // fp8: of its 128 × 128 blocks, row by row
    int64_t first_tile;            // tiles of the segments before it
};

// What a bucket holds. Tiles are 16,384 consecutive elements, or one block of 128 × 128 for fp8.
enum TreadleForm {
    TREADLE_COPY = 0,      // the tensor's bytes
    TREADLE_BF16 = 1,      // fp32 tensors as bf16
    TREADLE_FP8 = 2,       // fp32 or bf16 tensors as e4m3, a scale of amax / 448 per block
    TREADLE_FP8_POW2 = 3,  // the same with scales rounded up to powers of two
};

// The interface these declarations describe, and a hash of what the library was built from.
TREADLE_API int treadle_abi(void);
TREADLE_API const char* treadle_build(void);
// 0 where this library can compute here. `isa` for the CPU: 0 the best, 1 scalar, 2 AVX2, 3 AVX-512,
// 4 AVX-512 with VBMI2.
TREADLE_API int treadle_ready(int isa);

// lanes[2] += both lanes of the digest of `n` elements from flat index `flat_offset` on.
TREADLE_API int treadle_digest(const void* bits, int64_t n, int64_t width, int64_t flat_offset, uint64_t k1,
                               uint64_t k2, uint64_t* lanes, uint64_t lane);
// The same for elements at any flat index.
TREADLE_API int treadle_digest_at(const int64_t* index, const void* bits, int64_t n, int64_t width, uint64_t k1,
                                  uint64_t k2, uint64_t* lanes, uint64_t lane);

// The same for all pieces at once: pointers[count] are their elements.
TREADLE_API int treadle_digest_pieces(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                                      int64_t blocks, uint64_t* lanes, uint64_t lane);

// pointers[pieces][3] = fp32 master, bf16 parameter, dirty words. Rounds masters into parameters, sets the dirty
// bit of every element that changes, adds the change to lanes[2] and the number of changes to *changed.
TREADLE_API int treadle_cast_diff(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                                  int64_t blocks, uint64_t* lanes, int64_t* changed, uint64_t lane);

// pointers[pieces][3] = current, old or 0, dirty words or 0: exactly one of the two is given for every piece.
// Writes table[blocks], and the blocks one after the other into payload[capacity]; total[0] is their size in bytes
// and total[1] the number of elements they hold. When total[0] > capacity the payload is not valid.
// scratch: treadle_delta_scratch(blocks) bytes, aligned to 8.
TREADLE_API int64_t treadle_delta_scratch(int64_t blocks);
TREADLE_API int treadle_delta_encode(const TreadlePiece* pieces, const int64_t* pointers, int64_t count,
                                     int64_t blocks, int64_t steps, uint32_t* table, uint8_t* payload,
                                     int64_t capacity, int64_t* total, void* scratch, uint64_t lane);

// Reads everything and writes nothing but its results: lanes[2] += the change of the digest that applying would
// make; verdict[1] += the elements that the payload holds. offsets[blocks] is where each block starts in
// payload[size]; rectangles of piece p are those from first_rectangle[p] up to first_rectangle[p + 1].
TREADLE_API int treadle_delta_check(const TreadlePiece* pieces, int64_t count, int64_t blocks,
                                    const uint32_t* table, const int64_t* offsets, const uint8_t* payload,
                                    int64_t size, const TreadleRectangle* rectangles,
                                    const int64_t* first_rectangle, const int64_t* destinations, uint64_t* lanes,
                                    int64_t* verdict, uint64_t lane);
// Writes, unless verdict[0] says that the check failed, or lanes[2] differ from expected[2] (then verdict[0] becomes
// TREADLE_MISMATCH): lanes and verdict are those of a check of the same arguments. expected may be null.
TREADLE_API int treadle_delta_apply(const TreadlePiece* pieces, int64_t count, int64_t blocks,
                                    const uint32_t* table, const int64_t* offsets, const uint8_t* payload,
                                    int64_t size, const TreadleRectangle* rectangles,
                                    const int64_t* first_rectangle, const int64_t* destinations,
                                    const uint64_t* lanes, const uint64_t* expected, int64_t* verdict,
                                    uint64_t lane);

// tensors[count] into the bucket. progress[chunks] is scratch; flags[c] becomes `epoch`, after the bytes, as soon as
// chunk c is written: expected[c] says how many of its bytes belong to segments.
TREADLE_API int treadle_pack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles,
                             int64_t form, uint8_t* bucket, float* scales, int64_t* progress,
                             const int64_t* expected, uint32_t* flags, int64_t chunks, int64_t chunk_bytes,
                             int64_t epoch, uint64_t lane);
// The bucket into tensors[count]; values of other forms than TREADLE_COPY are widened to the tensors' fp32 or bf16.
TREADLE_API int treadle_unpack(const TreadleSegment* segments, const int64_t* tensors, int64_t count, int64_t tiles,
                               int64_t form, const uint8_t* bucket, const float* scales, uint64_t lane);

// out[n] = the sum of inputs[count][n] in their order, with fp32 accumulators, rounded once at the end. All are fp32
// (kind 0), bf16 (1) or fp16 (2); out may be one of them.
TREADLE_API int treadle_reduce(const int64_t* inputs, int64_t count, int64_t n, int64_t kind, void* out,
                               uint64_t lane);

// Rows of tokens to rows of experts: out[row_of[i]] = rows[i / k] for i < pairs, unless row_of[i] < 0. missing[e] is
// the number of rows of expert e and counts down; flags[e] becomes `epoch`, after the rows, when none is missing.
TREADLE_API int treadle_scatter_rows(const uint8_t* rows, int64_t row_bytes, const int32_t* row_of,
                                     const int32_t* expert_of, int64_t pairs, int64_t k, uint8_t* out,
                                     int32_t* missing, uint32_t* flags, int64_t experts, int64_t epoch,
                                     uint64_t lane);
// And back: out[t] = the sum of weights[t][j] · rows[row_of[t][j]] over j < k in order, in fp32, without those of
// row_of < 0. weights may be null, and are 1 then. Elements are of `kind` as in treadle_reduce.
TREADLE_API int treadle_combine_rows(const void* rows, int64_t kind, const int32_t* row_of, const float* weights,
                                     int64_t tokens, int64_t k, int64_t width, void* out, uint64_t lane);

// out[m][n] = a[m][k] · b[k][n] with fp32 accumulators, all of `kind` as in treadle_reduce, row by row. Rows of a may
// still be arriving: those of chunk c, `chunk_rows` of them, are read once ready[c] has reached `epoch` (their distance
// as a signed 32-bit number is not negative), in any order of the chunks. When a chunk has not arrived `deadline_us`
// after the call, verdict[0] becomes the first such chunk and the call gives up; INT64_MAX, which the caller puts there,
// means that all came. CUDA: kinds 1 and 2, k and n multiples of 8, a and b aligned to 16 bytes.
TREADLE_API int treadle_streamed_mm(const void* a, const void* b, void* out, int64_t m, int64_t n, int64_t k,
                                    int64_t kind, const uint32_t* ready, int64_t chunk_rows, int64_t epoch,
                                    int64_t deadline_us, int64_t* verdict, uint64_t lane);

// The CPU library alone: a decode step of a transformer beside its matrix products. fp32; sizes are multiples of 16, those
// of heads of 32 and at most 256. A row's bits depend on nothing but the row.
#ifndef __CUDACC__
// out[rows][size] = x / sqrt(mean x² + *eps) · weight[size].
TREADLE_API int treadle_rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, const float* eps,
                                 float* out, uint64_t lane);
// out[rows][size] = silu(gate) · up for gate_up[rows][gate, up][size].
TREADLE_API int treadle_silu_gate(const float* gate_up, int64_t rows, int64_t size, float* out, uint64_t lane);
// qkv[rows][heads + 2 · kv_heads][size]: row r's key (turned by cos and sin[position][size]) and value go to
// keys and values[r][kv_heads][capacity][size] at positions[r], then its turned queries, times scale_eps[0], attend to
// everything up to there. q_norm and k_norm[size], or null: a root-mean-square norm of the heads before they are
// turned, with scale_eps[1].
TREADLE_API int treadle_decode_attention(const float* qkv, const int64_t* positions, const float* cos, const float* sin,
                                         const float* q_norm, const float* k_norm, const float* scale_eps, float* keys,
                                         float* values, float* out, int64_t rows, int64_t heads, int64_t kv_heads,
                                         int64_t size, int64_t capacity, uint64_t lane);
// out[rows][cols] = x[rows][k] · w + bias[cols] + residual[rows][cols], the latter two or null. w[k][cols] lies in panels
// of 32 columns, k × 32 numbers each, zero beyond cols. Every element is summed in the order of k.
TREADLE_API int treadle_panel_product(const float* x, const float* panels, const float* bias, const float* residual,
                                      float* out, int64_t rows, int64_t k, int64_t cols, uint64_t lane);
#endif
