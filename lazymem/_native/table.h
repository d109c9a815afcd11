/* SPDX-License-Identifier: Apache-2.0
 *
 * table.h: which bytes each chunk is made of, and what state each chunk is in.
 *
 * The state of a chunk is one byte, changed by compare-and-swap only. LM_TABLE_WANTED may be added to
 * LOADING: somebody touched a page of it while it was on its way. Transitions:
 *
 *   ABSENT, FAILED --claim--> LOADING --publish--> PRESENT
 *                             LOADING --fail, not wanted--> FAILED
 *                             LOADING|WANTED --fail--> (poison the pages) --> POISONED
 *   FAILED, POISONED --reset (asked for again)--> ABSENT
 *   LOADING --abandon, in the child of a fork, whose loader does not exist--> ABSENT
 *   PRESENT, POISONED --reclaim: touched where the application gave a page back--> LOADING|WANTED
 *   PRESENT --evict: its pages are about to be given back--> LOADING
 *
 * Exactly one thread owns a chunk in LOADING. tests/unit/protocol_model.py tries every order of these. The table takes no lock and makes no system call.
 */
#ifndef LM_TABLE_H
#define LM_TABLE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "lazymem.h"

#define LM_TABLE_WANTED 0x80u
#define LM_TABLE_STATE  0x7Fu

struct lm_table {
    bool composed; /* of strips: its chunks have no records of their own */
    uint64_t content_size;
    uint64_t chunk_count;
    unsigned chunk_shift;
    uint64_t run_count, record_count;
    lm_run *runs;
    lm_chunk_record *records;
    _Atomic uint8_t *states;
};

/* Copies runs and records and checks that the runs cover the chunks and name records that exist. */
int lm_table_init(struct lm_table *table, const lm_region_spec *spec);
/* The same for what a composed region is made of. It has no states: its chunks lie in no memory. */
int lm_table_init_stock(struct lm_table *table, const lm_region_spec *spec);
void lm_table_destroy(struct lm_table *table);

/* The record of a chunk, or NULL for one of zeros. Of a composed chunk: an empty one. */
const lm_chunk_record *lm_table_record(const struct lm_table *table, uint64_t chunk);
/* The run that holds a chunk. */
const lm_run *lm_table_run(const struct lm_table *table, uint64_t chunk);
/* Bytes of content in it: chunk_size, less for the last. */
size_t lm_table_raw_length(const struct lm_table *table, uint64_t chunk);

static inline uint8_t lm_table_state(const struct lm_table *table, uint64_t chunk)
{
    return atomic_load(&table->states[chunk]);
}

/* ABSENT or FAILED -> LOADING (with LM_TABLE_WANTED if `wanted`). False if it was in neither. */
bool lm_table_claim(struct lm_table *table, uint64_t chunk, bool wanted);
/* LOADING -> LOADING|WANTED. False if it is no longer loading. */
bool lm_table_want(struct lm_table *table, uint64_t chunk);
/* The owner's ways out of LOADING. */
void lm_table_publish(struct lm_table *table, uint64_t chunk, uint8_t state);
/* LOADING -> FAILED. False, and no change, if the chunk is wanted. */
bool lm_table_fail(struct lm_table *table, uint64_t chunk);
/* PRESENT or POISONED -> LOADING|WANTED. False if it was in neither. */
bool lm_table_reclaim(struct lm_table *table, uint64_t chunk);
/* PRESENT -> LOADING: the caller gives the pages back and publishes ABSENT. False if it was not present. */
bool lm_table_evict(struct lm_table *table, uint64_t chunk);
/* Every chunk that is LOADING -> ABSENT. Nothing else may run. */
void lm_table_abandon(struct lm_table *table);
/* FAILED or POISONED -> ABSENT. */
void lm_table_reset(struct lm_table *table, uint64_t chunk);

#endif
