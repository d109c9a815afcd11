/* SPDX-License-Identifier: Apache-2.0 */
#include "ledger.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "engine.h"
#include "pager_protocol.h"
#include "sys.h"

#define LM_LEDGER_MAGIC UINT64_C(0x3172656764654c4d) /* "MLedger1" */
#define LM_LEDGER_MESSAGES 256 /* at least, and one for each part: so beginning anew costs little per event */

struct lm_ledger_head {
    _Atomic uint64_t magic;
    uint64_t begun_ns;
    struct lm_ledger_facts facts;
    uint64_t parts, capacity;
    _Atomic uint64_t length, applied;
};

static size_t size_of(uint64_t parts, uint64_t capacity)
{
    return sizeof(struct lm_ledger_head) + parts * sizeof(lm_space_part) + capacity * sizeof(struct lm_uffd_message);
}

/* ---- writing ---- */

lm_space_part lm_ledger_part(const struct lm_space_piece *piece, uint64_t region)
{
    return (lm_space_part){ .address = piece->at,
                            .length = piece->length,
                            .offset = piece->offset,
                            .region = region,
                            .page = piece->page,
                            .flags = (piece->show == LM_SHOW_SHARED ? LM_PAGER_SHARED : 0) |
                                     (piece->show == LM_SHOW_ZERO ? LM_PAGER_IS_ZERO : 0) |
                                     (piece->forgets ? LM_PAGER_REMOVED_ZERO : 0) };
}

int lm_ledger_begin(struct lm_ledger *ledger, const struct lm_ledger_facts *facts,
                    const struct lm_space_table *table)
{
    uint64_t capacity = LM_LEDGER_MESSAGES + table->count, i;
    struct lm_ledger fresh = { .fd = lm_sys_shared_memory(size_of(table->count, capacity)) };
    lm_space_part *parts;
    void *memory;
    int error = fresh.fd < 0 ? fresh.fd : lm_sys_mark(fresh.fd, LM_MARK_KEPT);

    /* All of it now: what the kernel tells must not be lost for want of memory. */
    if (error == 0)
        error = lm_sys_provide(fresh.fd, size_of(table->count, capacity));
    if (error == 0)
        error = lm_sys_map_shared(fresh.fd, size_of(table->count, capacity), &memory);
    if (error < 0) {
        if (fresh.fd >= 0)
            lm_sys_close(fresh.fd);
        lm_ledger_end(ledger); /* it would go out of date */
        return error;
    }
    fresh.head = memory;
    parts = (lm_space_part *)(fresh.head + 1);
    fresh.messages = (struct lm_uffd_message *)(parts + table->count);
    for (i = 0; i < table->count; i++)
        parts[i] = lm_ledger_part(&table->pieces[i], table->pieces[i].region->serial);
    fresh.head->begun_ns = lm_sys_now_ns();
    fresh.head->facts = *facts;
    fresh.head->parts = table->count;
    fresh.head->capacity = capacity;
    atomic_store(&fresh.head->magic, LM_LEDGER_MAGIC);
    lm_ledger_end(ledger);
    *ledger = fresh;
    return 0;
}

void lm_ledger_end(struct lm_ledger *ledger)
{
    if (ledger->head != NULL) {
        atomic_store(&ledger->head->magic, 0);
        lm_sys_free(ledger->head, size_of(ledger->head->parts, ledger->head->capacity));
        lm_sys_close(ledger->fd);
    }
    *ledger = (struct lm_ledger){ 0 };
}

struct lm_uffd_message *lm_ledger_room(struct lm_ledger *ledger)
{
    if (ledger->head == NULL || ledger->head->capacity - ledger->head->length < LM_LEDGER_BATCH)
        return NULL;
    return ledger->messages + ledger->head->length;
}

void lm_ledger_count(struct lm_ledger *ledger, int count)
{
    atomic_fetch_add(&ledger->head->length, (uint64_t)count);
}

void lm_ledger_discard(struct lm_ledger *ledger, int count)
{
    memset(ledger->messages + ledger->head->length, 0, (size_t)count * sizeof *ledger->messages);
}

void lm_ledger_apply(struct lm_ledger *ledger)
{
    atomic_fetch_add(&ledger->head->applied, 1);
}

/* ---- reading ---- */

int lm_ledger_note(struct lm_space_table *table, const struct lm_uffd_message *event, bool *ret_confused)
{
    *ret_confused = false;
    switch (event->event) {
    case LM_UFFD_EVENT_REMAP: return lm_space_move(table, event->from, event->to, event->length, ret_confused);
    case LM_UFFD_EVENT_REMOVE: return lm_space_remove(table, event->start, event->end);
    case LM_UFFD_EVENT_UNMAP: return lm_space_unmap(table, event->start, event->end);
    default: return 0;
    }
}

