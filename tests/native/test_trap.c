/* SPDX-License-Identifier: Apache-2.0
 *
 * trap.c by itself: memory of our own, answered for by a thread of ours. What threads do while they wait,
 * on what stack, and where signals go that are not ours, or that follow upon bad news.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "sys.h"
#include "trap.h"

#define PAGES 2048
#define PAGE(n) (memory + (size_t)(n) * page)
#define BAD_PAGE (PAGES - 1) /* what the answerer has bad news about */
#define FOREIGN_PAGE (PAGES - 2)

#ifdef __SANITIZE_THREAD__ /* until the thread makes a call that it knows */
#define HOLDS_SIGNALS_BACK true
#else
#define HOLDS_SIGNALS_BACK false
#endif

static size_t page;
static unsigned char *memory;
static _Atomic unsigned waiting_wanted; /* the answerer lets that many wait before it answers the first */
static _Atomic unsigned waiting;
static _Atomic bool ending;
static pthread_t answerer;

static void answer(uintptr_t address)
{
    size_t number = (address - (uintptr_t)memory) / page;

    if (number != BAD_PAGE && number != FOREIGN_PAGE) {
        CHECK(lm_sys_protect(PAGE(number), page, PROT_READ | PROT_WRITE) == 0);
        lm_trap_answer((uintptr_t)PAGE(number), page, LM_TRAP_AGAIN);
    } else {
        lm_trap_answer((uintptr_t)PAGE(number), page, number == BAD_PAGE ? LM_TRAP_BAD : LM_TRAP_FOREIGN);
    }
}

static void *answer_all(void *nothing)
{
    static uintptr_t taken[PAGES];
    unsigned count = 0;

    while (!ending) {
        uint32_t rings = lm_trap_rings();
        bool found = count < PAGES && lm_trap_take(&taken[count]);

        count += found;
        waiting = count;
        if (count > 0 && count >= waiting_wanted) {
            waiting_wanted = 0;
            while (count > 0)
                answer(taken[--count]);
        }
        if (!found)
            lm_trap_sleep(rings);
    }
    return nothing;
}

static void start(void)
{
    CHECK(lm_trap_install() == 0);
    page = lm_sys_page_size();
    memory = mmap(NULL, PAGES * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    CHECK(lm_trap_add((uintptr_t)memory, PAGES * page, true) == 0);
    ending = false;
    CHECK(lm_sys_thread_start(&answerer, answer_all, NULL) == 0);
    lm_trap_serve(true);
}

static void stop(void)
{
    ending = true;
    lm_trap_ring(1);
    pthread_join(answerer, NULL);
    lm_trap_serve(false);
    lm_trap_remove((uintptr_t)memory);
    lm_trap_uninstall();
    munmap(memory, PAGES * page);
}

static void *touch(void *argument)
{
    ((volatile unsigned char *)argument)[1]++;
    return NULL;
}

/* More threads than there are slots, on the smallest stacks there are. */
static void test_many_threads_wait(void)
{
    static pthread_t threads[1100];
    pthread_attr_t attributes;
    unsigned i;

    pthread_attr_init(&attributes);
    CHECK(pthread_attr_setstacksize(&attributes, 64 << 10) == 0);
    waiting_wanted = 1024;
    for (i = 0; i < 1100; i++)
        CHECK(pthread_create(&threads[i], &attributes, touch, PAGE(i)) == 0);
    for (i = 0; i < 1100; i++)
        pthread_join(threads[i], NULL);
    for (i = 0; i < 1100; i++)
        CHECK(PAGE(i)[1] == 1 && PAGE(i)[2] == 0);
    pthread_attr_destroy(&attributes);
}

static void *touch_on_another_stack(void *argument)
{
    static unsigned char small[32 << 10];
    stack_t stack = { .ss_sp = small, .ss_size = sizeof small }, off = { .ss_flags = SS_DISABLE };

    CHECK(sigaltstack(&stack, NULL) == 0);
    touch(argument);
    CHECK(sigaltstack(&off, NULL) == 0);
    return NULL;
}

static void test_another_stack_is_used(void)
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, touch_on_another_stack, PAGE(1200)) == 0);
    pthread_join(thread, NULL);
    CHECK(PAGE(1200)[1] == 1);
}

static void touch_more(int number)
{
    touch(PAGE(1300 + number));
}

/* A handler that runs while its thread waits may touch such memory itself. */
static void test_signals_nest(void)
{
    struct sigaction more = { .sa_handler = touch_more };
    pthread_t thread;

    CHECK(sigaction(SIGUSR1, &more, NULL) == 0);
    waiting = 0; /* the answerer may not yet have said that it has answered the one before */
    waiting_wanted = 2;
    CHECK(pthread_create(&thread, NULL, touch, PAGE(1300)) == 0);
    while (waiting == 0)
        sched_yield();
    pthread_kill(thread, SIGUSR1); /* before there are two, none is answered */
    pthread_join(thread, NULL);
    CHECK(PAGE(1300)[1] == 1 && PAGE(1300 + SIGUSR1)[1] == 1);
}

/* ---- handlers that were there before ---- */

