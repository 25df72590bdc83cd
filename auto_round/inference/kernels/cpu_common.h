/* What the C files share: vectors as wide as the processor's, floating point formats, threads. See docs/cpu-kernels.md. */

#ifndef AUTO_ROUND_CPU_COMMON
#define AUTO_ROUND_CPU_COMMON

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int16_t vshort __attribute__((vector_size(4 * LANES)));
typedef uint16_t vushort __attribute__((vector_size(4 * LANES)));
/* the same, anywhere in memory */
typedef float ufloat __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t ushort_u __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t pair_u __attribute__((aligned(2), may_alias));

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* ---- vectors ---- */

INLINE vushort load_u16(const void *p) { return *(const ushort_u *)p; }
INLINE vint all_int(int32_t s) { return s - (vint){0}; }
INLINE vfloat all_float(float s) { return s - (vfloat){0}; }
INLINE vshort all_pairs(const int16_t *pair) { return (vshort)all_int(*(const pair_u *)pair); }

/* ---- floating point formats ---- */

INLINE float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

#if defined(__F16C__)
#define HALF 1
INLINE float from_half(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t to_half(float f) { return _cvtss_sh(f, 0); }
#elif defined(__aarch64__)
#define HALF 1
INLINE float from_half(uint16_t h) { __fp16 f; memcpy(&f, &h, 2); return (float)f; }
INLINE uint16_t to_half(float f) { __fp16 g = (__fp16)f; uint16_t h; memcpy(&h, &g, 2); return h; }
#else
#define HALF 0
INLINE float from_half(uint16_t h) { (void)h; return 0; }
INLINE uint16_t to_half(float f) { (void)f; return 0; }
#endif

INLINE void row_to_float(const void *row, int dtype, int first, int count, float *to) {
    if (dtype == FLOAT32) {
        memcpy(to, (const float *)row + first, 4 * (size_t)count);
    } else {
        const uint16_t *from = (const uint16_t *)row + first;
        if (dtype == BFLOAT16) for (int i = 0; i < count; i++) to[i] = from_bits((uint32_t)from[i] << 16);
        else for (int i = 0; i < count; i++) to[i] = from_half(from[i]);
    }
}

INLINE void row_from_float(const float *from, int dtype, int64_t first, int count, void *row) {
    if (dtype == FLOAT32) {
        memcpy((float *)row + first, from, 4 * (size_t)count);
        return;
    }
    uint16_t *to = (uint16_t *)row + first;
    if (dtype == BFLOAT16) {
        for (int i = 0; i < count; i++) { /* to nearest, ties to even; NaN stays NaN */
            uint32_t bits = to_bits(from[i]), quiet = (bits >> 16) | 0x40;
            uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
        }
    } else {
        for (int i = 0; i < count; i++) to[i] = to_half(from[i]);
    }
}

/* ---- threads: those of PyTorch's OpenMP runtime; others beside them would fight with its spinning ones ---- */

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
extern gomp_parallel run_parallel; /* given once by the loader; without it there is one thread */

INLINE void parallel(void (*work)(void *), void *job, int threads) {
    if (threads > 1 && run_parallel) run_parallel(work, job, (unsigned)threads, 0);
    else work(job);
}

INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* ---- items for threads: each has a range of items that follow each other, and helps in the others' when it is through.
   Blocks that lie side by side come from memory faster than every second one. ---- */

struct share {
    int64_t items, ranges, begun; /* begun: threads */
    int64_t *taken;               /* [ranges, 8], zeros: how many of each range, each number in a cache line of its own */
};
struct turn { int64_t home, tried; };

INLINE struct turn begin_turn(struct share *share) { return (struct turn){take(&share->begun), 0}; }

/* The next item of a thread, -1 when there is none. Items of a range rise. */
INLINE int64_t next_item(struct share *share, struct turn *turn) {
    for (; turn->tried < share->ranges; turn->tried++) {
        const int64_t range = (turn->home + turn->tried) % share->ranges;
        const int64_t item = share->items * range / share->ranges + take(share->taken + 8 * range);
        if (item < share->items * (range + 1) / share->ranges) return item;
    }
    return -1;
}

#endif
