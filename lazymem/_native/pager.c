/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "engine.h"
#include "ledger.h"
#include "pager_protocol.h"
#include "space.h"
#include "sys.h"
#include "uffd.h"

#define LM_PAGER_THREADS 64
#define LM_BELL UINT32_MAX /* epoll tag; others are numbers of spaces */
#define LM_MESSAGES LM_LEDGER_BATCH
#define LM_STANDARD 2 /* the highest of the standard descriptors */
#define LM_IDLE_MS 1000 /* how often it is looked for processes that are gone */
#define LM_AGAIN_MS 2   /* and for what has to be tried again, if there is something */
#define LM_ROUNDS 64    /* of reading events and trying again, before another space's turn comes */
#define LM_POPULATE_TRIES 1000
#define LM_HUGE ((uint32_t)2 << 20)
#define LM_LOWEST ((uint64_t)1 << 16) /* addresses of a process of 64 bits, or most of them */
#define LM_HIGHEST (((uint64_t)1 << 47) - LM_LOWEST)
#define LM_NEEDED (LM_UFFD_FEATURE_EVENT_REMAP | LM_UFFD_FEATURE_EVENT_UNMAP | LM_UFFD_FEATURE_EVENT_REMOVE | \
                   LM_UFFD_FEATURE_MISSING_SHMEM | LM_UFFD_FEATURE_MINOR_SHMEM)
#define LM_WANTED (LM_UFFD_FEATURE_EVENT_FORK | LM_UFFD_FEATURE_POISON | LM_UFFD_FEATURE_MISSING_HUGE)

#define LM_PART_SPACES 64 /* that a part of a chunk goes to before the rest of it; others wait for all of it */

struct fault { uint64_t address, since; };

struct space {
    uint32_t id, parent;
    int fd;
    struct lm_sys_file file; /* what it leads to */
    bool follows; /* children of its process become spaces */
    unsigned users; /* under pager.lock */
    struct space *next; /* under pager.lock */
    /* There is something to be read or to be looked at: whoever has the lock, or gets it next, does that. So no
     * thread waits for a space's lock while others could be served: an owner that maps and unmaps without end
     * keeps one thread busy, for a while, and not all of them. */
    _Atomic bool dirty;

    pthread_mutex_t lock;
    bool armed; /* all of it is known: its faults may be read */
    bool left, gone;
    bool disbelieved; /* memory that nothing is known of may be registered: it is not to lose its userfaultfd */
    /* Userfaultfds of children, whom there was no memory for: nothing more is read before they are spaces. */
    int orphans[LM_MESSAGES];
    unsigned orphan_count;
    struct lm_space_table table;
    struct lm_ledger ledger; /* what the table comes of, for the next pager */
    bool stale;              /* no longer: begin another one before events are read again */
    struct fault *faults; /* read, and not looked at yet */
    size_t fault_count, fault_capacity;
    uint64_t fault_total, served, failed;
    uint64_t latency[LM_LATENCY_BUCKETS];
};

/* A fault that waits until chunks [first, end) of a region are settled. */
struct waiter {
    struct space *space;
    struct lm_region *region;
    uint64_t first, end, address, since;
    uint64_t offset; /* of the page, in the region */
};

/* What has to be asked of the engine once no lock is held. */
struct wish { struct lm_region *region; uint64_t offset; };
struct wishes { struct wish of[LM_MESSAGES]; unsigned count; };

static struct {
    pthread_mutex_t lock;
    bool running;
    _Atomic bool stopping; /* changed under the lock */
    unsigned settling;     /* threads, the engine's among them, that put pages in place for waiters */
    bool again; /* some waiter has to be looked at though no chunk was settled */
    int poller, bell;
    pthread_t threads[LM_PAGER_THREADS];
    struct lm_worker workers[LM_PAGER_THREADS];
    int thread_count;
    struct space *spaces;
    uint32_t last_id, space_count;
    uint64_t looked_ns;
    struct waiter *waiters;
    size_t waiter_count, waiter_capacity;
    unsigned char *zeros; /* a huge page of them: the kernel has no ZEROPAGE for those */
    void *inaccessible;   /* a page */
} pager = { .lock = PTHREAD_MUTEX_INITIALIZER, .poller = -1, .bell = -1 };

/* ---- spaces ---- */

static struct space *find_locked(uint32_t id)
{
    struct space *space = pager.spaces;

    while (space != NULL && space->id != id)
        space = space->next;
    return space;
}

static struct space *use(uint32_t id)
{
    struct space *space;

    pthread_mutex_lock(&pager.lock);
    space = find_locked(id);
    if (space != NULL)
        space->users++;
    pthread_mutex_unlock(&pager.lock);
    return space;
}

/* The last user frees it; being listed counts as one. */
static void leave(struct space *space)
{
    bool last;

    pthread_mutex_lock(&pager.lock);
    last = --space->users == 0;
    pthread_mutex_unlock(&pager.lock);
    if (!last)
        return;
    lm_ledger_end(&space->ledger); /* before the number can be somebody else's */
    lm_sys_close(space->fd); /* but no orphan's: its missing pages would read as zeros */
    lm_space_clear(&space->table);
    free(space->faults);
    pthread_mutex_destroy(&space->lock);
    free(space);
}

static void drop(struct space *space)
{
    struct space **link;
    size_t i, kept = 0;
    unsigned uses = 0;

    pthread_mutex_lock(&pager.lock);
    for (link = &pager.spaces; *link != NULL && *link != space; link = &(*link)->next)
        ;
    if (*link == space) {
        *link = space->next;
        pager.space_count--;
        uses++;
    }
    for (i = 0; i < pager.waiter_count; i++) {
        if (pager.waiters[i].space == space)
            uses++;
        else
            pager.waiters[kept++] = pager.waiters[i];
    }
    pager.waiter_count = kept;
    pthread_mutex_unlock(&pager.lock);
    while (uses-- > 0)
        leave(space);
}

/* fd is the space's from now on, unless there is none. The space is locked: others may find it already, and must
 * not take it for an empty one. */
