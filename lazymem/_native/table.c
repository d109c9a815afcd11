/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <string.h>

#include "sys.h"

static int check_runs(const struct lm_table *table)
{
    uint64_t next = 0, i;

    for (i = 0; i < table->run_count; i++) {
        const lm_run *run = &table->runs[i];

        if (run->first_chunk != next || run->count == 0 || run->count > table->chunk_count - next)
            return -EINVAL;
        if (run->first_record != LM_ZERO_RUN && !table->composed &&
            (run->first_record > table->record_count ||
             run->count > table->record_count - run->first_record))
            return -EINVAL;
        next += run->count;
    }
    return next == table->chunk_count ? 0 : -EINVAL;
}

static int copy_table(const void *from, uint64_t count, size_t size, void **ret_copy)
{
    int error;

    if (count == 0)
        return 0;
    error = lm_sys_alloc((size_t)count * size, ret_copy);
    if (error == 0)
        memcpy(*ret_copy, from, (size_t)count * size);
    return error;
}

/* `made` borrows runs and records; what becomes of it in *ret_table owns copies. */
static int init(struct lm_table made, unsigned chunk_size, bool has_states, struct lm_table *ret_table)
{
    void *states = NULL, *runs = NULL, *records = NULL;
    int error;

    made.chunk_shift = (unsigned)__builtin_ctz(chunk_size);
    made.chunk_count = (made.content_size + chunk_size - 1) >> made.chunk_shift;
    if (made.chunk_count == 0)
        return -EINVAL;
    error = check_runs(&made);
    if (error < 0)
        return error;
    error = copy_table(made.runs, made.run_count, sizeof *made.runs, &runs);
    made.runs = runs;
    if (error == 0)
        error = copy_table(made.records, made.record_count, sizeof *made.records, &records);
    made.records = records;
    if (error == 0 && has_states)
        error = lm_sys_alloc((size_t)made.chunk_count, &states);
    made.states = states;
    if (error < 0) {
        lm_table_destroy(&made);
        return error;
    }
    *ret_table = made;
    return 0;
}

int lm_table_init(struct lm_table *table, const lm_region_spec *spec)
{
    struct lm_table made = { .composed = spec->strip_count > 0,
                             .content_size = spec->content_size,
                             .runs = (lm_run *)spec->runs,
                             .run_count = spec->run_count };

    if (!made.composed) {
        made.records = (lm_chunk_record *)spec->records;
        made.record_count = spec->record_count;
    }
    return init(made, spec->chunk_size, true, table);
}

int lm_table_init_stock(struct lm_table *table, const lm_region_spec *spec)
{
    struct lm_table made = { .content_size = spec->stock_size,
                             .runs = (lm_run *)spec->stock_runs,
                             .run_count = spec->stock_run_count,
                             .records = (lm_chunk_record *)spec->records,
                             .record_count = spec->record_count };

    return init(made, spec->stock_chunk_size, false, table);
}

void lm_table_destroy(struct lm_table *table)
{
    lm_sys_free(table->runs, (size_t)table->run_count * sizeof *table->runs);
    lm_sys_free(table->records, (size_t)table->record_count * sizeof *table->records);
    lm_sys_free((void *)table->states, (size_t)table->chunk_count);
    table->runs = NULL;
    table->records = NULL;
    table->states = NULL;
}

const lm_run *lm_table_run(const struct lm_table *table, uint64_t chunk)
{
    uint64_t low = 0, high = table->run_count;

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;

        if (table->runs[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return &table->runs[low];
}

const lm_chunk_record *lm_table_record(const struct lm_table *table, uint64_t chunk)
{
    static const lm_chunk_record none;
    const lm_run *run = lm_table_run(table, chunk);

    if (run->first_record == LM_ZERO_RUN)
        return NULL;
    if (table->composed)
        return &none;
    return &table->records[run->first_record + (chunk - run->first_chunk)];
}

size_t lm_table_raw_length(const struct lm_table *table, uint64_t chunk)
{
    uint64_t start = chunk << table->chunk_shift;
    uint64_t left = table->content_size - start;
    uint64_t size = UINT64_C(1) << table->chunk_shift;

    return (size_t)(left < size ? left : size);
}

bool lm_table_claim(struct lm_table *table, uint64_t chunk, bool wanted)
{
    uint8_t state = lm_table_state(table, chunk);
    uint8_t loading = (uint8_t)(LM_STATE_LOADING | (wanted ? LM_TABLE_WANTED : 0));

    while (state == LM_STATE_ABSENT || state == LM_STATE_FAILED)
        if (atomic_compare_exchange_weak(&table->states[chunk], &state, loading))
            return true;
    return false;
}

bool lm_table_want(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = lm_table_state(table, chunk);

    while ((state & LM_TABLE_STATE) == LM_STATE_LOADING)
        if (atomic_compare_exchange_weak(&table->states[chunk], &state,
                                         (uint8_t)(state | LM_TABLE_WANTED)))
            return true;
    return false;
}

void lm_table_publish(struct lm_table *table, uint64_t chunk, uint8_t state)
{
    atomic_store(&table->states[chunk], state);
}

bool lm_table_fail(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = LM_STATE_LOADING;

    return atomic_compare_exchange_strong(&table->states[chunk], &state, LM_STATE_FAILED);
}

bool lm_table_reclaim(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = lm_table_state(table, chunk);

    while (state == LM_STATE_PRESENT || state == LM_STATE_POISONED)
        if (atomic_compare_exchange_weak(&table->states[chunk], &state, LM_STATE_LOADING | LM_TABLE_WANTED))
            return true;
    return false;
}

bool lm_table_evict(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = LM_STATE_PRESENT;

    return atomic_compare_exchange_strong(&table->states[chunk], &state, LM_STATE_LOADING);
}

void lm_table_abandon(struct lm_table *table)
{
    uint64_t chunk;

    for (chunk = 0; chunk < table->chunk_count; chunk++)
        if ((lm_table_state(table, chunk) & LM_TABLE_STATE) == LM_STATE_LOADING)
            lm_table_publish(table, chunk, LM_STATE_ABSENT);
}

void lm_table_reset(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = lm_table_state(table, chunk);

    while (state == LM_STATE_FAILED || state == LM_STATE_POISONED)
        if (atomic_compare_exchange_weak(&table->states[chunk], &state, LM_STATE_ABSENT))
            return;
}
