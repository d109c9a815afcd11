/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "trap.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "lazymem.h"
#include "sys.h"

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

/* ---- ranges: one writer at a time, readers in signal handlers ----
 *
 * A thread that may touch a range keeps it from going away, so it finds it whole. Any other address may
 * find a range half changed, and is looked up again by whoever answers.
 */

#define RANGES 65536 /* more regions than a process can have mappings; untouched pages of it cost nothing */

struct range {
    _Atomic uintptr_t start, end; /* end 0: free */
    _Atomic bool writable;
};

static struct range ranges[RANGES];
static _Atomic unsigned range_high; /* no range in use from here on */

int lm_trap_add(uintptr_t start, size_t length, bool writable)
{
    unsigned i;

    for (i = 0; i < RANGES && ranges[i].end != 0; i++)
        ;
    if (i == RANGES)
        return -ENOSPC;
    ranges[i].start = start;
    ranges[i].writable = writable;
    ranges[i].end = start + length;
    if (i >= range_high)
        range_high = i + 1;
    return 0;
}

void lm_trap_remove(uintptr_t start)
{
    unsigned i;

    for (i = 0; i < range_high; i++)
        if (ranges[i].end != 0 && ranges[i].start == start)
            ranges[i].end = 0;
    while (range_high > 0 && ranges[range_high - 1].end == 0)
        range_high--;
}

static const struct range *find_range(uintptr_t address)
{
    unsigned i, high = range_high;

    for (i = 0; i < high; i++)
        if (address < ranges[i].end && address >= ranges[i].start)
            return &ranges[i];
    return NULL;
}

/* ---- slots ----
 *
 * A slot's word counts its uses and says how far this one is. It is changed by compare-and-swap, so that an
 * answer to one use never meets the next.
 */

#define SLOTS 1024

enum phase { IDLE, ASKED, TAKEN, ANSWERED /* + enum lm_trap_answer */ };

#define PHASE_BITS 3
#define PHASE(word) ((word) & ((1u << PHASE_BITS) - 1))

struct slot {
    _Atomic int owner; /* the thread that waits; 0: free */
    _Atomic uint32_t word;
    _Atomic uintptr_t address;
};

static struct slot slots[SLOTS];
static _Atomic unsigned slot_high; /* no slot was ever used from here on */
static _Atomic uint32_t rings;
static _Atomic uint32_t full; /* nobody wakes it: a place to wait for a moment */

static struct slot *take_slot(void)
{
    int thread = lm_sys_thread_id();

    for (;;) {
        unsigned i, high;

        for (i = 0; i < SLOTS; i++) {
            int nobody = 0;

            if (slots[i].owner == 0 && atomic_compare_exchange_strong(&slots[i].owner, &nobody, thread)) {
                for (high = slot_high; high <= i;)
                    (void)atomic_compare_exchange_weak(&slot_high, &high, i + 1);
                return &slots[i];
            }
        }
        lm_sys_futex_wait(&full, 0, 1);
    }
}

static enum lm_trap_answer ask(uintptr_t address)
{
    struct slot *slot = take_slot();
    uint32_t word = slot->word;
    enum lm_trap_answer answer;

    slot->address = address;
    word = ((word >> PHASE_BITS) + 1) << PHASE_BITS | ASKED;
    slot->word = word;
    lm_trap_ring(1);
    while (PHASE(word = slot->word) < ANSWERED)
        lm_sys_futex_wait(&slot->word, word, -1);
    answer = (enum lm_trap_answer)(PHASE(word) - ANSWERED);
    slot->word = word & ~((1u << PHASE_BITS) - 1); /* IDLE */
    slot->owner = 0;
    return answer;
}

uint32_t lm_trap_rings(void)
{
    return rings;
}

void lm_trap_sleep(uint32_t seen)
{
    lm_sys_futex_wait(&rings, seen, -1);
}

void lm_trap_ring(int threads)
{
    atomic_fetch_add(&rings, 1);
    lm_sys_futex_wake(&rings, threads);
}

