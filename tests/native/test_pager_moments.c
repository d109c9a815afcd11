/* SPDX-License-Identifier: Apache-2.0
 *
 * Moments of a pager that hardly ever come, brought about: between two steps of its own, or in want of memory, with
 * a thread of a client's waiting. Functions of the core that are called from one file of it into another stop here
 * (the linker's --wrap, programs.py), and its clock can be put forward. Whoever is not served at last waits until
 * the alarm ends the test.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "engine.h"
#include "harness.h"
#include "pager.h"
#include "pager_client.h"
#include "pager_protocol.h"
#include "pager_stock.h"
#include "uffd.h"

#define CHUNK  65536u
#define CHUNKS 8u
#define PAGE   4096u
#define SIZE   (CHUNKS * CHUNK)
#define HELD   5u /* is decoded when the test lets it be */
#define LIMIT  20 /* seconds */

#define PAGE_OF(chunk) ((chunk) * (CHUNK / PAGE))

static unsigned char content[SIZE];
static lm_region *stock;

/* ---- where the core stops ---- */

static struct {
    _Atomic uint64_t chunk; /* the next look at it is the one before the moment */
    sem_t come, over; /* the moment; and what was to happen in it */
} moment = { .chunk = UINT64_MAX };
static __thread bool looked;

const lm_chunk_record *__real_lm_table_record(const struct lm_table *table, uint64_t chunk);
const lm_chunk_record *__wrap_lm_table_record(const struct lm_table *table, uint64_t chunk);
const lm_chunk_record *__wrap_lm_table_record(const struct lm_table *table, uint64_t chunk)
{
    uint64_t wanted = chunk;

    looked = looked || atomic_compare_exchange_strong(&moment.chunk, &wanted, UINT64_MAX);
    return __real_lm_table_record(table, chunk);
}

/* What comes after the look takes a lock, to have somebody wait. */
int __real_pthread_mutex_lock(pthread_mutex_t *mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex)
{
    if (looked) {
        looked = false;
        sem_post(&moment.come);
        sem_wait(&moment.over);
    }
    return __real_pthread_mutex_lock(mutex);
}

static _Atomic uint64_t settled = UINT64_MAX;

void __real_lm_pager_settled(struct lm_region *region, uint64_t chunk, bool locked);
void __wrap_lm_pager_settled(struct lm_region *region, uint64_t chunk, bool locked);
void __wrap_lm_pager_settled(struct lm_region *region, uint64_t chunk, bool locked)
{
    __real_lm_pager_settled(region, chunk, locked);
    atomic_store(&settled, chunk);
}

static _Atomic uint64_t ahead_ns;
static _Atomic unsigned looks; /* whether a space's process is over */

uint64_t __real_lm_sys_now_ns(void);
uint64_t __wrap_lm_sys_now_ns(void);
uint64_t __wrap_lm_sys_now_ns(void) { return __real_lm_sys_now_ns() + atomic_load(&ahead_ns); }

bool __real_lm_uffd_is_over(int fd);
bool __wrap_lm_uffd_is_over(int fd);
bool __wrap_lm_uffd_is_over(int fd)
{
    bool over = __real_lm_uffd_is_over(fd);

    atomic_fetch_add(&looks, 1);
    return over;
}

static _Atomic bool no_memory;

void *__real_malloc(size_t length);
void *__wrap_malloc(size_t length);
void *__wrap_malloc(size_t length) { return atomic_load(&no_memory) ? NULL : __real_malloc(length); }

/* The next descriptor to be watched cannot be. */
static _Atomic bool no_room;
static _Atomic uint32_t refused, watched_late;

int __real_lm_sys_watch(int poller, int fd, uint32_t events, uint32_t tag);
int __wrap_lm_sys_watch(int poller, int fd, uint32_t events, uint32_t tag);
int __wrap_lm_sys_watch(int poller, int fd, uint32_t events, uint32_t tag)
{
    int error;

    if (atomic_exchange(&no_room, false)) {
        atomic_store(&refused, tag);
        return -ENOSPC;
    }
    error = __real_lm_sys_watch(poller, fd, events, tag);
    if (error == 0 && tag == atomic_load(&refused))
        atomic_store(&watched_late, tag);
    return error;
}

static sem_t decoding, decoded; /* HELD */

static void *create_zstd(void) { return __real_malloc(1); }
static size_t free_zstd(void *context) { free(context); return 0; }
static unsigned is_error(size_t result) { return result == 0; }

static size_t decompress(void *context, void *out, size_t length, const void *stored, size_t stored_length)
{
    CHECK(context != NULL && stored_length == length);
    sem_post(&decoding);
    while (sem_wait(&decoded) < 0)
        ;
    memcpy(out, stored, length);
    return length;
}

/* ---- a client of two threads, each of which does as it is told ---- */

enum { READ, GIVE_BACK, UNMAP, FORK, END };
struct order { int what; unsigned page; };
#define BUS     (-SIGBUS) /* what READ came to, else the byte */
#define NOTHING (-SIGSEGV)

