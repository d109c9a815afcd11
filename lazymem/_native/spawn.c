/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lazymem.h"
#include "sys.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

#define LM_SPAWN_STACK ((size_t)64 << 10) /* for a few system calls */
#define LM_SPAWN_HIGH 16                  /* descriptors from here on are out of the way */

/* What runs on a stack that is unmapped before its functions return: AddressSanitizer would go on taking
 * that memory, whatever it becomes, for theirs. */
#define LM_BORROWED_STACK __attribute__((no_sanitize_address, noinline))

int lm_command_new(const char *strings, size_t length, unsigned argc, unsigned envc,
                   struct lm_command *ret_command)
{
    size_t pointers = ((size_t)argc + envc + 2) * sizeof(char *), at = 0;
    unsigned i, count = argc + envc;
    void *memory;
    char **table, *text;
    int error;

    if (argc == 0 || length == 0 || strings[length - 1] != '\0')
        return -EINVAL;
    error = lm_sys_alloc(pointers + length, &memory);
    if (error < 0)
        return error;
    table = memory;
    text = (char *)memory + pointers;
    memcpy(text, strings, length);
    for (i = 0; i < count && at < length; i++) {
        table[i < argc ? i : i + 1] = text + at;
        at += strlen(text + at) + 1;
    }
    if (i < count || at != length) {
        lm_sys_free(memory, pointers + length);
        return -EINVAL;
    }
    ret_command->argv = table;
    ret_command->envp = table + argc + 1; /* the gaps are NULL: the memory was fresh */
    return 0;
}

struct order {
    const struct lm_command *command;
    int socket, memory;
    void *stack; /* for the second step */
    /* What became of it; both steps run in this address space. */
    volatile pid_t pid;
    volatile int error;
};

/* Put descriptor `from` at `to`, open across exec. */
LM_BORROWED_STACK static int place(int from, int to)
{
    return dup2(from, to) < 0 ? -errno : 0;
}

LM_BORROWED_STACK static int give_descriptors(const struct order *order)
{
    int socket = fcntl(order->socket, F_DUPFD, LM_SPAWN_HIGH);
    int memory = fcntl(order->memory, F_DUPFD, LM_SPAWN_HIGH);
    int null = open("/dev/null", O_RDWR);
    int error = 0;

    if (socket < 0 || memory < 0 || null < 0)
        return -errno;
    if (null < LM_SPAWN_HIGH)
        null = fcntl(null, F_DUPFD, LM_SPAWN_HIGH);
    if (null < 0)
        return -errno;
    error = place(null, STDIN_FILENO);
    if (error == 0)
        error = place(null, STDOUT_FILENO);
    if (error == 0 && fcntl(STDERR_FILENO, F_GETFD) < 0)
        error = place(null, STDERR_FILENO);
    if (error == 0)
        error = place(socket, LM_FETCH_SOCKET);
    if (error == 0)
        error = place(memory, LM_FETCH_MEMORY);
    /* Before Linux 5.9 the others stay until exec closes them. */
    (void)syscall(SYS_close_range, (unsigned)LM_FETCH_MEMORY + 1, ~0u, 0u);
    return error;
}

LM_BORROWED_STACK static int become(void *argument)
{
    struct order *order = argument;
    sigset_t none;
    int error;

    (void)setsid(); /* Ctrl-C and Ctrl-Z at the terminal are for the application */
    error = give_descriptors(order);
    if (error == 0) {
        sigemptyset(&none);
        (void)sigprocmask(SIG_SETMASK, &none, NULL);
        (void)execve(order->command->argv[0], order->command->argv, order->command->envp);
        error = -errno;
    }
    order->error = error;
    _exit(127);
}

/* A parent that ends at once: what it leaves behind belongs to init, and is nobody's zombie here. */
LM_BORROWED_STACK static int step_aside(void *argument)
{
    struct order *order = argument;
    pid_t pid = clone(become, (char *)order->stack + LM_SPAWN_STACK, CLONE_VM | CLONE_VFORK | SIGCHLD,
                      order);

    if (pid < 0)
        order->error = -errno;
    order->pid = pid;
    _exit(0);
}

int lm_spawn(const struct lm_command *command, int socket, int memory, struct lm_process *ret_process)
{
    struct order order = { .command = command, .socket = socket, .memory = memory };
    void *stacks;
    pid_t step;
    int error = lm_sys_alloc(2 * LM_SPAWN_STACK, &stacks);

    if (error < 0)
        return error;
    order.stack = (char *)stacks + LM_SPAWN_STACK;
    /* No signal when it ends: the application did not ask for it. */
    step = clone(step_aside, (char *)stacks + LM_SPAWN_STACK, CLONE_VM | CLONE_VFORK, &order);
    if (step < 0) {
        error = -errno;
    } else {
        while (waitpid(step, NULL, __WCLONE) < 0 && errno == EINTR)
            ;
        error = order.error;
    }
    lm_sys_free(stacks, 2 * LM_SPAWN_STACK);
    if (error < 0)
        return error;
    ret_process->pid = order.pid;
    ret_process->handle = (int)syscall(SYS_pidfd_open, order.pid, 0u);
    if (ret_process->handle < 0 && errno != ESRCH) { /* a process that cannot be ended is not wanted */
        error = -errno;
        (void)kill(order.pid, SIGKILL);
        return error;
    }
    return 0;
}

void lm_spawn_kill(struct lm_process *process)
{
    struct pollfd ended = { .fd = process->handle, .events = POLLIN };

    if (process->handle >= 0) {
        (void)syscall(SYS_pidfd_send_signal, process->handle, SIGKILL, NULL, 0u);
        /* For as long as it takes: a hang is better than bytes that change after they were checked. */
        while (poll(&ended, 1, -1) < 1)
            (void)usleep(1000); /* a signal, or no memory for poll */
        lm_sys_close(process->handle);
    }
    process->pid = 0;
    process->handle = -1;
}
