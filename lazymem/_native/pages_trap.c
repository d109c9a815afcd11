/* SPDX-License-Identifier: Apache-2.0
 *
 * pages_trap.c: pages by signals, where userfaultfd is refused. Owns the *stage* of such a region: a memfd
 * of the region's size, in which each chunk has its own place.
 *
 * A chunk that is missing is an inaccessible private mapping of the stage *beyond its end*. Touching it is
 * a signal (trap.h) whatever the application does: mprotect makes it SIGBUS instead of SIGSEGV, mlock fails,
 * madvise has no pages to bring. The stage is sealed, so that nothing can ever lie there.
 *
 * A chunk is installed by writing its bytes to its place in the stage and mapping that over the missing
 * chunk, privately: one step for every thread. Neighbours become one mapping. Pages that the application
 * gives back (MADV_DONTNEED) come again out of the stage, with the snapshot's bytes.
 *
 * Fork. A child shows what was mapped at the fork out of the same stage as its parent. So none of the two
 * may write to that stage any more, or give a part of it back: each goes on with a new one, at its next
 * install. `stage_shared` says that it has to; it is set under the lock that parts are given back under.
 *
 * Descriptors. The application may close them, and open others under the same numbers. So before each use
 * it is made sure which file the number leads to, and if it is another one, there is a new stage. It cannot
 * be told whether that changes in the very next microsecond.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "engine.h"
#include "pages.h"
#include "sys.h"
#include "trap.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#define LM_STAGE_ATTEMPTS 3 /* against an application that closes descriptors in a loop */
#define PRIVATELY (MAP_PRIVATE | MAP_NORESERVE)

static size_t chunk_size(const struct lm_region *region)
{
    return (size_t)1 << region->table.chunk_shift;
}

static bool is_ours(const struct lm_stage *stage)
{
    struct lm_sys_file file;

    return lm_sys_identify(stage->fd, &file) == 0 && file.device == stage->file.device &&
           file.inode == stage->file.inode;
}

static void close_stage(const struct lm_stage *stage)
{
    if (is_ours(stage))
        lm_sys_close(stage->fd);
}

static int open_stage(struct lm_stage *ret_stage, size_t size)
{
    struct lm_stage stage = { .fd = lm_sys_shared_memory(size) };
    int error = stage.fd < 0 ? stage.fd : lm_sys_identify(stage.fd, &stage.file);

    if (error < 0)
        lm_sys_close(stage.fd);
    else
        *ret_stage = stage;
    return error;
}

/* The stage, to be closed by nobody but the application before release_stage(). */
static int use_stage(struct lm_region *region, struct lm_stage *ret_stage)
{
    int error = 0;

    pthread_mutex_lock(&lm_engine.lock);
    if (!is_ours(&region->stage) || (region->stage_shared && region->stage_users == 0)) {
        struct lm_stage before = region->stage;

        error = open_stage(&region->stage, region->size);
        if (error == 0) {
            region->stage_shared = false;
            close_stage(&before);
        }
    }
    *ret_stage = region->stage;
    region->stage_users += error == 0;
    pthread_mutex_unlock(&lm_engine.lock);
    return error;
}

static void release_stage(struct lm_region *region)
{
    pthread_mutex_lock(&lm_engine.lock);
    region->stage_users--;
    pthread_mutex_unlock(&lm_engine.lock);
}

/* Each mapping is a new one, and has to be kept from children anew. */
static int map(struct lm_region *region, const struct lm_stage *stage, unsigned char *at, size_t length, int prot,
               uint64_t offset)
{
    int error = is_ours(stage) ? lm_sys_map_fixed(at, length, prot, PRIVATELY, stage->fd, offset) : -EBADF;

    return error == 0 && region->dropped ? lm_sys_advise(at, length, MADV_DONTFORK) : error;
}

static int show(struct lm_region *region, const struct lm_stage *stage, unsigned char *at)
{
    return map(region, stage, at, chunk_size(region), region->prot, (uint64_t)(at - region->base));
}

static int hide(struct lm_region *region, const struct lm_stage *stage, unsigned char *at, size_t length)
{
    return map(region, stage, at, length, PROT_NONE, region->size + (uint64_t)(at - region->base));
}

static unsigned char *address_of(const struct lm_region *region, uint64_t chunk)
{
    return region->base + (chunk << region->table.chunk_shift);
}

