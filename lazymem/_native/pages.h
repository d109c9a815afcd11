/* SPDX-License-Identifier: Apache-2.0
 *
 * pages.h: how a chunk's bytes become pages, and pages are taken back: one set of functions for each
 * backend that populates. Which chunk, when, and what state it is in then is none of its business.
 */
#ifndef LM_PAGES_H
#define LM_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lm_region;

struct lm_pages {
    bool in_place; /* bytes are made where they are to lie: nobody sees a chunk that is not present */
    /* The whole chunk shows `bytes`, or zeros if NULL; no thread sees a part of it that is not final.
     * by_move: the memory of `bytes` may be taken. */
    int (*install)(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move);
    /* A part of a chunk, bytes of the region, that is all to be installed in a moment; and whoever waits for
     * that part tries again. NULL where it is not worth while. What fails here fails there. */
    int (*install_part)(struct lm_region *region, uint64_t offset, size_t length, const unsigned char *bytes);
    void (*wake_part)(struct lm_region *region, uint64_t offset, size_t length);
    /* Whoever waits for a page of the chunk tries again, and learns whether it is poisoned. locked: lock is held. */
    void (*wake)(struct lm_region *region, uint64_t chunk, bool locked);
    /* Have the missing pages of a chunk raise a signal. */
    int (*poison)(struct lm_region *region, uint64_t chunk);
    /* Whether a page of a chunk that is present has to be put in place again: the application gave it back. */
    bool (*was_given_back)(uintptr_t address);
    /* Take a chunk's pages back: a touch waits again. */
    int (*evict)(struct lm_region *region, uint64_t chunk);
    /* In the child of a fork: have touches wait again. `error`: why nobody can be woken, or 0. Returns why
     * they do not, and what is missing is inaccessible then. */
    int (*revive)(struct lm_region *region, int error);
};

extern const struct lm_pages lm_pages_uffd, lm_pages_trap, lm_pages_eager, lm_pages_stock;

/* pages_stock.c: the memory that other processes are shown. */
int lm_pages_stock_attach(struct lm_region *region);
void lm_pages_stock_detach(struct lm_region *region); /* idempotent */

/* pages_trap.c: touches of region->base, which is reserved, wait from now on; and no longer. lifecycle is held. */
int lm_pages_trap_attach(struct lm_region *region);
void lm_pages_trap_detach(struct lm_region *region); /* idempotent */
/* A stretch of zeros that nobody waits for. */
int lm_pages_trap_leave_zeros(struct lm_region *region, uint64_t start, uint64_t length);

#endif
