/* SPDX-License-Identifier: Apache-2.0
 *
 * What the linker's --wrap puts between the core and the C library: any call of the core into the operating
 * system can be made to fail, the n-th one alone or every one from then on. The core's objects are the very
 * ones that the other tests run; nothing of this is in them. Counts what is taken and given back.
 *
 * The plan lies in shared memory, so that it reaches across fork and is read by whoever made the process.
 * Wrappers run on the stack that spawn.c borrows, too: they keep no arrays and AddressSanitizer out.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include "uffd.h"

/* Each call, and what the kernel (or an allocator) can say to the way it is used here. 0 stands
 * for the end: of a file, of a connection. test_native.py sees to it that the core makes no other calls. */
#define CALLS(X)                                                                                          \
    X(mmap, ENOMEM)                                                                                       \
    X(munmap, ENOMEM)                                                                                     \
    X(mprotect, ENOMEM)                                                                                   \
    X(madvise, ENOMEM, EAGAIN, EINVAL)                                                                    \
    X(mincore, EAGAIN)                                                                                    \
    X(memfd_create, EMFILE, ENOMEM)                                                                       \
    X(ftruncate, ENOMEM)                                                                                  \
    X(fcntl, EMFILE, EPERM)                                                                               \
    X(open, ENOENT, EMFILE, EACCES)                                                                       \
    X(pread, EIO, EINTR, 0)                                                                               \
    X(pwrite, ENOSPC, ENOMEM, EINTR)                                                                      \
    X(fallocate, ENOMEM)                                                                                  \
    X(fstat, EIO)                                                                                         \
    X(read, EINTR)                                                                                        \
    X(write, EPIPE, EAGAIN, EINTR)                                                                        \
    X(select, ENOMEM, EINTR)                                                                              \
    X(poll, ENOMEM, EINTR)                                                                                \
    X(epoll_create1, EMFILE, ENOMEM)                                                                      \
    X(epoll_ctl, ENOMEM, ENOSPC)                                                                          \
    X(epoll_wait, EINTR)                                                                                  \
    X(eventfd, EMFILE, ENOMEM)                                                                            \
    X(uffd_open, EPERM, ENOSYS, EMFILE)                                                                   \
    X(uffd_api, EINVAL)                                                                                   \
    X(uffd_register, ENOMEM, EBUSY)                                                                       \
    X(uffd_copy, ENOMEM, EAGAIN)                                                                          \
    X(uffd_zeropage, ENOMEM, EAGAIN)                                                                      \
    X(uffd_poison, ENOMEM, EAGAIN)                                                                        \
    X(uffd_continue, ENOMEM, EAGAIN)                                                                      \
    X(uffd_unregister, ENOMEM)                                                                            \
    X(unshare, ENOMEM, EPERM)                                                                             \
    X(close_range, ENOSYS)                                                                                \
    X(sched_getaffinity, EINVAL)                                                                          \
    X(pthread_create, EAGAIN)                                                                             \
    X(socketpair, EMFILE, ENOMEM)                                                                         \
    X(sendmsg, EAGAIN, ENOBUFS, EINTR, EPIPE)                                                             \
    X(recv, EINTR, ECONNRESET, 0)                                                                         \
    X(clone, EAGAIN, ENOMEM)                                                                              \
    X(waitpid, EINTR)                                                                                     \
    X(dup2, EMFILE)                                                                                       \
    X(execve, ENOENT, ENOMEM)                                                                             \
    X(pidfd_open, EMFILE, ENOMEM)                                                                         \
    X(pidfd_send_signal, ESRCH)                                                                           \
    X(zstd_create, ENOMEM)                                                                                \
    X(malloc, ENOMEM)                                                                                     \
    X(calloc, ENOMEM)                                                                                     \
    X(realloc, ENOMEM)                                                                                    \
    X(fchmod, EPERM)                                                                                      \
    X(socket, EMFILE, ENOMEM)                                                                             \
    X(setsockopt, ENOMEM)                                                                                 \
    X(connect, ECONNREFUSED, EAGAIN, EINTR)                                                               \
    X(accept4, EMFILE, EAGAIN)                                                                            \
    X(getsockopt, ENOBUFS)                                                                                \
    X(getsockname, ENOBUFS)                                                                               \
    X(opendir, EMFILE, ENOMEM)

#define NAME_IT(name, ...) CALL_##name,
enum call { CALLS(NAME_IT) CALL_COUNT };
#undef NAME_IT

#define LIST_IT(name, ...) { #name, { __VA_ARGS__, -1 } },
static const struct { const char *name; int errors[6]; } calls[] = { CALLS(LIST_IT) };
#undef LIST_IT

struct plan {
    _Atomic bool armed;
    enum call call; /* CALL_COUNT: none; then it is noted which are made */
    bool made[CALL_COUNT];
    unsigned nth; /* from 1 */
    bool onward;  /* every one from the n-th on */
    int error;
    _Atomic unsigned seen;
};

static struct plan *plan;
static _Atomic long mapped, threads; /* bytes and threads taken and not given back; by this process */

#define UNCHECKED __attribute__((no_sanitize_address, noinline))

