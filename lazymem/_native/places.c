/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "places.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sys.h"

/* Rounds of reading events and trying again, each with a hundred yields; then it is an error. */
#define LM_EVENT_ROUNDS 1000000

static struct lm_engine *const engine = &lm_engine;
static void *inaccessible; /* one page */

/* Ranges in which memory may lie of which it is not known what it is to show; see "events". */
#define LM_DOUBTS 256

static struct doubt { uintptr_t start, end; } doubts[LM_DOUBTS];
static unsigned doubt_count;
static bool confused, untraceable;
static bool moves; /* something was moved since there are regions */

typedef int act_fn(struct lm_region *region, const struct lm_piece *place, void *context);

__attribute__((constructor)) static void prepare(void)
{
    (void)lm_sys_reserve(lm_sys_page_size(), lm_sys_page_size(), &inaccessible);
}

static int fd_of(const struct lm_region *region)
{
    return engine->uffds[region->uffd].fd;
}

static bool is_home(const struct lm_region *region, const struct lm_piece *place)
{
    return place->at == (uintptr_t)region->base + place->offset;
}

static int each_locked(struct lm_region *region, uint64_t offset, uint64_t length, act_fn *act, void *context)
{
    struct lm_piece place;
    uintptr_t from = 0;
    int error = 0;

    while (error == 0 && lm_pieces_next(&region->pieces, offset, length, from, &place)) {
        from = place.at + place.length;
        error = act(region, &place, context);
    }
    return error;
}

static bool next_place(struct lm_region *region, uint64_t offset, uint64_t length, uintptr_t from,
                       struct lm_piece *ret_place)
{
    bool found;

    pthread_mutex_lock(&engine->lock);
    found = lm_pieces_next(&region->pieces, offset, length, from, ret_place);
    pthread_mutex_unlock(&engine->lock);
    return found;
}

/* Places that come and go meanwhile may be missed: their pages are missing, then, and fault again. */
static int each(struct lm_region *region, uint64_t offset, uint64_t length, act_fn *act, void *context)
{
    struct lm_piece place;
    uintptr_t from = 0;
    int error = 0;

    while (error == 0 && next_place(region, offset, length, from, &place)) {
        from = place.at + place.length;
        error = act(region, &place, context);
    }
    return error;
}

static uint64_t start_of(const struct lm_region *region, uint64_t chunk)
{
    return chunk << region->table.chunk_shift;
}

static uint64_t size_of(const struct lm_region *region)
{
    return UINT64_C(1) << region->table.chunk_shift;
}

/* ---- one chunk ---- */

struct installation {
    uint64_t start, length; /* in the region, and what of it is still to be done */
    const unsigned char *bytes;
    bool by_move;
};

static int install_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    struct installation *work = context;
    uint64_t skip = place->offset - work->start;
    size_t moved = 0;

    /* Undo the second way of poisoning, before pages that are right become reachable. */
    int error = atomic_load(&region->guarded) ? lm_sys_protect((void *)place->at, place->length, region->prot) : 0;

    if (error < 0)
        return error;
    if (work->bytes == NULL)
        return lm_uffd_zero(fd_of(region), place->at, place->length);
    if (work->by_move && place->length == size_of(region)) {
        (void)lm_uffd_move(fd_of(region), place->at, (void *)(uintptr_t)work->bytes, place->length, &moved);
        if (moved == place->length)
            atomic_fetch_add_explicit(&region->counters.moved_chunks, 1, memory_order_relaxed);
        /* The bytes that were moved are no longer here. Should they be wanted again, they fault again. */
        work->start += moved;
        work->length -= moved;
        work->bytes += moved;
        return moved == place->length
                   ? 0
                   : lm_uffd_copy(fd_of(region), place->at + moved, work->bytes, work->length);
    }
    return lm_uffd_copy(fd_of(region), place->at, work->bytes + skip, place->length);
}

/* Events are read between the rounds: perhaps all threads that would are here. */
static int each_until_done(struct lm_region *region, act_fn *act, struct installation *work)
{
    int rounds, error = -EAGAIN;

    for (rounds = 0; error == -EAGAIN && rounds < LM_EVENT_ROUNDS; rounds++) {
        if (rounds > 0)
            lm_engine_read_events(region->uffd);
        pthread_rwlock_rdlock(&engine->installs);
        error = work->length == 0 ? 0 : each(region, work->start, work->length, act, work);
        pthread_rwlock_unlock(&engine->installs);
    }
    return error;
}

