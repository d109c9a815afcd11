/* SPDX-License-Identifier: Apache-2.0
 *
 * Every call of a pager's twin into the operating system fails. The pager dies while a client's child waits for a
 * page that nobody else could have served: it never reads zeros, and the next pager is given what it needs, perhaps
 * when it asks again. A twin that cannot be started is an error, and leaves nothing.
 *
 * The twin alone fails; how runs are made: series.h. Argument "fork" has each error tried.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/un.h>

#include "faults.h"
#include "harness.h"
#include "ledger.h"
#include "pager.h"
#include "pager_client.h"
#include "pager_protocol.h"
#include "pager_stock.h"
#include "series.h"

#define CHUNK  65536u
#define CHUNKS 3u
#define PAGE   4096u
#define SIZE   (CHUNKS * CHUNK)
#define LIMIT  30 /* seconds; then a run hangs */
#define MOST   64 /* descriptors of the dead pager's */

static unsigned char content[SIZE];
static lm_region *stock;
static struct sockaddr_un estate;

static void open_stock(void)
{
    stock = open_stock_of(content, CHUNKS, CHUNK, CHUNKS, 0, 0);
    CHECK(lm_pager_start(2) == 0);
}

/* ---- the client, and its child, which outlives it ---- */

static void be_client(int line)
{
    unsigned char *memory = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int uffd = (int)syscall(SYS_userfaultfd, (long)(O_CLOEXEC | O_NONBLOCK), 0L, 0L, 0L, 0L, 0L);

    plan = NULL;
    alarm(LIMIT);
    CHECK(memory != MAP_FAILED && uffd >= 0);
    send_descriptor(line, uffd, &memory, sizeof memory);
    if (hear(line) == 'x')
        _exit(0);
    CHECK(mprotect(memory, SIZE, PROT_READ) == 0 && memory[0] == content[0]);
    if (fork() > 0)
        _exit(0);
    alarm(LIMIT);
    CHECK(memory[CHUNK] == content[CHUNK]); /* the pager knows of it */
    tell(line, 's');
    (void)hear(line); /* the pager is dead */
    _exit(memcmp(memory, content, SIZE) == 0 ? 0 : 20);
}

/* ---- the pager that dies ---- */

static void be_first(int line, int client)
{
    int listener = __real_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), twin, uffd;
    uint32_t space, features;
    uint64_t address;
    long descriptors;
    char word;

    alarm(LIMIT);
    CHECK(bind(listener, (struct sockaddr *)&estate, sizeof estate) == 0 && listen(listener, 4) == 0);
    CHECK(lm_pager_bequeath(listener) == 0);
    uffd = receive_descriptor(client, &address, sizeof address);
    descriptors = count_descriptors();
    plan->armed = plan->call < CALL_COUNT;
    twin = lm_pager_start_twin();
    if (twin < 0) {
        CHECK(plan->call < CALL_COUNT && twin == -plan->error && count_descriptors() == descriptors);
        plan->armed = false;
        twin = lm_pager_start_twin();
    }
    CHECK(twin > 0);
    plan = NULL;
    open_stock();
    CHECK(lm_pager_open_space(uffd, 1, &space, &features) == 0);
    word = features & LM_PAGER_FOLLOWS_FORK ? 'r' : 'x';
    CHECK(lm_pager_map(space, address, SIZE, stock, 0, PAGE, 0) == 0);
    lm_pager_leave_space(space);
    tell(client, word);
    if (word == 'r')
        CHECK(hear(client) == 's');
    send_descriptor(line, -1, &twin, sizeof twin);
    (void)hear(line);
    (void)raise(SIGKILL);
}

/* ---- the next one ---- */

static int counted; /* of these */
static int given[MOST], numbers[MOST]; /* ours, and those that they have in the twin */

/* All that the twin has, or nothing: then it has to be asked again. */
static int ask_twin(void)
{
    int connection = __real_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), number;

    counted = 0;
    CHECK(__real_connect(connection, (struct sockaddr *)&estate, sizeof estate) == 0);
    for (;;) {
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec part = { .iov_base = &number, .iov_len = sizeof number };
        struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                                  .msg_controllen = sizeof control };

        if (recvmsg(connection, &message, 0) != sizeof number)
            break;
        if (number < 0)
            return connection;
        CHECK(counted < MOST && CMSG_FIRSTHDR(&message) != NULL);
        numbers[counted] = number;
        memcpy(&given[counted++], CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    }
    while (counted > 0)
        close(given[--counted]);
    close(connection);
    return -1;
}