static int make_space(int fd, uint32_t parent, struct space **ret_space)
{
    struct space *space = calloc(1, sizeof *space);
    int error = space == NULL ? -ENOMEM : lm_sys_unblock(fd); /* else it would hold up whoever reads it */

    if (error == 0)
        error = lm_sys_identify(fd, &space->file);
    if (error < 0) {
        free(space);
        return error;
    }
    pthread_mutex_init(&space->lock, NULL);
    pthread_mutex_lock(&space->lock);
    space->fd = fd;
    space->parent = parent;
    space->users = 2; /* the list, and the caller */
    pthread_mutex_lock(&pager.lock);
    do {
        pager.last_id = pager.last_id + 1 >= LM_BELL ? 1 : pager.last_id + 1;
        space->id = pager.last_id;
    } while (find_locked(space->id) != NULL);
    space->next = pager.spaces;
    pager.spaces = space;
    pager.space_count++;
    pthread_mutex_unlock(&pager.lock);
    *ret_space = space;
    return 0;
}

/* All of them, or those that want to be looked at, each with one user more; the caller frees the list. NULL: there
 * is no memory for it. */
static struct space **list_spaces(bool all, size_t *ret_count)
{
    struct space **listed, *space;
    size_t count = 0;

    pthread_mutex_lock(&pager.lock);
    listed = malloc((pager.space_count + 1) * sizeof *listed);
    for (space = pager.spaces; space != NULL && listed != NULL; space = space->next) {
        if (!all && !atomic_load(&space->dirty))
            continue;
        space->users++;
        listed[count++] = space;
    }
    pthread_mutex_unlock(&pager.lock);
    *ret_count = count;
    return listed;
}

static void ask_again(void)
{
    pthread_mutex_lock(&pager.lock);
    pager.again = true;
    if (pager.bell >= 0)
        lm_sys_ring(pager.bell, 1);
    pthread_mutex_unlock(&pager.lock);
}

static int watch_locked(const struct space *space) /* pager.lock is */
{
    int error = pager.poller < 0 ? 0 : lm_sys_watch(pager.poller, space->fd, EPOLLIN | EPOLLET, space->id);

    return error == -EEXIST ? 0 : error;
}

/* Have the threads read of it, now or once there are any. */
static int watch(const struct space *space)
{
    int error;

    pthread_mutex_lock(&pager.lock);
    error = watch_locked(space);
    pthread_mutex_unlock(&pager.lock);
    return error;
}

static void unlock(struct space *space)
{
    pthread_mutex_unlock(&space->lock);
    if (atomic_load(&space->dirty))
        ask_again();
}

/* ---- pages ---- */

static void wake(const struct space *space, uint64_t at, uint64_t length)
{
    (void)lm_uffd_wake(space->fd, at, length);
}

/* Zeros where the kernel promises them. */
static int fill_zeros(const struct space *space, uint64_t at, uint64_t length, uint32_t page)
{
    int error = 0;

    if (page == lm_sys_page_size())
        return lm_uffd_fill(space->fd, LM_UFFDIO_ZEROPAGE, at, NULL, length, page);
    for (; length > 0 && error == 0; at += page, length -= page)
        error = lm_uffd_fill(space->fd, LM_UFFDIO_COPY, at, pager.zeros, page, page);
    return error;
}

static int fill(struct space *space, const struct lm_space_piece *piece, uint64_t at, uint64_t length, bool zeros)
{
    const unsigned char *bytes = piece->region->base + piece->offset + (at - piece->at);
    int error;

    if (piece->show == LM_SHOW_ZERO || (zeros && piece->page == lm_sys_page_size()))
        error = fill_zeros(space, at, length, piece->page);
    else if (piece->show == LM_SHOW_SHARED)
        error = lm_uffd_fill(space->fd, LM_UFFDIO_CONTINUE, at, NULL, length, piece->page);
    else
        error = lm_uffd_fill(space->fd, LM_UFFDIO_COPY, at, bytes, length, piece->page);
    if (error == 0)
        space->served += length;
    return error == -ENOMEM ? -EAGAIN : error; /* a touch waits for memory, as ever */
}

/* -EAGAIN, where there is no memory even for that: who touches it waits for some. */
static int poison(struct space *space, uint64_t at, uint64_t length, uint64_t page)
{
    int error = lm_uffd_fill(space->fd, LM_UFFDIO_POISON, at, NULL, length, page);

    error = error == -ENOMEM ? -EAGAIN : error;
    space->failed += error == -EAGAIN ? 0 : length / page;
    return error;
}

/* Several chunks together are what the last of these is that one of them is. */
enum chunk_is { LM_CHUNK_ZEROS, LM_CHUNK_THERE, LM_CHUNK_BAD, LM_CHUNK_AWAY };

static enum chunk_is look(const struct lm_region *region, uint64_t chunk)
{
    uint8_t state;

    if (!region->composed && lm_table_record(&region->table, chunk) == NULL)
        return LM_CHUNK_ZEROS;
    state = lm_table_state(&region->table, chunk);
    return state == LM_STATE_PRESENT                                      ? LM_CHUNK_THERE
           : state == LM_STATE_POISONED || state == LM_STATE_FAILED ? LM_CHUNK_BAD
                                                                    : LM_CHUNK_AWAY;
}

static enum chunk_is look_at_all(const struct lm_region *region, uint64_t first, uint64_t end)
{
    enum chunk_is all = LM_CHUNK_ZEROS;
    uint64_t i;

    for (i = first; i < end; i++) {
        enum chunk_is one = look(region, i);

        all = one > all ? one : all;
    }
    return all;
}

/* Bytes [from, to) of the region, wherever the space shows them, whole pages only. 0 or -EAGAIN. */
static int deliver_bytes_locked(struct space *space, struct lm_region *region, uint64_t from, uint64_t to,
                                enum chunk_is what)
{
    size_t i;
    int error = 0;