int lm_places_install(struct lm_region *region, uint64_t chunk, const unsigned char *bytes, bool by_move)
{
    struct installation work = { .start = start_of(region, chunk), .length = size_of(region),
                                 .bytes = bytes, .by_move = by_move };

    return each_until_done(region, install_at, &work);
}

int lm_places_install_part(struct lm_region *region, uint64_t offset, size_t length, const unsigned char *bytes)
{
    struct installation work = { .start = offset, .length = length, .bytes = bytes };

    return each_until_done(region, install_at, &work);
}

/* Missing pages of the place raise a signal: SIGBUS, or SIGSEGV in all of it for kernels before 6.6. */
static int poison_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    int error = -EOPNOTSUPP;

    (void)context;
    if (engine->uffds[region->uffd].can & LM_CAN_POISON)
        error = lm_uffd_poison(fd_of(region), place->at, place->length);
    if (error == 0 || error == -EAGAIN)
        return error;
    atomic_store(&region->guarded, true);
    return lm_sys_protect((void *)place->at, place->length, PROT_NONE);
}

static int poison(struct lm_region *region, uint64_t offset, uint64_t length)
{
    struct installation work = { .start = offset, .length = length };

    return each_until_done(region, poison_at, &work);
}

int lm_places_poison(struct lm_region *region, uint64_t chunk)
{
    return poison(region, start_of(region, chunk), size_of(region));
}

static int wake_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    (void)context;
    (void)lm_uffd_wake(fd_of(region), place->at, place->length);
    return 0;
}

void lm_places_wake_part(struct lm_region *region, uint64_t offset, size_t length)
{
    (void)each(region, offset, length, wake_at, NULL);
}

void lm_places_wake(struct lm_region *region, uint64_t chunk)
{
    lm_places_wake_part(region, start_of(region, chunk), size_of(region));
}

void lm_places_wake_locked(struct lm_region *region, uint64_t chunk)
{
    (void)each_locked(region, start_of(region, chunk), size_of(region), wake_at, NULL);
}

/* The kernel is asked at the last moment whether it is still lazy memory: lock is held, so whoever unmaps it
 * at the same time has not come back from that. */
static int evict_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    int error = 0;

    (void)context;
    if (!is_home(region, place) || lm_uffd_is_registered(fd_of(region), place->at, place->length, inaccessible) != 1)
        return 0;
    if (atomic_load(&region->guarded))
        error = lm_sys_protect((void *)place->at, place->length, region->prot);
    return error < 0 ? error : lm_sys_advise((void *)place->at, place->length, MADV_DONTNEED);
}

int lm_places_evict_locked(struct lm_region *region, uint64_t chunk)
{
    return each_locked(region, start_of(region, chunk), size_of(region), evict_at, NULL);
}

int lm_places_evict(struct lm_region *region, uint64_t chunk)
{
    int error;

    pthread_mutex_lock(&engine->lock);
    error = lm_places_evict_locked(region, chunk);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* ---- all of a region ---- */

bool lm_places_are_home(struct lm_region *region, uint64_t offset, uint64_t length)
{
    LM_HOLD_SIGNALS;
    uintptr_t at = (uintptr_t)region->base + offset;
    struct lm_piece part;
    bool home;

    pthread_mutex_lock(&engine->lock);
    home = length == 0 || (lm_pieces_within(&region->pieces, at, at + length, &part) && is_home(region, &part) &&
                           part.length == length);
    pthread_mutex_unlock(&engine->lock);
    return home;
}

static void forget(struct lm_region *region, uintptr_t start, uintptr_t end);

/* What MADV_DONTFORK kept from the child is not in its memory, and not its region's. */
static int register_range(struct lm_region *region, uintptr_t at, uint64_t length)
{
    size_t page = lm_sys_page_size();
    uint64_t ioctls, half = length / page / 2 * page;
    int error = lm_uffd_register(fd_of(region), at, length, &ioctls);

    if (lm_sys_is_mapped((void *)at, length))
        return error;
    if (error == -EINVAL || length <= page) { /* nothing is mapped there */
        forget(region, at, at + length);
        return 0;
    }
    if (error == 0)
        error = register_range(region, at, half);
    return error < 0 ? error : register_range(region, at + half, length - half);
}

static int register_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    (void)context;
    return register_range(region, place->at, place->length);
}

