/* SPDX-License-Identifier: Apache-2.0
 *
 * firecracker_client.c: what Firecracker is to a pager, without a machine: the guest's memory in two regions, the
 * handshake to the letter, threads that touch pages as vCPUs do, and a balloon that gives some back.
 *
 *   firecracker_client SOCKET FILE KIND FIELDS OPERATIONS SEED
 *
 * KIND: private, shared (memfd), huge (private, 2 MiB pages), huge-shared. FIELDS, of a page's size: both (as it is
 * now), kib (bytes under the wrong name), real-kib, none. FILE: the memory file; its bytes are what is expected.
 * Prints "ok" and exits with 0 if every byte was right; 77 if it may not have such memory here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define VCPUS 3
#define HUGE_PAGE ((size_t)2 << 20)
#ifndef MAP_HUGE_2MB
#define MAP_HUGE_2MB (21 << 26)
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21 << 26)
#endif

struct region { unsigned char *at; size_t size, offset; };
/* What a page has to show. A page's lock is held while it is looked at, written to, or given back. */
struct page { pthread_mutex_t lock; bool zeros; uint64_t written; };

static struct region regions[2];
static struct page *pages;
static const unsigned char *file;
static size_t size, page_size, page_count;
static bool shared;
static _Atomic bool vcpus_are_done;
static long operations;

static void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(errno));
    exit(1);
}

static unsigned char *place(size_t page)
{
    size_t offset = page * page_size;

    return offset < regions[1].offset ? regions[0].at + offset : regions[1].at + (offset - regions[1].offset);
}

static uint64_t word_of(size_t page, size_t i, const struct page *state)
{
    uint64_t word;

    if (state->written != 0)
        return state->written + i;
    if (state->zeros)
        return 0;
    memcpy(&word, file + page * page_size + i * sizeof word, sizeof word);
    return word;
}

static void check(size_t page)
{
    const volatile uint64_t *words = (const volatile uint64_t *)place(page);
    const struct page *state = &pages[page];
    size_t i;

    for (i = 0; i < page_size / sizeof *words; i++) {
        uint64_t found = words[i], wanted = word_of(page, i, state);

        if (found != wanted) {
            fprintf(stderr, "page %zu, word %zu: %#llx, not %#llx (zeros %d, written %#llx)\n", page, i,
                    (unsigned long long)found, (unsigned long long)wanted, state->zeros,
                    (unsigned long long)state->written);
            exit(2);
        }
    }
}

static uint64_t draw(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *vcpu(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 0x9e3779b97f4a7c15u + 1;
    long n;

    for (n = 0; n < operations; n++) {
        size_t page = draw(&state) % page_count, i;

        pthread_mutex_lock(&pages[page].lock);
        if (draw(&state) % 4 == 0) { /* the first touch is a write, or the check that follows is a read */
            uint64_t value = (uint64_t)(page + 1) << 48 | (draw(&state) & 0xfffffff) << 20 | 1;
            volatile uint64_t *words = (volatile uint64_t *)place(page);

            for (i = 0; i < page_size / sizeof *words; i++)
                words[i] = value + i;
            pages[page].written = value;
        }
        check(page);
        pthread_mutex_unlock(&pages[page].lock);
    }
    return NULL;
}

/* Looks without asking anybody, so while pages are written to and given back, too: a word is the file's, or zero, or
 * what is written to that place and no other. */
static void *onlooker(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 0x9e3779b97f4a7c15u + 7;

    while (!vcpus_are_done) {
        size_t page = draw(&state) % page_count, i = draw(&state) % (page_size / sizeof(uint64_t));
        const struct page untouched = { .zeros = false };
        uint64_t found = ((const volatile uint64_t *)place(page))[i];

        if (found != 0 && found != word_of(page, i, &untouched) &&
            (found >> 48 != page + 1 || (found & 0xfffff) != i + 1)) {
            fprintf(stderr, "page %zu, word %zu: %#llx is of nowhere\n", page, i, (unsigned long long)found);
            exit(3);
        }
        usleep(50);
    }
    return NULL;
}

static void *balloon(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 0x9e3779b97f4a7c15u + 3;

    while (!vcpus_are_done) {
        size_t count = 1 + draw(&state) % (page_count < 64 ? 1 : 16), first = draw(&state) % (page_count - count), i;

        if (first * page_size < regions[1].offset && (first + count) * page_size > regions[1].offset)
            continue;
        for (i = first; i < first + count; i++)
            pthread_mutex_lock(&pages[i].lock);
        if (madvise(place(first), count * page_size, shared ? MADV_REMOVE : MADV_DONTNEED) < 0)
            die("madvise");
        for (i = first; i < first + count; i++) {
            pages[i].zeros = true;
            pages[i].written = 0;
        }
        check(first + draw(&state) % count);
        for (i = first + count; i-- > first;)
            pthread_mutex_unlock(&pages[i].lock);
        usleep(200);
    }
    return NULL;
}

/* ---- memory ---- */

static void *map_memory(const char *kind, size_t length)
{
    bool huge = strncmp(kind, "huge", 4) == 0;
    int flags = MAP_NORESERVE | MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB | MAP_HUGE_2MB : 0), fd = -1;
    void *memory;

    if (shared) {
        fd = memfd_create("guest", MFD_CLOEXEC | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
        if (fd < 0 || ftruncate(fd, (off_t)length) < 0)
            return MAP_FAILED;
        flags = MAP_NORESERVE | MAP_SHARED;
    }
    memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (fd >= 0)
        close(fd);
    return memory;
}

static int make_userfaultfd(void)
{
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), i;

    if (fd < 0 && errno == EPERM) {
        perror("userfaultfd");
        exit(77);
    }
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) < 0)
        die("userfaultfd");
    for (i = 0; i < 2; i++) {
        struct uffdio_register request = {
            .range = { .start = (uintptr_t)regions[i].at, .len = regions[i].size },
            .mode = UFFDIO_REGISTER_MODE_MISSING,
        };

        if (ioctl(fd, UFFDIO_REGISTER, &request) < 0)
            die("UFFDIO_REGISTER");
    }
    return fd;
}