static unsigned char *memory;
static __thread sigjmp_buf back;

static void on_signal(int number) { siglongjmp(back, number); }

static int read_byte(const volatile unsigned char *at)
{
    int number = sigsetjmp(back, 1);

    return number == 0 ? *at : -number;
}

static void obey(int line)
{
    for (;;) {
        struct order order;
        unsigned char *at;
        int answer = 0, status = 0;
        pid_t child;

        CHECK(receive_descriptor(line, &order, sizeof order) == -1);
        at = memory + (size_t)order.page * PAGE;
        switch (order.what) {
        case READ: answer = read_byte(at); break;
        case GIVE_BACK: answer = madvise(at, PAGE, MADV_DONTNEED); break;
        case UNMAP: answer = munmap(at, PAGE); break;
        case FORK: /* the child is told from now on */
            child = fork();
            CHECK(child >= 0);
            if (child > 0) {
                CHECK(waitpid(child, &status, 0) == child && status == 0);
                return;
            }
            alarm(LIMIT);
            break;
        default: _exit(0);
        }
        send_descriptor(line, -1, &answer, sizeof answer);
    }
}

static void *obey_too(void *line)
{
    obey(*(int *)line);
    return NULL;
}

static void be_client(int line, int other)
{
    pthread_t thread;
    char word;
    int memfd, uffd;

    alarm(LIMIT);
    signal(SIGBUS, on_signal);
    signal(SIGSEGV, on_signal);
    memfd = receive_descriptor(line, &word, 1);
    memory = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    CHECK(memory != MAP_FAILED && memfd >= 0 && uffd >= 0);
    send_descriptor(line, uffd, &memory, sizeof memory);
    CHECK(hear(line) == 'r' && mprotect(memory, SIZE, PROT_READ | PROT_WRITE) == 0);
    if (other >= 0)
        CHECK(pthread_create(&thread, NULL, obey_too, &other) == 0);
    obey(line);
    _exit(0);
}

struct client { pid_t pid; int lines[2]; uint32_t space; };

static void start_client(struct client *client, bool threads)
{
    int pairs[2][2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pairs[0]) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pairs[1]) == 0);
    client->pid = fork();
    CHECK(client->pid >= 0);
    if (client->pid == 0)
        be_client(pairs[0][1], threads ? pairs[1][1] : -1);
    client->lines[0] = pairs[0][0];
    client->lines[1] = pairs[1][0];
    close(pairs[0][1]);
    close(pairs[1][1]);
}

static void order(int line, int what, unsigned page)
{
    send_descriptor(line, -1, &(struct order){ what, page }, sizeof(struct order));
}

static int answer(int line)
{
    int value;

    CHECK(receive_descriptor(line, &value, sizeof value) == -1);
    return value;
}

static int have(int line, int what, unsigned page)
{
    order(line, what, page);
    return answer(line);
}

static void serve(struct client *client)
{
    int memfd = lm_region_descriptor(stock), uffd;
    uint32_t features;
    unsigned char *at;

    send_descriptor(client->lines[0], memfd, "m", 1);
    uffd = receive_descriptor(client->lines[0], &at, sizeof at);
    CHECK(lm_pager_open_space(uffd, 1, &client->space, &features) == 0 && (features & LM_PAGER_FOLLOWS_FORK));
    CHECK(lm_pager_map(client->space, (uintptr_t)at, SIZE, stock, 0, PAGE, LM_PAGER_REMOVED_ZERO) == 0);
    lm_pager_leave_space(client->space);
    tell(client->lines[0], 'r');
    close(memfd);
    close(uffd);
}

/* Its process and its child have ended; so all that is known of them goes. */
static void end(struct client *client)
{
    lm_space_report reports[8];
    uint32_t count = lm_pager_spaces(reports, 8), i;
    int status;

    order(client->lines[0], END, 0);
    CHECK(waitpid(client->pid, &status, 0) == client->pid && status == 0);
    for (i = 0; i < count && i < 8; i++)
        lm_pager_close_space(reports[i].space);
    close(client->lines[0]);
    close(client->lines[1]);
}

static uint32_t child_of(uint32_t parent)
{
    lm_space_report reports[8];
    uint32_t count = lm_pager_spaces(reports, 8), i;

    for (i = 0; i < count && i < 8; i++)
        if (reports[i].space != 0 && reports[i].parent == parent)
            return reports[i].space;
    return 0;
}

/* Have the pager look at all of its spaces, as it does once a second. */
static void have_it_look(unsigned spaces)
{
    unsigned before = atomic_load(&looks);

    atomic_fetch_add(&ahead_ns, UINT64_C(2000000000));
    lm_pager_settled(stock, 0, true); /* the bell */
    while (atomic_load(&looks) < before + spaces)
        usleep(1000);
}

static int byte_at(unsigned page) { return content[(size_t)page * PAGE]; }

/* ---- the moments ---- */

