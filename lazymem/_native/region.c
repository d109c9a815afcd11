/* SPDX-License-Identifier: Apache-2.0
 *
 * region.c: the public face of a region: open, ask, wait, look, close. Owns the region's memory and
 * its copies of everything that the caller described it with.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "attachment.h"
#include "compose.h"
#include "engine.h"
#include "fetch.h"
#include "places.h"
#include "source.h"
#include "sys.h"
#include "trap.h"
#include "uffd.h"

/* Runs of zeros at least this long are not registered: the kernel's own zero pages serve them, without
 * a fault message or a page table of ours. Shorter ones are not worth splitting the mapping. */
#define LM_HOLE_BYTES ((uint64_t)64 << 20)
/* Each hole costs two mappings of the 65,530 that a process may have. */
#define LM_MAX_HOLES 1000

/* Where regions lie that children of a fork do not get: terabytes below the place at which the kernel puts
 * memory by itself, so that nothing which a child maps later comes to lie at an address that it was left
 * with. Where addresses are too short for it, memory lies where the kernel puts it. */
#define LM_DROPPED_LOW  ((uintptr_t)32 << 40)
#define LM_DROPPED_HIGH ((uintptr_t)64 << 40)

#define LM_MAP_CHUNK ((size_t)2 << 20) /* what a plain mapping calls a chunk */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

/* ---- one allocation for the region and all its small tables ---- */

struct arena {
    unsigned char *memory;
    size_t used;
};

/* With memory NULL this only adds up. */
static void *carve(struct arena *arena, size_t length)
{
    size_t at = (arena->used + 15) & ~(size_t)15;

    arena->used = at + length;
    return arena->memory == NULL ? NULL : arena->memory + at;
}

static void *carve_copy(struct arena *arena, const void *from, size_t length)
{
    void *copy = carve(arena, length);

    if (copy != NULL && length > 0)
        memcpy(copy, from, length);
    return copy;
}

static uint64_t count_holes(const lm_region_spec *spec, uint64_t threshold)
{
    uint64_t i, count = 0;

    for (i = 0; i < spec->run_count; i++)
        count += spec->runs[i].first_record == LM_ZERO_RUN &&
                 spec->runs[i].count >= threshold / spec->chunk_size;
    return count;
}

static uint64_t choose_hole_size(const lm_region_spec *spec)
{
    uint64_t threshold = LM_HOLE_BYTES;

    while (threshold < spec->content_size && count_holes(spec, threshold) > LM_MAX_HOLES)
        threshold *= 2;
    return threshold;
}

static struct lm_region *lay_out(struct arena *arena, const lm_region_spec *spec, uint64_t holes)
{
    struct lm_region *region = carve(arena, sizeof *region);
    struct lm_region sizes_only, *into = region == NULL ? &sizes_only : region;
    size_t arrays = (size_t)spec->array_count;
    size_t sources = (size_t)spec->source_count;
    size_t names = arrays == 0 ? 0 : spec->name_offsets[arrays];

    into->registered = carve(arena, (size_t)(holes + 1) * sizeof *into->registered);
    into->strips = carve_copy(arena, spec->strips, (size_t)spec->strip_count * sizeof *into->strips);
    into->fds = carve(arena, sources * sizeof *into->fds);
    into->sources = carve(arena, sources * sizeof *into->sources);
    into->files = carve(arena, sources * sizeof *into->files);
    into->written_ns = carve(arena, sources * sizeof *into->written_ns);
    into->source_sizes = carve_copy(arena, spec->source_sizes, sources * sizeof *into->source_sizes);
    into->url = carve_copy(arena, spec->url, strlen(spec->url) + 1);
    into->array_offsets = carve_copy(arena, spec->array_offsets, arrays * sizeof *into->array_offsets);
    into->array_lengths = carve_copy(arena, spec->array_lengths, arrays * sizeof *into->array_lengths);
    into->name_offsets =
        carve_copy(arena, spec->name_offsets, arrays == 0 ? 0 : (arrays + 1) * sizeof *into->name_offsets);
    into->names = carve_copy(arena, spec->names, names);
    return region;
}

static int allocate(const lm_region_spec *spec, uint64_t holes, struct lm_region **ret_region)
{
    struct arena arena = { 0 };
    struct lm_region *region;
    void *memory;
    int error;

    (void)lay_out(&arena, spec, holes);
    error = lm_sys_alloc(arena.used, &memory);
    if (error < 0)
        return error;
    arena = (struct arena){ .memory = memory };
    region = lay_out(&arena, spec, holes);
    region->memory = arena.used;
    region->array_count = spec->array_count;
    region->strip_count = spec->strip_count;
    region->composed = spec->strip_count > 0;
    *ret_region = region;
    return 0;
}

static void forget_traps(struct lm_region *region)
{
    if (region->pages == &lm_pages_trap)
        lm_pages_trap_detach(region);
    if (region->pages == &lm_pages_stock)
        lm_pages_stock_detach(region);
}

