/* SPDX-License-Identifier: Apache-2.0
 *
 * sys_pager.c: the part of sys.h that only the pager and its clients call; a process without either never does.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "sys.h"

int lm_sys_unblock(int fd)
{
    return fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ? -errno : 0;
}

int lm_sys_publish_memory(void *address, size_t length)
{
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    int fd = lm_sys_above_standard(memfd_create("lazymem", MFD_CLOEXEC | MFD_ALLOW_SEALING)), error;

    if (fd < 0)
        return fd;
    error = ftruncate(fd, (off_t)length) < 0 ? -errno : 0;
    if (error == 0)
        error = lm_sys_map_fixed(address, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    /* Whoever has a descriptor for reading may ask /proc/self/fd for another one. Other users then do not get it;
     * root and this user get it, and it is of no use to them. */
    if (error == 0 && (fcntl(fd, F_ADD_SEALS, seals) < 0 || fchmod(fd, 0600) < 0))
        error = -errno;
    if (error == 0)
        return fd;
    lm_sys_close(fd);
    return error;
}

int lm_sys_provide(int fd, size_t length)
{
    return fallocate(fd, 0, 0, (off_t)length) < 0 ? -errno : 0;
}

static const int signals[] = { [LM_MARK_NONE] = 0, [LM_MARK_KEPT] = SIGURG, [LM_MARK_CLIENTS] = SIGIO };

int lm_sys_mark(int fd, enum lm_mark mark)
{
    return fcntl(fd, F_SETSIG, signals[mark]) < 0 ? -errno : 0;
}

enum lm_mark lm_sys_mark_of(int fd)
{
    int number = fcntl(fd, F_GETSIG);

    return number == SIGURG ? LM_MARK_KEPT : number == SIGIO ? LM_MARK_CLIENTS : LM_MARK_NONE;
}

int lm_sys_open_for_reading(int fd)
{
    char path[64];

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return lm_sys_open(path, O_RDONLY);
}

/* ---- sockets with a path ---- */

