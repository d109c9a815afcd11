/* SPDX-License-Identifier: Apache-2.0
 *
 * The pager's core under threads and sanitizers: several processes, made before any thread, have their memory
 * served; they touch, give back, move, unmap, fork and die. What must be right is checked in them; here it is that
 * everything is given back. (tests/native/pager_tree.c goes further, against a whole pager.)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "harness.h"
#include "ledger.h"
#include "pager.h"
#include "pager_client.h"
#include "pager_protocol.h"
#include "pager_stock.h"
#include "space.h"
#include "uffd.h"

#define PART    65536u /* of a chunk, that goes ahead of the rest where chunks are four times as large */
#define CHUNK   (4 * PART)
#define CHUNKS  24u
#define BAD     20u /* its checksum is wrong */
#define CLIENTS 4
#define PAGE    4096u

static unsigned char content[CHUNK * CHUNKS];

/* ---- the table against a model ---- */

#define MODEL 64

static void test_a_space_follows_a_model(void)
{
    struct lm_space_table table = { 0 };
    static struct lm_region *const region = (struct lm_region *)0x1000;
    struct { uint64_t offset; bool zero; } model[MODEL];
    uint64_t seed = 7;
    int round, i;

    CHECK(lm_space_add(&table, &(struct lm_space_piece){ .at = 1000, .length = 24, .offset = 500, .region = region,
                                                         .page = 1, .show = LM_SHOW_COPY, .forgets = true }) == 0);
    CHECK(lm_space_add(&table, &(struct lm_space_piece){ .at = 1010, .length = 2, .region = region }) == -EEXIST);
    for (i = 0; i < MODEL; i++)
        model[i].offset = i < 24 ? 500 + (uint64_t)i : 0, model[i].zero = false;
    for (round = 0; round < 20000; round++) {
        uint64_t from = next_random(&seed) % MODEL, to = next_random(&seed) % MODEL, length = 1 + next_random(&seed) % 9;
        bool confused = false, taken = false;

        if (from + length > MODEL || to + length > MODEL || (from < to + length && to < from + length))
            continue;
        switch (round % 4) {
        case 0: /* back to where something is, so that the table does not run empty */
            if (round % 100 == 0) {
                CHECK(lm_space_unmap(&table, 1000, 1000 + MODEL) == 0 && table.count == 0);
                CHECK(lm_space_add(&table, &(struct lm_space_piece){ .at = 1000, .length = 24, .offset = 500,
                                                                     .region = region, .page = 1,
                                                                     .show = LM_SHOW_COPY, .forgets = true }) == 0);
                for (i = 0; i < MODEL; i++)
                    model[i].offset = i < 24 ? 500 + (uint64_t)i : 0, model[i].zero = false;
            }
            break;
        case 1:
            CHECK(lm_space_remove(&table, 1000 + from, 1000 + from + length) == 0);
            for (i = 0; i < (int)length; i++)
                model[from + (uint64_t)i].zero = model[from + (uint64_t)i].offset != 0;
            break;
        case 2:
            CHECK(lm_space_unmap(&table, 1000 + from, 1000 + from + length) == 0);
            for (i = 0; i < (int)length; i++)
                model[from + (uint64_t)i].offset = 0;
            break;
        default:
            for (i = 0; i < (int)length; i++)
                taken = taken || model[to + (uint64_t)i].offset != 0;
            CHECK(lm_space_move(&table, 1000 + from, 1000 + to, length, &confused) == 0);
            CHECK(confused == taken);
            for (i = 0; i < (int)length; i++) {
                model[to + (uint64_t)i] = model[from + (uint64_t)i];
                if (taken)
                    model[to + (uint64_t)i].offset = 0;
                model[from + (uint64_t)i].offset = 0;
            }
        }
        for (i = 0; i < MODEL; i++) {
            const struct lm_space_piece *piece = lm_space_find(&table, 1000 + (uint64_t)i);

            CHECK((piece != NULL) == (model[i].offset != 0));
            if (piece != NULL) {
                CHECK(piece->offset + (1000 + (uint64_t)i - piece->at) == model[i].offset);
                CHECK((piece->show == LM_SHOW_ZERO) == model[i].zero);
            }
        }
    }
    lm_space_clear(&table);
}

