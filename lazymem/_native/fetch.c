/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fetch.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arena.h"
#include "source.h"
#include "spawn.h"
#include "sys.h"

#define LM_BATCH 64 /* demanded chunks looked at together */
/* What is fetched ahead of need leaves the rest of the memory and of the ranges to demand. */
#define LM_AHEAD_BYTES (LM_ARENA_BYTES / 4 * 3)
#define LM_AHEAD_RANGES (LM_RANGES / 2)
#define LM_AHEAD_SHARE 16 /* ranges that what is left of all spans is cut into, where they are not too small */
#define LM_AHEAD_LEAST ((uint64_t)1 << 20)

#define LM_SILENCE_NS  (UINT64_C(5) * 1000000000) /* after this long without a word it is asked for one */
#define LM_PATIENCE_NS (UINT64_C(10) * 1000000000) /* and after this long without an answer, ended */
#define LM_START_NS    (UINT64_C(50) * 1000000000) /* an interpreter on a cold, slow disk takes a while */
#define LM_DEATHS_MAX  10 /* in a row, without coming up: it cannot run here */
#define LM_RANGE_DEATHS_MAX 30 /* with the same range asked for */
#define LM_RESTART_NS  (UINT64_C(10) * 1000000) /* before the first restart; doubles with each death */
#define LM_BLOCKED_MS  2    /* then a full socket is tried again */
#define LM_IDLE_MS     1000 /* then memory that nobody uses goes back */

/* The courier's own; under the engine's lock where the listener needs it, too. */
static struct {
    struct lm_process process;
    int memory_fd;           /* -1: not made */
    uint64_t serial;         /* of the fetcher; never 0 once there was one */
    unsigned deaths;         /* in a row, without an answer between */
    int start_error;         /* why the last start failed; 0: it did not */
    uint64_t start_after_ns;
    uint64_t heard_ns, pinged_ns; /* pinged_ns 0: no ping is out */
    bool hears;              /* there is a listener */
    bool isolated;           /* the descriptors lie in a table of their own */
    bool dirty;              /* pages of the memory have been written since they were given back */
    bool blocked;            /* the socket takes no more for now */
} courier = { .process = { .handle = -1 }, .memory_fd = -1 };

/* Under the engine's lock. */
static struct {
    struct lm_range ranges[LM_RANGES];
    unsigned in_use; /* of them: not free */
    unsigned high;   /* one above the highest that was ever taken: the pages of the others are untouched */
    struct lm_arena arena;
    unsigned char *memory; /* NULL: not mapped yet */
    uint64_t next_id;
    struct lm_command command;
    pid_t pid;        /* of the fetcher; 0: none runs */
    uint64_t started; /* fetchers, in all */
    int socket;       /* -1: no fetcher */
    bool broken;      /* it ended, or talks nonsense: the courier is to see to it */
    bool listening;   /* the listener is at the socket */
    bool running;     /* the two threads */
    bool poked;       /* the courier has something to look at */
    pthread_t courier, listener;
    pthread_cond_t work, ears; /* the courier waits on one, the listener on the other */
} fetch; /* zeros until lm_fetch_prepare: else megabytes of the library's file */

static struct lm_engine *const engine = &lm_engine;

static uint64_t now_ns(void) { return lm_sys_now_ns(); }

void lm_fetch_wake_locked(void)
{
    fetch.poked = true;
    if (fetch.running)
        pthread_cond_signal(&fetch.work);
}

/* ---- ranges ---- */

static struct lm_range *take_range_locked(uint32_t kind, uint32_t source, uint32_t timeout_ms)
{
    unsigned i;

    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        if (range->state != LM_RANGE_FREE)
            continue;
        if (i >= fetch.high)
            fetch.high = i + 1;
        /* Not the texts and tasks: large, and written before they are read. */
        memset(range, 0, offsetof(struct lm_range, tasks));
        range->code = 0;
        range->text_length = range->requests = 0;
        range->answer_length = range->received = 0;
        range->state = LM_RANGE_WAITING;
        range->kind = kind;
        range->source = source;
        range->timeout_ms = timeout_ms;
        range->deadline_ns = now_ns() + (uint64_t)timeout_ms * 1000000u;
        range->id = fetch.next_id++ * LM_RANGES + i;
        fetch.in_use++;
        if (i >= fetch.high)
            fetch.high = i + 1;
        return range;
    }
    return NULL;
}

static void free_range_locked(struct lm_range *range)
{
    if (range->placed)
        lm_arena_give(&fetch.arena, range->place, range->length);
    range->placed = false;
    range->state = LM_RANGE_FREE;
    fetch.in_use--;
    lm_fetch_wake_locked(); /* there is room again */
}

/* Nobody waits for it any longer. What has been asked for is freed when its answer has ended. */
static void abandon_locked(struct lm_range *range)
{
    if (range->state == LM_RANGE_ASKED) {
        range->state = LM_RANGE_CANCELLED;
        range->cancel = true;
        lm_fetch_wake_locked();
    } else if (range->state != LM_RANGE_CANCELLED) {
        free_range_locked(range);
    }
}

