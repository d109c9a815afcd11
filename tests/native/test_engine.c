/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine under threads: many touch, some prefetch, regions open and close, chunks fail. Driven from
 * C so that it runs under ASan/UBSan and under TSan. Argument "fork" adds children of a fork, which the
 * sanitizers do not survive: their own locks know nothing of it. Argument "sigsegv" takes touches as signals,
 * in place of userfaultfd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "harness.h"

#define CHUNK  65536u
#define CHUNKS 48u
#define ZEROS  8u /* of them, in the middle */
#define STORED (CHUNKS - ZEROS)
#define TAIL   1000u /* bytes of content in the last chunk */

static unsigned char *content; /* what the region must show */
static int backend;
static int composed; /* 1: every region of these tests shows its content by strips */
static lm_strip strips[2000];

static int make_source(lm_chunk_record *records)
{
    int fd = memfd_create("source", MFD_CLOEXEC);
    uint64_t at = 0;
    unsigned i;

    CHECK(fd >= 0);
    for (i = 0; i < STORED; i++) {
        unsigned chunk = i < STORED / 2 ? i : i + ZEROS;
        unsigned char *bytes = content + (size_t)chunk * CHUNK, planes[CHUNK];
        size_t length = chunk == CHUNKS - 1 ? TAIL : CHUNK;

        fill_random(bytes, length, chunk + 1);
        CHECK(lm_planes_split(bytes, planes, length, 4, LM_FILTER_PLANES + (int)(i % 4 / 2)) == 0);
        records[i] = (lm_chunk_record){ .offset = at, .stored_length = (uint32_t)length };
        if (i % 2) {
            records[i].filter = (uint8_t)(LM_FILTER_PLANES + i % 4 / 2);
            records[i].width = 4;
        }
        records[i].checksum = lm_codec_checksum(i % 2 ? planes : bytes, length);
        CHECK(pwrite(fd, i % 2 ? planes : bytes, length, (off_t)at) == (ssize_t)length);
        at += length;
    }
    return fd;
}

static lm_chunk_record records[STORED];
static lm_run runs[] = {
    { 0, STORED / 2, 0 }, { STORED / 2, ZEROS, LM_ZERO_RUN }, { STORED / 2 + ZEROS, STORED / 2, STORED / 2 },
};
static uint64_t source_size = (STORED - 1) * (uint64_t)CHUNK + TAIL;
static int source;

static int open_region(lm_region **ret_region)
{
    lm_region_spec spec = {
        .content_size = (CHUNKS - 1) * (uint64_t)CHUNK + TAIL,
        .chunk_size = CHUNK,
        .backend = backend,
        .writable = 1,
        .threads = 3,
        .readahead = 4,
        .runs = runs,
        .run_count = 3,
        .records = records,
        .record_count = STORED,
        .fds = &source,
        .source_sizes = &source_size,
        .source_count = 1,
        .url = "memfd",
    };

    if (composed)
        compose_of_itself(&spec, strips, sizeof strips / sizeof *strips, 3001);
    return lm_region_open(&spec, ret_region);
}

struct toucher {
    lm_region *region;
    uint64_t seed;
};

static void *touch(void *argument)
{
    struct toucher *self = argument;
    const unsigned char *shown = lm_region_address(self->region);
    int i;

    for (i = 0; i < 400; i++) {
        size_t at = next_random(&self->seed) % ((size_t)CHUNKS * CHUNK);

        CHECK(shown[at] == content[at]);
    }
    return NULL;
}

static void *prefetch(void *argument)
{
    struct toucher *self = argument;
    uint64_t cursor = 0, failed;
    int result;

    CHECK(lm_region_prefetch(self->region, 0, CHUNKS, 0) == 0);
    while ((result = lm_region_wait(self->region, 0, CHUNKS, 5, &cursor, &failed)) == 0)
        ;
    CHECK(result == 1);
    return NULL;
}

