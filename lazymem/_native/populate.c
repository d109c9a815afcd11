/* SPDX-License-Identifier: Apache-2.0
 *
 * populate.c: chunk -> bytes -> pages. Reads the stored bytes, checks and decodes them into memory of
 * the worker's own, and has that installed (pages.h).
 *
 * A page appears to every thread at once the moment it is installed, so bytes must be final before.
 */
#define _GNU_SOURCE
#include <string.h>
#include <unistd.h>

#include "codec.h"
#include "compose.h"
#include "engine.h"
#include "fetch.h"
#include "places.h"
#include "sys.h"

#define LM_EARLY 65536 /* bytes around a touch that are put in place before the rest, in chunks of four times as many */
#define LM_POISON_ATTEMPTS 100 /* a second; then all of it is tried again, the line included */
#define LM_FETCH_ATTEMPTS 3 /* to bring bytes that match their checksum; the fetcher's own come on top */

int lm_worker_init(struct lm_worker *worker)
{
    return lm_decoder_new(&worker->decoder);
}

void lm_worker_destroy(struct lm_worker *worker)
{
    lm_decoder_free(worker->decoder);
    lm_sys_free(worker->stored, worker->stored_length);
    lm_sys_free(worker->plain, worker->plain_length);
    lm_sys_free(worker->stock, worker->stock_length);
    memset(worker, 0, sizeof *worker);
}

