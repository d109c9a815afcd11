/* SPDX-License-Identifier: Apache-2.0
 *
 * What a file says, thrown at the core: chunk decoders, byte planes, casts, and the description of a region
 * with its runs, records and strips. An entry for libFuzzer; fuzz_driver.c has a plainer one where there is
 * no clang. The first byte of an input says what it is for, the rest is read front to back and followed by
 * as many zeros as are wanted, so that every input means something.
 *
 * Beyond what the sanitizers see: bytes that are shown must come from the input, so everything is made
 * twice, in memory with other bytes in it before, and must come out the same.
 *
 *   clang: see test_fuzz.py; then  fuzz_core corpus -max_total_time=1200
 *   to keep the corpus small:      fuzz_core -merge=1 new-corpus corpus
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cast.h"
#include "codec.h"
#include "harness.h"
#include "table.h"

#define MOST ((size_t)200 << 10) /* bytes that are decoded or cast at a time */
#define CHUNK ((size_t)64 << 10)
#define CHUNKS 6 /* of a region, at most */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input { const uint8_t *bytes; size_t left; };

static void take(struct input *input, void *into, size_t length)
{
    size_t some = length < input->left ? length : input->left;

    memset(into, 0, length);
    memcpy(into, input->bytes, some);
    input->bytes += some;
    input->left -= some;
}

static uint64_t number(struct input *input, size_t width)
{
    uint64_t value = 0;

    take(input, &value, width);
    return value;
}

/* Of its very size, so that one byte beyond it is seen. */
static void *memory(size_t length, int filled)
{
    void *made = malloc(length > 0 ? length : 1);

    CHECK(made != NULL);
    memset(made, filled, length);
    return made;
}

static void *rest(struct input *input, size_t *ret_length)
{
    void *copy = memory(input->left, 0);

    *ret_length = input->left;
    take(input, copy, input->left);
    return copy;
}

/* ---- stored bytes -> a chunk ---- */

static void fuzz_chunk(struct input *input)
{
    static lm_decoder *decoder;
    lm_chunk_record record = { .codec = (uint8_t)number(input, 1), .filter = (uint8_t)number(input, 1),
                               .width = (uint8_t)number(input, 1), .flags = (uint8_t)number(input, 1) };
    size_t raw_length = (size_t)number(input, 3) % MOST, stored_length, i;
    unsigned char *first = memory(raw_length, 0xAA), *second = memory(raw_length, 0x55);
    void *stored = rest(input, &stored_length);
    int error;

    if (decoder == NULL)
        CHECK(lm_decoder_new(&decoder) == 0);
    record.stored_length = (uint32_t)stored_length;
    record.checksum = lm_codec_checksum(stored, stored_length);
    /* populate.c and compose.c refuse longer ones: a chunk that does not shrink is stored as it is. */
    if (stored_length <= raw_length) {
        error = lm_decoder_decode(decoder, &record, stored, first, raw_length);
        CHECK(lm_decoder_decode(decoder, &record, stored, second, raw_length) == error);
        CHECK(error <= 0);
        for (i = 0; error == 0 && i < raw_length; i++)
            CHECK(first[i] == second[i]);
        record.checksum ^= 1;
        if (!(record.flags & LM_CHUNK_UNCHECKED))
            CHECK(lm_decoder_decode(decoder, &record, stored, first, raw_length) == LM_E_CHECKSUM);
    }
    free(stored);
    free(first);
    free(second);
}

/* ---- planes ---- */

static void fuzz_planes(struct input *input)
{
    int width = (int)number(input, 1), filter = (int)number(input, 1), error;
    size_t length;
    unsigned char *in = rest(input, &length), *joined = memory(length, 0xAA), *again = memory(length, 0x55);

    error = lm_planes_join(in, joined, length, width, filter);
    CHECK((error == 0) == ((width == 2 || width == 4 || width == 8) &&
                           (filter == LM_FILTER_PLANES || filter == LM_FILTER_FLOAT_PLANES)));
    if (error == 0) {
        CHECK(lm_planes_split(joined, again, length, width, filter) == 0);
        CHECK(memcmp(in, again, length) == 0);
    }
    free(in);
    free(joined);
    free(again);
}

/* ---- casts ---- */

