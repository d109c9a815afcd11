/* SPDX-License-Identifier: Apache-2.0
 *
 * Every call of the core into the operating system fails, one after the other: the first time, the second
 * time, and so on until a run makes no such call any more; once, and from then on; with each error that the
 * kernel may give (faults.h). Whatever happens, a byte that can be read is the right one, anything else has a
 * name or is a signal after a line; when the cause is gone all heals; and nothing is left behind.
 *
 * How runs are made: series.h. Argument "fork" adds a fork in the middle, and whatever else takes time.
 * "one SCENARIO CALL ERROR NTH once|onward" repeats what a failure printed.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <sys/wait.h>

#include "faults.h"
#include "fetch.h"
#include "harness.h"
#include "series.h"

#define CHUNK  65536u
#define CHUNKS 5u
#define ZERO   3u /* the one that has no bytes in the file */
#define PAGE   4096u
#define LIMIT  60 /* seconds; then a run hangs */

static unsigned char byte_of(uint64_t offset)
{
    return (unsigned char)((offset * UINT64_C(0x9E3779B97F4A7C15)) >> 40 | 1); /* never 0 */
}

/* ---- the fetcher ---- */

static int run_fetcher(void)
{
    static char message[LM_FETCH_MESSAGE_MAX];
    unsigned char *shared;
    struct stat info;

    CHECK(fstat(LM_FETCH_MEMORY, &info) == 0);
    shared = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, LM_FETCH_MEMORY, 0);
    CHECK(shared != MAP_FAILED);
    while (recv(LM_FETCH_SOCKET, message, sizeof message, 0) > 0) {
        lm_answer answer = { .kind = LM_ANSWER_DONE, .requests = 1 };
        lm_ask ask;
        uint64_t i;

        memcpy(&ask, message, sizeof ask);
        answer.id = ask.id;
        if (ask.kind == LM_ASK_RANGE || ask.kind == LM_ASK_OPEN) {
            for (i = 0; i < ask.length; i++)
                shared[ask.place + i] = byte_of(ask.offset + i);
            answer.length = answer.received = ask.length;
        } else if (ask.kind != LM_ASK_STATUS && ask.kind != LM_ASK_CANCEL) {
            continue;
        }
        if (ask.kind != LM_ASK_CANCEL && send(LM_FETCH_SOCKET, &answer, sizeof answer, 0) < 0)
            break;
    }
    return 0;
}

/* ---- what is used ---- */

struct scenario {
    const char *name;
    bool remote, composed, forks;
    bool damaged;          /* one chunk is, until the cause of all failures goes */
    bool thorough, onward; /* with every error, and not one for each call; from the n-th call on, too */
};

static const struct scenario scenarios[] = {
    { "local", .thorough = true, .onward = true },
    { "damaged", .damaged = true, .thorough = true, .onward = true },
    { "composed", .composed = true },
    { "remote", .remote = true, .thorough = true, .onward = true },
    { "composed-remote", .remote = true, .composed = true },
    { "fork", .forks = true, .onward = true },
    { "fork-remote", .forks = true, .remote = true },
};

static const struct scenario *scenario;
static lm_chunk_record records[CHUNKS - 1];
static int backend, source; /* the second: a local file */
static bool strict;                    /* nothing fails any more: no error is allowed */
static lm_region *region;

static bool fail_zstd(void) { return fails(CALL_zstd_create); }
static void *create_zstd(void) { return fail_zstd() ? NULL : __real_malloc(1); }
static size_t free_zstd(void *context) { free(context); return 0; }
static unsigned is_error(size_t result) { return result == 0; }

static size_t decompress(void *context, void *out, size_t length, const void *stored, size_t stored_length)
{
    CHECK(context != NULL && stored_length == length);
    memcpy(out, stored, length);
    return length;
}

static void make_source(void)
{
    static unsigned char bytes[CHUNK];
    unsigned i, j;

    source = memfd_create("source", MFD_CLOEXEC);
    for (i = 0; i < CHUNKS - 1; i++) {
        for (j = 0; j < CHUNK; j++)
            bytes[j] = byte_of(i * CHUNK + j);
        records[i] = (lm_chunk_record){ .offset = i * CHUNK, .stored_length = CHUNK };
        records[i].codec = i == 1 ? LM_CODEC_ZSTD : LM_CODEC_RAW;
        /* Its file's time is looked at; which mending a damaged file changes. */
        records[i].flags = i == 2 && (scenario == NULL || !scenario->damaged) ? LM_CHUNK_UNCHECKED : 0;
        records[i].checksum = lm_codec_checksum(bytes, CHUNK);
        CHECK(pwrite(source, bytes, CHUNK, i * CHUNK) == CHUNK);
    }
}

