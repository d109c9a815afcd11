/* SPDX-License-Identifier: Apache-2.0
 *
 * source.h: the remote objects that regions and blobs read, by number. What one is (URL, options,
 * identity) is JSON that only Python understands; it is kept here so that a new fetcher can be told
 * without Python. The caller holds the engine's lock around every call. A fork may come in the middle of
 * one, so that the table is whole at every moment.
 */
#ifndef LM_SOURCE_H
#define LM_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LM_SOURCES 16384 /* untouched pages of the table cost nothing */

struct lm_source_text {
    size_t length;
    char text[];
};

struct lm_source {
    struct lm_source_text *what; /* NULL: the number is free */
    unsigned users;              /* 0: to be forgotten */
    uint64_t told;               /* the serial number of the fetcher that knows of it; 0: none */
};

/* One user. Returns the number, or -ENFILE, -ENOMEM, -EMSGSIZE. */
int lm_source_add(const char *text, size_t length);
int lm_source_change(uint32_t number, const char *text, size_t length);
/* NULL if there is no such source. */
struct lm_source *lm_source_get(uint32_t number);
void lm_source_use(uint32_t number);
void lm_source_leave(uint32_t number);
/* The first source from `number` on that has no users, or -1. */
int lm_source_unused(uint32_t number);
void lm_source_remove(uint32_t number);
/* In the child of a fork no fetcher knows anything yet. */
void lm_source_untell_all(void);

#endif