/* Many at once, by vectors, give what one by one gives. */
static void fuzz_cast(struct input *input)
{
    uint32_t cast = (uint32_t)number(input, 3);
    size_t length, count, i;
    unsigned char *in = rest(input, &length), *all, *each;
    unsigned from, to;

    if (!lm_cast_widths(cast, &from, &to)) {
        CHECK(lm_cast(in, NULL, 0, cast) < 0);
        free(in);
        return;
    }
    count = length / from;
    all = memory(count * to, 0xAA);
    each = memory(count * to, 0x55);
    CHECK(lm_cast(in, all, count, cast) == 0);
    for (i = 0; i < count; i++)
        CHECK(lm_cast(in + i * from, each + i * to, 1, cast) == 0);
    CHECK(memcmp(all, each, count * to) == 0);
    free(in);
    free(all);
    free(each);
}

/* ---- the description of a region ---- */

#define PARTS 8 /* runs, records, strips: that many of each at most */

struct description {
    lm_region_spec spec;
    lm_run runs[PARTS], stock_runs[PARTS];
    lm_chunk_record records[PARTS];
    lm_strip strips[PARTS];
    int fd;
    uint64_t source_size;
    size_t length; /* of the source's bytes */
    unsigned char *source;
};

static void take_runs(struct input *input, lm_run *runs, uint64_t *ret_count)
{
    uint64_t i;

    *ret_count = number(input, 1) % (PARTS + 1);
    for (i = 0; i < *ret_count; i++) {
        uint64_t record = number(input, 1);

        runs[i] = (lm_run){ number(input, 1), number(input, 1), record == 255 ? LM_ZERO_RUN : record };
        if (number(input, 1) == 255) /* as hostile as it gets, now and then */
            take(input, &runs[i], sizeof runs[i]);
    }
}

static void take_records(struct input *input, struct description *made)
{
    uint64_t i;

    made->spec.record_count = number(input, 1) % (PARTS + 1);
    for (i = 0; i < made->spec.record_count; i++) {
        lm_chunk_record *record = &made->records[i];

        *record = (lm_chunk_record){ .codec = (uint8_t)number(input, 1), .filter = (uint8_t)number(input, 1),
                                     .width = (uint8_t)number(input, 1), .flags = (uint8_t)number(input, 1),
                                     .offset = number(input, 2), .stored_length = (uint32_t)number(input, 2),
                                     .source = (uint16_t)number(input, 1) };
        if (number(input, 1) == 255)
            take(input, record, sizeof *record);
    }
}

static void take_strips(struct input *input, struct description *made)
{
    uint64_t i;

    made->spec.strip_count = number(input, 1) % (PARTS + 1);
    for (i = 0; i < made->spec.strip_count; i++) {
        made->strips[i] = (lm_strip){ .to = number(input, 3), .from = number(input, 3),
                                      .length = number(input, 3), .cast = (uint32_t)number(input, 2) };
        if (number(input, 1) == 255)
            take(input, &made->strips[i], sizeof made->strips[i]);
    }
}

static void describe(struct input *input, struct description *made)
{
    uint64_t i;

    memset(made, 0, sizeof *made);
    made->spec = (lm_region_spec){ .content_size = number(input, 3) % (CHUNKS * CHUNK), .url = "fuzz",
                                   .chunk_size = (uint32_t)(CHUNK << number(input, 1) % 3),
                                   .backend = LM_BACKEND_EAGER, .writable = 1,
                                   .runs = made->runs, .records = made->records, .fds = &made->fd,
                                   .source_sizes = &made->source_size, .source_count = 1,
                                   .stock_size = number(input, 3) % (CHUNKS * CHUNK),
                                   .stock_chunk_size = (uint32_t)(CHUNK << number(input, 1) % 3),
                                   .stock_runs = made->stock_runs, .strips = made->strips };
    take_runs(input, made->runs, &made->spec.run_count);
    take_runs(input, made->stock_runs, &made->spec.stock_run_count);
    take_records(input, made);
    take_strips(input, made);
    made->source_size = number(input, 1) == 255 ? number(input, 8) : UINT64_MAX;
    made->source = rest(input, &made->length);
    if (made->source_size == UINT64_MAX)
        made->source_size = made->length;
    for (i = 0; i < made->spec.record_count; i++) { /* right checksums, or no decoder would ever be met */
        lm_chunk_record *record = &made->records[i];

        if (record->offset <= made->length && record->stored_length <= made->length - record->offset)
            record->checksum = lm_codec_checksum(made->source + record->offset, record->stored_length);
    }
}