static bool place_locked(struct lm_range *range)
{
    if (!range->placed)
        range->placed = lm_arena_take(&fetch.arena, range->length, &range->place);
    return range->placed;
}

static struct lm_range *find_range_locked(uint64_t id)
{
    struct lm_range *range = &fetch.ranges[id % LM_RANGES];

    return range->state != LM_RANGE_FREE && range->id == id ? range : NULL;
}

static void set_text(struct lm_range *range, const char *text, size_t length)
{
    if (length >= sizeof range->text)
        length = sizeof range->text - 1;
    memcpy(range->text, text, length);
    range->text[length] = '\0';
    range->text_length = (uint32_t)length;
}

void lm_fetch_release_locked(struct lm_range *range)
{
    if (--range->left == 0)
        free_range_locked(range);
}

/* ---- chunks -> ranges ---- */

static const lm_chunk_record *record_of(const struct lm_task *task)
{
    return lm_table_record(&task->region->table, task->chunk);
}

static bool record_is_sound(const struct lm_region *region, const lm_chunk_record *record, unsigned chunk_shift)
{
    uint64_t size;

    if (record->source >= region->source_count)
        return false;
    size = region->source_sizes[record->source];
    return record->stored_length <= (UINT64_C(1) << chunk_shift) &&
           record->offset <= size && record->stored_length <= size - record->offset;
}

static bool task_is_sound(const struct lm_task *task)
{
    return record_is_sound(task->region, record_of(task), task->region->table.chunk_shift);
}

/* Hand a chunk to the workers: with its bytes, or with why there are none. The queues have room for every
 * chunk of every range; false only if thousands of impossible records lie there. */
static bool deliver_task_locked(struct lm_task *task)
{
    bool wanted = task->kind == LM_TASK_DEMAND ||
                  (lm_table_state(&task->region->table, task->chunk) & LM_TABLE_WANTED) != 0;

    if (!lm_queue_push_task(wanted ? &engine->arrived : &engine->early, task))
        return false;
    pthread_cond_broadcast(&engine->work);
    return true;
}

/* A record that cannot be right is the worker's to report; nothing is asked for. */
static bool refuse_task_locked(struct lm_task *task)
{
    task->range = NULL;
    task->error = LM_E_RECORD;
    return deliver_task_locked(task);
}

static void sort_by_place(struct lm_task *tasks, unsigned count)
{
    unsigned i, j;

    for (i = 1; i < count; i++) {
        struct lm_task task = tasks[i];
        const lm_chunk_record *record = record_of(&task);

        for (j = i; j > 0; j--) {
            const struct lm_task *before = &tasks[j - 1];

            if (before->region < task.region ||
                (before->region == task.region && record_of(before)->offset <= record->offset))
                break;
            tasks[j] = tasks[j - 1];
        }
        tasks[j] = task;
    }
}

/* Whether `record` may join a range of [start, end) of its source: *ret_end is the new end. */
static bool extends(const struct lm_region *region, const lm_chunk_record *record, uint32_t source,
                    uint64_t start, uint64_t end, uint64_t most, uint64_t *ret_end)
{
    uint64_t new_end = record->offset + record->stored_length;

    if (record->source != source || record->offset < end || record->offset - end > region->coalesce_gap ||
        new_end - start > most)
        return false;
    *ret_end = new_end;
    return true;
}

/* One range of the first tasks, as many as belong together; 0 if there is no room for it. */
static unsigned ask_for_locked(const struct lm_task *tasks, unsigned count, bool demand, uint64_t most)
{
    struct lm_region *region = tasks[0].region;
    const lm_chunk_record *first = record_of(&tasks[0]);
    uint64_t end = first->offset + first->stored_length;
    struct lm_range *range;
    unsigned taken;

    for (taken = 1; taken < count && taken < LM_RANGE_CHUNKS; taken++)
        if (tasks[taken].region != region || (tasks[taken].attempts > 0) != (tasks[0].attempts > 0) ||
            !extends(region, record_of(&tasks[taken]), first->source, first->offset, end, most, &end))
            break;
    range = take_range_locked(LM_ASK_RANGE, region->sources[first->source], region->fetch_timeout_ms);
    if (range == NULL)
        return 0;
    range->offset = first->offset;
    range->length = end - first->offset;
    if (!place_locked(range)) {
        free_range_locked(range);
        return 0;
    }
    range->region = region;
    range->demand = demand;
    range->refetch = tasks[0].attempts > 0;
    range->task_count = range->left = taken;
    memcpy(range->tasks, tasks, taken * sizeof *tasks);
    return taken;
}

static void gather_demand_locked(void)
{
    struct lm_task batch[LM_BATCH], task;
    unsigned count, done;

    for (;;) {
        count = 0;
        while (count < LM_BATCH && lm_queue_pop_task(&engine->remote, &task)) {
            if (task_is_sound(&task)) {
                batch[count++] = task;
            } else if (!refuse_task_locked(&task)) {
                (void)lm_queue_push_task(&engine->remote, &task); /* it has just made room */
                break;
            }
        }
        if (count == 0)
            return;
        sort_by_place(batch, count);
        for (done = 0; done < count;) {
            unsigned taken = ask_for_locked(&batch[done], count - done, true,
                                            batch[done].region->coalesce_size);

            if (taken == 0) { /* no room: later, when something was released */
                while (done < count)
                    (void)lm_queue_push_task(&engine->remote, &batch[done++]);
                return;
            }
            done += taken;
        }
    }
}

