/* SPDX-License-Identifier: Apache-2.0
 *
 * The parts that make no system call of interest: planes, codec, table, queue.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "codec.h"
#include "harness.h"
#include "pieces.h"
#include "queue.h"
#include "sys.h"
#include "table.h"

static void test_planes_match_the_definition_for_every_length(void)
{
    static const int widths[] = { 2, 4, 8 };
    unsigned char in[600], turned[600], out[600], back[600];
    size_t length, i;
    int w;

    fill_random(in, sizeof in, 3);
    for (w = 0; w < 6; w++) {
        size_t width = (size_t)widths[w % 3];
        int filter = w < 3 ? LM_FILTER_PLANES : LM_FILTER_FLOAT_PLANES;

        /* Bit by bit: the highest bit of an element becomes the lowest, all others move up. */
        memset(turned, 0, sizeof turned);
        for (i = 0; i < 8 * (sizeof in / width) * width; i++) {
            size_t bits = 8 * width, first = i / bits * bits;
            size_t to = w < 3 ? i : first + (i - first + 1) % bits;

            turned[to / 8] |= (unsigned char)((in[i / 8] >> i % 8 & 1) << to % 8);
        }

        for (length = 0; length <= sizeof in; length++) {
            size_t count = length / width;

            CHECK(lm_planes_split(in, out, length, (int)width, filter) == 0);
            for (i = 0; i < count * width; i++)
                CHECK(out[(i % width) * count + i / width] == turned[i]);
            CHECK(memcmp(out + count * width, in + count * width, length % width) == 0);
            CHECK(lm_planes_join(out, back, length, (int)width, filter) == 0);
            CHECK(memcmp(in, back, length) == 0);
        }
    }
    CHECK(lm_planes_split(in, out, 10, 3, LM_FILTER_PLANES) == -EINVAL);
    CHECK(lm_planes_join(in, out, 10, 16, LM_FILTER_FLOAT_PLANES) == -EINVAL);
    CHECK(lm_planes_split(in, out, 10, 2, LM_FILTER_NONE) == -EINVAL);
    CHECK(lm_planes_join(in, out, 10, 2, 3) == -EINVAL);
}

static void test_zero_scan_sees_one_byte_anywhere(void)
{
    unsigned char bytes[300] = { 0 };
    size_t i;

    CHECK(lm_bytes_are_zero(bytes, 0) && lm_bytes_are_zero(bytes, 1));
    CHECK(lm_bytes_are_zero(bytes, sizeof bytes));
    for (i = 0; i < sizeof bytes; i++) {
        bytes[i] = 1;
        CHECK(!lm_bytes_are_zero(bytes, sizeof bytes));
        bytes[i] = 0;
    }
}

static void test_decoder_refuses_what_a_record_may_not_say(void)
{
    unsigned char stored[64] = { 1, 2, 3 }, out[64];
    lm_decoder *decoder;
    lm_chunk_record record = { .stored_length = 64, .flags = LM_CHUNK_UNCHECKED };

    CHECK(lm_decoder_new(&decoder) == 0);
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == 0);
    CHECK(memcmp(stored, out, 64) == 0);
    record.stored_length = 32; /* short: zeros follow */
    memset(out, 0xff, sizeof out);
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == 0);
    CHECK(out[0] == 1 && out[32] == 0 && out[63] == 0);
    record.flags = 0; /* the same, checked: not allowed */
    record.checksum = lm_codec_checksum(stored, 32);
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_RECORD);
    record.stored_length = 64;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_CHECKSUM);
    record.checksum = lm_codec_checksum(stored, 64);
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == 0);
    record.codec = 9;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_RECORD);
    record.codec = LM_CODEC_RAW;
    record.filter = 7;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_RECORD);
    record.filter = LM_FILTER_PLANES;
    record.width = 5;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_RECORD);
    record.filter = LM_FILTER_FLOAT_PLANES;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_RECORD);
    record.filter = LM_FILTER_NONE;
    record.codec = LM_CODEC_ZSTD;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_DECODE);
    record.codec = LM_CODEC_LZ4;
    CHECK(lm_decoder_decode(decoder, &record, stored, out, 64) == LM_E_DECODE);
    lm_decoder_free(decoder);
    lm_decoder_free(NULL);
}

