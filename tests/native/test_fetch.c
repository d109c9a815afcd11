/* SPDX-License-Identifier: Apache-2.0
 *
 * The courier, with a fetcher of the test's own: this program, executed again. It serves objects whose
 * bytes are computed, answers in any order, and can be told (by the source's text) to lie, to fail, to
 * die or to babble. Driven from C so that it runs under ASan/UBSan and TSan. Argument "fork" adds
 * children of a fork.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fetch.h"
#include "harness.h"

#define CHUNK  65536u
#define CHUNKS 96u
#define SOURCES 64
#define PENDING 64

static unsigned char byte_of(uint64_t offset)
{
    uint64_t x = (offset >> 3) * UINT64_C(0x9E3779B97F4A7C15) + 1;

    return (unsigned char)(x >> 29 >> (offset & 7));
}

static void fill(unsigned char *out, uint64_t offset, uint64_t length)
{
    uint64_t i;

    for (i = 0; i < length; i++)
        out[i] = byte_of(offset + i);
}

/* ---- the fetcher ---- */

struct asked {
    lm_ask ask;
    lm_piece pieces[LM_RANGE_CHUNKS];
    unsigned count;
};

static char modes[SOURCES][32];
static unsigned char *shared;
static size_t shared_size;

static void answer(const lm_ask *ask, int code, uint64_t length, const char *text)
{
    char message[1024];
    lm_answer done = {
        .kind = code == 0 ? LM_ANSWER_DONE : LM_ANSWER_FAILED,
        .code = code,
        .id = ask->id,
        .length = length,
        .received = length,
        .requests = 1,
        .payload_length = (uint32_t)strlen(text),
    };

    memcpy(message, &done, sizeof done);
    memcpy(message + sizeof done, text, strlen(text));
    if (send(LM_FETCH_SOCKET, message, sizeof done + strlen(text), 0) < 0)
        _exit(0);
}

static void serve(const struct asked *asked)
{
    const lm_ask *ask = &asked->ask;
    const char *mode = modes[ask->source % SOURCES];
    unsigned i;

    if (ask->kind == LM_ASK_STATUS) {
        answer(ask, 0, 0, "{}");
        return;
    }
    if (strcmp(mode, "die") == 0)
        _exit(0);
    if (strcmp(mode, "babble") == 0) {
        (void)!send(LM_FETCH_SOCKET, "what?", 5, 0);
        return;
    }
    if (ask->kind == LM_ASK_OPEN) {
        fill(shared + ask->place, 1000, ask->length);
        answer(ask, 0, ask->length, "{\"size\": 5}");
        return;
    }
    CHECK(ask->place + ask->length <= shared_size);
    CHECK(asked->count > 0);
    if (strcmp(mode, "fail") == 0) {
        answer(ask, LM_E_DENIED, 0, "object: the store says no");
        return;
    }
    memset(shared + ask->place, 0xEE, ask->length); /* what lies between pieces means nothing */
    for (i = 0; i < asked->count; i++) {
        const lm_piece *piece = &asked->pieces[i];

        CHECK(piece->offset >= ask->offset && piece->offset + piece->length <= ask->offset + ask->length);
        fill(shared + ask->place + (piece->offset - ask->offset), piece->offset, piece->length);
    }
    if (strcmp(mode, "lie") == 0 || (strcmp(mode, "lie-once") == 0 && !(ask->flags & LM_ASK_REFETCH)))
        shared[ask->place + (asked->pieces[0].offset - ask->offset)] ^= 1;
    answer(ask, 0, ask->length, "");
}

