/* SPDX-License-Identifier: Apache-2.0 */
#include "compose.h"

#include <errno.h>
#include <string.h>

#include "cast.h"
#include "codec.h"
#include "fetch.h"
#include "sys.h"

#define LM_COMPOSE_ATTEMPTS 3 /* to bring bytes that match their checksum; the fetcher's own come on top */
#define LM_WIDEST 8

static uint64_t end_of(const lm_strip *strip)
{
    unsigned from, to;

    (void)lm_cast_widths(strip->cast, &from, &to);
    return strip->to + strip->length / from * to;
}

int lm_compose_check(const lm_region_spec *spec)
{
    uint64_t i, next = 0;

    for (i = 0; i < spec->strip_count; i++) {
        const lm_strip *strip = &spec->strips[i];
        unsigned from, to;

        if (!lm_cast_widths(strip->cast, &from, &to) || strip->length == 0 || strip->length % from != 0 ||
            strip->to % to != 0 || strip->to < next || strip->from > spec->stock_size ||
            strip->length > spec->stock_size - strip->from || strip->to > spec->content_size ||
            strip->length / from > (spec->content_size - strip->to) / to)
            return -EINVAL;
        next = end_of(strip);
    }
    return 0;
}

/* ---- stock ---- */

static void add(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

static bool is_plain(const lm_chunk_record *record)
{
    return record->codec == LM_CODEC_RAW && record->filter == LM_FILTER_NONE;
}

/* `length` of the record's bytes from its byte `at` on. */
static int read_local(struct lm_region *region, const lm_chunk_record *record, uint64_t at, size_t length, void *out)
{
    uint64_t size, offset = record->offset + at, time = lm_sys_now_ns();
    int error;

    if (record->source >= region->source_count)
        return LM_E_RECORD;
    size = region->source_sizes[record->source];
    if (offset > size || length > size - offset)
        return LM_E_RECORD;
    error = lm_sys_pread_patiently(region->fds[record->source], out, length, offset);
    add(&region->counters.reads, 1);
    if (error == 0)
        add(&region->counters.bytes_read, length);
    add(&region->counters.read_ns, lm_sys_now_ns() - time);
    return lm_region_check_source(region, record, error);
}

static int decode(struct lm_worker *worker, struct lm_region *region, const lm_chunk_record *record,
                  size_t raw_length)
{
    uint64_t time = lm_sys_now_ns(), checked;
    int error = lm_codec_check(record, worker->stored);

    checked = lm_sys_now_ns();
    add(&region->counters.check_ns, checked - time);
    if (error == 0)
        error = lm_codec_decode(worker->decoder, record, worker->stored, worker->stock, raw_length);
    add(&region->counters.decode_ns, lm_sys_now_ns() - checked);
    return error;
}

/* A whole stored chunk, decoded, into worker->stock. */
static int load(struct lm_worker *worker, const struct lm_task *task, uint64_t chunk,
                const lm_chunk_record *record, char *text)
{
    struct lm_region *region = task->region;
    size_t raw_length = lm_table_raw_length(&region->stock, chunk);
    int attempt, error;

    if (worker->stock_region == region->serial && worker->stock_chunk == chunk)
        return 0;
    worker->stock_region = 0;
    if (record->stored_length > raw_length)
        return LM_E_RECORD;
    error = lm_sys_grow_buffer(&worker->stock, &worker->stock_length, (size_t)1 << region->stock.chunk_shift);
    if (error == 0)
        error = lm_sys_grow_buffer(&worker->stored, &worker->stored_length,
                                   (size_t)1 << region->stock.chunk_shift);
    if (error < 0)
        return error;
    for (attempt = 0; attempt < (region->remote ? LM_COMPOSE_ATTEMPTS : 1); attempt++) {
        error = region->remote ? lm_fetch_read(task, record, attempt > 0, worker->stored, text)
                               : read_local(region, record, 0, record->stored_length, worker->stored);
        if (error == 0)
            error = decode(worker, region, record, raw_length);
        if (error != LM_E_CHECKSUM && error != LM_E_DECODE)
            break;
    }
    if (error < 0)
        return error;
    worker->stock_region = region->serial;
    worker->stock_chunk = chunk;
    return 0;
}

/* Some of the stock from `from` on, at most `most` bytes, all of one stored chunk. Valid until the next call. */
static int cut(struct lm_worker *worker, const struct lm_task *task, uint64_t from, uint64_t most, char *text,
               const unsigned char **ret_bytes, size_t *ret_length)
{
    static const unsigned char zeros[4096];
    struct lm_region *region = task->region;
    const struct lm_table *stock = &region->stock;
    uint64_t chunk = from >> stock->chunk_shift, at = from & ((UINT64_C(1) << stock->chunk_shift) - 1);
    uint64_t length = (UINT64_C(1) << stock->chunk_shift) - at;
    const lm_chunk_record *record = lm_table_record(stock, chunk);
    int error;

    if (length > most)
        length = most;
    /* Beyond the end of one of a container's files, too, there are zeros. */
    if (record == NULL || ((record->flags & LM_CHUNK_UNCHECKED) && at >= record->stored_length)) {
        *ret_bytes = zeros;
        *ret_length = length < sizeof zeros ? (size_t)length : sizeof zeros;
        return 0;
    }
    if (!region->remote && is_plain(record) && (record->flags & LM_CHUNK_UNCHECKED)) {
        if (length > record->stored_length - at)
            length = record->stored_length - at;
        worker->stock_region = 0;
        error = lm_sys_grow_buffer(&worker->stock, &worker->stock_length, (size_t)1 << stock->chunk_shift);
        if (error == 0)
            error = read_local(region, record, at, (size_t)length, worker->stock);
        *ret_bytes = worker->stock;
    } else {
        error = load(worker, task, chunk, record, text);
        if (error == 0)
            *ret_bytes = (unsigned char *)worker->stock + at;
    }
    *ret_length = (size_t)length;
    return error;
}

/* ---- strips ---- */

/* `length` bytes of the stock, cast, at `out`. Elements of a container's file may straddle two chunks. */
static int compose_strip(struct lm_worker *worker, const struct lm_task *task, uint64_t from, uint64_t length,
                         uint32_t cast, unsigned char *out, char *text)
{
    unsigned char straddling[LM_WIDEST];
    unsigned wide, made, held = 0;

    (void)lm_cast_widths(cast, &wide, &made);
    while (length > 0) {
        const unsigned char *bytes;
        size_t some, whole;
        uint64_t time;
        int error = cut(worker, task, from, length, text, &bytes, &some);

        if (error < 0)
            return error;
        from += some;
        length -= some;
        time = lm_sys_now_ns();
        if (held > 0) {
            size_t missing = wide - held < some ? wide - held : some;

            memcpy(straddling + held, bytes, missing);
            held += (unsigned)missing;
            bytes += missing;
            some -= missing;
            if (held == wide) {
                (void)lm_cast(straddling, out, 1, cast);
                out += made;
                held = 0;
            }
        }
        whole = some / wide;
        (void)lm_cast(bytes, out, whole, cast);
        out += whole * made;
        if (some > whole * wide) {
            held = (unsigned)(some - whole * wide);
            memcpy(straddling, bytes + whole * wide, held);
        }
        add(&task->region->counters.decode_ns, lm_sys_now_ns() - time);
    }
    return 0;
}

/* The first strip that ends after `position`, or strip_count. */
static uint64_t first_strip(const struct lm_region *region, uint64_t position)
{
    uint64_t low = 0, high = region->strip_count;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (end_of(&region->strips[middle]) <= position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int lm_compose(struct lm_worker *worker, const struct lm_task *task, unsigned char *target, char *text)
{
    const struct lm_region *region = task->region;
    uint64_t size = UINT64_C(1) << region->table.chunk_shift, start = task->chunk << region->table.chunk_shift;
    uint64_t done = start, i;

    for (i = first_strip(region, start); i < region->strip_count; i++) {
        const lm_strip *strip = &region->strips[i];
        uint64_t begin = strip->to > start ? strip->to : start, end = end_of(strip);
        unsigned wide, made;
        int error;

        if (begin >= start + size)
            break;
        if (end > start + size)
            end = start + size;
        (void)lm_cast_widths(strip->cast, &wide, &made);
        memset(target + (done - start), 0, begin - done);
        error = compose_strip(worker, task, strip->from + (begin - strip->to) / made * wide,
                              (end - begin) / made * wide, strip->cast, target + (begin - start), text);
        if (error < 0)
            return error;
        done = end;
    }
    memset(target + (done - start), 0, start + size - done);
    return 0;
}