/* ---- the ledger: what the next pager makes of it, wherever this one was killed ---- */

static struct lm_uffd_message event(int kind, uint64_t a, uint64_t b, uint64_t c)
{
    struct lm_uffd_message message = { .event = (uint8_t)kind };

    message.from = a, message.to = b, message.length = c; /* the others' fields lie there, too */
    return message;
}

/* What is in the file now, read as a process that has nothing but the file would. */
static int64_t read_back(const struct lm_ledger *ledger, uint32_t child, lm_ledger_report *out, lm_space_part parts[4])
{
    off_t size = lseek(ledger->fd, 0, SEEK_END);
    void *bytes = malloc((size_t)size);
    int64_t count;

    CHECK(pread(ledger->fd, bytes, (size_t)size, 0) == size);
    count = lm_ledger_read(bytes, (uint64_t)size, child, out, parts, 4);
    free(bytes);
    return count;
}

static void test_a_ledger_tells_all_that_was_taken_from_the_kernel(void)
{
    static struct lm_region region = { .serial = 77 };
    struct lm_space_piece piece = { .at = 0x100000, .length = 0x10000, .offset = 0x3000, .region = &region, .page = PAGE,
                                    .show = LM_SHOW_COPY, .forgets = true };
    struct lm_ledger_facts facts = { .space = 5, .parent = 2, .features = LM_SPACE_LEFT, .inode = 9 };
    struct lm_space_table table = { 0 };
    struct lm_ledger ledger = { 0 };
    struct lm_uffd_message *room;
    lm_ledger_report told;
    lm_space_part parts[4];
    uint64_t first_ns;
    int i;

    CHECK(lm_ledger_room(&ledger) == NULL); /* there is none */
    CHECK(lm_space_add(&table, &piece) == 0);
    CHECK(lm_ledger_begin(&ledger, &facts, &table) == 0);
    CHECK(read_back(&ledger, 0, &told, parts) == 1);
    CHECK(told.space == 5 && told.parent == 2 && told.features == LM_SPACE_LEFT && told.inode == 9);
    CHECK(parts[0].address == 0x100000 && parts[0].length == 0x10000 && parts[0].offset == 0x3000);
    CHECK(parts[0].region == 77 && parts[0].page == PAGE && parts[0].flags == LM_PAGER_REMOVED_ZERO);
    CHECK(read_back(&ledger, 1, &told, parts) == -ENOENT);

    /* Killed between the kernel's telling and the first look at it: a move, a child, a fault, an unmap. */
    room = lm_ledger_room(&ledger);
    room[0] = event(LM_UFFD_EVENT_REMAP, 0x100000, 0x900000, 0x4000);
    room[1] = (struct lm_uffd_message){ .event = LM_UFFD_EVENT_FORK, .child = 33 };
    room[2] = event(LM_UFFD_EVENT_PAGEFAULT, 0, 0x900000, 0);
    room[3] = event(LM_UFFD_EVENT_UNMAP, 0x100000, 0x110000, 0);
    CHECK(read_back(&ledger, 0, &told, parts) == 1);
    CHECK(parts[0].address == 0x900000 && parts[0].length == 0x4000 && parts[0].offset == 0x3000);
    CHECK(read_back(&ledger, 1, &told, parts) == 2); /* before the unmap */
    CHECK(told.uffd == 33 && told.parent == 5 && told.features == LM_SPACE_LEFT);
    CHECK(parts[0].address == 0x104000 && parts[0].offset == 0x7000 && parts[1].address == 0x900000);
    CHECK(read_back(&ledger, 2, &told, parts) == -ENOENT);

    CHECK(lm_ledger_settle(ledger.fd) == 0); /* another pager has found the child */
    CHECK(read_back(&ledger, 1, &told, parts) == -ENOENT);
    CHECK(read_back(&ledger, 0, &told, parts) == 1 && parts[0].address == 0x900000);
    lm_ledger_end(&ledger);
    CHECK(lm_ledger_begin(&ledger, &facts, &table) == 0);
    room = lm_ledger_room(&ledger);
    room[0] = event(LM_UFFD_EVENT_REMAP, 0x100000, 0x900000, 0x4000);
    room[1] = (struct lm_uffd_message){ .event = LM_UFFD_EVENT_FORK, .child = 33 };
    room[2] = event(LM_UFFD_EVENT_PAGEFAULT, 0, 0x900000, 0);
    room[3] = event(LM_UFFD_EVENT_UNMAP, 0x100000, 0x110000, 0);

    /* Killed while they were being recorded: the child is not made twice. */
    lm_ledger_count(&ledger, 4);
    lm_ledger_apply(&ledger);
    CHECK(read_back(&ledger, 1, &told, parts) == 2);
    lm_ledger_apply(&ledger);
    CHECK(read_back(&ledger, 1, &told, parts) == -ENOENT);
    CHECK(read_back(&ledger, 0, &told, parts) == 1 && parts[0].address == 0x900000);

    /* Faults that were read and answered leave no room taken; zeros are not lost. */
    lm_ledger_apply(&ledger);
    lm_ledger_apply(&ledger);
    CHECK(lm_ledger_room(&ledger) == room + 4);
    room[4] = event(LM_UFFD_EVENT_PAGEFAULT, 0, 0x900000, 0);
    lm_ledger_discard(&ledger, 1);
    room[4] = event(LM_UFFD_EVENT_REMOVE, 0x901000, 0x902000, 0);
    CHECK(read_back(&ledger, 0, &told, parts) == 3);
    CHECK(parts[0].length == 0x1000 && parts[1].flags == (LM_PAGER_REMOVED_ZERO | LM_PAGER_IS_ZERO));
    CHECK(parts[2].address == 0x902000 && parts[2].offset == 0x5000);

    /* What cannot be believed is said not to be. */
    lm_ledger_count(&ledger, 1);
    room[5] = event(LM_UFFD_EVENT_REMAP, 0x900000, 0x902000, 0x1000);
    CHECK(read_back(&ledger, 0, &told, parts) == 2 && (told.features & LM_SPACE_DISBELIEVED));

    /* It fills up, and the next one takes its place. */
    for (i = 0; (room = lm_ledger_room(&ledger)) != NULL; i++)
        lm_ledger_count(&ledger, LM_LEDGER_BATCH);
    CHECK(i == 3);
    i = ledger.fd;
    first_ns = told.begun_ns;
    CHECK(lm_ledger_begin(&ledger, &facts, &table) == 0 && ledger.fd != i);
    CHECK(lm_ledger_room(&ledger) != NULL && read_back(&ledger, 0, &told, parts) == 1);
    CHECK(told.begun_ns > first_ns);
    lm_space_clear(&table);
    lm_ledger_end(&ledger);
    CHECK(ledger.head == NULL);
}

