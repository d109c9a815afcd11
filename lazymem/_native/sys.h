/* SPDX-License-Identifier: Apache-2.0
 *
 * sys.h: every call that this core makes into the operating system and that can fail; but those that
 * start the fetcher (spawn.c), which run on a stack of their own. One layer, so that errors have one
 * convention (0 or a count, else a negative errno), and so that tests can have any of them fail: they link
 * these same objects with the linker's --wrap (tests/native/faults.h). Owns no state.
 */
#ifndef LM_SYS_H
#define LM_SYS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define LM_HUGE_PAGE ((size_t)2 << 20)

uint64_t lm_sys_now_ns(void); /* CLOCK_MONOTONIC */
/* For pthread_cond_timedwait on that clock. */
void lm_sys_deadline(int timeout_ms, struct timespec *ret_deadline);
size_t lm_sys_page_size(void);
int lm_sys_cpu_count(void); /* this thread's affinity */
int lm_sys_process(void);   /* its id: another one in the child of a fork, whoever made it */

int lm_sys_ioctl(int fd, unsigned long request, void *argument);
/* All of length bytes, or LM_E_SHORT at the end of the file, or -errno. */
int lm_sys_pread_full(int fd, void *buffer, size_t length, uint64_t offset);
/* The same, tried again: EIO of a disk can pass, a short file does not. */
int lm_sys_pread_patiently(int fd, void *buffer, size_t length, uint64_t offset);
int lm_sys_pwrite_full(int fd, const void *buffer, size_t length, uint64_t offset);
/* When a file was last written to, in ns; negative: -errno. */
int64_t lm_sys_written_ns(int fd);
/* Which file a descriptor leads to: numbers are used again, these are not. */
struct lm_sys_file { uint64_t device, inode; };
int lm_sys_identify(int fd, struct lm_sys_file *ret_file);
/* What open(2) or the like has returned, under a number above those of the standard descriptors. */
int lm_sys_above_standard(int fd);
/* Whether the number still leads there: the application may close any, and open others under it. */
bool lm_sys_is_same(int fd, const struct lm_sys_file *file);
int lm_sys_dup(int fd); /* close-on-exec */
void lm_sys_close(int fd);
int lm_sys_open(const char *path, int flags); /* close-on-exec */
int lm_sys_userfaultfd(int flags);            /* close-on-exec, non-blocking */
/* One read(2): what there is, at most `length` bytes. 0 if there is nothing now. */
int lm_sys_read(int fd, void *buffer, size_t length);

/* Anonymous private memory from mmap, never from malloc: the fault path must not wait for an arena
 * lock that the faulting thread may hold. */
int lm_sys_alloc(size_t length, void **ret_memory);
void lm_sys_free(void *memory, size_t length);
/* Address space at a multiple of alignment (a power of two, at least a page), inaccessible and not
 * locked: under mlockall(MCL_FUTURE) accessible memory is filled with zeros before anybody can register
 * it. Register first, then lm_sys_protect. */
int lm_sys_reserve(size_t length, size_t alignment, void **ret_memory);
/* The same, at `wanted` if nothing lies there, else anywhere. */
int lm_sys_reserve_at(void *wanted, size_t length, size_t alignment, void **ret_memory);
/* Make the range inaccessible for good, unless something lies there already. */
void lm_sys_guard(void *address, size_t length);
/* Memory like lm_sys_alloc's that is written through again and again: huge pages where it is long enough,
 * so that the first use of a worker costs a few page faults and not thousands. */
int lm_sys_alloc_buffer(size_t length, void **ret_memory);
/* Have such a buffer hold `wanted` bytes, which it may do already; else what it held is gone. */
int lm_sys_grow_buffer(void **memory, size_t *length, size_t wanted);
/* A memfd of that size, for good; shared with whoever gets the descriptor. */
int lm_sys_shared_memory(size_t length);
int lm_sys_map_shared(int fd, size_t length, void **ret_memory);
/* In one step: no thread ever sees the range without a mapping. */
int lm_sys_map_fixed(void *address, size_t length, int prot, int flags, int fd, uint64_t offset);
/* Give the pages of a memfd's range back; it holds zeros then. */
int lm_sys_punch(int fd, uint64_t offset, size_t length);
int lm_sys_protect(void *address, size_t length, int prot);
int lm_sys_advise(void *address, size_t length, int advice);
/* Whether something is mapped at every page. */
bool lm_sys_is_mapped(void *address, size_t length);
int lm_sys_resident(void *address, size_t length, unsigned char *ret_pages);