    for (i = 0; i < space->table.count && error == 0; i++) {
        const struct lm_space_piece *piece = &space->table.pieces[i];
        uint64_t start, stop, page = piece->page;

        if (piece->region != region || piece->show == LM_SHOW_ZERO || piece->offset >= to ||
            piece->offset + piece->length <= from)
            continue;
        start = piece->at + (from > piece->offset ? (from - piece->offset + page - 1) / page * page : 0);
        stop = piece->at + (to - piece->offset < piece->length ? (to - piece->offset) / page * page : piece->length);
        if (start >= stop)
            continue;
        error = what == LM_CHUNK_BAD ? -EIO : fill(space, piece, start, stop - start, what == LM_CHUNK_ZEROS);
        if (error < 0 && error != -EAGAIN) /* or it lies in memory of another kind than was said */
            error = poison(space, start, stop - start, page);
        if (error == 0) /* else it would only fault again, for ever */
            wake(space, start, stop - start);
    }
    return error == -EAGAIN ? error : 0;
}

/* The same of chunks [first, end). */
static int deliver_locked(struct space *space, struct lm_region *region, uint64_t first, uint64_t end,
                          enum chunk_is what)
{
    unsigned shift = region->table.chunk_shift;

    return deliver_bytes_locked(space, region, first << shift, end << shift, what);
}

/* ---- events ---- */

static void keep_fault_locked(struct space *space, uint64_t address)
{
    if (space->fault_count == space->fault_capacity) {
        size_t capacity = space->fault_capacity == 0 ? LM_MESSAGES : 2 * space->fault_capacity;
        void *memory = realloc(space->faults, capacity * sizeof *space->faults);

        if (memory == NULL) { /* it faults again, and we look again */
            wake(space, address & ~(uint64_t)(lm_sys_page_size() - 1), lm_sys_page_size());
            return;
        }
        space->faults = memory;
        space->fault_capacity = capacity;
    }
    space->faults[space->fault_count++] = (struct fault){ .address = address, .since = lm_sys_now_ns() };
    space->fault_total++;
}

static uint32_t features_locked(const struct space *space)
{
    return (space->follows ? LM_PAGER_FOLLOWS_FORK : 0) | (space->left ? LM_SPACE_LEFT : 0) |
           (space->disbelieved ? LM_SPACE_DISBELIEVED : 0);
}

/* Begin a ledger, as the space has changed otherwise than by events. Without memory for one the next pager does not
 * find the space, and who waits when this one dies waits on. */
static void record_locked(struct space *space)
{
    struct lm_ledger_facts facts = {
        .space = space->id, .parent = space->parent, .features = features_locked(space), .inode = space->file.inode
    };

    (void)lm_sys_mark(space->fd, space->left ? LM_MARK_KEPT : LM_MARK_CLIENTS);
    space->stale = space->armed && lm_ledger_begin(&space->ledger, &facts, &space->table) < 0;
}

/* What its owner did cannot be recorded: nothing of the space is believed any more, and what is missing raises a
 * signal rather than show what may not be there. */
static void disbelieve_locked(struct space *space)
{
    space->disbelieved = true;
    space->stale = true;
    lm_space_clear(&space->table);
    wake(space, LM_LOWEST, LM_HIGHEST - LM_LOWEST); /* nothing is delivered to who waits for a chunk */
}

/* late: what its parent's memory showed then is not known any more. */
static int adopt_child_locked(struct space *parent, int fd, bool late)
{
    struct space *child;
    int error = make_space(fd, parent->id, &child);

    if (error < 0)
        return error;
    child->follows = parent->follows;
    child->disbelieved = parent->disbelieved;
    child->left = true; /* it has no connection */
    child->armed = true;
    if (late || lm_space_copy(&child->table, &parent->table) < 0)
        disbelieve_locked(child);
    record_locked(child);
    unlock(child);
    (void)watch(child); /* else it is looked at once a second, until it can be watched */
    leave(child);
    return 0;
}

/* The child's userfaultfd, which nobody else has: while it is open, no missing page of the child's reads as zeros. */
static void note_child_locked(struct space *parent, int fd)
{
    int higher = fd > LM_STANDARD ? fd : lm_sys_dup(fd);

    if (higher >= 0 && higher != fd) {
        lm_sys_close(fd);
        fd = higher;
    }
    if (adopt_child_locked(parent, fd, false) < 0)
        parent->orphans[parent->orphan_count++] = fd; /* no more than there are messages at a time */
}

/* Whoever waits at the addresses that an event is about may wait for a chunk that will not be delivered there any
 * more: he faults again, and what lies there now is looked up. */
static void note_locked(struct space *space, const struct lm_uffd_message *message)
{
    bool confused = false;

    if (message->event == LM_UFFD_EVENT_FORK) {
        note_child_locked(space, (int)message->child);
        return;
    }
    if (lm_ledger_note(&space->table, message, &confused) < 0)
        disbelieve_locked(space);
    if (message->event == LM_UFFD_EVENT_REMAP)
        wake(space, message->from, message->length);
    else
        wake(space, message->start, message->end - message->start);
    if (confused) { /* nor is anything delivered where it was moved to */
        space->disbelieved = true;
        wake(space, message->to, message->length);
    }
}

/* Where messages are to be read to. NULL: there is no memory for a ledger. */
static struct lm_uffd_message *room_locked(struct space *space)
{
    struct lm_uffd_message *room = space->stale ? NULL : lm_ledger_room(&space->ledger);

    if (room == NULL) {
        record_locked(space);
        room = lm_ledger_room(&space->ledger);
    }
    return room;
}

static bool have_event(const struct lm_uffd_message *messages, int count)
{
    int i;

    for (i = 0; i < count && messages[i].event == LM_UFFD_EVENT_PAGEFAULT; i++)
        ;
    return i < count;
}

/* False: there still is no memory for all of them. It is tried again when spaces are looked at. */
static bool adopt_orphans_locked(struct space *space)
{
    while (space->orphan_count > 0) {
        if (adopt_child_locked(space, space->orphans[space->orphan_count - 1], true) < 0)
            return false;
        space->orphan_count--;
    }
    return true;
}