static void test_threads_read_right_bytes(void)
{
    int round;

    for (round = 0; round < 20; round++) {
        struct toucher touchers[5];
        pthread_t threads[5];
        lm_region *region;
        lm_stats stats;
        int i;

        CHECK(open_region(&region) == 0);
        for (i = 0; i < 5; i++) {
            touchers[i] = (struct toucher){ region, (uint64_t)(100 * round + i + 1) };
            CHECK(pthread_create(&threads[i], NULL, i == 4 ? prefetch : touch, &touchers[i]) == 0);
        }
        for (i = 0; i < 5; i++)
            pthread_join(threads[i], NULL);
        CHECK(memcmp(lm_region_address(region), content, (size_t)CHUNKS * CHUNK) == 0);
        lm_region_stats(region, &stats);
        CHECK(stats.chunks_demand + stats.chunks_prefetch <= CHUNKS);
        CHECK(stats.chunks_failed == 0);
        lm_region_free(region);
        CHECK(lm_engine_region_count() == 0 && lm_engine_thread_count() == 0);
    }
}

static void *close_it(void *argument)
{
    lm_region_close(argument);
    return NULL;
}

static void test_close_while_a_prefetch_waits(void)
{
    int round;

    for (round = 0; round < 50; round++) {
        uint64_t cursor = 0, failed;
        pthread_t closers[2];
        lm_region *region;
        lm_stats stats;
        int result, i;

        CHECK(open_region(&region) == 0);
        CHECK(lm_region_prefetch(region, 0, CHUNKS, 0) == 0);
        for (i = 0; i < 2; i++)
            CHECK(pthread_create(&closers[i], NULL, close_it, region) == 0);
        while ((result = lm_region_wait(region, 0, CHUNKS, 1000, &cursor, &failed)) == 0)
            ;
        CHECK(result == LM_E_CLOSED || result == 1);
        for (i = 0; i < 2; i++)
            pthread_join(closers[i], NULL);
        CHECK(lm_region_prefetch(region, 0, 1, 0) == LM_E_CLOSED);
        CHECK(lm_region_stats(region, &stats) == LM_E_CLOSED);
        lm_region_free(region);
        CHECK(lm_engine_region_count() == 0 && lm_engine_thread_count() == 0);
    }
}

/* A resolver may have read a message before close() looked for work, and make work of it afterwards. */
static void test_close_waits_for_work_that_is_made_late(void)
{
    lm_region *region;
    pthread_t closer;
    int i;

    CHECK(open_region(&region) == 0);
    pthread_mutex_lock(&lm_engine.lifecycle); /* close() gets as far as this */
    CHECK(pthread_create(&closer, NULL, close_it, region) == 0);
    for (i = 0; i < 1000; i++) {
        pthread_mutex_lock(&lm_engine.lock);
        i -= !region->closing;
        pthread_mutex_unlock(&lm_engine.lock);
        sched_yield();
    }
    pthread_mutex_lock(&lm_engine.lock);
    region->tasks++; /* as a resolver does it */
    pthread_mutex_unlock(&lm_engine.lock);
    pthread_mutex_unlock(&lm_engine.lifecycle);
    for (i = 0; i < 1000; i++) {
        CHECK(lm_engine_region_count() == 1); /* takes lifecycle */
        sched_yield();
    }
    pthread_mutex_lock(&lm_engine.lock);
    CHECK(!region->closed);
    region->tasks--;
    pthread_cond_broadcast(&lm_engine.progress);
    pthread_mutex_unlock(&lm_engine.lock);
    pthread_join(closer, NULL);
    CHECK(region->closed);
    lm_region_free(region);
}