/* The chunks that a span's next range is to hold, without claiming any. Moves span->next over what needs
 * no fetching. */
static unsigned look_ahead_locked(struct lm_span *span, uint64_t most, struct lm_task *tasks)
{
    struct lm_region *region = span->region;
    uint64_t chunk = span->next, start = 0, end = 0;
    unsigned count = 0;

    while (chunk < span->end && count < LM_RANGE_CHUNKS) {
        const lm_run *run_of = lm_table_run(&region->table, chunk);
        uint8_t state = lm_table_state(&region->table, chunk);
        const lm_chunk_record *record;

        if (run_of->first_record == LM_ZERO_RUN) {
            chunk = run_of->first_chunk + run_of->count;
            continue;
        }
        record = lm_table_record(&region->table, chunk);
        if (state == LM_STATE_ABSENT || state == LM_STATE_FAILED) {
            bool sound = record_is_sound(region, record, region->table.chunk_shift);

            if (count == 0 && sound) {
                start = record->offset;
                end = start + record->stored_length;
            } else if (count > 0 &&
                       (!sound || !extends(region, record, record_of(&tasks[0])->source, start, end, most, &end))) {
                break;
            }
            tasks[count++] =
                (struct lm_task){ .region = region, .chunk = chunk, .kind = LM_TASK_PREFETCH };
            if (!sound) {
                chunk++;
                break;
            }
        }
        chunk++;
    }
    if (count == 0)
        span->next = chunk;
    return count;
}

/* Bytes of the next range of `span`: fewer towards the end of all that is wanted, so that all connections
 * are busy until then. Not of the span, which may be one small part of a model. */
static uint64_t share_locked(const struct lm_span *span)
{
    const struct lm_queue *queue = &engine->remote;
    uint64_t most = span->region->coalesce_size, left = 0;
    unsigned i;

    for (i = 0; i < queue->span_count && left / LM_AHEAD_SHARE < most; i++) {
        const struct lm_span *other = &queue->spans[(queue->span_head + i) % LM_QUEUE_SPANS];

        left += (other->end - other->next) << other->region->table.chunk_shift;
    }
    left /= LM_AHEAD_SHARE;
    if (left < LM_AHEAD_LEAST)
        left = LM_AHEAD_LEAST;
    return left < most ? left : most;
}

static void gather_ahead_locked(void)
{
    struct lm_task tasks[LM_RANGE_CHUNKS];
    struct lm_span *span;
    unsigned count, taken, i;
    uint64_t most;

    while ((span = lm_queue_first_span(&engine->remote)) != NULL) {
        struct lm_table *table = &span->region->table;

        if (fetch.in_use >= LM_AHEAD_RANGES || lm_arena_used(&fetch.arena) >= LM_AHEAD_BYTES)
            return;
        most = share_locked(span);
        count = look_ahead_locked(span, most, tasks);
        if (count > 0 && !task_is_sound(&tasks[0])) {
            if (!refuse_task_locked(&tasks[0]))
                return;
            (void)lm_table_claim(table, tasks[0].chunk, false);
            span->region->tasks++;
            span->next = tasks[0].chunk + 1;
            count = 0;
        }
        if (count > 0) {
            taken = ask_for_locked(tasks, count, false, most);
            if (taken == 0)
                return;
            for (i = 0; i < taken; i++) /* claims are made under this lock only, so none can fail */
                (void)lm_table_claim(table, tasks[i].chunk, false);
            span->region->tasks += taken;
            span->next = tasks[taken - 1].chunk + 1;
        }
        if (span->next >= span->end)
            lm_queue_pop_span(&engine->remote);
    }
}

/* ---- what others do to ranges ---- */

static struct lm_task *find_task_locked(struct lm_range *range, const struct lm_region *region,
                                        uint64_t chunk)
{
    unsigned i;

    if (range->region != region)
        return NULL;
    for (i = 0; i < range->task_count; i++)
        if (range->tasks[i].chunk == chunk)
            return &range->tasks[i];
    return NULL;
}

void lm_fetch_promote_locked(struct lm_region *region, uint64_t chunk)
{
    unsigned i;

    if (lm_queue_move_task(&engine->early, &engine->arrived, region, chunk))
        return; /* the helpers are awake as long as there is anything */
    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        if ((range->state != LM_RANGE_WAITING && range->state != LM_RANGE_ASKED) || range->demand ||
            (find_task_locked(range, region, chunk) == NULL &&
             (range->stock_region != region || range->stock_chunk != chunk)))
            continue;
        range->demand = true;
        range->promote = range->state == LM_RANGE_ASKED;
        lm_fetch_wake_locked();
        return;
    }
}