static void flip(void)
{
    unsigned char byte;

    CHECK(pread(source, &byte, 1, 100) == 1);
    byte ^= 1;
    CHECK(pwrite(source, &byte, 1, 100) == 1);
}

static unsigned char right(uint64_t at)
{
    uint64_t chunk = at / CHUNK;

    return chunk == ZERO ? 0 : byte_of(at - (chunk > ZERO ? CHUNK : 0));
}

/* What failed is what was made to fail, or has a name of our own. */
static void check_name(int error)
{
    if (error < 0)
        CHECK(!strict && (error == -plan->error || error <= LM_E_SHORT));
}

static void open_region(void)
{
    static lm_strip strips[200];
    lm_run runs[] = { { 0, ZERO, 0 }, { ZERO, 1, LM_ZERO_RUN }, { ZERO + 1, CHUNKS - ZERO - 1, ZERO } };
    uint64_t size = (CHUNKS - 1) * CHUNK;
    int number = scenario->remote ? lm_source_open("{}", 2) : 0, fd = scenario->remote ? -1 : source, error;
    uint32_t remote = (uint32_t)number;
    lm_region_spec spec = { .content_size = CHUNKS * CHUNK, .chunk_size = CHUNK, .backend = backend,
                            .threads = 1, .readahead = 2, .runs = runs, .run_count = 3, .records = records,
                            .record_count = CHUNKS - 1, .fds = &fd, .sources = &remote, .source_sizes = &size,
                            .source_count = 1, .coalesce_size = 2 * CHUNK, .fetch_timeout_ms = 300,
                            .url = "object" };

    region = NULL;
    check_name(number);
    if (number < 0)
        return;
    if (scenario->composed)
        compose_of_itself(&spec, strips, sizeof strips / sizeof *strips, 5003);
    error = lm_region_open(&spec, &region);
    check_name(error);
    if (scenario->remote)
        lm_source_close(remote);
    if (error == 0 && scenario->damaged && plan->call == CALL_mprotect) /* the way of older kernels */
        lm_engine.uffds[region->uffd].can &= ~(unsigned)LM_CAN_POISON;
}

static sigjmp_buf back;
static volatile sig_atomic_t touching;

static void on_signal(int number)
{
    if (!touching)
        abort();
    siglongjmp(back, number);
}

static bool stderr_may_fail(void)
{
    return plan->call == CALL_select || plan->call == CALL_write;
}

static void touch(uint64_t at)
{
    const volatile unsigned char *base = lm_region_address(region);
    int number = sigsetjmp(back, 1);

    if (number == 0) {
        unsigned char byte;

        touching = 1;
        byte = base[at];
        touching = 0;
        CHECK(byte == right(at));
        return;
    }
    touching = 0;
    CHECK(!strict && (lseek(scribbled, 0, SEEK_END) > 0 || stderr_may_fail()));
}

static void touch_all(void)
{
    uint64_t chunk;

    for (chunk = 0; chunk < CHUNKS; chunk++) {
        touch(chunk * CHUNK + 77);
        touch((chunk + 1) * CHUNK - 1);
    }
}

static int prefetch(void)
{
    uint64_t cursor = 0, failed;
    int result = lm_region_prefetch(region, 0, CHUNKS, 1);

    while (result == 0)
        result = lm_region_wait(region, 0, CHUNKS, 20, &cursor, &failed);
    check_name(result);
    return result;
}

static void ask(void)
{
    static unsigned char out[100];
    static lm_fetch_result result;
    uint64_t id;
    int number = lm_source_open("{}", 2), error;

    check_name(number);
    if (number < 0)
        return;
    error = lm_fetch_ask(LM_ASK_RANGE, (uint32_t)number, 5, sizeof out, 300, &id);
    check_name(error);
    if (error == 0) {
        while ((error = lm_fetch_wait(id, 20)) == 0)
            ;
        check_name(error);
        CHECK(lm_fetch_take(id, out, sizeof out, &result) == 0);
        CHECK(error < 0 || out[7] == byte_of(12));
    }
    lm_source_close((uint32_t)number);
}

static void fork_and_use(void)
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(LIMIT);
        touch_all();
        if (prefetch() == 1)
            touch_all();
        _exit(0);
    }
    CHECK(__real_waitpid(pid, &status, 0) == pid && status == 0);
}

static void use(void)
{
    open_region();
    if (region == NULL)
        return;
    touch(CHUNK);
    if (scenario->forks)
        fork_and_use();
    touch_all();
    (void)prefetch();
    if (scenario->remote)
        ask();
    check_name(lm_region_evict(region, 0, CHUNKS));
    touch_all();
}