/* Random bytes into the decoders: they must refuse, whatever they meet (run under ASan). */
static void test_decoders_survive_noise(void)
{
    unsigned char stored[512], out[4096];
    lm_decoder *decoder;
    uint64_t seed = 11;
    int i;

    CHECK(lm_decoder_new(&decoder) == 0);
    for (i = 0; i < 20000; i++) {
        size_t length = 1 + next_random(&seed) % sizeof stored;
        lm_chunk_record record = {
            .stored_length = (uint32_t)length,
            .codec = (uint8_t)(1 + next_random(&seed) % 2),
            .filter = (uint8_t)(next_random(&seed) % 3),
            .width = 4,
        };

        fill_random(stored, length, next_random(&seed) | 1);
        if (record.codec == LM_CODEC_ZSTD && i % 2)
            memcpy(stored, "\x28\xb5\x2f\xfd", length < 4 ? length : 4);
        record.checksum = lm_codec_checksum(stored, length);
        (void)lm_decoder_decode(decoder, &record, stored, out, 1 + next_random(&seed) % sizeof out);
    }
    lm_decoder_free(decoder);
}

static lm_region_spec spec_of(lm_run *runs, uint64_t run_count, uint64_t content)
{
    static lm_chunk_record records[4];

    return (lm_region_spec){ .content_size = content, .chunk_size = 65536, .runs = runs,
                             .run_count = run_count, .records = records, .record_count = 4 };
}

static void test_table_refuses_runs_that_do_not_fit(void)
{
    struct lm_table table;
    lm_run good[] = { { 0, 2, 0 }, { 2, 5, LM_ZERO_RUN }, { 7, 2, 2 } };
    lm_run gap[] = { { 0, 2, 0 }, { 3, 6, LM_ZERO_RUN } };
    lm_run beyond[] = { { 0, 9, 0 } };
    lm_run wraps[] = { { 0, 9, UINT64_MAX - 2 } };
    lm_run empty[] = { { 0, 0, 0 }, { 0, 9, LM_ZERO_RUN } };
    lm_region_spec spec = spec_of(good, 3, 9 * 65536 - 100);

    CHECK(lm_table_init(&table, &spec) == 0);
    CHECK(table.chunk_count == 9);
    CHECK(lm_table_raw_length(&table, 0) == 65536);
    CHECK(lm_table_raw_length(&table, 8) == 65536 - 100);
    CHECK(lm_table_record(&table, 1) == &table.records[1]);
    CHECK(lm_table_record(&table, 2) == NULL && lm_table_record(&table, 6) == NULL);
    CHECK(lm_table_record(&table, 8) == &table.records[3]);
    lm_table_destroy(&table);
    spec = spec_of(gap, 2, 9 * 65536);
    CHECK(lm_table_init(&table, &spec) == -EINVAL);
    spec = spec_of(beyond, 1, 9 * 65536);
    CHECK(lm_table_init(&table, &spec) == -EINVAL);
    spec = spec_of(wraps, 1, 9 * 65536);
    CHECK(lm_table_init(&table, &spec) == -EINVAL);
    spec = spec_of(empty, 2, 9 * 65536);
    CHECK(lm_table_init(&table, &spec) == -EINVAL);
    spec = spec_of(good, 3, 10 * 65536);
    CHECK(lm_table_init(&table, &spec) == -EINVAL);
}

struct claimers {
    struct lm_table table;
    _Atomic unsigned claimed;
};

static void *claim_all(void *argument)
{
    struct claimers *shared = argument;
    uint64_t chunk;

    for (chunk = 0; chunk < shared->table.chunk_count; chunk++)
        if (lm_table_claim(&shared->table, chunk, chunk % 2 == 0))
            atomic_fetch_add(&shared->claimed, 1);
    return NULL;
}

static void test_a_chunk_has_one_owner(void)
{
    static struct claimers shared;
    lm_run runs[] = { { 0, 1000, LM_ZERO_RUN } };
    lm_region_spec spec = spec_of(runs, 1, 1000 * 65536);
    pthread_t threads[4];
    int i;

    CHECK(lm_table_init(&shared.table, &spec) == 0);
    for (i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, claim_all, &shared) == 0);
    for (i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK(shared.claimed == 1000);

    /* A wanted chunk does not fail quietly; an unwanted one does, and can be claimed again. */
    CHECK(!lm_table_fail(&shared.table, 0));
    CHECK(lm_table_fail(&shared.table, 1) && lm_table_state(&shared.table, 1) == LM_STATE_FAILED);
    CHECK(!lm_table_want(&shared.table, 1));
    CHECK(lm_table_claim(&shared.table, 1, false) && lm_table_want(&shared.table, 1));
    CHECK(!lm_table_fail(&shared.table, 1));
    lm_table_publish(&shared.table, 1, LM_STATE_POISONED);
    CHECK(!lm_table_claim(&shared.table, 1, true));
    lm_table_reset(&shared.table, 1);
    CHECK(lm_table_claim(&shared.table, 1, true));
    lm_table_publish(&shared.table, 1, LM_STATE_PRESENT);
    lm_table_reset(&shared.table, 1);
    CHECK(lm_table_state(&shared.table, 1) == LM_STATE_PRESENT);
    lm_table_destroy(&shared.table);
}