void lm_fetch_forget_locked(struct lm_region *region)
{
    struct lm_task task;
    unsigned i, count = engine->remote.task_count, j;

    lm_queue_drop_spans(&engine->remote, region);
    for (i = 0; i < count; i++) {
        (void)lm_queue_pop_task(&engine->remote, &task);
        if (task.region != region) {
            (void)lm_queue_push_task(&engine->remote, &task);
            continue;
        }
        lm_table_publish(&region->table, task.chunk, LM_STATE_ABSENT);
        region->tasks--;
    }
    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        if (range->region != region || (range->state != LM_RANGE_WAITING && range->state != LM_RANGE_ASKED))
            continue;
        for (j = 0; j < range->task_count; j++)
            lm_table_publish(&region->table, range->tasks[j].chunk, LM_STATE_ABSENT);
        region->tasks -= range->task_count;
        range->region = NULL;
        abandon_locked(range);
    }
    lm_fetch_wake_locked();
}

/* ---- answers ---- */

/* Everything that is to be known of a range is in it. */
static void settle_locked(struct lm_range *range)
{
    unsigned i, count = range->task_count;

    if (range->state == LM_RANGE_CANCELLED) {
        free_range_locked(range);
        return;
    }
    range->state = LM_RANGE_READY;
    if (range->region == NULL) {
        pthread_cond_broadcast(&engine->progress); /* a call: its caller takes it from here */
        return;
    }
    atomic_fetch_add(&range->region->counters.reads, range->requests);
    atomic_fetch_add(&range->region->counters.bytes_read, range->received);
    for (i = 0; i < count; i++) {
        struct lm_task task = range->tasks[i];

        task.range = range;
        task.error = range->code;
        task.stored = fetch.memory + range->place + (record_of(&task)->offset - range->offset);
        (void)deliver_task_locked(&task);
    }
}

static void fail_locked(struct lm_range *range, int code, const char *text)
{
    range->code = code;
    set_text(range, text, strlen(text));
    settle_locked(range);
}

/* False: no fetcher of ours says such a thing. */
static bool hear_locked(const char *message, size_t length)
{
    struct lm_range *range;
    lm_answer answer;

    if (length < sizeof answer)
        return false;
    memcpy(&answer, message, sizeof answer);
    if (answer.payload_length != length - sizeof answer ||
        (answer.kind != LM_ANSWER_DONE && answer.kind != LM_ANSWER_FAILED))
        return false;
    courier.deaths = 0; /* it came up */
    courier.heard_ns = now_ns();
    courier.pinged_ns = 0;
    range = find_range_locked(answer.id);
    if (range == NULL || (range->state != LM_RANGE_ASKED && range->state != LM_RANGE_CANCELLED))
        return answer.id == 0; /* a ping's */
    if (answer.kind == LM_ANSWER_DONE &&
        (range->kind == LM_ASK_RANGE ? answer.length != range->length : answer.length > range->length))
        return false;
    range->code = answer.kind == LM_ANSWER_DONE ? 0 : answer.code;
    if (answer.kind == LM_ANSWER_FAILED && range->code >= 0)
        range->code = LM_E_STORE;
    range->answer_length = answer.kind == LM_ANSWER_DONE ? answer.length : 0;
    range->received = answer.received;
    range->requests = answer.requests;
    set_text(range, message + sizeof answer, answer.payload_length);
    settle_locked(range);
    return true;
}

/* ---- the fetcher's life ---- */

