/* y = x W^T for weights of 2, 4 and 8 bits on CPUs, with integer products.  See docs/cpu-kernels.md.

   Inputs.  Each chunk of at most 128 columns of a row of x, all within one group of the weights, becomes 16-bit
   integers.  Half precisions: x = unit * q with unit = max|x| / 32767; the error of an input is at most 2^-16 of the
   largest input of its chunk.  float32 becomes two rows ("terms"): x = unit * (q + 2^-15 q'), where unit is a power of
   two, so that what is left for the second row is exact; the error is at most 2^-30 of the largest input.  A row with a
   chunk that has no such unit (NaN, Inf, or nothing but very small numbers) is computed in float32.

   Sums.  With |q| <= 32767, codes below 2^8 and at most 2^7 columns, every partial sum of a chunk is at most
   255 * 32767 * 128 = 1069547520 < 2^31 in size.  The same holds for codes that stay shifted inside their byte (a code of
   4 bits times 16 is at most 240; one of 2 bits times 64 at most 192), and for code - zero, which lies in [-255, 255].
   So integer arithmetic is exact, zero points are taken off exactly, and only then comes the product with scale * unit.

   Order.  An output is summed by one thread, chunk after chunk: results depend neither on the number of threads nor on
   how many rows x has.

   Layout.  A head (struct head, chunk starts), then for each block of ROWS outputs and each chunk a record: ROWS scales
   (float16 or float32), ROWS zero points of one byte if they differ, then the codes.  16-bit lane 2 i + b of a vector
   holds, for column 2 p + b, the codes of outputs i, LANES + i, 2 LANES + i and 3 LANES + i ("quarters" 0 to 3):
     4 bits: quarter j at bit 4 j of the lane;     8 bits: two vectors, quarters 0, 1 and then 2, 3;
     2 bits: quarter j at bit 2 j for columns 4 p + b, and at bit 8 + 2 j for columns 4 p + 2 + b.
   Columns are padded with x = 0 to whole pairs (2 bits: fours), outputs with scale 0 to whole blocks. */

#include "cpu_common.h"

#define QUARTERS 4
#define ROWS (QUARTERS * LANES)
#define CHUNK 128      /* columns that share a unit, at most */
#define PIECE 120      /* rows of x for which a block of weights is unpacked once; a multiple of STRIP and of terms */
#define STRIP 6        /* rows of x whose sums are in registers at once */
#define MAGIC 0x41520000
/* Weights come from memory one after the other; asking for them earlier than the processor does by itself is worth a
   third at one row. Past the end nothing happens. */
#define AHEAD(p) __builtin_prefetch((p) + 4096)

gomp_parallel run_parallel;

EXPORT void use_threads_of(gomp_parallel found) { run_parallel = found; }
EXPORT int lanes(void) { return LANES; }
EXPORT int has_half(void) { return HALF; }

struct head {
    int32_t magic, bits, in, out, chunks, zero, zeros_differ, half_scales;
    int64_t first, record_bytes, block_bytes, size; /* bytes: of the first record, the longest record, a block, all */
    /* int32 starts[chunks + 1] follow */
};

INLINE const int32_t *starts_of(const struct head *h) { return (const int32_t *)(h + 1); }
INLINE int padded(int bits, int columns) { return bits == 2 ? (columns + 3) & ~3 : (columns + 1) & ~1; }

/* Keeps a value in a register: without it GCC reads it again from memory for each use, and reading is the bottleneck. */
#if defined(__AVX512BW__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v) (void)0
#endif

/* sum[i] + a[2i] b[2i] + a[2i+1] b[2i+1] */
INLINE vint madd(vint sum, vshort a, vshort b) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (vint)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (vint)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vint)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vint)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return sum + (vint)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
    vint even_a = ((vint)a << 16) >> 16, even_b = ((vint)b << 16) >> 16; /* little-endian lanes */
    return sum + even_a * even_b + ((vint)a >> 16) * ((vint)b >> 16);
#endif
}

INLINE vfloat load_scales(const uint8_t *p, int half, int quarter) {
    vfloat v;
    if (!half) {
        memcpy(&v, p + quarter * sizeof v, sizeof v);
        return v;
    }
    const uint16_t *h = (const uint16_t *)p + quarter * LANES;
#if defined(__AVX512BW__)
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
#else
    for (int i = 0; i < LANES; i++) v[i] = from_half(h[i]);
    return v;
#endif
}

