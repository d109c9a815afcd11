/* SPDX-License-Identifier: Apache-2.0
 *
 * SSE2 is part of x86-64, so it needs no run-time choice; elsewhere the plain loops stand, which
 * compilers turn into the machine's own interleaving loads and stores.
 *
 * Everything below is inlined with a constant width and its inner loops are unrolled by request: left to
 * -O2 the vectors go through memory at every step, and joining runs at 1.8 GB/s in place of 34.
 */
#include "lazymem.h"

#include <errno.h>
#include <string.h>

#define LM_INLINE static inline __attribute__((always_inline))
#define LM_UNROLL _Pragma("GCC unroll 8")

#if defined(__SSE2__)
#include <emmintrin.h>

#define LM_VECTOR 16

LM_INLINE __m128i load(const uint8_t *from)
{
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}

LM_INLINE void store(uint8_t *to, __m128i value)
{
    _mm_storeu_si128((__m128i *)(void *)to, value);
}

/* 16 elements at a time. Interleaving bytes log2(width) times turns planes into elements:
 * planes p and p + width/2 are merged first, so that byte order comes out right. */
LM_INLINE size_t join_vector(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    size_t done;

    for (done = 0; done + LM_VECTOR <= count; done += LM_VECTOR) {
        __m128i from[8], to[8];
        int plane, step;

        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            from[plane] = load(in + (size_t)plane * count + done);
        LM_UNROLL
        for (step = 1; step < width; step *= 2) {
            LM_UNROLL
            for (plane = 0; plane < width / 2; plane++) {
                to[2 * plane] = _mm_unpacklo_epi8(from[plane], from[plane + width / 2]);
                to[2 * plane + 1] = _mm_unpackhi_epi8(from[plane], from[plane + width / 2]);
            }
            memcpy(from, to, sizeof from);
        }
        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            store(out + (done * (size_t)width) + (size_t)plane * LM_VECTOR, from[plane]);
    }
    return done;
}

/* The inverse: taking the even and the odd bytes apart log2(width) times. */
LM_INLINE size_t split_vector(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    const __m128i low = _mm_set1_epi16(0x00FF);
    size_t done;

    for (done = 0; done + LM_VECTOR <= count; done += LM_VECTOR) {
        __m128i from[8], to[8];
        int plane, step;

        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            from[plane] = load(in + (done * (size_t)width) + (size_t)plane * LM_VECTOR);
        LM_UNROLL
        for (step = 1; step < width; step *= 2) {
            LM_UNROLL
            for (plane = 0; plane < width / 2; plane++) {
                __m128i a = from[2 * plane], b = from[2 * plane + 1];

                to[plane] = _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low));
                to[plane + width / 2] =
                    _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
            }
            memcpy(from, to, sizeof from);
        }
        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            store(out + (size_t)plane * count + done, from[plane]);
    }
    return done;
}
#else
LM_INLINE size_t join_vector(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    (void)in, (void)out, (void)count, (void)width;
    return 0;
}

LM_INLINE size_t split_vector(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    (void)in, (void)out, (void)count, (void)width;
    return 0;
}
#endif

LM_INLINE void join(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    size_t i = join_vector(in, out, count, width);
    int plane;

    for (; i < count; i++)
        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            out[i * (size_t)width + (size_t)plane] = in[(size_t)plane * count + i];
}

LM_INLINE void split(const uint8_t *in, uint8_t *out, size_t count, int width)
{
    size_t i = split_vector(in, out, count, width);
    int plane;

    for (; i < count; i++)
        LM_UNROLL
        for (plane = 0; plane < width; plane++)
            out[(size_t)plane * count + i] = in[i * (size_t)width + (size_t)plane];
}

static void copy_tail(const uint8_t *in, uint8_t *out, size_t length, int width)
{
    size_t tail = length % (size_t)width;

    memcpy(out + length - tail, in + length - tail, tail);
}

int lm_planes_join(const void *in, void *out, size_t length, int width)
{
    switch (width) {
    case 2: join(in, out, length / 2, 2); break;
    case 4: join(in, out, length / 4, 4); break;
    case 8: join(in, out, length / 8, 8); break;
    default: return -EINVAL;
    }
    copy_tail(in, out, length, width);
    return 0;
}

int lm_planes_split(const void *in, void *out, size_t length, int width)
{
    switch (width) {
    case 2: split(in, out, length / 2, 2); break;
    case 4: split(in, out, length / 4, 4); break;
    case 8: split(in, out, length / 8, 8); break;
    default: return -EINVAL;
    }
    copy_tail(in, out, length, width);
    return 0;
}