UNCHECKED static bool fails(enum call call)
{
    unsigned number;

    if (plan == NULL)
        return false;
    if (plan->call == CALL_COUNT)
        plan->made[call] = true;
    if (!atomic_load(&plan->armed) || plan->call != call)
        return false;
    number = atomic_fetch_add(&plan->seen, 1) + 1;
    if (number < plan->nth || (number > plan->nth && !plan->onward))
        return false;
    errno = plan->error;
    return true;
}

#define WRAP(type, name, call, parameters, ...)           \
    type __real_##name parameters;                        \
    type __wrap_##name parameters;                        \
    UNCHECKED type __wrap_##name parameters               \
    {                                                     \
        return fails(call) ? (type)-1 : __real_##name(__VA_ARGS__); \
    }

WRAP(int, mprotect, CALL_mprotect, (void *at, size_t length, int prot), at, length, prot)
WRAP(int, madvise, CALL_madvise, (void *at, size_t length, int advice), at, length, advice)
WRAP(int, mincore, CALL_mincore, (void *at, size_t length, unsigned char *out), at, length, out)
WRAP(int, memfd_create, CALL_memfd_create, (const char *name, unsigned flags), name, flags)
WRAP(int, ftruncate, CALL_ftruncate, (int fd, off_t length), fd, length)
WRAP(ssize_t, pwrite, CALL_pwrite, (int fd, const void *from, size_t length, off_t offset), fd, from, length, offset)
WRAP(int, fallocate, CALL_fallocate, (int fd, int mode, off_t offset, off_t length), fd, mode, offset, length)
WRAP(int, fstat, CALL_fstat, (int fd, struct stat *out), fd, out)
WRAP(ssize_t, read, CALL_read, (int fd, void *out, size_t length), fd, out, length)
WRAP(ssize_t, write, CALL_write, (int fd, const void *from, size_t length), fd, from, length)
WRAP(int, poll, CALL_poll, (struct pollfd *fds, nfds_t count, int timeout), fds, count, timeout)
WRAP(int, select, CALL_select, (int count, fd_set *in, fd_set *out, fd_set *other, struct timeval *patience), count, in,
     out, other, patience)
WRAP(int, epoll_create1, CALL_epoll_create1, (int flags), flags)
WRAP(int, epoll_ctl, CALL_epoll_ctl, (int poller, int what, int fd, struct epoll_event *event), poller, what, fd, event)
WRAP(int, epoll_wait, CALL_epoll_wait, (int poller, struct epoll_event *out, int most, int timeout), poller, out, most, timeout)
WRAP(int, eventfd, CALL_eventfd, (unsigned value, int flags), value, flags)
WRAP(int, unshare, CALL_unshare, (int flags), flags)
WRAP(int, sched_getaffinity, CALL_sched_getaffinity, (pid_t pid, size_t size, cpu_set_t *out), pid, size, out)
WRAP(int, socketpair, CALL_socketpair, (int family, int type, int protocol, int out[2]), family, type, protocol, out)
WRAP(ssize_t, sendmsg, CALL_sendmsg, (int fd, const struct msghdr *message, int flags), fd, message, flags)
WRAP(pid_t, waitpid, CALL_waitpid, (pid_t pid, int *out, int options), pid, out, options)
WRAP(int, dup2, CALL_dup2, (int from, int to), from, to)
WRAP(int, fchmod, CALL_fchmod, (int fd, mode_t mode), fd, mode)
WRAP(int, socket, CALL_socket, (int family, int type, int protocol), family, type, protocol)
WRAP(int, setsockopt, CALL_setsockopt, (int fd, int level, int name, const void *value, socklen_t length), fd, level, name,
     value, length)
WRAP(int, connect, CALL_connect, (int fd, const struct sockaddr *to, socklen_t length), fd, to, length)
WRAP(int, accept4, CALL_accept4, (int fd, struct sockaddr *out, socklen_t *length, int flags), fd, out, length, flags)
WRAP(int, getsockopt, CALL_getsockopt, (int fd, int level, int name, void *out, socklen_t *length), fd, level, name, out,
     length)
WRAP(int, getsockname, CALL_getsockname, (int fd, struct sockaddr *out, socklen_t *length), fd, out, length)
WRAP(int, execve, CALL_execve, (const char *path, char *const argv[], char *const envp[]), path, argv, envp)

#define WRAP_POINTER(type, name, call, parameters, ...)  \
    type *__real_##name parameters;                       \
    type *__wrap_##name parameters;                       \
    UNCHECKED type *__wrap_##name parameters              \
    {                                                     \
        return fails(call) ? NULL : __real_##name(__VA_ARGS__); \
    }

WRAP_POINTER(void, malloc, CALL_malloc, (size_t length), length)
WRAP_POINTER(void, calloc, CALL_calloc, (size_t count, size_t length), count, length)
WRAP_POINTER(void, realloc, CALL_realloc, (void *memory, size_t length), memory, length)
WRAP_POINTER(DIR, opendir, CALL_opendir, (const char *path), path)