static void test_failed_chunk_is_named_and_heals(void)
{
    uint64_t cursor = 0, failed = 0;
    unsigned char byte = 0, was;
    uint8_t states[CHUNKS];
    lm_region *region;
    off_t at = (off_t)records[5].offset + 10;
    int result;

    CHECK(pread(source, &was, 1, at) == 1);
    byte = (unsigned char)(was ^ 1);
    CHECK(pwrite(source, &byte, 1, at) == 1);
    CHECK(open_region(&region) == 0);
    CHECK(lm_region_prefetch(region, 0, CHUNKS, 0) == 0);
    while ((result = lm_region_wait(region, 0, CHUNKS, 5, &cursor, &failed)) == 0)
        ;
    CHECK(result == LM_E_CHECKSUM && failed == 5);
    CHECK(lm_region_states(region, 0, CHUNKS, states) == 0 && states[5] == LM_STATE_FAILED);
    CHECK(pwrite(source, &was, 1, at) == 1);
    cursor = 0;
    CHECK(lm_region_prefetch(region, 0, CHUNKS, 0) == 0);
    while ((result = lm_region_wait(region, 0, CHUNKS, 5, &cursor, &failed)) == 0)
        ;
    CHECK(result == 1);
    CHECK(memcmp(lm_region_address(region), content, (size_t)CHUNKS * CHUNK) == 0);
    lm_region_free(region);
}

/* A touch of a chunk that cannot be had ends in a signal, with UFFDIO_POISON and without it; asked for
 * again, the chunk heals. `failing` is what the touching child must die of. */
static void test_failed_touch(int failing, unsigned without)
{
    off_t at = (off_t)records[7].offset + 100;
    unsigned char was, byte;
    lm_region *region;
    int status;
    pid_t pid;

    CHECK(pread(source, &was, 1, at) == 1);
    byte = (unsigned char)(was ^ 0x80);
    CHECK(pwrite(source, &byte, 1, at) == 1);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(20);
        CHECK(dup2(open("/dev/null", O_WRONLY), STDERR_FILENO) >= 0);
        signal(failing, SIG_DFL);
        CHECK(open_region(&region) == 0);
        lm_engine.uffds[region->uffd].can &= ~without;
        _exit(((volatile unsigned char *)lm_region_address(region))[7 * CHUNK] == content[7 * CHUNK]);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == failing);
    CHECK(pwrite(source, &was, 1, at) == 1);
}

static void test_bad_descriptions_are_refused(void)
{
    lm_region_spec spec = { .content_size = 1, .chunk_size = 12345, .url = "" };
    lm_region *region = NULL;

    CHECK(lm_region_open(&spec, &region) == -EINVAL);
    spec.chunk_size = CHUNK;
    spec.content_size = UINT64_MAX;
    CHECK(lm_region_open(&spec, &region) == -EINVAL);
    spec.content_size = 1;
    CHECK(lm_region_open(&spec, &region) == -EINVAL); /* no run covers it */
    CHECK(region == NULL && lm_engine_region_count() == 0 && lm_engine_thread_count() == 0);
}

static int open_with(uint64_t strip, lm_strip wrong)
{
    lm_run run = { 0, 1, LM_ZERO_RUN };
    lm_region_spec spec = { .content_size = CHUNK, .chunk_size = CHUNK, .runs = &run, .run_count = 1,
                            .backend = backend, .url = "" };
    lm_region *region = NULL;
    int error;

    compose_of_itself(&spec, strips, 3, CHUNK / 2);
    strips[strip] = wrong;
    error = lm_region_open(&spec, &region);
    lm_region_free(region);
    return error;
}

static void test_bad_strips_are_refused(void)
{
    uint32_t widen = LM_FLOAT_16 << 8 | LM_FLOAT_32;

    CHECK(open_with(2, (lm_strip){ .to = CHUNK / 2 + 1, .from = 0, .length = CHUNK / 2 - 1 }) == 0);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = 0, .length = 2, .cast = widen }) == 0);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK / 2, .from = 0, .length = 1 }) == -EINVAL); /* overlaps */
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 1, .from = 0, .length = 2 }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = 0, .length = 4, .cast = widen }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 6, .from = 0, .length = 2, .cast = widen }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = 0, .length = 1, .cast = widen }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = CHUNK - 1, .length = 2 }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = UINT64_MAX, .length = 2 }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = 0, .length = 0 }) == -EINVAL);
    CHECK(open_with(2, (lm_strip){ .to = CHUNK - 4, .from = 0, .length = 2, .cast = 77 }) == -EINVAL);
    CHECK(lm_engine_region_count() == 0);
}