/* ---- the handshake ---- */

static void send_handshake(const char *path, const char *fields, int uffd)
{
    union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof(int))]; } control = { .bytes = { 0 } };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    char text[1024] = "[", size_of_page[128] = "";
    struct iovec part = { .iov_base = text };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                              .msg_controllen = sizeof control };
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), i;

    if (strcmp(fields, "both") == 0)
        snprintf(size_of_page, sizeof size_of_page, ",\"page_size\":%zu,\"page_size_kib\":%zu", page_size, page_size);
    else if (strcmp(fields, "none") != 0)
        snprintf(size_of_page, sizeof size_of_page, ",\"page_size_kib\":%zu",
                 strcmp(fields, "kib") == 0 ? page_size : page_size / 1024);
    for (i = 0; i < 2; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text),
                 "%s{\"base_host_virt_addr\":%llu,\"size\":%zu,\"offset\":%zu%s}", i == 0 ? "" : ",",
                 (unsigned long long)(uintptr_t)regions[i].at, regions[i].size, regions[i].offset, size_of_page);
    strcat(text, "]");
    part.iov_len = strlen(text);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &uffd, sizeof uffd);
    if (strlen(path) >= sizeof address.sun_path)
        die("%s", path);
    strcpy(address.sun_path, path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("%s", path);
    if (sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        die("sendmsg");
    if (strcmp(fields, "both") != 0)
        close(fd); /* as older versions; newer ones leave it open */
}

int main(int argc, char **argv)
{
    pthread_t threads[VCPUS + 2];
    struct stat facts;
    size_t i, seed;
    int fd;

    if (argc != 7)
        return 64;
    fd = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &facts) < 0)
        die("%s", argv[2]);
    size = (size_t)facts.st_size;
    file = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    shared = strstr(argv[3], "shared") != NULL;
    page_size = strncmp(argv[3], "huge", 4) == 0 ? HUGE_PAGE : 4096;
    page_count = size / page_size;
    operations = atol(argv[5]);
    seed = (size_t)atol(argv[6]);
    regions[0].size = page_count * 3 / 4 * page_size; /* as on both sides of the gap below 4 GiB */
    regions[1].offset = regions[0].size;
    regions[1].size = size - regions[0].size;
    for (i = 0; i < 2; i++) {
        regions[i].at = map_memory(argv[3], regions[i].size);
        if (regions[i].at == MAP_FAILED) {
            perror(argv[3]);
            return 77;
        }
    }
    pages = calloc(page_count, sizeof *pages);
    for (i = 0; i < page_count; i++)
        pthread_mutex_init(&pages[i].lock, NULL);
    fd = make_userfaultfd();
    send_handshake(argv[1], argv[4], fd);
    for (i = 0; i < VCPUS + 2; i++)
        if (pthread_create(&threads[i], NULL, i < VCPUS ? vcpu : i == VCPUS ? balloon : onlooker,
                           (void *)(seed * 16 + i)) != 0)
            die("pthread_create");
    for (i = 0; i < VCPUS + 2; i++) {
        if (i == VCPUS)
            vcpus_are_done = true;
        pthread_join(threads[i], NULL);
    }
    for (i = 0; i < page_count; i++)
        check(i);
    puts("ok");
    return 0;
}
