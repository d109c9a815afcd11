/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>

#include "lazymem.h"
#include "sys.h"

#define LM_REGISTER_MISSING UINT64_C(1)
#define LM_REGISTER_MINOR   UINT64_C(4)
#define LM_MODE_DONTWAKE    UINT64_C(1)
#define LM_USER_MODE_ONLY   1

/* EAGAIN without progress: another thread is changing the address space, and may wait for us to read its
 * event. */
#define LM_STALL_LIMIT 100
#define LM_STALL_LIMIT_ONCE 2 /* for who reads the events himself */

static int open_descriptor(int way)
{
    int device, fd;

    if (way != LM_WAY_DEVICE)
        return lm_sys_userfaultfd(way == LM_WAY_USER_ONLY ? LM_USER_MODE_ONLY : 0);
    device = lm_sys_open("/dev/userfaultfd", O_RDWR);
    if (device < 0)
        return device;
    fd = lm_sys_ioctl(device, LM_UFFD_IOC_NEW, (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK));
    lm_sys_close(device);
    return fd < 0 ? fd : lm_sys_above_standard(fd);
}

int lm_uffd_open(int way, int *ret_fd, uint64_t *ret_features)
{
    struct lm_uffd_api api = { .api = LM_UFFD_API_VERSION };
    int fd = open_descriptor(way);
    int error;

    if (fd < 0)
        return fd;
    api.features = LM_UFFD_FEATURE_EVENT_REMAP | LM_UFFD_FEATURE_EVENT_UNMAP;
    error = lm_sys_ioctl(fd, LM_UFFDIO_API, &api);
    if (error == -EINVAL) {
        api = (struct lm_uffd_api){ .api = LM_UFFD_API_VERSION };
        error = lm_sys_ioctl(fd, LM_UFFDIO_API, &api);
    }
    if (error < 0) {
        lm_sys_close(fd);
        return error;
    }
    *ret_fd = fd;
    *ret_features = api.features;
    return 0;
}

bool lm_uffd_is_one(int fd)
{
    static const char somewhere;
    size_t page = lm_sys_page_size();
    int error = lm_uffd_wake(fd, (uintptr_t)&somewhere & ~(uintptr_t)(page - 1), page);

    return error != -EBADF && error != -ENOTTY && error != -EINVAL;
}

int lm_uffd_read(int fd, struct lm_uffd_message *ret_messages, int capacity)
{
    int got;

    if (!lm_uffd_is_one(fd))
        return -EBADF;
    got = lm_sys_read(fd, ret_messages, (size_t)capacity * sizeof *ret_messages);

    return got < 0 ? got : (int)((size_t)got / sizeof *ret_messages);
}

static int register_as(int fd, uint64_t mode, uintptr_t start, size_t length, uint64_t *ret_ioctls)
{
    struct lm_uffd_register request = { .range = { .start = start, .length = length }, .mode = mode };
    int error = lm_sys_ioctl(fd, LM_UFFDIO_REGISTER, &request);

    if (error < 0)
        return error;
    *ret_ioctls = request.ioctls;
    return 0;
}

int lm_uffd_register(int fd, uintptr_t start, size_t length, uint64_t *ret_ioctls)
{
    return register_as(fd, LM_REGISTER_MISSING, start, length, ret_ioctls);
}

int lm_uffd_register_minor(int fd, uintptr_t start, size_t length, uint64_t *ret_ioctls)
{
    return register_as(fd, LM_REGISTER_MISSING | LM_REGISTER_MINOR, start, length, ret_ioctls);
}

/* A handshake that was refused may be tried again. */
int lm_uffd_agree(int fd, uint64_t needed, uint64_t wanted, uint64_t *ret_features)
{
    uint64_t asked = needed | wanted;

    for (;;) {
        struct lm_uffd_api api = { .api = LM_UFFD_API_VERSION, .features = asked };
        int error = lm_sys_ioctl(fd, LM_UFFDIO_API, &api);

        if (error == 0) {
            *ret_features = asked;
            return 0;
        }
        if (asked == needed)
            return error == -EINVAL ? LM_E_FEATURE : error;
        /* EPERM: fork is for the privileged. EINVAL: the kernel lacks some. */
        asked = error == -EPERM && (asked & ~needed & LM_UFFD_FEATURE_EVENT_FORK)
                    ? asked & ~LM_UFFD_FEATURE_EVENT_FORK
                    : needed;
    }
}