void *__real_mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset);
UNCHECKED void *__wrap_mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    void *memory = fails(CALL_mmap) ? MAP_FAILED : __real_mmap(at, length, prot, flags, fd, offset);

    if (memory != MAP_FAILED && !(flags & MAP_FIXED))
        mapped += (long)length;
    return memory;
}

int __real_munmap(void *at, size_t length);
int __wrap_munmap(void *at, size_t length);
UNCHECKED int __wrap_munmap(void *at, size_t length)
{
    int result = fails(CALL_munmap) ? -1 : __real_munmap(at, length);

    if (result == 0)
        mapped -= (long)length;
    return result;
}

/* An end of file, or of a connection, where the error is 0. */
ssize_t __real_pread(int fd, void *out, size_t length, off_t offset);
ssize_t __wrap_pread(int fd, void *out, size_t length, off_t offset);
UNCHECKED ssize_t __wrap_pread(int fd, void *out, size_t length, off_t offset)
{
    if (fails(CALL_pread))
        return plan->error == 0 ? 0 : -1;
    return __real_pread(fd, out, length, offset);
}

ssize_t __real_recv(int fd, void *out, size_t length, int flags);
ssize_t __wrap_recv(int fd, void *out, size_t length, int flags);
UNCHECKED ssize_t __wrap_recv(int fd, void *out, size_t length, int flags)
{
    if (fails(CALL_recv))
        return plan->error == 0 ? 0 : -1;
    return __real_recv(fd, out, length, flags);
}

int __real_fcntl(int fd, int what, long argument);
int __wrap_fcntl(int fd, int what, long argument);
UNCHECKED int __wrap_fcntl(int fd, int what, long argument)
{
    return fails(CALL_fcntl) ? -1 : __real_fcntl(fd, what, argument);
}

int __real_open(const char *path, int flags, mode_t mode);
int __wrap_open(const char *path, int flags, mode_t mode);
UNCHECKED int __wrap_open(const char *path, int flags, mode_t mode)
{
    return fails(CALL_open) ? -1 : __real_open(path, flags, mode);
}

UNCHECKED static int call_of_ioctl(unsigned long request)
{
    switch (request) {
    case LM_UFFDIO_API: return CALL_uffd_api;
    case LM_UFFD_IOC_NEW: return CALL_uffd_open;
    case LM_UFFDIO_REGISTER: return CALL_uffd_register;
    case LM_UFFDIO_COPY: return CALL_uffd_copy;
    case LM_UFFDIO_ZEROPAGE: return CALL_uffd_zeropage;
    case LM_UFFDIO_POISON: return CALL_uffd_poison;
    case LM_UFFDIO_CONTINUE: return CALL_uffd_continue;
    case LM_UFFDIO_UNREGISTER: return CALL_uffd_unregister;
    default: return -1; /* WAKE: cannot fail. MOVE: refused, it is copied */
    }
}

int __real_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument);
UNCHECKED int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
    int call = call_of_ioctl(request);

    if (call >= 0 && fails((enum call)call)) { /* nothing was done: so say the fields, too */
        if (call == CALL_uffd_copy)
            ((struct lm_uffd_transfer *)argument)->done = -plan->error;
        else if (call == CALL_uffd_zeropage || call == CALL_uffd_poison || call == CALL_uffd_continue)
            ((struct lm_uffd_fill *)argument)->done = -plan->error;
        return -1;
    }
    return __real_ioctl(fd, request, argument);
}

UNCHECKED static int call_of_number(long number)
{
    switch (number) {
    case SYS_userfaultfd: return CALL_uffd_open;
    case SYS_mmap: return CALL_mmap; /* over what is there */
    case SYS_clone: return CALL_clone;
    case SYS_close_range: return CALL_close_range;
    case SYS_pidfd_open: return CALL_pidfd_open;
    case SYS_pidfd_send_signal: return CALL_pidfd_send_signal;
    default: return -1;
    }
}

long __real_syscall(long number, long a, long b, long c, long d, long e, long f);
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f);
UNCHECKED long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    int call = call_of_number(number);

    return call >= 0 && fails((enum call)call) ? -1 : __real_syscall(number, a, b, c, d, e, f);
}

int __real_clone(int (*run)(void *), void *stack, int flags, void *argument);
int __wrap_clone(int (*run)(void *), void *stack, int flags, void *argument);
UNCHECKED int __wrap_clone(int (*run)(void *), void *stack, int flags, void *argument)
{
    return fails(CALL_clone) ? -1 : __real_clone(run, stack, flags, argument);
}

int __real_pthread_create(pthread_t *out, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
int __wrap_pthread_create(pthread_t *out, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
int __wrap_pthread_create(pthread_t *out, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    int error = fails(CALL_pthread_create) ? plan->error : __real_pthread_create(out, attributes, run, argument);

    threads += error == 0;
    return error;
}

int __real_pthread_join(pthread_t thread, void **out);
int __wrap_pthread_join(pthread_t thread, void **out);
int __wrap_pthread_join(pthread_t thread, void **out)
{
    int error = __real_pthread_join(thread, out);

    threads -= error == 0;
    return error;
}

#endif