/* Read all that the kernel has to say, and record it. */
static void drain_locked(struct space *space)
{
    struct lm_uffd_message spare[LM_MESSAGES];
    int count, i;

    if (!adopt_orphans_locked(space))
        return;
    do {
        struct lm_uffd_message *room = room_locked(space), *messages = room == NULL ? spare : room;
        bool counts;

        count = lm_sys_read(space->fd, messages, sizeof spare);
        count = count < 0 ? 0 : count / (int)sizeof *messages;
        counts = room != NULL && have_event(messages, count);
        if (counts)
            lm_ledger_count(&space->ledger, count);
        for (i = 0; i < count; i++) {
            if (messages[i].event == LM_UFFD_EVENT_PAGEFAULT)
                keep_fault_locked(space, messages[i].address);
            else
                note_locked(space, &messages[i]);
            if (counts)
                lm_ledger_apply(&space->ledger);
        }
        if (room != NULL && !counts)
            lm_ledger_discard(&space->ledger, count);
    } while (count > 0 && space->orphan_count == 0);
}

/* ---- faults ---- */

static void count_latency_locked(struct space *space, uint64_t since)
{
    int bucket = 63 - __builtin_clzll((lm_sys_now_ns() - since) | 1);

    space->latency[bucket < LM_LATENCY_BUCKETS ? bucket : LM_LATENCY_BUCKETS - 1]++;
}

/* False: there is no memory for it. */
static bool wait_for(const struct waiter *waiter)
{
    bool added = true;
    size_t i;

    pthread_mutex_lock(&pager.lock);
    for (i = 0; i < pager.waiter_count; i++) {
        struct waiter *other = &pager.waiters[i];

        if (other->space == waiter->space && other->region == waiter->region && other->first == waiter->first &&
            other->end == waiter->end)
            goto done; /* the whole of the chunks is delivered to the space at once */
    }
    if (pager.waiter_count == pager.waiter_capacity) {
        size_t capacity = pager.waiter_capacity == 0 ? 256 : 2 * pager.waiter_capacity;
        void *memory = realloc(pager.waiters, capacity * sizeof *pager.waiters);

        added = memory != NULL;
        if (added) {
            pager.waiters = memory;
            pager.waiter_capacity = capacity;
        }
    }
    if (added) {
        waiter->space->users++;
        pager.waiters[pager.waiter_count++] = *waiter;
    }
done:
    pthread_mutex_unlock(&pager.lock);
    return added;
}

/* Have the engine bring what is away of chunks [first, end). False: there is no room for more wishes. */
static bool wish(struct wishes *wishes, const struct waiter *waiter)
{
    uint64_t i;

    for (i = waiter->first; i < waiter->end; i++) {
        uint64_t offset = i << waiter->region->table.chunk_shift;

        if (look(waiter->region, i) == LM_CHUNK_THERE || look(waiter->region, i) == LM_CHUNK_ZEROS)
            continue;
        if (wishes->count == LM_MESSAGES)
            return false;
        wishes->of[wishes->count++] = (struct wish){ .region = waiter->region,
                                                     .offset = i == waiter->first ? waiter->offset : offset };
    }
    return true;
}

/* One fault: served now, or it waits. -EAGAIN: events have to be read first. */
static int take_fault_locked(struct space *space, const struct fault *fault, struct wishes *wishes)
{
    const struct lm_space_piece *piece = lm_space_find(&space->table, fault->address);
    struct waiter waiter = { .space = space, .address = fault->address, .since = fault->since };
    uint64_t at, offset, page;
    enum chunk_is what;
    int error;

    if (piece == NULL) { /* what mremap added, or what we have lost track of: not the snapshot's bytes */
        page = lm_sys_page_size();
        at = fault->address & ~(page - 1);
        error = poison(space, at, page, page);
        if (error == 0)
            wake(space, at, page);
        return error == -EAGAIN ? error : 0;
    }
    page = piece->page;
    at = fault->address & ~(page - 1);
    if (piece->show == LM_SHOW_ZERO) {
        error = fill(space, piece, at, page, true);
        if (error != -EAGAIN) {
            wake(space, at, page);
            count_latency_locked(space, fault->since);
        }
        return error == -EAGAIN ? error : 0;
    }
    offset = piece->offset + (at - piece->at);
    waiter.region = piece->region;
    waiter.offset = offset;
    waiter.first = offset >> piece->region->table.chunk_shift;
    waiter.end = ((offset + page - 1) >> piece->region->table.chunk_shift) + 1;
    what = look_at_all(waiter.region, waiter.first, waiter.end);
    if (what == LM_CHUNK_BAD) { /* it failed for others, before: it may have healed */
        uint64_t i;

        for (i = waiter.first; i < waiter.end; i++)
            lm_table_reset(&waiter.region->table, i);
        what = LM_CHUNK_AWAY;
    }
    if (what != LM_CHUNK_AWAY) {
        error = deliver_locked(space, waiter.region, waiter.first, waiter.end, what);
        if (error != -EAGAIN)
            count_latency_locked(space, fault->since);
        return error == -EAGAIN ? error : 0;
    }
    if (!wait_for(&waiter)) {
        wake(space, at, page);
        return 0;
    }
    /* Settled since it was looked at, perhaps before anybody waited for it: then nobody tells, so look again. */
    if (look_at_all(waiter.region, waiter.first, waiter.end) != LM_CHUNK_AWAY)
        ask_again();
    return wish(wishes, &waiter) ? 0 : -ENOBUFS;
}

static void grant(struct wishes *wishes)
{
    unsigned i;

    for (i = 0; i < wishes->count; i++)
        lm_engine_take_up(wishes->of[i].region, wishes->of[i].offset);
    wishes->count = 0;
}

/* One look at a space: what is to be read, and what can be served at once. -EAGAIN: somebody has to run first. */
static int serve_locked(struct space *space, struct wishes *wishes)
{
    int error = 0;

    if (!space->armed)
        return 0;
    drain_locked(space);
    while (space->fault_count > 0 && wishes->count < LM_MESSAGES / 2) {
        struct fault fault = space->faults[--space->fault_count];

        error = space->gone ? 0 : take_fault_locked(space, &fault, wishes);
        if (error == -EAGAIN) {
            space->faults[space->fault_count++] = fault;
            break;
        }
        if (error == -ENOBUFS)
            ask_again();
    }
    if (space->fault_count > 0)
        atomic_store(&space->dirty, true);
    return error;
}

