/* SPDX-License-Identifier: Apache-2.0
 *
 * pager_tree.c: a client of the pager that does not cooperate: after its memory is served it forks by raw system
 * calls, moves, unmaps, gives back and writes pages by a random schedule, children too, and compares every page
 * that it reads with what it must be.
 *
 * usage: pager_tree SOCKET URL RAW SEED STEPS how THREADS end
 *   how: shared (private mapping of the pager's memfd), copy (anonymous, removed pages come again), zero
 *   (anonymous, removed pages read as zeros)
 *   end: leave (the connection is closed at once, the memory goes on being served), stay, return (to the next pager,
 *   should it die)
 * Exit status 0: every byte was right. Otherwise a line says what was wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pager_protocol.h"

#define PAGE 4096u
#define SEGMENTS 4096
#define DEPTH 3

/* What a page must show: a page of the snapshot, zeros, or what was written to it. */
#define ZEROS UINT32_MAX
struct page { uint32_t from; uint32_t stamp; };
struct segment { unsigned char *at; size_t pages; struct page *page; };

static struct segment segments[SEGMENTS];
static size_t segment_count;
static const unsigned char *raw;
static size_t raw_pages;
static bool forgets;
static uint64_t state;
static int depth;
static long checked;

#define DIE(...) (fprintf(stderr, __VA_ARGS__), fprintf(stderr, " (pid %d, depth %d, errno %d)\n", getpid(), depth, errno), _exit(1))

