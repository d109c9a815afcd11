/* SPDX-License-Identifier: Apache-2.0
 *
 * uffd.h: the kernel's userfaultfd interface, as calls that finish what they begin.
 *
 * Some facts about userfaultfd (Linux 6.18, and the kernel's own documentation):
 *   - COPY, ZEROPAGE, MOVE and POISON may do part of a range. Then they fail with EAGAIN and give the
 *     number of bytes done in a signed field, which on other failures holds a negative errno.
 *   - EEXIST means that the page is there already: an ordinary outcome when two faults race.
 *   - None of them wakes anybody if DONTWAKE is set; one WAKE over the chunk does it once.
 *   - They work within one mapping. mprotect, mlock and others cut mappings in two: then a range that lies
 *     on both sides is ENOENT, like one that is not registered.
 *   - munmap and mremap of registered memory are done first and told then: the caller sleeps until its
 *     event is read, and everything fails with EAGAIN from before the change until that caller runs again.
 *     Events of different callers need not come in the order in which the memory changed.
 * What follows: the functions below go on after a partial result, step over pages that are present,
 * never wake, and leave the wake to the caller; cut a range in two where it is ENOENT, and take a page for
 * which it still is as gone, which is no failure; and give EAGAIN back to a caller that has to read events
 * before it tries again. Price: a range that is half present costs one ioctl a
 * present page; it happens only after a race or a madvise() by the application.
 *
 * The structures and numbers are written out here, not taken from <linux/userfaultfd.h>: the headers
 * of stable distributions are years older than the kernels their programs run on.
 */
#ifndef LM_UFFD_H
#define LM_UFFD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LM_UFFD_API_VERSION 0xAAu

#define LM_UFFD_FEATURE_EVENT_FORK   (UINT64_C(1) << 1)
#define LM_UFFD_FEATURE_EVENT_REMAP (UINT64_C(1) << 2)
#define LM_UFFD_FEATURE_EVENT_REMOVE (UINT64_C(1) << 3)
#define LM_UFFD_FEATURE_EVENT_UNMAP (UINT64_C(1) << 6)
#define LM_UFFD_FEATURE_MISSING_HUGE (UINT64_C(1) << 4)
#define LM_UFFD_FEATURE_MISSING_SHMEM (UINT64_C(1) << 5)
#define LM_UFFD_FEATURE_MINOR_SHMEM (UINT64_C(1) << 10)
#define LM_UFFD_FEATURE_POISON (UINT64_C(1) << 14)
#define LM_UFFD_FEATURE_MOVE   (UINT64_C(1) << 16)

/* The request numbers, spelled out; test_uffd.c derives them again from type, size and direction. */
#define LM_UFFDIO_API        0xc018aa3fu
#define LM_UFFDIO_REGISTER   0xc020aa00u
#define LM_UFFDIO_UNREGISTER 0x8010aa01u
#define LM_UFFDIO_WAKE       0x8010aa02u
#define LM_UFFDIO_COPY       0xc028aa03u
#define LM_UFFDIO_ZEROPAGE   0xc020aa04u
#define LM_UFFDIO_MOVE       0xc028aa05u
#define LM_UFFDIO_CONTINUE   0xc020aa07u
#define LM_UFFDIO_POISON     0xc020aa08u
#define LM_UFFD_IOC_NEW      0x0000aa00u /* on /dev/userfaultfd; its argument is the flags */

struct lm_uffd_api { uint64_t api, features, ioctls; };
struct lm_uffd_range { uint64_t start, length; };
struct lm_uffd_register { struct lm_uffd_range range; uint64_t mode, ioctls; };
/* COPY and MOVE */
struct lm_uffd_transfer { uint64_t to, from, length, mode; int64_t done; };
/* ZEROPAGE, CONTINUE and POISON */
struct lm_uffd_fill { struct lm_uffd_range range; uint64_t mode; int64_t done; };

struct lm_uffd_message {
    uint8_t event;
    uint8_t reserved[7];
    union {
        struct { uint64_t flags, address, thread; }; /* PAGEFAULT */
        struct { uint64_t from, to, length; };       /* REMAP: what was there before, not what it grew by */
        struct { uint64_t start, end; };             /* UNMAP, REMOVE: all of the caller's range */
        struct { uint32_t child; };                  /* FORK: the child's userfaultfd, a descriptor of ours */
    };
};
#define LM_UFFD_EVENT_PAGEFAULT 0x12
#define LM_UFFD_EVENT_FORK      0x13
#define LM_UFFD_EVENT_REMAP     0x14
#define LM_UFFD_EVENT_REMOVE    0x15
#define LM_UFFD_EVENT_UNMAP     0x16

/* Non-blocking and close-on-exec, API agreed, REMAP and UNMAP asked for where the kernel has them. way is
 * LM_WAY_*. */
int lm_uffd_open(int way, int *ret_fd, uint64_t *ret_features);
/* Whether a userfaultfd is behind the number, and not something else that the application has opened. */
bool lm_uffd_is_one(int fd);
/* Count of messages read, 0 if there is none now, else -errno; -EBADF if it is none. */
int lm_uffd_read(int fd, struct lm_uffd_message *ret_messages, int capacity);

int lm_uffd_register(int fd, uintptr_t start, size_t length, uint64_t *ret_ioctls);
/* minor: pages that the mapped file has, but the process has not, are missing, too. */
int lm_uffd_register_minor(int fd, uintptr_t start, size_t length, uint64_t *ret_ioctls);
/* Agree on the API for a descriptor that somebody else has made: with as many of `wanted` (LM_UFFD_FEATURE_*)
 * as we may have, but with all of `needed`. */
int lm_uffd_agree(int fd, uint64_t needed, uint64_t wanted, uint64_t *ret_features);
/* Whether the process whose memory it is about is gone. */
bool lm_uffd_is_over(int fd);
int lm_uffd_unregister(int fd, uintptr_t start, size_t length);
int lm_uffd_wake(int fd, uintptr_t start, size_t length);

/* COPY, ZEROPAGE, CONTINUE or POISON (LM_UFFDIO_*), where pages have `page` bytes. from: of COPY only. -EAGAIN at
 * once: the caller reads the events. */
int lm_uffd_fill(int fd, unsigned long number, uintptr_t start, const void *from, size_t length, size_t page);
int lm_uffd_copy(int fd, uintptr_t to, const void *from, size_t length);
int lm_uffd_zero(int fd, uintptr_t start, size_t length);
int lm_uffd_poison(int fd, uintptr_t start, size_t length);
/* -EAGAIN while an event of the descriptor is unread, or its sender does not run yet; else 0. `elsewhere`: a
 * page that is not registered. */
int lm_uffd_settled(int fd, const void *elsewhere);
/* Whether all of a range is registered, in one mapping or in several, with whatever userfaultfd; 0, 1, or
 * -EAGAIN. `inaccessible`: a page that cannot be read. */
int lm_uffd_is_registered(int fd, uintptr_t start, size_t length, const void *inaccessible);
/* *ret_moved is always written. A failure leaves the first *ret_moved bytes moved; the source still
 * holds the rest. */
int lm_uffd_move(int fd, uintptr_t to, void *from, size_t length, size_t *ret_moved);

#endif