static int map_memory(void)
{
    void *memory;
    int fd, error;

    if (fetch.memory != NULL)
        return 0;
    fd = lm_sys_shared_memory(LM_ARENA_BYTES);
    if (fd < 0)
        return fd;
    error = lm_sys_map_shared(fd, LM_ARENA_BYTES, &memory);
    if (error < 0) {
        lm_sys_close(fd);
        return error;
    }
    /* A child of a fork has a fetcher of its own, and must not write to ours. */
    (void)lm_sys_advise(memory, LM_ARENA_BYTES, MADV_DONTFORK);
    courier.memory_fd = fd;
    pthread_mutex_lock(&engine->lock);
    fetch.memory = memory;
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

static bool send_message(const lm_ask *ask, const void *payload, size_t length)
{
    int sent = lm_sys_send(fetch.socket, ask, sizeof *ask, payload, length);

    if (sent < 0)
        courier.blocked = true; /* full; or dead, of which recv tells */
    return sent >= 0;
}

static void *listen_to(void *argument);

static int start_fetcher(void)
{
    lm_ask hello = { .kind = LM_ASK_STATUS };
    int pair[2], error = map_memory();

    if (error == 0 && !courier.hears) { /* by the courier, to be in the same table of descriptors */
        error = lm_sys_thread_start(&fetch.listener, listen_to, NULL);
        courier.hears = error == 0;
    }
    if (error < 0)
        return error;
    if (fetch.command.argv == NULL)
        return -ENOENT;
    error = lm_sys_socket_pair(pair);
    if (error < 0)
        return error;
    error = lm_spawn(&fetch.command, pair[1], courier.memory_fd, &courier.process);
    lm_sys_close(pair[1]);
    if (error < 0) {
        lm_sys_close(pair[0]);
        return error;
    }
    pthread_mutex_lock(&engine->lock);
    fetch.pid = courier.process.pid;
    fetch.started++;
    fetch.socket = pair[0];
    fetch.broken = courier.blocked = false;
    courier.serial++;
    courier.heard_ns = now_ns() + LM_START_NS;
    courier.pinged_ns = 0;
    (void)send_message(&hello, NULL, 0); /* its answer says that the fetcher is up */
    pthread_cond_signal(&fetch.ears);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

/* It is dead, or not worth living. What it was asked is to be asked again; nothing is lost. */
static void lose_fetcher(void)
{
    unsigned i;

    lm_spawn_kill(&courier.process); /* from here on nobody writes to the memory */
    pthread_mutex_lock(&engine->lock);
    lm_sys_shut_down(fetch.socket);
    while (fetch.listening)
        pthread_cond_wait(&fetch.work, &engine->lock);
    lm_sys_close(fetch.socket);
    fetch.socket = -1;
    fetch.broken = false;
    fetch.pid = 0;
    courier.start_after_ns = now_ns() + (LM_RESTART_NS << (courier.deaths < 8 ? courier.deaths : 7));
    courier.deaths++;
    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        range->promote = range->cancel = false;
        if (courier.deaths == 1) /* it had come up: what counts from now on is how long none does */
            range->deadline_ns = now_ns() + (uint64_t)range->timeout_ms * 1000000u;
        if (range->state == LM_RANGE_CANCELLED)
            free_range_locked(range);
        if (range->state != LM_RANGE_ASKED)
            continue;
        range->state = LM_RANGE_WAITING;
        if (++range->deaths == LM_RANGE_DEATHS_MAX)
            fail_locked(range, LM_E_FETCHER, "the fetcher process ended again and again while it read this");
    }
    pthread_mutex_unlock(&engine->lock);
}

static bool has_waiting_locked(void)
{
    unsigned i;

    for (i = 0; i < LM_RANGES && fetch.in_use > 0; i++)
        if (fetch.ranges[i].state == LM_RANGE_WAITING)
            return true;
    return false;
}

/* There is no fetcher to be had: fail what cannot wait any longer. */
static void expire(bool all)
{
    char text[256];
    unsigned i;

    if (courier.start_error != 0)
        snprintf(text, sizeof text, "the fetcher process cannot be started: errno %d (%s)",
                 -courier.start_error, strerrordesc_np(-courier.start_error));
    else
        snprintf(text, sizeof text,
                 "the fetcher process ended %u times before it was up; what it wrote to stderr says why",
                 courier.deaths);
    pthread_mutex_lock(&engine->lock);
    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        if (range->state == LM_RANGE_WAITING && (all || now_ns() > range->deadline_ns))
            fail_locked(range, LM_E_FETCHER, text);
    }
    pthread_mutex_unlock(&engine->lock);
}

/* Something waits to be asked and there is no fetcher: have one. */
static void have_fetcher(void)
{
    if (now_ns() >= courier.start_after_ns) {
        courier.start_error = start_fetcher();
        if (courier.start_error == 0)
            return;
        courier.start_after_ns = now_ns() + 100 * LM_RESTART_NS;
    }
    /* Out of processes or memory may pass; a missing interpreter does not. */
    expire(courier.deaths >= LM_DEATHS_MAX ||
           (courier.start_error != 0 && courier.start_error != -EAGAIN && courier.start_error != -ENOMEM &&
            courier.start_error != -EMFILE && courier.start_error != -ENFILE));
    if (courier.deaths >= LM_DEATHS_MAX)
        courier.deaths = 1; /* whoever asks next may have more luck */
}

/* ---- questions ---- */

static bool tell_source_locked(uint32_t number)
{
    struct lm_source *source = lm_source_get(number);
    lm_ask ask = { .kind = LM_ASK_SOURCE, .source = number };

    if (source == NULL || source->told == courier.serial)
        return true;
    ask.payload_length = (uint32_t)source->what->length;
    if (!send_message(&ask, source->what->text, source->what->length))
        return false;
    source->told = courier.serial;
    return true;
}

static bool ask_range_locked(struct lm_range *range)
{
    lm_piece pieces[LM_RANGE_CHUNKS];
    unsigned count = range->task_count, i;
    lm_ask ask = {
        .kind = range->kind,
        .source = range->source,
        .id = range->id,
        .offset = range->offset,
        .length = range->length,
        .place = range->place,
        .timeout_ms = range->timeout_ms,
        .flags = (uint16_t)((range->demand ? LM_ASK_DEMAND : 0) | (range->refetch ? LM_ASK_REFETCH : 0)),
    };

    for (i = 0; i < count; i++)
        pieces[i] = (lm_piece){ .offset = record_of(&range->tasks[i])->offset,
                                .length = record_of(&range->tasks[i])->stored_length };
    if (count == 0 && range->kind == LM_ASK_RANGE)
        pieces[count++] = (lm_piece){ .offset = range->offset, .length = range->length };
    ask.payload_length = (uint32_t)(count * sizeof *pieces);
    if (range->kind != LM_ASK_STATUS && !tell_source_locked(range->source))
        return false;
    if (!send_message(&ask, pieces, ask.payload_length))
        return false;
    range->state = LM_RANGE_ASKED;
    courier.dirty = true;
    return true;
}

