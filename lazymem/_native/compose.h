/* SPDX-License-Identifier: Apache-2.0
 *
 * compose.h: the chunks of composed regions (lazymem.h, lm_strip): stock -> strips -> a chunk's bytes.
 *
 * Whoever composes a chunk reads all the stored chunks that its strips are cut from, decodes each in memory
 * of the worker's own, and casts the parts. The last one decoded is kept: strips that follow one another come
 * from one stored chunk more often than not.
 *
 * Stock in local files is read by whoever resolves the fault. Remote stock is waited for, one range after
 * another, so that is the work of threads of its own, the *composers*: nobody else ever waits for a network.
 */
#ifndef LM_COMPOSE_H
#define LM_COMPOSE_H

#include "engine.h"

/* Whether the strips are sorted, apart, and lie inside of what they are of. */
int lm_compose_check(const lm_region_spec *spec);
/* The bytes of a chunk, zeros where no strip lies. LM_E_CLOSED: the region closes. text: LM_FETCH_TEXT bytes
 * for what a store says of a failure; left alone if it says nothing. */
int lm_compose(struct lm_worker *worker, const struct lm_task *task, unsigned char *target, char *text);

#endif
