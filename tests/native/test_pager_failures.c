/* SPDX-License-Identifier: Apache-2.0
 *
 * Every call of a pager into the operating system fails, and every allocation, as test_failures.c has it for the
 * engine of one process. The pager serves a client, by pages that are shared and by copies, its children and theirs,
 * and is taken over by another in between. Whatever happens, nobody reads a wrong byte, nor zeros for what is
 * missing: SIGBUS is allowed, and waiting until the cause is gone. Then a second client is served as if nothing
 * had been, and nothing is left behind.
 *
 * How runs are made: series.h. Clients are made before any thread; nothing fails in them. Argument "fork" has calls
 * fail from the n-th on, too, and with each error. "one pager CALL ERROR NTH once|onward" repeats what a failure
 * printed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>

#include "faults.h"
#include "harness.h"
#include "pager.h"
#include "pager_client.h"
#include "pager_protocol.h"
#include "series.h"

#define CHUNK    65536u
#define CHUNKS   6u
#define ZERO     3u /* has no bytes in the file */
#define BAD      4u /* its checksum is wrong */
#define PAGE     4096u
#define SIZE     (CHUNKS * CHUNK)
#define LIMIT    30  /* seconds; then a run hangs */
#define PATIENCE 300 /* ms, for clients whose pager's calls go on failing */
#define SPACES   16

static unsigned char content[SIZE];
static int source;
static bool strict; /* nothing fails any more: no error is allowed */

/* What clients tell without words. */
static struct shared { _Atomic unsigned signals; } *shared;

/* ---- a client, and its children ---- */

static sigjmp_buf back;

static void on_signal(int number)
{
    siglongjmp(back, number);
}

/* The page at `at` shows that page of the snapshot, or zeros if it was given back, or raises SIGBUS. */
static void look(const unsigned char *at, unsigned page, bool zeros)
{
    static const unsigned char nothing[PAGE];
    bool damaged = page / (CHUNK / PAGE) == BAD;

    if (sigsetjmp(back, 1) != 0) {
        shared->signals += !damaged || zeros;
        return;
    }
    if (memcmp(at, zeros ? nothing : content + (size_t)page * PAGE, PAGE) != 0 || (damaged && !zeros))
        _exit(memcmp(at, nothing, PAGE) == 0 ? 20 : 21);
}

/* What a client's memory shows: all of the snapshot twice, shared and as copies, but for what it has changed. */
struct memory { unsigned char *pages, *copies, *moved; bool changed; };

static void look_at_all(const struct memory *memory, unsigned step)
{
    unsigned page;

    for (page = 0; page < SIZE / PAGE; page += step) {
        unsigned chunk = page / (CHUNK / PAGE);

        if (!memory->changed || chunk != 1)
            look(memory->pages + page * PAGE, page, false);
        else
            look(memory->moved + (page * PAGE - CHUNK), page, false);
        if (!memory->changed || chunk != 5)
            look(memory->copies + page * PAGE, page, memory->changed && page >= 2 && page < 5);
    }
}

static pid_t start_child(const struct memory *memory, bool has_child)
{
    pid_t pid = fork();
    int status = 0;

    CHECK(pid >= 0);
    if (pid > 0)
        return pid;
    alarm(LIMIT);
    pid = has_child ? start_child(memory, false) : 0;
    look_at_all(memory, 1);
    if (pid > 0)
        CHECK(__real_waitpid(pid, &status, 0) == pid);
    _exit(status == 0 ? 0 : WIFEXITED(status) ? WEXITSTATUS(status) : 22);
}

static void await_child(pid_t pid)
{
    int status;

    CHECK(__real_waitpid(pid, &status, 0) == pid);
    if (status != 0)
        _exit(WIFEXITED(status) ? 40 + WEXITSTATUS(status) : 23);
}