static int each_registered_locked(struct lm_region *region, act_fn *act, void *context)
{
    uint64_t i;
    int error = 0;

    for (i = 0; i < region->registered_count && error == 0; i++)
        error = each_locked(region, region->registered[i].start, region->registered[i].length, act, context);
    return error;
}

int lm_places_register_again(struct lm_region *region)
{
    int error;

    pthread_mutex_lock(&engine->lock);
    error = each_registered_locked(region, register_at, NULL);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* Nothing that is mapped there can be touched any more. */
static int make_inaccessible(uintptr_t at, uint64_t length)
{
    size_t page = lm_sys_page_size();
    uint64_t half = length / page / 2 * page;
    int error = lm_sys_protect((void *)at, length, PROT_NONE);

    if (error == 0 || lm_sys_is_mapped((void *)at, length))
        return error;
    if (length <= page) /* unmapped, and the event of it is unread */
        return 0;
    error = make_inaccessible(at, half);
    return error < 0 ? error : make_inaccessible(at + half, length - half);
}

/* A touch of it is a signal from now on, whatever the kernel says. */
static void forbid(int fd, const struct lm_piece *place)
{
    if (make_inaccessible(place->at, place->length) < 0 &&
        (fd < 0 || lm_uffd_poison(fd, place->at, place->length) < 0)) {
        lm_report_memory(NULL, "memory that cannot be served can neither be made inaccessible: the process ends");
        abort();
    }
    if (fd >= 0) /* which also wakes whoever waits */
        (void)lm_uffd_unregister(fd, place->at, place->length);
}

static int forbid_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    (void)region;
    forbid(*(int *)context, place);
    return 0;
}

void lm_places_lose_locked(struct lm_region *region, int fd)
{
    (void)each_registered_locked(region, forbid_at, &fd);
}

static bool is_resident(const struct lm_piece *place)
{
    unsigned char pages[512];
    size_t page = lm_sys_page_size(), done, i;

    for (done = 0; done < place->length; done += sizeof pages * page) {
        size_t left = place->length - done, length = left < sizeof pages * page ? left : sizeof pages * page;

        if (lm_sys_resident((void *)(place->at + done), length, pages) < 0)
            return false;
        for (i = 0; i < length / page; i++)
            if (!(pages[i] & 1))
                return false;
    }
    return true;
}

static int release_at(struct lm_region *region, const struct lm_piece *place, void *context)
{
    bool *incomplete = context;

    if (region->pages != &lm_pages_uffd) {
        lm_sys_free((void *)place->at, place->length);
        return 0;
    }
    /* Inaccessible before it is unregistered: between that and munmap it would show zeros. */
    if (!is_home(region, place))
        *incomplete = *incomplete || !is_resident(place);
    if (!is_home(region, place) || lm_sys_protect((void *)place->at, place->length, PROT_NONE) < 0)
        (void)poison(region, place->offset, place->length);
    if (!engine->lost)
        (void)lm_uffd_unregister(fd_of(region), place->at, place->length);
    if (is_home(region, place))
        lm_sys_free((void *)place->at, place->length);
    return 0;
}

void lm_places_release(struct lm_region *region)
{
    bool incomplete = false;

    if (region->dropped && region->process != lm_sys_process())
        return; /* it is not ours, whatever lies there */
    lm_engine_lock_settled(LM_EVENT_ROUNDS);
    lm_engine_unlock_settled();
    (void)each(region, 0, region->size, release_at, &incomplete);
    if (incomplete)
        lm_report_memory(region, "is closed: what the application moved elsewhere of its memory, and was not "
                                 "populated, raises SIGBUS when touched");
}

