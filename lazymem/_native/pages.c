/* SPDX-License-Identifier: Apache-2.0
 *
 * pages.c: pages by userfaultfd (places.h knows where they go), and for regions that nobody sees before they
 * are whole.
 */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>

#include "engine.h"
#include "places.h"
#include "sys.h"

/* ---- userfaultfd ---- */

static int uffd_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move)
{
    int error = lm_places_install(region, chunk, bytes, by_move);

    if (error == -EBADF || error == -ENOTTY)
        lm_engine_note_lost();
    return error;
}

static void uffd_wake(struct lm_region *region, uint64_t chunk, bool locked)
{
    if (locked)
        lm_places_wake_locked(region, chunk);
    else
        lm_places_wake(region, chunk);
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

static int uffd_revive(struct lm_region *region, int error)
{
    lm_table_abandon(&region->table);
    return error < 0 ? error : lm_places_register_again(region);
}

const struct lm_pages lm_pages_uffd = {
    .install = uffd_install,
    .install_part = lm_places_install_part,
    .wake_part = lm_places_wake_part,
    .wake = uffd_wake,
    .poison = lm_places_poison,
    .was_given_back = uffd_was_given_back,
    .evict = lm_places_evict,
    .revive = uffd_revive,
};

/* ---- eager: decoded in place, in fresh anonymous memory ---- */

static int eager_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move)
{
    (void)region, (void)chunk, (void)bytes, (void)by_move;
    return 0;
}

static void eager_wake(struct lm_region *region, uint64_t chunk, bool locked)
{
    (void)region, (void)chunk, (void)locked;
}

static int eager_poison(struct lm_region *region, uint64_t chunk)
{
    (void)region, (void)chunk;
    return 0;
}

static bool eager_was_given_back(uintptr_t address)
{
    (void)address;
    return false;
}

static int eager_evict(struct lm_region *region, uint64_t chunk)
{
    (void)region, (void)chunk;
    return -EOPNOTSUPP; /* nothing could bring it back */
}

static int eager_revive(struct lm_region *region, int error)
{
    (void)region, (void)error;
    return 0;
}

const struct lm_pages lm_pages_eager = {
    .in_place = true,
    .install = eager_install,
    .wake = eager_wake,
    .poison = eager_poison,
    .was_given_back = eager_was_given_back,
    .evict = eager_evict,
    .revive = eager_revive,
};
