/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <string.h>

#include "sys.h"

static int check_runs(const lm_region_spec *spec, uint64_t chunk_count)
{
    uint64_t next = 0, i;

    for (i = 0; i < spec->run_count; i++) {
        const lm_run *run = &spec->runs[i];

        if (run->first_chunk != next || run->count == 0 || run->count > chunk_count - next)
            return -EINVAL;
        if (run->first_record != LM_ZERO_RUN &&
            (run->first_record > spec->record_count ||
             run->count > spec->record_count - run->first_record))
            return -EINVAL;
        next += run->count;
    }
    return next == chunk_count ? 0 : -EINVAL;
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

int lm_table_init(struct lm_table *table, const lm_region_spec *spec)
{
    struct lm_table made = { .content_size = spec->content_size };
    void *states = NULL, *runs = NULL, *records = NULL;
    int error;

    made.chunk_shift = (unsigned)__builtin_ctz(spec->chunk_size);
    made.chunk_count = (spec->content_size + spec->chunk_size - 1) >> made.chunk_shift;
    if (made.chunk_count == 0)
        return -EINVAL;
    error = check_runs(spec, made.chunk_count);
    if (error < 0)
        return error;
    made.run_count = spec->run_count;
    made.record_count = spec->record_count;
    error = copy_table(spec->runs, spec->run_count, sizeof *spec->runs, &runs);
    made.runs = runs;
    if (error == 0) {
        error = copy_table(spec->records, spec->record_count, sizeof *spec->records, &records);
        made.records = records;
    }
    if (error == 0) {
        error = lm_sys_alloc((size_t)made.chunk_count, &states);
        made.states = states;
    }
    if (error < 0) {
        lm_table_destroy(&made);
        return error;
    }
    *table = made;
    return 0;
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
    const lm_run *run = lm_table_run(table, chunk);

    if (run->first_record == LM_ZERO_RUN)
        return NULL;
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

bool lm_table_condemn(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = LM_STATE_PRESENT;

    return atomic_compare_exchange_strong(&table->states[chunk], &state, LM_STATE_POISONED);
}

bool lm_table_reclaim(struct lm_table *table, uint64_t chunk)
{
    uint8_t state = LM_STATE_PRESENT;

    return atomic_compare_exchange_strong(&table->states[chunk], &state,
                                          LM_STATE_LOADING | LM_TABLE_WANTED);
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
