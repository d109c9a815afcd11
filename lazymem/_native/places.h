/* SPDX-License-Identifier: Apache-2.0
 *
 * places.h: everything that is done at addresses of a region, wherever the application has put them.
 *
 * Some facts: the application may munmap parts of a region, map other things there, and mremap parts
 * elsewhere; the kernel tells of it by events, which are read where faults are read, under `lock`. The
 * caller of munmap or mremap comes back only when its event is read, so whoever takes `lock` after that
 * finds it recorded. What follows: nothing keeps an address of a region, everything asks `pieces`.
 *   - Installing and poisoning are safe even against a munmap that goes on at the same time: the kernel
 *     refuses them from before the change until the event is read (EAGAIN), and refuses them on memory that
 *     is not registered. What remains is other lazy memory that comes to lie at the same address: so whoever
 *     asks and then installs shares `installs`, and who opens a region, or reads events that may be of
 *     memory that has moved, has it alone.
 *   - munmap and MADV_DONTNEED have no such guard, so they are done at the region's base only: whoever
 *     unmaps lazy memory in one thread while it evicts or closes the same in another races with itself, as
 *     with any memory. Windows, which is what moved pieces are called, belong to the application.
 * Who changes `pieces` holds `lock`.
 */
#ifndef LM_PLACES_H
#define LM_PLACES_H

#include "engine.h"
#include "uffd.h"

/* The chunk's bytes, or zeros where bytes is NULL, to every place that shows it; pages that are there stay. */
int lm_places_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move);
int lm_places_install_part(struct lm_region *region, uint64_t offset, size_t length, const unsigned char *bytes);
/* Have every missing page of the chunk raise a signal in whoever touches it. */
int lm_places_poison(struct lm_region *region, uint64_t chunk);
void lm_places_wake(struct lm_region *region, uint64_t chunk);
void lm_places_wake_part(struct lm_region *region, uint64_t offset, size_t length);
void lm_places_wake_locked(struct lm_region *region, uint64_t chunk);
/* Give the chunk's pages at the base back to the kernel. */
int lm_places_evict(struct lm_region *region, uint64_t chunk);
int lm_places_evict_locked(struct lm_region *region, uint64_t chunk);
/* Whether bytes [offset, offset + length) lie where they were when the region was opened. */
bool lm_places_are_home(struct lm_region *region, uint64_t offset, uint64_t length);
/* In the child of a fork: register all of it with the child's userfaultfd. */
int lm_places_register_again(struct lm_region *region);
/* All of it raises SIGSEGV from now on, and no event of it is waited for. fd: the userfaultfd, or -1. */
void lm_places_lose_locked(struct lm_region *region, int fd);
/* The end of a region: unmap what lies at its base. Windows stay as they are; what is missing there raises a
 * signal when touched, as it cannot be had any more. */
void lm_places_release(struct lm_region *region);

/* Events of the kernel's. */
void lm_places_note_locked(const struct lm_uffd *uffd, const struct lm_uffd_message *message);
/* The region that shows something at an address, and what. NULL: none. */
struct lm_region *lm_places_find_locked(uintptr_t address, uint64_t *ret_offset);
/* A fault at an address that no region shows, as where mremap has made lazy memory longer: a signal. */
void lm_places_fault_elsewhere_locked(const struct lm_uffd *uffd, uintptr_t address);
/* No event is unread or not recorded, and what was in doubt is settled. False: there may be one. */
bool lm_places_settled_locked(void);
/* Whether it would make a difference to what is known. */
bool lm_places_unsettled_locked(void);
/* Memory that the kernel has given to `region` is no other's. Events are settled. */
void lm_places_claim_locked(const struct lm_region *region);
/* There is no region any more, and no userfaultfd. */
void lm_places_reset(void);

#endif