/* Everything but the handle and the memory. */
static void give_back(struct lm_region *region)
{
    int i;

    for (i = 0; i < region->source_count; i++) {
        if (region->remote)
            lm_source_close(region->sources[i]);
        else if (lm_sys_is_same(region->fds[i], &region->files[i]))
            lm_sys_close(region->fds[i]);
    }
    region->source_count = 0;
    lm_table_destroy(&region->table);
    lm_table_destroy(&region->stock);
}

static void destroy(struct lm_region *region)
{
    forget_traps(region);
    lm_places_release(region);
    give_back(region);
    lm_sys_free(region, region->memory);
}

void lm_region_leave_behind(struct lm_region *region)
{
    lm_sys_guard(region->base, region->size);
    region->calls = region->tasks = 0;
    region->closing = region->closed = true;
    forget_traps(region);
    give_back(region);
}

/* ---- open ---- */

/* Address space, and whether children get it. */
static int reserve(struct lm_region *region)
{
    static _Atomic uintptr_t low = LM_DROPPED_LOW;
    uintptr_t wanted = 0;
    void *base;
    int error;

    if (region->dropped) {
        wanted = atomic_fetch_add(&low, region->size + LM_HUGE_PAGE);
        if (wanted + region->size > LM_DROPPED_HIGH) { /* from the beginning: most of it is free again */
            wanted = LM_DROPPED_LOW;
            atomic_store(&low, wanted + region->size + LM_HUGE_PAGE);
        }
    }
    error = lm_sys_reserve_at((void *)wanted, region->size, LM_HUGE_PAGE, &base);
    if (error < 0)
        return error;
    region->base = base;
    return 0;
}

/* After the last change of the mappings: what is mapped anew is inherited. */
static int keep_from_children(const struct lm_region *region)
{
    return region->dropped ? lm_sys_advise(region->base, region->size, MADV_DONTFORK) : 0;
}

static bool is_chunk_size(uint32_t size)
{
    return size >= (64u << 10) && size <= (64u << 20) && (size & (size - 1)) == 0 && size >= lm_sys_page_size();
}

static const struct lm_pages *pages_of(int backend)
{
    switch (backend) {
    case LM_BACKEND_UFFD:
    case LM_BACKEND_UFFD_USER: return &lm_pages_uffd;
    case LM_BACKEND_SIGSEGV: return &lm_pages_trap;
    case LM_BACKEND_EAGER: return &lm_pages_eager;
    case LM_BACKEND_STOCK: return &lm_pages_stock;
    default: return NULL;
    }
}

static int check_spec(const lm_region_spec *spec)
{
    uint64_t i;

    if (!is_chunk_size(spec->chunk_size) ||
        spec->content_size == 0 || spec->content_size > (UINT64_C(1) << 46) ||
        spec->source_count < 0 || spec->source_count > 65535 || spec->url == NULL)
        return -EINVAL;
    if (pages_of(spec->backend) == NULL)
        return -EINVAL;
    if (spec->strip_count > 0 && (!is_chunk_size(spec->stock_chunk_size) || spec->stock_size == 0 ||
                                  spec->stock_size > (UINT64_C(1) << 46) || lm_compose_check(spec) < 0))
        return -EINVAL;
    for (i = 0; i < spec->array_count; i++)
        if (spec->name_offsets[i] > spec->name_offsets[i + 1])
            return -EINVAL;
    return 0;
}

static int keep_remote_sources(struct lm_region *region, const lm_region_spec *spec)
{
    int i, error = 0;

    region->remote = true;
    region->coalesce_gap = spec->coalesce_gap;
    region->coalesce_size = spec->coalesce_size;
    region->fetch_timeout_ms = spec->fetch_timeout_ms;
    pthread_mutex_lock(&lm_engine.lock);
    for (i = 0; i < spec->source_count && error == 0; i++) {
        if (spec->fds[i] >= 0 || spec->sources == NULL || lm_source_get(spec->sources[i]) == NULL) {
            error = -EBADF;
        } else {
            lm_source_use(spec->sources[i]);
            region->sources[region->source_count++] = spec->sources[i];
        }
    }
    pthread_mutex_unlock(&lm_engine.lock);
    return error;
}

static int duplicate_sources(struct lm_region *region, const lm_region_spec *spec)
{
    int i, error;

    if (spec->source_count > 0 && spec->fds[0] < 0)
        return keep_remote_sources(region, spec);
    for (i = 0; i < spec->source_count; i++) {
        int fd = lm_sys_dup(spec->fds[i]);

        if (fd < 0)
            return fd;
        region->fds[region->source_count] = fd;
        region->written_ns[region->source_count] = lm_sys_written_ns(fd);
        error = lm_sys_identify(fd, &region->files[region->source_count]);
        if (error == 0 && region->written_ns[region->source_count] < 0)
            error = (int)region->written_ns[region->source_count];
        if (error < 0) {
            lm_sys_close(fd);
            return error;
        }
        region->source_count++;
    }
    return 0;
}

