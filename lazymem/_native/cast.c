/* SPDX-License-Identifier: Apache-2.0
 *
 * Every format goes by way of float32, a block at a time, but those between float32 and float64. Formats of
 * 8 bits are looked up: their tables are worked out when the library is loaded. bfloat16 is the upper half
 * of a float32; float16 uses the processor's own instructions where it has them (F16C).
 */
#include "cast.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define LM_BLOCK 512 /* elements of float32 on the stack */

static float of_byte[LM_FLOAT_COUNT][256]; /* formats of 8 bits only */
static bool has_f16c;

static const uint8_t widths[LM_FLOAT_COUNT] = {
    [LM_FLOAT_16] = 2,        [LM_FLOAT_BRAIN] = 2,    [LM_FLOAT_32] = 4,         [LM_FLOAT_64] = 8,
    [LM_FLOAT_8_E4M3FN] = 1,  [LM_FLOAT_8_E5M2] = 1,   [LM_FLOAT_8_E4M3FNUZ] = 1, [LM_FLOAT_8_E5M2FNUZ] = 1,
};

bool lm_cast_widths(uint32_t cast, unsigned *ret_from, unsigned *ret_to)
{
    uint32_t from = cast >> 8, to = cast & 0xFF;

    if (cast == LM_CAST_NONE) {
        *ret_from = *ret_to = 1;
        return true;
    }
    if (from >= LM_FLOAT_COUNT || to >= LM_FLOAT_COUNT || widths[from] == 0 || widths[to] < 2)
        return false;
    *ret_from = widths[from];
    *ret_to = widths[to];
    return true;
}

/* ---- one number ---- */

static float float_of_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3FF;

    if (exponent == 31) /* infinity; a NaN becomes a quiet one, as the processor does it */
        return float_of_bits(sign | 0x7F800000 | mantissa << 13 | (mantissa != 0 ? 0x400000 : 0));
    if (exponent == 0) /* zero, or so small that float32 needs no such form: exact in arithmetic */
        return sign ? -((float)mantissa * 0x1p-24f) : (float)mantissa * 0x1p-24f;
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;

    if (rest > 0x7F800000) /* NaN */
        return (uint16_t)(sign | 0x7E00 | ((rest >> 13) & 0x3FF));
    if (rest >= 0x477FF000) /* rounds to more than 65504 */
        return (uint16_t)(sign | 0x7C00);
    if (rest < 0x38800000) { /* below 2^-14: multiples of 2^-24; adding 0.5 rounds to those, ties to even */
        float shifted = float_of_bits(rest) + 0.5f;

        return (uint16_t)(sign | (bits_of_float(shifted) - 0x3F000000));
    }
    rest += 0xFFF + ((rest >> 13) & 1);
    return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}

static uint16_t brain_of_float(float value)
{
    uint32_t bits = bits_of_float(value);

    if ((bits & 0x7FFFFFFF) > 0x7F800000) /* NaN: rounding could make an infinity of it */
        return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* exponent bits e, mantissa bits 7 - e. fnuz: no infinities, no negative zero, which is the only NaN, and a
 * bias of one more. */
static float float_of_small(unsigned byte, unsigned e, bool fnuz, bool has_infinity)
{
    unsigned m = 7 - e, exponent = (byte >> m) & ((1u << e) - 1), mantissa = byte & ((1u << m) - 1);
    int bias = (1 << (e - 1)) - 1 + (fnuz ? 1 : 0);
    float sign = byte & 0x80 ? -1.0f : 1.0f;

    if (fnuz && byte == 0x80)
        return float_of_bits(0x7FC00000);
    if (has_infinity && exponent == (1u << e) - 1)
        return mantissa == 0 ? sign * INFINITY : float_of_bits((byte & 0x80 ? 0xFFC00000 : 0x7FC00000));
    if (!fnuz && !has_infinity && (byte & 0x7F) == 0x7F)
        return float_of_bits(byte & 0x80 ? 0xFFC00000 : 0x7FC00000);
    if (exponent == 0)
        return sign * ldexpf((float)mantissa, 1 - bias - (int)m);
    return sign * ldexpf((float)(mantissa | 1u << m), (int)exponent - bias - (int)m);
}

__attribute__((constructor)) static void prepare(void)
{
    unsigned byte;

    for (byte = 0; byte < 256; byte++) {
        of_byte[LM_FLOAT_8_E4M3FN][byte] = float_of_small(byte, 4, false, false);
        of_byte[LM_FLOAT_8_E5M2][byte] = float_of_small(byte, 5, false, true);
        of_byte[LM_FLOAT_8_E4M3FNUZ][byte] = float_of_small(byte, 4, true, false);
        of_byte[LM_FLOAT_8_E5M2FNUZ][byte] = float_of_small(byte, 5, true, false);
    }
#if defined(__x86_64__)
    unsigned a, b, c, d;

    __builtin_cpu_init();
    /* By hand: clang 14 knows no feature "f16c". "avx": the system saves such registers, too. */
    has_f16c = __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
#endif
}

/* ---- many ---- */

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) static size_t widen_half_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    size_t i;

    for (i = 0; i + 8 <= count; i += 8) {
        __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(in + 2 * i));

        _mm256_storeu_ps((float *)(void *)(out + 4 * i), _mm256_cvtph_ps(half));
    }
    return i;
}

