/* SPDX-License-Identifier: Apache-2.0
 *
 * Every request number against type, size and direction; and the calls that must finish what they
 * begin, on a real userfaultfd: with pages that are present already, with mappings cut in two, and while
 * another thread changes the address space.
 */
#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"
#include "lazymem.h"
#include "sys.h"

static void test_request_numbers(void)
{
    CHECK(LM_UFFDIO_API == _IOWR(0xAA, 0x3F, struct lm_uffd_api));
    CHECK(LM_UFFDIO_REGISTER == _IOWR(0xAA, 0x00, struct lm_uffd_register));
    CHECK(LM_UFFDIO_UNREGISTER == _IOR(0xAA, 0x01, struct lm_uffd_range));
    CHECK(LM_UFFDIO_WAKE == _IOR(0xAA, 0x02, struct lm_uffd_range));
    CHECK(LM_UFFDIO_COPY == _IOWR(0xAA, 0x03, struct lm_uffd_transfer));
    CHECK(LM_UFFDIO_ZEROPAGE == _IOWR(0xAA, 0x04, struct lm_uffd_fill));
    CHECK(LM_UFFDIO_MOVE == _IOWR(0xAA, 0x05, struct lm_uffd_transfer));
    CHECK(LM_UFFDIO_POISON == _IOWR(0xAA, 0x08, struct lm_uffd_fill));
    CHECK(LM_UFFD_IOC_NEW == _IO(0xAA, 0x00));
}

static void test_structures_have_the_kernels_layout(void)
{
    CHECK(sizeof(struct lm_uffd_message) == 32);
    CHECK(offsetof(struct lm_uffd_message, flags) == 8);
    CHECK(offsetof(struct lm_uffd_message, address) == 16);
    CHECK(offsetof(struct lm_uffd_message, from) == 8);
    CHECK(offsetof(struct lm_uffd_message, to) == 16);
    CHECK(offsetof(struct lm_uffd_message, length) == 24);
    CHECK(offsetof(struct lm_uffd_message, start) == 8);
    CHECK(offsetof(struct lm_uffd_message, end) == 16);
    CHECK(sizeof(struct lm_uffd_transfer) == 40);
    CHECK(offsetof(struct lm_uffd_transfer, done) == 32);
    CHECK(sizeof(struct lm_uffd_fill) == 32);
    CHECK(offsetof(struct lm_uffd_fill, done) == 24);
}

static int open_any(uint64_t *ret_features)
{
    int fd, way;

    for (way = 0; way < LM_WAY_COUNT; way++)
        if (lm_uffd_open(way, &fd, ret_features) == 0)
            return fd;
    return -1;
}

#define PAGES 16

static void test_copy_steps_over_present_pages(int fd, size_t page)
{
    unsigned char *source, *target, resident[PAGES];
    void *memory;
    uint64_t ioctls;
    int i;

    CHECK(lm_sys_alloc(PAGES * page, &memory) == 0);
    source = memory;
    CHECK(lm_sys_alloc(PAGES * page, &memory) == 0);
    target = memory;
    fill_random(source, PAGES * page, 7);
    CHECK(lm_uffd_register(fd, (uintptr_t)target, PAGES * page, &ioctls) == 0);
    /* Pages 0, 5, 6 and 15 are there already, with other bytes. */
    CHECK(lm_uffd_zero(fd, (uintptr_t)target, page) == 0);
    CHECK(lm_uffd_zero(fd, (uintptr_t)target + 5 * page, 2 * page) == 0);
    CHECK(lm_uffd_zero(fd, (uintptr_t)target + 15 * page, page) == 0);
    CHECK(lm_uffd_copy(fd, (uintptr_t)target, source, PAGES * page) == 0);
    CHECK(lm_sys_resident(target, PAGES * page, resident) == 0);
    for (i = 0; i < PAGES; i++) {
        CHECK(resident[i] & 1);
        if (i == 0 || i == 5 || i == 6 || i == 15)
            CHECK(target[(size_t)i * page + 1] == 0);
        else
            CHECK(memcmp(target + (size_t)i * page, source + (size_t)i * page, page) == 0);
    }
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, PAGES * page) == 0);
    lm_sys_free(source, PAGES * page);
    lm_sys_free(target, PAGES * page);
}