/* ---- packing ---- */

struct pack_job {
    const struct head *head;
    uint8_t *packed, *codes;
    const float *scales;   /* [out, chunks] */
    const uint8_t *zeros;  /* [out, chunks] */
    int64_t next;
};

INLINE int64_t code_bytes(const struct head *h, int columns) {
    return (int64_t)ROWS * padded(h->bits, columns) * h->bits / 8;
}
INLINE int64_t head_of_record(const struct head *h) {
    return ROWS * (h->half_scales ? 2 : 4) + (h->zeros_differ ? ROWS : 0);
}

/* Where the code of (output r of the block, column c of the chunk) lies: its byte and the bit in it. */
INLINE int64_t place(int bits, int r, int c, int *shift) {
    int quarter = r / LANES, lane = r % LANES;
    if (bits == 8) {
        *shift = 0;
        return (((int64_t)(c / 2) * 2 + quarter / 2) * LANES * 2 + lane * 2 + c % 2) * 2 + quarter % 2;
    }
    if (bits == 4) {
        *shift = 4 * (quarter % 2);
        return ((int64_t)(c / 2) * LANES * 2 + lane * 2 + c % 2) * 2 + quarter / 2;
    }
    *shift = 2 * quarter;
    return ((int64_t)(c / 4) * LANES * 2 + lane * 2 + c % 2) * 2 + (c / 2) % 2;
}

/* One row of a chunk into the packed form (which is zero), or out of it. */
INLINE void move_codes(int bits, int in, uint8_t *packed, int r, uint8_t *row, int columns) {
    const int mask = (1 << bits) - 1;
    for (int k = 0, shift; k < columns; k++) {
        int64_t at = place(bits, r, k, &shift);
        if (in) packed[at] |= (uint8_t)((row[k] & mask) << shift);
        else row[k] = (uint8_t)(packed[at] >> shift & mask);
    }
}

/* Blocks into the packed form (in = 1), or their codes out of it. */
INLINE void move_blocks(struct pack_job *job, int in) {
    const struct head *h = job->head;
    const int32_t *starts = starts_of(h);
    for (int64_t block; (block = take(&job->next)) * ROWS < h->out;) {
        uint8_t *record = job->packed + h->first + block * h->block_bytes;
        int rows = h->out - block * ROWS < ROWS ? (int)(h->out - block * ROWS) : ROWS;
        for (int c = 0; c < h->chunks; c++) {
            int columns = starts[c + 1] - starts[c];
            int64_t bytes = head_of_record(h) + code_bytes(h, columns);
            uint8_t *codes = record + head_of_record(h), *zeros = record + ROWS * (h->half_scales ? 2 : 4);
            if (in) memset(record, 0, (size_t)bytes);
            for (int r = 0; r < rows; r++) {
                int64_t row = block * ROWS + r;
                if (in) {
                    float scale = job->scales[row * h->chunks + c];
                    if (h->half_scales) ((uint16_t *)record)[r] = to_half(scale);
                    else memcpy(record + 4 * r, &scale, 4);
                    if (h->zeros_differ) zeros[r] = job->zeros[row * h->chunks + c];
                }
                uint8_t *row_codes = job->codes + row * h->in + starts[c];
                if (h->bits == 8) move_codes(8, in, codes, r, row_codes, columns);
                else if (h->bits == 4) move_codes(4, in, codes, r, row_codes, columns);
                else move_codes(2, in, codes, r, row_codes, columns);
            }
            record += bytes;
        }
    }
}

static void pack_blocks(void *job) { move_blocks(job, 1); }
static void unpack_blocks(void *job) { move_blocks(job, 0); }

