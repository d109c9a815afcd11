/* SPDX-License-Identifier: Apache-2.0
 *
 * attachment.h: memory of this process that a pager serves (pager_protocol.h), and what keeps it right when the
 * pager dies: a thread that has the userfaultfd and the connection in a table of descriptors of its own. When
 * the connection ends it looks for another pager at the same path, until the deadline; then what is missing
 * raises SIGBUS, after a line.
 */
#ifndef LM_ATTACHMENT_H
#define LM_ATTACHMENT_H

#include <stdint.h>

#include "lazymem.h"

/* CFFI-BEGIN */

/* Memory that shows a pager's memfd, privately; inaccessible until lm_region_admit. dropped: as for
 * lm_region_open_map. */
int lm_region_open_paged(int memfd, uint64_t size, int writable, int dropped, lm_region **ret_region);
int lm_region_admit(lm_region *region);

/* A userfaultfd of which nobody has made the handshake yet; device: a descriptor of /dev/userfaultfd, or -1.
 * *ret_user_only: touches by system calls are EFAULT. */
int lm_uffd_create(int device, int *ret_user_only);

typedef struct lm_attachment lm_attachment;

typedef struct {
    const char *path; /* of the pager's socket */
    const char *url;  /* for the line */
    int socket, uffd; /* taken over where it succeeds */
    /* What is said to the next pager: whole packets; the last is MAP, which gets LM_PAGER_ADOPT. */
    const char *hello, *open, *map;
    uint32_t hello_length, open_length, map_length;
    uint64_t address, length;
    int deadline_ms;
} lm_attachment_spec;

int lm_attachment_start(const lm_attachment_spec *spec, lm_attachment **ret_attachment);
/* The memory is about to be unmapped: should no pager be there, do not wait for one. */
void lm_attachment_leave(lm_attachment *attachment);
/* After that. NULL is allowed. */
void lm_attachment_free(lm_attachment *attachment);
/* How often another pager was found. */
uint64_t lm_attachment_adoptions(lm_attachment *attachment);
/* Whether no pager came in time. */
int lm_attachment_is_lost(lm_attachment *attachment);

/* CFFI-END */

#endif
