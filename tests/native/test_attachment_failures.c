/* SPDX-License-Identifier: Apache-2.0
 *
 * Every call fails that a client of a pager makes into the operating system: to have its memory, to notice that the
 * pager is gone, and to find another. Whatever happens, a byte that can be read is the right one; where no pager is
 * found in time, touches are signals, after a line. Then all of it works, and nothing is left behind.
 *
 * The pagers are processes in which nothing fails, made before any thread. How runs are made: series.h. Argument
 * "fork" has calls fail from the n-th on, too, and with each error.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/un.h>

#include "attachment.h"
#include "faults.h"
#include "harness.h"
#include "pager.h"
#include "pager_client.h"
#include "pager_protocol.h"
#include "pager_stock.h"
#include "series.h"

#define CHUNK    65536u
#define CHUNKS   4u
#define PAGE     4096u
#define SIZE     (CHUNKS * CHUNK)
#define LIMIT    30  /* seconds; then a run hangs */
#define DEADLINE 300 /* ms, for another pager to be found */
#define PATIENCE 800 /* ms, with calls that go on failing: who does not notice that a pager is gone waits */

static unsigned char content[SIZE];
static bool strict; /* nothing fails any more: no error is allowed */

/* ---- pagers ---- */

static lm_region *stock;

static void open_stock(void)
{
    stock = open_stock_of(content, CHUNKS, CHUNK, CHUNKS, 0, 0);
    CHECK(lm_pager_start(2) == 0);
}

static void map_memory(int uffd, uint64_t address, bool adopted)
{
    uint32_t space, features;

    CHECK(lm_pager_open_space(uffd, !adopted, &space, &features) == 0);
    CHECK(lm_pager_map(space, address, SIZE, stock, 0, PAGE, LM_PAGER_SHARED | (adopted ? LM_PAGER_ADOPT : 0)) == 0);
    lm_pager_leave_space(space);
    close(uffd);
}

/* The first: what the client asks it is asked by the line. It dies at the next word. */
static void be_first(int line, int connection)
{
    uint64_t address;
    char word = 'm';
    int memfd, uffd;

    plan = NULL;
    alarm(LIMIT);
    open_stock();
    memfd = lm_region_descriptor(stock);
    send_descriptor(line, memfd, &word, 1);
    uffd = receive_descriptor(line, &address, sizeof address);
    if (uffd >= 0) {
        map_memory(uffd, address, false);
        tell(line, 'r');
    }
    (void)hear(line);
    close(connection);
    _exit(0);
}

/* Questions of one connection. */
static void answer(int connection)
{
    for (;;) {
        struct { lm_pager_ask head; char rest[64]; } ask;
        lm_pager_answer done = { .magic = LM_PAGER_MAGIC, .version = LM_PAGER_VERSION, .kind = LM_PAGER_DONE };
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec part = { .iov_base = &ask, .iov_len = sizeof ask };
        struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                                  .msg_controllen = sizeof control };
        int uffd;

        if (recvmsg(connection, &message, 0) < (ssize_t)sizeof ask.head)
            break;
        if (ask.head.kind == LM_PAGER_MAP) {
            CHECK(CMSG_FIRSTHDR(&message) != NULL && (ask.head.flags & LM_PAGER_ADOPT));
            memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof uffd);
            map_memory(uffd, ask.head.address, true);
        }
        done.id = ask.head.id;
        if (send(connection, &done, sizeof done, MSG_NOSIGNAL) < 0)
            break;
    }
    close(connection);
}

static void be_second(int line, int listener)
{
    struct pollfd both[] = { { .fd = line, .events = POLLIN }, { .fd = listener, .events = POLLIN } };

    plan = NULL;
    alarm(LIMIT);
    open_stock();
    while (poll(both, 2, -1) > 0 && both[0].revents == 0)
        answer(accept(listener, NULL, NULL));
    _exit(0);
}

/* What a client has of its pagers. */
struct pagers { pid_t pids[2]; int lines[2], connection; struct sockaddr_un at; };

static void start_pagers(struct pagers *pagers, int number)
{
    int pairs[3][2], listener = socket(AF_UNIX, SOCK_SEQPACKET, 0), i;

    pagers->at = (struct sockaddr_un){ .sun_family = AF_UNIX };
    snprintf(pagers->at.sun_path, sizeof pagers->at.sun_path, "/tmp/lazymem-test-%d-%d", getpid(), number);
    (void)unlink(pagers->at.sun_path);
    CHECK(bind(listener, (struct sockaddr *)&pagers->at, sizeof pagers->at) == 0 && listen(listener, 9) == 0);
    for (i = 0; i < 3; i++)
        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pairs[i]) == 0);
    for (i = 0; i < 2; i++) {
        pagers->pids[i] = fork();
        CHECK(pagers->pids[i] >= 0);
        if (pagers->pids[i] == 0) {
            if (i == 0)
                be_first(pairs[0][1], pairs[2][1]);
            close(pairs[2][1]);
            be_second(pairs[1][1], listener);
        }
        pagers->lines[i] = pairs[i][0];
    }
    for (i = 0; i < 3; i++)
        close(pairs[i][1]);
    close(listener);
    pagers->connection = pairs[2][0];
}

static void end_pager(struct pagers *pagers, int which)
{
    int status;

    tell(pagers->lines[which], 'e');
    CHECK(__real_waitpid(pagers->pids[which], &status, 0) == pagers->pids[which] && status == 0);
    close(pagers->lines[which]);
}

/* ---- the client ---- */

static sigjmp_buf back;
static volatile sig_atomic_t touching;

