/* SPDX-License-Identifier: Apache-2.0 */
#include "pieces.h"

static const struct lm_piece_table *in_force(const struct lm_pieces *pieces)
{
    return &pieces->tables[atomic_load(&pieces->current)];
}

static struct lm_piece_table *next_table(struct lm_pieces *pieces)
{
    struct lm_piece_table *next = &pieces->tables[1 - atomic_load(&pieces->current)];

    next->count = 0;
    return next;
}

static void put_in_force(struct lm_pieces *pieces)
{
    atomic_store(&pieces->current, 1 - atomic_load(&pieces->current));
}

static uintptr_t end_of(const struct lm_piece *piece)
{
    return piece->at + piece->length;
}

/* Pieces come sorted; neighbours in memory that are neighbours in the region, too, become one. */
static bool append(struct lm_piece_table *table, struct lm_piece piece)
{
    struct lm_piece *last = table->count == 0 ? NULL : &table->piece[table->count - 1];

    if (piece.length == 0)
        return true;
    if (last != NULL && end_of(last) == piece.at && last->offset + last->length == piece.offset) {
        last->length += piece.length;
        return true;
    }
    if (table->count == LM_PIECES)
        return false;
    table->piece[table->count++] = piece;
    return true;
}

void lm_pieces_init(struct lm_pieces *pieces, uintptr_t at, uint64_t length)
{
    pieces->tables[0].piece[0] = (struct lm_piece){ .at = at, .length = length };
    pieces->tables[0].count = 1;
    atomic_store(&pieces->current, 0);
}

bool lm_pieces_find(const struct lm_pieces *pieces, uintptr_t address, uint64_t *ret_offset)
{
    struct lm_piece part;

    if (!lm_pieces_within(pieces, address, address + 1, &part))
        return false;
    *ret_offset = part.offset;
    return true;
}

bool lm_pieces_within(const struct lm_pieces *pieces, uintptr_t start, uintptr_t end, struct lm_piece *ret_part)
{
    const struct lm_piece_table *table = in_force(pieces);
    unsigned i;

    for (i = 0; i < table->count; i++) {
        const struct lm_piece *piece = &table->piece[i];
        uintptr_t from = piece->at > start ? piece->at : start;
        uintptr_t to = end_of(piece) < end ? end_of(piece) : end;

        if (from < to) {
            *ret_part = (struct lm_piece){ .at = from, .offset = piece->offset + (from - piece->at), .length = to - from };
            return true;
        }
    }
    return false;
}

bool lm_pieces_next(const struct lm_pieces *pieces, uint64_t offset, uint64_t length, uintptr_t from,
                    struct lm_piece *ret_part)
{
    const struct lm_piece_table *table = in_force(pieces);
    unsigned i;

    for (i = 0; i < table->count; i++) {
        const struct lm_piece *piece = &table->piece[i];
        uint64_t first = piece->offset > offset ? piece->offset : offset;
        uint64_t end = piece->offset + piece->length < offset + length ? piece->offset + piece->length : offset + length;
        uintptr_t at = piece->at + (first - piece->offset);

        if (first >= end)
            continue;
        if (at < from) {
            if (from - at >= end - first)
                continue;
            first += from - at;
            at = from;
        }
        *ret_part = (struct lm_piece){ .at = at, .offset = first, .length = end - first };
        return true;
    }
    return false;
}

void lm_pieces_remove(struct lm_pieces *pieces, uintptr_t start, uintptr_t end, struct lm_piece *ret_lost)
{
    const struct lm_piece_table *table = in_force(pieces);
    struct lm_piece_table *next;
    struct lm_piece part;
    unsigned i;

    *ret_lost = (struct lm_piece){ 0 };
    if (!lm_pieces_within(pieces, start, end, &part))
        return;
    next = next_table(pieces);
    for (i = 0; i < table->count; i++) {
        struct lm_piece before = table->piece[i], after = before;
        uint64_t gone;

        if (end_of(&before) <= start || before.at >= end) {
            (void)append(next, before);
            continue;
        }
        if (before.at < start) {
            before.length = start - before.at;
            (void)append(next, before);
        }
        if (end_of(&after) > end) {
            gone = end - after.at;
            after = (struct lm_piece){ .at = end, .offset = after.offset + gone, .length = after.length - gone };
            /* The last of a full table does not fit if this one was cut in two: at most one piece is lost. */
            if (table->count - i - 1 >= LM_PIECES - next->count || !append(next, after))
                *ret_lost = after;
        }
    }
    put_in_force(pieces);
}

bool lm_pieces_add(struct lm_pieces *pieces, const struct lm_piece *piece)
{
    const struct lm_piece_table *table = in_force(pieces);
    struct lm_piece_table *next = next_table(pieces);
    bool room = true;
    unsigned i;

    for (i = 0; i < table->count && table->piece[i].at < piece->at; i++)
        room = append(next, table->piece[i]) && room;
    room = append(next, *piece) && room;
    for (; i < table->count; i++)
        room = append(next, table->piece[i]) && room;
    if (room)
        put_in_force(pieces);
    return room;
}