static int run_fetcher(void)
{
    static struct asked pending[PENDING];
    static char message[LM_FETCH_MESSAGE_MAX];
    unsigned count = 0;
    uint64_t seed = (uint64_t)getpid() * 77 + 1;
    struct stat info;

    CHECK(fstat(LM_FETCH_MEMORY, &info) == 0);
    shared_size = (size_t)info.st_size;
    shared = mmap(NULL, shared_size, PROT_READ | PROT_WRITE, MAP_SHARED, LM_FETCH_MEMORY, 0);
    CHECK(shared != MAP_FAILED);
    for (;;) {
        struct pollfd readable = { .fd = LM_FETCH_SOCKET, .events = POLLIN };
        struct asked asked;
        ssize_t got;

        if (count == PENDING || poll(&readable, 1, count > 0 ? 1 : -1) == 0) {
            unsigned which = (unsigned)(next_random(&seed) % count);

            serve(&pending[which]);
            pending[which] = pending[--count];
            continue;
        }
        got = recv(LM_FETCH_SOCKET, message, sizeof message, 0);
        if (got <= 0)
            return 0;
        CHECK((size_t)got >= sizeof asked.ask);
        memcpy(&asked.ask, message, sizeof asked.ask);
        CHECK(asked.ask.payload_length == (size_t)got - sizeof asked.ask);
        if (asked.ask.kind == LM_ASK_SOURCE) {
            snprintf(modes[asked.ask.source % SOURCES], sizeof modes[0], "%.*s",
                     (int)asked.ask.payload_length, message + sizeof asked.ask);
        } else if (asked.ask.kind == LM_ASK_OPEN || asked.ask.kind == LM_ASK_RANGE ||
                   asked.ask.kind == LM_ASK_STATUS) {
            asked.count = asked.ask.payload_length / sizeof(lm_piece);
            CHECK(asked.count <= LM_RANGE_CHUNKS);
            memcpy(asked.pieces, message + sizeof asked.ask, asked.ask.payload_length);
            pending[count++] = asked;
        }
    }
}

/* ---- the tests ---- */

static lm_chunk_record records[CHUNKS];
static lm_run runs[] = { { 0, CHUNKS, 0 } };
static uint64_t source_size;
static int backend;

static void make_records(void)
{
    static unsigned char bytes[CHUNK];
    uint64_t at = 300;
    unsigned i;

    for (i = 0; i < CHUNKS; i++) {
        fill(bytes, at, CHUNK);
        records[i] = (lm_chunk_record){ .offset = at, .stored_length = CHUNK };
        records[i].checksum = lm_codec_checksum(bytes, CHUNK);
        at += CHUNK + (i % 5 == 0 ? 4096 : i % 7 == 0 ? 500000 : 0); /* small gaps and large ones */
    }
    source_size = at;
}

static int open_source(const char *mode)
{
    int source = lm_source_open(mode, strlen(mode));

    CHECK(source >= 0);
    return source;
}

static int composed; /* 1: every region of these tests shows its content by strips */
static lm_strip strips[3000];

static lm_region *open_region(const char *mode)
{
    int none = -1;
    uint32_t source = (uint32_t)open_source(mode);
    lm_region *region;
    lm_region_spec spec = {
        .content_size = CHUNKS * (uint64_t)CHUNK,
        .chunk_size = CHUNK,
        .backend = backend,
        .threads = 3,
        .readahead = 8,
        .runs = runs,
        .run_count = 1,
        .records = records,
        .record_count = CHUNKS,
        .fds = &none,
        .sources = &source,
        .source_sizes = &source_size,
        .source_count = 1,
        .coalesce_gap = 8192,
        .coalesce_size = 1u << 20,
        .fetch_timeout_ms = 60000,
        .url = "object",
    };

    if (composed)
        compose_of_itself(&spec, strips, sizeof strips / sizeof *strips, 3001);
    CHECK(lm_region_open(&spec, &region) == 0);
    lm_source_close(source); /* the region keeps it for itself */
    return region;
}

static unsigned char shown(const unsigned char *base, uint64_t at, unsigned char *ret_right)
{
    *ret_right = byte_of(records[at / CHUNK].offset + at % CHUNK);
    return base[at];
}

static int await(uint64_t id)
{
    int result;

    while ((result = lm_fetch_wait(id, 50)) == 0)
        ;
    return result;
}

