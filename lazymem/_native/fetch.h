/* SPDX-License-Identifier: Apache-2.0
 *
 * fetch.h: bytes of remote objects, by way of the fetcher (lazymem.h, "the fetcher").
 *
 * One thread, the *courier*, owns the fetcher: it makes ranges of the chunks that are wanted and asks for
 * them; it starts the fetcher when there is something to ask, and another when it dies. A second one, the
 * *listener*, hears the answers and hands the chunks, with their bytes, to the helpers. Nobody else ever
 * waits for a network. Their descriptors lie in a table of their own, where the application can neither
 * close them nor open others under their numbers; hence they use no descriptor of the engine's.
 *
 * A range is FREE -> WAITING (in need of a place, or not asked yet) -> ASKED -> READY (the bytes are there,
 * or an error is) -> FREE once each of its chunks, or the caller, has done with it. A range whose region
 * closes becomes CANCELLED: its place is free when the answer comes. If the fetcher dies, what was ASKED is
 * WAITING again. All of this is under the engine's lock.
 */
#ifndef LM_FETCH_H
#define LM_FETCH_H

#include "engine.h"

#define LM_RANGES 512
#define LM_RANGE_CHUNKS 128 /* at most, in one range */

enum lm_range_state { LM_RANGE_FREE, LM_RANGE_WAITING, LM_RANGE_ASKED, LM_RANGE_READY, LM_RANGE_CANCELLED };

struct lm_range {
    enum lm_range_state state;
    uint32_t kind; /* LM_ASK_OPEN, _RANGE or _STATUS */
    uint32_t source;
    uint64_t id;
    uint64_t offset, length;
    bool placed; /* `place` is its own */
    uint64_t place;
    uint32_t timeout_ms;
    uint64_t deadline_ns; /* only for a fetcher that cannot be had: it keeps the clock itself */
    unsigned deaths; /* of fetchers that it was asked of */
    bool demand, refetch;
    bool promote, cancel; /* a message to that effect is to be sent */

    struct lm_region *region; /* NULL: a call, or stock */
    /* Of stock: what it is for, to be found when that chunk is touched. */
    const struct lm_region *stock_region;
    uint64_t stock_chunk;
    unsigned task_count, left; /* chunks; those not populated yet */
    struct lm_task tasks[LM_RANGE_CHUNKS];

    int code; /* 0, or why it failed */
    uint64_t answer_length, received;
    uint32_t requests, text_length;
    char text[LM_FETCH_TEXT]; /* of a failure: a sentence; of an answer: JSON. Ends in 0 */
};

/* Have the courier run. lifecycle is held. */
int lm_fetch_start_locked(void);
/* Something was put into engine->remote: have the courier look. lock is held. */
void lm_fetch_wake_locked(void);
/* A chunk that is on its way was touched: it goes before what nobody waits for. lock is held. */
void lm_fetch_promote_locked(struct lm_region *region, uint64_t chunk);
/* A worker is done with a delivered chunk. lock is held. */
void lm_fetch_release_locked(struct lm_range *range);
/* Bring the stored bytes of a piece of stock, for a chunk of a composed region, to `out`. Waits for the
 * network, so only composers call it. LM_E_CLOSED: the region closes. text: LM_FETCH_TEXT bytes, what the
 * store said of a failure. */
int lm_fetch_read(const struct lm_task *task, const lm_chunk_record *record, bool refetch, void *out, char *text);
/* Give up whatever is on its way for a region that closes. lock is held. */
void lm_fetch_forget_locked(struct lm_region *region);
/* Once, before anything else. */
void lm_fetch_prepare(void);
/* In the child of a fork: there is neither courier nor fetcher. wanted: start a courier. */
int lm_fetch_after_fork(bool wanted);

#endif