/* Bytes of the packed form; fills the head. `zero`: the zero point of all groups, or -1 where they differ. */
static int64_t plan(struct head *h, int bits, int64_t out, int64_t in, int chunks, const int32_t *starts, int zero, int half) {
    memset(h, 0, sizeof *h);
    h->magic = MAGIC + LANES, h->bits = bits, h->in = (int32_t)in, h->out = (int32_t)out, h->chunks = chunks;
    h->zero = zero, h->zeros_differ = zero < 0, h->half_scales = half;
    for (int c = 0; c < chunks; c++) {
        int64_t bytes = head_of_record(h) + code_bytes(h, starts[c + 1] - starts[c]);
        h->block_bytes += bytes;
        if (bytes > h->record_bytes) h->record_bytes = bytes;
    }
    h->first = ((int64_t)sizeof *h + 4 * (chunks + 1) + 63) & ~63;
    h->size = h->first + (out + ROWS - 1) / ROWS * h->block_bytes;
    return h->size;
}

EXPORT int64_t packed_size(int bits, int64_t out, int64_t in, int chunks, const int32_t *starts, int zero, int half) {
    struct head h;
    return plan(&h, bits, out, in, chunks, starts, zero, half);
}

EXPORT void pack(uint8_t *packed, int bits, int64_t out, int64_t in, int chunks, const int32_t *starts, int zero, int half,
                 const uint8_t *codes, const float *scales, const uint8_t *zeros, int threads) {
    struct head *h = (struct head *)packed;
    plan(h, bits, out, in, chunks, starts, zero, half);
    memcpy(h + 1, starts, 4 * ((size_t)chunks + 1));
    struct pack_job job = {h, packed, (uint8_t *)codes, scales, zeros, 0};
    parallel(pack_blocks, &job, threads);
}

EXPORT void unpack(const uint8_t *packed, uint8_t *codes, int threads) {
    struct pack_job job = {(const struct head *)packed, (uint8_t *)packed, codes, 0, 0, 0};
    parallel(unpack_blocks, &job, threads);
}

/* ---- inputs ---- */

struct job {
    const uint8_t *const *packs; /* one for each expert; all of the same shape */
    const int64_t *first_row;    /* [experts + 1] */
    const uint8_t *x;
    uint8_t *y;
    int64_t experts, rows, x_stride, next; /* rows: with their terms */
    int dtype, item_size, terms;
    const struct head *head;
    int16_t *q;      /* for each chunk [rows, padded columns] */
    float *units;    /* [chunks, rows] */
    int32_t *sums;   /* [chunks, rows]: of q */
    uint8_t *plain;  /* [rows / terms]: 1 where a row is computed in float32 */
    int failed;
    struct share share; /* of the walk */
};

static void quantize_row(struct job *job, int64_t row) {
    const struct head *h = job->head;
    const int32_t *starts = starts_of(h);
    const uint8_t *from = job->x + row * job->x_stride * job->item_size;
    float values[CHUNK];
    int64_t before = 0;
    for (int c = 0; c < h->chunks; c++) {
        int count = starts[c + 1] - starts[c], wide = padded(h->bits, count);
        before += wide;
        row_to_float(from, job->dtype, starts[c], count, values);
        uint32_t most = 0; /* sizes compare as integers, and NaN is larger than Inf */
        for (int i = 0; i < count; i++) {
            uint32_t size = to_bits(values[i]) & 0x7fffffff;
            most = size > most ? size : most;
        }
        float largest = from_bits(most);
        if (most >= 0x7f800000 || (most && largest < 0x1p-80f)) job->plain[row] = 1, largest = 0, most = 0;
        if (!most) memset(values, 0, sizeof values);
        float unit = largest / 32767.0f;
        if (job->terms == 2) unit = from_bits((to_bits(unit) + 0x7fffff) & 0x7f800000); /* the next power of two */
        for (int term = 0; term < job->terms; term++) {
            int64_t at = row * job->terms + term;
            int16_t *to = job->q + (before - wide) * job->rows + at * wide;
            float inverse = !most ? 0.0f : job->terms == 2 ? 1.0f / unit : 32767.0f / largest;
            int32_t sum = 0;
            for (int i = 0; i < count; i++) { /* adding 1.5 * 2^23 rounds to nearest; the integer is in the low bits */
                int32_t q = (int32_t)(to_bits(values[i] * inverse + 12582912.0f) - 0x4b400000u);
                to[i] = (int16_t)q;
                sum += q;
            }
            for (int i = count; i < wide; i++) to[i] = 0;
            job->units[c * job->rows + at] = unit;
            job->sums[c * job->rows + at] = sum;
            if (job->terms == 2 && !term) {
                for (int i = 0; i < count; i++) values[i] -= unit * (float)to[i];
                unit *= 0x1p-15f;
            }
        }
    }
}

