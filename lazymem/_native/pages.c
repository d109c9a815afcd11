/* SPDX-License-Identifier: Apache-2.0
 *
 * pages.c: pages by userfaultfd, and for regions that nobody sees before they are whole.
 *
 * Some facts: UFFDIO_COPY copies from a warm buffer into fresh 4 KiB pages; UFFDIO_MOVE takes the worker's
 * huge page away and leaves a hole, which the next chunk fills with a fresh one. MOVE needs both sides
 * writable, whole huge pages, and pages that no child of a fork shares; where it refuses (EBUSY,
 * EEXIST, EINVAL ...) the rest is copied: COPY always works.
 */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <sys/mman.h>

#include "engine.h"
#include "sys.h"
#include "uffd.h"

static size_t chunk_size(const struct lm_region *region)
{
    return (size_t)1 << region->table.chunk_shift;
}

/* ---- userfaultfd ---- */

static struct lm_uffd *uffd_of(const struct lm_region *region)
{
    return &lm_engine.uffds[region->uffd];
}

static int uffd_fill(struct lm_region *region, unsigned char *to, const unsigned char *from, bool by_move)
{
    int fd = uffd_of(region)->fd;
    size_t length = chunk_size(region), moved = 0;

    if (from == NULL)
        return lm_uffd_zero(fd, (uintptr_t)to, length);
    if (by_move) {
        (void)lm_uffd_move(fd, (uintptr_t)to, (void *)(uintptr_t)from, length, &moved);
        if (moved == length) {
            atomic_fetch_add_explicit(&region->counters.moved_chunks, 1, memory_order_relaxed);
            return 0;
        }
    }
    return lm_uffd_copy(fd, (uintptr_t)(to + moved), from + moved, length - moved);
}

static int uffd_install(struct lm_region *region, unsigned char *at, const unsigned char *bytes, bool by_move)
{
    int error = 0;

    /* Undo the second way of uffd_poison, before pages that are about to be right become reachable. */
    if (atomic_load(&region->guarded))
        error = lm_sys_protect(at, chunk_size(region), region->prot);
    if (error < 0)
        return error;
    error = uffd_fill(region, at, bytes, by_move);
    if (error == -EBADF || error == -ENOTTY)
        lm_engine_note_lost();
    return error;
}

static void uffd_wake(struct lm_region *region, unsigned char *at, size_t length)
{
    (void)lm_uffd_wake(uffd_of(region)->fd, (uintptr_t)at, length);
}

static int uffd_poison(struct lm_region *region, unsigned char *at)
{
    const struct lm_uffd *uffd = uffd_of(region);

    if ((uffd->can & LM_CAN_POISON) && lm_uffd_poison(uffd->fd, (uintptr_t)at, chunk_size(region)) == 0)
        return 0;
    /* Kernels before 6.6, and no memory for it: SIGSEGV in place of SIGBUS, but never zeros. */
    atomic_store(&region->guarded, true);
    return lm_sys_protect(at, chunk_size(region), PROT_NONE);
}

/* A fault message for a chunk that is present: nearly always one that was sent before the chunk was
 * put in place. A page that is truly missing was given back by the application (MADV_DONTNEED on
 * memory it sees as its own): it gets the snapshot's bytes again, as a file mapping would. */
static bool uffd_was_given_back(uintptr_t address)
{
    unsigned char resident = 0;
    uintptr_t page = address & ~(uintptr_t)(lm_sys_page_size() - 1);

    return lm_sys_resident((void *)page, lm_sys_page_size(), &resident) != 0 || !(resident & 1);
}

static int uffd_evict(struct lm_region *region, unsigned char *at)
{
    return lm_sys_advise(at, chunk_size(region), MADV_DONTNEED);
}

static int uffd_revive(struct lm_region *region, int error)
{
    uint64_t i, ioctls;

    lm_table_abandon(&region->table);
    for (i = 0; i < region->registered_count && error == 0; i++)
        error = lm_uffd_register(uffd_of(region)->fd, (uintptr_t)region->base + region->registered[i].start,
                                 region->registered[i].length, &ioctls);
    return error;
}

const struct lm_pages lm_pages_uffd = {
    .install = uffd_install,
    .wake = uffd_wake,
    .poison = uffd_poison,
    .was_given_back = uffd_was_given_back,
    .evict = uffd_evict,
    .revive = uffd_revive,
};

/* ---- eager: decoded in place, in fresh anonymous memory ---- */

static int eager_install(struct lm_region *region, unsigned char *at, const unsigned char *bytes, bool by_move)
{
    (void)region, (void)at, (void)bytes, (void)by_move;
    return 0;
}

static void eager_wake(struct lm_region *region, unsigned char *at, size_t length)
{
    (void)region, (void)at, (void)length;
}

static int eager_poison(struct lm_region *region, unsigned char *at)
{
    (void)region, (void)at;
    return 0;
}

static bool eager_was_given_back(uintptr_t address)
{
    (void)address;
    return false;
}

static int eager_evict(struct lm_region *region, unsigned char *at)
{
    (void)region, (void)at;
    return -EOPNOTSUPP; /* nothing could bring it back */
}

static int eager_revive(struct lm_region *region, int error)
{
    (void)region, (void)error;
    return 0;
}

const struct lm_pages lm_pages_eager = {
    .install = eager_install,
    .wake = eager_wake,
    .poison = eager_poison,
    .was_given_back = eager_was_given_back,
    .evict = eager_evict,
    .revive = eager_revive,
};