/* Whether it is a ledger, and whole. */
static bool is_sound(const struct lm_ledger_head *head, uint64_t size)
{
    return size >= sizeof *head && head->magic == LM_LEDGER_MAGIC && head->parts <= LM_SPACE_PIECES &&
           head->capacity == LM_LEDGER_MESSAGES + head->parts && size == size_of(head->parts, head->capacity) &&
           head->length <= head->capacity && head->applied <= head->capacity;
}

/* Regions are no more than numbers here, which space.c compares. */
static int first_table(const struct lm_ledger_head *head, struct lm_space_table *ret_table)
{
    const lm_space_part *part = (const lm_space_part *)(head + 1), *end = part + head->parts;
    int error = 0;

    for (; part < end && error == 0; part++) {
        struct lm_space_piece piece = { .at = part->address,
                                        .length = part->length,
                                        .offset = part->offset,
                                        .region = (struct lm_region *)(uintptr_t)part->region,
                                        .page = part->page,
                                        .show = part->flags & LM_PAGER_IS_ZERO ? LM_SHOW_ZERO
                                                : part->flags & LM_PAGER_SHARED ? LM_SHOW_SHARED
                                                                                : LM_SHOW_COPY,
                                        .forgets = (part->flags & LM_PAGER_REMOVED_ZERO) != 0 };

        if (piece.length == 0 || piece.at > UINT64_MAX - piece.length)
            return -EBADMSG;
        error = lm_space_add(ret_table, &piece);
    }
    return error;
}

/* Do what the messages say, up to the `child`th of those that tell of one and were not applied; 0: all. */
static int replay(const struct lm_ledger_head *head, uint32_t child, lm_ledger_report *out,
                  struct lm_space_table *table)
{
    const lm_space_part *parts = (const lm_space_part *)(head + 1);
    const struct lm_uffd_message *messages = (const struct lm_uffd_message *)(parts + head->parts);
    uint64_t i;
    int error = 0;

    for (i = 0; i < head->capacity && messages[i].event != 0 && error == 0; i++) {
        bool confused = false;

        if (messages[i].event == LM_UFFD_EVENT_FORK && i >= head->applied && child > 0 && --child == 0) {
            out->uffd = (int32_t)messages[i].child;
            out->parent = out->space;
            out->space = 0;
            out->inode = 0;
            out->features |= LM_SPACE_LEFT;
            return 0;
        }
        error = lm_ledger_note(table, &messages[i], &confused);
        if (confused)
            out->features |= LM_SPACE_DISBELIEVED;
    }
    return error < 0 ? error : child > 0 ? -ENOENT : 0;
}

int64_t lm_ledger_read(const void *bytes, uint64_t size, uint32_t child, lm_ledger_report *out, lm_space_part *parts,
                       uint64_t capacity)
{
    const struct lm_ledger_head *head = bytes;
    struct lm_space_table table = { 0 };
    int64_t result;
    size_t i;

    if (!is_sound(head, size))
        return -EBADMSG;
    *out = (lm_ledger_report){ .space = head->facts.space,
                               .parent = head->facts.parent,
                               .features = head->facts.features,
                               .uffd = -1,
                               .inode = head->facts.inode,
                               .begun_ns = head->begun_ns };
    result = first_table(head, &table);
    if (result == 0)
        result = replay(head, child, out, &table);
    if (result == 0) {
        result = (int64_t)table.count;
        for (i = 0; i < table.count && i < capacity; i++)
            parts[i] = lm_ledger_part(&table.pieces[i], (uintptr_t)table.pieces[i].region);
    }
    lm_space_clear(&table);
    return result;
}

int lm_ledger_settle(int fd)
{
    struct lm_ledger_head head;
    int error = lm_sys_pread_full(fd, &head, sizeof head, 0);

    return error != 0 ? error
                      : lm_sys_pwrite_full(fd, &head.capacity, sizeof head.capacity,
                                           offsetof(struct lm_ledger_head, applied));
}

/* ---- the twin ---- */

/* Of what is known of a client with a connection: that it may come to the next pager soon. */
static bool awaits_a_client(int fd)
{
    struct lm_ledger_head head;

    return lm_sys_pread_full(fd, &head, sizeof head, 0) == 0 && head.magic == LM_LEDGER_MAGIC &&
           !(head.facts.features & LM_SPACE_LEFT);
}

/* Userfaultfds of children: nobody else has them. A client with a connection has its own, and hears that the pager is
 * dead when its sockets are closed. */
static enum lm_worth worth_of(int fd)
{
    enum lm_mark mark = lm_sys_mark_of(fd);

    if (lm_uffd_is_one(fd))
        return mark == LM_MARK_CLIENTS || lm_uffd_is_over(fd) ? LM_WORTH_NOTHING : LM_WORTH_WAITING;
    if (mark != LM_MARK_KEPT)
        return LM_WORTH_NOTHING;
    return awaits_a_client(fd) ? LM_WORTH_A_MINUTE : LM_WORTH_KEEPING;
}

int lm_pager_start_twin(void)
{
    return lm_sys_start_twin(worth_of);
}

int lm_pager_bequeath(int fd)
{
    return lm_sys_mark(fd, LM_MARK_KEPT);
}