static void quantize_rows(void *arg) {
    struct job *job = arg;
    for (int64_t row; (row = take(&job->next)) < job->rows / job->terms;) quantize_row(job, row);
}

/* ---- one or two rows: codes go from the packed form straight into the products ---- */

INLINE void direct(int bits, int rows, const uint8_t *codes, int wide, const int16_t *q, vint sum[2][QUARTERS]) {
    const int size = 4 * LANES;
    vint s[2][QUARTERS] = {{{0}}};
    if (bits == 8) {
        for (int p = 0; p < wide / 2; p++, codes += 2 * size) {
            vushort v = load_u16(codes), w = load_u16(codes + size);
            AHEAD(codes);
            for (int r = 0; r < rows; r++) {
                vshort x = all_pairs(q + r * wide + 2 * p);
                s[r][0] = madd(s[r][0], (vshort)(v & 255), x);
                s[r][1] = madd(s[r][1], (vshort)(v >> 8), x);
                s[r][2] = madd(s[r][2], (vshort)(w & 255), x);
                s[r][3] = madd(s[r][3], (vshort)(w >> 8), x);
            }
        }
    } else if (bits == 4) {
        for (int p = 0; p < wide / 2; p++, codes += size) {
            vushort v = load_u16(codes), w;
            AHEAD(codes);
            KEEP(v);
            w = v >> 8;
            for (int r = 0; r < rows; r++) {
                vshort x = all_pairs(q + r * wide + 2 * p);
                s[r][0] = madd(s[r][0], (vshort)(v & 15), x);
                s[r][1] = madd(s[r][1], (vshort)(v & 240), x);
                s[r][2] = madd(s[r][2], (vshort)(w & 15), x);
                s[r][3] = madd(s[r][3], (vshort)(w & 240), x);
            }
        }
        for (int r = 0; r < rows; r++) s[r][1] >>= 4, s[r][3] >>= 4;
    } else {
        for (int p = 0; p < wide / 4; p++, codes += size) {
            vushort v = load_u16(codes), w;
            AHEAD(codes);
            KEEP(v);
            w = v >> 8;
            for (int r = 0; r < rows; r++) {
                vshort x = all_pairs(q + r * wide + 4 * p), z = all_pairs(q + r * wide + 4 * p + 2);
                s[r][0] = madd(madd(s[r][0], (vshort)(v & 3), x), (vshort)(w & 3), z);
                s[r][1] = madd(madd(s[r][1], (vshort)(v & 12), x), (vshort)(w & 12), z);
                s[r][2] = madd(madd(s[r][2], (vshort)(v & 48), x), (vshort)(w & 48), z);
                s[r][3] = madd(madd(s[r][3], (vshort)(v & 192), x), (vshort)(w & 192), z);
            }
        }
        for (int r = 0; r < rows; r++) s[r][1] >>= 2, s[r][2] >>= 4, s[r][3] >>= 6;
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < QUARTERS; j++) sum[r][j] = s[r][j];
}

INLINE vint load_zeros(const struct head *h, const uint8_t *zeros, int quarter) {
    if (!h->zeros_differ) return all_int(h->zero);
    vint z;
    for (int i = 0; i < LANES; i++) z[i] = zeros[quarter * LANES + i];
    return z;
}

INLINE void few_rows(const struct job *job, const struct head *h, const uint8_t *record, int64_t row, int rows, int bits, float *tile) {
    const int32_t *starts = starts_of(h);
    const int64_t scale_bytes = ROWS * (h->half_scales ? 2 : 4);
    vfloat y[2][QUARTERS] = {{{0}}};
    int64_t before = 0;
    for (int c = 0; c < h->chunks; c++) {
        int wide = padded(bits, starts[c + 1] - starts[c]);
        const uint8_t *codes = record + head_of_record(h);
        vint sum[2][QUARTERS];
        direct(bits, rows, codes, wide, job->q + before * job->rows + row * wide, sum);
        for (int j = 0; j < QUARTERS; j++) {
            vfloat scale = load_scales(record, h->half_scales, j);
            vint zero = load_zeros(h, record + scale_bytes, j);
            for (int r = 0; r < rows; r++) {
                int64_t at = c * job->rows + row + r;
                vint exact = sum[r][j] - zero * all_int(job->sums[at]);
                y[r][j] += __builtin_convertvector(exact, vfloat) * (scale * all_float(job->units[at]));
            }
        }
        before += wide;
        record = codes + (int64_t)ROWS * wide * bits / 8;
    }
    memcpy(tile, y, (size_t)rows * ROWS * 4);
}