int lm_region_check_source(const struct lm_region *region, const lm_chunk_record *record, int error)
{
    int64_t written_ns;

    if (error == 0 && !(record->flags & LM_CHUNK_UNCHECKED))
        return 0;
    if (!lm_sys_is_same(region->fds[record->source], &region->files[record->source]))
        return -EBADF;
    if (error < 0)
        return error;
    written_ns = lm_sys_written_ns(region->fds[record->source]);
    if (written_ns < 0)
        return (int)written_ns;
    return written_ns == region->written_ns[record->source] ? 0 : LM_E_CHANGED;
}

/* COPY, unless the caller asks: MOVE must have both sides writable, so mode "r" would rest on numpy's
 * flag alone, and whether it is faster changes from machine to machine (DESIGN.md, benchmarks). */
static int choose_install(const lm_region_spec *spec, const struct lm_uffd *uffd)
{
    bool can = uffd != NULL && (uffd->can & LM_CAN_MOVE) && spec->chunk_size % LM_HUGE_PAGE == 0;

    if (spec->install == LM_INSTALL_MOVE && !can)
        return LM_E_FEATURE;
    return spec->install == LM_INSTALL_MOVE ? LM_INSTALL_MOVE : LM_INSTALL_COPY;
}

static int add_registered(struct lm_region *region, uint64_t start, uint64_t end)
{
    uint64_t ioctls, count = region->registered_count;
    int error;

    if (start == end)
        return 0;
    error = lm_uffd_register(lm_engine.uffds[region->uffd].fd, (uintptr_t)region->base + start,
                             end - start, &ioctls);
    if (error == 0) {
        region->registered[count] = (struct lm_extent){ .start = start, .length = end - start };
        region->registered_count = count + 1;
    }
    return error;
}

static int leave_zeros(struct lm_region *region, uint64_t start, uint64_t length)
{
    return region->pages == &lm_pages_trap ? lm_pages_trap_leave_zeros(region, start, length) : 0;
}

/* Have touches wait, but in long stretches of zeros. */
static int watch_ranges(struct lm_region *region, uint64_t hole_size)
{
    const struct lm_table *table = &region->table;
    bool registers = region->pages == &lm_pages_uffd;
    uint64_t start = 0, i;
    int error = 0;

    for (i = 0; i < table->run_count && error == 0; i++) {
        const lm_run *run = &table->runs[i];
        uint64_t first = run->first_chunk << table->chunk_shift;
        uint64_t length = run->count << table->chunk_shift;

        if (run->first_record != LM_ZERO_RUN || length < hole_size)
            continue;
        error = registers ? add_registered(region, start, first) : leave_zeros(region, first, length);
        start = first + length;
    }
    return error < 0 || !registers ? error : add_registered(region, start, region->size);
}

/* lifecycle is held; on failure the caller destroys the region. */
static int attach_locked(struct lm_region *region, const lm_region_spec *spec, uint64_t hole_size)
{
    const struct lm_uffd *uffd = NULL;
    int error = 0;

    if (region->pages == &lm_pages_uffd) {
        error = lm_engine_uffd_locked(spec->backend, &region->uffd);
        uffd = &lm_engine.uffds[region->uffd];
    } else if (region->pages == &lm_pages_trap) {
        error = lm_engine_traps_locked();
    }
    if (error < 0)
        return error;
    region->install = choose_install(spec, uffd);
    if (region->install < 0)
        return region->install;
    region->prot = PROT_READ;
    if (spec->writable || region->install == LM_INSTALL_MOVE || region->pages->in_place ||
        region->pages == &lm_pages_stock)
        region->prot |= PROT_WRITE;
    error = reserve(region);
    if (error < 0)
        return error;
    lm_pieces_init(&region->pieces, (uintptr_t)region->base, region->size);
    if (region->pages == &lm_pages_trap)
        error = lm_pages_trap_attach(region);
    if (region->pages == &lm_pages_stock)
        error = lm_pages_stock_attach(region);
    if (error == 0)
        error = lm_engine_insert(region);
    if (error < 0) {
        forget_traps(region); /* while lifecycle is held */
        return error;
    }
    error = watch_ranges(region, hole_size);
    if (error == 0)
        error = keep_from_children(region);
    if (error == 0 && region->pages != &lm_pages_trap)
        error = lm_sys_protect(region->base, region->size, region->prot);
    if (error < 0) {
        lm_engine_remove(region);
        forget_traps(region);
    }
    return error;
}