static void serve(struct space *space)
{
    struct wishes wishes = { .count = 0 };
    int rounds = 0, error;

    atomic_store(&space->dirty, true);
    while (atomic_load(&space->dirty) && rounds++ < LM_ROUNDS && pthread_mutex_trylock(&space->lock) == 0) {
        atomic_store(&space->dirty, false);
        error = serve_locked(space, &wishes);
        pthread_mutex_unlock(&space->lock);
        grant(&wishes);
        if (error == -EAGAIN)
            sched_yield();
    }
    if (rounds > LM_ROUNDS)
        ask_again();
}

/* A waiter whose chunks are settled. False: it has to wait on, or for its space. */
static bool deliver(const struct waiter *waiter)
{
    struct space *space = waiter->space;
    enum chunk_is what = look_at_all(waiter->region, waiter->first, waiter->end);
    int rounds = 0, error = -EAGAIN;

    while (what != LM_CHUNK_AWAY && error == -EAGAIN && rounds++ < LM_ROUNDS) {
        if (pthread_mutex_trylock(&space->lock) == 0) {
            error = space->gone ? 0 : deliver_locked(space, waiter->region, waiter->first, waiter->end, what);
            if (error == -EAGAIN)
                drain_locked(space);
            else
                count_latency_locked(space, waiter->since);
            if (space->fault_count > 0)
                atomic_store(&space->dirty, true);
            unlock(space);
        }
        if (error == -EAGAIN)
            sched_yield();
    }
    return error != -EAGAIN;
}

/* Whoever is none of our threads and reads of spaces, or puts something in place there, does so between these two.
 * False: the pager is stopped. Then it is looked at once it goes on. */
static bool begin_work(void)
{
    bool may;

    pthread_mutex_lock(&pager.lock);
    may = pager.running && !pager.stopping;
    pager.settling += may;
    pager.again |= !may;
    pthread_mutex_unlock(&pager.lock);
    return may;
}

static void end_work(void)
{
    pthread_mutex_lock(&pager.lock);
    pager.settling--;
    pthread_mutex_unlock(&pager.lock);
}

/* Take the waiters out that `chunk` of a region matters to, or all; deliver, and put back who has to wait on. */
static void settle(struct lm_region *region, uint64_t chunk)
{
    struct waiter *taken = NULL;
    size_t count = 0, kept = 0, i;

    if (!begin_work())
        return;
    pthread_mutex_lock(&pager.lock);
    for (i = 0; i < pager.waiter_count; i++) {
        const struct waiter *one = &pager.waiters[i];

        count += region == NULL || (one->region == region && one->first <= chunk && chunk < one->end);
    }
    if (count > 0)
        taken = malloc(count * sizeof *taken);
    if (taken != NULL) {
        count = 0;
        for (i = 0; i < pager.waiter_count; i++) {
            const struct waiter *one = &pager.waiters[i];

            if (region == NULL || (one->region == region && one->first <= chunk && chunk < one->end))
                taken[count++] = *one;
            else
                pager.waiters[kept++] = *one;
        }
        pager.waiter_count = kept;
    } else if (count > 0) {
        pager.again = true;
        count = 0;
    }
    pthread_mutex_unlock(&pager.lock);
    for (i = 0; i < count; i++) {
        struct wishes wishes = { .count = 0 };

        if (!deliver(&taken[i])) {
            if (!wait_for(&taken[i]))
                wake(taken[i].space, taken[i].address & ~(uint64_t)(lm_sys_page_size() - 1), lm_sys_page_size());
            if (look_at_all(taken[i].region, taken[i].first, taken[i].end) != LM_CHUNK_AWAY)
                ask_again();
            (void)wish(&wishes, &taken[i]);
            grant(&wishes);
        }
        leave(taken[i].space);
    }
    free(taken);
    end_work();
}

void lm_pager_settled(struct lm_region *region, uint64_t chunk, bool locked)
{
    if (locked)
        ask_again();
    else
        settle(region, chunk);
}

/* Whoever has touched just that part goes on; its waiter stays, for the rest of the chunk. Where a space is busy,
 * or changing, its threads wait for the whole, which comes in a moment. */
void lm_pager_part_settled(struct lm_region *region, uint64_t offset, uint64_t length)
{
    struct space *spaces[LM_PART_SPACES];
    size_t count = 0, i;

    if (!begin_work())
        return;
    pthread_mutex_lock(&pager.lock);
    for (i = 0; i < pager.waiter_count && count < LM_PART_SPACES; i++) {
        const struct waiter *one = &pager.waiters[i];

        if (one->region == region && one->offset >= offset && one->offset - offset < length) {
            one->space->users++;
            spaces[count++] = one->space;
        }
    }
    pthread_mutex_unlock(&pager.lock);
    for (i = 0; i < count; i++) {
        if (pthread_mutex_trylock(&spaces[i]->lock) == 0) {
            if (!spaces[i]->gone)
                (void)deliver_bytes_locked(spaces[i], region, offset, offset + length, LM_CHUNK_THERE);
            unlock(spaces[i]);
        }
        leave(spaces[i]);
    }
    end_work();
}

/* ---- threads ---- */

/* Serve the spaces that want it; `all`: and look which have ended, since processes end without a word. */
static void look_at_spaces(bool all)
{
    size_t count, i;
    struct space **listed = list_spaces(all, &count);

    for (i = 0; i < count; i++) {
        struct space *space = listed[i];
        bool over = false;

        serve(space);
        if (all && pthread_mutex_trylock(&space->lock) == 0) {
            if (space->armed)
                (void)watch(space); /* where there was no room for it before */
            over = space->orphan_count == 0 &&
                   (lm_uffd_is_over(space->fd) ||
                    (space->left && space->table.count == 0 && !space->disbelieved));
            space->gone |= over;
            unlock(space);
        }
        if (over)
            drop(space);
        leave(space);
    }
    free(listed);
}

/* Whether it is this thread's turn to look at all spaces. *ret_again: at those that want it. */
static bool is_time(bool *ret_again)
{
    uint64_t now = lm_sys_now_ns();
    bool due;

    pthread_mutex_lock(&pager.lock);
    *ret_again = pager.again;
    pager.again = false;
    due = now - pager.looked_ns > (uint64_t)LM_IDLE_MS * 1000000u;
    if (due)
        pager.looked_ns = now;
    pthread_mutex_unlock(&pager.lock);
    return due;
}

