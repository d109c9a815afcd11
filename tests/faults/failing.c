/* SPDX-License-Identifier: Apache-2.0
 *
 * Loaded before everything else (LD_PRELOAD): a disk that fails, threads that cannot be started; and an
 * application that survives SIGBUS by a handler of its own. Python sets the variables through ctypes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/types.h>

int failing_errno;        /* of every pread; 0: none fails */
int threads_left = 1000000;

ssize_t pread(int fd, void *out, size_t length, off_t offset)
{
    static ssize_t (*next)(int, void *, size_t, off_t);

    if (failing_errno != 0) {
        errno = failing_errno;
        return -1;
    }
    if (next == NULL)
        next = dlsym(RTLD_NEXT, "pread");
    return next(fd, out, length, offset);
}

int pthread_create(pthread_t *out, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

    if (threads_left <= 0)
        return EAGAIN;
    threads_left--;
    if (next == NULL)
        next = dlsym(RTLD_NEXT, "pthread_create");
    return next(out, attributes, run, argument);
}

static __thread sigjmp_buf back;

static void jump(int number)
{
    siglongjmp(back, number);
}

void survive(void)
{
    struct sigaction action = { .sa_handler = jump };

    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
}

/* The byte there, or minus the signal that it raised. */
int look(const volatile unsigned char *at)
{
    int number = sigsetjmp(back, 1);

    return number == 0 ? *at : -number;
}
