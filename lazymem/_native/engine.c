/* SPDX-License-Identifier: Apache-2.0
 *
 * engine.c: the threads. Reads fault messages, hands chunks to workers, starts, stops, and survives
 * fork. Never calls Python, never touches a region's memory, never waits for I/O with a lock held.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#include "fetch.h"
#include "places.h"
#include "sys.h"
#include "trap.h"
#include "uffd.h"

#define LM_MESSAGES 16
#define LM_BELL LM_UFFD_COUNT /* epoll tag; smaller ones are indices of uffds */
/* Chunks looked at for one prefetch task before the lock is let go. */
#define LM_PREFETCH_SCAN 4096
/* How long a thread that waits may hold signals back: what a handler is late at most. */
#define LM_SIGNALS_MS 10
/* Each reads events and yields: in practice as many as threads change the address space. */
#define LM_SETTLE_ROUNDS 1000000
#define LM_FORK_ROUNDS 1000
#define LM_DISCARD_MS 100

/* All zeros until `prepare` runs: with one value that is not, its queues were megabytes of the library's
 * file, and of pages that every fork copies. */
struct lm_engine lm_engine;

static struct lm_engine *const engine = &lm_engine;
static int unprepared; /* why fork is not provided for: then nothing opens, for a child would read zeros */

/* ---- regions by address ---- */

