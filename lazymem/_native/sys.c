/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lazymem.h"

#ifndef SYS_close_range
#define SYS_close_range 436 /* the same on all architectures */
#endif

#define LM_READ_ATTEMPTS 3
/* Whoever waits on a poller that the application closes is not told: it finds out when it asks again. */
#define LM_AWAIT_MS 1000
#define LM_THREAD_STACK ((size_t)512 << 10) /* zstd's decoder keeps its tables in its context */

uint64_t lm_sys_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void lm_sys_deadline(int timeout_ms, struct timespec *ret_deadline)
{
    uint64_t at = lm_sys_now_ns() + (uint64_t)timeout_ms * 1000000u;

    ret_deadline->tv_sec = (time_t)(at / 1000000000u);
    ret_deadline->tv_nsec = (long)(at % 1000000000u);
}

size_t lm_sys_page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

int lm_sys_cpu_count(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        int count = CPU_COUNT(&set);

        if (count > 0)
            return count;
    }
    return 1;
}

int lm_sys_process(void)
{
    return (int)getpid();
}

int lm_sys_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);

    return result < 0 ? -errno : result;
}

int lm_sys_pread_full(int fd, void *buffer, size_t length, uint64_t offset)
{
    char *out = buffer;

    while (length > 0) {
        ssize_t got = pread(fd, out, length, (off_t)offset);

        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            return LM_E_SHORT;
        out += got;
        length -= (size_t)got;
        offset += (uint64_t)got;
    }
    return 0;
}

int lm_sys_pread_patiently(int fd, void *buffer, size_t length, uint64_t offset)
{
    int attempt, error = 0;

    for (attempt = 0; attempt < LM_READ_ATTEMPTS; attempt++) {
        error = lm_sys_pread_full(fd, buffer, length, offset);
        if (error == 0 || error == LM_E_SHORT)
            break;
    }
    return error;
}

int lm_sys_pwrite_full(int fd, const void *buffer, size_t length, uint64_t offset)
{
    const char *from = buffer;

    while (length > 0) {
        ssize_t wrote = pwrite(fd, from, length, (off_t)offset);

        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return wrote == 0 ? -ENOSPC : -errno;
        from += wrote;
        length -= (size_t)wrote;
        offset += (uint64_t)wrote;
    }
    return 0;
}

int64_t lm_sys_written_ns(int fd)
{
    struct stat info;

    if (fstat(fd, &info) < 0)
        return -errno;
    return (int64_t)info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec;
}

int lm_sys_identify(int fd, struct lm_sys_file *ret_file)
{
    struct stat info;

    if (fstat(fd, &info) < 0)
        return -errno;
    *ret_file = (struct lm_sys_file){ .device = info.st_dev, .inode = info.st_ino };
    return 0;
}

bool lm_sys_is_same(int fd, const struct lm_sys_file *file)
{
    struct lm_sys_file now;
    int error = lm_sys_identify(fd, &now);

    return error == 0 ? now.device == file->device && now.inode == file->inode : error != -EBADF;
}

/* Where a process begins without its standard descriptors, what is opened gets their numbers, and what anybody
 * prints would be written to it. */
int lm_sys_above_standard(int fd)
{
    int copy;

    if (fd < 0)
        return -errno;
    if (fd > STDERR_FILENO)
        return fd;
    copy = lm_sys_dup(fd);
    lm_sys_close(fd);
    return copy;
}

int lm_sys_dup(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    return copy < 0 ? -errno : copy;
}

void lm_sys_close(int fd)
{
    if (fd >= 0)
        (void)close(fd); /* EINTR from close(2) on Linux: the descriptor is gone all the same */
}

int lm_sys_open(const char *path, int flags)
{
    return lm_sys_above_standard(open(path, flags | O_CLOEXEC));
}

int lm_sys_userfaultfd(int flags)
{
    return lm_sys_above_standard((int)syscall(SYS_userfaultfd, flags | O_CLOEXEC | O_NONBLOCK));
}

int lm_sys_read(int fd, void *buffer, size_t length)
{
    ssize_t got;

    do {
        got = read(fd, buffer, length);
    } while (got < 0 && errno == EINTR); /* not "nothing now": who polls for edges would not come again */
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    return (int)got;
}

int lm_sys_alloc(size_t length, void **ret_memory)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED)
        return -errno;
    *ret_memory = memory;
    return 0;
}

void lm_sys_free(void *memory, size_t length)
{
    if (memory != NULL)
        (void)munmap(memory, length);
}

int lm_sys_reserve(size_t length, size_t alignment, void **ret_memory)
{
    return lm_sys_reserve_at(NULL, length, alignment, ret_memory);
}