/* A file that somebody else gives us. */
static void test_any_bytes_may_be_given_for_a_ledger(void)
{
    static struct lm_region region = { .serial = 77 };
    struct lm_space_piece piece = { .at = 0x100000, .length = 0x10000, .region = &region, .page = PAGE };
    struct lm_ledger_facts facts = { .space = 5 };
    struct lm_space_table table = { 0 };
    struct lm_ledger ledger = { 0 };
    unsigned char bytes[1024], damaged[1024];
    lm_ledger_report told;
    lm_space_part parts[4];
    uint64_t seed = 5;
    off_t size;
    int i;

    CHECK(lm_space_add(&table, &piece) == 0);
    CHECK(lm_ledger_begin(&ledger, &facts, &table) == 0);
    ledger.messages[0] = event(LM_UFFD_EVENT_REMAP, 0x100000, 0x900000, 0x4000);
    ledger.messages[1] = (struct lm_uffd_message){ .event = LM_UFFD_EVENT_FORK, .child = 33 };
    size = lseek(ledger.fd, 0, SEEK_END);
    CHECK((size_t)size > sizeof bytes && pread(ledger.fd, bytes, sizeof bytes, 0) == sizeof bytes);
    CHECK(lm_ledger_read(bytes, 0, 0, &told, parts, 4) == -EBADMSG);
    CHECK(lm_ledger_read(bytes, sizeof bytes, 0, &told, parts, 4) == -EBADMSG); /* cut short */
    for (i = 0; i < 20000; i++) {
        unsigned char *whole = calloc(1, (size_t)size);
        uint32_t child;

        memcpy(damaged, bytes, sizeof bytes);
        damaged[next_random(&seed) % 256] ^= (unsigned char)(1u << next_random(&seed) % 8);
        damaged[next_random(&seed) % 256] = (unsigned char)next_random(&seed);
        memcpy(whole, damaged, sizeof damaged);
        for (child = 0; child < 3; child++)
            CHECK(lm_ledger_read(whole, (uint64_t)size, child, &told, parts, 4) <= LM_SPACE_PIECES);
        free(whole);
    }
    lm_space_clear(&table);
    lm_ledger_end(&ledger);
}