static void *run(void *argument)
{
    struct lm_worker *worker = argument;
    uint64_t rings;
    uint32_t tag;
    bool again = false, all;

    for (;;) {
        struct space *space;
        int ready;

        (void)lm_engine_work(worker);
        if (pager.stopping)
            return NULL;
        ready = lm_sys_await_for(pager.poller, again ? LM_AGAIN_MS : LM_IDLE_MS, &tag);
        if (ready < 0)
            return NULL;
        if (ready > 0 && tag == LM_BELL) {
            (void)lm_sys_read(pager.bell, &rings, sizeof rings);
            if (pager.stopping) /* that was for all threads */
                lm_sys_ring(pager.bell, 1);
        } else if (ready > 0 && (space = use(tag)) != NULL) {
            serve(space);
            leave(space);
        }
        all = is_time(&again);
        if (again)
            settle(NULL, 0);
        if (all || again)
            look_at_spaces(all);
    }
}

/* Spaces may be there already: handed over by another pager, or kept while this one was stopped. */
static int open_poller_locked(void)
{
    const struct space *space;
    int error;

    pager.poller = lm_sys_poller();
    pager.bell = pager.poller < 0 ? pager.poller : lm_sys_bell();
    error = pager.bell < 0 ? pager.bell : lm_sys_watch(pager.poller, pager.bell, EPOLLIN, LM_BELL);
    for (space = pager.spaces; space != NULL && error == 0; space = space->next)
        error = space->armed ? watch_locked(space) : 0;
    return error;
}

int lm_pager_start(int threads)
{
    int cpus = lm_sys_cpu_count(), error, i;
    void *zeros;

    if (pager.running)
        return -EALREADY;
    pager.thread_count = 0;
    threads = threads > 0 ? threads : cpus;
    threads = threads < 2 ? 2 : threads > 8 ? 8 : threads;
    error = pager.zeros == NULL ? lm_sys_alloc(LM_HUGE, &zeros) : 0;
    if (error < 0)
        return error;
    if (pager.zeros == NULL)
        pager.zeros = zeros;
    error = pager.inaccessible == NULL
                ? lm_sys_reserve(lm_sys_page_size(), lm_sys_page_size(), &pager.inaccessible)
                : 0;
    if (error < 0)
        return error;
    pthread_mutex_lock(&pager.lock);
    error = open_poller_locked();
    pager.stopping = false;
    pager.running = true;
    pthread_mutex_unlock(&pager.lock);
    for (i = 0; i < threads && error == 0; i++) {
        error = lm_worker_init(&pager.workers[i]);
        if (error == 0)
            error = lm_sys_thread_start(&pager.threads[i], run, &pager.workers[i]);
        if (error < 0)
            lm_worker_destroy(&pager.workers[i]);
        pager.thread_count += error == 0;
    }
    if (error < 0)
        lm_pager_stop();
    else
        ask_again();
    return error;
}

/* Spaces are what the next pager is told of. */
static void adopt_all_orphans(void)
{
    size_t count, i;
    struct space **listed = list_spaces(true, &count);

    for (i = 0; i < count; i++) {
        pthread_mutex_lock(&listed[i]->lock);
        (void)adopt_orphans_locked(listed[i]);
        unlock(listed[i]);
        leave(listed[i]);
    }
    free(listed);
}

void lm_pager_stop(void)
{
    bool settling;
    int i;

    if (!pager.running)
        return;
    pthread_mutex_lock(&pager.lock);
    pager.stopping = true;
    if (pager.bell >= 0)
        lm_sys_ring(pager.bell, 1);
    pthread_mutex_unlock(&pager.lock);
    for (i = 0; i < pager.thread_count; i++) {
        pthread_join(pager.threads[i], NULL);
        lm_worker_destroy(&pager.workers[i]);
    }
    do { /* the engine's helpers: they may be reading events */
        pthread_mutex_lock(&pager.lock);
        settling = pager.settling > 0;
        if (!settling) {
            if (pager.bell >= 0)
                lm_sys_close(pager.bell);
            if (pager.poller >= 0)
                lm_sys_close(pager.poller);
            pager.bell = pager.poller = -1;
            pager.running = false;
        }
        pthread_mutex_unlock(&pager.lock);
        if (settling)
            lm_sys_pause(200);
    } while (settling);
    adopt_all_orphans();
}

/* ---- what the control plane asks ---- */

int lm_pager_open_space(int uffd, int agree, uint32_t *ret_space, uint32_t *ret_features)
{
    uint64_t features = 0;
    struct space *space;
    int fd, error;

    if (!lm_uffd_is_one(uffd) && !agree)
        return -EBADF;
    if (agree) {
        error = lm_uffd_agree(uffd, LM_NEEDED, LM_WANTED, &features);
        if (error == 0)
            error = lm_sys_mark(uffd, LM_MARK_CLIENTS); /* another pager's mark would tell its twin what to do */
        if (error < 0)
            return error;
    }
    fd = lm_sys_dup(uffd);
    if (fd < 0)
        return fd;
    error = make_space(fd, 0, &space);
    if (error < 0) {
        lm_sys_close(fd);
        return error;
    }
    space->follows = (features & LM_UFFD_FEATURE_EVENT_FORK) != 0;
    unlock(space);
    *ret_space = space->id;
    *ret_features = space->follows ? LM_PAGER_FOLLOWS_FORK : 0;
    leave(space);
    return 0;
}

/* Not before: a fault whose memory we have not been told of yet would be taken for one of memory that has gone. */
static int arm(struct space *space)
{
    bool armed;

    pthread_mutex_lock(&space->lock);
    armed = space->armed;
    space->armed = true;
    if (!armed)
        record_locked(space);
    unlock(space);
    return armed ? 0 : watch(space);
}

static void wake_all(struct space *space)
{
    size_t i;

    pthread_mutex_lock(&space->lock);
    for (i = 0; i < space->table.count; i++)
        wake(space, space->table.pieces[i].at, space->table.pieces[i].length);
    unlock(space);
}

