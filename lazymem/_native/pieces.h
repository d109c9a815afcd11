/* SPDX-License-Identifier: Apache-2.0
 *
 * pieces.h: where in memory the parts of a region lie. One piece at its base to begin with; the
 * application may unmap parts of it, and move parts elsewhere.
 *
 * Plain data of fixed size: nothing here allocates, locks or makes a system call. One thread at a time
 * may change it. Each change is made in a second table that then becomes the one in force, so that the
 * child of a fork, which sees the memory of one moment, finds one of the two whole.
 */
#ifndef LM_PIECES_H
#define LM_PIECES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LM_PIECES 512

/* Bytes [offset, offset + length) of the region lie at this address. */
struct lm_piece { uintptr_t at; uint64_t offset, length; };

struct lm_pieces {
    _Atomic unsigned current;
    struct lm_piece_table {
        unsigned count;
        struct lm_piece piece[LM_PIECES]; /* sorted by address; they do not overlap */
    } tables[2];
};

void lm_pieces_init(struct lm_pieces *pieces, uintptr_t at, uint64_t length);

/* What lies at an address. */
bool lm_pieces_find(const struct lm_pieces *pieces, uintptr_t address, uint64_t *ret_offset);
/* Of the pieces' parts at addresses [start, end): the first. */
bool lm_pieces_within(const struct lm_pieces *pieces, uintptr_t start, uintptr_t end, struct lm_piece *ret_part);
/* Of the places that show bytes [offset, offset + length): the first at or above an address. */
bool lm_pieces_next(const struct lm_pieces *pieces, uint64_t offset, uint64_t length, uintptr_t from,
                    struct lm_piece *ret_part);

/* Addresses [start, end) are somebody else's from now on. Where a piece would have to be cut in two and the
 * table is full, its second half is forgotten as well: *ret_lost, of length 0 otherwise. */
void lm_pieces_remove(struct lm_pieces *pieces, uintptr_t start, uintptr_t end, struct lm_piece *ret_lost);
/* No piece may lie there. False, and no change, if the table is full. */
bool lm_pieces_add(struct lm_pieces *pieces, const struct lm_piece *piece);

#endif