static void change(struct memory *memory)
{
    memory->moved = mmap(NULL, CHUNK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(madvise(memory->copies + 2 * PAGE, 3 * PAGE, MADV_DONTNEED) == 0);
    CHECK(madvise(memory->pages + 2 * PAGE, 3 * PAGE, MADV_DONTNEED) == 0); /* comes again */
    CHECK(mremap(memory->pages + CHUNK, CHUNK, CHUNK, MREMAP_MAYMOVE | MREMAP_FIXED, memory->moved) ==
          memory->moved);
    CHECK(munmap(memory->copies + 5 * CHUNK, CHUNK) == 0);
    memory->changed = true;
}

/* Words: to it, f: go on, forks are followed; n: they are not; x: there is no pager. From it, s: a stage is over. */
static void be_client(int line)
{
    struct memory memory = { .changed = false };
    unsigned char *where[2];
    pid_t child = 0, other = 0;
    int uffd, memfd;
    char word;

    plan = NULL;
    alarm(LIMIT);
    signal(SIGBUS, on_signal);
    memfd = receive_descriptor(line, &word, 1);
    if (word == 'x')
        _exit(0);
    memory.pages = where[0] = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE, memfd, 0);
    memory.copies = where[1] = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uffd = (int)syscall(SYS_userfaultfd, (long)(O_CLOEXEC | O_NONBLOCK), 0L, 0L, 0L, 0L, 0L);
    CHECK(where[0] != MAP_FAILED && where[1] != MAP_FAILED && uffd >= 0);
    send_descriptor(line, uffd, where, sizeof where);
    word = hear(line);
    if (word == 'x')
        _exit(0);
    CHECK(mprotect(memory.pages, SIZE, PROT_READ | PROT_WRITE) == 0);
    CHECK(mprotect(memory.copies, SIZE, PROT_READ | PROT_WRITE) == 0);
    look_at_all(&memory, 40);
    if (word == 'f')
        child = start_child(&memory, false);
    change(&memory);
    look_at_all(&memory, 40);
    if (word == 'f')
        other = start_child(&memory, true);
    if (child > 0)
        await_child(child);
    tell(line, 's');
    (void)hear(line); /* another pager has taken over */
    look_at_all(&memory, 10);
    if (other > 0)
        await_child(other);
    if (word == 'f')
        await_child(start_child(&memory, false));
    look_at_all(&memory, 1);
    tell(line, 's');
    _exit(0);
}

static pid_t start_client(int *ret_line)
{
    int pair[2];
    pid_t pid;

    CHECK(__real_socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        close(pair[0]);
        be_client(pair[1]);
    }
    close(pair[1]);
    *ret_line = pair[0];
    return pid;
}

/* ---- the pager ---- */

static lm_region *stock;

/* What failed is what was made to fail, or has a name of our own. */
static bool succeeds(int64_t error)
{
    if (error < 0)
        CHECK(!strict && (error == -plan->error || error <= LM_E_SHORT));
    return error >= 0;
}

static bool open_stock(void)
{
    static lm_chunk_record records[CHUNKS - 1];
    lm_run runs[] = { { 0, ZERO, 0 }, { ZERO, 1, LM_ZERO_RUN }, { ZERO + 1, CHUNKS - ZERO - 1, ZERO } };
    uint64_t size = SIZE;
    lm_region_spec spec = { .content_size = SIZE, .chunk_size = CHUNK, .backend = LM_BACKEND_STOCK, .threads = 1,
                            .runs = runs, .run_count = 3, .records = records, .record_count = CHUNKS - 1,
                            .fds = &source, .source_sizes = &size, .source_count = 1, .url = "memfd" };
    unsigned chunk, i = 0;

    for (chunk = 0; chunk < CHUNKS; chunk++) {
        if (chunk == ZERO)
            continue;
        records[i] = (lm_chunk_record){ .offset = (uint64_t)chunk * CHUNK, .stored_length = CHUNK };
        records[i++].checksum = lm_codec_checksum(content + (size_t)chunk * CHUNK, CHUNK) ^ (chunk == BAD);
    }
    stock = NULL;
    return succeeds(lm_region_open(&spec, &stock));
}

