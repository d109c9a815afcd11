/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share. CHECK ends the program with file and line; it does not depend on NDEBUG.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

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

#endif