int lm_region_open(const lm_region_spec *spec, lm_region **ret_region)
{
    LM_HOLD_SIGNALS;
    static _Atomic uint64_t serials;
    struct lm_region *region;
    uint64_t hole_size;
    int error = check_spec(spec);

    if (error < 0)
        return error;
    hole_size = choose_hole_size(spec);
    error = allocate(spec, count_holes(spec, hole_size), &region);
    if (error < 0)
        return error;
    region->backend = spec->backend;
    region->pages = pages_of(spec->backend);
    region->stage.fd = -1;
    region->writable = spec->writable != 0;
    region->dropped = spec->dropped != 0;
    region->process = lm_sys_process();
    region->readahead = spec->readahead;
    region->serial = atomic_fetch_add(&serials, 1) + 1;
    error = lm_table_init(&region->table, spec);
    if (error == 0 && region->composed)
        error = lm_table_init_stock(&region->stock, spec);
    region->size = region->table.chunk_count << region->table.chunk_shift;
    if (error == 0)
        error = duplicate_sources(region, spec);
    if (error == 0) {
        pthread_mutex_lock(&lm_engine.lifecycle);
        error = lm_engine_acquire_locked(spec->threads);
        if (error == 0 && region->remote) {
            error = lm_fetch_start_locked();
            if (error == 0 && region->composed)
                error = lm_engine_composers_locked();
            if (error < 0)
                lm_engine_release_locked();
        }
        if (error == 0) {
            error = attach_locked(region, spec, hole_size);
            if (error < 0)
                lm_engine_release_locked();
        }
        pthread_mutex_unlock(&lm_engine.lifecycle);
    }
    if (error < 0) {
        destroy(region);
        return error;
    }
    *ret_region = region;
    return 0;
}

static int map_pieces(struct lm_region *region, const lm_map_piece *pieces, uint64_t count)
{
    /* Of a pager's memory always privately: only such a mapping can be registered without the right to write. */
    int kind = region->writable || region->backend == LM_BACKEND_PAGER ? MAP_PRIVATE : MAP_SHARED;
    uint64_t i;
    int error = 0;

    for (i = 0; i < count && error == 0; i++) {
        const lm_map_piece *piece = &pieces[i];

        if (piece->region_offset > region->size || piece->length == 0 ||
            piece->length > region->size - piece->region_offset)
            return -EINVAL;
        error = lm_sys_map_fixed(region->base + piece->region_offset, piece->length, region->prot, kind, piece->fd,
                                 piece->file_offset);
    }
    return error;
}

static int open_plain(int backend, uint64_t size, const lm_map_piece *pieces, uint64_t piece_count, int writable,
                      int dropped, lm_region **ret_region)
{
    struct lm_region *region;
    size_t page = lm_sys_page_size();
    void *memory;
    int error;

    if (size == 0 || size > (UINT64_C(1) << 46))
        return -EINVAL;
    error = lm_sys_alloc(sizeof *region, &memory);
    if (error < 0)
        return error;
    region = memory;
    region->memory = sizeof *region;
    region->backend = backend;
    region->writable = writable != 0;
    region->dropped = dropped != 0;
    region->process = lm_sys_process();
    region->prot = backend == LM_BACKEND_PAGER ? PROT_NONE : PROT_READ | (writable ? PROT_WRITE : 0);
    region->size = (size + page - 1) & ~(uint64_t)(page - 1);
    error = reserve(region);
    if (error == 0) {
        lm_pieces_init(&region->pieces, (uintptr_t)region->base, region->size);
        error = lm_sys_protect(region->base, region->size, region->prot);
    }
    if (error == 0)
        error = map_pieces(region, pieces, piece_count);
    if (error == 0)
        error = keep_from_children(region);
    if (error < 0) {
        destroy(region);
        return error;
    }
    *ret_region = region;
    return 0;
}

int lm_region_open_map(uint64_t size, const lm_map_piece *pieces, uint64_t piece_count, int writable,
                       int dropped, lm_region **ret_region)
{
    return open_plain(LM_BACKEND_MAP, size, pieces, piece_count, writable, dropped, ret_region);
}

/* Inaccessible at first: under mlockall(MCL_FUTURE) accessible memory is read before anybody can register it. */
int lm_region_open_paged(int memfd, uint64_t size, int writable, int dropped, lm_region **ret_region)
{
    lm_map_piece piece = { .length = size, .fd = memfd };

    return open_plain(LM_BACKEND_PAGER, size, &piece, 1, writable, dropped, ret_region);
}

int lm_region_admit(lm_region *region)
{
    return lm_sys_protect(region->base, region->size, PROT_READ | (region->writable ? PROT_WRITE : 0));
}

/* ---- calls and close ----
 *
 * A public function that uses the region's tables or memory counts itself in and out, so that close can
 * wait for it: a handle outlives its region, and any number of threads may use it at any time.
 */

