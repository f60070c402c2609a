/* 2x2 max pooling over (N, H, W, C), the bias of a convolution, and ReLU where asked for: each pixel is read once, and
 * what backward needs of it is one byte instead of an int64 index and the full-size map. A bias, which may be NULL, is
 * added to a window's maximum, a quarter of the additions; its gradient is summed while the gradient is spread, in fp32,
 * row by row. Rows of windows are shared out over OpenMP's threads.
 *
 * The winner of a tie is the first in reading order, and a NaN wins: torch's own choices. */
#include <stdint.h>
#include <string.h>

#define NO_GRADIENT 4 /* where ReLU cut the maximum off */

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = -(uint32_t)(value != value);
    return (uint16_t)((rounded & ~nan) | (0x7fc0 & nan)); /* without a branch: loops of it become vectors */
}

static inline float from_f32(float x) { return x; }
static inline float to_f32(float x) { return x; }

#define WINS(candidate, best) (((candidate) > (best)) | ((candidate) != (candidate)))

#define POOL(NAME, TYPE, FLOAT, ROUND)                                                                                 \
    void NAME##_forward(const TYPE *restrict x, const TYPE *restrict bias, TYPE *restrict out, uint8_t *restrict index, \
                        int64_t rows, int64_t columns, int64_t channels, int relu) {                                   \
        const uint8_t cut = relu ? NO_GRADIENT : 0, keep = relu ? 0 : 1, biased = bias != 0;                           \
        _Pragma("omp parallel for schedule(static)") for (int64_t row = 0; row < rows; row++) {                        \
            for (int64_t column = 0; column < columns; column++) {                                                     \
                const TYPE *restrict a = x + (2 * row * columns + column) * 2 * channels;                              \
                const TYPE *restrict b = a + channels;                                                                 \
                const TYPE *restrict c = a + 2 * columns * channels;                                                   \
                const TYPE *restrict d = c + channels;                                                                 \
                const TYPE *restrict add = bias;                                                                       \
                TYPE *restrict to = out + (row * columns + column) * channels;                                         \
                uint8_t *restrict which = index + (row * columns + column) * channels;                                 \
                for (int64_t k = 0; k < channels; k++) {                                                               \
                    TYPE best = a[k];                                                                                  \
                    uint8_t winner = 0;                                                                                \
                    int wins = WINS(FLOAT(b[k]), FLOAT(best));                                                         \
                    best = wins ? b[k] : best, winner = wins ? 1 : winner;                                             \
                    wins = WINS(FLOAT(c[k]), FLOAT(best));                                                             \
                    best = wins ? c[k] : best, winner = wins ? 2 : winner;                                             \
                    wins = WINS(FLOAT(d[k]), FLOAT(best));                                                             \
                    best = wins ? d[k] : best, winner = wins ? 3 : winner;                                             \
                    int pass = keep | biased | !(FLOAT(best) <= 0);                                                    \
                    to[k] = pass ? best : (TYPE)0;                                                                     \
                    which[k] = pass ? winner : cut;                                                                    \
                }                                                                                                      \
                for (int64_t k = 0; k < (biased ? channels : 0); k++) {                                                \
                    TYPE sum = ROUND(FLOAT(to[k]) + FLOAT(add[k]));                                                    \
                    int pass = keep | !(FLOAT(sum) <= 0);                                                              \
                    to[k] = pass ? sum : (TYPE)0;                                                                      \
                    which[k] = pass ? which[k] : cut;                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void NAME##_backward(const TYPE *restrict gradient, const uint8_t *restrict index, TYPE *restrict out,             \
                         float *restrict sums, int64_t rows, int64_t columns, int64_t channels) {                      \
        _Pragma("omp parallel for schedule(static)") for (int64_t row = 0; row < rows; row++) {                        \
            float *restrict sum = sums ? sums + row * channels : 0;                                                    \
            const int64_t summed = sums ? channels : 0;                                                                \
            for (int64_t k = 0; k < summed; k++) sum[k] = 0;                                                           \
            for (int64_t column = 0; column < columns; column++) {                                                     \
                TYPE *restrict a = out + (2 * row * columns + column) * 2 * channels;                                  \
                TYPE *restrict c = a + 2 * columns * channels;                                                         \
                const TYPE *restrict from = gradient + (row * columns + column) * channels;                            \
                const uint8_t *restrict which = index + (row * columns + column) * channels;                           \
                for (int64_t k = 0; k < summed; k++) sum[k] += which[k] == NO_GRADIENT ? 0 : FLOAT(from[k]);           \
                for (int64_t k = 0; k < channels; k++) a[k] = which[k] == 0 ? from[k] : (TYPE)0;                       \
                for (int64_t k = 0; k < channels; k++) a[k + channels] = which[k] == 1 ? from[k] : (TYPE)0;            \
                for (int64_t k = 0; k < channels; k++) c[k] = which[k] == 2 ? from[k] : (TYPE)0;                       \
                for (int64_t k = 0; k < channels; k++) c[k + channels] = which[k] == 3 ? from[k] : (TYPE)0;            \
            }                                                                                                          \
        }                                                                                                              \
    }

POOL(pool_bf16, uint16_t, from_bf16, to_bf16)
POOL(pool_f32, float, from_f32, to_f32)