static bool send_note_locked(struct lm_range *range, uint32_t kind)
{
    lm_ask ask = { .kind = kind, .source = range->source, .id = range->id };

    return send_message(&ask, NULL, 0);
}

/* Demand first; then, in the order of their making, what was asked ahead of need. */
static void send_ranges_locked(bool demand)
{
    for (;;) {
        struct lm_range *next = NULL;
        unsigned i;

        for (i = 0; i < LM_RANGES; i++) {
            struct lm_range *range = &fetch.ranges[i];

            if (range->state == LM_RANGE_WAITING && range->demand == demand &&
                (next == NULL || range->id / LM_RANGES < next->id / LM_RANGES) && place_locked(range))
                next = range;
        }
        if (next == NULL || !ask_range_locked(next))
            return;
    }
}

static void send_notes_locked(void)
{
    unsigned i;

    for (i = 0; i < LM_RANGES; i++) {
        struct lm_range *range = &fetch.ranges[i];

        if (range->promote && range->state == LM_RANGE_ASKED)
            range->promote = !send_note_locked(range, LM_ASK_PROMOTE);
        if (range->cancel && range->state == LM_RANGE_CANCELLED)
            range->cancel = !send_note_locked(range, LM_ASK_CANCEL);
    }
}

static bool is_asked_locked(uint32_t source)
{
    unsigned i;

    for (i = 0; i < LM_RANGES; i++)
        if (fetch.ranges[i].state != LM_RANGE_FREE && fetch.ranges[i].source == source)
            return true;
    return false;
}

/* A number becomes free only when the fetcher knows that it means nothing any more. */
static void forget_sources_locked(void)
{
    int number = -1;

    while ((number = lm_source_unused((uint32_t)(number + 1))) >= 0) {
        struct lm_source *source = lm_source_get((uint32_t)number);
        lm_ask ask = { .kind = LM_ASK_FORGET, .source = (uint32_t)number };

        if (is_asked_locked((uint32_t)number))
            continue;
        if (fetch.socket >= 0 && source->told == courier.serial && !send_message(&ask, NULL, 0))
            return;
        lm_source_remove((uint32_t)number);
    }
}

static void speak_locked(void)
{
    gather_demand_locked();
    gather_ahead_locked();
    if (fetch.socket >= 0 && !fetch.broken && !courier.blocked && fetch.in_use > 0) {
        send_ranges_locked(true);
        send_notes_locked();
        send_ranges_locked(false);
    }
    forget_sources_locked();
}

/* False: it has been silent for too long while something was out. Before that it is asked for a word. */
static bool is_alive_locked(void)
{
    uint64_t now = now_ns();
    lm_ask ping = { .kind = LM_ASK_STATUS };

    if (fetch.in_use == 0) {
        if (courier.heard_ns < now)
            courier.heard_ns = now;
        courier.pinged_ns = 0;
        return true;
    }
    if (courier.pinged_ns != 0)
        return now - courier.pinged_ns < LM_PATIENCE_NS;
    if (now >= courier.heard_ns + LM_SILENCE_NS) {
        (void)send_message(&ping, NULL, 0);
        courier.pinged_ns = now;
    }
    return true;
}

/* Milliseconds; -1: until there is something to do. */
static int time_to_rest_locked(bool wanted)
{
    uint64_t now = now_ns();

    if (fetch.socket < 0 && wanted)
        return courier.start_after_ns > now ? (int)((courier.start_after_ns - now) / 1000000u) + 1 : 0;
    if (courier.blocked)
        return LM_BLOCKED_MS;
    return fetch.in_use > 0 || courier.dirty ? LM_IDLE_MS : -1;
}

static void rest_locked(int timeout_ms)
{
    struct timespec deadline;
    bool late = false;

    if (timeout_ms >= 0)
        lm_sys_deadline(timeout_ms, &deadline);
    while (!fetch.poked && !late) {
        if (timeout_ms < 0)
            pthread_cond_wait(&fetch.work, &engine->lock);
        else
            late = pthread_cond_timedwait(&fetch.work, &engine->lock, &deadline) != 0;
    }
    courier.blocked = false;
    if (late && fetch.in_use == 0 && courier.dirty) { /* nobody uses the memory: its pages go back */
        (void)lm_sys_advise(fetch.memory, LM_ARENA_BYTES, MADV_REMOVE);
        courier.dirty = false;
    }
}

/* The other half of the courier: sits at the socket. */
static void *listen_to(void *argument)
{
    static char message[LM_FETCH_MESSAGE_MAX];

    (void)argument;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        int socket, got;

        while (fetch.socket < 0 || fetch.broken)
            pthread_cond_wait(&fetch.ears, &engine->lock);
        socket = fetch.socket;
        fetch.listening = true;
        pthread_mutex_unlock(&engine->lock);
        got = lm_sys_receive(socket, message, sizeof message);
        pthread_mutex_lock(&engine->lock);
        fetch.listening = false;
        fetch.broken = got <= 0 || !hear_locked(message, (size_t)got);
        if (fetch.broken)
            lm_fetch_wake_locked();
    }
    return NULL;
}

