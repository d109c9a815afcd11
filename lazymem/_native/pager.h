/* SPDX-License-Identifier: Apache-2.0
 *
 * pager.h: serves the memory of other processes: their faults -> chunks of regions of ours -> their pages.
 *
 * A *space* is one userfaultfd, hence one address space; a child of a fork that the kernel tells of becomes a
 * space of its own. What lies where in it: space.h. The chunks come from regions whose backend is
 * LM_BACKEND_STOCK, by the same engine as ever: a fault makes demand, and the engine says when it is settled.
 *
 * Locks: a space's `lock`, then `pager.lock`; never the other way, and neither while the engine's is taken or
 * asked for. Whoever holds a space's lock may read its userfaultfd, and records what is read before letting
 * go: so nothing is put in place by an order of events that is out of date. Faults carry no process, and
 * nothing here asks for one.
 */
#ifndef LM_PAGER_H
#define LM_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lazymem.h"

/* pages_stock.c: a chunk is present, poisoned, or absent again. locked: the engine's lock is held. */
void lm_pager_settled(struct lm_region *region, uint64_t chunk, bool locked);
/* Bytes of a chunk that is all right are in the memfd; the others will be in a moment. */
void lm_pager_part_settled(struct lm_region *region, uint64_t offset, uint64_t length);

/* CFFI-BEGIN */

/* ---- the pager ---- */
/* threads: 0: one a processor, 2 to 8. What spaces there are is served from now on. */
int lm_pager_start(int threads);
/* Spaces stay as they are: nothing more is read of them, nothing put in place, whoever waits goes on waiting. */
void lm_pager_stop(void);

/* A space for a userfaultfd, which is duplicated. agree: nobody has made its handshake (UFFDIO_API) yet.
 * *ret_features: LM_PAGER_FOLLOWS_FORK. */
int lm_pager_open_space(int uffd, int agree, uint32_t *ret_space, uint32_t *ret_features);
/* Have memory of the space show the region from `offset` on. flags: LM_PAGER_SHARED, _REMOVED_ZERO, _ADOPT; or
 * _MORE; or LM_PAGER_IS_ZERO, which only comes of a handover. Nothing is served before the first without _MORE;
 * then who waits already is. */
#define LM_PAGER_IS_ZERO 0x100
/* Of a space, beside LM_PAGER_FOLLOWS_FORK: */
#define LM_SPACE_LEFT 0x100        /* it has no connection, or no more */
#define LM_SPACE_DISBELIEVED 0x200 /* there may be memory of it that nothing is known of */
int lm_pager_map(uint32_t space, uint64_t address, uint64_t length, lm_region *region, uint64_t offset,
                 uint32_t page, uint32_t flags);
/* A space that another pager had: all of its memory is mapped, with _MORE. features: as in lm_space_report. */
int lm_pager_resume_space(uint32_t space, uint32_t parent, uint32_t features);
/* The space of a userfaultfd that a client without a connection comes with again: from now on it has one. -ESRCH:
 * there is none; -EBUSY: it has a connection. */
int lm_pager_claim_space(int uffd, uint32_t *ret_space);
/* Put in place what the space shows of [address, address + length) and is decoded already: whole chunks. No thread
 * of its process need run. The bytes of the range that are in place then, which is all but those of chunks that are
 * away or failed; or -ESRCH, or -EAGAIN: its process keeps changing its memory, or there is no memory. */
int64_t lm_pager_populate(uint32_t space, uint64_t address, uint64_t length);
/* Whether all of that memory is registered with the space's userfaultfd, and may be filled by pages of that
 * size; 0, 1, or -EAGAIN while its owner is changing it. */
int lm_pager_is_registered(uint32_t space, uint64_t address, uint64_t length, uint32_t page);
/* Its connection has ended: it goes as soon as its memory, or its process, has. */
void lm_pager_leave_space(uint32_t space);
/* Stop serving it. Whoever waits is somebody else's to serve. */
void lm_pager_close_space(uint32_t space);

typedef struct {
    uint32_t space, parent; /* parent: of a child of a fork; 0: none */
    uint32_t features;      /* LM_PAGER_FOLLOWS_FORK, LM_SPACE_* */
    uint64_t mapped;        /* bytes that show something */
    uint64_t pieces;
    uint64_t faults;
    uint64_t served;        /* bytes put in place */
    uint64_t waiting;       /* faults that wait for a chunk */
    uint64_t failed;        /* pages that raise a signal */
    uint64_t latency[32];   /* as of lm_stats: message read -> pages in place */
} lm_space_report;
/* Of at most `capacity` spaces; returns how many there are. */
uint32_t lm_pager_spaces(lm_space_report *out, uint32_t capacity);

typedef struct {
    uint64_t address, length, offset;
    uint64_t region; /* its serial number: lm_region_serial */
    uint32_t page, flags; /* as of lm_pager_map */
} lm_space_part;
/* What lies where; returns how many parts there are, or -ESRCH. */
int64_t lm_pager_parts(uint32_t space, lm_space_part *out, uint64_t capacity);
/* A duplicate of its userfaultfd, or -ESRCH. */
int lm_pager_descriptor(uint32_t space);
uint64_t lm_region_serial(lm_region *region);
/* Of LM_BACKEND_STOCK: a descriptor of its memory, for reading. */
int lm_region_descriptor(lm_region *region);
/* Spaces that show something of the region. Where there are none it may be closed. */
uint32_t lm_pager_users(lm_region *region);

/* CFFI-END */

#endif