static void on_signal(int number)
{
    if (!touching)
        abort();
    siglongjmp(back, number);
}

/* What failed is what was made to fail, or has a name of our own. */
static bool succeeds(int error)
{
    if (error < 0)
        CHECK(!strict && (error == -plan->error || error <= LM_E_SHORT));
    return error >= 0;
}

static void touch(const volatile unsigned char *at, unsigned char expected)
{
    unsigned char byte;

    if (sigsetjmp(back, 1) == 0) {
        touching = 1;
        byte = *at;
        touching = 0;
        CHECK(byte == expected);
        return;
    }
    touching = 0;
    CHECK(!strict && (lseek(scribbled, 0, SEEK_END) > 0 || plan->call == CALL_select || plan->call == CALL_write));
}

static void touch_all(const unsigned char *base, unsigned step)
{
    unsigned at;

    for (at = 7; at < SIZE; at += step * PAGE)
        touch(base + at, content[at]);
}

static bool attach(struct pagers *pagers, lm_region *region, int uffd, lm_attachment **ret_attachment)
{
    lm_pager_ask asks[3];
    lm_attachment_spec spec = {
        .path = pagers->at.sun_path, .url = "memfd", .socket = pagers->connection, .uffd = uffd,
        .hello = (const char *)&asks[0], .open = (const char *)&asks[1], .map = (const char *)&asks[2],
        .hello_length = sizeof *asks, .open_length = sizeof *asks, .map_length = sizeof *asks,
        .address = (uintptr_t)lm_region_address(region), .length = SIZE, .deadline_ms = DEADLINE,
    };
    unsigned i;

    for (i = 0; i < 3; i++)
        asks[i] = (lm_pager_ask){ .magic = LM_PAGER_MAGIC, .version = LM_PAGER_VERSION, .id = i + 1,
                                  .kind = (uint16_t)(LM_PAGER_HELLO + i), .address = spec.address, .length = SIZE,
                                  .page = PAGE, .flags = i == 2 ? LM_PAGER_SHARED : 0 };
    return succeeds(lm_attachment_start(&spec, ret_attachment));
}

/* The userfaultfd is closed, by the attachment or here. */
static void use(struct pagers *pagers, lm_region *region, int uffd)
{
    uint64_t address = (uintptr_t)lm_region_address(region);
    lm_attachment *attachment = NULL;

    send_descriptor(pagers->lines[0], uffd, &address, sizeof address);
    CHECK(hear(pagers->lines[0]) == 'r');
    if (!attach(pagers, region, uffd, &attachment)) {
        lm_region_free(region);
        close(uffd);
        close(pagers->connection);
        end_pager(pagers, 0);
        return;
    }
    if (succeeds(lm_region_admit(region))) {
        touch_all(lm_region_address(region), 20);
        end_pager(pagers, 0);
        touch_all(lm_region_address(region), 1);
    } else {
        end_pager(pagers, 0);
    }
    while (strict && lm_attachment_adoptions(attachment) == 0) /* its answer may come after its pages */
        usleep(1000);
    CHECK(!strict || !lm_attachment_is_lost(attachment));
    lm_attachment_leave(attachment);
    lm_region_free(region);
    lm_attachment_free(attachment);
}

static void be_client(struct pagers *pagers, bool armed)
{
    lm_region *region = NULL;
    int user_only, uffd;
    char word;
    int memfd = receive_descriptor(pagers->lines[0], &word, 1);
    bool used = false;

    strict = !armed;
    plan->armed = armed;
    if (succeeds(lm_region_open_paged(memfd, SIZE, 1, 0, &region))) {
        uffd = lm_uffd_create(-1, &user_only);
        if (succeeds(uffd) && !user_only) {
            use(pagers, region, uffd);
            used = true;
        } else {
            if (uffd >= 0)
                close(uffd);
            lm_region_free(region);
        }
    }
    plan->armed = false;
    close(memfd);
    if (!used) {
        send_descriptor(pagers->lines[0], -1, "        ", 8);
        close(pagers->connection);
        end_pager(pagers, 0);
    }
    end_pager(pagers, 1);
    (void)unlink(pagers->at.sun_path);
}

static void start_end_of_failures(void)
{
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid > 0)
        return;
    usleep(PATIENCE * 1000);
    plan->armed = false;
    _exit(0);
}

static void run(bool armed)
{
    struct pagers pagers[2];
    int i;

    alarm(LIMIT);
    CHECK(dup2(scribbled, STDERR_FILENO) == STDERR_FILENO);
    CHECK(ftruncate(scribbled, 0) == 0 && lseek(scribbled, 0, SEEK_SET) == 0);
    for (i = 0; i < 2; i++)
        start_pagers(&pagers[i], i);
    if (plan->onward)
        start_end_of_failures();
    signal(SIGBUS, on_signal);
    signal(SIGSEGV, on_signal);
    be_client(&pagers[0], armed);
    be_client(&pagers[1], false);
    if (armed)
        check_usage(&board->healthy);
    else
        settle();
}

static void try_all(bool thorough)
{
    try_every_call(thorough, thorough, 4);
}

int main(int argc, char **argv)
{
    unsigned i;

    if (!has_userfaultfd())
        return 77;
    CHECK(lm_codec_find(LM_FN_XXH3_64, "libxxhash.so.0", "XXH3_64bits") == 0);
    fill_random(content, sizeof content, 3);
    for (i = 0; i < SIZE; i++)
        content[i] |= 1; /* never 0 */
    return run_all(argc, argv, "attachment", try_all);
}
