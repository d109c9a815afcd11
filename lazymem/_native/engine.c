/* SPDX-License-Identifier: Apache-2.0
 *
 * engine.c: the threads. Reads fault messages, hands chunks to workers, starts, stops, and survives
 * fork. Never calls Python, never touches a region's memory, never waits for I/O with a lock held.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sys.h"
#include "uffd.h"

#define LM_MESSAGES 16
#define LM_BELL LM_UFFD_COUNT /* epoll tag; smaller ones are indices of uffds */
/* Chunks looked at for one prefetch task before the lock is let go. */
#define LM_PREFETCH_SCAN 4096

struct lm_engine lm_engine = {
    .lifecycle = PTHREAD_MUTEX_INITIALIZER,
    .poller = -1,
    .bell = -1,
    .uffds = { { .fd = -1 }, { .fd = -1 } },
};

static struct lm_engine *const engine = &lm_engine;

/* ---- regions by address ---- */

/* Index of the first region whose base lies above address. */
static size_t upper_bound(uintptr_t address)
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

static struct lm_region *find_locked(uintptr_t address)
{
    size_t above = upper_bound(address);
    struct lm_region *region = above == 0 ? NULL : engine->regions[above - 1];

    return region != NULL && address - (uintptr_t)region->base < region->size ? region : NULL;
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

int lm_engine_insert(struct lm_region *region)
{
    int error = 0;

    pthread_mutex_lock(&engine->lock);
    if (engine->region_count == engine->region_capacity)
        error = grow_index_locked();
    if (error == 0) {
        size_t at = upper_bound((uintptr_t)region->base);

        memmove(&engine->regions[at + 1], &engine->regions[at],
                (engine->region_count - at) * sizeof *engine->regions);
        engine->regions[at] = region;
        engine->region_count++;
    }
    pthread_mutex_unlock(&engine->lock);
    return error;
}

void lm_engine_remove(struct lm_region *region)
{
    size_t at;

    pthread_mutex_lock(&engine->lock);
    at = upper_bound((uintptr_t)region->base) - 1;
    engine->region_count--;
    memmove(&engine->regions[at], &engine->regions[at + 1],
            (engine->region_count - at) * sizeof *engine->regions);
    pthread_mutex_unlock(&engine->lock);
}

uint64_t lm_engine_region_count(void)
{
    uint64_t count;

    pthread_mutex_lock(&engine->lifecycle);
    count = engine->users;
    pthread_mutex_unlock(&engine->lifecycle);
    return count;
}

/* ---- fault -> chunk ---- */

static void ring(unsigned times)
{
    uint64_t value = times;

    while (write(engine->bell, &value, sizeof value) < 0 && errno == EINTR)
        ;
}

/* A thread that reads one page after the next gets the following chunks beforehand: at most as many as
 * it has already gone through, never past the end of the array that it reads. */
static void run_ahead_locked(struct lm_region *region, uint64_t chunk)
{
    uint64_t last = region->ahead.last, end, start, limit;

    if (region->readahead == 0 || chunk == last || !engine->has_helpers)
        return;
    region->ahead.last = chunk;
    if (chunk != last + 1 && !(chunk > last && chunk <= region->ahead.end)) {
        region->ahead.streak = 0;
        region->ahead.window = 0;
        region->ahead.end = chunk + 1;
        return;
    }
    if (++region->ahead.streak < 2)
        return;
    start = region->ahead.end > chunk + 1 ? region->ahead.end : chunk + 1;
    if (start > chunk + 1 + region->ahead.window / 2)
        return; /* enough is under way */
    region->ahead.window = region->ahead.window == 0 ? 1 : 2 * region->ahead.window;
    if (region->ahead.window > region->readahead)
        region->ahead.window = region->readahead;
    limit = lm_region_array_end(region, chunk);
    end = chunk + 1 + region->ahead.window;
    if (end > limit)
        end = limit;
    if (start < end) {
        struct lm_span span = { .region = region, .next = start, .end = end };

        if (lm_queue_push_span(&engine->queue, &span)) {
            region->ahead.end = end;
            pthread_cond_broadcast(&engine->work);
        }
    }
}

/* True if *ret_task is new work. */
static bool accept_fault_locked(uintptr_t address, uint64_t now, struct lm_task *ret_task)
{
    struct lm_region *region = find_locked(address);
    struct lm_task task = { .region = region, .address = address, .start_ns = now };

    if (region == NULL)
        return false; /* closed meanwhile: munmap has woken whoever waited */
    task.chunk = (address - (uintptr_t)region->base) >> region->table.chunk_shift;
    atomic_fetch_add_explicit(&region->counters.faults, 1, memory_order_relaxed);
    for (;;) {
        if (lm_table_claim(&region->table, task.chunk, true)) {
            task.kind = LM_TASK_DEMAND;
            run_ahead_locked(region, task.chunk);
            break;
        }
        if (lm_table_want(&region->table, task.chunk)) {
            run_ahead_locked(region, task.chunk);
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

/* No room (65,536 threads wait on as many chunks): let the thread fault again a little later. */
static void turn_away_locked(const struct lm_task *task, int fd)
{
    if (task->kind == LM_TASK_DEMAND)
        lm_table_publish(&task->region->table, task->chunk, LM_STATE_ABSENT);
    task->region->tasks--;
    (void)lm_uffd_wake(fd, (uintptr_t)task->region->base +
                               (task->chunk << task->region->table.chunk_shift),
                       (size_t)1 << task->region->table.chunk_shift);
}

/* Read what the kernel has and queue it. */
static void intake(int fd)
{
    struct lm_uffd_message messages[LM_MESSAGES];
    unsigned queued = 0;
    int count, i;

    do {
        uint64_t now;

        count = lm_uffd_read(fd, messages, LM_MESSAGES);
        now = lm_sys_now_ns();
        pthread_rwlock_rdlock(&engine->gate);
        pthread_mutex_lock(&engine->lock);
        for (i = 0; i < count; i++) {
            struct lm_task task;

            if (messages[i].event != LM_UFFD_EVENT_PAGEFAULT ||
                !accept_fault_locked((uintptr_t)messages[i].address, now, &task))
                continue;
            if (lm_queue_push_task(&engine->queue, &task))
                queued++;
            else
                turn_away_locked(&task, fd);
        }
        pthread_mutex_unlock(&engine->lock);
        pthread_rwlock_unlock(&engine->gate);
    } while (count == LM_MESSAGES); /* the poller reports an edge: leave nothing behind */
    if (queued > 1)
        ring(queued - 1);
}

/* ---- workers ---- */

/* Taking a task marks the worker busy with it, so that the child of a fork knows which chunks nobody
 * is loading any more. */
static bool take_demand_locked(struct lm_worker *worker)
{
    worker->busy = lm_queue_pop_task(&engine->queue, &worker->current);
    return worker->busy;
}

static bool take_prefetch_locked(struct lm_worker *worker)
{
    struct lm_span *span;
    unsigned looked = 0;

    while ((span = lm_queue_first_span(&engine->queue)) != NULL && looked < LM_PREFETCH_SCAN) {
        struct lm_region *region = span->region;
        uint64_t chunk = span->next;
        const lm_run *run_of = lm_table_run(&region->table, chunk);

        looked++;
        if (run_of->first_record == LM_ZERO_RUN) {
            span->next = run_of->first_chunk + run_of->count; /* zeros need no fetching */
        } else {
            span->next++;
            if (lm_table_claim(&region->table, chunk, false)) {
                worker->current = (struct lm_task){ .region = region, .chunk = chunk,
                                                    .kind = LM_TASK_PREFETCH };
                worker->busy = true;
                region->tasks++;
            }
        }
        if (span->next >= span->end)
            lm_queue_pop_span(&engine->queue);
        if (worker->busy)
            return true;
    }
    return false;
}

static void finish(struct lm_worker *worker, struct lm_region *region)
{
    pthread_rwlock_rdlock(&engine->gate);
    pthread_mutex_lock(&engine->lock);
    worker->busy = false;
    region->tasks--;
    pthread_cond_broadcast(&engine->progress);
    pthread_mutex_unlock(&engine->lock);
    pthread_rwlock_unlock(&engine->gate);
}

static void run(struct lm_worker *worker, const struct lm_task *task)
{
    struct lm_region *region = task->region;

    (void)lm_populate(worker, task);
    finish(worker, region);
}

static bool take(struct lm_worker *worker, bool helper)
{
    bool taken;

    pthread_rwlock_rdlock(&engine->gate);
    pthread_mutex_lock(&engine->lock);
    taken = take_demand_locked(worker) || (helper && take_prefetch_locked(worker));
    pthread_mutex_unlock(&engine->lock);
    pthread_rwlock_unlock(&engine->gate);
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

static void *resolve(void *argument)
{
    struct lm_worker *worker = argument;
    struct epoll_event event;
    uint64_t one;

    for (;;) {
        while (take(worker, false)) {
            struct lm_task task = worker->current;

            run(worker, &task);
        }
        if (is_stopping())
            return NULL;
        if (epoll_wait(engine->poller, &event, 1, -1) < 1)
            continue;
        if (event.data.u32 == LM_BELL)
            (void)!read(engine->bell, &one, sizeof one); /* somebody else may have taken it */
        else
            intake(engine->uffds[event.data.u32].fd);
    }
}

static void *help(void *argument)
{
    struct lm_worker *worker = argument;

    for (;;) {
        bool stopping;

        while (take(worker, true)) {
            struct lm_task task = worker->current;

            run(worker, &task);
        }
        pthread_mutex_lock(&engine->lock);
        while (!engine->stopping && lm_queue_first_span(&engine->queue) == NULL)
            pthread_cond_wait(&engine->work, &engine->lock);
        stopping = engine->stopping;
        pthread_mutex_unlock(&engine->lock);
        if (stopping)
            return NULL;
    }
}

/* ---- start and stop ---- */

static void init_sync(void)
{
    pthread_rwlockattr_t gate;
    pthread_condattr_t clock;

    pthread_rwlockattr_init(&gate);
    /* Workers come and go through the gate all the time; without this a fork might wait for ever. */
    pthread_rwlockattr_setkind_np(&gate, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&engine->gate, &gate);
    pthread_rwlockattr_destroy(&gate);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, &clock);
    pthread_cond_init(&engine->progress, &clock);
    pthread_condattr_destroy(&clock);
}

static int watch(int fd, uint32_t events, uint32_t tag)
{
    struct epoll_event event = { .events = events, .data.u32 = tag };

    return epoll_ctl(engine->poller, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int open_poller(void)
{
    engine->poller = epoll_create1(EPOLL_CLOEXEC);
    if (engine->poller < 0)
        return -errno;
    engine->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    if (engine->bell < 0)
        return -errno;
    return watch(engine->bell, EPOLLIN, LM_BELL);
}

static void close_descriptors(void)
{
    int i;

    for (i = 0; i < LM_UFFD_COUNT; i++) {
        lm_sys_close(engine->uffds[i].fd);
        engine->uffds[i].fd = -1;
    }
    lm_sys_close(engine->bell);
    lm_sys_close(engine->poller);
    engine->bell = engine->poller = -1;
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
    int error = start_threads(engine->resolvers, engine->resolver_count, resolve);

    if (error == 0)
        error = start_threads(engine->helpers, engine->helper_count, help);
    if (error == 0) {
        pthread_mutex_lock(&engine->lock);
        engine->has_helpers = true;
        pthread_mutex_unlock(&engine->lock);
    }
    return error;
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
    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    if (engine->bell >= 0)
        ring(LM_MAX_RESOLVERS);
    stop_threads(engine->resolvers, LM_MAX_RESOLVERS);
    stop_threads(engine->helpers, LM_MAX_HELPERS);
    engine->has_helpers = false;
    close_descriptors();
    lm_sys_free(engine->regions, engine->region_capacity * sizeof *engine->regions);
    engine->regions = NULL;
    engine->region_capacity = 0;
}

static int clamp(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

static void install_fork_handlers(void);

int lm_engine_acquire_locked(int threads)
{
    static bool prepared; /* once a process: handlers of pthread_atfork cannot be taken back */
    int cpus, error;

    if (engine->users > 0) {
        error = lm_engine_threads_locked();
        engine->users += error == 0;
        return error;
    }
    if (!prepared) {
        init_sync();
        install_fork_handlers();
        prepared = true;
    }
    cpus = lm_sys_cpu_count();
    engine->resolver_count = threads > 0 ? clamp(threads, 1, LM_MAX_RESOLVERS) : clamp(cpus, 2, 8);
    engine->helper_count = threads > 0 ? clamp(threads, 1, LM_MAX_HELPERS) : clamp(cpus, 1, 8);
    engine->stopping = false;
    lm_queue_clear(&engine->queue);
    error = open_poller();
    if (error == 0)
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
        probed[way] = report.can;
    }
    if ((~probed[way] & (LM_CAN_COPY | LM_CAN_ZEROPAGE | LM_CAN_WAKE)) != 0)
        return LM_E_FEATURE;
    error = lm_uffd_open(way, &fd, &features);
    if (error < 0)
        return error;
    uffd->fd = fd;
    uffd->way = way;
    uffd->can = probed[way];
    return 0;
}

static int open_uffd(int index)
{
    struct lm_uffd *uffd = &engine->uffds[index];
    int error;

    if (index == LM_UFFD_USER) {
        error = open_way(uffd, LM_WAY_USER_ONLY);
    } else {
        error = open_way(uffd, LM_WAY_DEVICE);
        if (error < 0)
            error = open_way(uffd, LM_WAY_SYSCALL);
    }
    if (error == 0) {
        error = watch(uffd->fd, EPOLLIN | EPOLLET, (uint32_t)index);
        if (error < 0) {
            lm_sys_close(uffd->fd);
            uffd->fd = -1;
        }
    }
    return error;
}

int lm_engine_uffd_locked(int backend, int *ret_index)
{
    int index = backend == LM_BACKEND_UFFD_USER ? LM_UFFD_USER : LM_UFFD_FULL;
    int error = engine->uffds[index].fd >= 0 ? 0 : open_uffd(index);

    if (error == 0)
        *ret_index = index;
    return error;
}

int lm_engine_thread_count(void)
{
    int i, count = 0;

    pthread_mutex_lock(&engine->lifecycle);
    for (i = 0; i < LM_MAX_RESOLVERS; i++)
        count += engine->resolvers[i].running;
    for (i = 0; i < LM_MAX_HELPERS; i++)
        count += engine->helpers[i].running;
    pthread_mutex_unlock(&engine->lifecycle);
    return count;
}

/* ---- fork ----
 *
 * Without EVENT_FORK, which ordinary users may not have, a child gets plain memory: pages that are
 * present stay, missing ones read as zeros. So the child opens userfaultfds of its own and registers
 * the same ranges before any other code of it runs. The parent's threads do not exist in it; chunks
 * that they were loading are absent again. The gate makes sure that no chunk is half installed, and no
 * lock is held by a thread that the child does not have, at the moment of the fork.
 */

static void before_fork(void)
{
    pthread_mutex_lock(&engine->lifecycle);
    pthread_rwlock_wrlock(&engine->gate);
    pthread_mutex_lock(&engine->lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&engine->lock);
    pthread_rwlock_unlock(&engine->gate);
    pthread_mutex_unlock(&engine->lifecycle);
}

static void give_back_claim(const struct lm_task *task)
{
    struct lm_table *table = &task->region->table;

    if ((lm_table_state(table, task->chunk) & LM_TABLE_STATE) == LM_STATE_LOADING)
        lm_table_publish(table, task->chunk, LM_STATE_ABSENT);
}

static void forget_workers(struct lm_worker *workers, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        if (workers[i].busy)
            give_back_claim(&workers[i].current);
        workers[i].busy = false;
        workers[i].running = false;
    }
}

static int register_again(struct lm_region *region)
{
    uint64_t i, ioctls;
    int error = 0;

    for (i = 0; i < region->registered_count && error == 0; i++)
        error = lm_uffd_register(engine->uffds[region->uffd].fd,
                                 (uintptr_t)region->base + region->registered[i].start,
                                 region->registered[i].length, &ioctls);
    return error;
}

static void lose_region(struct lm_region *region, int code)
{
    uint64_t i;

    for (i = 0; i < region->registered_count; i++)
        (void)lm_sys_protect(region->base + region->registered[i].start,
                             region->registered[i].length, PROT_NONE);
    lm_report_lost_region(region, code);
}

static void after_fork_in_child(void)
{
    bool used[LM_UFFD_COUNT];
    struct lm_task task;
    size_t i;
    int index, error = 0;

    pthread_mutex_init(&engine->lifecycle, NULL);
    init_sync();
    if (engine->users == 0)
        return;
    while (lm_queue_pop_task(&engine->queue, &task))
        give_back_claim(&task);
    lm_queue_clear(&engine->queue);
    forget_workers(engine->resolvers, LM_MAX_RESOLVERS);
    forget_workers(engine->helpers, LM_MAX_HELPERS);
    engine->has_helpers = false;

    for (index = 0; index < LM_UFFD_COUNT; index++)
        used[index] = engine->uffds[index].fd >= 0;
    close_descriptors(); /* this process's copies only; the parent's go on */
    error = open_poller();
    for (index = 0; index < LM_UFFD_COUNT && error == 0; index++)
        if (used[index])
            error = open_uffd(index);
    /* One thread will do until the child asks for more (lm_region_prefetch, another open). */
    if (error == 0)
        error = start_threads(engine->resolvers, 1, resolve);
    for (i = 0; i < engine->region_count; i++) {
        struct lm_region *region = engine->regions[i];
        int failed = error;

        region->tasks = 0;
        if (region->backend == LM_BACKEND_EAGER)
            continue;
        if (failed == 0)
            failed = register_again(region);
        if (failed < 0)
            lose_region(region, failed);
    }
}

static void install_fork_handlers(void)
{
    (void)pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}