static int enter_as(struct lm_region *region, bool touches)
{
    LM_HOLD_SIGNALS;
    int error = 0;

    pthread_mutex_lock(&lm_engine.lock);
    if (region->closing) {
        error = LM_E_CLOSED;
    } else {
        region->calls++;
        region->touching += touches;
    }
    pthread_mutex_unlock(&lm_engine.lock);
    return error;
}

static int leave_as(struct lm_region *region, bool touches, int result)
{
    LM_HOLD_SIGNALS;
    pthread_mutex_lock(&lm_engine.lock);
    if (region->calls > 0) /* the child of a fork in the middle of a call counts from zero */
        region->calls--;
    if (region->touching > 0)
        region->touching -= touches;
    pthread_cond_broadcast(&lm_engine.progress);
    pthread_mutex_unlock(&lm_engine.lock);
    return result;
}

static int enter(struct lm_region *region) { return enter_as(region, false); }
static int leave(struct lm_region *region, int result) { return leave_as(region, false, result); }

/* What needs the memory. */
static int enter_memory_as(struct lm_region *region, bool touches)
{
    int error = enter_as(region, touches);

    return error == 0 && atomic_load(&region->lost) ? leave_as(region, touches, LM_E_LOST) : error;
}

static int enter_memory(struct lm_region *region) { return enter_memory_as(region, false); }

static void drop_queued_locked(struct lm_region *region)
{
    lm_queue_drop_spans(&lm_engine.queue, region);
    lm_queue_drop_spans(&lm_engine.composing, region);
    if (lm_engine_by_courier(region))
        lm_fetch_forget_locked(region);
}

/* True if this call is to close it; then nobody waits for anything, and nothing is under way. */
static bool begin_close(struct lm_region *region, const sigset_t *signals_before)
{
    bool mine;

    pthread_mutex_lock(&lm_engine.lock);
    mine = !region->closing;
    region->closing = true;
    pthread_cond_broadcast(&lm_engine.progress);
    while (!mine && !region->closed)
        (void)lm_engine_wait_locked(signals_before, NULL);
    /* A call that copies out of the memory may wait for a chunk that was evicted under it. */
    while (mine && region->touching > 0)
        (void)lm_engine_wait_locked(signals_before, NULL);
    if (mine) {
        region->leaving = true;
        drop_queued_locked(region);
        pthread_cond_broadcast(&lm_engine.progress);
    }
    pthread_mutex_unlock(&lm_engine.lock);
    return mine;
}

static void wait_until_idle(struct lm_region *region, const sigset_t *signals_before)
{
    pthread_mutex_lock(&lm_engine.lock);
    while (region->tasks > 0 || region->calls > 0)
        (void)lm_engine_wait_locked(signals_before, NULL);
    pthread_mutex_unlock(&lm_engine.lock);
}

void lm_region_close(lm_region *region)
{
    LM_HOLD_SIGNALS;

    if (!begin_close(region, &lm_signals_before))
        return;
    wait_until_idle(region, &lm_signals_before);
    pthread_mutex_lock(&lm_engine.lifecycle);
    /* A resolver may hold a message that it read long ago, and make work of it until it is released. */
    while (!lm_engine_release_idle(region)) {
        pthread_mutex_unlock(&lm_engine.lifecycle);
        wait_until_idle(region, &lm_signals_before);
        pthread_mutex_lock(&lm_engine.lifecycle);
    }
    forget_traps(region);
    lm_places_release(region); /* before it is removed: its faults would look like somebody's */
    if (region->pages != NULL)
        lm_engine_remove(region);
    give_back(region);
    pthread_mutex_lock(&lm_engine.lock);
    region->closed = true;
    pthread_cond_broadcast(&lm_engine.progress);
    pthread_mutex_unlock(&lm_engine.lock);
    if (region->pages != NULL)
        lm_engine_release_locked();
    pthread_mutex_unlock(&lm_engine.lifecycle);
}

void lm_region_free(lm_region *region)
{
    if (region == NULL)
        return;
    lm_region_close(region);
    lm_sys_free(region, region->memory);
}

int lm_region_seal(lm_region *region)
{
    int error = enter(region);

    if (error < 0)
        return error;
    return leave(region, region->writable ? 0 : lm_sys_protect(region->base, region->size, PROT_READ));
}

/* ---- look ---- */

void *lm_region_address(lm_region *region) { return region->base; }
uint64_t lm_region_size(lm_region *region) { return region->size; }
int lm_region_backend(lm_region *region) { return region->backend; }
int lm_region_install(lm_region *region) { return region->install; }

/* Fixed at open: allowed on a closed handle. */
uint64_t lm_region_chunk_count(lm_region *region)
{
    if (region->pages == NULL)
        return (region->size + LM_MAP_CHUNK - 1) / LM_MAP_CHUNK;
    return region->table.chunk_count;
}

uint64_t lm_region_chunk_size(lm_region *region)
{
    return region->pages == NULL ? LM_MAP_CHUNK
                                             : UINT64_C(1) << region->table.chunk_shift;
}

