/* SPDX-License-Identifier: Apache-2.0
 *
 * pager_protocol.h: how a program has its memory served by `lazymem pager serve`. This is the one definition;
 * examples/pager_client.c is a whole client in C, and needs nothing but this header.
 *
 * The pager listens on a Unix socket of type SOCK_SEQPACKET. One packet is one message: a lm_pager_ask from
 * the client or a lm_pager_answer from the pager, then payload_length bytes, and at most one descriptor
 * (SCM_RIGHTS). The client asks one thing at a time; every question gets one answer with its id. A connection
 * is for one snapshot and one userfaultfd.
 *
 *   1. HELLO. The answer says which version the pager speaks. If the client may not call userfaultfd(2) itself,
 *      and the pager may open /dev/userfaultfd, LM_PAGER_WANT_DEVICE has a descriptor of it come with the
 *      answer, for USERFAULTFD_IOC_NEW.
 *   2. OPEN, with the snapshot's location. The answer tells how much memory it takes (`length`, a multiple of
 *      `page`, the chunk's size), and brings the snapshot's memory: a memfd, for reading.
 *   3. The client reserves `length` bytes with PROT_NONE: a private mapping of the memfd (LM_PAGER_SHARED: all
 *      clients of a snapshot then share its pages, until they write), or anonymous memory. It creates a
 *      userfaultfd, O_NONBLOCK, and does nothing else with it: no UFFDIO_API, no UFFDIO_REGISTER.
 *   4. MAP, with that userfaultfd. From the answer on touches of the memory are served, so now mprotect makes it
 *      readable. Until then a touch would read zeros.
 *
 * The memory is served as long as the process lives, and its children's after a fork; ending the connection
 * changes nothing. munmap ends it.
 *
 * The pager may die. So the client keeps its userfaultfd: while somebody has it, touches of missing pages wait.
 * When the connection ends, connect again, to the same or another pager; HELLO, OPEN, MAP with
 * LM_PAGER_ADOPT, the same userfaultfd and the same range; whoever waited is served. What was moved, unmapped or
 * given back since the pager knows from the one that died; if that was more than a minute ago it does not, and shows
 * what the client names: then name only what lies where it did. If none comes: UFFDIO_POISON and UFFDIO_WAKE, then
 * whoever touches what is missing gets SIGBUS. A client that has ended its connection, and every child, need do
 * nothing: the next pager finds them.
 *
 * A client may be stopped, and whoever has stopped it wants to look at what it has not touched. process_vm_readv
 * waits for a page as a thread does; ptrace and /proc/PID/mem, by which debuggers read, do not: the kernel says
 * EIO. So they ask first. POPULATE, of [address, address + length) or (length 0) of all that the process shows,
 * puts the pages in place from outside; the answer comes when that is done, and `length` says how many bytes of
 * the range they are. A process has one number per snapshot it has open, "space" in STATUS, and so has each child
 * of a fork, which is known by that alone.
 *
 * A touch that cannot be served (damaged chunk, network) is SIGBUS in the client, after a line on the pager's
 * standard error; WHY asks for the reason.
 */
#ifndef LM_PAGER_PROTOCOL_H
#define LM_PAGER_PROTOCOL_H

#include <stdint.h>

/* CFFI-BEGIN */

#define LM_PAGER_MAGIC   0x50675a4c /* "LZgP" */
#define LM_PAGER_VERSION 1
#define LM_PAGER_MESSAGE_MAX 65536 /* bytes, payload included */

#define LM_PAGER_HELLO    1
#define LM_PAGER_OPEN     2 /* payload: JSON {"url", "as_format", "chunk_size", "storage_options", "identities"}; all
                               but "url", which is absolute, may be absent. As of lazymem.open; identities: a list
                               of the versions that its files are to have, as the pager itself would tell them */
#define LM_PAGER_MAP      3
#define LM_PAGER_PREFETCH 4 /* chunks of bytes [offset, offset + length) of the snapshot, ahead of need */
#define LM_PAGER_WHY      5 /* answer: why the chunk at `offset` could not be had, or an empty payload */
#define LM_PAGER_STATUS   6 /* answer: JSON, in a memfd */
#define LM_PAGER_TAKE_OVER 7 /* of another pager only: lazymem/pager/handover.py */
#define LM_PAGER_POPULATE 8 /* put pages of a client's memory in place; payload: JSON, {"pid"} or {"space"} */

#define LM_PAGER_WANT_DEVICE  1 /* HELLO */
#define LM_PAGER_SHARED       2 /* MAP: the memory is a private mapping of the memfd that OPEN brought */
#define LM_PAGER_REMOVED_ZERO 4 /* MAP: what is given back (MADV_DONTNEED) reads as zeros; else as the snapshot */
#define LM_PAGER_ADOPT        8 /* MAP: an earlier pager has registered the memory */
#define LM_PAGER_MORE         32 /* MAP: another MAP follows, and nothing is served before the last */
#define LM_PAGER_WAIT         16 /* PREFETCH: the answer comes when all of it is there, or why it cannot be had */

typedef struct {
    uint32_t magic;
    uint16_t version;
    uint16_t kind; /* LM_PAGER_* */
    uint64_t id;
    uint64_t address; /* MAP: of the client's memory */
    uint64_t length;
    uint64_t offset; /* of the byte of the snapshot that lies there */
    uint32_t page;   /* MAP: bytes of a page there, 4096 or 2097152; 0: 4096 */
    uint32_t flags;
    uint32_t payload_length;
    uint32_t reserved; /* 0 */
} lm_pager_ask;

#define LM_PAGER_DONE   0
#define LM_PAGER_FAILED 1 /* payload: one sentence, UTF-8 */

typedef struct {
    uint32_t magic;
    uint16_t version;
    uint16_t kind; /* LM_PAGER_DONE, LM_PAGER_FAILED */
    uint64_t id;
    uint64_t length;  /* OPEN: bytes of memory */
    uint64_t content; /* OPEN: bytes of them that the snapshot has */
    uint32_t page;    /* OPEN: bytes of a chunk */
    int32_t code;     /* FAILED: a negative errno, or LM_E_* */
    uint32_t flags;   /* HELLO: LM_PAGER_FOLLOWS_FORK */
    uint32_t payload_length;
} lm_pager_answer;

#define LM_PAGER_FOLLOWS_FORK 1 /* children have the memory served as well. Else: use MADV_DONTFORK */

/* CFFI-END */

#endif