static void *carry(void *argument)
{
    (void)argument;
    /* Where this is forbidden the descriptors lie among the application's, and do no harm there. */
    courier.isolated = lm_sys_isolate_descriptor(STDERR_FILENO) == 0;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        bool lost, wanted;

        fetch.poked = false;
        speak_locked();
        lost = fetch.socket >= 0 && (fetch.broken || !is_alive_locked());
        wanted = has_waiting_locked();
        if (lost || (fetch.socket < 0 && wanted)) {
            pthread_mutex_unlock(&engine->lock);
            if (lost)
                lose_fetcher();
            else
                have_fetcher();
            pthread_mutex_lock(&engine->lock);
            if (lost || fetch.socket >= 0)
                continue;
            wanted = has_waiting_locked();
        }
        rest_locked(time_to_rest_locked(wanted));
    }
    return NULL;
}

int lm_fetch_start_locked(void)
{
    pthread_condattr_t clock;
    int error;

    if (fetch.running)
        return 0;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&fetch.work, &clock);
    pthread_cond_init(&fetch.ears, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_lock(&engine->lock);
    error = lm_sys_thread_start(&fetch.courier, carry, NULL);
    fetch.running = error == 0;
    pthread_mutex_unlock(&engine->lock);
    return error;
}

void lm_fetch_prepare(void)
{
    fetch.next_id = 1;
    fetch.socket = -1;
}

int lm_fetch_after_fork(bool wanted)
{
    unsigned i;

    fetch.running = fetch.listening = fetch.broken = courier.hears = false;
    fetch.memory = NULL; /* MADV_DONTFORK: it is not here */
    fetch.pid = 0;
    fetch.in_use = 0;
    fetch.next_id += UINT64_C(1) << 32; /* a call that was under way in the parent means nothing here */
    for (i = 0; i < fetch.high; i++) /* each touched here is a page that the fork has to copy */
        fetch.ranges[i].state = LM_RANGE_FREE;
    fetch.high = 0;
    lm_arena_clear(&fetch.arena);
    lm_source_untell_all();
    if (!courier.isolated) { /* copies came along; as long as ours is open, the parent's never ends */
        lm_sys_close(fetch.socket);
        lm_sys_close(courier.memory_fd);
        lm_sys_close(courier.process.handle);
    }
    fetch.socket = courier.memory_fd = courier.process.handle = -1;
    courier.process.pid = 0;
    courier.deaths = 0;
    courier.start_after_ns = 0;
    courier.blocked = courier.dirty = false;
    return wanted ? lm_fetch_start_locked() : 0;
}

/* ---- calls: Python's own questions ---- */

int lm_fetch_command(const char *strings, size_t length, unsigned argc, unsigned envc)
{
    LM_HOLD_SIGNALS;
    struct lm_command command;
    int error = 0;

    pthread_mutex_lock(&engine->lifecycle);
    if (fetch.command.argv == NULL) {
        error = lm_command_new(strings, length, argc, envc, &command);
        if (error == 0)
            fetch.command = command;
    }
    pthread_mutex_unlock(&engine->lifecycle);
    return error;
}

int lm_source_open(const char *text, size_t length)
{
    LM_HOLD_SIGNALS;
    int number;

    pthread_mutex_lock(&engine->lock);
    number = lm_source_add(text, length);
    pthread_mutex_unlock(&engine->lock);
    return number;
}

int lm_source_update(uint32_t source, const char *text, size_t length)
{
    LM_HOLD_SIGNALS;
    int error;

    pthread_mutex_lock(&engine->lock);
    error = lm_source_get(source) == NULL ? -EBADF : lm_source_change(source, text, length);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

void lm_source_close(uint32_t source)
{
    LM_HOLD_SIGNALS;
    pthread_mutex_lock(&engine->lock);
    if (lm_source_get(source) != NULL)
        lm_source_leave(source);
    lm_fetch_wake_locked();
    pthread_mutex_unlock(&engine->lock);
}

int lm_fetch_ask(uint32_t kind, uint32_t source, uint64_t offset, uint64_t length, uint32_t timeout_ms,
                 uint64_t *ret_id)
{
    LM_HOLD_SIGNALS;
    struct lm_range *range;
    int error;

    if (length > LM_ARENA_BYTES / 4)
        return -EINVAL;
    pthread_mutex_lock(&engine->lifecycle);
    error = lm_fetch_start_locked();
    pthread_mutex_unlock(&engine->lifecycle);
    if (error < 0)
        return error;
    pthread_mutex_lock(&engine->lock);
    if (kind != LM_ASK_STATUS && lm_source_get(source) == NULL) {
        error = -EBADF;
    } else if ((range = take_range_locked(kind, source, timeout_ms)) == NULL) {
        error = LM_E_FULL;
    } else {
        range->demand = true;
        range->offset = offset;
        range->length = length;
        *ret_id = range->id;
        lm_fetch_wake_locked();
    }
    pthread_mutex_unlock(&engine->lock);
    return error;
}

int lm_fetch_wait(uint64_t id, int timeout_ms)
{
    LM_HOLD_SIGNALS;
    struct timespec deadline;
    struct lm_range *range;
    int result = 0, late = 0;

    lm_sys_deadline(timeout_ms, &deadline);
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        range = find_range_locked(id);
        if (range == NULL)
            result = -ESRCH;
        else if (range->state == LM_RANGE_READY)
            result = range->code < 0 ? range->code : 1;
        if (result != 0 || late != 0)
            break;
        late = lm_engine_wait_locked(&lm_signals_before, &deadline);
    }
    pthread_mutex_unlock(&engine->lock);
    return result;
}