/* Until the client has said something. What goes on failing may keep it waiting: then it fails no more. */
static void listen_to(int line)
{
    struct pollfd one = { .fd = line, .events = POLLIN };

    if (plan->onward && plan->armed && __real_poll(&one, 1, PATIENCE) == 0)
        plan->armed = false;
    CHECK(hear(line) == 's');
}

/* What a pager tells the next of a space: a new one, or 0. */
static uint32_t hand_over(const lm_space_report *report)
{
    static lm_space_part parts[100];
    int uffd = lm_pager_descriptor(report->space);
    int64_t count, i;
    uint32_t space, features;
    int error;

    if (uffd == -ESRCH) /* its process has ended */
        return 0;
    if (!succeeds(uffd))
        return 0;
    error = lm_pager_open_space(uffd, 0, &space, &features);
    close(uffd);
    if (!succeeds(error))
        return 0;
    count = lm_pager_parts(report->space, parts, 100);
    CHECK(count >= 0 && count <= 100);
    for (i = 0; i < count; i++) {
        error = lm_pager_map(space, parts[i].address, parts[i].length, stock, parts[i].offset, parts[i].page,
                             parts[i].flags | LM_PAGER_ADOPT | LM_PAGER_MORE);
        if (!succeeds(error)) {
            lm_pager_close_space(space);
            return 0;
        }
    }
    return space;
}

static void start_pager(void)
{
    if (succeeds(lm_pager_start(2)))
        return;
    plan->armed = false;
    CHECK(lm_pager_start(2) == 0);
}

/* As handover.py does it: the old spaces end once all is said, or go on. */
static void take_over(void)
{
    lm_space_report reports[SPACES];
    uint32_t others[SPACES], count, i, given = 0;

    lm_pager_stop();
    count = lm_pager_spaces(reports, SPACES);
    CHECK(count > 0 && count <= SPACES);
    for (; given < count; given++) {
        CHECK(reports[given].space != 0);
        others[given] = hand_over(&reports[given]);
        if (others[given] == 0)
            break;
    }
    for (i = 0; i < given; i++) {
        lm_pager_close_space(given == count ? reports[i].space : others[i]);
        if (given == count)
            (void)succeeds(lm_pager_resume_space(others[i], 1, reports[i].features));
    }
    start_pager();
}

static void close_spaces(void)
{
    lm_space_report reports[SPACES];
    uint32_t count = lm_pager_spaces(reports, SPACES), i;

    CHECK(count <= SPACES);
    for (i = 0; i < count; i++)
        lm_pager_close_space(reports[i].space);
    CHECK(lm_pager_spaces(reports, 0) == 0);
}

/* The word for the client whose memory lies there: x, if it cannot be served. */
static char map_memory(int uffd, unsigned char *const where[2])
{
    uint32_t space, features;
    int64_t got;

    if (!succeeds(lm_pager_open_space(uffd, 1, &space, &features)))
        return 'x';
    /* Pages of our memfd would come without a message: no failure lets it through. */
    CHECK(lm_pager_map(space, (uintptr_t)where[0], SIZE, stock, 0, PAGE, LM_PAGER_MORE) < 0);
    if (!succeeds(lm_pager_map(space, (uintptr_t)where[0], SIZE, stock, 0, PAGE, LM_PAGER_SHARED | LM_PAGER_MORE)) ||
        !succeeds(lm_pager_map(space, (uintptr_t)where[1], SIZE, stock, 0, PAGE, LM_PAGER_REMOVED_ZERO))) {
        lm_pager_close_space(space);
        return 'x';
    }
    CHECK(lm_pager_users(stock) == 1);
    if (!plan->onward) { /* or it tries again, for seconds */
        got = lm_pager_populate(space, (uintptr_t)where[0], SIZE); /* nothing but zeros is decoded */
        CHECK(got == CHUNK || (!strict && got == -EAGAIN));
    }
    lm_pager_leave_space(space);
    return features & LM_PAGER_FOLLOWS_FORK ? 'f' : 'n';
}