int lm_sys_reserve_at(void *wanted, size_t length, size_t alignment, void **ret_memory)
{
    size_t span;
    char *start;
    size_t lead;
    void *memory;

    if (__builtin_add_overflow(length, alignment, &span))
        return -ENOMEM;
    memory = mmap(wanted, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return -errno;
    start = memory;
    lead = (alignment - (uintptr_t)start % alignment) % alignment;
    if (lead > 0)
        (void)munmap(start, lead);
    (void)munmap(start + lead + length, span - lead - length);
    (void)munlock(start + lead, length);
    *ret_memory = start + lead;
    return 0;
}

void lm_sys_guard(void *address, size_t length)
{
    /* Before Linux 4.17 the address is only a hint: then what was made elsewhere goes again. */
    void *memory = mmap(address, length, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

    if (memory != MAP_FAILED && memory != address)
        (void)munmap(memory, length);
}

int lm_sys_alloc_buffer(size_t length, void **ret_memory)
{
    void *memory;
    int error;

    if (length < LM_HUGE_PAGE)
        return lm_sys_alloc(length, ret_memory);
    error = lm_sys_reserve(length, LM_HUGE_PAGE, &memory);
    if (error < 0)
        return error;
    error = lm_sys_protect(memory, length, PROT_READ | PROT_WRITE);
    if (error < 0) {
        lm_sys_free(memory, length);
        return error;
    }
    (void)lm_sys_advise(memory, length, MADV_HUGEPAGE); /* slower without, not wrong */
    *ret_memory = memory;
    return 0;
}

int lm_sys_grow_buffer(void **memory, size_t *length, size_t wanted)
{
    void *made;
    int error;

    if (*length >= wanted)
        return 0;
    error = lm_sys_alloc_buffer(wanted, &made);
    if (error < 0)
        return error;
    lm_sys_free(*memory, *length);
    *memory = made;
    *length = wanted;
    return 0;
}

int lm_sys_shared_memory(size_t length)
{
    int fd = lm_sys_above_standard(memfd_create("lazymem", MFD_CLOEXEC | MFD_ALLOW_SEALING)), error;

    if (fd < 0)
        return fd;
    /* Sealed: were it cut short by the other side, touching it would raise SIGBUS here. */
    if (ftruncate(fd, (off_t)length) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return fd;
    error = -errno;
    (void)close(fd);
    return error;
}

int lm_sys_map_shared(int fd, size_t length, void **ret_memory)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

    if (memory == MAP_FAILED)
        return -errno;
    *ret_memory = memory;
    return 0;
}

int lm_sys_map_fixed(void *address, size_t length, int prot, int flags, int fd, uint64_t offset)
{
    /* Not the library's function: ThreadSanitizer would take the mapping for a write to the range by this
     * thread, and report every reader of it. */
    long memory = syscall(SYS_mmap, address, length, prot, flags | MAP_FIXED, fd, offset);

    return memory == -1 ? -errno : 0;
}

int lm_sys_punch(int fd, uint64_t offset, size_t length)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) < 0 ? -errno : 0;
}

int lm_sys_protect(void *address, size_t length, int prot)
{
    return mprotect(address, length, prot) < 0 ? -errno : 0;
}

int lm_sys_advise(void *address, size_t length, int advice)
{
    return madvise(address, length, advice) < 0 ? -errno : 0;
}

bool lm_sys_is_mapped(void *address, size_t length)
{
    return msync(address, length, MS_ASYNC) == 0; /* which does nothing else */
}

int lm_sys_resident(void *address, size_t length, unsigned char *ret_pages)
{
    return mincore(address, length, ret_pages) < 0 ? -errno : 0;
}

int lm_sys_poller(void)
{
    return lm_sys_above_standard(epoll_create1(EPOLL_CLOEXEC));
}

int lm_sys_watch(int poller, int fd, uint32_t events, uint32_t tag)
{
    struct epoll_event event = { .events = events, .data.u32 = tag };

    return epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

bool lm_sys_is_watched(int poller, int fd, uint32_t events, uint32_t tag)
{
    struct epoll_event event = { .events = events, .data.u32 = tag };

    /* EPERM: a file that cannot be watched. */
    return epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event) == 0 ||
           (errno != EBADF && errno != ENOENT && errno != EINVAL && errno != EPERM);
}

int lm_sys_await(int poller, uint32_t *ret_tag)
{
    return lm_sys_await_for(poller, LM_AWAIT_MS, ret_tag);
}

int lm_sys_await_for(int poller, int timeout_ms, uint32_t *ret_tag)
{
    struct epoll_event event;
    int count = epoll_wait(poller, &event, 1, timeout_ms);

    if (count <= 0)
        return count == 0 || errno == EINTR ? 0 : -errno;
    *ret_tag = event.data.u32;
    return count;
}

int lm_sys_bell(void)
{
    return lm_sys_above_standard(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE));
}

void lm_sys_ring(int bell, unsigned times)
{
    uint64_t value = times;

    while (write(bell, &value, sizeof value) < 0 && errno == EINTR)
        ;
}

int lm_sys_socket_pair(int ret_pair[2])
{
    int pair[2], i;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    for (i = 0; i < 2; i++)
        pair[i] = lm_sys_above_standard(pair[i]);
    if (pair[0] < 0 || pair[1] < 0) {
        lm_sys_close(pair[0]);
        lm_sys_close(pair[1]);
        return pair[0] < 0 ? pair[0] : pair[1];
    }
    memcpy(ret_pair, pair, sizeof pair);
    return 0;
}