static int install_once(struct lm_region *region, unsigned char *at, const unsigned char *bytes)
{
    struct lm_stage stage;
    int error = use_stage(region, &stage);

    if (error < 0)
        return error;
    if (bytes != NULL)
        error = lm_sys_pwrite_full(stage.fd, bytes, chunk_size(region), (uint64_t)(at - region->base));
    if (error == 0)
        error = show(region, &stage, at);
    release_stage(region);
    return error;
}

static int trap_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move)
{
    unsigned char *at = address_of(region, chunk);
    int attempt, error = -EBADF;

    (void)by_move;
    for (attempt = 0; attempt < LM_STAGE_ATTEMPTS && error == -EBADF; attempt++)
        error = install_once(region, at, bytes);
    /* Not by MAP_POPULATE, which makes a copy of each page of a mapping that may be written to. */
    if (error == 0 && bytes != NULL)
        (void)lm_sys_advise(at, chunk_size(region), MADV_POPULATE_READ);
    return error;
}

static void trap_wake(struct lm_region *region, uint64_t chunk, bool locked)
{
    bool is_bad = lm_table_state(&region->table, chunk) == LM_STATE_POISONED;

    (void)locked;
    lm_trap_answer((uintptr_t)address_of(region, chunk), chunk_size(region), is_bad ? LM_TRAP_BAD : LM_TRAP_AGAIN);
}

static int trap_poison(struct lm_region *region, uint64_t chunk)
{
    (void)region, (void)chunk; /* it stays inaccessible, and whoever waits is told when woken */
    return 0;
}

static bool trap_was_given_back(uintptr_t address)
{
    (void)address;
    return false; /* the stage has them */
}

static int trap_evict(struct lm_region *region, uint64_t chunk)
{
    unsigned char *at = address_of(region, chunk);
    struct lm_stage stage;
    int error = use_stage(region, &stage);

    if (error < 0)
        return error;
    error = hide(region, &stage, at, chunk_size(region));
    if (error == 0) {
        pthread_mutex_lock(&lm_engine.lifecycle); /* no fork comes in between */
        if (!region->stage_shared && is_ours(&stage))
            (void)lm_sys_punch(stage.fd, (uint64_t)(at - region->base), chunk_size(region));
        pthread_mutex_unlock(&lm_engine.lifecycle);
    }
    release_stage(region);
    return error;
}

/* A chunk that was on its way is here or not: it appears, and goes, in one step. If it is, the child may have
 * written to it by the time that somebody asks for it, so it must not be installed again. */
static int trap_revive(struct lm_region *region, int error)
{
    struct lm_table *table = &region->table;
    uint64_t chunk;

    for (chunk = 0; chunk < table->chunk_count; chunk++) {
        uintptr_t at = (uintptr_t)region->base + (chunk << table->chunk_shift);

        if ((lm_table_state(table, chunk) & LM_TABLE_STATE) == LM_STATE_LOADING)
            lm_table_publish(table, chunk, lm_sys_can_read(at) ? LM_STATE_PRESENT : LM_STATE_ABSENT);
    }
    region->stage_shared = true;
    region->stage_users = 0;
    return error;
}

const struct lm_pages lm_pages_trap = {
    .install = trap_install,
    .wake = trap_wake,
    .poison = trap_poison,
    .was_given_back = trap_was_given_back,
    .evict = trap_evict,
    .revive = trap_revive,
};

int lm_pages_trap_attach(struct lm_region *region)
{
    int error = open_stage(&region->stage, region->size);

    if (error == 0)
        error = hide(region, &region->stage, region->base, region->size);
    return error < 0 ? error : lm_trap_add((uintptr_t)region->base, region->size, region->writable);
}

int lm_pages_trap_leave_zeros(struct lm_region *region, uint64_t start, uint64_t length)
{
    return lm_sys_map_fixed(region->base + start, length, region->prot, PRIVATELY | MAP_ANONYMOUS, -1, 0);
}

void lm_pages_trap_detach(struct lm_region *region)
{
    if (region->stage.fd < 0)
        return;
    lm_trap_remove((uintptr_t)region->base);
    lm_trap_answer((uintptr_t)region->base, region->size, LM_TRAP_FOREIGN);
    close_stage(&region->stage);
    region->stage.fd = -1;
}