static void serve(int line)
{
    unsigned char *where[2], word = 'r';
    int memfd, uffd;

    memfd = lm_region_descriptor(stock);
    if (!succeeds(memfd)) {
        tell(line, 'x');
        return;
    }
    send_descriptor(line, memfd, &word, 1);
    close(memfd);
    uffd = receive_descriptor(line, where, sizeof where);
    word = (unsigned char)map_memory(uffd, where);
    close(uffd);
    tell(line, (char)word);
    if (word == 'x')
        return;
    listen_to(line);
    take_over();
    tell(line, word == 'f' ? 'f' : 'n');
    listen_to(line);
}

static void be_pager(int line, pid_t client)
{
    int status;

    if (!open_stock()) {
        tell(line, 'x');
    } else if (!succeeds(lm_pager_start(2))) {
        tell(line, 'x');
    } else {
        serve(line);
    }
    CHECK(__real_waitpid(client, &status, 0) == client);
    if (status != 0)
        fprintf(stderr, "client: status %x\n", (unsigned)status);
    CHECK(status == 0);
    close_spaces();
    CHECK(stock == NULL || lm_pager_users(stock) == 0 || !strict);
    lm_pager_stop();
    lm_region_free(stock);
    close(line);
}

/* ---- runs ---- */

static void run(bool armed)
{
    int lines[2];
    pid_t clients[2];

    alarm(LIMIT);
    CHECK(dup2(scribbled, STDERR_FILENO) == STDERR_FILENO);
    CHECK(ftruncate(scribbled, 0) == 0 && lseek(scribbled, 0, SEEK_SET) == 0);
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    clients[0] = start_client(&lines[0]);
    clients[1] = start_client(&lines[1]);
    close(STDIN_FILENO); /* the userfaultfd of a child may get its number */
    strict = !armed;
    plan->armed = armed;
    be_pager(lines[0], clients[0]);
    plan->armed = false;
    CHECK(armed || shared->signals == 0);
    shared->signals = 0;
    strict = true;
    be_pager(lines[1], clients[1]);
    CHECK(shared->signals == 0);
    if (armed)
        check_usage(&board->healthy);
    else
        settle();
}

/* What the kernel may go on saying. */
static bool goes_on(int error)
{
    return error == ENOMEM || error == EMFILE || error == EAGAIN || error == ENOSPC;
}

/* The kernel reads no fork's event where there is no room for the child's descriptor. */
static const struct { enum call call; int error; } others[] = { { CALL_read, EMFILE }, { CALL_read, ENOMEM } };

static void try_all(bool thorough)
{
    struct plan made;
    struct usage healthy = find_calls(&made);
    int call, i, most = thorough ? 6 : 1;

    for (call = 0; call < CALL_COUNT; call++)
        for (i = 0; made.made[call] && i < most && calls[call].errors[i] >= 0; i++) {
            series_sparse = thorough ? 4 : 2;
            start_series((enum call)call, calls[call].errors[i], false, &healthy);
            series_sparse = 2; /* each takes a while */
            if (thorough && goes_on(calls[call].errors[i]))
                start_series((enum call)call, calls[call].errors[i], true, &healthy);
        }
    for (i = 0; thorough && i < 4; i++)
        start_series(others[i / 2].call, others[i / 2].error, i % 2 == 1, &healthy);
    while (running > 0)
        reap();
}

int main(int argc, char **argv)
{
    unsigned i;

    if (!has_userfaultfd())
        return 77;
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    for (i = 0; i < SIZE; i++)
        content[i] = i / CHUNK == ZERO ? 0 : (unsigned char)((i * UINT64_C(0x9E3779B97F4A7C15)) >> 40 | 1);
    source = memfd_create("source", MFD_CLOEXEC);
    CHECK(source >= 0 && pwrite(source, content, SIZE, 0) == SIZE);
    return run_all(argc, argv, "pager", try_all);
}