/* The cause is gone: whatever failed is right when it is asked for again. */
static void heal(void)
{
    uint64_t at;
    int result = 1, attempt;

    for (attempt = 0; region != NULL && attempt < 100; attempt++) {
        strict = !scenario->remote; /* between two attempts to start a fetcher some time passes */
        result = prefetch();
        if (result == 1)
            break;
        usleep(20000);
    }
    strict = true;
    CHECK(region == NULL || result == 1);
    for (at = 0; region != NULL && at < CHUNKS * CHUNK; at += PAGE / 2)
        touch(at);
}

/* ---- one run ---- */

static void run(bool armed)
{
    alarm(LIMIT);
    CHECK(dup2(scribbled, STDERR_FILENO) == STDERR_FILENO);
    CHECK(ftruncate(scribbled, 0) == 0 && lseek(scribbled, 0, SEEK_SET) == 0);
    signal(SIGBUS, on_signal);
    signal(SIGSEGV, on_signal);
    strict = !armed && !scenario->damaged;
    if (scenario->damaged) {
        close(source);
        make_source();
        flip();
    }
    plan->armed = armed;
    use();
    if (armed && plan->call == CALL_munmap)
        lm_region_free(region);
    plan->armed = false;
    if (scenario->damaged)
        flip();
    if (!armed || plan->call != CALL_munmap) {
        heal();
        lm_region_free(region);
    }
    strict = true;
    use();
    lm_region_free(region);
    if (armed)
        check_usage(&board->healthy);
    else
        settle();
}

/* ---- series of runs ---- */

static bool goes_on(enum call call, int error)
{
    /* What the kernel does not say for ever, or what is waited for rightly. */
    if (error == EINTR || call == CALL_sendmsg || call == CALL_recv)
        return false;
    if (scenario->damaged && call == CALL_mprotect) /* no memory to say no: a touch waits for some */
        return false;
    return error != EAGAIN || call == CALL_pthread_create || call == CALL_clone || call == CALL_madvise ||
           call == CALL_mincore;
}

/* Of a damaged chunk only what follows from that; of others, no call that is not made at all. */
static bool is_tried(int call, const struct plan *before)
{
    if (scenario->damaged && call != CALL_uffd_poison && call != CALL_mprotect && call != CALL_select &&
        call != CALL_write)
        return false;
    return before->made[call];
}

static void try_all(bool thorough)
{
    struct plan before;
    struct usage healthy = find_calls(&before);
    int call, i, most = thorough && scenario->thorough ? 6 : 1;

    for (call = 0; call < CALL_COUNT; call++)
        for (i = 0; is_tried(call, &before) && i < most && calls[call].errors[i] >= 0; i++) {
            start_series((enum call)call, calls[call].errors[i], false, &healthy);
            if (thorough && scenario->onward && goes_on((enum call)call, calls[call].errors[i]))
                start_series((enum call)call, calls[call].errors[i], true, &healthy);
        }
    while (running > 0)
        reap();
}

static int choose_backend(void)
{
    lm_way_report report;

    for (backend = LM_BACKEND_UFFD; backend <= LM_BACKEND_UFFD_USER; backend++) {
        int way = backend == LM_BACKEND_UFFD ? LM_WAY_SYSCALL : LM_WAY_USER_ONLY;

        CHECK(lm_probe_way(way, &report) == 0);
        if (report.error == 0)
            return 0;
    }
    return -1;
}

int main(int argc, char **argv)
{
    static const char command[] = "/proc/self/exe\0fetcher\0";
    bool forks = argc > 1 && strcmp(argv[1], "fork") == 0, one = argc == 7 && strcmp(argv[1], "one") == 0;
    size_t i;

    if (argc > 1 && strcmp(argv[1], "fetcher") == 0)
        return run_fetcher();
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_CREATE, (void *)create_zstd) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_FREE, (void *)free_zstd) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_DECOMPRESS, (void *)decompress) == 0);
    CHECK(lm_codec_set(LM_FN_ZSTD_IS_ERROR, (void *)is_error) == 0);
    CHECK(lm_fetch_command(command, sizeof command - 1, 2, 0) == 0);
    make_source();
    if (choose_backend() < 0) {
        puts("no userfaultfd here");
        return 77;
    }
    take_board();
    for (i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        scenario = &scenarios[i];
        series_scenario = scenario->name;
        series_brief = scenario->remote; /* they wait for a deadline */
        if (one && strcmp(argv[2], scenario->name) == 0)
            return repeat(argv + 3);
        if (!one && (forks || (scenario->thorough && !scenario->forks)))
            try_all(forks);
    }
    if (bad > 0)
        return 1;
    puts("ok");
    return 0;
}