static void test_queue_keeps_order_and_forgets_a_region(void)
{
    static struct lm_queue queue;
    struct lm_region *one = (struct lm_region *)&queue, *two = (struct lm_region *)&one;
    struct lm_task task = { .region = one };
    unsigned i;

    for (i = 0; i < LM_QUEUE_TASKS; i++) {
        task.chunk = i;
        CHECK(lm_queue_push_task(&queue, &task));
    }
    CHECK(!lm_queue_push_task(&queue, &task));
    for (i = 0; i < LM_QUEUE_TASKS; i++)
        CHECK(lm_queue_pop_task(&queue, &task) && task.chunk == i);
    CHECK(!lm_queue_pop_task(&queue, &task));

    for (i = 0; i < LM_QUEUE_SPANS; i++) {
        struct lm_span span = { .region = i % 3 ? one : two, .next = i, .end = i + 1 };

        CHECK(lm_queue_push_span(&queue, &span, false));
    }
    lm_queue_drop_spans(&queue, one);
    for (i = 0; i < LM_QUEUE_SPANS; i += 3) {
        CHECK(lm_queue_first_span(&queue)->next == i);
        lm_queue_pop_span(&queue);
    }
    CHECK(lm_queue_first_span(&queue) == NULL);
    for (i = 0; i < 3; i++) {
        struct lm_span span = { .region = one, .next = i, .end = i + 1 };

        CHECK(lm_queue_push_span(&queue, &span, i == 2));
    }
    CHECK(lm_queue_first_span(&queue)->next == 2); /* the urgent one */
    lm_queue_pop_span(&queue);
    CHECK(lm_queue_first_span(&queue)->next == 0);
}

static void test_queue_cuts_spans_where_they_overlap(void)
{
    static struct lm_queue queue;
    struct lm_region *one = (struct lm_region *)&queue, *two = (struct lm_region *)&one;
    /* Of chunks 10 to 19: before and after, all of it, the end, the beginning, around, another region's. */
    static const uint64_t spans[][2] = { { 0, 10 }, { 20, 30 }, { 10, 20 }, { 12, 15 }, { 5, 15 }, { 15, 25 }, { 5, 25 } };
    static const uint64_t left[][2] = { { 0, 10 }, { 20, 30 }, { 5, 10 }, { 20, 25 }, { 5, 25 }, { 10, 20 } };
    unsigned i;

    for (i = 0; i < sizeof spans / sizeof *spans; i++) {
        struct lm_span span = { .region = one, .next = spans[i][0], .end = spans[i][1] };

        CHECK(lm_queue_push_span(&queue, &span, false));
    }
    CHECK(lm_queue_push_span(&queue, &(struct lm_span){ .region = two, .next = 10, .end = 20 }, false));
    lm_queue_cut_spans(&queue, one, 10, 20);
    for (i = 0; i < sizeof left / sizeof *left; i++) {
        const struct lm_span *span = lm_queue_first_span(&queue);

        CHECK(span != NULL && span->next == left[i][0] && span->end == left[i][1]);
        lm_queue_pop_span(&queue);
    }
    CHECK(lm_queue_first_span(&queue) == NULL);
}

/* The region's offset at each page of memory that is followed, as an array would have it. */
#define MODEL_PAGES 64
static const struct lm_piece no_piece;