/* Its chunks' bytes after everything was asked for; NULL if it is refused. errors: one for each chunk. */
static unsigned char *shown(const lm_region_spec *spec, int *errors, uint64_t *ret_size)
{
    uint64_t chunks, chunk, cursor, failed = 0;
    unsigned char *copy;
    lm_region *region;

    if (lm_region_open(spec, &region) < 0)
        return NULL;
    chunks = lm_region_chunk_count(region);
    CHECK(lm_region_prefetch(region, 0, chunks, 0) == 0);
    for (chunk = 0; chunk < chunks; chunk++) {
        cursor = chunk;
        while ((errors[chunk] = lm_region_wait(region, chunk, 1, 1000, &cursor, &failed)) == 0)
            ;
    }
    *ret_size = lm_region_size(region);
    copy = memory(*ret_size, 0);
    CHECK(lm_region_read(region, 0, copy, *ret_size) == 0);
    lm_region_free(region);
    return copy;
}

static void look_up(const lm_region_spec *spec)
{
    struct lm_table table;
    uint64_t chunk;

    if (lm_table_init(&table, spec) < 0)
        return;
    for (chunk = 0; chunk < table.chunk_count; chunk++) {
        const lm_run *run = lm_table_run(&table, chunk);

        CHECK(chunk >= run->first_chunk && chunk - run->first_chunk < run->count);
        CHECK(lm_table_record(&table, chunk) != NULL || run->first_record == LM_ZERO_RUN);
        CHECK(lm_table_raw_length(&table, chunk) <= spec->chunk_size);
    }
    lm_table_destroy(&table);
}

static void fuzz_region(struct input *input)
{
    struct description made;
    unsigned char *first, *second;
    int errors[2][CHUNKS] = { { 0 } };
    uint64_t sizes[2] = { 0, 0 };

    describe(input, &made);
    if (made.spec.content_size > 0)
        look_up(&made.spec);
    made.fd = memfd_create("fuzz", 0);
    CHECK(made.fd >= 0 && write(made.fd, made.source, made.length) == (ssize_t)made.length);
    first = shown(&made.spec, errors[0], &sizes[0]);
    second = shown(&made.spec, errors[1], &sizes[1]);
    CHECK((first == NULL) == (second == NULL) && sizes[0] == sizes[1]);
    CHECK(memcmp(errors[0], errors[1], sizeof errors[0]) == 0);
    if (first != NULL) {
        uint64_t chunk, chunks = sizes[0] / made.spec.chunk_size;

        for (chunk = 0; chunk < chunks; chunk++)
            CHECK(errors[0][chunk] < 0 || memcmp(first + chunk * made.spec.chunk_size,
                                                 second + chunk * made.spec.chunk_size,
                                                 made.spec.chunk_size) == 0);
    }
    close(made.fd);
    free(made.source);
    free(first);
    free(second);
}

/* A region that stays, so that the engine's threads need not be started for each of the others. */
static void begin(void)
{
    static const lm_run zeros = { 0, 1, LM_ZERO_RUN };
    const lm_region_spec spec = { .content_size = 1, .chunk_size = CHUNK, .backend = LM_BACKEND_EAGER, .url = "",
                                  .runs = &zeros, .run_count = 1 };
    static lm_region *stays;

    if (stays != NULL)
        return;
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_CREATE, "libzstd.so.1", "ZSTD_createDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_FREE, "libzstd.so.1", "ZSTD_freeDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_DECOMPRESS, "libzstd.so.1", "ZSTD_decompressDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_IS_ERROR, "libzstd.so.1", "ZSTD_isError") == 0);
    CHECK(lm_codec_find(LM_FN_LZ4_DECOMPRESS, "liblz4.so.1", "LZ4_decompress_safe") == 0);
    CHECK(lm_region_open(&spec, &stays) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const targets[])(struct input *) = { fuzz_chunk, fuzz_planes, fuzz_cast, fuzz_region };
    struct input input = { data, size };

    begin();
    targets[number(&input, 1) % 4](&input);
    return 0;
}
