/* SPDX-License-Identifier: Apache-2.0
 *
 * What table.c makes of each state by each operation, for test_protocol_model.py: "claim absent loading".
 */
#include <string.h>

#include "harness.h"
#include "table.h"

static const struct { const char *name; uint8_t byte; } states[] = {
    { "absent", LM_STATE_ABSENT },   { "loading", LM_STATE_LOADING },
    { "present", LM_STATE_PRESENT }, { "wanted", LM_STATE_LOADING | LM_TABLE_WANTED },
    { "failed", LM_STATE_FAILED },   { "poisoned", LM_STATE_POISONED },
};
#define STATES (sizeof states / sizeof *states)

static bool claim(struct lm_table *table) { return lm_table_claim(table, 0, false); }
static bool claim_wanted(struct lm_table *table) { return lm_table_claim(table, 0, true); }
static bool want(struct lm_table *table) { return lm_table_want(table, 0); }
static bool fail(struct lm_table *table) { return lm_table_fail(table, 0); }
static bool reclaim(struct lm_table *table) { return lm_table_reclaim(table, 0); }
static bool evict(struct lm_table *table) { return lm_table_evict(table, 0); }

/* These do not say whether they did anything. */
static bool changes(struct lm_table *table, void (*operation)(struct lm_table *))
{
    uint8_t before = lm_table_state(table, 0);

    operation(table);
    return lm_table_state(table, 0) != before;
}

static void reset_first(struct lm_table *table) { lm_table_reset(table, 0); }
static bool reset(struct lm_table *table) { return changes(table, reset_first); }
static bool abandon(struct lm_table *table) { return changes(table, lm_table_abandon); }

static const struct { const char *name; bool (*call)(struct lm_table *); } operations[] = {
    { "claim", claim },     { "claim_wanted", claim_wanted }, { "want", want },   { "fail", fail },
    { "reclaim", reclaim }, { "evict", evict },               { "reset", reset }, { "abandon", abandon },
};

static const char *name_of(uint8_t byte)
{
    size_t i;

    for (i = 0; i < STATES; i++)
        if (states[i].byte == byte)
            return states[i].name;
    return "unknown";
}

int main(void)
{
    const lm_run run = { 0, 1, LM_ZERO_RUN };
    const lm_region_spec spec = { .content_size = 1, .chunk_size = 65536, .runs = &run, .run_count = 1 };
    struct lm_table table;
    size_t i, j;

    CHECK(lm_table_init(&table, &spec) == 0);
    for (i = 0; i < sizeof operations / sizeof *operations; i++) {
        for (j = 0; j < STATES; j++) {
            bool did;

            lm_table_publish(&table, 0, states[j].byte);
            did = operations[i].call(&table);
            CHECK(did || lm_table_state(&table, 0) == states[j].byte); /* what is refused changes nothing */
            printf("%s %s %s\n", operations[i].name, states[j].name,
                   did ? name_of(lm_table_state(&table, 0)) : "refused");
        }
    }
    lm_table_destroy(&table);
    return 0;
}
