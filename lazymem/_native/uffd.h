/* SPDX-License-Identifier: Apache-2.0
 *
 * uffd.h: the kernel's userfaultfd interface, as calls that finish what they begin.
 *
 * Some facts about userfaultfd (Linux 6.18, and the kernel's own documentation):
 *   - COPY, ZEROPAGE, MOVE and POISON may do part of a range. Then they fail with EAGAIN and give the
 *     number of bytes done in a signed field, which on other failures holds a negative errno.
 *   - EEXIST means that the page is there already: an ordinary outcome when two faults race.
 *   - None of them wakes anybody if DONTWAKE is set; one WAKE over the chunk does it once.
 * What follows: the functions below go on after a partial result, step over pages that are present,
 * never wake, and leave the wake to the caller. Price: a range that is half present costs one ioctl a
 * present page; it happens only after a race or a madvise() by the application.
 *
 * The structures and numbers are written out here, not taken from <linux/userfaultfd.h>: the headers
 * of stable distributions are years older than the kernels their programs run on.
 */
#ifndef LM_UFFD_H
#define LM_UFFD_H

#include <stddef.h>
#include <stdint.h>

#define LM_UFFD_API_VERSION 0xAAu

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
#define LM_UFFDIO_POISON     0xc020aa08u
#define LM_UFFD_IOC_NEW      0x0000aa00u /* on /dev/userfaultfd; its argument is the flags */

struct lm_uffd_api { uint64_t api, features, ioctls; };
struct lm_uffd_range { uint64_t start, length; };
struct lm_uffd_register { struct lm_uffd_range range; uint64_t mode, ioctls; };
/* COPY and MOVE */
struct lm_uffd_transfer { uint64_t to, from, length, mode; int64_t done; };
/* ZEROPAGE and POISON */
struct lm_uffd_fill { struct lm_uffd_range range; uint64_t mode; int64_t done; };

struct lm_uffd_message {
    uint8_t event;
    uint8_t reserved[7];
    uint64_t flags;
    uint64_t address;
    uint64_t thread;
};
#define LM_UFFD_EVENT_PAGEFAULT 0x12

/* Non-blocking and close-on-exec, API agreed. way is LM_WAY_*. */
int lm_uffd_open(int way, int *ret_fd, uint64_t *ret_features);
/* Count of messages read, 0 if there is none now, else -errno. */
int lm_uffd_read(int fd, struct lm_uffd_message *ret_messages, int capacity);

int lm_uffd_register(int fd, uintptr_t start, size_t length, uint64_t *ret_ioctls);
int lm_uffd_unregister(int fd, uintptr_t start, size_t length);
int lm_uffd_wake(int fd, uintptr_t start, size_t length);

int lm_uffd_copy(int fd, uintptr_t to, const void *from, size_t length);
int lm_uffd_zero(int fd, uintptr_t start, size_t length);
int lm_uffd_poison(int fd, uintptr_t start, size_t length);
/* *ret_moved is always written. A failure leaves the first *ret_moved bytes moved; the source still
 * holds the rest. */
int lm_uffd_move(int fd, uintptr_t to, void *from, size_t length, size_t *ret_moved);

#endif