/* A poller reports descriptors by tag, a bell wakes as many of its waiters as it is rung for. */
int lm_sys_poller(void);
int lm_sys_watch(int poller, int fd, uint32_t events, uint32_t tag);
/* Blocks, for a second. 1: *ret_tag is ready; 0: nothing is, or a signal came. */
/* Whether both are the descriptors that lm_sys_watch was called with. */
bool lm_sys_is_watched(int poller, int fd, uint32_t events, uint32_t tag);
int lm_sys_await(int poller, uint32_t *ret_tag);
int lm_sys_await_for(int poller, int timeout_ms, uint32_t *ret_tag);
int lm_sys_bell(void);
void lm_sys_ring(int bell, unsigned times);

/* Packets between two descriptors, both close-on-exec. */
int lm_sys_socket_pair(int ret_pair[2]);
/* One packet of both parts, or -errno at once. */
int lm_sys_send(int socket, const void *head, size_t head_length, const void *rest, size_t rest_length);
/* One packet; blocks. 0: the other side is gone. */
int lm_sys_receive(int socket, void *buffer, size_t length);
void lm_sys_shut_down(int socket); /* whoever blocks in lm_sys_receive gets 0 */

/* Give this thread a table of descriptors of its own in which only `keep` and stderr are open. */
int lm_sys_isolate_descriptor(int keep);
int lm_sys_isolate_descriptors(int keep, int also);
/* Write all of it to a descriptor that may be a full pipe nobody reads: give up after 100 ms. */
void lm_sys_write_patiently(int fd, const char *text, size_t length);

/* A handler of the application may touch lazy memory, and serving the touch takes the engine's lock. So no
 * handler may run on a thread that holds it: whoever takes it on a thread of the application's declares
 * this first, and holds signals back until the end of the block. Not those that a thread raises itself. */
#define LM_HOLD_SIGNALS \
    __attribute__((cleanup(lm_sys_signals_restore), unused)) sigset_t lm_signals_before = lm_sys_signals_block()
sigset_t lm_sys_signals_block(void); /* returns what was blocked before */
void lm_sys_signals_restore(const sigset_t *before);

/* A thread with all signals blocked: the application's handlers never run on it. */
int lm_sys_thread_start(pthread_t *ret_thread, void *(*run)(void *), void *argument);

/* ---- what a signal handler may call ---- */

int lm_sys_thread_id(void);
/* Sleep while *word is `value`, at most timeout_ms (negative: for ever). May return early. */
void lm_sys_futex_wait(_Atomic uint32_t *word, uint32_t value, int timeout_ms);
void lm_sys_futex_wake(_Atomic uint32_t *word, int threads);
/* Whether a thread of this process may read, or write, the aligned word that holds `address`: tried by the
 * kernel, so that there is no signal. Nothing changes, but a private page is made this process's own. */
bool lm_sys_can_read(uintptr_t address);
bool lm_sys_can_write(uintptr_t address);
/* Either may be NULL. */
int lm_sys_signal_action(int number, const struct sigaction *action, struct sigaction *ret_before);
/* Send this thread a signal, with that information about it. */
void lm_sys_signal_self(int number, siginfo_t *info);

/* ---- sys_pager.c: for the pager and its clients ---- */

int lm_sys_unblock(int fd);      /* reading it returns at once from now on */
/* A memfd of `length` bytes, mapped at `address`, in place of what is there. Nothing but that mapping can write to
 * it, whoever gets a descriptor. */
int lm_sys_publish_memory(void *address, size_t length);
int lm_sys_open_for_reading(int fd);
/* Have memory for all of a file in memory. */
int lm_sys_provide(int fd, size_t length);
/* A mark that goes with the open file, whoever has it: what the kernel keeps of F_SETSIG, which is of no use for
 * anything else. */
enum lm_mark { LM_MARK_NONE, LM_MARK_KEPT, LM_MARK_CLIENTS };
int lm_sys_mark(int fd, enum lm_mark mark);
enum lm_mark lm_sys_mark_of(int fd);
/* Packets to whoever listens at a path. Answers are waited for that long. */
int lm_sys_connect(const char *path, int patience_ms);
/* One packet, with a descriptor if it is not -1, and the packet that answers: its length, 0 at the end. */
int lm_sys_exchange(int fd, const void *question, size_t length, int descriptor, void *answer, size_t room);
/* Whether the other side has ended the connection, or does so by then. */
bool lm_sys_has_hung_up(int fd, int timeout_ms);
void lm_sys_await_input(int fd, int timeout_ms);
void lm_sys_pause(int us);
/* A process that shares this one's table of descriptors, so that none is closed when this one dies. Then it
 * closes those that are worth nothing, asks again every second, and ends when none is worth waiting for (or those
 * that are for a minute have had it). If a socket that listens is among them, whoever connects to it is given all others. No handler of fork runs, so there
 * must be no thread yet that may hold a lock. Returns its id. */
enum lm_worth { LM_WORTH_NOTHING, LM_WORTH_KEEPING, LM_WORTH_A_MINUTE, LM_WORTH_WAITING };
int lm_sys_start_twin(enum lm_worth (*worth_of)(int));

#endif
