/* SPDX-License-Identifier: Apache-2.0
 *
 * series.h: runs of a scenario in which a call fails (faults.h), the n-th one for n = 1, 2, and so on until a run
 * makes no such call any more. Each run is a process of its own, and so is each series of them, several at a time.
 * What must be left as it was: descriptors, threads, memory. The program says what a run is, and what it is about.
 */
#ifndef SERIES_H
#define SERIES_H

#include <dirent.h>
#include <sys/wait.h>

#include "faults.h"
#include "harness.h"

#define SERIES_AT_A_TIME 24
#define SERIES_MOST      200 /* runs of one */

/* The program's. A run that is not armed is a healthy one, by which others are measured: see settle. */
static void run(bool armed);

static const char *series_scenario; /* its name */
static bool series_brief;  /* where calls fail from the n-th on: for n = 1 alone */
static unsigned series_sparse; /* 0: for every n. Else, of calls that threads make again and again, each is the
                                * one before and this part of it more */
static int scribbled;      /* what stderr is */

/* ---- what is left ---- */

struct usage { long mapped, threads, descriptors; };

static long count_descriptors(void)
{
    DIR *tasks = __real_opendir("/proc/self/task"), *fds;
    struct dirent *task;
    long count = 0;
    char path[300];

    while ((task = readdir(tasks)) != NULL) {
        snprintf(path, sizeof path, "/proc/self/task/%s/fd", task->d_name);
        fds = task->d_name[0] == '.' ? NULL : __real_opendir(path);
        while (fds != NULL && readdir(fds) != NULL)
            count++;
        if (fds != NULL)
            closedir(fds);
    }
    closedir(tasks);
    return count;
}

static bool is_used(const struct usage *wanted)
{
    if (plan->call == CALL_munmap) /* what it does not take back stays */
        return true;
    /* Where threads have no table of their own, or the kernel closes nothing for them, they hold more. */
    if (plan->call != CALL_unshare && plan->call != CALL_close_range &&
        count_descriptors() != wanted->descriptors)
        return false;
    return mapped == wanted->mapped && threads == wanted->threads;
}

/* Some threads give things back in their own time. */
static void check_usage(const struct usage *wanted)
{
    int i;

    for (i = 0; i < 2000 && !is_used(wanted); i++)
        usleep(1000);
    if (!is_used(wanted))
        fprintf(stderr, "left: %ld bytes, %ld threads, %ld descriptors; not %ld, %ld, %ld\n", mapped, threads,
                count_descriptors(), wanted->mapped, wanted->threads, wanted->descriptors);
    CHECK(is_used(wanted));
    CHECK(lm_engine_region_count() == 0 && lm_engine_thread_count() == 0);
}

/* ---- one run ---- */

struct board {
    struct plan plan;
    struct usage healthy;
};

static struct board *board;

static void take_board(void)
{
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    plan = &board->plan;
    mapped = 0;
    scribbled = memfd_create("stderr", MFD_CLOEXEC);
    CHECK(scribbled >= 0);
}

/* What a healthy run leaves is what others may leave. */
static void settle(void)
{
    int i;

    for (i = 0; i < 100; i++)
        usleep(1000);
    board->healthy = (struct usage){ mapped, threads, count_descriptors() };
}

static int run_in_child(bool armed)
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        run(armed);
        exit(0); /* not _exit: LeakSanitizer looks */
    }
    CHECK(__real_waitpid(pid, &status, 0) == pid);
    return status;
}

/* ---- series of runs ---- */

static void say(int status)
{
    static char text[10000];
    ssize_t length = pread(scribbled, text, sizeof text - 1, 0);

    text[length < 0 ? 0 : length] = '\0';
    printf("one %s %s %d %u %s: status %x\n%s", series_scenario,
           plan->call == CALL_COUNT ? "none" : calls[plan->call].name, plan->error, plan->nth,
           plan->onward ? "onward" : "once", (unsigned)status, text);
    fflush(stdout);
}

/* The number of runs, or -1. */
static int run_series(enum call call, int error, bool onward)
{
    unsigned nth;
    int status;

    for (nth = 1; nth <= SERIES_MOST; nth += series_sparse > 0 ? 1 + nth / series_sparse : 1) {
        *plan = (struct plan){ .call = call, .error = error, .nth = nth, .onward = onward };
        status = run_in_child(true);
        if (status != 0) {
            say(status);
            return -1;
        }
        if (plan->seen < nth)
            return (int)nth;
        if (onward && series_brief)
            return (int)nth;
    }
    return SERIES_MOST;
}

static unsigned running, bad;

static void reap(void)
{
    int status;

    CHECK(wait(&status) > 0);
    bad += status != 0;
    running--;
}

static void start_series(enum call call, int error, bool onward, const struct usage *healthy)
{
    pid_t pid;

    if (running == SERIES_AT_A_TIME)
        reap();
    running++;
    pid = fork();
    CHECK(pid >= 0);
    if (pid > 0)
        return;
    close(scribbled);
    take_board();
    board->healthy = *healthy;
    _exit(run_series(call, error, onward) < 0);
}

/* A healthy run: which calls it makes, and what it leaves. */
static struct usage find_calls(struct plan *ret_made)
{
    int status;

    *plan = (struct plan){ .call = CALL_COUNT };
    status = run_in_child(false);
    if (status != 0)
        say(status);
    CHECK(status == 0);
    memcpy(ret_made, plan, sizeof *ret_made);
    return board->healthy;
}

/* Every call that a healthy run makes fails, in series. thorough: by each error, not by the first alone; onward: from
 * the n-th on, too. */
static inline void try_every_call(bool thorough, bool onward, unsigned sparse)
{
    struct plan made;
    struct usage healthy = find_calls(&made);
    int call, i, most = thorough ? 6 : 1;

    for (call = 0; call < CALL_COUNT; call++)
        for (i = 0; made.made[call] && i < most && calls[call].errors[i] >= 0; i++) {
            series_sparse = sparse;
            start_series((enum call)call, calls[call].errors[i], false, &healthy);
            series_sparse = 1;
            if (onward && calls[call].errors[i] != EINTR)
                start_series((enum call)call, calls[call].errors[i], true, &healthy);
        }
    while (running > 0)
        reap();
}

/* CALL ERROR NTH once|onward, as a failure prints them. */
static int repeat(char **words)
{
    struct plan made;
    int status;

    (void)find_calls(&made);
    *plan = (struct plan){ .error = atoi(words[1]), .nth = (unsigned)atoi(words[2]) };
    plan->onward = strcmp(words[3], "onward") == 0;
    while (strcmp(calls[plan->call].name, words[0]) != 0)
        plan->call++;
    status = run_in_child(true);
    say(status);
    return status != 0;
}

/* What main() returns: of all that try_all does, more of it by argument "fork", or of the one run that is named. */
static inline int run_all(int argc, char **argv, const char *scenario, void (*try_all)(bool thorough))
{
    take_board();
    series_scenario = scenario;
    if (argc == 7 && strcmp(argv[1], "one") == 0)
        return repeat(argv + 3);
    try_all(argc > 1 && strcmp(argv[1], "fork") == 0);
    if (bad > 0)
        return 1;
    puts("ok");
    return 0;
}

#endif