static int check_range(uint64_t address, uint64_t length, const struct lm_region *region, uint64_t offset,
                       uint32_t page)
{
    uint64_t limit = UINT64_C(1) << 56;

    if ((page != lm_sys_page_size() && page != LM_HUGE) || length == 0 || ((address | length | offset) & (page - 1)) ||
        address > limit || length > limit - address || offset > region->size || length > region->size - offset)
        return -EINVAL;
    return 0;
}

static int is_registered(const struct space *space, uint64_t address, uint64_t length, uint32_t page)
{
    int answer = lm_uffd_is_registered(space->fd, address, length, pager.inaccessible);

    if (answer == 1 && page < length) /* the whole may be a multiple of bigger pages */
        answer = lm_uffd_is_registered(space->fd, address, page, pager.inaccessible);
    return answer;
}

/* Pages of a file come without a message where only missing ones are registered, chunks that are half there, too, if
 * it is our memfd: so that is for LM_PAGER_SHARED, and what is not said to be has to be anonymous. */
static int register_memory(const struct space *space, uint64_t address, uint64_t length, uint32_t page, bool shared)
{
    uint64_t ioctls;
    int error = lm_uffd_register_minor(space->fd, address, length, &ioctls);

    if (error == 0 && !shared) {
        (void)lm_uffd_unregister(space->fd, address, length);
        return -EINVAL;
    }
    if (!shared && error == -EINVAL) /* it is anonymous; else that is not known */
        error = lm_uffd_register(space->fd, address, length, &ioctls);
    if (error == 0 && is_registered(space, address, length, page) == 0) {
        (void)lm_uffd_unregister(space->fd, address, length);
        error = -EINVAL;
    }
    return error;
}

int lm_pager_map(uint32_t id, uint64_t address, uint64_t length, lm_region *region, uint64_t offset, uint32_t page,
                 uint32_t flags)
{
    struct lm_space_piece piece = { .at = address, .length = length, .offset = offset, .region = region, .page = page };
    struct space *space;
    int error;

    piece.show = flags & LM_PAGER_IS_ZERO ? LM_SHOW_ZERO
                 : (flags & LM_PAGER_SHARED) && !(flags & LM_PAGER_ADOPT) ? LM_SHOW_SHARED
                                                                         : LM_SHOW_COPY;
    piece.forgets = (flags & LM_PAGER_REMOVED_ZERO) != 0;
    error = region->pages == &lm_pages_stock ? check_range(address, length, region, offset, page) : -EINVAL;
    if (error < 0)
        return error;
    space = use(id);
    if (space == NULL)
        return -ESRCH;
    pthread_mutex_lock(&space->lock);
    error = lm_space_add(&space->table, &piece);
    space->stale = true;
    unlock(space);
    if (error == 0 && !(flags & LM_PAGER_ADOPT)) {
        error = register_memory(space, address, length, page, (flags & LM_PAGER_SHARED) != 0);
        if (error < 0) {
            pthread_mutex_lock(&space->lock);
            (void)lm_space_unmap(&space->table, address, address + length);
            space->stale = true;
            unlock(space);
        }
    }
    if (error == 0) { /* before it is told that it is served: another pager may have to know */
        pthread_mutex_lock(&space->lock);
        if (space->armed) /* else it is recorded then; and the mark may still be another pager's */
            record_locked(space);
        unlock(space);
    }
    if (error == 0 && !(flags & LM_PAGER_MORE)) {
        error = arm(space);
        wake_all(space); /* whose messages an earlier pager has read */
    }
    leave(space);
    return error;
}

int lm_pager_resume_space(uint32_t id, uint32_t parent, uint32_t features)
{
    struct space *space = use(id);
    int error;

    if (space == NULL)
        return -ESRCH;
    pthread_mutex_lock(&space->lock);
    space->parent = parent;
    space->follows = (features & LM_PAGER_FOLLOWS_FORK) != 0;
    space->left = (features & LM_SPACE_LEFT) != 0;
    space->disbelieved = (features & LM_SPACE_DISBELIEVED) != 0;
    unlock(space);
    error = arm(space);
    /* Not only what is mapped: whoever read the messages before has perhaps not answered all of them. */
    wake(space, LM_LOWEST, LM_HIGHEST - LM_LOWEST);
    wake_all(space);
    leave(space);
    return error;
}

/* One step of populating: pages of one piece, of one chunk or of as many as one page has. Sets *ret_end to where the
 * next step begins, 0 if nothing more lies before `end`. The bytes in place, or -EAGAIN. */
static int64_t populate_step_locked(struct space *space, uint64_t address, uint64_t end, uint64_t *ret_end)
{
    size_t index = lm_space_after(&space->table, address);
    const struct lm_space_piece *piece = &space->table.pieces[index];
    uint64_t at, stop, offset, last, step;
    enum chunk_is what = LM_CHUNK_ZEROS;
    int error = 0;

    *ret_end = 0;
    if (address >= end || index == space->table.count || piece->at >= end)
        return 0;
    step = UINT64_C(1) << piece->region->table.chunk_shift;
    step = step > piece->page ? step : piece->page;
    at = address > piece->at ? address : piece->at;
    offset = (piece->offset + (at - piece->at)) / step * step;
    last = offset + step < piece->offset + piece->length ? offset + step : piece->offset + piece->length;
    offset = offset > piece->offset ? offset : piece->offset;
    at = piece->at + (offset - piece->offset);
    stop = piece->at + (last - piece->offset);
    if (piece->show != LM_SHOW_ZERO)
        what = look_at_all(piece->region, offset >> piece->region->table.chunk_shift,
                           ((last - 1) >> piece->region->table.chunk_shift) + 1);
    if (what == LM_CHUNK_ZEROS || what == LM_CHUNK_THERE) {
        error = fill(space, piece, at, stop - at, what == LM_CHUNK_ZEROS);
        if (error != -EAGAIN)
            wake(space, at, stop - at);
    }
    if (error == -EAGAIN)
        return error;
    *ret_end = stop;
    if (error < 0 || what == LM_CHUNK_AWAY || what == LM_CHUNK_BAD)
        return 0;
    return (int64_t)((stop < end ? stop : end) - (at > address ? at : address));
}