/* ---- clients ---- */

static bool is_page(const unsigned char *at, uint64_t page)
{
    return memcmp(at, content + page * PAGE, PAGE) == 0;
}

/* Nothing here may take a lock of a sanitizer's: a client's child comes of a bare system call. */
static int be_client(int socket, bool shared, uint64_t seed)
{
    static const unsigned char zeros[PAGE];
    uint64_t pages = sizeof content / PAGE, good = BAD * (CHUNK / PAGE), i;
    unsigned char *memory, *moved, ready;
    int memfd = receive_descriptor(socket, &ready, 1), uffd, status;
    pid_t child;

    memory = mmap(NULL, sizeof content, PROT_NONE, MAP_PRIVATE | (shared ? 0 : MAP_ANONYMOUS), shared ? memfd : -1, 0);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (memory == MAP_FAILED || uffd < 0)
        return 10;
    send_descriptor(socket, uffd, &memory, sizeof memory);
    if (read(socket, &ready, 1) != 1 || mprotect(memory, sizeof content, PROT_READ | PROT_WRITE) < 0)
        return 11;
    for (i = 0; i < 60; i++) {
        uint64_t page = next_random(&seed) % good;

        if (!is_page(memory + page * PAGE, page))
            return 12;
    }
    /* A child by the bare system call has what its parent has, and what neither has touched. */
    child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (child == 0) {
        for (i = 0; i < good; i++)
            if (!is_page(memory + i * PAGE, i))
                _exit(20);
        _exit(0);
    }
    if (madvise(memory + PAGE, 3 * PAGE, MADV_DONTNEED) < 0)
        return 13;
    for (i = 1; i < 4; i++)
        if (shared ? !is_page(memory + i * PAGE, i) : memcmp(memory + i * PAGE, zeros, PAGE) != 0)
            return 14;
    moved = mmap(NULL, 2 * CHUNK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mremap(memory + 4 * CHUNK, 2 * CHUNK, 2 * CHUNK, MREMAP_MAYMOVE | MREMAP_FIXED, moved) != moved)
        return 15;
    for (i = 0; i < 2 * CHUNK / PAGE; i++)
        if (!is_page(moved + i * PAGE, 4 * CHUNK / PAGE + i))
            return 16;
    memory[5 * PAGE] ^= 0xff; /* its own from now on */
    if (munmap(memory + 8 * CHUNK, CHUNK) < 0 || waitpid(child, &status, 0) != child || status != 0)
        return 17;
    if (seed % 2 == 0)
        (void)raise(SIGKILL); /* in the middle of it */
    for (i = good + CHUNK / PAGE; i < pages; i++)
        if (!is_page(memory + i * PAGE, i))
            return 18;
    (void)signal(SIGBUS, SIG_DFL);
    return *(volatile unsigned char *)(memory + BAD * CHUNK); /* SIGBUS */
}