static void test_move_stops_at_a_present_page_and_says_how_far(int fd, size_t page)
{
    unsigned char *source, *target;
    void *memory;
    uint64_t ioctls;
    size_t moved;

    CHECK(lm_sys_alloc(4 * page, &memory) == 0);
    source = memory;
    CHECK(lm_sys_alloc(4 * page, &memory) == 0);
    target = memory;
    memset(source, 9, 4 * page);
    CHECK(lm_uffd_register(fd, (uintptr_t)target, 4 * page, &ioctls) == 0);
    CHECK(lm_uffd_zero(fd, (uintptr_t)target + 2 * page, page) == 0);
    (void)lm_uffd_move(fd, (uintptr_t)target, source, 4 * page, &moved);
    CHECK(moved <= 2 * page);
    CHECK(lm_uffd_copy(fd, (uintptr_t)target + moved, source + moved, 4 * page - moved) == 0);
    CHECK(target[0] == 9 && target[page] == 9 && target[2 * page] == 0 && target[3 * page] == 9);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, 4 * page) == 0);
    lm_sys_free(source, 4 * page);
    lm_sys_free(target, 4 * page);
}

static void test_poison_is_replaced_by_copy(int fd, size_t page)
{
    unsigned char *target;
    void *memory;
    uint64_t ioctls;

    CHECK(lm_sys_alloc(2 * page, &memory) == 0);
    target = memory;
    CHECK(lm_uffd_register(fd, (uintptr_t)target, page, &ioctls) == 0);
    memset(target + page, 3, page);
    CHECK(lm_uffd_poison(fd, (uintptr_t)target, page) == 0);
    CHECK(lm_uffd_copy(fd, (uintptr_t)target, target + page, page) == 0);
    CHECK(target[0] == 3);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, page) == 0);
    lm_sys_free(target, 2 * page);
}

/* An application that protects, locks or advises a part cuts the mapping; the kernel then has ENOENT for
 * what lies on both sides. Where nothing is registered any more there is nothing to do. */
static void test_ranges_of_several_mappings_are_filled(int fd, size_t page)
{
    unsigned char *source, *target;
    void *memory;
    uint64_t ioctls;
    int i;

    CHECK(lm_sys_alloc(PAGES * page, &memory) == 0);
    source = memory;
    fill_random(source, PAGES * page, 8);
    CHECK(lm_sys_alloc(2 * PAGES * page, &memory) == 0);
    target = memory;
    CHECK(lm_uffd_register(fd, (uintptr_t)target, 2 * PAGES * page, &ioctls) == 0);
    CHECK(lm_sys_protect(target + 3 * page, page, PROT_READ) == 0);
    CHECK(lm_sys_protect(target + 9 * page, 20 * page, PROT_READ) == 0);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target + 6 * page, page) == 0);
    CHECK(lm_uffd_copy(fd, (uintptr_t)target, source, PAGES * page) == 0);
    CHECK(lm_uffd_zero(fd, (uintptr_t)target + PAGES * page, PAGES * page) == 0);
    for (i = 0; i < PAGES; i++) {
        if (i == 6)
            CHECK(target[6 * page] == 0); /* not ours */
        else
            CHECK(memcmp(target + (size_t)i * page, source + (size_t)i * page, page) == 0);
        CHECK(target[(size_t)(PAGES + i) * page] == 0);
    }
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, 2 * PAGES * page) == 0);
    lm_sys_free(source, PAGES * page);
    lm_sys_free(target, 2 * PAGES * page);
}

static void test_registration_can_be_asked_for(int fd, size_t page)
{
    unsigned char *target;
    void *memory, *inaccessible;
    uint64_t ioctls;

    CHECK(lm_sys_reserve(page, page, &inaccessible) == 0);
    CHECK(lm_sys_alloc(8 * page, &memory) == 0);
    target = memory;
    CHECK(lm_uffd_register(fd, (uintptr_t)target, 6 * page, &ioctls) == 0);
    CHECK(lm_uffd_zero(fd, (uintptr_t)target, page) == 0);
    CHECK(lm_sys_protect(target + 3 * page, page, PROT_READ) == 0);
    CHECK(lm_uffd_is_registered(fd, (uintptr_t)target, 6 * page, inaccessible) == 1);
    CHECK(lm_uffd_is_registered(fd, (uintptr_t)target, page, inaccessible) == 1);
    CHECK(lm_uffd_is_registered(fd, (uintptr_t)target, 7 * page, inaccessible) == 0);
    CHECK(lm_uffd_is_registered(fd, (uintptr_t)target + 6 * page, page, inaccessible) == 0);
    CHECK(lm_uffd_is_registered(fd, (uintptr_t)inaccessible, page, inaccessible) == 0);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, 6 * page) == 0);
    lm_sys_free(target, 8 * page);
    lm_sys_free(inaccessible, page);
}