/* The application gives pages back; the region shows the same bytes again, not zeros. */
static void test_pages_given_back_come_again(void)
{
    lm_region *region;
    unsigned char *shown;
    size_t i;

    CHECK(open_region(&region) == 0);
    shown = lm_region_address(region);
    for (i = 0; i < (size_t)CHUNKS * CHUNK; i += 4096)
        CHECK(shown[i] == content[i]);
    CHECK(madvise(shown + 8192, 5 * CHUNK, MADV_DONTNEED) == 0);
    CHECK(memcmp(shown, content, (size_t)CHUNKS * CHUNK) == 0);
    lm_region_free(region);
}

static void *evict(void *argument)
{
    struct toucher *self = argument;
    int i;

    for (i = 0; i < 300; i++)
        CHECK(lm_region_evict(self->region, next_random(&self->seed) % CHUNKS, 1) == 0);
    return NULL;
}

/* Chunks are given back while others touch and prefetch them. */
static void test_eviction_races_touches(void)
{
    int round, i;

    for (round = 0; round < 10; round++) {
        struct toucher touchers[5];
        pthread_t threads[5];
        lm_region *region;

        CHECK(open_region(&region) == 0);
        for (i = 0; i < 5; i++) {
            touchers[i] = (struct toucher){ region, (uint64_t)(100 * round + i + 1) };
            CHECK(pthread_create(&threads[i], NULL, i < 2 ? evict : touch, &touchers[i]) == 0);
        }
        for (i = 0; i < 5; i++)
            pthread_join(threads[i], NULL);
        CHECK(memcmp(lm_region_address(region), content, (size_t)CHUNKS * CHUNK) == 0);
        CHECK(lm_region_evict(region, 0, CHUNKS + 1) == -EINVAL);
        lm_region_free(region);
    }
}

/* A library that was here before us, whose fork handler takes a lock that a thread holds while it
 * touches lazy memory: faults must be served until the fork itself. */
static pthread_mutex_t elsewhere = PTHREAD_MUTEX_INITIALIZER;

static void lock_elsewhere(void) { pthread_mutex_lock(&elsewhere); }
static void unlock_elsewhere(void) { pthread_mutex_unlock(&elsewhere); }

/* Before the core's own constructor, so that this handler runs after the core's. */
__attribute__((constructor(101))) static void install_elsewhere(void)
{
    CHECK(pthread_atfork(lock_elsewhere, unlock_elsewhere, unlock_elsewhere) == 0);
}

static void *touch_under_lock(void *argument)
{
    const volatile unsigned char *shown = lm_region_address(argument);
    size_t chunk;

    for (chunk = 0; chunk < CHUNKS; chunk++) {
        pthread_mutex_lock(&elsewhere);
        CHECK(shown[chunk * CHUNK] == content[chunk * CHUNK]);
        pthread_mutex_unlock(&elsewhere);
    }
    return NULL;
}

static void test_fork_waits_for_a_thread_that_touches(void)
{
    int round;

    alarm(30);
    for (round = 0; round < 30; round++) {
        lm_region *region;
        pthread_t thread;
        int status, i;

        CHECK(open_region(&region) == 0);
        CHECK(pthread_create(&thread, NULL, touch_under_lock, region) == 0);
        for (i = 0; i < 3; i++) {
            pid_t pid = fork();

            CHECK(pid >= 0);
            if (pid == 0)
                _exit(0);
            CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        }
        pthread_join(thread, NULL);
        lm_region_free(region);
    }
    alarm(0);
}