/* The space that the child's ledger tells of; 0: it is none. */
static uint32_t serve_by(int file)
{
    static unsigned char bytes[1 << 20];
    ssize_t size = __real_pread(file, bytes, sizeof bytes, 0);
    lm_ledger_report told;
    lm_space_part parts[8];
    uint32_t space, features;
    struct stat info;
    int64_t count, i;
    int j;

    count = size <= 0 ? 0 : lm_ledger_read(bytes, (uint64_t)size, 0, &told, parts, 8);
    if (count <= 0 || told.parent == 0)
        return 0;
    for (j = 0; j < counted; j++)
        if (__real_fstat(given[j], &info) == 0 && info.st_ino == told.inode && given[j] != file)
            break;
    CHECK(j < counted && lm_pager_open_space(given[j], 0, &space, &features) == 0);
    for (i = 0; i < count; i++)
        CHECK(lm_pager_map(space, parts[i].address, parts[i].length, stock, parts[i].offset, parts[i].page,
                           parts[i].flags | LM_PAGER_ADOPT | LM_PAGER_MORE) == 0);
    CHECK(lm_pager_resume_space(space, 1, told.features) == 0);
    return space;
}

static void run(bool armed)
{
    int lines[2], client[2], connection, twin, status, i, last = -1;
    struct plan *of_the_twin = plan;
    uint32_t space = 0;
    pid_t pid, first;

    alarm(LIMIT);
    CHECK(dup2(scribbled, STDERR_FILENO) == STDERR_FILENO);
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    snprintf(estate.sun_path, sizeof estate.sun_path, "/tmp/lazymem-twin-%d", getpid());
    CHECK(__real_socketpair(AF_UNIX, SOCK_SEQPACKET, 0, lines) == 0);
    CHECK(__real_socketpair(AF_UNIX, SOCK_SEQPACKET, 0, client) == 0);
    pid = fork();
    if (pid == 0)
        be_client(client[1]);
    first = fork();
    if (first == 0)
        be_first(lines[1], client[0]);
    plan = NULL;
    CHECK(receive_descriptor(lines[0], &twin, sizeof twin) == -1);
    tell(lines[0], 'e');
    CHECK(__real_waitpid(first, &status, 0) == first && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    tell(client[0], 'e');
    open_stock();
    while ((connection = ask_twin()) < 0)
        usleep(1000);
    for (i = 0; i < counted && space == 0; i++)
        space = serve_by(given[i]);
    CHECK(space != 0);
    for (; counted > 0; counted--) { /* these are not the twin's any more */
        close(given[counted - 1]);
        (void)!__real_write(connection, &numbers[counted - 1], sizeof(int)); /* it may have hung up */
    }
    (void)!__real_write(connection, &last, sizeof last);
    close(connection);
    /* The client, its child, and the twin, which ends when that has. */
    for (i = 0; i < 3; i++) {
        pid = __real_waitpid(-1, &status, 0);
        CHECK(pid > 0 && status == 0);
    }
    lm_pager_close_space(space);
    CHECK(lm_pager_users(stock) == 0);
    lm_pager_stop();
    lm_region_free(stock);
    (void)unlink(estate.sun_path); /* which the twin may have failed to do */
    close(lines[0]);
    close(lines[1]);
    close(client[0]);
    close(client[1]);
    plan = of_the_twin;
    plan->armed = false;
    if (armed)
        check_usage(&board->healthy);
    else
        settle();
}

static void try_all(bool thorough)
{
    try_every_call(thorough, false, 2);
}

int main(int argc, char **argv)
{
    unsigned i;

    if (!has_userfaultfd())
        return 77;
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    for (i = 0; i < SIZE; i++)
        content[i] = (unsigned char)((i * UINT64_C(0x9E3779B97F4A7C15)) >> 40 | 1); /* never 0 */
    estate.sun_family = AF_UNIX;
    return run_all(argc, argv, "twin", try_all);
}
