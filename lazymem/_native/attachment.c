/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "attachment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pager_protocol.h"
#include "sys.h"
#include "uffd.h"

#define LM_LOOK_MS 100   /* how often the thread looks whether it is to end, where nothing tells it */
#define LM_RETRY_US 20000
#define LM_PATIENCE_MS 5000 /* for an answer */
#define LM_MESSAGES 16
#define LM_USER_MODE_ONLY 1
#define LM_ANSWER 8192

struct packet { size_t length; unsigned char bytes[LM_PAGER_MESSAGE_MAX]; }; /* OPEN has each file's version */

struct lm_attachment {
    pthread_t thread;
    int process;
    char path[108]; /* no socket has a longer one */
    char url[1024];
    int socket, uffd;
    struct packet hello, open, map;
    uint64_t address, length;
    int deadline_ms;
    bool isolated; /* the thread has a table of descriptors of its own. Read once it is ready */
    _Atomic bool ready, leaving, ending, lost;
    _Atomic uint64_t adoptions;
};

int lm_uffd_create(int device, int *ret_user_only)
{
    int fd = device >= 0 ? lm_sys_ioctl(device, LM_UFFD_IOC_NEW, (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK))
                         : lm_sys_userfaultfd(0);

    *ret_user_only = 0;
    if (device >= 0)
        return fd < 0 ? fd : lm_sys_above_standard(fd);
    if (fd == -EPERM) {
        fd = lm_sys_userfaultfd(LM_USER_MODE_ONLY);
        *ret_user_only = fd >= 0;
    }
    return fd;
}

/* ---- another pager ---- */

/* 0: it is done. */
static int ask(int connection, const struct packet *packet, int descriptor)
{
    union { lm_pager_answer head; unsigned char bytes[LM_ANSWER]; } answer;
    int got = lm_sys_exchange(connection, packet->bytes, packet->length, descriptor, answer.bytes,
                              sizeof answer.bytes);

    if (got < 0)
        return got;
    if ((size_t)got < sizeof answer.head || answer.head.magic != LM_PAGER_MAGIC)
        return -EPROTO;
    return answer.head.kind == LM_PAGER_DONE ? 0 : answer.head.code < 0 ? answer.head.code : -EPROTO;
}

static int attach_again(struct lm_attachment *attachment)
{
    int connection = lm_sys_connect(attachment->path, LM_PATIENCE_MS), error;

    if (connection < 0)
        return connection;
    error = ask(connection, &attachment->hello, -1);
    if (error == 0)
        error = ask(connection, &attachment->open, -1);
    if (error == 0)
        error = ask(connection, &attachment->map, attachment->uffd);
    if (error < 0) {
        lm_sys_close(connection);
        return error;
    }
    lm_sys_close(attachment->socket);
    attachment->socket = connection;
    atomic_fetch_add(&attachment->adoptions, 1);
    return 0;
}

/* ---- no pager ---- */

/* Have what is missing raise a signal; where the kernel cannot do that page by page, all of it. */
static void poison(struct lm_attachment *attachment, uint64_t address, uint64_t length)
{
    size_t page = lm_sys_page_size();
    int error = lm_uffd_fill(attachment->uffd, LM_UFFDIO_POISON, address, NULL, length, page);

    if (error < 0 && error != -EAGAIN)
        (void)lm_sys_protect((void *)(uintptr_t)attachment->address, attachment->length, PROT_NONE);
    (void)lm_uffd_wake(attachment->uffd, address, length);
}

/* Whoever unmaps memory waits until somebody has read of it; and what is missing later is lost, too. */
static void read_and_poison(struct lm_attachment *attachment)
{
    struct lm_uffd_message messages[LM_MESSAGES];
    size_t page = lm_sys_page_size();
    int count, i;

    (void)lm_sys_mark(attachment->uffd, LM_MARK_CLIENTS); /* no pager knows what we read */
    while ((count = lm_sys_read(attachment->uffd, messages, sizeof messages)) >= (int)sizeof *messages)
        for (i = 0; i < count / (int)sizeof *messages; i++)
            if (messages[i].event == LM_UFFD_EVENT_PAGEFAULT)
                poison(attachment, messages[i].address & ~(uint64_t)(page - 1), page);
}

