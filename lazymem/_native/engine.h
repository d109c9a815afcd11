/* SPDX-License-Identifier: Apache-2.0
 *
 * engine.h: what engine.c, places.c, populate.c, region.c and report.c share. Not for anybody else.
 *
 * One engine a process: its resolver threads read the userfaultfds and resolve demand faults, its
 * catchers do the same for faults that come as signals, its helper threads populate what was asked for beforehand. It runs while at least one region that needs
 * it is open.
 *
 * Locks, in the order in which they may be taken (DESIGN.md has the reasons):
 *   lifecycle   start and stop of threads, opening of descriptors, which regions there are, fork
 *   installs    shared: between asking where a chunk lies and installing it there; alone: see places.h
 *   lock        the same regions by address, their pieces, queue, tasks, errors
 * None is ever held while a thread waits for a disk, a decoder or Python.
 */
#ifndef LM_ENGINE_H
#define LM_ENGINE_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "lazymem.h"
#include "pages.h"
#include "pieces.h"
#include "queue.h"
#include "sys.h"
#include "table.h"

#define LM_MAX_RESOLVERS 64
#define LM_MAX_HELPERS   64
#define LM_COMPOSERS     16 /* threads that may wait for remote stock; */
#define LM_COMPOSERS_KEPT 4 /* of them, those that are left to demand */
#define LM_ERROR_SLOTS   64
#define LM_SCANS         8 /* that a region knows of at a time */
#define LM_ERROR_TEXT    512

struct lm_counters {
    _Atomic uint64_t faults, chunks_demand, chunks_prefetch, chunks_failed, moved_chunks;
    _Atomic uint64_t bytes_populated, bytes_read, reads;
    _Atomic uint64_t read_ns, check_ns, decode_ns, install_ns;
    _Atomic uint64_t latency[LM_LATENCY_BUCKETS];
    _Atomic uint64_t last_read_ns, last_begun_ns, last_installed_ns;
};

struct lm_extent { uint64_t start, length; }; /* bytes, from the region's base */

/* Touches of one chunk after the other, by one thread. `end`: of what is under way ahead of them; `used`: a
 * count of the region's touches, 0 for none. */
struct lm_scan { uint64_t first, last, end, window, used; unsigned streak; };

/* A memfd, and what tells it from whatever else its number may come to lead to. */
struct lm_stage { int fd; struct lm_sys_file file; };

struct lm_region {
    struct lm_table table;
    uint64_t serial; /* no other region of this process has or had it; not 0 */
    /* Composed (compose.h): what it is cut from, and how. */
    bool composed;
    struct lm_table stock;
    lm_strip *strips;
    uint64_t strip_count;
    unsigned char *base;
    uint64_t size; /* whole chunks, or whole pages for a plain mapping */
    size_t memory; /* bytes of the allocation that holds this and the tables below */
    int backend, install, prot;
    const struct lm_pages *pages; /* NULL: a plain mapping */
    bool writable;
    bool dropped; /* children of a fork do not get the memory */
    int process;  /* the one that opened it */

    int uffd; /* index into the engine's descriptors */
    struct lm_extent *registered;
    _Atomic uint64_t registered_count; /* grows while others look */

    _Atomic bool lost;    /* its memory is inaccessible for good (lose_region) */
    struct lm_stage stage;     /* LM_BACKEND_SIGSEGV: where its chunks lie. Under lock */
    unsigned stage_users;      /* threads in the middle of an install. Under lock */
    _Atomic bool stage_shared; /* with another process, that came of a fork */

    _Atomic bool guarded; /* some chunk was poisoned by PROT_NONE, for want of UFFDIO_POISON */

    bool remote; /* `sources` are used, and not `fds` */
    int *fds;
    struct lm_sys_file *files; /* what they led to */
    uint32_t *sources;
    uint64_t *source_sizes;
    int64_t *written_ns; /* of local sources, when they were opened */
    int source_count;
    uint32_t coalesce_gap, coalesce_size, fetch_timeout_ms;

    char *url;
    uint64_t array_count;
    uint64_t *array_offsets, *array_lengths;
    uint32_t *name_offsets;
    char *names;

    /* Under the engine's lock. */
    bool closing, closed;
    bool released;    /* its memory is being given back */
    bool leaving;     /* closing, and nobody waits for bytes: what is on its way may be dropped */
    unsigned tasks;   /* queued or running */
    unsigned calls;   /* of the public functions, in other threads */
    unsigned touching; /* of them, those that touch the memory */
    struct { uint64_t chunk; int code; char text[LM_ERROR_TEXT]; } errors[LM_ERROR_SLOTS];
    unsigned error_count;
    struct lm_scan ahead[LM_SCANS];
    uint64_t ahead_time;
    uint32_t readahead;
    struct lm_pieces pieces;

    struct lm_counters counters;
};

struct lm_worker {
    pthread_t thread;
    bool running; /* under lifecycle */
    lm_decoder *decoder;
    void *stored, *plain; /* as read; as the region will show it */
    size_t stored_length, plain_length;
    void *stock; /* the last chunk of stock that was decoded, and of what; region 0: of nothing */
    size_t stock_length;
    uint64_t stock_region, stock_chunk;
};

struct lm_uffd {
    int fd; /* -1: not open */
    unsigned can; /* LM_CAN_* */
    pthread_t keeper;
    bool kept;  /* the keeper runs */
    bool holds; /* and has it in a table of its own. Under lock */
};

#define LM_UFFD_FULL 0
#define LM_UFFD_USER 1
#define LM_UFFD_COUNT 2