#define TOUCHED (2 * CHUNK + PART + 5 * PAGE)

/* Touches one byte, says so, and looks at the rest of that chunk when it is told to. */
static int be_patient(int socket)
{
    unsigned char *memory, ready;
    int memfd = receive_descriptor(socket, &ready, 1), uffd;
    uint64_t i;

    memory = mmap(NULL, sizeof content, PROT_READ, MAP_PRIVATE, memfd, 0);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (memory == MAP_FAILED || uffd < 0)
        return 30;
    send_descriptor(socket, uffd, &memory, sizeof memory);
    if (read(socket, &ready, 1) != 1 || *(volatile unsigned char *)(memory + TOUCHED) != content[TOUCHED])
        return 31;
    if (write(socket, &ready, 1) != 1 || read(socket, &ready, 1) != 1)
        return 32;
    for (i = 0; i < CHUNK / PAGE; i++)
        if (!is_page(memory + 2 * CHUNK + i * PAGE, 2 * CHUNK / PAGE + i))
            return 33;
    return 0;
}

/* The chunk is this thread's to bring, so that nothing but the part can have let the client go on. */
static void test_a_part_goes_ahead_of_its_chunk(lm_region *stock, pid_t client, int socket)
{
    uint64_t part = TOUCHED / PART * PART;
    lm_space_report report;
    uint32_t space, features;
    unsigned char *memory, ready = 1;
    int memfd = lm_region_descriptor(stock), uffd, status;

    send_descriptor(socket, memfd, &ready, 1);
    uffd = receive_descriptor(socket, &memory, sizeof memory);
    CHECK(lm_pager_open_space(uffd, 1, &space, &features) == 0);
    CHECK(lm_pager_map(space, (uintptr_t)memory, sizeof content, stock, 0, PAGE, LM_PAGER_SHARED) == 0);
    CHECK(lm_table_claim(&stock->table, 2, false));
    CHECK(write(socket, &ready, 1) == 1);
    do {
        usleep(1000);
        CHECK(lm_pager_spaces(&report, 1) == 1);
    } while (report.waiting == 0);
    memcpy(stock->base + part, content + part, PART);
    lm_pager_part_settled(stock, part + PART, PART); /* another one */
    CHECK(lm_pager_spaces(&report, 1) == 1 && report.served == 0);
    do { /* who finds the space busy leaves it */
        lm_pager_part_settled(stock, part, PART);
        CHECK(lm_pager_spaces(&report, 1) == 1);
    } while (report.served == 0);
    CHECK(report.served == PART && report.waiting == 1);
    CHECK(read(socket, &ready, 1) == 1);
    CHECK(lm_table_state(&stock->table, 2) != LM_STATE_PRESENT);
    memcpy(stock->base + 2 * CHUNK, content + 2 * CHUNK, CHUNK);
    lm_table_publish(&stock->table, 2, LM_STATE_PRESENT);
    lm_pager_settled(stock, 2, false);
    CHECK(write(socket, &ready, 1) == 1);
    CHECK(waitpid(client, &status, 0) == client && status == 0);
    lm_pager_leave_space(space);
    close(memfd);
    close(uffd);
    close(socket);
}

/* From outside, as for a debugger, while the clients do what they do. */
static void populate_at_random(const uint32_t *spaces, unsigned char *const *memories)
{
    uint64_t seed = 11;
    int round;

    for (round = 0; round < 400; round++) {
        uint64_t which = next_random(&seed) % CLIENTS, offset = next_random(&seed) % sizeof content;
        uint64_t length = 1 + next_random(&seed) % sizeof content;
        int64_t done = lm_pager_populate(spaces[which], (uintptr_t)memories[which] + offset, length);

        CHECK(done == -ESRCH || done == -EAGAIN || (done >= 0 && (uint64_t)done <= length));
    }
}