static sigjmp_buf back;
static volatile int got_number, got_code;
static void *volatile got_address;

static void jump_back(int number, siginfo_t *info, void *context)
{
    (void)context;
    got_number = number;
    got_code = info->si_code;
    got_address = info->si_addr;
    siglongjmp(back, 1);
}

static void expect(int number, int code, void *address)
{
    CHECK(got_number == number && got_code == code && got_address == address);
    got_number = 0;
}

static void set_handler(int number, void (*function)(int, siginfo_t *, void *))
{
    struct sigaction action = { .sa_sigaction = function, .sa_flags = SA_SIGINFO };

    CHECK(sigaction(number, &action, NULL) == 0);
}

static void test_bad_news_and_foreign_faults_go_to_the_handlers_before(void)
{
    unsigned char *other = mmap(NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile int i;

    for (i = 0; i < 200; i++) { /* more often than there is room for those who never come back */
        if (sigsetjmp(back, 1) == 0)
            touch(PAGE(BAD_PAGE));
        expect(SIGBUS, BUS_ADRERR, PAGE(BAD_PAGE) + 1);
        if (sigsetjmp(back, 1) == 0)
            touch(PAGE(FOREIGN_PAGE));
        expect(SIGSEGV, SEGV_ACCERR, PAGE(FOREIGN_PAGE) + 1);
        if (sigsetjmp(back, 1) == 0)
            touch(other); /* may not be written to */
        expect(SIGSEGV, SEGV_ACCERR, other + 1);
    }
    if (sigsetjmp(back, 1) == 0)
        ((void (*)(void))PAGE(1500))(); /* is no code */
    expect(SIGSEGV, SEGV_ACCERR, PAGE(1500));
    munmap(other, page);
    if (sigsetjmp(back, 1) == 0)
        raise(SIGSEGV);
    expect(SIGSEGV, SI_TKILL, got_address);
}

/* ---- handlers that come later: each thinks of ours as the one below ---- */

static struct sigaction below;
static volatile int later_calls;

static void call_below(int number, siginfo_t *info, void *context)
{
    later_calls++;
    CHECK(later_calls < 10);
    below.sa_sigaction(number, info, context);
}

static void raise_below(int number, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    later_calls++;
    CHECK(later_calls < 10);
    CHECK(sigaction(number, &below, NULL) == 0);
    raise(number);
}

static void test_handler_put_over_ours(void (*later)(int, siginfo_t *, void *), int code)
{
    struct sigaction action = { .sa_sigaction = later, .sa_flags = SA_SIGINFO | SA_NODEFER };

    CHECK(sigaction(SIGSEGV, &action, &below) == 0);
    later_calls = 0;
    if (later == call_below) { /* it gets our touches, and hands them on */
        touch(PAGE(1600));
        CHECK(PAGE(1600)[1] == 1 && later_calls == 1);
    }
    CHECK(lm_trap_install() == 0); /* on top again */
    later_calls = 0;
    touch(PAGE(1601 + code));
    CHECK(later_calls == 0);
    if (sigsetjmp(back, 1) == 0)
        touch(PAGE(FOREIGN_PAGE));
    CHECK(later_calls == 1 && got_number == SIGSEGV && got_code == code);
    if (code == SEGV_ACCERR)
        CHECK(got_address == PAGE(FOREIGN_PAGE) + 1);
}

/* ---- where there was none ---- */

static void test_process_ends_as_it_would_have(size_t number, int by)
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(20);
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, number % 2 ? SIG_IGN : SIG_DFL); /* a fault cannot be ignored */
        start();
        touch(PAGE(number));
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(by == 0 ? status == 0 : WIFSIGNALED(status) && WTERMSIG(status) == by);
}

int main(int argc, char **argv)
{
    struct sigaction found;

    if (lm_probe_sigsegv() < 0) {
        puts("refused here");
        return 77;
    }
    set_handler(SIGSEGV, jump_back);
    set_handler(SIGBUS, jump_back);
    if (argc > 1 && strcmp(argv[1], "fork") == 0) {
        test_process_ends_as_it_would_have(0, 0);
        test_process_ends_as_it_would_have(BAD_PAGE, SIGBUS);
        test_process_ends_as_it_would_have(FOREIGN_PAGE, SIGSEGV);
    }
    start();
    test_many_threads_wait();
    test_another_stack_is_used();
    if (!HOLDS_SIGNALS_BACK)
        test_signals_nest();
    test_bad_news_and_foreign_faults_go_to_the_handlers_before();
    stop();
    CHECK(sigaction(SIGSEGV, NULL, &found) == 0 && found.sa_sigaction == jump_back);
    CHECK(sigaction(SIGBUS, NULL, &found) == 0 && found.sa_sigaction == jump_back);
    start();
    test_handler_put_over_ours(call_below, SEGV_ACCERR);
    stop();
    set_handler(SIGSEGV, jump_back);
    start();
    if (!HOLDS_SIGNALS_BACK)
        test_handler_put_over_ours(raise_below, SI_TKILL);
    stop();
    puts("ok");
    return 0;
}