static int map_states(lm_region *region, uint64_t first, uint64_t count, uint8_t *ret_states)
{
    uint64_t i;

    for (i = 0; i < count; i++) {
        unsigned char resident = 0;
        int error = lm_sys_resident(region->base + (first + i) * LM_MAP_CHUNK, 1, &resident);

        if (error < 0)
            return error;
        ret_states[i] = (resident & 1) ? LM_STATE_PRESENT : LM_STATE_ABSENT;
    }
    return 0;
}

int lm_region_states(lm_region *region, uint64_t first, uint64_t count, uint8_t *ret_states)
{
    uint64_t chunks = lm_region_chunk_count(region), i;
    int error;

    if (first > chunks || count > chunks - first)
        return -EINVAL;
    error = enter(region);
    if (error < 0)
        return error;
    if (region->pages == NULL)
        return leave(region, map_states(region, first, count, ret_states));
    for (i = 0; i < count; i++)
        ret_states[i] = lm_table_record(&region->table, first + i) == NULL
                            ? LM_STATE_PRESENT
                            : lm_table_state(&region->table, first + i) & LM_TABLE_STATE;
    return leave(region, 0);
}

int lm_region_stats(lm_region *region, lm_stats *ret_stats)
{
    const struct lm_counters *from = &region->counters;
    int i, error = enter(region);

    if (error < 0)
        return error;

    *ret_stats = (lm_stats){
        .faults = atomic_load(&from->faults),
        .chunks_demand = atomic_load(&from->chunks_demand),
        .chunks_prefetch = atomic_load(&from->chunks_prefetch),
        .chunks_failed = atomic_load(&from->chunks_failed),
        .bytes_populated = atomic_load(&from->bytes_populated),
        .bytes_read = atomic_load(&from->bytes_read),
        .reads = atomic_load(&from->reads),
        .read_ns = atomic_load(&from->read_ns),
        .check_ns = atomic_load(&from->check_ns),
        .decode_ns = atomic_load(&from->decode_ns),
        .install_ns = atomic_load(&from->install_ns),
        .moved_chunks = atomic_load(&from->moved_chunks),
        .last_read_ns = atomic_load(&from->last_read_ns),
        .last_begun_ns = atomic_load(&from->last_begun_ns),
        .last_installed_ns = atomic_load(&from->last_installed_ns),
    };
    for (i = 0; i < LM_LATENCY_BUCKETS; i++)
        ret_stats->latency[i] = atomic_load(&from->latency[i]);
    return leave(region, 0);
}

uint64_t lm_region_array_end(const struct lm_region *region, uint64_t chunk)
{
    uint64_t start = chunk << region->table.chunk_shift;
    uint64_t size = UINT64_C(1) << region->table.chunk_shift;
    uint64_t array = lm_report_find_array(region, start, start + size);

    if (region->array_count == 0)
        return region->table.chunk_count;
    if (array == region->array_count)
        return chunk + 1;
    return (region->array_offsets[array] + region->array_lengths[array] + size - 1) >>
           region->table.chunk_shift;
}

/* ---- ask and wait ---- */

static int map_prefetch(lm_region *region, uint64_t first, uint64_t count)
{
    uint64_t start = first * LM_MAP_CHUNK, end = (first + count) * LM_MAP_CHUNK;

    if (count == 0)
        return 0;
    return lm_sys_advise(region->base + start, (end < region->size ? end : region->size) - start,
                         MADV_WILLNEED);
}

static void reset_chunk_locked(struct lm_region *region, uint64_t chunk)
{
    bool poisoned = lm_table_state(&region->table, chunk) == LM_STATE_POISONED;

    lm_table_reset(&region->table, chunk);
    /* Nobody populates zeros ahead of need, so nothing else would take the poison away. */
    if (poisoned && region->pages == &lm_pages_uffd && lm_table_record(&region->table, chunk) == NULL)
        (void)lm_places_evict_locked(region, chunk);
}

/* What failed is asked for again, and so may heal. */
static void reset_failed_locked(struct lm_region *region, uint64_t first, uint64_t end)
{
    uint64_t i;

    if (region->error_count > LM_ERROR_SLOTS) { /* more than are remembered: look everywhere */
        for (i = first; i < end; i++)
            reset_chunk_locked(region, i);
        return;
    }
    for (i = 0; i < region->error_count; i++)
        if (region->errors[i].chunk >= first && region->errors[i].chunk < end)
            reset_chunk_locked(region, region->errors[i].chunk);
}