int lm_uffd_unregister(int fd, uintptr_t start, size_t length)
{
    struct lm_uffd_range range = { .start = start, .length = length };

    return lm_sys_ioctl(fd, LM_UFFDIO_UNREGISTER, &range);
}

int lm_uffd_wake(int fd, uintptr_t start, size_t length)
{
    struct lm_uffd_range range = { .start = start, .length = length };

    return lm_sys_ioctl(fd, LM_UFFDIO_WAKE, &range);
}

/* What one ioctl over the rest of a range came to: add to *done, or stop. */
static int advance(int error, int64_t reported, size_t *done, size_t page, int *stalls, int stall_limit)
{
    if (error >= 0 || reported > 0) {
        *done += (size_t)reported;
        *stalls = 0;
        return 0;
    }
    if (error == -EEXIST) {
        *done += page;
        return 0;
    }
    if (error == -EAGAIN && ++*stalls < stall_limit) {
        sched_yield();
        return 0;
    }
    return error;
}

/* COPY where there is something to copy from; ZEROPAGE and POISON take the other form. Within one mapping. */
static int fill_mapping(int fd, unsigned long number, uintptr_t start, const void *from, size_t length,
                        size_t page, int stall_limit)
{
    size_t done = 0;
    int stalls = 0, error = 0;

    while (done < length && error == 0) {
        struct lm_uffd_transfer transfer = {
            .to = start + done,
            .from = (uintptr_t)from + done,
            .length = length - done,
            .mode = LM_MODE_DONTWAKE,
        };
        struct lm_uffd_fill request = {
            .range = { .start = start + done, .length = length - done },
            .mode = LM_MODE_DONTWAKE,
        };

        error = lm_sys_ioctl(fd, number, from != NULL ? (void *)&transfer : &request);
        error = advance(error, from != NULL ? transfer.done : request.done, &done, page, &stalls, stall_limit);
    }
    return error;
}

static int fill(int fd, unsigned long number, uintptr_t start, const void *from, size_t length, size_t page,
                int stall_limit)
{
    size_t half = length / page / 2 * page;
    int error = fill_mapping(fd, number, start, from, length, page, stall_limit);

    if (error == -ESRCH || (error == -ENOENT && length <= page))
        return 0;
    if (error != -ENOENT)
        return error;
    error = fill(fd, number, start, from, half, page, stall_limit);
    if (error < 0)
        return error;
    return fill(fd, number, start + half, from == NULL ? NULL : (const char *)from + half, length - half, page,
                stall_limit);
}

int lm_uffd_fill(int fd, unsigned long number, uintptr_t start, const void *from, size_t length, size_t page)
{
    return fill(fd, number, start, from, length, page, LM_STALL_LIMIT_ONCE);
}

int lm_uffd_copy(int fd, uintptr_t to, const void *from, size_t length)
{
    return fill(fd, LM_UFFDIO_COPY, to, from, length, lm_sys_page_size(), LM_STALL_LIMIT);
}

int lm_uffd_zero(int fd, uintptr_t start, size_t length)
{
    return fill(fd, LM_UFFDIO_ZEROPAGE, start, NULL, length, lm_sys_page_size(), LM_STALL_LIMIT);
}

int lm_uffd_poison(int fd, uintptr_t start, size_t length)
{
    return fill(fd, LM_UFFDIO_POISON, start, NULL, length, lm_sys_page_size(), LM_STALL_LIMIT);
}

int lm_uffd_move(int fd, uintptr_t to, void *from, size_t length, size_t *ret_moved)
{
    size_t moved = 0;
    int stalls = 0, error = 0;

    while (moved < length && error == 0) {
        struct lm_uffd_transfer request = {
            .to = to + moved,
            .from = (uintptr_t)from + moved,
            .length = length - moved,
            .mode = LM_MODE_DONTWAKE,
        };

        error = lm_sys_ioctl(fd, LM_UFFDIO_MOVE, &request);
        if (error == -EEXIST)
            break; /* unlike COPY: the source page stays, so the caller decides */
        error = advance(error, request.done, &moved, 0, &stalls, LM_STALL_LIMIT);
    }
    *ret_moved = moved;
    return error;
}