/* ---- more rows: a chunk is unpacked to code - zero, 16 bits each, and used for all of them ---- */

/* panel[half][pair of columns][quarter of the half][2 LANES] */
INLINE void unpack_chunk(const struct head *h, int bits, const uint8_t *record, int wide, int16_t *panel) {
    const uint8_t *codes = record + head_of_record(h), *zeros = record + ROWS * (h->half_scales ? 2 : 4);
    const int size = 4 * LANES, pairs = wide / 2;
    vushort zero[QUARTERS];
    for (int j = 0; j < QUARTERS; j++) {
        vint z = load_zeros(h, zeros, j);
        zero[j] = (vushort)(z | z << 16);
    }
    int16_t *other = panel + pairs * 4 * LANES;
    for (int p = 0; p < pairs; p++, panel += 4 * LANES, other += 4 * LANES) {
        vushort v0, v1, v2, v3;
        if (bits == 8) {
            vushort a = load_u16(codes + 2 * size * p), b = load_u16(codes + 2 * size * p + size);
            AHEAD(codes + 2 * size * p);
            v0 = a & 255, v1 = a >> 8, v2 = b & 255, v3 = b >> 8;
        } else if (bits == 4) {
            vushort a = load_u16(codes + size * p);
            AHEAD(codes + size * p);
            v0 = a & 15, v1 = a >> 4 & 15, v2 = a >> 8 & 15, v3 = a >> 12;
        } else {
            vushort a = load_u16(codes + size * (p / 2)) >> (p % 2 * 8);
            v0 = a & 3, v1 = a >> 2 & 3, v2 = a >> 4 & 3, v3 = a >> 6 & 3;
        }
        *(vushort *)panel = v0 - zero[0], *(vushort *)(panel + 2 * LANES) = v1 - zero[1];
        *(vushort *)other = v2 - zero[2], *(vushort *)(other + 2 * LANES) = v3 - zero[3];
    }
}

