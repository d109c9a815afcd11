/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "codec.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <string.h>

#include "sys.h"

typedef void *zstd_create_fn(void);
typedef size_t zstd_free_fn(void *);
typedef size_t zstd_decompress_fn(void *, void *, size_t, const void *, size_t);
typedef unsigned zstd_is_error_fn(size_t);
typedef int lz4_decompress_fn(const char *, char *, int, int);
typedef uint64_t xxh3_fn(const void *, size_t);

static _Atomic(void *) functions[LM_FN_COUNT];

struct lm_decoder {
    void *zstd;
    void *scratch; /* what the codec gives, before the filter is undone */
    size_t scratch_length;
};

int lm_codec_set(int which, void *function)
{
    if (which < 0 || which >= LM_FN_COUNT || function == NULL)
        return -EINVAL;
    atomic_store(&functions[which], function);
    return 0;
}

int lm_codec_find(int which, const char *path, const char *symbol)
{
    /* The handle is never closed: these are libraries that stay for the life of the process. */
    void *library = dlopen(path != NULL && path[0] != '\0' ? path : NULL, RTLD_NOW | RTLD_LOCAL);
    void *function;

    if (library == NULL)
        return -ENOENT;
    function = dlsym(library, symbol);
    return function == NULL ? -ENOSYS : lm_codec_set(which, function);
}

int lm_codec_present(int which)
{
    return which >= 0 && which < LM_FN_COUNT && atomic_load(&functions[which]) != NULL;
}

uint64_t lm_codec_checksum(const void *data, size_t length)
{
    xxh3_fn *hash = (xxh3_fn *)atomic_load(&functions[LM_FN_XXH3_64]);

    return hash == NULL ? 0 : hash(data, length);
}

int lm_bytes_are_zero(const void *data, size_t length)
{
    const char *bytes = data;

    /* A range is all zeros if its first byte is and every byte equals the one before it. */
    return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

int lm_decoder_new(lm_decoder **ret_decoder)
{
    zstd_create_fn *create = (zstd_create_fn *)atomic_load(&functions[LM_FN_ZSTD_CREATE]);
    void *memory;
    lm_decoder *decoder;
    int error = lm_sys_alloc(sizeof *decoder, &memory);

    if (error < 0)
        return error;
    decoder = memory;
    /* Here, in the caller's thread, and not at the first zstd chunk: it takes memory from malloc. */
    if (create != NULL)
        decoder->zstd = create();
    if (create != NULL && decoder->zstd == NULL) {
        lm_sys_free(memory, sizeof *decoder);
        return -ENOMEM;
    }
    *ret_decoder = decoder;
    return 0;
}

void lm_decoder_free(lm_decoder *decoder)
{
    zstd_free_fn *destroy = (zstd_free_fn *)atomic_load(&functions[LM_FN_ZSTD_FREE]);

    if (decoder == NULL)
        return;
    if (decoder->zstd != NULL && destroy != NULL)
        destroy(decoder->zstd);
    lm_sys_free(decoder->scratch, decoder->scratch_length);
    lm_sys_free(decoder, sizeof *decoder);
}

static int decode_zstd(lm_decoder *decoder, const void *stored, size_t stored_length, void *out,
                       size_t raw_length)
{
    zstd_decompress_fn *decompress =
        (zstd_decompress_fn *)atomic_load(&functions[LM_FN_ZSTD_DECOMPRESS]);
    zstd_is_error_fn *is_error = (zstd_is_error_fn *)atomic_load(&functions[LM_FN_ZSTD_IS_ERROR]);
    size_t got;

    if (decoder->zstd == NULL || decompress == NULL || is_error == NULL)
        return LM_E_CODEC;
    got = decompress(decoder->zstd, out, raw_length, stored, stored_length);
    return is_error(got) || got != raw_length ? LM_E_DECODE : 0;
}

static int decode_lz4(const void *stored, size_t stored_length, void *out, size_t raw_length)
{
    lz4_decompress_fn *decompress =
        (lz4_decompress_fn *)atomic_load(&functions[LM_FN_LZ4_DECOMPRESS]);

    if (decompress == NULL)
        return LM_E_CODEC;
    if (stored_length > INT_MAX || raw_length > INT_MAX)
        return LM_E_RECORD;
    return decompress(stored, out, (int)stored_length, (int)raw_length) == (int)raw_length
               ? 0
               : LM_E_DECODE;
}

int lm_codec_check(const lm_chunk_record *record, const void *stored)
{
    if (record->flags & LM_CHUNK_UNCHECKED)
        return 0;
    if (!lm_codec_present(LM_FN_XXH3_64))
        return LM_E_CODEC;
    return lm_codec_checksum(stored, record->stored_length) == record->checksum ? 0 : LM_E_CHECKSUM;
}

/* Only a container read in place may end within a chunk (the last of each of its files does). */
static int decode_short(const lm_chunk_record *record, const void *stored, void *out, size_t raw_length)
{
    if (!(record->flags & LM_CHUNK_UNCHECKED) || record->filter != LM_FILTER_NONE ||
        record->stored_length > raw_length)
        return LM_E_RECORD;
    if (stored != out)
        memcpy(out, stored, record->stored_length);
    memset((char *)out + record->stored_length, 0, raw_length - record->stored_length);
    return 0;
}

int lm_codec_decode(lm_decoder *decoder, const lm_chunk_record *record, const void *stored, void *out,
                    size_t raw_length)
{
    const void *bytes = stored;
    void *target = out;
    int error = 0;

    if (record->filter == LM_FILTER_PLANES || record->filter == LM_FILTER_FLOAT_PLANES) {
        if (record->width != 2 && record->width != 4 && record->width != 8)
            return LM_E_RECORD;
        error = lm_sys_grow_buffer(&decoder->scratch, &decoder->scratch_length, raw_length);
        target = decoder->scratch;
    } else if (record->filter != LM_FILTER_NONE) {
        return LM_E_RECORD;
    }
    if (error < 0)
        return error;

    if (record->codec == LM_CODEC_ZSTD) {
        error = decode_zstd(decoder, stored, record->stored_length, target, raw_length);
        bytes = target;
    } else if (record->codec == LM_CODEC_LZ4) {
        error = decode_lz4(stored, record->stored_length, target, raw_length);
        bytes = target;
    } else if (record->codec != LM_CODEC_RAW) {
        return LM_E_RECORD;
    } else if (record->stored_length != raw_length) {
        return decode_short(record, stored, out, raw_length);
    }
    if (error < 0)
        return error;

    if (record->filter != LM_FILTER_NONE)
        return lm_planes_join(bytes, out, raw_length, record->width, record->filter);
    if (bytes != out)
        memcpy(out, bytes, raw_length);
    return 0;
}

int lm_decoder_decode(lm_decoder *decoder, const lm_chunk_record *record, const void *stored,
                      void *out, size_t raw_length)
{
    int error = lm_codec_check(record, stored);

    return error < 0 ? error : lm_codec_decode(decoder, record, stored, out, raw_length);
}
