/* SPDX-License-Identifier: Apache-2.0
 *
 * The smallest userfaultfd handler that does the job: one thread reads a fault, copies the chunk that holds it
 * from memory, and by that wakes whoever waits. No check, no decoder, no table, no second thread, no end.
 * It is the bound that `random_touch` and `fault_profile` hold lazymem against.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct handler {
    int fd;
    char *memory, *source;
    size_t chunk;
} handler;

static void *handle(void *argument)
{
    struct uffd_msg message;

    (void)argument;
    while (read(handler.fd, &message, sizeof message) == sizeof message) {
        size_t offset = (message.arg.pagefault.address - (uintptr_t)handler.memory) / handler.chunk * handler.chunk;
        struct uffdio_copy copy = { .dst = (uintptr_t)handler.memory + offset,
                                    .src = (uintptr_t)handler.source + offset,
                                    .len = handler.chunk };

        if (ioctl(handler.fd, UFFDIO_COPY, &copy) < 0) { /* another touch of the same chunk */
            struct uffdio_range range = { .start = copy.dst, .len = copy.len };

            ioctl(handler.fd, UFFDIO_WAKE, &range);
        }
    }
    return NULL;
}

/* size, chunk: bytes, powers of the page size. Memory that shows what is at `source`, or NULL and errno. */
void *smallest_handler_start(void *source, size_t size, size_t chunk)
{
    struct uffdio_api api = { .api = UFFD_API };
    struct uffdio_register request = { .mode = UFFDIO_REGISTER_MODE_MISSING };
    pthread_t thread;

    handler.source = source;
    handler.chunk = chunk;
    handler.fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (handler.fd < 0)
        handler.fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (handler.fd < 0 || ioctl(handler.fd, UFFDIO_API, &api) < 0)
        return NULL;
    handler.memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (handler.memory == MAP_FAILED)
        return NULL;
    request.range = (struct uffdio_range){ .start = (uintptr_t)handler.memory, .len = size };
    if (ioctl(handler.fd, UFFDIO_REGISTER, &request) < 0)
        return NULL;
    errno = pthread_create(&thread, NULL, handle, NULL);
    return errno == 0 ? handler.memory : NULL;
}