bool lm_trap_take(uintptr_t *ret_address)
{
    unsigned i, high = slot_high;

    for (i = 0; i < high; i++) {
        uint32_t word = slots[i].word;

        if (PHASE(word) == ASKED && atomic_compare_exchange_strong(&slots[i].word, &word, word - ASKED + TAKEN)) {
            /* If it was answered and used again meanwhile, this is the next one's: it is asked for twice. */
            *ret_address = slots[i].address;
            return true;
        }
    }
    return false;
}

static void answer_slot(struct slot *slot, uintptr_t start, size_t length, enum lm_trap_answer answer)
{
    uint32_t word = slot->word;

    while (PHASE(word) == ASKED || PHASE(word) == TAKEN) {
        if (slot->address - start >= length)
            return;
        if (atomic_compare_exchange_weak(&slot->word, &word, word - PHASE(word) + ANSWERED + answer)) {
            lm_sys_futex_wake(&slot->word, 1);
            return;
        }
    }
}

void lm_trap_answer(uintptr_t start, size_t length, enum lm_trap_answer answer)
{
    unsigned i, high = slot_high;

    for (i = 0; i < high; i++)
        answer_slot(&slots[i], start, length, answer);
}

/* ---- whether there is anybody to ask ---- */

static _Atomic bool nowhere_served;
static _Atomic(_Atomic bool *) served = &nowhere_served; /* memory that is wiped in the child of a fork */

void lm_trap_serve(bool is_served)
{
    *served = is_served;
}

static void find_wiped_memory(void)
{
    size_t page = lm_sys_page_size();
    void *memory;

    if (served != &nowhere_served || lm_sys_alloc(page, &memory) < 0)
        return;
    (void)lm_sys_advise(memory, page, MADV_WIPEONFORK); /* without it: a hang in the child of a raw clone */
    served = memory;
}

/* ---- fork ---- */

static _Atomic int forking;

void lm_trap_before_fork(void)
{
    forking = lm_sys_thread_id();
}

/* The forking thread may have come here out of a handler of its own, in the middle of its waits. */
void lm_trap_after_fork(void)
{
    unsigned i, high = slot_high;
    int thread = lm_sys_thread_id();

    for (i = 0; i < high; i++) {
        if (slots[i].owner == forking) {
            slots[i].owner = thread;
            answer_slot(&slots[i], 0, SIZE_MAX, LM_TRAP_AGAIN);
        } else {
            slots[i].word = 0;
            slots[i].owner = 0;
        }
    }
}

/* ---- handlers that were there before ----
 *
 * levels[0] is what we found at first; each one after it was put over ours later, and we over it again. It
 * will think of ours as the one below it: so when it raises the signal anew, or calls us, that is meant for
 * the level below its own. Only ever appended to or cut, because handlers read it at any time.
 */

#define LEVELS 16
#define CHAINS 64

struct before {
    struct sigaction levels[LEVELS];
    _Atomic int count; /* 0: ours was never installed */
};

static struct before befores[2];

/* A signal that has come to us. frame: where on the stack; what is called from there lies below. */
struct arrival {
    int number;
    siginfo_t *info;
    void *context;
    uintptr_t frame;
};

/* Threads that are in a handler of a level, or have left it by longjmp: then until their next signal. */
static struct chain {
    _Atomic int thread; /* 0: free */
    int number, level;
    const void *context;
    uintptr_t frame;
} chains[CHAINS];

static struct before *before_of(int number)
{
    return &befores[number == SIGBUS];
}

static bool is_chain_of(const struct chain *chain, int thread, int number)
{
    return chain->thread == thread && chain->number == number;
}