/* ---- events ----
 *
 * Within one thread events keep the order of the changes that they tell of, since each is waited for. Those
 * of threads that change the address space at the same time may not: a thread may be held up between its
 * change and its event. Then memory comes to lie, as it seems, where
 * other memory lies already: the event that tells where that one went is yet to come. From there on, until
 * events are settled, no event is trusted (*confused*): what they tell of is forgotten, and what lies there
 * once they are settled is poisoned. A touch of it is a signal after a line, never a byte of another place.
 *
 * This finds every such race, because what is forgotten does not come back: all registered memory either is
 * a piece, or is poisoned, which goes with it wherever it is moved. The one exception is what mremap itself
 * added, which no event tells of: it raises a signal when touched, as behind the end of a mapped file.
 */

static void abandon(struct lm_region *region, const struct lm_piece *place)
{
    lm_report_memory(region, "its memory was moved or cut up in a way that could not be followed: a part of it "
                             "raises SIGSEGV when touched");
    forbid(fd_of(region), place);
}

static void forget(struct lm_region *region, uintptr_t start, uintptr_t end)
{
    struct lm_piece lost;

    engine->scattered = true;
    lm_pieces_remove(&region->pieces, start, end, &lost);
    if (lost.length > 0)
        abandon(region, &lost);
}

/* but: a region whose pieces stay, or NULL. */
static void forget_all_locked(uintptr_t start, uintptr_t end, const struct lm_region *but)
{
    struct lm_piece part;
    size_t i;

    for (i = 0; i < engine->region_count; i++)
        if (engine->regions[i] != but && lm_pieces_within(&engine->regions[i]->pieces, start, end, &part))
            forget(engine->regions[i], start, end);
}

static void doubt(uintptr_t start, uintptr_t end)
{
    unsigned i = 0;

    while (i < doubt_count)
        if (doubts[i].start <= end && start <= doubts[i].end) {
            start = doubts[i].start < start ? doubts[i].start : start;
            end = doubts[i].end > end ? doubts[i].end : end;
            doubts[i] = doubts[--doubt_count];
            i = 0;
        } else {
            i++;
        }
    if (doubt_count < LM_DOUBTS)
        doubts[doubt_count++] = (struct doubt){ start, end };
    else
        untraceable = true;
}

/* Whether an event will come, or should have come, when the part goes. */
static bool is_followed(const struct lm_region *region, const struct lm_piece *part)
{
    uint64_t i;

    if (region->pages != &lm_pages_uffd || region->released || atomic_load(&region->lost))
        return false;
    for (i = 0; i < region->registered_count; i++) {
        const struct lm_extent *extent = &region->registered[i];

        if (extent->start < part->offset + part->length && part->offset < extent->start + extent->length)
            return true;
    }
    return false;
}

static struct lm_region *find_followed_locked(uintptr_t start, uintptr_t end)
{
    struct lm_piece part;
    size_t i;

    for (i = 0; i < engine->region_count; i++) {
        struct lm_region *region = engine->regions[i];
        uintptr_t from = start;

        for (; lm_pieces_within(&region->pieces, from, end, &part); from = part.at + part.length)
            if (is_followed(region, &part))
                return region;
    }
    return NULL;
}

/* Other memory may lie there again; where there are moves, lazy memory of an event that was read too early. */
static void note_unmap_locked(uintptr_t start, uintptr_t end)
{
    bool known = find_followed_locked(start, end) != NULL;

    forget_all_locked(start, end, NULL);
    if (confused || (known && moves && lm_sys_is_mapped((void *)start, end - start)))
        doubt(start, end);
}

static void note_move_locked(uintptr_t from, uintptr_t to, uint64_t length)
{
    struct lm_region *beneath = find_followed_locked(to, to + length);
    struct lm_piece part;
    size_t i;

    if (beneath != NULL && !confused)
        lm_report_memory(beneath, "threads move its memory at the same time, in an order that is not known: what "
                                  "they move raises a signal when touched (they must take turns)");
    moves = true;
    confused = confused || beneath != NULL || untraceable;
    forget_all_locked(to, to + length, NULL);
    if (confused) {
        forget_all_locked(from, from + length, NULL);
        doubt(from, from + length);
        doubt(to, to + length);
        return;
    }
    for (i = 0; i < engine->region_count; i++) {
        struct lm_region *region = engine->regions[i];
        uintptr_t start = from;

        while (lm_pieces_within(&region->pieces, start, from + length, &part)) {
            start = part.at + part.length;
            part.at = part.at - from + to;
            engine->scattered = true;
            if (!lm_pieces_add(&region->pieces, &part))
                abandon(region, &part);
        }
    }
}

