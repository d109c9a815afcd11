/* SPDX-License-Identifier: Apache-2.0
 *
 * pages_stock.c: chunks of a snapshot for other processes, each decoded once, in a memfd that they may map.
 *
 * Bytes are copied there once the whole chunk is right. Pages are in the memfd before all of the chunk is, but none
 * of them is in anybody's memory before its own bytes are: clients map it with a userfaultfd that makes every page
 * wait for the pager's word (MINOR), and the pager gives it for chunks that are present, and for parts that go ahead.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "engine.h"
#include "pager.h"
#include "pages.h"
#include "sys.h"

int lm_pages_stock_attach(struct lm_region *region)
{
    int fd = lm_sys_publish_memory(region->base, region->size);
    int error = fd < 0 ? fd : lm_sys_identify(fd, &region->stage.file);

    if (error < 0) {
        if (fd >= 0)
            lm_sys_close(fd);
        return error;
    }
    region->stage.fd = fd;
    return 0;
}

void lm_pages_stock_detach(struct lm_region *region)
{
    if (region->stage.fd >= 0)
        lm_sys_close(region->stage.fd);
    region->stage.fd = -1;
}

static int stock_install_part(struct lm_region *region, uint64_t offset, size_t length, const unsigned char *bytes)
{
    memcpy(region->base + offset, bytes, length);
    return 0;
}

/* Over a part that is in clients' memory already, too: with what it holds. */
static int stock_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move)
{
    unsigned shift = region->table.chunk_shift;

    (void)by_move;
    return bytes == NULL ? 0 : stock_install_part(region, chunk << shift, (size_t)1 << shift, bytes);
}

static void stock_wake(struct lm_region *region, uint64_t chunk, bool locked)
{
    lm_pager_settled(region, chunk, locked);
}

/* Clients are told by what the chunk's state is. */
static int stock_poison(struct lm_region *region, uint64_t chunk)
{
    (void)region, (void)chunk;
    return 0;
}

/* Nothing of ours is: its pages are for good. */
static bool stock_was_given_back(uintptr_t address)
{
    (void)address;
    return false;
}

static int stock_evict(struct lm_region *region, uint64_t chunk)
{
    (void)region, (void)chunk;
    return -EOPNOTSUPP; /* somebody may have its pages mapped */
}

static int stock_revive(struct lm_region *region, int error)
{
    (void)region, (void)error;
    return -EOPNOTSUPP; /* the pager does not fork */
}

const struct lm_pages lm_pages_stock = {
    .install = stock_install,
    .install_part = stock_install_part,
    .wake_part = lm_pager_part_settled,
    .wake = stock_wake,
    .poison = stock_poison,
    .was_given_back = stock_was_given_back,
    .evict = stock_evict,
    .revive = stock_revive,
};
