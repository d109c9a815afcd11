/* SPDX-License-Identifier: Apache-2.0
 *
 * queue.h: work that waits for a thread: demand tasks first, then spans to prefetch. Plain data of
 * fixed size; the caller holds the engine's lock around every call. Nothing here allocates.
 */
#ifndef LM_QUEUE_H
#define LM_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

struct lm_region;
struct lm_range;

enum lm_task_kind {
    LM_TASK_DEMAND,   /* claimed; somebody waits on a page of it */
    LM_TASK_PREFETCH, /* claimed; nobody need be waiting */
    LM_TASK_RECHECK,  /* not claimed: a fault in a chunk that is present */
};

struct lm_task {
    struct lm_region *region;
    uint64_t chunk;
    uint64_t address;  /* RECHECK: the page */
    uint64_t offset;   /* DEMAND: of the byte that was touched, in the region; of no use outside of the chunk */
    uint64_t start_ns; /* when its message was read */
    enum lm_task_kind kind;
    /* Of a remote chunk: how often its bytes came and were wrong. Once delivered: its range, and the
     * stored bytes there, or why there are none. */
    unsigned attempts;
    struct lm_range *range;
    const unsigned char *stored;
    int error;
};

struct lm_span {
    struct lm_region *region;
    uint64_t next, end; /* chunks */
};

#define LM_QUEUE_TASKS 65536 /* untouched pages of it cost nothing */
#define LM_QUEUE_SPANS 16384

struct lm_queue {
    struct lm_task tasks[LM_QUEUE_TASKS];
    unsigned task_head, task_count;
    struct lm_span spans[LM_QUEUE_SPANS];
    unsigned span_head, span_count;
};

void lm_queue_clear(struct lm_queue *queue);
/* False if full. */
bool lm_queue_push_task(struct lm_queue *queue, const struct lm_task *task);
bool lm_queue_pop_task(struct lm_queue *queue, struct lm_task *ret_task);
/* Move the task of a chunk from one queue to the front of another. False if there is none. */
bool lm_queue_move_task(struct lm_queue *from, struct lm_queue *to, const struct lm_region *region,
                        uint64_t chunk);
/* front: before all others. */
bool lm_queue_push_span(struct lm_queue *queue, const struct lm_span *span, bool front);
/* The first span, to be advanced in place; NULL if there is none. */
struct lm_span *lm_queue_first_span(struct lm_queue *queue);
void lm_queue_pop_span(struct lm_queue *queue);
/* Forget chunks [first, end) of a region where spans begin or end with them. */
void lm_queue_cut_spans(struct lm_queue *queue, const struct lm_region *region, uint64_t first, uint64_t end);
/* Forget all spans of a region. */
void lm_queue_drop_spans(struct lm_queue *queue, const struct lm_region *region);

#endif