static void lose(struct lm_attachment *attachment)
{
    char line[1500];
    int length = snprintf(line, sizeof line,
                          "lazymem: %s: no pager answers at %s within %d s, so what was not read yet raises "
                          "SIGBUS when touched\n",
                          attachment->url, attachment->path, attachment->deadline_ms / 1000);

    lm_sys_write_patiently(STDERR_FILENO, line,
                           (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
    atomic_store(&attachment->lost, true);
    read_and_poison(attachment);
    poison(attachment, attachment->address, attachment->length);
}

/* Until the connection ends. */
static void watch(struct lm_attachment *attachment)
{
    while (!atomic_load(&attachment->ending) && !lm_sys_has_hung_up(attachment->socket, LM_LOOK_MS))
        ;
}

static void *keep(void *argument)
{
    struct lm_attachment *attachment = argument;

    attachment->isolated = lm_sys_isolate_descriptors(attachment->socket, attachment->uffd) == 0;
    atomic_store(&attachment->ready, true);
    while (!atomic_load(&attachment->ending)) {
        uint64_t until;
        int error = -EPIPE;

        watch(attachment);
        until = lm_sys_now_ns() + (uint64_t)attachment->deadline_ms * 1000000u;
        while (!atomic_load(&attachment->ending)) {
            if (!atomic_load(&attachment->leaving))
                error = attach_again(attachment);
            if (error == 0)
                break;
            if (atomic_load(&attachment->leaving)) /* nobody touches it any more */
                read_and_poison(attachment);
            else if (lm_sys_now_ns() > until)
                break;
            lm_sys_pause(LM_RETRY_US);
        }
        if (error < 0 && !atomic_load(&attachment->ending)) {
            lose(attachment);
            while (!atomic_load(&attachment->ending)) {
                lm_sys_await_input(attachment->uffd, LM_LOOK_MS);
                read_and_poison(attachment);
            }
        }
    }
    lm_sys_close(attachment->socket);
    lm_sys_close(attachment->uffd);
    return NULL;
}

static int take_packet(struct packet *into, const char *bytes, uint32_t length)
{
    if (length > sizeof into->bytes)
        return -EMSGSIZE;
    memcpy(into->bytes, bytes, length);
    into->length = length;
    return 0;
}

int lm_attachment_start(const lm_attachment_spec *spec, lm_attachment **ret_attachment)
{
    struct lm_attachment *attachment;
    lm_pager_ask head;
    void *memory;
    int error, socket, uffd;

    if (strlen(spec->path) >= sizeof attachment->path || spec->map_length < sizeof head)
        return -ENAMETOOLONG;
    error = lm_sys_alloc(sizeof *attachment, &memory);
    if (error < 0)
        return error;
    attachment = memory;
    attachment->process = lm_sys_process();
    snprintf(attachment->path, sizeof attachment->path, "%s", spec->path);
    snprintf(attachment->url, sizeof attachment->url, "%s", spec->url);
    attachment->address = spec->address;
    attachment->length = spec->length;
    attachment->deadline_ms = spec->deadline_ms;
    error = take_packet(&attachment->hello, spec->hello, spec->hello_length);
    if (error == 0)
        error = take_packet(&attachment->open, spec->open, spec->open_length);
    if (error == 0)
        error = take_packet(&attachment->map, spec->map, spec->map_length);
    memcpy(&head, attachment->map.bytes, sizeof head);
    head.flags |= LM_PAGER_ADOPT;
    memcpy(attachment->map.bytes, &head, sizeof head);
    attachment->socket = socket = error < 0 ? error : lm_sys_dup(spec->socket);
    attachment->uffd = uffd = socket < 0 ? socket : lm_sys_dup(spec->uffd);
    error = uffd < 0 ? uffd : lm_sys_thread_start(&attachment->thread, keep, attachment);
    if (error < 0) {
        lm_sys_close(socket);
        lm_sys_close(uffd);
        lm_sys_free(attachment, sizeof *attachment);
        return error;
    }
    /* Not a moment without it: the caller may close everything as soon as it has the memory. */
    while (!atomic_load(&attachment->ready))
        lm_sys_pause(50);
    if (attachment->isolated) { /* the thread has its own */
        lm_sys_close(socket);
        lm_sys_close(uffd);
    }
    lm_sys_close(spec->socket);
    lm_sys_close(spec->uffd);
    *ret_attachment = attachment;
    return 0;
}

void lm_attachment_leave(lm_attachment *attachment)
{
    atomic_store(&attachment->leaving, true);
}

void lm_attachment_free(lm_attachment *attachment)
{
    if (attachment == NULL)
        return;
    if (attachment->process != lm_sys_process())
        return; /* the child of a fork has no such thread */
    atomic_store(&attachment->ending, true);
    pthread_join(attachment->thread, NULL);
    lm_sys_free(attachment, sizeof *attachment);
}

uint64_t lm_attachment_adoptions(lm_attachment *attachment) { return atomic_load(&attachment->adoptions); }
int lm_attachment_is_lost(lm_attachment *attachment) { return atomic_load(&attachment->lost); }