static void test_calls_are_answered(void)
{
    static unsigned char out[200000];
    static lm_fetch_result result;
    uint32_t source = (uint32_t)open_source("good"), bad = (uint32_t)open_source("fail");
    uint64_t id, i;

    CHECK(lm_fetch_ask(LM_ASK_OPEN, source, 0, 65536, 60000, &id) == 0);
    CHECK(await(id) == 1);
    CHECK(lm_fetch_take(id, out, sizeof out, &result) == 0);
    CHECK(result.length == 65536 && out[5] == byte_of(1005) && strcmp(result.text, "{\"size\": 5}") == 0);
    CHECK(lm_fetch_take(id, out, sizeof out, &result) == -ESRCH);
    CHECK(lm_fetch_ask(LM_ASK_RANGE, source, 777, sizeof out, 60000, &id) == 0);
    CHECK(await(id) == 1);
    CHECK(lm_fetch_take(id, out, sizeof out, &result) == 0);
    for (i = 0; i < sizeof out; i++)
        CHECK(out[i] == byte_of(777 + i));
    CHECK(lm_fetch_ask(LM_ASK_RANGE, bad, 0, 10, 60000, &id) == 0);
    CHECK(await(id) == LM_E_DENIED);
    CHECK(lm_fetch_take(id, out, sizeof out, &result) == 0);
    CHECK(result.length == 0 && strcmp(result.text, "object: the store says no") == 0);
    CHECK(lm_fetch_ask(LM_ASK_RANGE, 999, 0, 10, 60000, &id) == -EBADF);
    CHECK(lm_fetch_ask(LM_ASK_RANGE, source, 0, UINT64_C(1) << 40, 60000, &id) == -EINVAL);
    CHECK(lm_fetch_ask(LM_ASK_RANGE, source, 0, 10, 60000, &id) == 0);
    lm_fetch_drop(id);
    CHECK(lm_fetch_wait(id, 0) <= 0);
    lm_source_close(source);
    lm_source_close(bad);
}

struct toucher {
    lm_region *region;
    uint64_t seed;
};

