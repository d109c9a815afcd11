/* SPDX-License-Identifier: Apache-2.0
 *
 * What an application does to the addresses of lazy memory: it moves, grows, unmaps, replaces and protects
 * parts of it, while others touch, prefetch, evict, open, close and fork. The bytes are right, or a touch
 * fails; and memory that is no longer the region's is left alone. Argument "fork" as in test_engine.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "harness.h"
#include "places.h"

#define CHUNK  65536u
#define CHUNKS 32u
#define PAGE   4096u
#define PAGES  (CHUNKS * CHUNK / PAGE)

static unsigned char *content;
static lm_chunk_record records[CHUNKS];
static lm_run runs[] = { { 0, CHUNKS, 0 } };
static uint64_t source_size = CHUNKS * (uint64_t)CHUNK;
static int source, backend = LM_BACKEND_UFFD, forks, channel[2];

static void make_source(void)
{
    unsigned i;

    source = memfd_create("source", MFD_CLOEXEC);
    CHECK(source >= 0 && pipe(channel) == 0);
    content = malloc(source_size);
    CHECK(content != NULL);
    fill_random(content, source_size, 9);
    for (i = 0; i < source_size; i++)
        content[i] |= 1; /* no byte of it is a zero */
    for (i = 0; i < CHUNKS; i++)
        records[i] = (lm_chunk_record){ .offset = i * (uint64_t)CHUNK, .stored_length = CHUNK,
                                        .checksum = lm_codec_checksum(content + i * (size_t)CHUNK, CHUNK) };
    CHECK(pwrite(source, content, source_size, 0) == (ssize_t)source_size);
}

static lm_region *open_region(void)
{
    lm_region_spec spec = {
        .content_size = source_size, .chunk_size = CHUNK, .backend = backend, .writable = 1, .threads = 2,
        .runs = runs, .run_count = 1, .records = records, .record_count = CHUNKS,
        .fds = &source, .source_sizes = &source_size, .source_count = 1, .url = "memfd",
    };
    lm_region *region;

    CHECK(lm_region_open(&spec, &region) == 0);
    return region;
}

static unsigned char *shown_by(lm_region *region)
{
    return lm_region_address(region);
}

static void close_last(lm_region *region)
{
    lm_region_free(region);
    CHECK(lm_engine_region_count() == 0 && lm_engine_thread_count() == 0);
}

static bool is_content(const unsigned char *at, size_t offset, size_t length)
{
    return memcmp(at, content + offset, length) == 0;
}

/* Whether a touch would do: -1, or the byte. A system call is told what would be a signal for us. */
static int peek(const unsigned char *at)
{
    unsigned char byte;

    if (write(channel[1], at, 1) != 1) {
        CHECK(errno == EFAULT);
        return -1;
    }
    CHECK(read(channel[0], &byte, 1) == 1);
    return byte;
}

/* What the core says of what is done on purpose. Returns what unhush takes. */
static int hush(void)
{
    int heard = dup(STDERR_FILENO), null = open("/dev/null", O_WRONLY);

    CHECK(heard >= 0 && null >= 0 && dup2(null, STDERR_FILENO) >= 0);
    close(null);
    return heard;
}

static void unhush(int heard)
{
    CHECK(dup2(heard, STDERR_FILENO) >= 0);
    close(heard);
}

static unsigned char *somewhere(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(memory != MAP_FAILED);
    return memory;
}

static unsigned char *move_to(unsigned char *from, size_t length, unsigned char *to, size_t grown)
{
    void *moved = mremap(from, length, grown, MREMAP_MAYMOVE | MREMAP_FIXED, to);

    CHECK(moved == to);
    return to;
}

static unsigned char *move(unsigned char *from, size_t length)
{
    return move_to(from, length, somewhere(length), length);
}

static unsigned char *duplicate(unsigned char *from, size_t length)
{
    void *moved = mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);

    CHECK(moved != MAP_FAILED);
    return moved;
}

static unsigned pieces_of(lm_region *region)
{
    unsigned count;

    pthread_mutex_lock(&lm_engine.lock);
    count = region->pieces.tables[region->pieces.current].count;
    pthread_mutex_unlock(&lm_engine.lock);
    return count;
}

