/* SPDX-License-Identifier: Apache-2.0
 *
 * ledger.h: what is known of a space, kept so that it outlives the pager: the *ledger*, a file in memory with where
 * the space's memory lies, and after it every event, as the kernel has told it.
 *
 * Whenever the pager is killed, the ledger is whole:
 *   - Messages are read from the userfaultfd straight into it, past those that are counted, over zeros: none is
 *     taken from the kernel without being there. What is there uncounted ends with the first that is all zeros.
 *   - Where memory lies is written once. A new table is a new ledger, begun later, and the one before is closed
 *     after it; `magic` is written last.
 *   - FORK brings a descriptor. Until `applied` has passed its message, no other ledger need name it.
 * The next pager works the table out again, by the same functions from the same messages (space.h).
 */
#ifndef LM_LEDGER_H
#define LM_LEDGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pager.h"
#include "space.h"
#include "uffd.h"

#define LM_LEDGER_BATCH 64 /* messages, that are read at once */

/* One that is being written. All zeros: none. */
struct lm_ledger {
    int fd; /* 0: there is none */
    struct lm_ledger_head *head;
    struct lm_uffd_message *messages;
};

/* What stands in it beside table and messages. inode: the userfaultfd's, which no other has (Linux 5.12). */
struct lm_ledger_facts { uint32_t space, parent, features; uint64_t inode; };

/* Begin one with this table, and close the one before; or leave no ledger at all, and say why. */
int lm_ledger_begin(struct lm_ledger *ledger, const struct lm_ledger_facts *facts,
                    const struct lm_space_table *table);
void lm_ledger_end(struct lm_ledger *ledger);
/* Change a table by what an event says. *ret_confused, and errors: as of lm_space_move. */
int lm_ledger_note(struct lm_space_table *table, const struct lm_uffd_message *event, bool *ret_confused);
/* A piece as others are told of it. region: the number they know it by. */
lm_space_part lm_ledger_part(const struct lm_space_piece *piece, uint64_t region);

/* Where LM_LEDGER_BATCH messages are to be read to: zeros. NULL: it is full, begin another one; or there is none. */
struct lm_uffd_message *lm_ledger_room(struct lm_ledger *ledger);
/* So many were read, and count; or they do not matter. */
void lm_ledger_count(struct lm_ledger *ledger, int count);
void lm_ledger_discard(struct lm_ledger *ledger, int count);
/* What the next of those that count says has been done. */
void lm_ledger_apply(struct lm_ledger *ledger);

/* CFFI-BEGIN */

/* ---- what another pager has left ---- */

typedef struct {
    uint32_t space, parent;
    uint32_t features;   /* as in lm_space_report */
    int32_t uffd;        /* of a child: the number of its userfaultfd in that pager; else -1 */
    uint64_t inode;      /* of the userfaultfd; of a child: 0 */
    uint64_t begun_ns;   /* of several ledgers for one userfaultfd the last one counts, whichever pager's */
} lm_ledger_report;

/* Read a ledger's `size` bytes: of its space (child 0), or of the children that its last messages tell of and that
 * perhaps have no ledger of their own (child 1 and on). Returns how many parts there are, of which `parts` gets at
 * most `capacity`; regions are serial numbers in that pager. -ENOENT: there is no such child; -EBADMSG: it is no
 * ledger, or no whole one; -ENOMEM. */
int64_t lm_ledger_read(const void *bytes, uint64_t size, uint32_t child, lm_ledger_report *out, lm_space_part *parts,
                       uint64_t capacity);

/* The children that a ledger tells of have been found: it tells of none any more. */
int lm_ledger_settle(int fd);

/* A process that keeps userfaultfds and ledgers of this one open: if this one dies, however that is, no page of a
 * child of a client's reads as zeros; its touches wait. It then gives what it has to whoever comes to the socket
 * that was marked with lm_pager_bequeath (estate.py has the protocol), and ends when all those processes have. */
int lm_pager_start_twin(void);
/* Have the twin keep an open file. */
int lm_pager_bequeath(int fd);

/* CFFI-END */

#endif