static void *touch(void *argument)
{
    struct toucher *self = argument;
    const unsigned char *base = lm_region_address(self->region);
    int i;

    for (i = 0; i < 300; i++) {
        unsigned char right, seen = shown(base, next_random(&self->seed) % (CHUNKS * (uint64_t)CHUNK), &right);

        CHECK(seen == right);
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

/* A fetcher must have a chance to come up: under a sanitizer that takes a while. */
#if defined __SANITIZE_THREAD__ || defined __SANITIZE_ADDRESS__
#define KILL_EVERY_US 1000000
#else
#define KILL_EVERY_US 100000
#endif

static _Atomic int killing;

static void *kill_fetchers(void *argument)
{
    uint64_t seed = 99;

    (void)argument;
    while (killing) {
        int pid = lm_fetcher_pid();

        if (pid > 0)
            (void)kill(pid, SIGKILL);
        usleep((useconds_t)(next_random(&seed) % KILL_EVERY_US));
    }
    return NULL;
}

static void scan_with_threads(const char *mode)
{
    lm_region *region = open_region(mode);
    struct toucher touchers[4];
    pthread_t threads[4];
    unsigned i;

    for (i = 0; i < 4; i++) {
        touchers[i] = (struct toucher){ .region = region, .seed = i + 12345 };
        CHECK(pthread_create(&threads[i], NULL, i == 0 ? prefetch : touch, &touchers[i]) == 0);
    }
    for (i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    lm_region_free(region);
}

static void test_threads_read_right_bytes(void)
{
    int round;

    for (round = 0; round < 5; round++)
        scan_with_threads("good");
}

static void test_wrong_bytes_are_fetched_again(void)
{
    scan_with_threads("lie-once");
}

static void test_bytes_that_stay_wrong_are_an_error(void)
{
    lm_region *region = open_region("lie");
    uint64_t cursor = 3, failed = 0;
    int result;

    CHECK(lm_region_prefetch(region, 3, 1, 1) == 0);
    while ((result = lm_region_wait(region, 3, 1, 50, &cursor, &failed)) == 0)
        ;
    CHECK(result == LM_E_CHECKSUM && failed == 3);
    lm_region_free(region);
}

static void test_what_the_store_says_is_kept(void)
{
    lm_region *region = open_region("fail");
    uint64_t cursor = 0, failed = 0;
    char text[100];
    int result;

    CHECK(lm_region_prefetch(region, 0, 20, 1) == 0);
    while ((result = lm_region_wait(region, 0, 20, 50, &cursor, &failed)) == 0)
        ;
    CHECK(result == LM_E_DENIED && failed == 0);
    CHECK(lm_region_error_text(region, failed, text, sizeof text) == 0);
    CHECK(strcmp(text, "object: the store says no") == 0);
    CHECK(lm_region_error_text(region, failed, text, 5) == 0);
    CHECK(strcmp(text, "obje") == 0);
    lm_region_free(region);
}

static void test_nothing_is_lost_when_the_fetcher_dies(void)
{
    pthread_t killer;
    uint64_t before = lm_fetcher_starts();

    killing = 1;
    CHECK(pthread_create(&killer, NULL, kill_fetchers, NULL) == 0);
    while (lm_fetcher_starts() < before + 10)
        scan_with_threads("good");
    killing = 0;
    CHECK(pthread_join(killer, NULL) == 0);
}

static void fails_for_want_of_a_fetcher(const char *mode)
{
    static lm_fetch_result result;
    uint32_t source = (uint32_t)open_source(mode);
    unsigned char out[10];
    uint64_t id;

    CHECK(lm_fetch_ask(LM_ASK_RANGE, source, 0, 10, 500, &id) == 0);
    CHECK(await(id) == LM_E_FETCHER);
    CHECK(lm_fetch_take(id, out, sizeof out, &result) == 0);
    CHECK(strstr(result.text, "the fetcher process") != NULL);
    lm_source_close(source);
}

static void test_regions_close_while_requests_are_out(void)
{
    uint64_t seed = 4;
    int round;

    for (round = 0; round < 60; round++) {
        lm_region *region = open_region("good");

        CHECK(lm_region_prefetch(region, 0, CHUNKS, 0) == 0);
        usleep((useconds_t)(next_random(&seed) % 3000));
        lm_region_free(region);
    }
    CHECK(lm_engine_region_count() == 0);
}

static void test_fork(void)
{
    lm_region *region = open_region("good");
    struct toucher self = { .region = region, .seed = 31 };
    int status;
    pid_t child;

    CHECK(lm_region_prefetch(region, 0, CHUNKS, 0) == 0); /* under way */
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        (void)touch(&self);
        (void)prefetch(&self);
        CHECK(lm_fetcher_pid() > 0);
        _exit(0);
    }
    (void)touch(&self);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    (void)prefetch(&self);
    lm_region_free(region);
}

static void set_command(const char *path)
{
    char strings[4200];
    int length = snprintf(strings, sizeof strings, "%s%cfetcher%cTSAN_OPTIONS=%c", path, 0, 0, 0);

    CHECK(lm_fetch_command(strings, (size_t)length, 2, 1) == 0);
}

static int choose_backend(void)
{
    lm_region *region;

    set_command("/proc/self/exe");
    for (backend = LM_BACKEND_UFFD; backend <= LM_BACKEND_UFFD_USER; backend++) {
        int none = -1;
        uint32_t source = (uint32_t)open_source("good");
        lm_region_spec spec = { .content_size = CHUNK, .chunk_size = CHUNK, .backend = backend, .runs = runs,
                                .run_count = 1, .records = records, .record_count = 1, .fds = &none,
                                .sources = &source, .source_sizes = &source_size, .source_count = 1,
                                .url = "object" };
        lm_run one = { 0, 1, 0 };
        int error;

        spec.runs = &one;
        error = lm_region_open(&spec, &region);
        lm_source_close(source);
        if (error == 0) {
            lm_region_free(region);
            return 0;
        }
    }
    return -1;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "fetcher") == 0)
        return run_fetcher();
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_CREATE, "libzstd.so.1", "ZSTD_createDCtx") == 0);
    CHECK(lm_codec_find(LM_FN_ZSTD_FREE, "libzstd.so.1", "ZSTD_freeDCtx") == 0);
    make_records();
    if (argc > 1 && strcmp(argv[1], "nowhere") == 0) {
        set_command("/nonexistent/python");
        fails_for_want_of_a_fetcher("good");
        printf("ok\n");
        return 0;
    }
    if (choose_backend() < 0) {
        printf("userfaultfd is not to be had here\n");
        return 77;
    }
    test_calls_are_answered();
    for (composed = 0; composed < 2; composed++) {
        test_threads_read_right_bytes();
        test_wrong_bytes_are_fetched_again();
        test_bytes_that_stay_wrong_are_an_error();
        test_what_the_store_says_is_kept();
        test_regions_close_while_requests_are_out();
        if (argc > 1 && strcmp(argv[1], "fork") == 0)
            test_fork();
        test_nothing_is_lost_when_the_fetcher_dies();
    }
    fails_for_want_of_a_fetcher("die");
    fails_for_want_of_a_fetcher("babble");
    printf("ok\n");
    return 0;
}