static void test_fork_during_touches(void)
{
    int round;

    for (round = 0; round < 10; round++) {
        struct toucher toucher = { NULL, (uint64_t)round + 1 };
        pthread_t thread;
        int status;
        pid_t pid;

        CHECK(open_region(&toucher.region) == 0);
        CHECK(pthread_create(&thread, NULL, touch, &toucher) == 0);
        CHECK(lm_region_prefetch(toucher.region, 10, 20, 1) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            alarm(20);
            _exit(memcmp(lm_region_address(toucher.region), content, (size_t)CHUNKS * CHUNK) == 0 ? 0 : 1);
        }
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        pthread_join(thread, NULL);
        lm_region_free(toucher.region);
    }
}

static volatile int forks_left, is_child;

static void fork_now(int number)
{
    pid_t pid = forks_left > 0 ? fork() : -1;

    (void)number;
    forks_left -= pid > 0;
    is_child = is_child || pid == 0;
    if (is_child)
        forks_left = 0;
}

/* The child goes on where the handler came, which may be in the middle of a wait for a chunk. */
static void test_fork_in_a_handler_during_touches(void)
{
    struct sigaction action = { .sa_handler = fork_now };
    struct itimerval often = { { 0, 1000 }, { 0, 1000 } }, off = { { 0, 0 }, { 0, 0 } };
    sigset_t alarms;
    int status;

    sigemptyset(&alarms);
    sigaddset(&alarms, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarms, NULL); /* fork needs locks that a call of ours may hold */
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    forks_left = 5;
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    while (forks_left > 0) {
        lm_region *region;
        int differs;

        CHECK(open_region(&region) == 0);
        pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
        differs = memcmp(lm_region_address(region), content, (size_t)CHUNKS * CHUNK);
        pthread_sigmask(SIG_BLOCK, &alarms, NULL);
        if (is_child)
            _exit(differs != 0);
        CHECK(differs == 0);
        lm_region_free(region);
    }
    CHECK(setitimer(ITIMER_REAL, &off, NULL) == 0);
    while (waitpid(-1, &status, 0) > 0)
        CHECK(status == 0);
    signal(SIGALRM, SIG_IGN); /* one may be waiting */
    pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
    signal(SIGALRM, SIG_DFL);
}

static void test_all(bool forks)
{
    test_bad_strips_are_refused();
    for (composed = 0; composed < 2; composed++) {
        test_threads_read_right_bytes();
        test_close_while_a_prefetch_waits();
        test_close_waits_for_work_that_is_made_late();
        test_failed_chunk_is_named_and_heals();
        test_pages_given_back_come_again();
        test_eviction_races_touches();
        if (forks) {
            test_fork_during_touches();
            test_fork_in_a_handler_during_touches();
            test_fork_waits_for_a_thread_that_touches();
            test_failed_touch(SIGBUS, 0);
            if (backend != LM_BACKEND_SIGSEGV)
                test_failed_touch(SIGSEGV, LM_CAN_POISON);
        }
    }
}

int main(int argc, char **argv)
{
    static const int backends[] = { LM_BACKEND_UFFD, LM_BACKEND_UFFD_USER, LM_BACKEND_SIGSEGV };
    bool forks = false, signals = false;
    int i, tested = 0;

    for (i = 1; i < argc; i++) {
        forks = forks || strcmp(argv[i], "fork") == 0;
        signals = signals || strcmp(argv[i], "sigsegv") == 0;
    }
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    content = calloc(CHUNKS, CHUNK);
    CHECK(content != NULL);
    source = make_source(records);
    test_bad_descriptions_are_refused();
    for (i = 0; i < 3; i++) {
        lm_region *region;

        backend = backends[i];
        if ((signals != (backend == LM_BACKEND_SIGSEGV)) || tested > 0 || open_region(&region) < 0)
            continue;
        lm_region_free(region);
        test_all(forks);
        tested++;
    }
    free(content);
    close(source);
    if (tested == 0) {
        puts("refused here");
        return 77;
    }
    puts("ok");
    return 0;
}