/* Without EVENT_REMAP what was missing reads as zeros at the new address. */
static void test_moved_memory_shows_the_same_bytes(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *window, *again;
    uint8_t states[CHUNKS];

    CHECK(shown[5 * CHUNK] == content[5 * CHUNK]); /* this chunk is populated, others are not */
    window = move(shown + 3 * CHUNK + 5 * PAGE, 4 * CHUNK);
    CHECK(window[0] == content[3 * CHUNK + 5 * PAGE]);
    CHECK(is_content(window, 3 * CHUNK + 5 * PAGE, 4 * CHUNK));
    CHECK(lm_region_states(region, 0, CHUNKS, states) == 0 && states[3] == LM_STATE_PRESENT);
    /* Parts of it, on and back again. */
    again = move(window + 2 * PAGE, 3 * PAGE);
    CHECK(is_content(again, 3 * CHUNK + 7 * PAGE, 3 * PAGE));
    (void)move_to(again, 3 * PAGE, shown + 3 * CHUNK + 7 * PAGE, 3 * PAGE);
    CHECK(is_content(shown + 3 * CHUNK + 7 * PAGE, 3 * CHUNK + 7 * PAGE, 3 * PAGE));
    CHECK(is_content(shown, 0, 3 * CHUNK + 5 * PAGE));
    CHECK(is_content(shown + 8 * CHUNK, 8 * CHUNK, (CHUNKS - 8) * CHUNK));
    CHECK(munmap(window, 4 * CHUNK) == 0);
    CHECK(pieces_of(region) == 3);
    close_last(region);
}

static void test_moved_memory_that_was_never_touched(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *window = move(shown, source_size);
    uint64_t cursor = 0, failed;
    unsigned char out[8];
    int result;

    CHECK(lm_region_prefetch(region, 0, CHUNKS / 2, 1) == 0);
    while ((result = lm_region_wait(region, 0, CHUNKS / 2, 5, &cursor, &failed)) == 0)
        ;
    CHECK(result == 1);
    CHECK(is_content(window, 0, source_size));
    CHECK(lm_region_read(region, 100, out, sizeof out) == LM_E_MOVED);
    /* The application's now: what was written there is not given back with the chunk. */
    window[17] = 0;
    CHECK(lm_region_evict(region, 0, CHUNKS) == 0);
    CHECK(window[17] == 0 && is_content(window + 18, 18, source_size - 18));
    CHECK(munmap(window, source_size) == 0);
    close_last(region);
}

static void test_both_of_two_places_show_the_bytes(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *copy;

    shown[9 * CHUNK] = 0; /* written, and moved along */
    copy = duplicate(shown + 8 * CHUNK, 8 * CHUNK);
    CHECK(copy[CHUNK] == 0 && is_content(copy + CHUNK + 1, 9 * CHUNK + 1, 7 * CHUNK - 1));
    CHECK(is_content(shown, 0, source_size));
    CHECK(munmap(copy, 8 * CHUNK) == 0);
    close_last(region);
}

/* What mremap adds is registered along with the rest, and no event tells of it: as behind the end of a file. */
static void test_grown_memory_is_refused(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *window = somewhere(8 * CHUNK), *apart;

    (void)move_to(shown, 2 * CHUNK, window, 4 * CHUNK);
    CHECK(peek(window + 3 * CHUNK + 5) == -1 && peek(window + 2 * CHUNK) == -1);
    CHECK(is_content(window, 0, 2 * CHUNK));
    CHECK(munmap(window + 4 * CHUNK, 4 * CHUNK) == 0); /* room to grow in place */
    CHECK(mremap(window, 4 * CHUNK, 3 * CHUNK / 2, 0) == window);
    CHECK(mremap(window, 3 * CHUNK / 2, 6 * CHUNK, 0) == window);
    CHECK(peek(window + 3 * CHUNK / 2) == -1 && peek(window + 5 * CHUNK) == -1);
    CHECK(is_content(window, 0, 3 * CHUNK / 2));
    CHECK(is_content(shown + 2 * CHUNK, 2 * CHUNK, source_size - 2 * CHUNK));
    apart = move(window + 4 * CHUNK + PAGE, PAGE);
    CHECK(peek(apart) == -1);
    CHECK(madvise(apart, PAGE, MADV_DONTNEED) == 0 && peek(apart) == -1);
    CHECK(munmap(apart, PAGE) == 0 && munmap(window, 6 * CHUNK) == 0);
    close_last(region);
}