int main(void)
{
    pid_t clients[CLIENTS], patient;
    unsigned char *memories[CLIENTS];
    uint32_t spaces[CLIENTS];
    int sockets[CLIENTS], line[2], quiet = open("/dev/null", O_WRONLY), i;
    lm_space_report reports[64];
    lm_region *stock;

    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    i = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (i < 0) {
        puts("no userfaultfd here");
        return 77;
    }
    close(i);
    test_a_space_follows_a_model();
    test_a_ledger_tells_all_that_was_taken_from_the_kernel();
    test_any_bytes_may_be_given_for_a_ledger();
    fill_random(content, sizeof content, 3);
    for (i = 0; i < CLIENTS; i++) {
        int pair[2];

        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
        clients[i] = fork();
        if (clients[i] == 0)
            _exit(be_client(pair[1], i % 2 == 0, (uint64_t)i + 1));
        close(pair[1]);
        sockets[i] = pair[0];
    }
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, line) == 0);
    patient = fork();
    if (patient == 0)
        _exit(be_patient(line[1]));
    close(line[1]);
    CHECK(dup2(quiet, 2) == 2); /* the line that a failed touch prints */
    stock = open_stock_of(content, CHUNKS, CHUNK, BAD, LM_CODEC_RAW, 1);
    CHECK(lm_pager_start(2) == 0);
    test_a_part_goes_ahead_of_its_chunk(stock, patient, line[0]);
    for (i = 0; i < CLIENTS; i++) {
        unsigned char *memory;
        uint32_t space, features;
        int memfd = lm_region_descriptor(stock), uffd;
        unsigned char ready = 1;

        CHECK(memfd >= 0);
        send_descriptor(sockets[i], memfd, &ready, 1);
        uffd = receive_descriptor(sockets[i], &memory, sizeof memory);
        CHECK(lm_pager_open_space(uffd, 1, &space, &features) == 0);
        if (!(features & LM_PAGER_FOLLOWS_FORK)) {
            puts("no EVENT_FORK here");
            return 77;
        }
        CHECK(lm_pager_map(space, (uintptr_t)memory + 1, CHUNK, stock, 0, PAGE, 0) == -EINVAL);
        CHECK(lm_pager_map(space, (uintptr_t)memory, sizeof content, stock, CHUNK, PAGE, 0) == -EINVAL);
        /* Pages of our memfd would come without a message. */
        if (i % 2 == 0)
            CHECK(lm_pager_map(space, (uintptr_t)memory, sizeof content, stock, 0, PAGE, 0) == -EINVAL);
        CHECK(lm_pager_map(space, (uintptr_t)memory, sizeof content, stock, 0, PAGE,
                           i % 2 == 0 ? LM_PAGER_SHARED : LM_PAGER_REMOVED_ZERO) == 0);
        CHECK(lm_pager_populate(space, (uintptr_t)memory, 1) <= 1); /* it may be decoded for others */
        memories[i] = memory;
        spaces[i] = space;
        lm_pager_leave_space(space);
        CHECK(write(sockets[i], &ready, 1) == 1);
        close(memfd);
        close(uffd);
    }
    CHECK(lm_pager_users(stock) >= 1);
    populate_at_random(spaces, memories);
    CHECK(lm_pager_populate(UINT32_MAX, 0, UINT64_MAX) == -ESRCH);
    for (i = 0; i < CLIENTS; i++) {
        int status;

        CHECK(waitpid(clients[i], &status, 0) == clients[i]);
        CHECK(WIFSIGNALED(status));
        CHECK(WTERMSIG(status) == SIGBUS || WTERMSIG(status) == SIGKILL);
        close(sockets[i]);
    }
    while (lm_pager_spaces(reports, 64) > 0) /* they go by themselves */
        usleep(10000);
    CHECK(lm_pager_users(stock) == 0);
    lm_pager_stop();
    lm_region_free(stock);
    CHECK(lm_engine_region_count() == 0);
    puts("ok");
    return 0;
}