/* Together, so that whoever takes from the queue begins with the first. */
static int queue_spans(struct lm_region *region, const lm_chunk_span *spans, int count, bool urgent)
{
    LM_HOLD_SIGNALS;
    int room, error, i;

    pthread_mutex_lock(&lm_engine.lifecycle);
    error = lm_engine_threads_locked();
    if (region->pages == &lm_pages_trap)
        (void)lm_trap_install(); /* somebody may have put a handler over ours */
    pthread_mutex_unlock(&lm_engine.lifecycle);
    if (error < 0)
        return error;
    pthread_mutex_lock(&lm_engine.lock);
    room = lm_engine_span_room_locked(region);
    if (region->closing)
        error = LM_E_CLOSED;
    else if (count > room)
        count = room;
    for (i = 0; i < count && error == 0; i++) {
        const lm_chunk_span *given = &spans[urgent ? count - 1 - i : i]; /* each goes before the others */
        struct lm_span span = { .region = region, .next = given->first, .end = given->first + given->count };

        if (given->count == 0)
            continue;
        (void)lm_engine_push_span_locked(&span, urgent);
        reset_failed_locked(region, span.next, span.end);
    }
    pthread_mutex_unlock(&lm_engine.lock);
    return error < 0 ? error : count;
}

int lm_region_prefetch_spans(lm_region *region, const lm_chunk_span *spans, int count, int urgent)
{
    uint64_t chunks = lm_region_chunk_count(region);
    int i, error;

    for (i = 0; i < count; i++)
        if (spans[i].first > chunks || spans[i].count > chunks - spans[i].first)
            return -EINVAL;
    error = enter_memory(region);
    if (error < 0)
        return error;
    if (region->pages != NULL)
        return leave(region, count == 0 ? 0 : queue_spans(region, spans, count, urgent != 0));
    for (i = 0; i < count && error == 0; i++)
        error = map_prefetch(region, spans[i].first, spans[i].count);
    return leave(region, error < 0 ? error : count);
}

int lm_region_prefetch(lm_region *region, uint64_t first, uint64_t count, int urgent)
{
    lm_chunk_span span = { .first = first, .count = count };
    int queued = lm_region_prefetch_spans(region, &span, 1, urgent);

    return queued < 0 ? queued : queued == 1 ? 0 : LM_E_FULL;
}

void lm_region_record_error_locked(struct lm_region *region, uint64_t chunk, int code, const char *text)
{
    unsigned slot = region->error_count++ % LM_ERROR_SLOTS;
    size_t length = text == NULL ? 0 : strnlen(text, LM_ERROR_TEXT - 1);

    region->errors[slot].chunk = chunk;
    region->errors[slot].code = code;
    memcpy(region->errors[slot].text, text == NULL ? "" : text, length);
    region->errors[slot].text[length] = '\0';
}

/* The slot of a chunk's last error; -1: it failed, but so did many since. */
static int find_slot_locked(const struct lm_region *region, uint64_t chunk)
{
    unsigned kept = region->error_count < LM_ERROR_SLOTS ? region->error_count : LM_ERROR_SLOTS;
    unsigned i;

    for (i = 1; i <= kept; i++) {
        unsigned slot = (region->error_count - i) % LM_ERROR_SLOTS;

        if (region->errors[slot].chunk == chunk)
            return (int)slot;
    }
    return -1;
}

static int find_error_locked(const struct lm_region *region, uint64_t chunk)
{
    int slot = find_slot_locked(region, chunk);

    return slot < 0 || region->errors[slot].code == 0 ? -EIO : region->errors[slot].code;
}

int lm_region_error_text(lm_region *region, uint64_t chunk, char *out, size_t length)
{
    LM_HOLD_SIGNALS;
    int slot, error = length == 0 ? -EINVAL : enter(region);
    size_t copied = 0;

    if (error < 0)
        return error;
    pthread_mutex_lock(&lm_engine.lock);
    slot = find_slot_locked(region, chunk);
    if (slot >= 0) {
        copied = strnlen(region->errors[slot].text, length - 1);
        memcpy(out, region->errors[slot].text, copied);
    }
    pthread_mutex_unlock(&lm_engine.lock);
    out[copied] = '\0';
    return leave(region, 0);
}

/* 1: all there. 0: not yet. Negative: a chunk failed. */
static int scan_locked(lm_region *region, uint64_t end, uint64_t *cursor, uint64_t *ret_chunk)
{
    while (*cursor < end) {
        const lm_run *run = lm_table_run(&region->table, *cursor);
        uint8_t state = lm_table_state(&region->table, *cursor);

        if (run->first_record == LM_ZERO_RUN) {
            *cursor = run->first_chunk + run->count;
        } else if (state == LM_STATE_PRESENT) {
            ++*cursor;
        } else if (state == LM_STATE_FAILED || state == LM_STATE_POISONED) {
            *ret_chunk = *cursor;
            return find_error_locked(region, *cursor);
        } else {
            return 0;
        }
    }
    return 1;
}