static void fill(unsigned char *at, size_t length)
{
    memset(at, 0xA5, length);
}

static bool is_filled(const unsigned char *at, size_t length)
{
    return at[0] == 0xA5 && memcmp(at, at + 1, length - 1) == 0;
}

static unsigned char *replace(unsigned char *at, size_t length)
{
    CHECK(mmap(at, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
    fill(at, length);
    return at;
}

/* Whatever the region does later, it does not do to memory that the application has put there since. */
static void test_foreign_memory_in_a_region_is_left_alone(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *foreign[4];
    uint64_t cursor = 0, failed;
    size_t i;

    CHECK(shown[4 * CHUNK] == content[4 * CHUNK] && shown[6 * CHUNK] == content[6 * CHUNK]);
    foreign[0] = replace(shown + 4 * CHUNK + PAGE, PAGE);
    CHECK(munmap(shown + 6 * CHUNK, 2 * CHUNK) == 0);
    foreign[1] = replace(shown + 6 * CHUNK + CHUNK / 2, PAGE);
    foreign[2] = somewhere(PAGE);
    fill(foreign[2], PAGE);
    foreign[2] = move_to(foreign[2], PAGE, shown + 9 * CHUNK, PAGE);
    foreign[3] = replace(shown + source_size - PAGE, PAGE);
    CHECK(lm_region_evict(region, 0, CHUNKS) == 0);
    CHECK(lm_region_prefetch(region, 0, CHUNKS, 1) == 0);
    while (lm_region_wait(region, 0, CHUNKS, 5, &cursor, &failed) == 0)
        ;
    CHECK(is_content(shown, 0, 4 * CHUNK + PAGE));
    CHECK(is_content(shown + 4 * CHUNK + 2 * PAGE, 4 * CHUNK + 2 * PAGE, 2 * CHUNK - 2 * PAGE));
    CHECK(is_content(shown + 9 * CHUNK + PAGE, 9 * CHUNK + PAGE, source_size - 9 * CHUNK - 2 * PAGE));
    CHECK(lm_region_evict(region, 0, CHUNKS) == 0);
    close_last(region);
    for (i = 0; i < 4; i++) {
        CHECK(is_filled(foreign[i], PAGE));
        CHECK(munmap(foreign[i], PAGE) == 0);
    }
    if (backend == LM_BACKEND_UFFD)
        CHECK(peek(shown) == -1 && peek(shown + 6 * CHUNK) == -1 && peek(shown + 10 * CHUNK) == -1);
}

static void test_regions_move_onto_one_another(void)
{
    lm_region *one = open_region(), *two = open_region();
    unsigned char *first = shown_by(one), *second = shown_by(two);

    (void)move_to(first + 2 * CHUNK, 3 * CHUNK, second + 10 * CHUNK, 3 * CHUNK);
    (void)move_to(second + 20 * CHUNK, 2 * CHUNK, second + 11 * CHUNK, 2 * CHUNK);
    (void)move_to(second + PAGE, PAGE, first + 2 * CHUNK, PAGE);
    CHECK(is_content(second + 10 * CHUNK, 2 * CHUNK, CHUNK));
    CHECK(is_content(second + 11 * CHUNK, 20 * CHUNK, 2 * CHUNK));
    CHECK(is_content(second + 13 * CHUNK, 13 * CHUNK, 7 * CHUNK));
    CHECK(is_content(first + 2 * CHUNK, PAGE, PAGE));
    CHECK(is_content(first + 5 * CHUNK, 5 * CHUNK, source_size - 5 * CHUNK));
    /* A window of `one` lies in `two`, which closes around it. */
    lm_region_free(two);
    CHECK(is_content(second + 10 * CHUNK, 2 * CHUNK, CHUNK));
    CHECK(munmap(second + 10 * CHUNK, 3 * CHUNK) == 0);
    CHECK(munmap(first + 2 * CHUNK, PAGE) == 0);
    close_last(one);
}

/* Closed under a window: what was populated stays, what was not can be had no longer. Never zeros. */
static void test_windows_outlive_their_region(void)
{
    lm_region *region = open_region();
    unsigned char *window = move(shown_by(region) + 4 * CHUNK, 4 * CHUNK);

    CHECK(window[CHUNK + 7] == content[5 * CHUNK + 7]);
    close_last(region);
    CHECK(is_content(window + CHUNK, 5 * CHUNK, CHUNK));
    CHECK(peek(window) == -1 && peek(window + 2 * CHUNK + PAGE) == -1);
    CHECK(munmap(window, 4 * CHUNK) == 0);
}

/* Mappings cut in two by protection and advice: the kernel's operations work within one. */
static void test_protection_and_advice_do_what_they_do(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), resident[2];
    unsigned i;

    for (i = 0; i < 8 * CHUNK / PAGE; i += 2)
        CHECK(mprotect(shown + i * PAGE, PAGE, i % 4 == 0 ? PROT_READ : PROT_NONE) == 0);
    CHECK(madvise(shown + 9 * CHUNK + PAGE, PAGE, MADV_DONTFORK) == 0);
    CHECK(madvise(shown + 10 * CHUNK + PAGE, 5 * PAGE, MADV_HUGEPAGE) == 0);
    CHECK(mincore(shown, 2 * PAGE, resident) == 0 && !(resident[0] & 1) && !(resident[1] & 1));
    for (i = 0; i < 8 * CHUNK / PAGE; i++)
        if (i % 4 != 2)
            CHECK(is_content(shown + i * PAGE, i * PAGE, PAGE));
    for (i = 2; i < 8 * CHUNK / PAGE; i += 4) {
        CHECK(backend != LM_BACKEND_UFFD || peek(shown + i * PAGE) == -1);
        CHECK(mprotect(shown + i * PAGE, PAGE, PROT_READ) == 0);
    }
    CHECK(is_content(shown, 0, source_size));
    CHECK(mincore(shown, 2 * PAGE, resident) == 0 && (resident[0] & 1) && (resident[1] & 1));
    CHECK(madvise(shown, source_size, MADV_DONTNEED) == 0 && is_content(shown, 0, source_size));
    CHECK(madvise(shown, source_size, MADV_FREE) == 0 && is_content(shown, 0, source_size));
    close_last(region);
}

/* More pieces than are followed: the rest fails, it is not guessed. */
static void test_too_many_pieces_are_refused(void)
{
    lm_region *region;
    unsigned char *shown, *window;
    unsigned i, lost = 0;
    int heard = hush(), byte;

    region = open_region();
    shown = shown_by(region);
    window = somewhere(2 * LM_PIECES * PAGE);
    for (i = 0; i < PAGES; i += 2) /* 256 pages move, 256 are left: all of the table */
        (void)move_to(shown + i * PAGE, PAGE, window + i * PAGE, PAGE);
    CHECK(pieces_of(region) == LM_PIECES);
    (void)move_to(shown + PAGE, PAGE, window + PAGE, PAGE); /* fills a gap: three become one */
    lm_region_free(region);
    region = open_region();
    shown = shown_by(region);
    for (i = 0; i < LM_PIECES; i++) /* of one page, many times the same bytes */
        (void)move_to(duplicate(shown, PAGE), PAGE, window + 2 * i * PAGE, PAGE);
    for (i = 0; i < LM_PIECES; i++) {
        byte = peek(window + 2 * i * PAGE);
        CHECK(byte == -1 || byte == content[0]);
        lost += byte == -1;
    }
    CHECK(lost > 0 && lost < 4);
    CHECK(is_content(shown, 0, source_size));
    lm_region_free(region);
    CHECK(munmap(window, 2 * LM_PIECES * PAGE) == 0);
    unhush(heard);
}

/* ---- races ---- */

#define MOVERS 3
#define THREADS 5

struct mover {
    lm_region *region;
    unsigned char *at;
    size_t offset, length;
    uint64_t seed;
};

/* Threads that move or unmap lazy memory take turns: the kernel does not tell in which order they did (places.c).
 * If they do not, some of it raises signals; what does not is right all the same. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static bool in_turns;

static void begin_turn(void)
{
    if (in_turns)
        pthread_mutex_lock(&turn);
}

static void end_turn(void)
{
    if (in_turns)
        pthread_mutex_unlock(&turn);
}

static _Thread_local sigjmp_buf *refusal;

static void on_signal(int number)
{
    if (refusal == NULL)
        abort();
    siglongjmp(*refusal, number);
}

/* Like peek, by a touch: threads would share the pipe, and system calls may not populate everywhere. What the
 * kernel puts in order between threads that map and move is not known to the sanitizer. */
__attribute__((no_sanitize("thread"))) static int touch(const volatile unsigned char *at)
{
    sigjmp_buf here;
    int byte = -1;

    refusal = &here;
    if (sigsetjmp(here, 1) == 0)
        byte = *at;
    refusal = NULL;
    return byte;
}

static void check_byte(const struct mover *self, size_t at)
{
    int byte = touch(self->at + at);

    CHECK(byte == content[self->offset + at] || (byte == -1 && !in_turns));
}

static void check_in_child(const struct mover *self)
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(50);
        _exit(is_content(self->at, self->offset, self->length) ? 0 : 1);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

static bool move_somehow(struct mover *self)
{
    size_t cut = next_random(&self->seed) % 3 * PAGE;
    void *moved;

    switch (next_random(&self->seed) % 6) {
    case 0: /* wherever the kernel likes, where others have just been */
        moved = mremap(self->at, self->length, self->length + PAGE, MREMAP_MAYMOVE);
        if (moved == MAP_FAILED)
            return false;
        self->at = moved;
        CHECK(touch(self->at + self->length) == -1);
        CHECK(mremap(moved, self->length + PAGE, self->length, 0) == moved);
        break;
    case 1:
        moved = somewhere(self->length);
        if (mremap(self->at, self->length, self->length, MREMAP_MAYMOVE | MREMAP_FIXED, moved) != moved)
            return false;
        self->at = moved;
        break;
    case 2:
        moved = mremap(self->at, self->length, self->length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        if (moved == MAP_FAILED)
            return false;
        CHECK(munmap(self->at, self->length) == 0);
        self->at = moved;
        break;
    case 3:
        if (self->length > cut + CHUNK) {
            CHECK(cut == 0 || munmap(self->at, cut) == 0);
            self->at += cut;
            self->offset += cut;
            self->length -= cut;
        }
        break;
    case 4: /* memory of its own where it has just been */
        moved = self->at;
        self->at = mremap(moved, self->length, self->length, MREMAP_MAYMOVE | MREMAP_FIXED, somewhere(self->length));
        if (self->at == MAP_FAILED) {
            self->at = moved;
            return false;
        }
        if (mmap(moved, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
            moved) {
            fill(moved, PAGE);
            CHECK(is_filled(moved, PAGE));
            CHECK(munmap(moved, PAGE) == 0);
        }
        break;
    default:
        CHECK(madvise(self->at, self->length, MADV_DONTNEED) == 0);
    }
    return true;
}

static void *keep_moving(void *argument)
{
    struct mover *self = argument;
    size_t at;
    int i, k;

    for (i = 0; i < 100; i++) {
        begin_turn();
        CHECK(move_somehow(self) || !in_turns);
        end_turn();
        if (forks && in_turns && i % 20 == 0)
            check_in_child(self);
        for (k = 0; k < 5; k++)
            check_byte(self, next_random(&self->seed) % self->length);
    }
    for (at = 0; at < self->length; at += PAGE)
        check_byte(self, at + 1);
    return NULL;
}

static void *evict_and_prefetch(void *argument)
{
    struct mover *self = argument;
    int i;

    for (i = 0; i < 60; i++) {
        uint64_t chunk = next_random(&self->seed) % CHUNKS;

        CHECK(lm_region_evict(self->region, chunk, 1) == 0);
        CHECK(lm_region_prefetch(self->region, chunk, 1, 1) == 0);
    }
    return NULL;
}

static void *open_and_close(void *argument)
{
    struct mover *self = argument;
    int i;

    for (i = 0; i < 25; i++) {
        lm_region *region = open_region();
        size_t at = next_random(&self->seed) % source_size;

        CHECK(shown_by(region)[at] == content[at]);
        at = at / PAGE * PAGE;
        begin_turn();
        CHECK(munmap(shown_by(region) + at, PAGE) == 0);
        end_turn();
        lm_region_free(region);
    }
    return NULL;
}

static void move_and_race(int rounds)
{
    static void *(*const bodies[THREADS])(void *) = { keep_moving, keep_moving, keep_moving, evict_and_prefetch,
                                                      open_and_close };
    size_t length = source_size / MOVERS / PAGE * PAGE;
    struct sigaction mine = { .sa_handler = on_signal }, bus, segv;
    struct mover movers[THREADS];
    pthread_t threads[THREADS];
    lm_region *region;
    int round, i;

    CHECK(sigaction(SIGBUS, &mine, &bus) == 0 && sigaction(SIGSEGV, &mine, &segv) == 0);
    for (round = 0; round < rounds; round++) {
        region = open_region();
        for (i = 0; i < THREADS; i++) {
            movers[i] = (struct mover){ .region = region, .at = shown_by(region) + (size_t)i * length,
                                        .offset = (size_t)i * length, .length = length,
                                        .seed = (uint64_t)(10 * round + i + 1) };
            CHECK(pthread_create(&threads[i], NULL, bodies[i], &movers[i]) == 0);
        }
        for (i = 0; i < THREADS; i++)
            pthread_join(threads[i], NULL);
        for (i = 0; i < MOVERS; i++)
            CHECK(munmap(movers[i].at, movers[i].length) == 0);
        close_last(region);
    }
    CHECK(sigaction(SIGBUS, &bus, NULL) == 0 && sigaction(SIGSEGV, &segv, NULL) == 0);
}

static void test_moving_races_everything_else(void)
{
    in_turns = true;
    move_and_race(3);
}

static void test_moving_without_turns_shows_no_other_bytes(void)
{
    int heard = hush();

    in_turns = false;
    move_and_race(6);
    unhush(heard);
}

struct step { unsigned char *from, *to; size_t length; _Atomic pid_t thread; };

static void *take_step(void *argument)
{
    struct step *step = argument;

    step->thread = (pid_t)syscall(SYS_gettid);
    (void)move_to(step->from, step->length, step->to, step->length);
    return NULL;
}

/* Back when the thread has moved its memory and waits for its event to be read: nobody can, lock is held. */
static void begin_step(struct step *step, pthread_t *thread)
{
    char name[64], state = '?';
    FILE *file;

    CHECK(pthread_create(thread, NULL, take_step, step) == 0);
    while (step->thread == 0 || msync(step->from, PAGE, MS_ASYNC) == 0)
        sched_yield();
    snprintf(name, sizeof name, "/proc/self/task/%d/stat", step->thread);
    while (state != 'D' && state != 'S') {
        file = fopen(name, "r");
        CHECK(file != NULL && fscanf(file, "%*d (%*[^)]) %c", &state) == 1);
        fclose(file);
    }
}

/* Where one piece has just been moved from another one is put, and the second move is told of first, as when
 * a thread is held up between its move and its event. */
static void test_moves_told_in_the_wrong_order_are_not_believed(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *place = somewhere(CHUNK);
    struct step first = { .from = shown + 2 * CHUNK, .to = place, .length = CHUNK };
    struct step second = { .from = shown + 5 * CHUNK, .to = shown + 2 * CHUNK, .length = CHUNK };
    struct sigaction mine = { .sa_handler = on_signal }, bus, segv;
    const struct lm_uffd *uffd = &lm_engine.uffds[region->uffd];
    struct lm_uffd_message told[2];
    int heard, byte;
    pthread_t threads[2];

    CHECK(sigaction(SIGBUS, &mine, &bus) == 0 && sigaction(SIGSEGV, &mine, &segv) == 0);
    heard = hush();
    pthread_mutex_lock(&lm_engine.lock);
    begin_step(&first, &threads[0]);
    begin_step(&second, &threads[1]);
    CHECK(lm_uffd_read(uffd->fd, told, 2) == 2 && told[0].from == (uintptr_t)first.from);
    lm_places_note_locked(uffd, &told[1]);
    lm_places_note_locked(uffd, &told[0]);
    pthread_mutex_unlock(&lm_engine.lock);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    unhush(heard);
    byte = touch(place + 7);
    CHECK(byte == -1 || byte == content[2 * CHUNK + 7]);
    byte = touch(shown + 2 * CHUNK + 7);
    CHECK(byte == -1 || byte == content[5 * CHUNK + 7]);
    /* What has not moved meanwhile is believed, and so is what moves later. */
    CHECK(is_content(shown, 0, 2 * CHUNK) && is_content(shown + 3 * CHUNK, 3 * CHUNK, 2 * CHUNK));
    (void)move_to(shown + 8 * CHUNK, CHUNK, shown + 5 * CHUNK, CHUNK);
    CHECK(is_content(shown + 5 * CHUNK, 8 * CHUNK, CHUNK));
    CHECK(munmap(place, CHUNK) == 0 && munmap(shown + 2 * CHUNK, CHUNK) == 0);
    CHECK(munmap(shown + 5 * CHUNK, CHUNK) == 0);
    close_last(region);
    CHECK(sigaction(SIGBUS, &bus, NULL) == 0 && sigaction(SIGSEGV, &segv, NULL) == 0);
}

/* ---- fork ---- */

static void test_child_has_windows_and_holes_as_its_parent_does(void)
{
    lm_region *region = open_region();
    unsigned char *shown = shown_by(region), *window, *hole;
    int status;
    pid_t pid;

    window = move(shown + 2 * CHUNK, 3 * CHUNK);
    hole = replace(shown + 7 * CHUNK, CHUNK);
    CHECK(madvise(shown + 10 * CHUNK + PAGE, 4 * CHUNK, MADV_DONTFORK) == 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(20);
        CHECK(is_content(window, 2 * CHUNK, 3 * CHUNK));
        CHECK(is_filled(hole, CHUNK));
        CHECK(peek(shown + 10 * CHUNK + PAGE) == -1 && peek(shown + 12 * CHUNK) == -1);
        CHECK(is_content(shown + 10 * CHUNK, 10 * CHUNK, PAGE));
        CHECK(is_content(shown + 14 * CHUNK + PAGE, 14 * CHUNK + PAGE, source_size - 14 * CHUNK - PAGE));
        /* What is the child's own, in the gap, is not the region's to close. */
        CHECK(mmap(shown + 11 * CHUNK, PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == shown + 11 * CHUNK);
        fill(shown + 11 * CHUNK, PAGE);
        window = move(window, 3 * CHUNK);
        CHECK(madvise(window, 3 * CHUNK, MADV_DONTNEED) == 0 && is_content(window, 2 * CHUNK, 3 * CHUNK));
        CHECK(munmap(window, 3 * CHUNK) == 0);
        lm_region_free(region);
        CHECK(is_filled(shown + 11 * CHUNK, PAGE) && is_filled(hole, CHUNK));
        _exit(lm_engine_region_count() == 0 ? 0 : 1);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    CHECK(is_content(window, 2 * CHUNK, 3 * CHUNK) && is_content(shown + 8 * CHUNK, 8 * CHUNK, 8 * CHUNK));
    CHECK(munmap(window, 3 * CHUNK) == 0 && munmap(hole, CHUNK) == 0);
    close_last(region);
}

/* A daemon closes all descriptors: nobody reads events any more, and nobody may wait for that. */
static void test_unmapping_does_not_wait_for_an_engine_that_is_lost(void)
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        unsigned char *shown, *window;
        lm_region *region;

        alarm(30);
        region = open_region();
        shown = shown_by(region);
        CHECK(shown[0] == content[0]);
        window = move(shown + 8 * CHUNK, CHUNK);
        CHECK(freopen("/dev/null", "w", stderr) != NULL);
        CHECK(close_range(source + 3, ~0u, 0) == 0);
        CHECK(munmap(shown + 4 * CHUNK, CHUNK) == 0);
        CHECK(munmap(window, CHUNK) == 0);
        lm_region_free(region);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

int main(int argc, char **argv)
{
    lm_way_report report = { .error = ENOSYS };

    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    make_source();
    CHECK(lm_probe_way(LM_WAY_SYSCALL, &report) == 0);
    if (report.error != 0) {
        puts("no userfaultfd here");
        return 77;
    }
    forks = argc > 1 && strcmp(argv[1], "fork") == 0;
    for (; backend <= LM_BACKEND_UFFD_USER; backend++) {
        test_moved_memory_shows_the_same_bytes();
        test_moved_memory_that_was_never_touched();
        test_both_of_two_places_show_the_bytes();
        test_grown_memory_is_refused();
        test_foreign_memory_in_a_region_is_left_alone();
        test_regions_move_onto_one_another();
        test_windows_outlive_their_region();
        test_protection_and_advice_do_what_they_do();
        test_moving_races_everything_else();
        test_moves_told_in_the_wrong_order_are_not_believed();
        test_moving_without_turns_shows_no_other_bytes();
        if (backend == LM_BACKEND_UFFD)
            test_too_many_pieces_are_refused();
        if (forks) {
            test_child_has_windows_and_holes_as_its_parent_does();
            test_unmapping_does_not_wait_for_an_engine_that_is_lost();
        }
    }
    free(content);
    puts("ok");
    return 0;
}