struct lm_engine {
    pthread_mutex_t lifecycle, lock;
    pthread_rwlock_t installs;
    pthread_cond_t work;     /* helpers wait here */
    pthread_cond_t progress; /* lm_region_wait and lm_region_close wait here */
    pthread_cond_t end;      /* keepers wait here */

    unsigned users; /* regions that need the engine */
    bool traps; /* one of them takes its touches as signals, or did */
    /* Under lock. The child of a fork starts without helpers. lost: our descriptors were closed. */
    bool stopping, has_helpers, lost;
    int poller, bell; /* -1 while there is no userfaultfd */
    struct lm_uffd uffds[LM_UFFD_COUNT];
    int resolver_count, helper_count, composer_count; /* wanted */
    struct lm_worker catchers[LM_MAX_RESOLVERS]; /* resolvers of traps */
    struct lm_worker resolvers[LM_MAX_RESOLVERS], helpers[LM_MAX_HELPERS], composers[LM_COMPOSERS];
    unsigned composing_ahead; /* composers at work for nobody who waits. Under lock */

    struct lm_region **regions; /* sorted by base */
    size_t region_count, region_capacity;
    _Atomic bool scattered; /* the application has moved or unmapped lazy memory */
    struct lm_queue queue;     /* of chunks that need no courier */
    struct lm_queue remote;    /* of chunks to be asked for */
    struct lm_queue arrived;   /* tasks only: chunks whose bytes came, and somebody waits for them */
    struct lm_queue early;     /* tasks only: the same, before anybody touched them */
    struct lm_queue composing; /* for composers: chunks of composed regions whose stock is remote */
};

extern struct lm_engine lm_engine;

/* engine.c; the caller holds lifecycle for all but the last */
int lm_engine_acquire_locked(int threads); /* start if need be */
void lm_engine_release_locked(void);       /* stop after the last */
int lm_engine_uffd_locked(int backend, int *ret_index);
int lm_engine_traps_locked(void);          /* have touches that come as signals served */
int lm_engine_threads_locked(void);        /* have all wanted threads run */
int lm_engine_composers_locked(void);      /* composers are wanted, too */
/* From then on its faults are accepted: before it is registered, else a fault of memory that lay at the same
 * address would find nothing there. */
int lm_engine_insert(struct lm_region *region);
/* From now on none of its faults makes work. False, and no change, while a task or a call uses it. */
bool lm_engine_release_idle(struct lm_region *region);
/* What a fault message for that byte would come to: its chunk is demanded, for whom wake() is called. */
void lm_engine_take_up(struct lm_region *region, uint64_t offset);
/* Populate what is demanded, until nothing is. False: the engine is about to stop. */
bool lm_engine_work(struct lm_worker *worker);
/* No address leads to the region any more. */
void lm_engine_remove(struct lm_region *region);
/* Whether chunks of the region come by way of the courier: remote, and not composed. */
bool lm_engine_by_courier(const struct lm_region *region);
/* Forget that chunks [first, end) were to be populated. lock is held. */
void lm_engine_cut_spans_locked(const struct lm_region *region, uint64_t first, uint64_t end);
/* Where spans of a region are put, and rouse whoever takes them from there. lock is held. */
int lm_engine_span_room_locked(const struct lm_region *region);
bool lm_engine_push_span_locked(const struct lm_span *span, bool front);
/* No room in a queue: give the chunk back, and let whoever waits for it fault again. lock is held. */
void lm_engine_turn_away_locked(const struct lm_task *task);
/* Wait for progress, until the deadline if there is one; nonzero once it has passed. Signals that LM_HOLD_SIGNALS
 * holds back are let through now and then, without the lock. lock is held, once. */
int lm_engine_wait_locked(const sigset_t *before, const struct timespec *deadline);
/* Index of the first region whose base lies above an address. lock is held. */
size_t lm_engine_upper_bound(uintptr_t address);
/* Read and record what the kernel has to say of a userfaultfd, faults too. */
void lm_engine_read_events(int index);
/* Take installs alone, and lock, at a moment when no event is unread: what is recorded is how things are.
 * Failing that within so many rounds, take them all the same. */
void lm_engine_lock_settled(int rounds);
void lm_engine_unlock_settled(void);
/* An ioctl or read found that the application has closed our descriptors. */
void lm_engine_note_lost(void);

/* Of stored bytes that were read from a file, `error` being how that or their check went: -EBADF if the number
 * leads to another file now. LM_E_CHANGED if no checksum guards them, and it was written to since it was opened. */
int lm_region_check_source(const struct lm_region *region, const lm_chunk_record *record, int error);

/* populate.c: one chunk, from its source into the region; returns 0 or why it failed. */
int lm_populate(struct lm_worker *worker, const struct lm_task *task);
int lm_worker_init(struct lm_worker *worker);
void lm_worker_destroy(struct lm_worker *worker);

/* report.c */
/* text: what the store said, or NULL. */
void lm_report_failed_touch(const struct lm_region *region, uint64_t chunk, int code, const char *text);
void lm_report_lost_region(const struct lm_region *region, const char *when, int code);
/* region: whose memory it is, or NULL. */
void lm_report_memory(const struct lm_region *region, const char *what);
/* The first array with bytes in [start, end), or array_count. */
uint64_t lm_report_find_array(const struct lm_region *region, uint64_t start, uint64_t end);

/* region.c */
/* In the child of a fork: a dropped region is closed here, and what it held is given back. */
void lm_region_leave_behind(struct lm_region *region);
uint64_t lm_region_array_end(const struct lm_region *region, uint64_t chunk); /* in chunks */
void lm_region_record_error_locked(struct lm_region *region, uint64_t chunk, int code, const char *text);

#endif
