/* SPDX-License-Identifier: Apache-2.0
 *
 * spawn.h: starts and ends the fetcher's process without Python: no GIL, no allocation, no handler of
 * fork. The process is not a child of the application: its death sends no SIGCHLD, and no wait() of the
 * application meets it.
 */
#ifndef LM_SPAWN_H
#define LM_SPAWN_H

#include <stddef.h>
#include <sys/types.h>

/* What to execute: argv and the environment, each ended by NULL. */
struct lm_command {
    char **argv, **envp;
};

struct lm_process {
    pid_t pid;  /* 0: none */
    int handle; /* a pidfd; -1: none */
};

/* A copy of `length` bytes of zero-terminated strings: argc arguments, then envc variables. */
int lm_command_new(const char *strings, size_t length, unsigned argc, unsigned envc,
                   struct lm_command *ret_command);

/* Execute it with `socket` as descriptor 3, `memory` as 4, nothing else but stderr. */
int lm_spawn(const struct lm_command *command, int socket, int memory, struct lm_process *ret_process);

/* SIGKILL, and wait until no thread of it can write to shared memory any more. */
void lm_spawn_kill(struct lm_process *process);

#endif