INLINE void strip(int rows, int pairs, const int16_t *panel, const int16_t *q, int wide, const float *units, const vfloat *scales, float *tile) {
    vint s[STRIP][2] = {{{0}}};
    for (int p = 0; p < pairs; p++) {
        vshort a = *(const vshort *)(panel + p * 4 * LANES), b = *(const vshort *)(panel + p * 4 * LANES + 2 * LANES);
        KEEP(a);
        KEEP(b);
        for (int r = 0; r < rows; r++) {
            vshort x = all_pairs(q + r * wide + 2 * p);
            s[r][0] = madd(s[r][0], a, x);
            s[r][1] = madd(s[r][1], b, x);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 2; j++) {
            ufloat *y = (ufloat *)(tile + r * ROWS + j * LANES);
            *y += __builtin_convertvector(s[r][j], vfloat) * (scales[j] * all_float(units[r]));
        }
}

INLINE void many_rows(const struct job *job, const struct head *h, const uint8_t *record, int64_t row, int rows, int bits, float *tile) {
    const int32_t *starts = starts_of(h);
    int16_t panel[ROWS * CHUNK] __attribute__((aligned(64)));
    int64_t before = 0;
    memset(tile, 0, (size_t)rows * ROWS * 4);
    for (int c = 0; c < h->chunks; c++) {
        int wide = padded(bits, starts[c + 1] - starts[c]), pairs = wide / 2;
        unpack_chunk(h, bits, record, wide, panel);
        vfloat scales[QUARTERS];
        for (int j = 0; j < QUARTERS; j++) scales[j] = load_scales(record, h->half_scales, j);
        for (int r = 0; r < rows; r += STRIP) {
            const int16_t *q = job->q + before * job->rows + (row + r) * wide;
            const float *units = job->units + c * job->rows + row + r;
            for (int i = 0; i < STRIP * wide; i += 32) __builtin_prefetch(q + STRIP * wide + i);
            for (int half = 0; half < 2; half++) {
                const int16_t *side = panel + half * pairs * 4 * LANES;
                const vfloat *two = scales + 2 * half;
                float *to = tile + r * ROWS + 2 * half * LANES;
                switch (rows - r) {
                case 1: strip(1, pairs, side, q, wide, units, two, to); break;
                case 2: strip(2, pairs, side, q, wide, units, two, to); break;
                case 3: strip(3, pairs, side, q, wide, units, two, to); break;
                case 4: strip(4, pairs, side, q, wide, units, two, to); break;
                case 5: strip(5, pairs, side, q, wide, units, two, to); break;
                default: strip(STRIP, pairs, side, q, wide, units, two, to);
                }
            }
        }
        before += wide;
        record += head_of_record(h) + (int64_t)ROWS * wide * bits / 8;
    }
}

/* One function for each case, not inlined into each other: GCC keeps sums in registers only in small functions. */
typedef void (*kernel)(const struct job *, const struct head *, const uint8_t *, int64_t, int, float *);
#define CASE(name, call)                                                                                          \
    static __attribute__((noinline)) void name(const struct job *job, const struct head *h, const uint8_t *record, \
                                               int64_t row, int rows, float *tile) {                             \
        (void)rows;                                                                                              \
        call;                                                                                                    \
    }
CASE(one_2, few_rows(job, h, record, row, 1, 2, tile))
CASE(two_2, few_rows(job, h, record, row, 2, 2, tile))
CASE(many_2, many_rows(job, h, record, row, rows, 2, tile))
CASE(one_4, few_rows(job, h, record, row, 1, 4, tile))
CASE(two_4, few_rows(job, h, record, row, 2, 4, tile))
CASE(many_4, many_rows(job, h, record, row, rows, 4, tile))
CASE(one_8, few_rows(job, h, record, row, 1, 8, tile))
CASE(two_8, few_rows(job, h, record, row, 2, 8, tile))
CASE(many_8, many_rows(job, h, record, row, rows, 8, tile))
static const kernel kernels[3][3] = {{one_2, two_2, many_2}, {one_4, two_4, many_4}, {one_8, two_8, many_8}};

/* ---- a row that has no units ---- */

static void float_row(const struct job *job, const struct head *h, const uint8_t *record, int64_t row, float *tile) {
    const int32_t *starts = starts_of(h);
    float y[ROWS] = {0}, x[CHUNK];
    for (int c = 0; c < h->chunks; c++) {
        int count = starts[c + 1] - starts[c], mask = (1 << h->bits) - 1;
        const uint8_t *codes = record + head_of_record(h), *zeros = record + ROWS * (h->half_scales ? 2 : 4);
        row_to_float(job->x + row * job->x_stride * job->item_size, job->dtype, starts[c], count, x);
        for (int r = 0; r < ROWS; r++) {
            float scale = h->half_scales ? from_half(((const uint16_t *)record)[r]) : ((const float *)record)[r];
            int zero = h->zeros_differ ? zeros[r] : h->zero;
            for (int k = 0, shift; k < count; k++) {
                int64_t at = place(h->bits, r, k, &shift);
                y[r] += scale * (float)((codes[at] >> shift & mask) - zero) * x[k];
            }
        }
        record = codes + code_bytes(h, count);
    }
    memcpy(tile, y, sizeof y);
}

/* ---- the walk: an item is a block of outputs for a piece of one expert's rows ---- */

struct cursor { int64_t expert, before; }; /* before: items of the experts before */

static void one_item(const struct job *job, int64_t item, int64_t blocks, struct cursor *at, float *tile) {
    const int terms = job->terms;
    int64_t count, pieces;
    if (item < at->before) *at = (struct cursor){0, 0}; /* another range */
    for (;; at->expert++) {
        count = (job->first_row[at->expert + 1] - job->first_row[at->expert]) * terms;
        pieces = (count + PIECE - 1) / PIECE;
        if (item < at->before + pieces * blocks) break;
        at->before += pieces * blocks;
    }
    int64_t block = (item - at->before) / pieces, piece = (item - at->before) % pieces;
    int64_t row = job->first_row[at->expert] * terms + piece * PIECE;
    int rows = count - piece * PIECE < PIECE ? (int)(count - piece * PIECE) : PIECE;
    const struct head *h = (const struct head *)job->packs[at->expert];
    const uint8_t *record = job->packs[at->expert] + h->first + block * h->block_bytes;
    kernels[h->bits == 8 ? 2 : h->bits / 4][rows > 2 ? 2 : rows - 1](job, h, record, row, rows, tile);
    int width = h->out - block * ROWS < ROWS ? (int)(h->out - block * ROWS) : ROWS;
    for (int r = 0; r < rows; r += terms) {
        int64_t of_x = (row + r) / terms;
        float *sums = tile + r * ROWS;
        if (job->plain[of_x]) float_row(job, h, record, of_x, sums);
        else if (terms == 2) for (int i = 0; i < ROWS; i++) sums[i] += sums[ROWS + i];
        row_from_float(sums, job->dtype, block * ROWS, width, job->y + of_x * h->out * job->item_size);
    }
}

static void multiply(void *arg) {
    struct job *job = arg;
    const struct head *shape = job->head;
    int64_t blocks = (shape->out + ROWS - 1) / ROWS;
    float *tile = malloc(PIECE * ROWS * sizeof(float));
    if (!tile) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    struct turn turn = begin_turn(&job->share);
    struct cursor at = {0, 0};
    for (int64_t item; (item = next_item(&job->share, &turn)) >= 0;) one_item(job, item, blocks, &at, tile);
    free(tile);
}

/* y [rows, out] = x [rows, in] W^T, where rows first_row[e] to first_row[e + 1] go through packs[e].
   x_stride: elements from one row of x to the next; dtype: of x and y. 0, or 1 without memory, 2 for foreign tensors. */
EXPORT int linear(const uint8_t *const *packs, const int64_t *first_row, int64_t experts, const void *x, int64_t x_stride, void *y, int dtype, int threads) {
    const struct head *h = (const struct head *)packs[0];
    for (int64_t e = 0; e < experts; e++) {
        const struct head *other = (const struct head *)packs[e];
        if (other->magic != MAGIC + LANES || other->in != h->in || other->out != h->out || other->bits != h->bits || other->chunks != h->chunks) return 2;
    }
    const int terms = dtype == FLOAT32 ? 2 : 1;
    struct job job = {packs, first_row, x, y, experts, first_row[experts] * terms, x_stride, 0, dtype,
                      dtype == FLOAT32 ? 4 : 2, terms, h, 0, 0, 0, 0, 0, {0}};
    if (!job.rows) return 0;
    const int32_t *starts = starts_of(h);
    int64_t wide = 0, pieces = 0;
    for (int c = 0; c < h->chunks; c++) wide += padded(h->bits, starts[c + 1] - starts[c]);
    for (int64_t e = 0; e < experts; e++) pieces += ((first_row[e + 1] - first_row[e]) * terms + PIECE - 1) / PIECE;
    int64_t groups = job.rows * h->chunks;
    threads = job.rows * h->in * h->out > 1 << 16 && threads > 1 ? threads : 1;
    uint8_t *scratch = malloc((size_t)(threads * 64 + groups * 8 + wide * job.rows * 2 + job.rows));
    if (!scratch) return 1;
    job.share = (struct share){pieces * ((h->out + ROWS - 1) / ROWS), threads, 0, (int64_t *)scratch};
    job.units = (float *)(scratch + threads * 64), job.sums = (int32_t *)(job.units + groups), job.q = (int16_t *)(job.sums + groups);
    job.plain = (uint8_t *)(job.q + wide * job.rows);
    memset(scratch, 0, (size_t)threads * 64);
    memset(job.plain, 0, (size_t)job.rows);
    parallel(quantize_rows, &job, job.rows * h->in > 1 << 16 ? threads : 1);
    parallel(multiply, &job, threads);
    free(scratch);
    return job.failed;
}

EXPORT int linear_one(const uint8_t *pack, int64_t rows, const void *x, int64_t x_stride, void *y, int dtype, int threads) {
    const int64_t first_row[2] = {0, rows};
    return linear(&pack, first_row, 1, x, x_stride, y, dtype, threads);
}