/* Nobody waits yet when the chunk is settled, and whoever then waits is told by nobody. */
static void test_a_chunk_settled_between_the_look_and_the_wait_is_looked_at_again(struct client *client)
{
    serve(client);
    atomic_store(&moment.chunk, 2);
    order(client->lines[0], READ, PAGE_OF(2));
    sem_wait(&moment.come);
    CHECK(lm_region_prefetch(stock, 2, 1, 1) == 0);
    while (atomic_load(&settled) != 2)
        usleep(100);
    sem_post(&moment.over);
    CHECK(answer(client->lines[0]) == byte_at(PAGE_OF(2)));
    end(client);
}

/* Nothing is believed of a child, which has no connection. Were its userfaultfd closed, it would read zeros. */
static void test_a_child_that_is_disbelieved_never_reads_zeros(struct client *client)
{
    uint32_t child;
    int line = client->lines[0], i;

    serve(client);
    CHECK(have(line, READ, 0) == byte_at(0));
    CHECK(have(line, FORK, 0) == 0);
    while ((child = child_of(client->space)) == 0)
        usleep(100);
    CHECK(lm_pager_parts(child, NULL, 0) == 1);
    atomic_store(&no_memory, true);
    CHECK(have(line, GIVE_BACK, 1) == 0);
    CHECK(lm_pager_parts(child, NULL, 0) == 0); /* whoever reads an event records it before letting go */
    atomic_store(&no_memory, false);
    for (i = 0; i < 4; i++)
        have_it_look(2);
    CHECK(have(line, READ, PAGE_OF(3)) == BUS);
    CHECK(have(line, READ, 1) == BUS);
    CHECK(have(line, READ, 0) == byte_at(0));
    end(client);
}

/* A child's userfaultfd that there was no room for in the poller. */
static void test_a_child_that_cannot_be_watched_is_watched_later(struct client *client)
{
    serve(client);
    atomic_store(&no_room, true);
    CHECK(have(client->lines[0], FORK, 0) == 0);
    while (child_of(client->space) == 0)
        usleep(100);
    while (atomic_load(&watched_late) == 0)
        have_it_look(1);
    CHECK(have(client->lines[0], READ, PAGE_OF(1)) == byte_at(PAGE_OF(1)));
    end(client);
}

/* A thread waits for a chunk while another changes the memory: that lies somewhere else then, or nowhere, or is not
 * known, so the chunk is not delivered to where the thread waits. */
static void test_who_waits_where_memory_changes_goes_on(struct client *client, int what, int expected)
{
    bool disbelieved = expected == BUS;

    serve(client);
    order(client->lines[1], READ, PAGE_OF(HELD));
    sem_wait(&decoding); /* it is waited for by now */
    atomic_store(&no_memory, disbelieved);
    CHECK(have(client->lines[0], what, disbelieved ? 0 : PAGE_OF(HELD)) == 0);
    CHECK(lm_pager_parts(client->space, NULL, 0) == (disbelieved ? 0 : what == UNMAP ? 2 : 3));
    atomic_store(&no_memory, false);
    sem_post(&decoded);
    CHECK(answer(client->lines[1]) == expected);
    end(client);
}

static void open_stock(void)
{
    stock = open_stock_of(content, CHUNKS, CHUNK, HELD, LM_CODEC_ZSTD, 0);
}

static void close_stock(void)
{
    lm_region_free(stock);
    stock = NULL;
}

int main(void)
{
    struct client clients[6];
    unsigned i;

    if (!has_userfaultfd())
        return 77;
    alarm(LIMIT);
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_CREATE, (void *)create_zstd) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_FREE, (void *)free_zstd) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_DECOMPRESS, (void *)decompress) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_IS_ERROR, (void *)is_error) == 0);
    sem_init(&moment.come, 0, 0);
    sem_init(&moment.over, 0, 0);
    sem_init(&decoding, 0, 0);
    sem_init(&decoded, 0, 0);
    fill_random(content, sizeof content, 3);
    for (i = 0; i < SIZE; i += PAGE)
        content[i] |= 1; /* never 0 */
    for (i = 0; i < 6; i++)
        start_client(&clients[i], i >= 3);
    open_stock();
    CHECK(lm_pager_start(2) == 0);
    test_a_chunk_settled_between_the_look_and_the_wait_is_looked_at_again(&clients[0]);
    test_a_child_that_is_disbelieved_never_reads_zeros(&clients[1]);
    test_a_child_that_cannot_be_watched_is_watched_later(&clients[2]);
    test_who_waits_where_memory_changes_goes_on(&clients[3], GIVE_BACK, 0);
    close_stock(); /* the chunk is held again */
    open_stock();
    test_who_waits_where_memory_changes_goes_on(&clients[4], UNMAP, NOTHING);
    close_stock();
    open_stock();
    test_who_waits_where_memory_changes_goes_on(&clients[5], GIVE_BACK, BUS);
    lm_pager_stop();
    close_stock();
    CHECK(lm_engine_region_count() == 0);
    puts("ok");
    return 0;
}