static uint32_t draw(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

/* ---- the protocol ---- */

static int connection;

/* False: there was no answer. */
static bool try_to_ask(lm_pager_ask question, const char *payload, int send, int *ret_descriptor, lm_pager_answer *out)
{
    static unsigned char packet[LM_PAGER_MESSAGE_MAX];
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    size_t length = payload == NULL ? 0 : strlen(payload);
    struct iovec part = { .iov_base = packet, .iov_len = sizeof question + length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
    struct cmsghdr *header;
    ssize_t got;

    question.magic = LM_PAGER_MAGIC;
    question.version = LM_PAGER_VERSION;
    question.payload_length = (uint32_t)length;
    memcpy(packet, &question, sizeof question);
    if (length > 0)
        memcpy(packet + sizeof question, payload, length);
    if (send >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &send, sizeof send);
    }
    if (sendmsg(connection, &message, MSG_NOSIGNAL) < 0)
        return false;
    part.iov_len = sizeof packet;
    message = (struct msghdr){ .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                               .msg_controllen = sizeof control };
    got = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    if (got < (ssize_t)sizeof *out)
        return false;
    memcpy(out, packet, sizeof *out);
    if (out->kind != LM_PAGER_DONE)
        DIE("refused: %.*s", (int)out->payload_length, packet + sizeof *out);
    header = CMSG_FIRSTHDR(&message);
    if (header != NULL && ret_descriptor != NULL)
        memcpy(ret_descriptor, CMSG_DATA(header), sizeof(int));
    return true;
}

static lm_pager_answer ask(lm_pager_ask question, const char *payload, int send, int *ret_descriptor)
{
    lm_pager_answer answer;

    if (!try_to_ask(question, payload, send, ret_descriptor, &answer))
        DIE("no answer");
    return answer;
}

static struct sockaddr_un address = { .sun_family = AF_UNIX };
static char wanted[4096];
static lm_pager_ask mapped;
static int uffd;

/* Whenever the pager dies: to the next one, with what it was told at first, which has changed since. */
static void *come_back(void *nothing)
{
    mapped.flags |= LM_PAGER_ADOPT;
    for (;;) {
        struct pollfd one = { .fd = connection };
        lm_pager_answer answer;
        int memfd = -1;

        (void)poll(&one, 1, -1); /* it hangs up */
        close(connection);
        connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        if (connect(connection, (struct sockaddr *)&address, sizeof address) < 0 ||
            !try_to_ask((lm_pager_ask){ .kind = LM_PAGER_HELLO }, NULL, -1, NULL, &answer) ||
            !try_to_ask((lm_pager_ask){ .kind = LM_PAGER_OPEN }, wanted, -1, &memfd, &answer) ||
            !try_to_ask(mapped, NULL, uffd, NULL, &answer))
            usleep(2000);
        if (memfd >= 0)
            close(memfd);
    }
    return nothing;
}

static unsigned char *attach(const char *path, const char *url, const char *how, size_t *ret_length)
{
    int shared = strcmp(how, "shared") == 0, memfd = -1;
    lm_pager_answer opened;
    unsigned char *memory;

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
        DIE("connect");
    ask((lm_pager_ask){ .kind = LM_PAGER_HELLO, .id = 1 }, NULL, -1, NULL);
    snprintf(wanted, sizeof wanted, "{\"url\": \"%s\"}", url);
    opened = ask((lm_pager_ask){ .kind = LM_PAGER_OPEN, .id = 2 }, wanted, -1, &memfd);
    memory = mmap(NULL, opened.length, PROT_NONE, MAP_PRIVATE | (shared ? 0 : MAP_ANONYMOUS), shared ? memfd : -1, 0);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (memory == MAP_FAILED || uffd < 0)
        DIE("mmap or userfaultfd");
    mapped = (lm_pager_ask){ .kind = LM_PAGER_MAP, .id = 3, .address = (uintptr_t)memory, .length = opened.length,
                             .flags = (shared ? LM_PAGER_SHARED : 0) | (forgets ? LM_PAGER_REMOVED_ZERO : 0) };
    ask(mapped, NULL, uffd, NULL);
    if (mprotect(memory, opened.length, PROT_READ | PROT_WRITE) < 0)
        DIE("mprotect");
    *ret_length = opened.length;
    return memory; /* nothing is closed: the userfaultfd has to stay */
}

/* ---- the oracle ---- */

static void check(const unsigned char *at, struct page want)
{
    static const unsigned char zeros[PAGE];
    const unsigned char *bytes = want.from == ZEROS || want.from >= raw_pages ? zeros : raw + (size_t)want.from * PAGE;

    checked++;
    if (want.stamp != 0) {
        uint32_t seen;

        memcpy(&seen, at, sizeof seen);
        if (seen != want.stamp || memcmp(at + 4, bytes + 4, PAGE - 4) != 0)
            DIE("a written page at %p (from %x) shows %x, not %x", (const void *)at, want.from, seen, want.stamp);
    } else if (memcmp(at, bytes, PAGE) != 0) {
        DIE("page at %p is not page %x: first bytes %02x%02x%02x%02x, not %02x%02x%02x%02x", (const void *)at, want.from,
            at[0], at[1], at[2], at[3], bytes[0], bytes[1], bytes[2], bytes[3]);
    }
}

/* Cut a segment in two at a page. */
static size_t cut(size_t index, size_t pages)
{
    struct segment *segment = &segments[index], second;

    if (pages == 0 || pages >= segment->pages)
        return pages == 0 ? index : index + 1;
    if (segment_count == SEGMENTS)
        return SIZE_MAX;
    second = (struct segment){ segment->at + pages * PAGE, segment->pages - pages, segment->page + pages };
    segment->pages = pages;
    memmove(&segments[index + 2], &segments[index + 1], (segment_count - index - 1) * sizeof *segments);
    segments[index + 1] = second;
    segment_count++;
    return index + 1;
}

static void forget(size_t index)
{
    memmove(&segments[index], &segments[index + 1], (segment_count - index - 1) * sizeof *segments);
    segment_count--;
}

/* ---- the schedule ---- */

/* A few pages of one segment. */
static size_t pick(size_t *ret_first, size_t *ret_pages, size_t most)
{
    size_t index = draw((uint32_t)segment_count), pages = segments[index].pages;

    *ret_first = draw((uint32_t)pages);
    *ret_pages = 1 + draw((uint32_t)(pages - *ret_first < most ? pages - *ret_first : most));
    return index;
}

static void touch(void)
{
    size_t first, pages, index = pick(&first, &pages, 4), i;

    for (i = first; i < first + pages; i++)
        check(segments[index].at + i * PAGE, segments[index].page[i]);
}

static void put(void)
{
    size_t first, pages, index = pick(&first, &pages, 1);
    struct page *page = &segments[index].page[first];
    unsigned char *at = segments[index].at + first * PAGE;

    page->stamp = draw(UINT32_MAX) | 1;
    memcpy(at, &page->stamp, sizeof page->stamp);
    check(at, *page);
}

static void give_back(void)
{
    size_t first, pages, index = pick(&first, &pages, 64), i;
    struct segment *segment = &segments[index];

    if (madvise(segment->at + first * PAGE, pages * PAGE, MADV_DONTNEED) < 0)
        DIE("madvise");
    for (i = first; i < first + pages; i++) {
        segment->page[i].stamp = 0;
        if (forgets)
            segment->page[i].from = ZEROS;
    }
}

static void move(void)
{
    size_t first, pages, index = pick(&first, &pages, 64);
    unsigned char *place, *moved;

    if (segment_count + 2 >= SEGMENTS)
        return;
    index = cut(index, first);
    (void)cut(index, pages);
    place = mmap(NULL, segments[index].pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    moved = mremap(segments[index].at, segments[index].pages * PAGE, segments[index].pages * PAGE,
                   MREMAP_MAYMOVE | MREMAP_FIXED, place);
    if (moved != place)
        DIE("mremap");
    segments[index].at = moved;
}

static void unmap(void)
{
    size_t first, pages, index = pick(&first, &pages, 8);

    if (segment_count + 2 >= SEGMENTS || segment_count < 4)
        return;
    index = cut(index, first);
    (void)cut(index, pages);
    if (munmap(segments[index].at, segments[index].pages * PAGE) < 0)
        DIE("munmap");
    forget(index);
}

static void run(long steps);

/* By the system call, past every handler of fork. */
static void branch(long steps)
{
    bool nested = draw(2);
    pid_t child;
    int status;

    if (depth == DEPTH)
        return;
    child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (child < 0)
        DIE("clone");
    if (child == 0) {
        depth++;
        state ^= 0x9e3779b97f4a7c15u * (uint64_t)getpid();
        run(steps / 3);
        _exit(0);
    }
    if (nested) /* both go on at once */
        run(steps / 4);
    if (waitpid(child, &status, 0) != child || status != 0)
        DIE("the child ended with %x", status);
}

static void run(long steps)
{
    long i;

    for (i = 0; i < steps; i++) {
        uint32_t what = draw(1000);

        if (what < 700)
            touch();
        else if (what < 850)
            put();
        else if (what < 920)
            give_back();
        else if (what < 960)
            move();
        else if (what < 990)
            unmap();
        else
            branch(steps - i);
    }
}

/* ---- threads that go on meanwhile, over memory of their own that nobody changes ---- */

static _Atomic bool stopping;
struct reader { pthread_t thread; unsigned char *at; size_t first, pages; uint64_t state; };

static void *reads(void *argument)
{
    struct reader *reader = argument;

    while (!stopping) {
        size_t i;

        reader->state = reader->state * 6364136223846793005u + 1442695040888963407u;
        i = (reader->state >> 33) % reader->pages;
        check(reader->at + i * PAGE, (struct page){ (uint32_t)(reader->first + i), 0 });
        if ((reader->state >> 20) % 16 == 0 && !forgets)
            (void)madvise(reader->at + i * PAGE, PAGE, MADV_DONTNEED);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    size_t length, pages, own, i, threads;
    struct reader readers[8];
    pthread_t returner;
    unsigned char *memory;
    struct stat file;
    int fd;

    if (argc != 9)
        return 2;
    state = strtoull(argv[4], NULL, 10) * 2654435761u + 1;
    threads = strtoul(argv[7], NULL, 10);
    forgets = strcmp(argv[6], "zero") == 0;
    fd = open(argv[3], O_RDONLY);
    if (fd < 0 || fstat(fd, &file) < 0)
        return 2;
    raw = mmap(NULL, (size_t)file.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    raw_pages = (size_t)file.st_size / PAGE;
    memory = attach(argv[1], argv[2], argv[6], &length);
    if (strcmp(argv[8], "leave") == 0) /* it is left to pagers, to the next ones, too */
        close(connection);
    if (strcmp(argv[8], "return") == 0)
        pthread_create(&returner, NULL, come_back, NULL);
    pages = length / PAGE;
    own = pages - pages / 4; /* the last quarter is the threads' */
    segments[0] = (struct segment){ memory, own, malloc(own * sizeof(struct page)) };
    segment_count = 1;
    for (i = 0; i < own; i++)
        segments[0].page[i] = (struct page){ (uint32_t)i, 0 };
    for (i = 0; i < threads && i < 8; i++) {
        readers[i] = (struct reader){ .at = memory + own * PAGE, .first = own, .pages = pages - own, .state = i + 1 };
        pthread_create(&readers[i].thread, NULL, reads, &readers[i]);
    }
    run(strtol(argv[5], NULL, 10));
    stopping = true;
    for (i = 0; i < threads && i < 8; i++)
        pthread_join(readers[i].thread, NULL);
    for (i = 0; i < segment_count; i++) /* at the end: all of it */
        for (size_t j = 0; j < segments[i].pages; j++)
            check(segments[i].at + j * PAGE, segments[i].page[j]);
    printf("%ld pages were right\n", checked);
    return 0;
}
