/* SPDX-License-Identifier: Apache-2.0
 *
 * sys.h: every call that this core makes into the operating system and that can fail.
 * One layer, so that errors have one convention (0 or a count, else a negative errno) and so that
 * tests can put failures underneath it. Owns no state.
 */
#ifndef LM_SYS_H
#define LM_SYS_H

#include <pthread.h>
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

int lm_sys_ioctl(int fd, unsigned long request, void *argument);
/* All of length bytes, or LM_E_SHORT at the end of the file, or -errno. */
int lm_sys_pread_full(int fd, void *buffer, size_t length, uint64_t offset);
/* The same, tried again: EIO of a disk can pass, a short file does not. */
int lm_sys_pread_patiently(int fd, void *buffer, size_t length, uint64_t offset);
/* When a file was last written to, in ns; negative: -errno. */
int64_t lm_sys_written_ns(int fd);
int lm_sys_dup(int fd); /* close-on-exec */
void lm_sys_close(int fd);

/* Anonymous private memory from mmap, never from malloc: the fault path must not wait for an arena
 * lock that the faulting thread may hold. */
int lm_sys_alloc(size_t length, void **ret_memory);
void lm_sys_free(void *memory, size_t length);
/* Address space at a multiple of alignment (a power of two, at least a page), inaccessible and not
 * locked: under mlockall(MCL_FUTURE) accessible memory is filled with zeros before anybody can register
 * it. Register first, then lm_sys_protect. */
int lm_sys_reserve(size_t length, size_t alignment, void **ret_memory);
/* Memory like lm_sys_alloc's that is written through again and again: huge pages where it is long enough,
 * so that the first use of a worker costs a few page faults and not thousands. */
int lm_sys_alloc_buffer(size_t length, void **ret_memory);
/* Have such a buffer hold `wanted` bytes, which it may do already; else what it held is gone. */
int lm_sys_grow_buffer(void **memory, size_t *length, size_t wanted);
/* A memfd of that size, for good; shared with whoever gets the descriptor. */
int lm_sys_shared_memory(size_t length);
int lm_sys_map_shared(int fd, size_t length, void **ret_memory);
int lm_sys_map_fixed(void *address, size_t length, int prot, int flags, int fd, uint64_t offset);
int lm_sys_protect(void *address, size_t length, int prot);
int lm_sys_advise(void *address, size_t length, int advice);
/* Whether something is mapped at every page. */
bool lm_sys_is_mapped(void *address, size_t length);
int lm_sys_resident(void *address, size_t length, unsigned char *ret_pages);

/* Give this thread a table of descriptors of its own in which only `keep` and stderr are open. */
int lm_sys_isolate_descriptor(int keep);
/* Write all of it to a descriptor that may be a full pipe nobody reads: give up after 100 ms. */
void lm_sys_write_patiently(int fd, const char *text, size_t length);

/* A thread with all signals blocked: the application's handlers never run on it. */
int lm_sys_thread_start(pthread_t *ret_thread, void *(*run)(void *), void *argument);

#endif