static void *unmap_first_page(void *memory)
{
    lm_sys_free(memory, lm_sys_page_size());
    return NULL;
}

static void *move_away(void *memory)
{
    size_t page = lm_sys_page_size();

    return mremap(memory, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
}

static void read_one(int fd, struct lm_uffd_message *ret_message)
{
    struct pollfd readable = { .fd = fd, .events = POLLIN };

    CHECK(poll(&readable, 1, 10000) == 1);
    CHECK(lm_uffd_read(fd, ret_message, 1) == 1);
}

static void wait_settled(int fd, const void *elsewhere)
{
    int i;

    for (i = 0; i < 1000000 && lm_uffd_settled(fd, elsewhere) < 0; i++)
        sched_yield();
    CHECK(lm_uffd_settled(fd, elsewhere) == 0);
}

/* Without the events munmap would not wait, and what was moved would read as zeros. */
static void test_changes_wait_until_their_event_is_read(int fd, size_t page)
{
    struct lm_uffd_message message;
    unsigned char *target;
    void *memory, *moved;
    pthread_t thread;
    uint64_t ioctls;

    CHECK(lm_sys_alloc(3 * page, &memory) == 0);
    target = memory;
    CHECK(lm_uffd_register(fd, (uintptr_t)target, 3 * page, &ioctls) == 0);
    CHECK(lm_uffd_settled(fd, &message) == 0);
    CHECK(pthread_create(&thread, NULL, unmap_first_page, target) == 0);
    while (poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, -1) != 1)
        ;
    CHECK(lm_uffd_settled(fd, &message) == -EAGAIN);
    CHECK(lm_uffd_copy(fd, (uintptr_t)target + page, &message, page) < 0);
    read_one(fd, &message);
    CHECK(message.event == LM_UFFD_EVENT_UNMAP);
    CHECK(message.start == (uintptr_t)target && message.end == (uintptr_t)target + page);
    pthread_join(thread, NULL);
    wait_settled(fd, &message);

    target += page;
    CHECK(pthread_create(&thread, NULL, move_away, target) == 0);
    read_one(fd, &message);
    pthread_join(thread, &moved);
    CHECK(message.event == LM_UFFD_EVENT_REMAP && message.from == (uintptr_t)target);
    CHECK(message.to == (uintptr_t)moved && message.length == 2 * page);
    wait_settled(fd, &message);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)target, 2 * page) == 0);
    CHECK(lm_uffd_unregister(fd, (uintptr_t)moved, 2 * page) == 0);
    lm_sys_free(target, 2 * page);
    lm_sys_free(moved, 2 * page);
}

int main(void)
{
    size_t page = lm_sys_page_size();
    lm_way_report report;
    uint64_t features;
    int fd, way;

    test_request_numbers();
    test_structures_have_the_kernels_layout();
    for (way = 0; way < LM_WAY_COUNT; way++)
        CHECK(lm_probe_way(way, &report) == 0);
    CHECK(lm_probe_way(LM_WAY_COUNT, &report) == -EINVAL);
    fd = open_any(&features);
    if (fd < 0) {
        puts("no userfaultfd here");
        return 77;
    }
    test_copy_steps_over_present_pages(fd, page);
    if (features & LM_UFFD_FEATURE_MOVE)
        test_move_stops_at_a_present_page_and_says_how_far(fd, page);
    if (features & LM_UFFD_FEATURE_POISON)
        test_poison_is_replaced_by_copy(fd, page);
    test_ranges_of_several_mappings_are_filled(fd, page);
    test_registration_can_be_asked_for(fd, page);
    if (features & LM_UFFD_FEATURE_EVENT_REMAP)
        test_changes_wait_until_their_event_is_read(fd, page);
    lm_sys_close(fd);
    puts("ok");
    return 0;
}