int lm_fetch_take(uint64_t id, void *out, size_t length, lm_fetch_result *ret_result)
{
    LM_HOLD_SIGNALS;
    const unsigned char *bytes = NULL;
    struct lm_range *range;

    pthread_mutex_lock(&engine->lock);
    range = find_range_locked(id);
    if (range != NULL && range->state != LM_RANGE_READY)
        range = NULL;
    if (range != NULL && fetch.memory != NULL)
        bytes = fetch.memory + range->place;
    pthread_mutex_unlock(&engine->lock);
    if (range == NULL)
        return -ESRCH;
    if (range->answer_length > length)
        return -EINVAL;
    /* It is the caller's alone while it is READY. */
    if (range->answer_length > 0)
        memcpy(out, bytes, range->answer_length);
    ret_result->length = range->answer_length;
    ret_result->received = range->received;
    ret_result->requests = range->requests;
    ret_result->text_length = range->text_length;
    memcpy(ret_result->text, range->text, range->text_length + 1u);
    lm_fetch_drop(id);
    return 0;
}

void lm_fetch_drop(uint64_t id)
{
    LM_HOLD_SIGNALS;
    struct lm_range *range;

    pthread_mutex_lock(&engine->lock);
    range = find_range_locked(id);
    if (range != NULL)
        abandon_locked(range);
    pthread_mutex_unlock(&engine->lock);
}

/* A range for it, once there is a free one; NULL if the region closes meanwhile. */
static struct lm_range *wait_for_range_locked(const struct lm_region *region, uint32_t source)
{
    struct lm_range *range = NULL;
    struct timespec soon;

    while (!region->leaving &&
           (range = take_range_locked(LM_ASK_RANGE, source, region->fetch_timeout_ms)) == NULL) {
        lm_sys_deadline(LM_BLOCKED_MS, &soon);
        (void)pthread_cond_timedwait(&engine->progress, &engine->lock, &soon);
    }
    return range;
}

int lm_fetch_read(const struct lm_task *task, const lm_chunk_record *record, bool refetch, void *out, char *text)
{
    struct lm_region *region = task->region;
    uint64_t time = now_ns();
    struct lm_range *range;
    int error;

    if (!record_is_sound(region, record, region->stock.chunk_shift))
        return LM_E_RECORD;
    pthread_mutex_lock(&engine->lock);
    range = wait_for_range_locked(region, region->sources[record->source]);
    if (range == NULL) {
        pthread_mutex_unlock(&engine->lock);
        return LM_E_CLOSED;
    }
    range->offset = record->offset;
    range->length = record->stored_length;
    range->demand = task->kind != LM_TASK_PREFETCH ||
                    (lm_table_state(&region->table, task->chunk) & LM_TABLE_WANTED) != 0;
    range->refetch = refetch;
    range->stock_region = region;
    range->stock_chunk = task->chunk;
    lm_fetch_wake_locked();
    while (range->state != LM_RANGE_READY && !region->leaving)
        pthread_cond_wait(&engine->progress, &engine->lock);
    if (range->state != LM_RANGE_READY) { /* whatever comes of it is nobody's */
        range->stock_region = NULL;
        abandon_locked(range);
        pthread_mutex_unlock(&engine->lock);
        return LM_E_CLOSED;
    }
    pthread_mutex_unlock(&engine->lock);
    error = range->code;
    if (error == 0)
        memcpy(out, fetch.memory + range->place, record->stored_length);
    else
        memcpy(text, range->text, range->text_length + 1u);
    atomic_fetch_add(&region->counters.reads, range->requests);
    atomic_fetch_add(&region->counters.bytes_read, range->received);
    atomic_fetch_add(&region->counters.read_ns, now_ns() - time);
    pthread_mutex_lock(&engine->lock);
    free_range_locked(range);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

int lm_fetcher_pid(void)
{
    LM_HOLD_SIGNALS;
    int pid;

    pthread_mutex_lock(&engine->lock);
    pid = fetch.pid;
    pthread_mutex_unlock(&engine->lock);
    return pid;
}

uint64_t lm_fetcher_starts(void)
{
    LM_HOLD_SIGNALS;
    uint64_t started;

    pthread_mutex_lock(&engine->lock);
    started = fetch.started;
    pthread_mutex_unlock(&engine->lock);
    return started;
}
