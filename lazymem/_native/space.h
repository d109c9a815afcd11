/* SPDX-License-Identifier: Apache-2.0
 *
 * space.h: which addresses of another process show what. Plain data: no lock, no system call; the tables are
 * malloc's, as only the pager has any, and no fault waits for an arena of the pager's.
 *
 * Unlike pieces.h, which tells where the parts of one region lie, this tells of all regions in one address
 * space, has no fixed size, and knows pages that have become plain zeros.
 */
#ifndef LM_SPACE_H
#define LM_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lm_region;

enum lm_show {
    LM_SHOW_SHARED, /* the region's own memory, mapped privately: pages are CONTINUEd */
    LM_SHOW_COPY,   /* other memory: pages are copied into it */
    LM_SHOW_ZERO,   /* was given back by its owner, to whom it reads as zeros from then on */
};

/* [at, at + length) shows bytes from `offset` on of the region. */
struct lm_space_piece {
    uint64_t at, length, offset;
    struct lm_region *region;
    uint32_t page; /* bytes: what the kernel puts in place at once */
    uint8_t show;  /* lm_show */
    bool forgets;  /* what is removed becomes zeros; else it comes again */
};

#define LM_SPACE_PIECES 1000000 /* at most: a process may have 65,530 mappings, a balloon gives back single pages */

struct lm_space_table {
    struct lm_space_piece *pieces; /* sorted by address; they do not overlap */
    size_t count, capacity;
};

void lm_space_clear(struct lm_space_table *table);
/* -EEXIST if something lies there; -ENOMEM, -E2BIG. */
int lm_space_add(struct lm_space_table *table, const struct lm_space_piece *piece);
const struct lm_space_piece *lm_space_find(const struct lm_space_table *table, uint64_t address);
/* Index of the first piece that ends after an address. */
size_t lm_space_after(const struct lm_space_table *table, uint64_t address);

/* Each of these is done, or not at all where it returns an error (-ENOMEM, -E2BIG). */
/* Addresses [start, end) are somebody else's from now on. */
int lm_space_unmap(struct lm_space_table *table, uint64_t start, uint64_t end);
/* Their pages were given back. */
int lm_space_remove(struct lm_space_table *table, uint64_t start, uint64_t end);
/* What lay at [from, from + length) lies at `to`. *ret_confused: something seemed to lie there already, so that
 * neither is believed, and nothing lies there now. */
int lm_space_move(struct lm_space_table *table, uint64_t from, uint64_t to, uint64_t length, bool *ret_confused);
int lm_space_copy(struct lm_space_table *into, const struct lm_space_table *from);

#endif
