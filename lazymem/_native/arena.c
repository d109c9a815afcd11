/* SPDX-License-Identifier: Apache-2.0 */
#include "arena.h"

#include <string.h>

static unsigned units_of(uint64_t length)
{
    return (unsigned)((length + LM_ARENA_UNIT - 1) / LM_ARENA_UNIT);
}

static bool is_taken(const struct lm_arena *arena, unsigned unit)
{
    return arena->taken[unit / 64] >> (unit % 64) & 1;
}

static void mark(struct lm_arena *arena, unsigned first, unsigned count, bool taken)
{
    unsigned unit;

    for (unit = first; unit < first + count; unit++) {
        uint64_t bit = UINT64_C(1) << (unit % 64);

        if (taken)
            arena->taken[unit / 64] |= bit;
        else
            arena->taken[unit / 64] &= ~bit;
    }
    arena->used += taken ? count : 0u - count;
}

void lm_arena_clear(struct lm_arena *arena)
{
    memset(arena, 0, sizeof *arena);
}

bool lm_arena_take(struct lm_arena *arena, uint64_t length, uint64_t *ret_place)
{
    unsigned wanted, unit, free = 0;

    if (length > LM_ARENA_BYTES)
        return false;
    wanted = units_of(length);
    *ret_place = 0;
    if (wanted == 0)
        return true;
    for (unit = 0; unit < LM_ARENA_UNITS; unit++) {
        free = is_taken(arena, unit) ? 0 : free + 1;
        if (free == wanted) {
            mark(arena, unit + 1 - wanted, wanted, true);
            *ret_place = (unit + 1 - wanted) * LM_ARENA_UNIT;
            return true;
        }
    }
    return false;
}

void lm_arena_give(struct lm_arena *arena, uint64_t place, uint64_t length)
{
    mark(arena, (unsigned)(place / LM_ARENA_UNIT), units_of(length), false);
}
