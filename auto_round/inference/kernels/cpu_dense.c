/* y = x W^T for weights of half precision and few rows of x.  See docs/cpu-kernels.md.

   PyTorch's product is slow on processors without instructions for bfloat16 (bench/dense_products.py), and a model's
   head, which is mostly left in it, is a large part of a token.  Products and sums are in float32: in each of WIDTH lanes column
   after column, then lane after lane, then the last columns.  An output is summed by one thread: results depend neither
   on the number of threads nor on how many rows x has. */

#include "cpu_common.h"

#define WIDTH (2 * LANES) /* columns at a time */
#define BLOCK 32          /* outputs that a thread takes at once */
#define AHEAD(p) __builtin_prefetch((p) + 512) /* 1 KB */

struct dense {
    const uint16_t *w;
    const float *x; /* [rows, in], columns in the order in which `widen` gives weights */
    uint8_t *y;
    int64_t in, out, rows;
    int dtype;
    struct share share;
};

/* WIDTH weights: of bfloat16 the even ones and then the odd ones, of float16 in their order. */
INLINE void widen(int dtype, const uint16_t *w, vfloat *one, vfloat *other) {
    if (dtype == BFLOAT16) {
        vint pairs = (vint)load_u16(w);
        *one = (vfloat)(pairs << 16), *other = (vfloat)(pairs & (int32_t)0xffff0000);
        return;
    }
#if defined(__AVX512BW__)
    *one = (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w));
    *other = (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + LANES)));
#elif defined(__AVX2__) && defined(__F16C__)
    *one = (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
    *other = (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + LANES)));
#else
    for (int i = 0; i < LANES; i++) (*one)[i] = from_half(w[i]), (*other)[i] = from_half(w[LANES + i]);
#endif
}

static int64_t place_of(int dtype, int64_t column, int64_t in) {
    if (dtype != BFLOAT16 || column >= in / WIDTH * WIDTH) return column;
    return column / WIDTH * WIDTH + column % 2 * LANES + column % WIDTH / 2;
}

/* One output for one or two rows of x. */
INLINE void dot(const struct dense *job, int dtype, int64_t output, int64_t row, int rows) {
    const uint16_t *w = job->w + output * job->in;
    const float *x = job->x + row * job->in;
    const int64_t whole = job->in / WIDTH * WIDTH;
    vfloat s[2][2] = {{{0}}};
    for (int64_t k = 0; k < whole; k += WIDTH) {
        vfloat one, other;
        widen(dtype, w + k, &one, &other);
        AHEAD(w + k);
        for (int r = 0; r < rows; r++) {
            s[r][0] += one * *(const ufloat *)(x + r * job->in + k);
            s[r][1] += other * *(const ufloat *)(x + r * job->in + k + LANES);
        }
    }
    for (int r = 0; r < rows; r++) {
        float sum = 0;
        for (int i = 0; i < LANES; i++) sum += s[r][0][i] + s[r][1][i];
        for (int64_t k = whole; k < job->in; k++) {
            float weight;
            row_to_float(w, dtype, (int)k, 1, &weight);
            sum += weight * x[r * job->in + k];
        }
        row_from_float(&sum, dtype, output, 1, job->y + (row + r) * job->out * 2);
    }
}

INLINE void dots(const struct dense *job, int dtype, int64_t block) {
    const int64_t end = (block + 1) * BLOCK < job->out ? (block + 1) * BLOCK : job->out;
    for (int64_t output = block * BLOCK; output < end; output++) {
        for (int64_t row = 0; row + 1 < job->rows; row += 2) dot(job, dtype, output, row, 2);
        if (job->rows % 2) dot(job, dtype, output, job->rows - 1, 1);
    }
}

static void multiply(void *arg) {
    struct dense *job = arg;
    struct turn turn = begin_turn(&job->share);
    for (int64_t block; (block = next_item(&job->share, &turn)) >= 0;) {
        if (job->dtype == BFLOAT16) dots(job, BFLOAT16, block);
        else dots(job, FLOAT16, block);
    }
}

/* y [rows, out] = x [rows, in] W^T with W [out, in], all of `dtype`, a half precision.
   x_stride: elements from one row of x to the next. 0, or 1 without memory. */
EXPORT int dense(const uint16_t *w, int64_t out, int64_t in, int64_t rows, const uint16_t *x, int64_t x_stride, void *y, int dtype, int threads) {
    threads = rows * in * out > 1 << 16 && threads > 1 ? threads : 1;
    uint8_t *scratch = malloc((size_t)(threads * 64 + rows * in * 4));
    if (!scratch) return 1;
    float *values = (float *)(scratch + threads * 64);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < in; k++) {
            float value;
            row_to_float(x + r * x_stride, dtype, (int)k, 1, &value);
            values[r * in + place_of(dtype, k, in)] = value;
        }
    memset(scratch, 0, (size_t)threads * 64);
    struct dense job = {w, values, y, in, out, rows, dtype, {(out + BLOCK - 1) / BLOCK, threads, 0, (int64_t *)scratch}};
    parallel(multiply, &job, threads);
    free(scratch);
    return 0;
}