static void add(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

static uint64_t lap(_Atomic uint64_t *counter, uint64_t since)
{
    uint64_t now = lm_sys_now_ns();

    add(counter, now - since);
    return now;
}

static int read_stored(struct lm_region *region, const lm_chunk_record *record, void *buffer)
{
    uint64_t size;
    int error;

    if (record->source >= region->source_count)
        return LM_E_RECORD;
    size = region->source_sizes[record->source];
    if (record->offset > size || record->stored_length > size - record->offset)
        return LM_E_RECORD;
    error = lm_sys_pread_patiently(region->fds[record->source], buffer, record->stored_length, record->offset);
    add(&region->counters.reads, 1);
    if (error == 0)
        add(&region->counters.bytes_read, record->stored_length);
    return lm_region_check_source(region, record, error);
}

/* The chunk's bytes at `target`, zeros after the end of the content; or at *ret_bytes, where they came as
 * they are to be and need no copy. */
static int produce(struct lm_worker *worker, const struct lm_task *task, unsigned char *target,
                   const unsigned char **ret_bytes)
{
    struct lm_region *region = task->region;
    const lm_chunk_record *record = lm_table_record(&region->table, task->chunk);
    size_t raw_length = lm_table_raw_length(&region->table, task->chunk);
    size_t chunk_size = (size_t)1 << region->table.chunk_shift;
    bool is_plain = record->codec == LM_CODEC_RAW && record->filter == LM_FILTER_NONE;
    const unsigned char *stored = task->stored;
    uint64_t time = lm_sys_now_ns();
    int error = 0;

    if (record->stored_length > raw_length)
        return LM_E_RECORD;
    if (stored == NULL) {
        unsigned char *buffer = target;

        if (!is_plain) {
            error = lm_sys_grow_buffer(&worker->stored, &worker->stored_length, chunk_size);
            buffer = worker->stored;
        }
        if (error == 0)
            error = read_stored(region, record, buffer);
        stored = buffer;
        time = lap(&region->counters.read_ns, time);
    }
    if (error == 0) {
        error = lm_codec_check(record, stored);
        if (error < 0 && task->stored == NULL) /* read here, from a number that may lead elsewhere by now */
            error = lm_region_check_source(region, record, error);
    }
    time = lap(&region->counters.check_ns, time);
    if (error == 0 && is_plain && task->stored != NULL && record->stored_length == chunk_size &&
        !region->pages->in_place) {
        *ret_bytes = stored;
        return 0;
    }
    if (error == 0)
        error = lm_codec_decode(worker->decoder, record, stored, target, raw_length);
    if (error == 0)
        memset(target + raw_length, 0, chunk_size - raw_length);
    *ret_bytes = target;
    (void)lap(&region->counters.decode_ns, time);
    return error;
}

static void record_error(struct lm_region *region, uint64_t chunk, int code, const char *text)
{
    add(&region->counters.chunks_failed, 1);
    pthread_mutex_lock(&lm_engine.lock);
    lm_region_record_error_locked(region, chunk, code, text);
    pthread_mutex_unlock(&lm_engine.lock);
}

/* text: what the store said, or NULL. */
static void settle_failure(const struct lm_task *task, int code, const char *text)
{
    struct lm_region *region = task->region;
    uint64_t chunk = task->chunk;
    int error, attempt;

    record_error(region, chunk, code, text);
    if (region->backend == LM_BACKEND_EAGER) {
        lm_table_publish(&region->table, chunk, LM_STATE_FAILED);
        return;
    }
    if (lm_table_fail(&region->table, chunk))
        return; /* nobody has touched it */
    /* The line comes first: the signal may end the process. */
    lm_report_failed_touch(region, chunk, code, text);
    /* Without memory even for that, as a touch of any memory would, it waits for some. */
    for (attempt = 0; (error = region->pages->poison(region, chunk)) < 0 && attempt < LM_POISON_ATTEMPTS; attempt++)
        (void)usleep(10000);
    lm_table_publish(&region->table, chunk, error < 0 ? LM_STATE_ABSENT : LM_STATE_POISONED);
    region->pages->wake(region, chunk, false);
}

static void set(_Atomic uint64_t *counter, uint64_t value)
{
    atomic_store_explicit(counter, value, memory_order_relaxed);
}

/* Before whoever waits is woken, so that it finds its own fault in the counters. begun: when, of lm_sys_now_ns. */
static void count_fault(struct lm_region *region, const struct lm_task *task, uint64_t begun)
{
    uint64_t installed = lm_sys_now_ns();
    int bucket = 63 - __builtin_clzll((installed - task->start_ns) | 1);

    add(&region->counters.chunks_demand, 1);
    add(&region->counters.latency[bucket < LM_LATENCY_BUCKETS ? bucket : LM_LATENCY_BUCKETS - 1], 1);
    set(&region->counters.last_read_ns, task->start_ns);
    set(&region->counters.last_begun_ns, begun);
    set(&region->counters.last_installed_ns, installed);
}

/* The chunk's bytes, ready to be installed, at *ret_bytes; NULL for zeros. text: as for lm_compose. */
static int prepare(struct lm_worker *worker, const struct lm_task *task, const unsigned char **ret_bytes,
                   char *text)
{
    struct lm_region *region = task->region;
    unsigned char *target;
    int error = task->error;

    *ret_bytes = NULL;
    if (error < 0 || lm_table_record(&region->table, task->chunk) == NULL)
        return error;
    if (region->pages->in_place) {
        target = region->base + (task->chunk << region->table.chunk_shift);
    } else {
        error = lm_sys_grow_buffer(&worker->plain, &worker->plain_length, (size_t)1 << region->table.chunk_shift);
        target = worker->plain;
    }
    if (error < 0 || !region->composed)
        return error < 0 ? error : produce(worker, task, target, ret_bytes);
    *ret_bytes = target;
    return lm_compose(worker, task, target, text);
}

/* The chunk is LOADING and this thread's: have its bytes brought, once more perhaps. */
static void fetch_again(const struct lm_task *task, unsigned attempts)
{
    struct lm_task again = { .region = task->region,
                             .chunk = task->chunk,
                             .start_ns = task->start_ns,
                             .kind = task->kind == LM_TASK_PREFETCH ? LM_TASK_PREFETCH : LM_TASK_DEMAND,
                             .attempts = attempts };

    pthread_mutex_lock(&lm_engine.lock);
    task->region->tasks++;
    if (!lm_queue_push_task(&lm_engine.remote, &again))
        lm_engine_turn_away_locked(&again);
    lm_fetch_wake_locked();
    pthread_mutex_unlock(&lm_engine.lock);
}

/* Bytes that came over a network and are wrong may be right the next time. */
static bool is_worth_another_try(const struct lm_task *task, int error)
{
    bool closing;

    if (task->stored == NULL || task->error != 0 || task->attempts >= LM_FETCH_ATTEMPTS - 1 ||
        (error != LM_E_CHECKSUM && error != LM_E_DECODE))
        return false;
    pthread_mutex_lock(&lm_engine.lock);
    closing = task->region->closing;
    pthread_mutex_unlock(&lm_engine.lock);
    return !closing;
}

/* A fault message for a chunk that is present or poisoned. Nearly always an old one: wake, and be done. Else
 * the chunk is to be had again, by one owner as ever; so it is with a poisoned one, whose marks go when the
 * application gives its pages back, and in a child of a fork. True: it is this thread's now. */
static bool recheck(const struct lm_task *task)
{
    struct lm_region *region = task->region;

    if (region->pages->was_given_back((uintptr_t)task->address) && lm_table_reclaim(&region->table, task->chunk))
        return true;
    region->pages->wake(region, task->chunk, false);
    return false;
}

/* Whoever touched the chunk goes on while the rest of it is put in place. True if so. */
static bool install_early(const struct lm_task *task, const unsigned char *bytes, uint64_t begun)
{
    struct lm_region *region = task->region;
    uint64_t start = task->offset & ~(uint64_t)(LM_EARLY - 1);
    size_t chunk_size = (size_t)1 << region->table.chunk_shift;

    if (region->pages->install_part == NULL || task->kind != LM_TASK_DEMAND || bytes == NULL ||
        chunk_size < 4 * LM_EARLY || task->offset >> region->table.chunk_shift != task->chunk ||
        region->pages->install_part(region, start, LM_EARLY, bytes + (start & (chunk_size - 1))) < 0)
        return false;
    count_fault(region, task, begun);
    region->pages->wake_part(region, start, LM_EARLY);
    return true;
}

int lm_populate(struct lm_worker *worker, const struct lm_task *task)
{
    struct lm_region *region = task->region;
    size_t chunk_size = (size_t)1 << region->table.chunk_shift;
    bool by_move = region->install == LM_INSTALL_MOVE;
    const unsigned char *bytes;
    char text[LM_FETCH_TEXT] = "";
    uint64_t begun = lm_sys_now_ns(), time;
    bool early;
    int error;

    if (task->kind == LM_TASK_RECHECK) {
        if (!recheck(task))
            return 0;
        if (lm_engine_by_courier(region) && lm_table_record(&region->table, task->chunk) != NULL) {
            fetch_again(task, 0);
            return 0;
        }
    }
    error = prepare(worker, task, &bytes, text);
    if (error == LM_E_CLOSED) { /* nobody may be waiting, and nobody will be */
        lm_table_publish(&region->table, task->chunk, LM_STATE_ABSENT);
        return error;
    }
    if (error < 0 && is_worth_another_try(task, error)) {
        fetch_again(task, task->attempts + 1);
        return error;
    }
    time = lm_sys_now_ns();
    by_move = by_move && bytes == worker->plain; /* bytes in the memory shared with the fetcher stay there */
    early = error == 0 && !by_move && install_early(task, bytes, begun);
    if (error == 0)
        error = region->pages->install(region, task->chunk, bytes, by_move);
    if (error < 0) {
        settle_failure(task, error, task->range != NULL && task->error != 0 ? task->range->text : text);
        return error;
    }
    (void)lap(&region->counters.install_ns, time);
    add(&region->counters.bytes_populated, chunk_size);
    if (task->kind == LM_TASK_PREFETCH)
        add(&region->counters.chunks_prefetch, 1);
    else if (!early)
        count_fault(region, task, begun);
    lm_table_publish(&region->table, task->chunk, LM_STATE_PRESENT);
    region->pages->wake(region, task->chunk, false);
    return 0;
}
