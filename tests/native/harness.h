/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share. CHECK ends the program with file and line; it does not depend on NDEBUG.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "lazymem.h"

#define CHECK(condition)                                                                         \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);              \
            abort();                                                                             \
        }                                                                                        \
    } while (0)

/* xorshift64: the same numbers on every machine. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline void fill_random(void *memory, size_t length, uint64_t seed)
{
    unsigned char *bytes = memory;
    size_t i;

    for (i = 0; i < length; i++)
        bytes[i] = (unsigned char)(next_random(&seed) >> 32);
}

/* Have the region show the same bytes by strips that fit no chunk: one byte, then pieces of `piece`. */
static inline void compose_of_itself(lm_region_spec *spec, lm_strip *strips, uint64_t most, uint64_t piece)
{
    uint64_t count, at = 0;

    for (count = 0; at < spec->content_size; count++) {
        uint64_t left = spec->content_size - at, length = count == 0 ? 1 : left < piece ? left : piece;

        CHECK(count < most);
        strips[count] = (lm_strip){ .to = at, .from = at, .length = length };
        at += length;
    }
    spec->strips = strips;
    spec->strip_count = count;
    spec->stock_size = spec->content_size;
    spec->stock_chunk_size = spec->chunk_size;
    spec->stock_runs = spec->runs;
    spec->stock_run_count = spec->run_count;
}

#endif