size_t lm_engine_upper_bound(uintptr_t address)
{
    size_t low = 0, high = engine->region_count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if ((uintptr_t)engine->regions[middle]->base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int grow_index_locked(void)
{
    size_t wanted = engine->region_capacity == 0 ? 512 : 2 * engine->region_capacity;
    void *memory;
    int error = lm_sys_alloc(wanted * sizeof *engine->regions, &memory);

    if (error < 0)
        return error;
    if (engine->region_count > 0)
        memcpy(memory, engine->regions, engine->region_count * sizeof *engine->regions);
    lm_sys_free(engine->regions, engine->region_capacity * sizeof *engine->regions);
    engine->regions = memory;
    engine->region_capacity = wanted;
    return 0;
}

void lm_engine_lock_settled(int rounds)
{
    int index;

    for (;; rounds--) {
        pthread_rwlock_wrlock(&engine->installs);
        pthread_mutex_lock(&engine->lock);
        if (lm_places_settled_locked() || rounds <= 1)
            return;
        lm_engine_unlock_settled();
        for (index = 0; index < LM_UFFD_COUNT; index++)
            if (engine->uffds[index].fd >= 0)
                lm_engine_read_events(index);
        sched_yield();
    }
}

void lm_engine_unlock_settled(void)
{
    pthread_mutex_unlock(&engine->lock);
    pthread_rwlock_unlock(&engine->installs);
}

int lm_engine_insert(struct lm_region *region)
{
    int error = 0;

    /* An event of memory that lay at the same address must not be taken for one of the region's. The address
     * was free before the region came, so none is left once there is a moment without any. */
    lm_engine_lock_settled(LM_SETTLE_ROUNDS);
    if (engine->region_count == engine->region_capacity)
        error = grow_index_locked();
    if (error == 0) {
        size_t at = lm_engine_upper_bound((uintptr_t)region->base);

        lm_places_claim_locked(region);
        memmove(&engine->regions[at + 1], &engine->regions[at],
                (engine->region_count - at) * sizeof *engine->regions);
        engine->regions[at] = region;
        engine->region_count++;
    }
    lm_engine_unlock_settled();
    return error;
}

bool lm_engine_release_idle(struct lm_region *region)
{
    bool idle;

    pthread_mutex_lock(&engine->lock);
    idle = region->tasks == 0 && region->calls == 0;
    region->released = idle;
    pthread_mutex_unlock(&engine->lock);
    return idle;
}

void lm_engine_remove(struct lm_region *region)
{
    size_t at;

    pthread_mutex_lock(&engine->lock);
    at = lm_engine_upper_bound((uintptr_t)region->base) - 1;
    while (engine->regions[at] != region) /* one that lost its base may share it with the next */
        at--;
    engine->region_count--;
    memmove(&engine->regions[at], &engine->regions[at + 1],
            (engine->region_count - at) * sizeof *engine->regions);
    pthread_mutex_unlock(&engine->lock);
}

uint64_t lm_engine_region_count(void)
{
    LM_HOLD_SIGNALS;
    uint64_t count;

    pthread_mutex_lock(&engine->lifecycle);
    count = engine->users;
    pthread_mutex_unlock(&engine->lifecycle);
    return count;
}

/* ---- fault -> chunk ---- */

bool lm_engine_by_courier(const struct lm_region *region)
{
    return region->remote && !region->composed;
}

static struct lm_queue *queue_of(const struct lm_region *region)
{
    if (!region->remote)
        return &engine->queue;
    return region->composed ? &engine->composing : &engine->remote;
}

int lm_engine_span_room_locked(const struct lm_region *region)
{
    return (int)(LM_QUEUE_SPANS - queue_of(region)->span_count);
}

void lm_engine_cut_spans_locked(const struct lm_region *region, uint64_t first, uint64_t end)
{
    lm_queue_cut_spans(queue_of(region), region, first, end);
}

bool lm_engine_push_span_locked(const struct lm_span *span, bool front)
{
    if (!lm_queue_push_span(queue_of(span->region), span, front))
        return false;
    if (lm_engine_by_courier(span->region))
        lm_fetch_wake_locked();
    else
        pthread_cond_broadcast(&engine->work);
    return true;
}

/* The scan that `chunk` goes on with; else a new one in the place of the one that rests longest. Several,
 * because threads share an array: each goes through a stretch of its own. */
static struct lm_scan *scan_of_locked(struct lm_region *region, uint64_t chunk)
{
    struct lm_scan *oldest = &region->ahead[0];

    for (int i = 0; i < LM_SCANS; i++) {
        struct lm_scan *scan = &region->ahead[i];

        if (scan->used != 0 &&
            (chunk == scan->last || chunk == scan->last + 1 || (chunk > scan->last && chunk <= scan->end)))
            return scan;
        if (scan->used < oldest->used)
            oldest = scan;
    }
    *oldest = (struct lm_scan) { .first = chunk, .last = chunk, .end = chunk + 1 };
    return oldest;
}

/* A thread that reads one page after the next gets the following chunks beforehand: at most as many as
 * it has already gone through, so that what is read in vain is never more than what was asked for; and never
 * past the end of the array that it reads. */
static void run_ahead_locked(struct lm_region *region, uint64_t chunk)
{
    struct lm_scan *scan;
    uint64_t end, start, limit;

    if (region->readahead == 0 || !engine->has_helpers || region->closing) /* its spans have been dropped */
        return;
    scan = scan_of_locked(region, chunk);
    scan->used = ++region->ahead_time;
    if (chunk == scan->last)
        return; /* again, or for the first time */
    scan->last = chunk;
    if (++scan->streak < 2)
        return;
    start = scan->end > chunk + 1 ? scan->end : chunk + 1;
    if (start > chunk + 1 + scan->window / 2)
        return; /* enough is under way */
    scan->window = scan->window == 0 ? 1 : 2 * scan->window;
    if (scan->window > chunk - scan->first + 1)
        scan->window = chunk - scan->first + 1;
    if (scan->window > region->readahead)
        scan->window = region->readahead;
    limit = lm_region_array_end(region, chunk);
    end = chunk + 1 + scan->window;
    if (end > limit)
        end = limit;
    if (start < end) {
        struct lm_span span = { .region = region, .next = start, .end = end };

        if (lm_engine_push_span_locked(&span, false))
            scan->end = end;
    }
}

/* True if *ret_task is new work. */
static bool accept_fault_locked(struct lm_region *region, uint64_t offset, uintptr_t address, uint64_t now,
                                struct lm_task *ret_task)
{
    struct lm_task task = { .region = region, .address = address, .offset = offset, .start_ns = now };

    task.chunk = offset >> region->table.chunk_shift;
    atomic_fetch_add_explicit(&region->counters.faults, 1, memory_order_relaxed);
    for (;;) {
        if (lm_table_claim(&region->table, task.chunk, true)) {
            task.kind = LM_TASK_DEMAND;
            run_ahead_locked(region, task.chunk);
            break;
        }
        if (lm_table_want(&region->table, task.chunk)) {
            run_ahead_locked(region, task.chunk);
            if (region->remote) /* composed or not */
                lm_fetch_promote_locked(region, task.chunk);
            return false; /* its owner wakes the whole chunk, whatever comes of it */
        }
        if (lm_table_state(&region->table, task.chunk) >= LM_STATE_PRESENT &&
            lm_table_state(&region->table, task.chunk) != LM_STATE_FAILED) {
            task.kind = LM_TASK_RECHECK;
            break;
        }
    }
    region->tasks++;
    *ret_task = task;
    return true;
}

/* 65,536 threads wait on as many chunks: let the thread fault again a little later. */
void lm_engine_turn_away_locked(const struct lm_task *task)
{
    struct lm_region *region = task->region;

    if (task->kind != LM_TASK_RECHECK)
        lm_table_publish(&region->table, task->chunk, LM_STATE_ABSENT);
    region->tasks--;
    region->pages->wake(region, task->chunk, true);
}

/* Whoever serves the queue that a fault goes to: the courier where its bytes come over a network, and only
 * those; a composer where it may have to wait for some; else any resolver. */
static struct lm_queue *queue_for(const struct lm_task *task)
{
    struct lm_queue *queue = queue_of(task->region);

    if (queue == &engine->remote && (task->kind != LM_TASK_DEMAND ||
                                     lm_table_record(&task->region->table, task->chunk) == NULL))
        return &engine->queue;
    return queue;
}

/* Faults that one thread takes up, and what they came to: tasks for resolvers, the courier, composers. */
struct intake { unsigned queued, asked, composed; };

static void take_up_locked(struct intake *intake, struct lm_region *region, uint64_t offset, uintptr_t address,
                           uint64_t now)
{
    struct lm_queue *queue;
    struct lm_task task;

    if (!accept_fault_locked(region, offset, address, now, &task))
        return;
    queue = queue_for(&task);
    if (!lm_queue_push_task(queue, &task))
        lm_engine_turn_away_locked(&task);
    else
        ++*(queue == &engine->remote      ? &intake->asked
            : queue == &engine->composing ? &intake->composed
                                          : &intake->queued);
}

static void rouse_locked(const struct intake *intake)
{
    if (intake->asked > 0)
        lm_fetch_wake_locked();
    if (intake->composed > 0)
        pthread_cond_broadcast(&engine->work);
}

void lm_engine_take_up(struct lm_region *region, uint64_t offset)
{
    struct intake intake = { 0 };

    pthread_mutex_lock(&engine->lock);
    if (!region->closing) {
        take_up_locked(&intake, region, offset, 0, lm_sys_now_ns());
        rouse_locked(&intake);
        if (intake.queued > 0)
            pthread_cond_signal(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
}

static void take_message_locked(struct intake *intake, const struct lm_uffd *uffd, uintptr_t address, uint64_t now)
{
    uint64_t offset = 0;
    struct lm_region *region = lm_places_find_locked(address, &offset);
    size_t page = lm_sys_page_size();

    if (region == NULL)
        lm_places_fault_elsewhere_locked(uffd, address);
    else if (region->released) /* it faults again, until there is nothing to fault on */
        (void)lm_uffd_wake(uffd->fd, address & ~(uintptr_t)(page - 1), page);
    else
        take_up_locked(intake, region, offset, address, now);
}

/* Queue the faults among the messages, once what the others tell of is recorded. */
static void sort_locked(struct intake *intake, const struct lm_uffd *uffd, const struct lm_uffd_message *messages,
                        int count)
{
    uint64_t now = lm_sys_now_ns();
    int i;

    for (i = 0; i < count; i++)
        if (messages[i].event != LM_UFFD_EVENT_PAGEFAULT)
            lm_places_note_locked(uffd, &messages[i]);
    for (i = 0; i < count; i++)
        if (messages[i].event == LM_UFFD_EVENT_PAGEFAULT)
            take_message_locked(intake, uffd, (uintptr_t)messages[i].address, now);
    rouse_locked(intake);
}

/* Read what the kernel has and queue it. Reading and recording are one step under the lock: whoever has come
 * back from munmap or mremap, and then asks where a region lies, is told of it. Returns the tasks for resolvers. */
static unsigned read_messages(int index)
{
    struct lm_uffd_message messages[LM_MESSAGES];
    struct intake intake = { 0 };
    int count;

    do {
        bool alone = engine->scattered;

        if (alone) /* what an event is about must not be in use while its sender goes on */
            pthread_rwlock_wrlock(&engine->installs);
        pthread_mutex_lock(&engine->lock);
        if (lm_places_unsettled_locked())
            (void)lm_places_settled_locked(); /* what is read now is younger than what is recorded */
        count = lm_uffd_read(engine->uffds[index].fd, messages, LM_MESSAGES);
        sort_locked(&intake, &engine->uffds[index], messages, count);
        pthread_mutex_unlock(&engine->lock);
        if (alone)
            pthread_rwlock_unlock(&engine->installs);
        if (count < 0)
            lm_engine_note_lost();
    } while (count == LM_MESSAGES); /* the poller reports an edge: leave nothing behind */
    return intake.queued;
}

void lm_engine_read_events(int index)
{
    unsigned queued = read_messages(index);

    if (queued > 0)
        lm_sys_ring(engine->bell, queued);
}

/* The same for what threads have put into slots. */
static void take_traps(void)
{
    struct intake intake = { 0 };
    uintptr_t address;

    while (lm_trap_take(&address)) {
        struct lm_region *region;
        uint64_t offset;

        pthread_mutex_lock(&engine->lock);
        region = lm_places_find_locked(address, &offset);
        if (region != NULL && region->pages == &lm_pages_trap && !region->released)
            take_up_locked(&intake, region, offset, address, lm_sys_now_ns());
        else
            lm_trap_answer(address, 1, LM_TRAP_FOREIGN);
        rouse_locked(&intake);
        pthread_mutex_unlock(&engine->lock);
    }
    if (intake.queued > 1)
        lm_trap_ring((int)intake.queued - 1);
}

/* ---- workers ---- */

static bool take_prefetch_locked(struct lm_queue *queue, struct lm_task *ret_task)
{
    struct lm_span *span;
    unsigned looked;

    for (looked = 0; looked < LM_PREFETCH_SCAN; looked++) {
        struct lm_region *region;
        const lm_run *run_of;
        uint64_t chunk;
        bool claimed = false;

        span = lm_queue_first_span(queue);
        if (span == NULL)
            return false;
        region = span->region;
        chunk = span->next;
        run_of = lm_table_run(&region->table, chunk);
        if (run_of->first_record == LM_ZERO_RUN) {
            span->next = run_of->first_chunk + run_of->count; /* zeros need no fetching */
        } else {
            span->next++;
            claimed = lm_table_claim(&region->table, chunk, false);
        }
        if (span->next >= span->end)
            lm_queue_pop_span(queue);
        if (claimed) {
            *ret_task = (struct lm_task){ .region = region, .chunk = chunk, .kind = LM_TASK_PREFETCH };
            region->tasks++;
            return true;
        }
    }
    return false;
}

static void run(struct lm_worker *worker, const struct lm_task *task)
{
    (void)lm_populate(worker, task);
    pthread_mutex_lock(&engine->lock);
    task->region->tasks--;
    if (task->range != NULL)
        lm_fetch_release_locked(task->range);
    pthread_cond_broadcast(&engine->progress);
    pthread_mutex_unlock(&engine->lock);
}

static bool take(struct lm_task *ret_task, bool helper)
{
    bool taken;

    pthread_mutex_lock(&engine->lock);
    taken = lm_queue_pop_task(&engine->queue, ret_task) || lm_queue_pop_task(&engine->arrived, ret_task) ||
            (helper && (lm_queue_pop_task(&engine->early, ret_task) || take_prefetch_locked(&engine->queue, ret_task)));
    pthread_mutex_unlock(&engine->lock);
    return taken;
}

static bool is_stopping(void)
{
    bool stopping;

    pthread_mutex_lock(&engine->lock);
    stopping = engine->stopping;
    pthread_mutex_unlock(&engine->lock);
    return stopping;
}

bool lm_engine_work(struct lm_worker *worker)
{
    struct lm_task task;

    while (take(&task, false))
        run(worker, &task);
    return !is_stopping();
}

static void *resolve(void *argument)
{
    struct lm_worker *worker = argument;
    struct lm_task task;
    uint64_t one;
    unsigned queued;
    uint32_t tag;
    int ready;

    for (;;) {
        while (take(&task, false))
            run(worker, &task);
        if (is_stopping())
            return NULL;
        ready = lm_sys_await(engine->poller, &tag);
        if (ready < 0) {
            lm_engine_note_lost();
            return NULL;
        }
        if (ready == 0)
            continue;
        if (tag == LM_BELL)
            (void)lm_sys_read(engine->bell, &one, sizeof one); /* somebody else may have taken it */
        else if ((queued = read_messages((int)tag)) > 1)
            lm_sys_ring(engine->bell, queued - 1); /* one of them is for this thread */
    }
}

static void *catch_traps(void *argument)
{
    struct lm_worker *worker = argument;
    struct lm_task task;

    for (;;) {
        uint32_t rings = lm_trap_rings();

        take_traps();
        if (take(&task, false))
            run(worker, &task);
        else if (is_stopping())
            return NULL;
        else
            lm_trap_sleep(rings);
    }
}

static void *help(void *argument)
{
    struct lm_worker *worker = argument;
    struct lm_task task;

    for (;;) {
        bool stopping;

        while (take(&task, true))
            run(worker, &task);
        pthread_mutex_lock(&engine->lock);
        while (!engine->stopping && lm_queue_first_span(&engine->queue) == NULL &&
               engine->queue.task_count == 0 && engine->arrived.task_count == 0 && engine->early.task_count == 0)
            pthread_cond_wait(&engine->work, &engine->lock);
        stopping = engine->stopping;
        pthread_mutex_unlock(&engine->lock);
        if (stopping)
            return NULL;
    }
}

static bool take_composing_locked(struct lm_task *ret_task)
{
    if (lm_queue_pop_task(&engine->composing, ret_task))
        return true;
    return engine->composing_ahead < LM_COMPOSERS - LM_COMPOSERS_KEPT &&
           take_prefetch_locked(&engine->composing, ret_task);
}

static void *compose(void *argument)
{
    struct lm_worker *worker = argument;
    struct lm_task task;
    bool ahead;

    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping) {
        if (!take_composing_locked(&task)) {
            pthread_cond_wait(&engine->work, &engine->lock);
            continue;
        }
        ahead = task.kind == LM_TASK_PREFETCH;
        engine->composing_ahead += ahead;
        pthread_mutex_unlock(&engine->lock);
        run(worker, &task);
        pthread_mutex_lock(&engine->lock);
        engine->composing_ahead -= ahead;
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- start and stop ---- */

static void init_sync(void)
{
    pthread_rwlockattr_t fair;
    pthread_condattr_t clock;

    /* Else a new region might wait for as long as others are populated. */
    pthread_rwlockattr_init(&fair);
    (void)pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&engine->installs, &fair);
    pthread_rwlockattr_destroy(&fair);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&engine->lifecycle, NULL);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, &clock);
    pthread_cond_init(&engine->progress, &clock);
    pthread_cond_init(&engine->end, &clock);
    pthread_condattr_destroy(&clock);
}

static int open_poller(void)
{
    int error;

    if (engine->poller >= 0 && engine->bell >= 0)
        return 0;
    if (engine->poller < 0)
        engine->poller = lm_sys_poller();
    if (engine->poller < 0)
        return engine->poller;
    engine->bell = lm_sys_bell();
    if (engine->bell < 0)
        return engine->bell;
    error = lm_sys_watch(engine->poller, engine->bell, EPOLLIN, LM_BELL);
    if (error < 0) {
        lm_sys_close(engine->bell);
        engine->bell = -1;
    }
    return error;
}

/* The application may have closed all descriptors, and opened its own under their numbers. */
static bool has_its_descriptors(void)
{
    int i;

    if (engine->poller < 0 || engine->bell < 0)
        return true; /* never had them all */
    if (!lm_sys_is_watched(engine->poller, engine->bell, EPOLLIN, LM_BELL))
        return false;
    for (i = 0; i < LM_UFFD_COUNT; i++)
        if (engine->uffds[i].fd >= 0 && !lm_uffd_is_one(engine->uffds[i].fd))
            return false;
    return true;
}

static void close_descriptors(void)
{
    bool ours = !engine->lost && has_its_descriptors();
    int i;

    for (i = 0; i < LM_UFFD_COUNT; i++) {
        if (ours)
            lm_sys_close(engine->uffds[i].fd);
        engine->uffds[i].fd = -1;
        engine->uffds[i].kept = false;
    }
    if (ours) {
        lm_sys_close(engine->bell);
        lm_sys_close(engine->poller);
    }
    engine->bell = engine->poller = -1;
}

/* ---- keepers ----
 *
 * When the last descriptor of a userfaultfd is closed, missing pages read as zeros. A daemon that closes
 * "all" descriptors would do just that. So each userfaultfd has a thread that keeps it in a table of
 * descriptors of its own, which nothing else can reach. If the engine finds its descriptors gone, the
 * keeper makes the memory inaccessible and wakes whoever waits: SIGSEGV after a line, never zeros.
 */

/* The line comes first: a thread that waits for this memory ends the process as soon as it is let go. */
static void lose_region(struct lm_region *region, int fd, const char *when, int code)
{
    lm_report_lost_region(region, when, code);
    atomic_store(&region->lost, true);
    lm_places_lose_locked(region, fd);
}

static void lose_regions_locked(int index, int fd)
{
    size_t i;

    for (i = 0; i < engine->region_count; i++) {
        struct lm_region *region = engine->regions[i];

        if (region->pages != &lm_pages_uffd || region->uffd != index)
            continue;
        lose_region(region, fd, "its descriptors were closed by the application", -EBADF);
    }
}

/* Nobody else reads any more: whoever unmapped registered memory just before it was lost still waits. */
static void discard_messages_locked(int fd)
{
    struct lm_uffd_message messages[LM_MESSAGES];
    struct timespec deadline;

    while (!engine->stopping) {
        while (lm_uffd_read(fd, messages, LM_MESSAGES) > 0)
            ;
        lm_sys_deadline(LM_DISCARD_MS, &deadline);
        (void)pthread_cond_timedwait(&engine->end, &engine->lock, &deadline);
    }
}

static void *keep(void *argument)
{
    struct lm_uffd *uffd = argument;
    int fd = uffd->fd;

    /* Where this is forbidden the thread is of no use, and does no harm. */
    (void)lm_sys_isolate_descriptor(fd);
    pthread_mutex_lock(&engine->lock);
    uffd->holds = true;
    pthread_cond_broadcast(&engine->progress);
    while (!engine->stopping && !engine->lost)
        pthread_cond_wait(&engine->end, &engine->lock);
    if (engine->lost) {
        lose_regions_locked((int)(uffd - engine->uffds), fd);
        discard_messages_locked(fd);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

int lm_engine_wait_locked(const sigset_t *before, const struct timespec *deadline)
{
    struct timespec soon;
    bool last;
    int late;

    lm_sys_deadline(LM_SIGNALS_MS, &soon);
    last = deadline != NULL && (deadline->tv_sec < soon.tv_sec ||
                                (deadline->tv_sec == soon.tv_sec && deadline->tv_nsec <= soon.tv_nsec));
    late = pthread_cond_timedwait(&engine->progress, &engine->lock, last ? deadline : &soon);
    if (late != 0 && !last) {
        pthread_mutex_unlock(&engine->lock);
        lm_sys_signals_restore(before);
        (void)lm_sys_signals_block();
        pthread_mutex_lock(&engine->lock);
        return 0;
    }
    return late;
}

void lm_engine_note_lost(void)
{
    pthread_mutex_lock(&engine->lock);
    engine->lost = true;
    pthread_cond_broadcast(&engine->end);
    pthread_mutex_unlock(&engine->lock);
}

static int start_threads(struct lm_worker *workers, int count, void *(*body)(void *))
{
    int i, started = 0, error = 0;

    for (i = 0; i < count; i++) {
        struct lm_worker *worker = &workers[i];

        if (!worker->running) {
            error = worker->decoder == NULL ? lm_worker_init(worker) : 0;
            if (error == 0)
                error = lm_sys_thread_start(&worker->thread, body, worker);
            if (error < 0)
                break;
            worker->running = true;
        }
        started++;
    }
    return started > 0 ? 0 : error; /* one thread does the work of many, only later */
}

int lm_engine_threads_locked(void)
{
    int error = 0;

    if (engine->poller >= 0)
        error = start_threads(engine->resolvers, engine->resolver_count, resolve);
    if (error == 0 && engine->traps)
        error = start_threads(engine->catchers, engine->resolver_count, catch_traps);
    if (error == 0)
        error = start_threads(engine->helpers, engine->helper_count, help);
    if (error == 0 && engine->composer_count > 0)
        error = start_threads(engine->composers, engine->composer_count, compose);
    if (error == 0) {
        pthread_mutex_lock(&engine->lock);
        engine->has_helpers = true;
        pthread_mutex_unlock(&engine->lock);
    }
    return error;
}

int lm_engine_composers_locked(void)
{
    engine->composer_count = LM_COMPOSERS;
    return lm_engine_threads_locked();
}

static void stop_threads(struct lm_worker *workers, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        if (workers[i].running)
            pthread_join(workers[i].thread, NULL);
        if (workers[i].decoder != NULL)
            lm_worker_destroy(&workers[i]);
    }
}

static void stop(void)
{
    int i;

    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->work);
    pthread_cond_broadcast(&engine->end);
    pthread_mutex_unlock(&engine->lock);
    if (engine->bell >= 0 && !engine->lost)
        lm_sys_ring(engine->bell, LM_MAX_RESOLVERS);
    if (engine->traps)
        lm_trap_ring(LM_MAX_RESOLVERS);
    for (i = 0; i < LM_UFFD_COUNT; i++)
        if (engine->uffds[i].kept)
            pthread_join(engine->uffds[i].keeper, NULL);
    stop_threads(engine->resolvers, LM_MAX_RESOLVERS);
    stop_threads(engine->catchers, LM_MAX_RESOLVERS);
    stop_threads(engine->helpers, LM_MAX_HELPERS);
    stop_threads(engine->composers, LM_COMPOSERS);
    engine->composer_count = 0;
    engine->has_helpers = false;
    close_descriptors();
    if (engine->traps) {
        lm_trap_serve(false);
        lm_trap_uninstall();
    }
    engine->traps = false;
    lm_sys_free(engine->regions, engine->region_capacity * sizeof *engine->regions);
    engine->regions = NULL;
    engine->region_capacity = 0;
}

static int clamp(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

int lm_engine_acquire_locked(int threads)
{
    int cpus, error;

    if (unprepared != 0)
        return unprepared;
    if (engine->users > 0) {
        error = lm_engine_threads_locked();
        engine->users += error == 0;
        return error;
    }
    cpus = lm_sys_cpu_count();
    engine->resolver_count = threads > 0 ? clamp(threads, 1, LM_MAX_RESOLVERS) : clamp(cpus, 2, 8);
    engine->helper_count = threads > 0 ? clamp(threads, 1, LM_MAX_HELPERS) : clamp(cpus, 1, 8);
    pthread_mutex_lock(&engine->lock); /* the courier outlives the engine, and looks at its queues */
    engine->stopping = engine->lost = false;
    engine->scattered = false;
    lm_places_reset();
    lm_queue_clear(&engine->queue);
    lm_queue_clear(&engine->remote);
    lm_queue_clear(&engine->arrived);
    lm_queue_clear(&engine->early);
    lm_queue_clear(&engine->composing);
    pthread_mutex_unlock(&engine->lock);
    error = lm_engine_threads_locked();
    if (error < 0) {
        stop();
        return error;
    }
    engine->users = 1;
    return 0;
}

void lm_engine_release_locked(void)
{
    if (--engine->users == 0)
        stop();
}

static int open_way(struct lm_uffd *uffd, int way)
{
    static unsigned probed[LM_WAY_COUNT]; /* LM_CAN_*, once a process; 0: not yet */
    uint64_t features;
    int fd, error;

    if (probed[way] == 0) {
        lm_way_report report;

        error = lm_probe_way(way, &report);
        if (error < 0)
            return error;
        if (report.error != 0)
            return -report.error;
        if ((~report.can & (LM_CAN_COPY | LM_CAN_ZEROPAGE | LM_CAN_WAKE)) != 0)
            return LM_E_FEATURE; /* or memory was short: the next region asks again */
        probed[way] = report.can;
    }
    error = lm_uffd_open(way, &fd, &features);
    if (error < 0)
        return error;
    uffd->fd = fd;
    uffd->can = probed[way];
    return 0;
}

/* Open it in one way, have it watched and kept. */
static int open_uffd_by(int index, int way)
{
    struct lm_uffd *uffd = &engine->uffds[index];
    int error = open_way(uffd, way);

    if (error < 0)
        return error;
    error = lm_sys_watch(engine->poller, uffd->fd, EPOLLIN | EPOLLET, (uint32_t)index);
    uffd->holds = false;
    if (error == 0)
        error = lm_sys_thread_start(&uffd->keeper, keep, uffd);
    if (error < 0) {
        lm_sys_close(uffd->fd);
        uffd->fd = -1;
    }
    uffd->kept = error == 0;
    /* Not a moment without it: the application may close everything as soon as it is told of the memory. */
    pthread_mutex_lock(&engine->lock);
    while (uffd->kept && !uffd->holds)
        pthread_cond_wait(&engine->progress, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

static int open_uffd(int index)
{
    int error;

    if (index == LM_UFFD_USER)
        return open_uffd_by(index, LM_WAY_USER_ONLY);
    error = open_uffd_by(index, LM_WAY_DEVICE);
    return error < 0 ? open_uffd_by(index, LM_WAY_SYSCALL) : error;
}

static bool has_uffds(void)
{
    int i;

    for (i = 0; i < LM_UFFD_COUNT; i++)
        if (engine->uffds[i].fd >= 0)
            return true;
    return false;
}

int lm_engine_uffd_locked(int backend, int *ret_index)
{
    int index = backend == LM_BACKEND_UFFD_USER ? LM_UFFD_USER : LM_UFFD_FULL;
    int error = open_poller();

    if (error == 0 && engine->uffds[index].fd < 0)
        error = open_uffd(index);
    if (!has_uffds()) /* nothing to wait for: whoever goes on without needs no resolver */
        close_descriptors();
    if (error == 0)
        error = lm_engine_threads_locked();
    if (error == 0)
        *ret_index = index;
    return error;
}

int lm_engine_traps_locked(void)
{
    int error = engine->traps ? 0 : lm_probe_sigsegv();

    if (error == 0)
        error = lm_trap_install();
    if (error < 0)
        return error;
    engine->traps = true;
    error = lm_engine_threads_locked();
    lm_trap_serve(error == 0);
    return error;
}

int lm_engine_thread_count(void)
{
    LM_HOLD_SIGNALS;
    int i, count = 0;

    pthread_mutex_lock(&engine->lifecycle);
    for (i = 0; i < LM_MAX_RESOLVERS; i++)
        count += engine->resolvers[i].running + engine->catchers[i].running;
    for (i = 0; i < LM_MAX_HELPERS; i++)
        count += engine->helpers[i].running;
    for (i = 0; i < LM_COMPOSERS; i++)
        count += engine->composers[i].running;
    for (i = 0; i < LM_UFFD_COUNT; i++)
        count += engine->uffds[i].kept;
    pthread_mutex_unlock(&engine->lifecycle);
    return count;
}

/* ---- fork ----
 *
 * Without EVENT_FORK, which ordinary users may not have, a child gets plain memory: pages that are
 * present stay, missing ones read as zeros. So the child opens userfaultfds of its own and registers the
 * same ranges before any other code of it runs.
 *
 * Before the fork only `lifecycle` is taken. Faults must be served until the very moment of it: handlers
 * of other libraries run after ours and may wait for threads that touch lazy memory (OpenBLAS joins its
 * workers there). So a child may find `lock` held and the queue half changed by threads that it does not
 * have; it makes both anew. What it must find whole is stable under `lifecycle`: which regions there are,
 * and the descriptors. A chunk that was loading is absent again. If some of its pages had been installed
 * they stay: installing steps over them. No page can be missing whose chunk's state says that it is
 * present: the state is published after the install, and no install ends between the copy of the
 * region's pages and the copy of its states, because fork holds the address space for both. (And should
 * one be missing all the same: it faults, and is rechecked.)
 *
 * What the application unmapped or moved is recorded when its munmap or mremap returns, but for the moment
 * between reading an event and recording it, which before_fork waits out. Events that are sent later are of
 * other threads, which do not exist in the child and have told nobody of their new addresses.
 */

static sigset_t signals_before_fork; /* under lifecycle */

static void before_fork(void)
{
    sigset_t before = lm_sys_signals_block(); /* a handler in the child might touch what is not registered yet */
    bool unsettled;

    pthread_mutex_lock(&engine->lifecycle);
    if (!engine->lost && !has_its_descriptors()) /* the child would close what is the application's by now */
        lm_engine_note_lost();
    /* Whoever is in the middle of recording an event is done then: its sender may be the one that forks. */
    pthread_mutex_lock(&engine->lock);
    unsettled = lm_places_unsettled_locked();
    pthread_mutex_unlock(&engine->lock);
    if (unsettled && !engine->lost) {
        lm_engine_lock_settled(LM_FORK_ROUNDS);
        lm_engine_unlock_settled();
    }
    lm_trap_before_fork();
    signals_before_fork = before;
}

static void after_fork_in_parent(void)
{
    sigset_t before = signals_before_fork;
    size_t i;

    for (i = 0; i < engine->region_count; i++)
        engine->regions[i]->stage_shared = true;
    pthread_mutex_unlock(&engine->lifecycle);
    lm_sys_signals_restore(&before);
}

/* Threads are gone, and what they were writing to may be half written: a leak is the price. */
static void forget_workers(struct lm_worker *workers, int count)
{
    memset(workers, 0, (size_t)count * sizeof *workers);
}

static void revive_region(struct lm_region *region, const int *errors, int error)
{
    region->tasks = region->calls = region->touching = 0; /* not its errors: what failed heals here, too */
    region->closing = region->leaving = false; /* whoever was closing it is not here */
    memset(region->ahead, 0, sizeof region->ahead);
    if (region->pages == &lm_pages_uffd && engine->lost) {
        error = -EBADF; /* and the parent's keepers may not have come to it before the fork */
        if (atomic_load(&region->lost))
            return;
    } else {
        error = region->pages->revive(region, region->pages == &lm_pages_uffd ? errors[region->uffd] : error);
    }
    if (error < 0) {
        pthread_mutex_lock(&engine->lock);
        lose_region(region, -1, "after fork, in the child", error);
        pthread_mutex_unlock(&engine->lock);
    }
}

/* Regions that children do not get are closed here, and need no threads. */
static void leave_dropped_behind(void)
{
    size_t i, kept = 0;

    for (i = 0; i < engine->region_count; i++) {
        struct lm_region *region = engine->regions[i];

        if (region->dropped) {
            lm_region_leave_behind(region);
            engine->users--;
        } else {
            engine->regions[kept++] = region;
        }
    }
    engine->region_count = kept;
}

static void revive(void)
{
    int errors[LM_UFFD_COUNT] = { 0 };
    bool used[LM_UFFD_COUNT];
    bool ran = engine->users > 0, polls = false, remote = false, composers = engine->composer_count > 0;
    int index, error;
    size_t i;

    init_sync();
    leave_dropped_behind();
    for (i = 0; i < engine->region_count; i++)
        remote = remote || engine->regions[i]->remote;
    lm_queue_clear(&engine->remote);
    lm_queue_clear(&engine->arrived);
    lm_queue_clear(&engine->early);
    lm_queue_clear(&engine->composing);
    engine->composing_ahead = 0;
    error = lm_fetch_after_fork(remote);
    if (!ran)
        return;
    lm_queue_clear(&engine->queue);
    forget_workers(engine->resolvers, LM_MAX_RESOLVERS);
    forget_workers(engine->catchers, LM_MAX_RESOLVERS);
    forget_workers(engine->helpers, LM_MAX_HELPERS);
    forget_workers(engine->composers, LM_COMPOSERS);
    engine->has_helpers = false;
    for (index = 0; index < LM_UFFD_COUNT; index++) {
        used[index] = engine->uffds[index].fd >= 0;
        polls = polls || used[index];
    }
    close_descriptors(); /* this process's copies only; the parent's go on */
    if (engine->traps)
        lm_trap_after_fork();
    if (engine->users == 0) {
        stop(); /* of what runs nothing is left; what it held goes */
        return;
    }
    if (error == 0 && polls)
        error = open_poller();
    /* One thread will do until the child asks for more (lm_region_prefetch, another open). */
    if (error == 0 && polls)
        error = start_threads(engine->resolvers, 1, resolve);
    if (error == 0 && engine->traps) {
        error = start_threads(engine->catchers, 1, catch_traps);
        lm_trap_serve(error == 0);
    }
    if (error == 0 && remote) { /* what the courier brings is for helpers */
        error = start_threads(engine->helpers, 1, help);
        engine->has_helpers = error == 0;
    }
    if (error == 0 && composers)
        error = start_threads(engine->composers, 1, compose);
    for (index = 0; index < LM_UFFD_COUNT; index++) {
        errors[index] = error;
        if (error == 0 && used[index])
            errors[index] = open_uffd(index);
        /* The parent's privileges may be gone; faults of user mode are anybody's. */
        if (errors[index] < 0 && error == 0)
            errors[index] = open_uffd_by(index, LM_WAY_USER_ONLY);
    }
    for (i = 0; i < engine->region_count; i++)
        revive_region(engine->regions[i], errors, error);
}

static void after_fork_in_child(void)
{
    revive();
    lm_sys_signals_restore(&signals_before_fork);
}

/* When the library is loaded: a fork that has begun to run handlers must not meet a lock whose handlers
 * are not installed yet. */
__attribute__((constructor)) static void prepare(void)
{
    int i;

    engine->poller = engine->bell = -1;
    for (i = 0; i < LM_UFFD_COUNT; i++)
        engine->uffds[i].fd = -1;
    lm_fetch_prepare();
    init_sync();
    unprepared = -pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}
