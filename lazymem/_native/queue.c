/* SPDX-License-Identifier: Apache-2.0 */
#include "queue.h"

#include <stddef.h>

void lm_queue_clear(struct lm_queue *queue)
{
    queue->task_head = queue->task_count = 0;
    queue->span_head = queue->span_count = 0;
}

bool lm_queue_push_task(struct lm_queue *queue, const struct lm_task *task)
{
    if (queue->task_count == LM_QUEUE_TASKS)
        return false;
    queue->tasks[(queue->task_head + queue->task_count++) % LM_QUEUE_TASKS] = *task;
    return true;
}

bool lm_queue_pop_task(struct lm_queue *queue, struct lm_task *ret_task)
{
    if (queue->task_count == 0)
        return false;
    *ret_task = queue->tasks[queue->task_head];
    queue->task_head = (queue->task_head + 1) % LM_QUEUE_TASKS;
    queue->task_count--;
    return true;
}

bool lm_queue_move_task(struct lm_queue *from, struct lm_queue *to, const struct lm_region *region,
                        uint64_t chunk)
{
    unsigned i;

    for (i = 0; i < from->task_count; i++) {
        struct lm_task *task = &from->tasks[(from->task_head + i) % LM_QUEUE_TASKS];
        struct lm_task found = *task;

        if (found.region != region || found.chunk != chunk || to->task_count == LM_QUEUE_TASKS)
            continue;
        *task = from->tasks[from->task_head]; /* the first takes its place */
        from->task_head = (from->task_head + 1) % LM_QUEUE_TASKS;
        from->task_count--;
        to->task_head = (to->task_head + LM_QUEUE_TASKS - 1) % LM_QUEUE_TASKS;
        to->tasks[to->task_head] = found;
        to->task_count++;
        return true;
    }
    return false;
}

bool lm_queue_push_span(struct lm_queue *queue, const struct lm_span *span, bool front)
{
    unsigned at;

    if (queue->span_count == LM_QUEUE_SPANS)
        return false;
    if (front)
        at = queue->span_head = (queue->span_head + LM_QUEUE_SPANS - 1) % LM_QUEUE_SPANS;
    else
        at = (queue->span_head + queue->span_count) % LM_QUEUE_SPANS;
    queue->spans[at] = *span;
    queue->span_count++;
    return true;
}

struct lm_span *lm_queue_first_span(struct lm_queue *queue)
{
    return queue->span_count == 0 ? NULL : &queue->spans[queue->span_head];
}

void lm_queue_pop_span(struct lm_queue *queue)
{
    queue->span_head = (queue->span_head + 1) % LM_QUEUE_SPANS;
    queue->span_count--;
}

void lm_queue_cut_spans(struct lm_queue *queue, const struct lm_region *region, uint64_t first, uint64_t end)
{
    unsigned kept = 0, i;

    for (i = 0; i < queue->span_count; i++) {
        struct lm_span span = queue->spans[(queue->span_head + i) % LM_QUEUE_SPANS];

        if (span.region == region) {
            if (span.next >= first && span.next < end)
                span.next = span.end < end ? span.end : end;
            else if (span.next < first && span.end > first && span.end <= end)
                span.end = first;
            if (span.next >= span.end)
                continue;
        }
        queue->spans[(queue->span_head + kept++) % LM_QUEUE_SPANS] = span;
    }
    queue->span_count = kept;
}

void lm_queue_drop_spans(struct lm_queue *queue, const struct lm_region *region)
{
    lm_queue_cut_spans(queue, region, 0, UINT64_MAX);
}
