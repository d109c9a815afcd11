/* SPDX-License-Identifier: Apache-2.0
 *
 * pager_client.h: how the C tests of the pager's core and their clients, processes made before any thread, talk.
 * System calls are made as they are: not through the library, whose calls test_pager_failures.c has fail.
 */
#ifndef PAGER_CLIENT_H
#define PAGER_CLIENT_H

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "harness.h"

static inline void send_descriptor(int to, int descriptor, const void *bytes, size_t length)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec part = { .iov_base = (void *)(uintptr_t)bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
    struct cmsghdr *header;

    if (descriptor >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    }
    CHECK(syscall(SYS_sendmsg, (long)to, &message, (long)MSG_NOSIGNAL, 0L, 0L, 0L) == (long)length);
}

/* The descriptor that came with the message, or -1. */
static inline int receive_descriptor(int from, void *bytes, size_t length)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec part = { .iov_base = bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                              .msg_controllen = sizeof control };
    int descriptor = -1;

    CHECK(syscall(SYS_recvmsg, (long)from, &message, (long)MSG_CMSG_CLOEXEC, 0L, 0L, 0L) == (long)length);
    if (CMSG_FIRSTHDR(&message) != NULL)
        memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof descriptor);
    return descriptor;
}

static inline bool has_userfaultfd(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, (long)O_CLOEXEC, 0L, 0L, 0L, 0L, 0L);

    if (uffd < 0) {
        puts("no userfaultfd here");
        return false;
    }
    close(uffd);
    return true;
}

static inline void tell(int to, char word) { send_descriptor(to, -1, &word, 1); }

static inline char hear(int from)
{
    char word;

    CHECK(receive_descriptor(from, &word, 1) == -1);
    return word;
}

#endif
