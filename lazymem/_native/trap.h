/* SPDX-License-Identifier: Apache-2.0
 *
 * trap.h: touches that come as a signal. Owns the handlers of SIGSEGV and SIGBUS, and the slots in which
 * threads wait that have touched protected memory of ours. Knows addresses, nothing of regions or chunks.
 *
 * Some facts. A touch of memory that may not be touched is SIGSEGV (SEGV_ACCERR) in the touching thread;
 * of a mapped file's pages beyond its end, SIGBUS (BUS_ADRERR). When the handler returns, the instruction
 * is tried again. The thread may hold any lock, malloc's, Python's, even the engine's if a signal came in
 * the middle of one of its calls. A thread that blocks SIGSEGV is killed by the kernel instead. A touch by
 * the kernel (write(2) from such memory) raises no signal; it fails with EFAULT.
 *
 * What follows. The handler takes no lock and calls nothing that might. It puts the address into a slot,
 * rings, and sleeps on the slot until whoever took the address answers. Then it has the kernel try the
 * touch, and returns if that works. Signals nest (SA_NODEFER): a handler of the application that runs
 * while the thread waits here may touch lazy memory itself.
 *
 * Whatever is not ours goes on to the handler that was there before, or ends the process as it would have.
 */
#ifndef LM_TRAP_H
#define LM_TRAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a waiting thread is told. */
enum lm_trap_answer {
    LM_TRAP_AGAIN,   /* something has changed: try again */
    LM_TRAP_BAD,     /* its bytes cannot be had: SIGBUS */
    LM_TRAP_FOREIGN, /* not ours after all */
};

/* Have our handlers on top; again, when others may have been put over them. The caller lets nobody else in. */
int lm_trap_install(void);
/* Take them off, where they are still on top. */
void lm_trap_uninstall(void);

/* Touches in [start, start + length) are served from now on. -ENOSPC: too many ranges. */
int lm_trap_add(uintptr_t start, size_t length, bool writable);
void lm_trap_remove(uintptr_t start);

/* For those who answer. A ring comes between lm_trap_rings() and lm_trap_sleep: then there is no sleep. */
uint32_t lm_trap_rings(void);
void lm_trap_sleep(uint32_t rings);
void lm_trap_ring(int threads);
/* An address that is waited for and that nobody has taken yet. */
bool lm_trap_take(uintptr_t *ret_address);
/* Answer all who wait for an address in the range, taken or not. */
void lm_trap_answer(uintptr_t start, size_t length, enum lm_trap_answer answer);

/* In the process that is about to fork, and in its child: only the forking thread's slots go on. */
void lm_trap_before_fork(void);
void lm_trap_after_fork(void);
/* Somebody answers in this process. The child of a fork, however it was made, begins with nobody: a touch
 * is an ordinary SIGSEGV then, instead of a wait for ever. */
void lm_trap_serve(bool served);

#endif
