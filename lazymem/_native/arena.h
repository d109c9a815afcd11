/* SPDX-License-Identifier: Apache-2.0
 *
 * arena.h: who has which part of the memory that is shared with the fetcher. Numbers only: it touches
 * neither the memory nor a lock. First fit, so that little of the memory is ever touched.
 */
#ifndef LM_ARENA_H
#define LM_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#define LM_ARENA_UNIT ((uint64_t)64 << 10)
#define LM_ARENA_UNITS 2048
#define LM_ARENA_BYTES (LM_ARENA_UNIT * LM_ARENA_UNITS) /* 128 MiB: two of the largest chunks */

struct lm_arena {
    uint64_t taken[LM_ARENA_UNITS / 64]; /* a bit a unit */
    unsigned used;                       /* units */
};

void lm_arena_clear(struct lm_arena *arena);
/* False if there is no gap of that length. Zero bytes take nothing, at place 0. */
bool lm_arena_take(struct lm_arena *arena, uint64_t length, uint64_t *ret_place);
void lm_arena_give(struct lm_arena *arena, uint64_t place, uint64_t length);
static inline uint64_t lm_arena_used(const struct lm_arena *arena)
{
    return arena->used * LM_ARENA_UNIT;
}

#endif