void lm_places_note_locked(const struct lm_uffd *uffd, const struct lm_uffd_message *message)
{
    if (message->event == LM_UFFD_EVENT_UNMAP) {
        note_unmap_locked(message->start, message->end);
        (void)lm_uffd_wake(uffd->fd, message->start, message->end - message->start);
    } else if (message->event == LM_UFFD_EVENT_REMAP) {
        note_move_locked(message->from, message->to, message->length);
        (void)lm_uffd_wake(uffd->fd, message->from, message->length);
    }
}

/* Only what is registered, and no piece: the gaps between pieces. */
static int refuse(const struct lm_uffd *uffd, uintptr_t start, uintptr_t end)
{
    struct lm_piece gap = { .at = start, .length = end - start }, part;
    int error = -EOPNOTSUPP;
    size_t i;

    for (i = 0; i < engine->region_count; i++)
        if (lm_pieces_within(&engine->regions[i]->pieces, start, end, &part)) {
            error = part.at > start ? refuse(uffd, start, part.at) : 0;
            return error < 0 || part.at + part.length >= end ? error
                                                             : refuse(uffd, part.at + part.length, end);
        }
    if (uffd->can & LM_CAN_POISON)
        error = lm_uffd_poison(uffd->fd, gap.at, gap.length);
    if (error < 0 && error != -EAGAIN && lm_uffd_is_registered(uffd->fd, gap.at, gap.length, inaccessible) == 1) {
        forbid(uffd->fd, &gap);
        error = 0;
    }
    (void)lm_uffd_wake(uffd->fd, start, end - start);
    return error == -EAGAIN ? error : 0;
}

static bool resolve_doubts_locked(void)
{
    int index;

    for (; doubt_count > 0; doubt_count--)
        for (index = 0; index < LM_UFFD_COUNT; index++)
            if (engine->uffds[index].fd >= 0 &&
                refuse(&engine->uffds[index], doubts[doubt_count - 1].start, doubts[doubt_count - 1].end) < 0)
                return false;
    confused = false;
    return true;
}

bool lm_places_settled_locked(void)
{
    int i;

    for (i = 0; i < LM_UFFD_COUNT; i++)
        if (engine->uffds[i].fd >= 0 && lm_uffd_settled(engine->uffds[i].fd, inaccessible) < 0)
            return false;
    return resolve_doubts_locked();
}

bool lm_places_unsettled_locked(void)
{
    return confused || doubt_count > 0;
}

void lm_places_reset(void)
{
    confused = untraceable = moves = false;
    doubt_count = 0;
}

void lm_places_claim_locked(const struct lm_region *region)
{
    forget_all_locked((uintptr_t)region->base, (uintptr_t)region->base + region->size, region);
}

/* ---- faults ---- */

struct lm_region *lm_places_find_locked(uintptr_t address, uint64_t *ret_offset)
{
    size_t above = lm_engine_upper_bound(address), i;

    if (above > 0 && lm_pieces_find(&engine->regions[above - 1]->pieces, address, ret_offset))
        return engine->regions[above - 1];
    for (i = 0; engine->scattered && i < engine->region_count; i++)
        if (lm_pieces_find(&engine->regions[i]->pieces, address, ret_offset))
            return engine->regions[i];
    return NULL;
}

void lm_places_fault_elsewhere_locked(const struct lm_uffd *uffd, uintptr_t address)
{
    size_t size = lm_sys_page_size();
    uintptr_t page = address & ~(uintptr_t)(size - 1);

    /* Not registered: an old message, of memory that is gone. Not settled: it will fault again. */
    if (lm_places_settled_locked() && lm_uffd_is_registered(uffd->fd, page, size, inaccessible) == 1) {
        lm_report_memory(NULL, "a signal follows: memory was touched that the application made by growing or moving "
                               "a lazy array's, and of which it is not known what it is to show");
        (void)refuse(uffd, page, page + size);
    }
    (void)lm_uffd_wake(uffd->fd, page, size);
}