int64_t lm_pager_populate(uint32_t id, uint64_t address, uint64_t length)
{
    uint64_t end = length > UINT64_MAX - address ? UINT64_MAX : address + length, next = address;
    struct space *space = use(id);
    int64_t in_place = 0, got;
    unsigned tries = 0;

    if (space == NULL)
        return -ESRCH;
    do {
        if (!begin_work()) { /* a handover: whoever asks is answered by the other pager */
            got = -EAGAIN;
            break;
        }
        pthread_mutex_lock(&space->lock);
        if (space->armed)
            drain_locked(space);
        got = space->gone ? -ESRCH : populate_step_locked(space, address, end, &next);
        if (space->fault_count > 0)
            atomic_store(&space->dirty, true);
        unlock(space);
        end_work();
        if (got >= 0) {
            in_place += got;
            address = next;
            tries = 0;
        } else if (got == -EAGAIN && ++tries < LM_POPULATE_TRIES) {
            lm_sys_pause(LM_AGAIN_MS * 1000);
        } else {
            break;
        }
    } while (got == -EAGAIN || next != 0);
    leave(space);
    return got < 0 ? got : in_place;
}

int lm_pager_is_registered(uint32_t id, uint64_t address, uint64_t length, uint32_t page)
{
    struct space *space = use(id);
    int answer;

    if (space == NULL)
        return -ESRCH;
    answer = is_registered(space, address, length, page);
    leave(space);
    return answer;
}

void lm_pager_leave_space(uint32_t id)
{
    struct space *space = use(id);

    if (space == NULL)
        return;
    pthread_mutex_lock(&space->lock);
    space->left = true;
    record_locked(space);
    unlock(space);
    leave(space);
}

int lm_pager_claim_space(int uffd, uint32_t *ret_space)
{
    struct lm_sys_file file;
    int error = lm_sys_identify(uffd, &file);
    size_t count, i;
    struct space **all = error < 0 ? NULL : list_spaces(true, &count);

    if (all == NULL)
        return error < 0 ? error : -ENOMEM;
    error = -ESRCH;
    for (i = 0; i < count; i++) {
        pthread_mutex_lock(&all[i]->lock);
        if (error == -ESRCH && !all[i]->gone && all[i]->file.inode == file.inode) {
            error = all[i]->left ? 0 : -EBUSY;
            all[i]->left = false;
            *ret_space = all[i]->id;
            record_locked(all[i]);
        }
        unlock(all[i]);
        leave(all[i]);
    }
    free(all);
    return error;
}

void lm_pager_close_space(uint32_t id)
{
    struct space *space = use(id);

    if (space == NULL)
        return;
    pthread_mutex_lock(&space->lock);
    space->gone = true;
    unlock(space);
    drop(space);
    leave(space);
}

static void report(struct space *space, lm_space_report *out)
{
    size_t i;

    pthread_mutex_lock(&space->lock);
    *out = (lm_space_report){ .space = space->id,
                              .parent = space->parent,
                              .features = features_locked(space),
                              .pieces = space->table.count,
                              .faults = space->fault_total,
                              .served = space->served,
                              .failed = space->failed };
    memcpy(out->latency, space->latency, sizeof out->latency);
    for (i = 0; i < space->table.count; i++)
        out->mapped += space->table.pieces[i].length;
    unlock(space);
    pthread_mutex_lock(&pager.lock);
    for (i = 0; i < pager.waiter_count; i++)
        out->waiting += pager.waiters[i].space == space;
    pthread_mutex_unlock(&pager.lock);
}

uint32_t lm_pager_spaces(lm_space_report *out, uint32_t capacity)
{
    uint32_t count = 0, i, total;
    struct space *space;

    pthread_mutex_lock(&pager.lock);
    for (space = pager.spaces; space != NULL && count < capacity; space = space->next)
        out[count++].space = space->id;
    total = pager.space_count;
    pthread_mutex_unlock(&pager.lock);
    for (i = 0; i < count; i++) {
        space = use(out[i].space);
        out[i] = (lm_space_report){ .space = 0 }; /* it went meanwhile */
        if (space != NULL) {
            report(space, &out[i]);
            leave(space);
        }
    }
    return total;
}

int64_t lm_pager_parts(uint32_t id, lm_space_part *out, uint64_t capacity)
{
    struct space *space = use(id);
    uint64_t count = 0;

    if (space == NULL)
        return -ESRCH;
    pthread_mutex_lock(&space->lock);
    for (; count < space->table.count && count < capacity; count++)
        out[count] = lm_ledger_part(&space->table.pieces[count], space->table.pieces[count].region->serial);
    count = space->table.count;
    unlock(space);
    leave(space);
    return (int64_t)count;
}

int lm_pager_descriptor(uint32_t id)
{
    struct space *space = use(id);
    int fd;

    if (space == NULL)
        return -ESRCH;
    fd = lm_sys_dup(space->fd);
    leave(space);
    return fd;
}

uint64_t lm_region_serial(lm_region *region) { return region->serial; }

int lm_region_descriptor(lm_region *region)
{
    return region->pages != &lm_pages_stock || region->stage.fd < 0 ? -EINVAL
                                                                    : lm_sys_open_for_reading(region->stage.fd);
}

uint32_t lm_pager_users(lm_region *region)
{
    size_t count, i, j;
    struct space **all = list_spaces(true, &count);
    uint32_t users = 0;

    pthread_mutex_lock(&pager.lock);
    for (i = 0; i < pager.waiter_count; i++)
        users += pager.waiters[i].region == region;
    pthread_mutex_unlock(&pager.lock);
    if (all == NULL)
        return 1;
    for (i = 0; i < count; i++) {
        bool uses = false;

        pthread_mutex_lock(&all[i]->lock);
        for (j = 0; j < all[i]->table.count && !uses; j++)
            uses = all[i]->table.pieces[j].region == region;
        unlock(all[i]);
        users += uses;
        leave(all[i]);
    }
    free(all);
    return users;
}