int lm_sys_connect(const char *path, int patience_ms)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct timeval patience = { .tv_sec = patience_ms / 1000, .tv_usec = patience_ms % 1000 * 1000 };
    int error, fd;

    if (strlen(path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    fd = lm_sys_above_standard(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (fd < 0)
        return fd;
    memcpy(address.sun_path, path, strlen(path));
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0 &&
        connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    error = -errno;
    lm_sys_close(fd);
    return error;
}

/* descriptor: goes along, or -1. */
static int send_packet(int fd, const void *packet, size_t length, int descriptor)
{
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec part = { .iov_base = (void *)(uintptr_t)packet, .iov_len = length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

    memset(&control, 0, sizeof control);
    if (descriptor >= 0) {
        struct cmsghdr *header;

        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int lm_sys_exchange(int fd, const void *question, size_t length, int descriptor, void *answer, size_t room)
{
    int error = send_packet(fd, question, length, descriptor);
    ssize_t got;

    if (error < 0)
        return error;
    got = recv(fd, answer, room, 0); /* a descriptor that comes along is not taken */
    return got < 0 ? -errno : (int)got;
}

void lm_sys_pause(int us)
{
    (void)usleep((useconds_t)us);
}

static int poll_one(int fd, short events, int timeout_ms)
{
    struct pollfd one = { .fd = fd, .events = events };
    int ready = poll(&one, 1, timeout_ms);

    if (ready < 0) /* at once; and who asks, asks again */
        lm_sys_pause(1000);
    return ready > 0 ? one.revents : 0;
}

bool lm_sys_has_hung_up(int fd, int timeout_ms)
{
    return (poll_one(fd, 0, timeout_ms) & (POLLHUP | POLLERR | POLLNVAL)) != 0;
}

void lm_sys_await_input(int fd, int timeout_ms)
{
    (void)poll_one(fd, POLLIN, timeout_ms);
}

/* ---- a process that shares this one's descriptors ---- */

/* Call for each descriptor but those of standard input and output, and `but`, until it is false. Whether it never was. */
static bool for_each_descriptor(int but, bool (*call)(int, void *), void *context)
{
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    bool going = true;

    if (folder == NULL)
        return false;
    while (going && (entry = readdir(folder)) != NULL) {
        int fd = atoi(entry->d_name);

        if (entry->d_name[0] != '.' && fd != dirfd(folder) && fd != but)
            going = call(fd, context);
    }
    closedir(folder);
    return going;
}

struct sorted { enum lm_worth (*worth_of)(int); enum lm_worth most; int listener; };

static bool sort_out(int fd, void *context)
{
    struct sorted *sorted = context;
    enum lm_worth worth = sorted->worth_of(fd);
    int listens = 0;
    socklen_t size = sizeof listens;

    if (worth == LM_WORTH_NOTHING) {
        (void)close(fd);
        return true;
    }
    sorted->most = worth > sorted->most ? worth : sorted->most;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens)
        sorted->listener = fd;
    return true;
}

struct given { enum lm_worth (*worth_of)(int); int connection, listener; };

/* A descriptor, with the number that it had. */
static bool give(int fd, void *context)
{
    const struct given *given = context;

    return fd == given->listener || given->worth_of(fd) == LM_WORTH_NOTHING ||
           send_packet(given->connection, &fd, sizeof fd, fd) == 0;
}

/* All descriptors to this user or root, then -1. The numbers that come back are closed here; -1 ends that. */
static void give_all(int listener, enum lm_worth (*worth_of)(int))
{
    struct given given = { .listener = listener, .worth_of = worth_of };
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC), number = -1;
    struct ucred peer = { 0 };
    socklen_t size = sizeof peer;

    if (connection < 0)
        return;
    given.connection = connection;
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == 0 || peer.uid == geteuid()) &&
        for_each_descriptor(connection, give, &given) && send_packet(connection, &number, sizeof number, -1) == 0)
        while (recv(connection, &number, sizeof number, 0) == (ssize_t)sizeof number && number >= 0)
            if (number != connection && number != listener)
                (void)close(number);
    (void)close(connection);
}

static void remove_path_of(int listener)
{
    struct sockaddr_un address = { .sun_family = AF_UNSPEC };
    socklen_t size = sizeof address - 1;

    if (getsockname(listener, (struct sockaddr *)&address, &size) == 0 && address.sun_family == AF_UNIX)
        (void)unlink(address.sun_path);
}

/* Whoever ends all that is called lazymem means to end the pager, and not that children of its clients read zeros. */
static void ignore_polite_signals(void)
{
    static const int numbers[] = { SIGTERM, SIGINT, SIGHUP, SIGQUIT };
    size_t i;

    for (i = 0; i < sizeof numbers / sizeof *numbers; i++)
        (void)signal(numbers[i], SIG_IGN);
}

int lm_sys_start_twin(enum lm_worth (*worth_of)(int))
{
    struct sorted sorted = { .worth_of = worth_of };
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    uint64_t began;
    long pid;

    if (self < 0)
        return -errno;
    pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid < 0) {
        int error = -errno;

        lm_sys_close(self);
        return error;
    }
    if (pid > 0)
        return (int)pid;
    (void)setsid();
    (void)prctl(PR_SET_NAME, "lazymem twin", 0, 0, 0);
    ignore_polite_signals();
    while (poll_one(self, POLLIN, -1) == 0)
        ;
    began = lm_sys_now_ns();
    for (;;) {
        sorted.most = LM_WORTH_NOTHING;
        sorted.listener = -1;
        if (!for_each_descriptor(-1, sort_out, &sorted))
            sorted.most = LM_WORTH_WAITING; /* there is no memory to look, or no descriptor */
        if (sorted.most < LM_WORTH_A_MINUTE ||
            (sorted.most == LM_WORTH_A_MINUTE && lm_sys_now_ns() - began > 60 * UINT64_C(1000000000)))
            break;
        if (sorted.listener < 0)
            (void)sleep(1);
        else if (poll_one(sorted.listener, POLLIN, 1000) & POLLIN)
            give_all(sorted.listener, worth_of);
    }
    if (sorted.listener >= 0)
        remove_path_of(sorted.listener);
    _exit(0);
}