static void test_pieces_follow_a_model(void)
{
    static struct lm_pieces pieces;
    uint64_t model[MODEL_PAGES], seed = 5, offset;
    int round, i;

    lm_pieces_init(&pieces, 1000, 16); /* a page is one byte here */
    for (i = 0; i < MODEL_PAGES; i++)
        model[i] = i < 16 ? (uint64_t)i : UINT64_MAX;
    for (round = 0; round < 20000; round++) {
        uintptr_t from = next_random(&seed) % MODEL_PAGES, to = next_random(&seed) % MODEL_PAGES;
        uint64_t length = 1 + next_random(&seed) % 12;
        struct lm_piece part, lost;

        if (from + length > MODEL_PAGES || to + length > MODEL_PAGES ||
            (from < to + length && to < from + length))
            continue;
        lm_pieces_remove(&pieces, 1000 + to, 1000 + to + length, &lost);
        CHECK(lost.length == 0);
        for (i = 0; i < (int)length; i++)
            model[to + (uintptr_t)i] = UINT64_MAX;
        if (round % 3 == 0)
            continue;
        for (uintptr_t start = 1000 + from; lm_pieces_within(&pieces, start, 1000 + from + length, &part);) {
            start = part.at + part.length;
            part.at += to - from;
            CHECK(lm_pieces_add(&pieces, &part));
        }
        for (i = 0; i < (int)length; i++)
            model[to + (uintptr_t)i] = model[from + (uintptr_t)i];
        for (i = 0; i < MODEL_PAGES; i++) {
            CHECK(lm_pieces_find(&pieces, 1000 + (uintptr_t)i, &offset) == (model[i] != UINT64_MAX));
            CHECK(model[i] == UINT64_MAX || offset == model[i]);
        }
        /* Every place of some bytes, each once, lowest first. */
        uint64_t seen = 0, shown = 0;
        uintptr_t at = 0;

        while (lm_pieces_next(&pieces, 5, 4, at, &part)) {
            CHECK(part.at >= at && part.length > 0 && part.offset >= 5 && part.offset + part.length <= 9);
            for (uint64_t k = 0; k < part.length; k++)
                CHECK(model[part.at + k - 1000] == part.offset + k);
            at = part.at + part.length;
            seen += part.length;
        }
        for (i = 0; i < MODEL_PAGES; i++)
            shown += model[i] >= 5 && model[i] < 9;
        CHECK(seen == shown);
        CHECK(lm_pieces_next(&pieces, 0, 16, 0, &part) || model[0] == UINT64_MAX);
    }
}

static void test_a_full_table_of_pieces_loses_what_it_says(void)
{
    static struct lm_pieces pieces;
    struct lm_piece lost = no_piece, part;
    uint64_t offset;
    uintptr_t i;

    lm_pieces_init(&pieces, 0x10000, 4 * LM_PIECES);
    for (i = 0; i < LM_PIECES - 1; i++) {
        lm_pieces_remove(&pieces, 0x10000 + 2 * i + 1, 0x10000 + 2 * i + 2, &lost);
        CHECK(lost.length == 0);
    }
    i = 0x10000 + 3 * LM_PIECES;
    CHECK(!lm_pieces_add(&pieces, &(struct lm_piece){ .at = 1, .offset = 1, .length = 1 }));
    CHECK(lm_pieces_find(&pieces, 0x10000, &offset) && offset == 0 && !lm_pieces_find(&pieces, 1, &offset));
    lm_pieces_remove(&pieces, i, i + 1, &lost);
    CHECK(lost.at == i + 1 && lost.offset == 3 * LM_PIECES + 1 && lost.length == LM_PIECES - 1);
    CHECK(lm_pieces_find(&pieces, i - 1, &offset) && !lm_pieces_within(&pieces, i, UINTPTR_MAX, &part));
    /* Neighbours in both become one, and make room. */
    CHECK(lm_pieces_add(&pieces, &(struct lm_piece){ .at = 0x10001, .offset = 1, .length = 1 }));
    CHECK(lm_pieces_within(&pieces, 0x10000, 0x10003, &part) && part.length == 3);
    CHECK(lm_pieces_add(&pieces, &(struct lm_piece){ .at = 1, .offset = 1, .length = 1 }));
}

int main(void)
{
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    CHECK(lm_codec_find(LM_FN_LZ4_DECOMPRESS, "liblz4.so.1", "LZ4_decompress_safe") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_CREATE, "libzstd.so.1", "ZSTD_createDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_FREE, "libzstd.so.1", "ZSTD_freeDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_DECOMPRESS, "libzstd.so.1", "ZSTD_decompressDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_IS_ERROR, "libzstd.so.1", "ZSTD_isError") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_FREE, "libzstd.so.1", "ZSTD_no_such_function") == -ENOSYS);
    CHECK(lm_codec_find(LM_FN_ZSTD_FREE, "no-such-library.so", "ZSTD_freeDCtx") == -ENOENT);
    CHECK(lm_codec_set(LM_FN_COUNT, (void *)1) == -EINVAL);
    test_planes_match_the_definition_for_every_length();
    test_zero_scan_sees_one_byte_anywhere();
    test_decoder_refuses_what_a_record_may_not_say();
    test_decoders_survive_noise();
    test_table_refuses_runs_that_do_not_fit();
    test_a_chunk_has_one_owner();
    test_queue_keeps_order_and_forgets_a_region();
    test_queue_cuts_spans_where_they_overlap();
    test_pieces_follow_a_model();
    test_a_full_table_of_pieces_loses_what_it_says();
    puts("ok");
    return 0;
}
