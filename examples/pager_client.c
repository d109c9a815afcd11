/* SPDX-License-Identifier: Apache-2.0
 *
 * pager_client.c: a program without lazymem whose memory is served by `lazymem pager serve`. Prints how many bytes a
 * snapshot has and their checksum (FNV-1a), reading the snapshot as ordinary memory, and then as a child does.
 *
 *   cc -I lazymem/_native examples/pager_client.c -o pager_client
 *   ./pager_client SOCKET /absolute/path/or/s3-url-of/model.lzm
 *
 * Everything that the protocol asks of a client is in main, in the order of pager_protocol.h. A client that is to
 * outlive its pager also watches `pager`, and on its end connects again (there: "The pager may die").
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pager_protocol.h"

#ifndef USERFAULTFD_IOC_NEW /* newer than the headers of some distributions */
#define USERFAULTFD_IOC_NEW 0x0000aa00
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static void fail(const char *what)
{
    fprintf(stderr, "pager_client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        fail(path);
    }
    strcpy(address.sun_path, path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail(path);
    return fd;
}

/* One question and its answer. sent, *ret_received: a descriptor, or -1. */
static lm_pager_answer ask(int pager, lm_pager_ask question, const char *payload, int sent, int *ret_received)
{
    static char text[LM_PAGER_MESSAGE_MAX];
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } control;
    lm_pager_answer answer;
    struct iovec out[2] = { { &question, sizeof question }, { (void *)payload, strlen(payload) } };
    struct iovec in[2] = { { &answer, sizeof answer }, { text, sizeof text } };
    struct msghdr message = { .msg_iov = out, .msg_iovlen = 2 };
    struct cmsghdr *head;

    question.magic = LM_PAGER_MAGIC;
    question.version = LM_PAGER_VERSION;
    question.payload_length = (uint32_t)strlen(payload);
    if (sent >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(head), &sent, sizeof sent);
    }
    if (sendmsg(pager, &message, MSG_NOSIGNAL) < 0)
        fail("the pager");

    message = (struct msghdr){ .msg_iov = in, .msg_iovlen = 2, .msg_control = &control,
                               .msg_controllen = sizeof control };
    if (recvmsg(pager, &message, MSG_CMSG_CLOEXEC) < (ssize_t)sizeof answer) {
        errno = EPROTO;
        fail("the pager");
    }
    if (answer.magic != LM_PAGER_MAGIC || answer.kind != LM_PAGER_DONE) {
        fprintf(stderr, "pager_client: %.*s\n", (int)answer.payload_length, text);
        exit(1);
    }
    head = CMSG_FIRSTHDR(&message);
    *ret_received = -1;
    if (head != NULL && head->cmsg_type == SCM_RIGHTS)
        memcpy(ret_received, CMSG_DATA(head), sizeof *ret_received);
    return answer;
}

static uint64_t checksum(const unsigned char *bytes, uint64_t length)
{
    uint64_t sum = UINT64_C(0xcbf29ce484222325), i;

    for (i = 0; i < length; i++)
        sum = (sum ^ bytes[i]) * UINT64_C(0x100000001b3);
    return sum;
}

int main(int argc, char **argv)
{
    int pager, device, snapshot, uffd, nothing, status;
    unsigned char *memory;
    lm_pager_answer hello, opened;
    char payload[4096];
    uint64_t sum;
    pid_t child;

    if (argc != 3 || strpbrk(argv[2], "\"\\") != NULL) {
        fprintf(stderr, "usage: pager_client SOCKET SNAPSHOT\n");
        return 2;
    }
    pager = connect_to(argv[1]);
    hello = ask(pager, (lm_pager_ask){ .kind = LM_PAGER_HELLO, .flags = LM_PAGER_WANT_DEVICE }, "", -1, &device);
    snprintf(payload, sizeof payload, "{\"url\": \"%s\"}", argv[2]);
    opened = ask(pager, (lm_pager_ask){ .kind = LM_PAGER_OPEN }, payload, -1, &snapshot);

    memory = mmap(NULL, opened.length, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, snapshot, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    close(snapshot);
    if (device >= 0)
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    else
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 && errno == EPERM) /* system calls that meet missing memory are EFAULT then */
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        fail("userfaultfd");
    ask(pager,
        (lm_pager_ask){ .kind = LM_PAGER_MAP, .flags = LM_PAGER_SHARED, .address = (uintptr_t)memory,
                        .length = opened.length },
        "", uffd, &nothing);
    if (!(hello.flags & LM_PAGER_FOLLOWS_FORK) && madvise(memory, opened.length, MADV_DONTFORK) < 0)
        fail("MADV_DONTFORK"); /* a child would read zeros */
    if (mprotect(memory, opened.length, PROT_READ) < 0)
        fail("mprotect");

    /* From here on it is memory like any other; uffd stays open, or what is missing would read as zeros. */
    if (hello.flags & LM_PAGER_FOLLOWS_FORK) {
        child = fork();
        if (child == 0) /* the first to touch the last byte */
            _exit(opened.content > 0 && memory[opened.content - 1] == 0);
        if (child < 0 || waitpid(child, &status, 0) < 0)
            fail("fork");
        printf("the last byte is zero, says a child: %s\n", WEXITSTATUS(status) ? "yes" : "no");
    }
    sum = checksum(memory, opened.content);
    printf("%llu bytes, checksum %016llx\n", (unsigned long long)opened.content, (unsigned long long)sum);
    close(uffd);
    return 0;
}