/* The kernel looks for events before it looks for the range. */
int lm_uffd_settled(int fd, const void *elsewhere)
{
    size_t page = lm_sys_page_size();
    struct lm_uffd_fill request = { .range = { .start = (uintptr_t)elsewhere & ~(uintptr_t)(page - 1),
                                               .length = page } };

    return lm_sys_ioctl(fd, LM_UFFDIO_ZEROPAGE, &request) == -EAGAIN ? -EAGAIN : 0;
}

/* The kernel looks for the process before it looks for the range, in which nothing is ever mapped. */
bool lm_uffd_is_over(int fd)
{
    size_t page = lm_sys_page_size();
    struct lm_uffd_fill request = { .range = { .start = UINT64_C(16) * page, .length = page } };

    return lm_sys_ioctl(fd, LM_UFFDIO_ZEROPAGE, &request) == -ESRCH;
}

/* The kernel looks for the range before it has memory for a page, and then reads the source. */
static int is_one_mapping(int fd, uintptr_t start, size_t length, const void *inaccessible)
{
    struct lm_uffd_transfer request = { .to = start, .from = (uintptr_t)inaccessible, .length = length,
                                        .mode = LM_MODE_DONTWAKE };
    int error = lm_sys_ioctl(fd, LM_UFFDIO_COPY, &request);

    if (error == -EAGAIN)
        return error;
    return error == -EFAULT || error == -EEXIST || error == -ENOMEM;
}

int lm_uffd_is_registered(int fd, uintptr_t start, size_t length, const void *inaccessible)
{
    size_t page = lm_sys_page_size(), half = length / page / 2 * page;
    int answer = is_one_mapping(fd, start, length, inaccessible);

    if (answer != 0 || length <= page)
        return answer;
    answer = lm_uffd_is_registered(fd, start, half, inaccessible);
    return answer <= 0 ? answer : lm_uffd_is_registered(fd, start + half, length - half, inaccessible);
}

/* Try each operation once on a throw-away page, because a feature bit tells what the kernel was built
 * with, not what a sandbox lets through. */
static unsigned try_operations(int fd, uint64_t features, unsigned char *pages, unsigned char *source)
{
    size_t page = lm_sys_page_size(), moved;
    uintptr_t at = (uintptr_t)pages;
    unsigned can = 0;

    if (lm_uffd_copy(fd, at, source, page) == 0)
        can |= LM_CAN_COPY;
    if (lm_uffd_zero(fd, at + page, page) == 0)
        can |= LM_CAN_ZEROPAGE;
    if (lm_uffd_wake(fd, at, page) == 0)
        can |= LM_CAN_WAKE;
    if ((features & LM_UFFD_FEATURE_POISON) && lm_uffd_poison(fd, at + 2 * page, page) == 0)
        can |= LM_CAN_POISON;
    if ((features & LM_UFFD_FEATURE_MOVE) && lm_uffd_move(fd, at + 3 * page, source, page, &moved) == 0)
        can |= LM_CAN_MOVE;
    return can;
}

int lm_probe_way(int way, lm_way_report *ret_report)
{
    lm_way_report report = { 0 };
    size_t page = lm_sys_page_size();
    void *memory;
    int fd, error;

    if (way < 0 || way >= LM_WAY_COUNT)
        return -EINVAL;
    error = lm_sys_alloc(5 * page, &memory);
    if (error < 0)
        return error;
    report.error = -lm_uffd_open(way, &fd, &report.features);
    if (report.error == 0) {
        unsigned char *pages = memory, *source = pages + 4 * page;

        source[0] = 1;
        report.error = -lm_uffd_register(fd, (uintptr_t)pages, 4 * page, &report.ioctls);
        if (report.error == 0)
            report.can = try_operations(fd, report.features, pages, source);
        lm_sys_close(fd);
    }
    lm_sys_free(memory, 5 * page);
    *ret_report = report;
    return 0;
}