/* The level that a signal is for. One that a handler has raised, or handed on, is for the level below it. */
static int level_of(const struct arrival *signal, int thread)
{
    int level = before_of(signal->number)->count - 1, i;
    bool is_handed_on = false;

    for (i = 0; i < CHAINS; i++)
        if (is_chain_of(&chains[i], thread, signal->number) && signal->frame < chains[i].frame &&
            (signal->info->si_code <= 0 || signal->context == chains[i].context) && chains[i].level <= level) {
            level = chains[i].level - 1;
            is_handed_on = true;
        }
    for (i = 0; i < CHAINS && !is_handed_on; i++)
        if (is_chain_of(&chains[i], thread, signal->number))
            chains[i].thread = 0;
    return level;
}

/* Where none is free, any is given up: threads that have left by longjmp, and are gone since. */
static struct chain *enter_chain(const struct arrival *signal, int thread, int level)
{
    struct chain *chain = NULL;
    int i, nobody = 0;

    for (i = 0; i < CHAINS && chain == NULL; i++, nobody = 0)
        if (atomic_compare_exchange_strong(&chains[i].thread, &nobody, thread))
            chain = &chains[i];
    if (chain == NULL) {
        chain = &chains[(unsigned)thread % CHAINS];
        chain->thread = thread;
    }
    chain->number = signal->number;
    chain->level = level;
    chain->context = signal->context;
    chain->frame = signal->frame;
    return chain;
}

static void end_by(int number, siginfo_t *info)
{
    struct sigaction usual = { .sa_handler = SIG_DFL };
    sigset_t only;

    (void)lm_sys_signal_action(number, &usual, NULL);
    sigemptyset(&only);
    sigaddset(&only, number);
    pthread_sigmask(SIG_UNBLOCK, &only, NULL);
    lm_sys_signal_self(number, info);
}

