/* SPDX-License-Identifier: Apache-2.0
 *
 * Every request number against type, size and direction; and the calls that must finish what they
 * begin, on a real userfaultfd with pages that are present already.
 */
#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
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
    lm_sys_free(target, 2 * page);
}

static void test_gone_range_is_an_error_not_a_hang(int fd, size_t page)
{
    void *memory;
    uint64_t ioctls;

    CHECK(lm_sys_alloc(2 * page, &memory) == 0);
    CHECK(lm_uffd_register(fd, (uintptr_t)memory, page, &ioctls) == 0);
    lm_sys_free(memory, page);
    CHECK(lm_uffd_copy(fd, (uintptr_t)memory, (char *)memory + page, page) < 0);
    lm_sys_free((char *)memory + page, page);
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
    test_gone_range_is_an_error_not_a_hang(fd, page);
    lm_sys_close(fd);
    puts("ok");
    return 0;
}