int lm_sys_send(int socket, const void *head, size_t head_length, const void *rest, size_t rest_length)
{
    struct iovec parts[2] = { { .iov_base = (void *)head, .iov_len = head_length },
                              { .iov_base = (void *)rest, .iov_len = rest_length } };
    struct msghdr header = { .msg_iov = parts, .msg_iovlen = rest_length > 0 ? 2 : 1 };
    ssize_t sent;

    do {
        sent = sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : (int)sent;
}

int lm_sys_receive(int socket, void *buffer, size_t length)
{
    ssize_t got;

    do {
        got = recv(socket, buffer, length, 0);
    } while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : (int)got;
}

void lm_sys_shut_down(int socket)
{
    (void)shutdown(socket, SHUT_RDWR);
}

static void close_between(int first, int last)
{
    /* Before Linux 5.9 there is no close_range: then this thread keeps the others open, too. */
    if (first <= last)
        (void)syscall(SYS_close_range, (unsigned)first, (unsigned)last, 0u);
}

int lm_sys_isolate_descriptor(int keep)
{
    return lm_sys_isolate_descriptors(keep, keep);
}

int lm_sys_isolate_descriptors(int keep, int also)
{
    int kept[] = { STDERR_FILENO, keep, also }, from = 0, i;

    if (unshare(CLONE_FILES) < 0)
        return -errno;
    for (i = 0; i < 3; i++) {
        int next = INT_MAX, j;

        for (j = 0; j < 3; j++)
            if (kept[j] >= from && kept[j] < next)
                next = kept[j];
        if (next == INT_MAX)
            break;
        close_between(from, next - 1);
        from = next + 1;
    }
    close_between(from, INT_MAX);
    return 0;
}

void lm_sys_write_patiently(int fd, const char *text, size_t length)
{
    uint64_t until = lm_sys_now_ns() + 100000000u;

    while (length > 0 && lm_sys_now_ns() < until) {
        struct timeval patience = { .tv_usec = 100000 };
        fd_set writable;
        ssize_t wrote;
        int ready;

        FD_ZERO(&writable);
        FD_SET(fd, &writable);
        ready = select(fd + 1, NULL, &writable, NULL, &patience); /* poll fails where RLIMIT_NOFILE is 0 */
        if (ready < 0 && errno == EINTR)
            continue;
        if (ready <= 0)
            return;
        wrote = write(fd, text, length < PIPE_BUF ? length : PIPE_BUF);
        if (wrote < 0 && errno != EINTR && errno != EAGAIN) /* others may write to it, too */
            return;
        if (wrote > 0) {
            text += wrote;
            length -= (size_t)wrote;
        }
    }
}

sigset_t lm_sys_signals_block(void)
{
    static const int own[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS };
    sigset_t others, before;

    sigfillset(&others);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        sigdelset(&others, own[i]);
    pthread_sigmask(SIG_BLOCK, &others, &before);
    return before;
}

void lm_sys_signals_restore(const sigset_t *before)
{
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

int lm_sys_thread_start(pthread_t *ret_thread, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int error;

    error = pthread_attr_init(&attributes);
    if (error != 0)
        return -error;
    (void)pthread_attr_setstacksize(&attributes, LM_THREAD_STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(ret_thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -error;
}

int lm_sys_thread_id(void)
{
    return (int)syscall(SYS_gettid);
}

void lm_sys_futex_wait(_Atomic uint32_t *word, uint32_t value, int timeout_ms)
{
    struct timespec timeout = { timeout_ms / 1000, timeout_ms % 1000 * 1000000L };

    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout_ms < 0 ? NULL : &timeout, NULL, 0);
}

void lm_sys_futex_wake(_Atomic uint32_t *word, int threads)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}

bool lm_sys_can_read(uintptr_t address)
{
    /* The kernel reads the mask before it looks at the first argument, which means nothing. */
    (void)syscall(SYS_rt_sigprocmask, -1, address & ~(uintptr_t)7, NULL, 8);
    return errno == EINVAL;
}

bool lm_sys_can_write(uintptr_t address)
{
    static _Atomic uint32_t nobody; /* waits here */

    /* Adds nothing, atomically. Somebody who waits on that very word may be woken, as he has to expect. */
    return syscall(SYS_futex, &nobody, FUTEX_WAKE_OP_PRIVATE, 0, NULL, address & ~(uintptr_t)3,
                   FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_LT, -2048)) >= 0;
}

int lm_sys_signal_action(int number, const struct sigaction *action, struct sigaction *ret_before)
{
    return sigaction(number, action, ret_before) < 0 ? -errno : 0;
}

void lm_sys_signal_self(int number, siginfo_t *info)
{
    pid_t process = getpid(), thread = lm_sys_thread_id();

    if (syscall(SYS_rt_tgsigqueueinfo, process, thread, number, info) < 0)
        (void)syscall(SYS_tgkill, process, thread, number);
}