static int map_wait(lm_region *region, uint64_t end, int timeout_ms, uint64_t *cursor,
                    uint64_t *ret_chunk)
{
    uint64_t until = lm_sys_now_ns() + (uint64_t)timeout_ms * 1000000u;

    while (*cursor < end) {
        uint64_t start = *cursor * LM_MAP_CHUNK, left = region->size - start;
        int error = lm_sys_advise(region->base + start, left < LM_MAP_CHUNK ? left : LM_MAP_CHUNK,
                                  MADV_POPULATE_READ);

        if (error == -EFAULT || error == -EHWPOISON) { /* where a touch would raise SIGBUS */
            *ret_chunk = *cursor;
            return error == -EFAULT && region->backend == LM_BACKEND_MAP ? LM_E_SHORT : -EIO;
        }
        /* Other refusals (EINVAL before Linux 5.14): pages come on touch, as with any mapping. */
        ++*cursor;
        if (lm_sys_now_ns() > until)
            return *cursor >= end;
    }
    return 1;
}

int lm_region_wait(lm_region *region, uint64_t first, uint64_t count, int timeout_ms,
                   uint64_t *cursor, uint64_t *ret_chunk)
{
    LM_HOLD_SIGNALS;
    uint64_t chunks = lm_region_chunk_count(region);
    struct timespec deadline;
    int result, late = 0, error;

    if (first > chunks || count > chunks - first || *cursor < first)
        return -EINVAL;
    error = enter_memory(region);
    if (error < 0)
        return error;
    if (region->pages == NULL)
        return leave(region, map_wait(region, first + count, timeout_ms, cursor, ret_chunk));
    lm_sys_deadline(timeout_ms, &deadline);
    pthread_mutex_lock(&lm_engine.lock);
    for (;;) {
        result = region->closing              ? LM_E_CLOSED
                 : atomic_load(&region->lost) ? LM_E_LOST
                                              : scan_locked(region, first + count, cursor, ret_chunk);
        if (result != 0 || late != 0)
            break;
        late = lm_engine_wait_locked(&lm_signals_before, &deadline);
    }
    pthread_mutex_unlock(&lm_engine.lock);
    return leave(region, result);
}

/* Signals: a handler that touched the chunk meanwhile would wait for this thread. */
static void evict_chunk(struct lm_region *region, uint64_t chunk)
{
    LM_HOLD_SIGNALS;
    int error;

    if (lm_table_record(&region->table, chunk) == NULL || !lm_table_evict(&region->table, chunk))
        return;
    error = region->pages->evict(region, chunk); /* memory that the application has locked stays */
    lm_table_publish(&region->table, chunk, error < 0 ? LM_STATE_PRESENT : LM_STATE_ABSENT);
    /* Whoever touched it meanwhile was told to wait for its owner. */
    region->pages->wake(region, chunk, false);
}

/* What was asked for before is not wanted any more. */
static void cut_spans(struct lm_region *region, uint64_t first, uint64_t end)
{
    LM_HOLD_SIGNALS;

    pthread_mutex_lock(&lm_engine.lock);
    lm_engine_cut_spans_locked(region, first, end);
    pthread_mutex_unlock(&lm_engine.lock);
}

int lm_region_evict(lm_region *region, uint64_t first, uint64_t count)
{
    uint64_t chunks = lm_region_chunk_count(region), start, i;
    int error;

    if (first > chunks || count > chunks - first)
        return -EINVAL;
    error = enter_memory(region);
    if (error < 0 || region->backend == LM_BACKEND_EAGER || count == 0)
        return error < 0 ? error : leave(region, 0);
    if (region->pages == NULL) {
        start = first * LM_MAP_CHUNK;
        i = (first + count) * LM_MAP_CHUNK;
        return leave(region, lm_sys_advise(region->base + start, (i < region->size ? i : region->size) - start,
                                           MADV_DONTNEED));
    }
    cut_spans(region, first, first + count);
    for (i = first; i < first + count; i++)
        evict_chunk(region, i);
    return leave(region, 0);
}

/* For a call that touches these bytes; whoever gets in calls leave_as. */
static int enter_bytes(struct lm_region *region, uint64_t offset, size_t length)
{
    int error;

    if (offset > region->size || length > region->size - offset)
        return -EINVAL;
    error = enter_memory_as(region, true);
    if (error == 0 && !lm_places_are_home(region, offset, length))
        error = leave_as(region, true, LM_E_MOVED);
    return error;
}

int lm_region_read(lm_region *region, uint64_t offset, void *out, size_t length)
{
    int error = enter_bytes(region, offset, length);

    if (error < 0)
        return error;
    memcpy(out, region->base + offset, length);
    return leave_as(region, true, 0);
}

int lm_region_touch(lm_region *region, uint64_t offset, size_t length)
{
    size_t page = lm_sys_page_size(), at;
    int error = enter_bytes(region, offset, length);

    if (error < 0)
        return error;
    for (at = 0; at < length; at += page - ((offset + at) & (page - 1)))
        (void)*(volatile unsigned char *)(region->base + offset + at);
    return leave_as(region, true, 0);
}