static void call(const struct sigaction *action, const struct arrival *signal)
{
    sigset_t mask = action->sa_mask, before;

    if (!(action->sa_flags & SA_NODEFER))
        sigaddset(&mask, signal->number);
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(signal->number, signal->info, signal->context);
    else
        action->sa_handler(signal->number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void pass_on(const struct arrival *signal)
{
    int thread = lm_sys_thread_id(), level = level_of(signal, thread);
    struct sigaction action = { .sa_handler = SIG_DFL };
    struct chain *chain = NULL;

    if (level >= 0)
        action = before_of(signal->number)->levels[level];
    if (action.sa_handler == SIG_IGN && signal->info->si_code <= 0)
        return;
    if (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN) { /* a fault cannot be ignored */
        end_by(signal->number, signal->info);
        return;
    }
    if (level > 0) /* the one at 0 knows nothing of ours */
        chain = enter_chain(signal, thread, level);
    call(&action, signal);
    if (chain != NULL && chain->thread == thread)
        chain->thread = 0;
}

/* ---- the handler ---- */

enum access { READ, WRITE, EXECUTE };

static enum access access_of(const ucontext_t *context)
{
#if defined(__x86_64__)
    greg_t error = context->uc_mcontext.gregs[REG_ERR]; /* the processor's own code for a page fault */

    return error & 16 ? EXECUTE : error & 2 ? WRITE : READ;
#elif defined(__aarch64__)
    const unsigned char *record = (const unsigned char *)context->uc_mcontext.__reserved;
    const unsigned char *end = record + sizeof context->uc_mcontext.__reserved;

    while (record + 16 <= end) {
        uint32_t head[2]; /* magic, size */
        uint64_t syndrome;

        memcpy(head, record, sizeof head);
        memcpy(&syndrome, record + 8, sizeof syndrome);
        if (head[0] == 0x45535201) /* ESR_MAGIC */
            return (syndrome >> 26 & 0x3f) == 0x20 ? EXECUTE : syndrome & 64 ? WRITE : READ;
        if (head[0] == 0 || head[1] < 16)
            break;
        record += head[1];
    }
    return READ;
#else
    (void)context;
    return EXECUTE; /* lm_probe_sigsegv has said no */
#endif
}

/* Answers that change nothing, one after the other: then it is the application that has protected the page.
 * A thread that evicts may take it away a few times, too. */
#define PATIENCE 1000

static bool serve(const struct arrival *signal)
{
    uintptr_t address = (uintptr_t)signal->info->si_addr;
    enum access access = access_of(signal->context);
    const struct range *range;
    int turn;

    if (signal->info->si_code != (signal->number == SIGSEGV ? SEGV_ACCERR : BUS_ADRERR))
        return false;
    range = find_range(address);
    if (range == NULL || access == EXECUTE || (access == WRITE && !range->writable) || !*served)
        return false;
    for (turn = 0; turn < PATIENCE; turn++) {
        if (access == WRITE ? lm_sys_can_write(address) : lm_sys_can_read(address))
            return true;
        switch (ask(address)) {
        case LM_TRAP_BAD: {
            siginfo_t info = { .si_signo = SIGBUS, .si_code = BUS_ADRERR };
            struct arrival bus = { SIGBUS, &info, signal->context, signal->frame };

            info.si_addr = (void *)address;
            pass_on(&bus);
            return true;
        }
        case LM_TRAP_FOREIGN: return false;
        case LM_TRAP_AGAIN: break;
        }
    }
    return false;
}

static void handle(int number, siginfo_t *info, void *context)
{
    struct arrival signal = { number, info, context, (uintptr_t)__builtin_frame_address(0) };
    int error = errno;

    if (!serve(&signal))
        pass_on(&signal);
    errno = error;
}

/* ---- install ---- */

/* `found` stands where ours should be. */
static int remember(struct before *before, const struct sigaction *found)
{
    int i;

    for (i = 0; i < before->count; i++)
        if (before->levels[i].sa_handler == found->sa_handler) {
            before->count = i + 1;
            return 0;
        }
    if (before->count == LEVELS)
        return -ENOSPC;
    before->levels[before->count] = *found;
    before->count++;
    return 0;
}

static int install_for(int number)
{
    struct sigaction ours = { .sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART };
    struct sigaction found;
    int error = lm_sys_signal_action(number, NULL, &found);

    if (error < 0 || ((found.sa_flags & SA_SIGINFO) && found.sa_sigaction == handle))
        return error;
    error = remember(before_of(number), &found);
    return error < 0 ? error : lm_sys_signal_action(number, &ours, NULL);
}

int lm_trap_install(void)
{
    int error = install_for(SIGSEGV);

    find_wiped_memory();
    return error < 0 ? error : install_for(SIGBUS);
}

static void uninstall_for(int number)
{
    struct before *before = before_of(number);
    struct sigaction found;

    if (before->count > 0 && lm_sys_signal_action(number, NULL, &found) == 0 &&
        (found.sa_flags & SA_SIGINFO) && found.sa_sigaction == handle)
        (void)lm_sys_signal_action(number, &before->levels[before->count - 1], NULL);
}

void lm_trap_uninstall(void)
{
    uninstall_for(SIGSEGV);
    uninstall_for(SIGBUS);
}

int lm_probe_sigsegv(void)
{
#if defined(__x86_64__) || defined(__aarch64__)
    size_t page = lm_sys_page_size();
    void *memory = NULL;
    int error = 0, fd = lm_sys_shared_memory(page);

    if (fd < 0)
        return fd;
    error = lm_sys_reserve(page, page, &memory);
    if (error == 0)
        error = lm_sys_map_fixed(memory, page, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, page);
    if (error == 0 && lm_sys_can_read((uintptr_t)memory))
        error = -ENOSYS; /* a sandbox that answers for the kernel */
    if (error == 0)
        error = lm_sys_map_fixed(memory, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (error == 0 && !(lm_sys_can_read((uintptr_t)memory) && lm_sys_can_write((uintptr_t)memory)))
        error = -ENOSYS;
    lm_sys_free(memory, page);
    lm_sys_close(fd);
    return error;
#else
    return -EOPNOTSUPP; /* whether a touch reads or writes has to be known */
#endif
}