__attribute__((target("avx,f16c"))) static size_t narrow_half_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    size_t i;

    for (i = 0; i + 8 <= count; i += 8) {
        __m256 wide = _mm256_loadu_ps((const float *)(const void *)(in + 4 * i));

        _mm_storeu_si128((__m128i *)(void *)(out + 2 * i), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    }
    return i;
}

static size_t widen_brain_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    const __m128i zero = _mm_setzero_si128();
    size_t i;

    for (i = 0; i + 8 <= count; i += 8) {
        __m128i brain = _mm_loadu_si128((const __m128i *)(const void *)(in + 2 * i));

        _mm_storeu_si128((__m128i *)(void *)(out + 4 * i), _mm_unpacklo_epi16(zero, brain));
        _mm_storeu_si128((__m128i *)(void *)(out + 4 * i + 16), _mm_unpackhi_epi16(zero, brain));
    }
    return i;
}

/* The upper halves of eight numbers, rounded; sign extension and signed packing keep them as they are. */
static __m128i round_brain(__m128i bits)
{
    const __m128i one = _mm_set1_epi32(1), half = _mm_set1_epi32(0x7FFF);
    __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), one);
    __m128i rounded = _mm_srai_epi32(_mm_add_epi32(bits, _mm_add_epi32(half, odd)), 16);
    __m128i nan = _mm_cmpgt_epi32(_mm_and_si128(bits, _mm_set1_epi32(0x7FFFFFFF)), _mm_set1_epi32(0x7F800000));

    return _mm_or_si128(_mm_andnot_si128(nan, rounded), _mm_and_si128(nan, _mm_set1_epi32(0x7FC0)));
}

static size_t narrow_brain_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    size_t i;

    for (i = 0; i + 8 <= count; i += 8) {
        __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(in + 4 * i));
        __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(in + 4 * i + 16));

        _mm_storeu_si128((__m128i *)(void *)(out + 2 * i), _mm_packs_epi32(round_brain(low), round_brain(high)));
    }
    return i;
}
#else
static size_t widen_half_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    (void)in, (void)out, (void)count;
    return 0;
}

static size_t narrow_half_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    (void)in, (void)out, (void)count;
    return 0;
}

static size_t widen_brain_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    (void)in, (void)out, (void)count;
    return 0;
}

static size_t narrow_brain_vector(const uint8_t *in, uint8_t *out, size_t count)
{
    (void)in, (void)out, (void)count;
    return 0;
}
#endif

static void widen(uint32_t from, const uint8_t *in, uint8_t *out, size_t count)
{
    size_t i = 0;

    if (from == LM_FLOAT_32) {
        memcpy(out, in, 4 * count);
        return;
    }
    if (from == LM_FLOAT_BRAIN)
        i = widen_brain_vector(in, out, count);
    else if (from == LM_FLOAT_16 && has_f16c)
        i = widen_half_vector(in, out, count);
    for (; i < count; i++) {
        uint16_t two;
        double eight;
        float value;

        if (widths[from] == 1) {
            value = of_byte[from][in[i]];
        } else if (widths[from] == 2) {
            memcpy(&two, in + 2 * i, 2);
            value = from == LM_FLOAT_BRAIN ? float_of_bits((uint32_t)two << 16) : float_of_half(two);
        } else {
            memcpy(&eight, in + 8 * i, 8);
            value = (float)eight;
        }
        memcpy(out + 4 * i, &value, 4);
    }
}

static void narrow(uint32_t to, const uint8_t *in, uint8_t *out, size_t count)
{
    size_t i = 0;

    if (to == LM_FLOAT_32) {
        memcpy(out, in, 4 * count);
        return;
    }
    if (to == LM_FLOAT_BRAIN)
        i = narrow_brain_vector(in, out, count);
    else if (to == LM_FLOAT_16 && has_f16c)
        i = narrow_half_vector(in, out, count);
    for (; i < count; i++) {
        uint16_t two;
        double eight;
        float value;

        memcpy(&value, in + 4 * i, 4);
        if (to == LM_FLOAT_64) {
            eight = (double)value;
            memcpy(out + 8 * i, &eight, 8);
        } else {
            two = to == LM_FLOAT_BRAIN ? brain_of_float(value) : half_of_float(value);
            memcpy(out + 2 * i, &two, 2);
        }
    }
}

int lm_cast(const void *in, void *out, size_t count, uint32_t cast)
{
    uint32_t from = cast >> 8, to = cast & 0xFF;
    const uint8_t *source = in;
    uint8_t *target = out;
    unsigned wide, narrowed;
    size_t done;

    if (!lm_cast_widths(cast, &wide, &narrowed))
        return -EINVAL;
    if (cast == LM_CAST_NONE || from == to) {
        memcpy(out, in, count * wide);
        return 0;
    }
    if (to == LM_FLOAT_32 || from == LM_FLOAT_32) {
        if (to == LM_FLOAT_32)
            widen(from, source, target, count);
        else
            narrow(to, source, target, count);
        return 0;
    }
    for (done = 0; done < count; done += LM_BLOCK) {
        uint8_t block[4 * LM_BLOCK];
        size_t some = count - done < LM_BLOCK ? count - done : LM_BLOCK;

        widen(from, source + done * wide, block, some);
        narrow(to, block, target + done * narrowed, some);
    }
    return 0;
}
