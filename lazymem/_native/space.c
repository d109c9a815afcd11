/* SPDX-License-Identifier: Apache-2.0 */
#include "space.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void lm_space_clear(struct lm_space_table *table)
{
    free(table->pieces);
    *table = (struct lm_space_table){ 0 };
}

size_t lm_space_after(const struct lm_space_table *table, uint64_t address)
{
    size_t low = 0, high = table->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct lm_space_piece *piece = &table->pieces[middle];

        if (piece->at + piece->length <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const struct lm_space_piece *lm_space_find(const struct lm_space_table *table, uint64_t address)
{
    size_t index = lm_space_after(table, address);

    return index < table->count && table->pieces[index].at <= address ? &table->pieces[index] : NULL;
}

static int make_room(struct lm_space_table *table, size_t wanted)
{
    size_t capacity = table->capacity == 0 ? 16 : table->capacity;
    void *memory;

    if (wanted > LM_SPACE_PIECES)
        return -E2BIG;
    while (capacity < wanted)
        capacity *= 2;
    if (capacity == table->capacity)
        return 0;
    memory = realloc(table->pieces, capacity * sizeof *table->pieces);
    if (memory == NULL)
        return -ENOMEM;
    table->pieces = memory;
    table->capacity = capacity;
    return 0;
}

/* Put `count` pieces in the place of those with index [first, end). */
static int splice(struct lm_space_table *table, size_t first, size_t end, const struct lm_space_piece *pieces,
                  size_t count)
{
    int error = make_room(table, table->count - (end - first) + count);

    if (error < 0)
        return error;
    memmove(&table->pieces[first + count], &table->pieces[end], (table->count - end) * sizeof *pieces);
    if (count > 0)
        memcpy(&table->pieces[first], pieces, count * sizeof *pieces);
    table->count = table->count - (end - first) + count;
    return 0;
}

int lm_space_add(struct lm_space_table *table, const struct lm_space_piece *piece)
{
    size_t index = lm_space_after(table, piece->at);

    if (index < table->count && table->pieces[index].at < piece->at + piece->length)
        return -EEXIST;
    return splice(table, index, index, piece, 1);
}

/* The part of a piece at addresses [start, end). */
static struct lm_space_piece part_of(const struct lm_space_piece *piece, uint64_t start, uint64_t end)
{
    struct lm_space_piece part = *piece;
    uint64_t last = piece->at + piece->length < end ? piece->at + piece->length : end;

    part.at = piece->at > start ? piece->at : start;
    part.offset += part.at - piece->at;
    part.length = last - part.at;
    return part;
}

static bool goes_on(const struct lm_space_piece *piece, const struct lm_space_piece *next)
{
    return piece->at + piece->length == next->at && piece->offset + piece->length == next->offset &&
           piece->region == next->region && piece->page == next->page && piece->show == next->show &&
           piece->forgets == next->forgets;
}

static size_t append(struct lm_space_piece *pieces, size_t count, struct lm_space_piece piece)
{
    if (piece.length == 0)
        return count;
    if (count > 0 && goes_on(&pieces[count - 1], &piece)) {
        pieces[count - 1].length += piece.length;
        return count;
    }
    pieces[count] = piece;
    return count + 1;
}

/* Change what lies at [start, end): gone, or zeros. */
static int change(struct lm_space_table *table, uint64_t start, uint64_t end, bool unmapped)
{
    size_t first = lm_space_after(table, start), last = first, count = 0, i;
    struct lm_space_piece *changed;
    int error;

    while (last < table->count && table->pieces[last].at < end)
        last++;
    if (first == last)
        return 0;
    if (unmapped && table->pieces[first].at >= start &&
        table->pieces[last - 1].at + table->pieces[last - 1].length <= end)
        return splice(table, first, last, NULL, 0); /* whole pieces: that cannot fail */
    if (first > 0)
        first--; /* the neighbours: what is zeros on both sides becomes one piece */
    if (last < table->count)
        last++;
    changed = malloc((last - first) * 3 * sizeof *changed);
    if (changed == NULL)
        return -ENOMEM;
    for (i = first; i < last; i++) {
        const struct lm_space_piece *piece = &table->pieces[i];

        if (piece->at >= end || piece->at + piece->length <= start) {
            count = append(changed, count, *piece);
            continue;
        }
        if (piece->at < start)
            count = append(changed, count, part_of(piece, piece->at, start));
        if (!unmapped) {
            struct lm_space_piece part = part_of(piece, start, end);

            if (part.forgets)
                part.show = LM_SHOW_ZERO;
            count = append(changed, count, part);
        }
        if (piece->at + piece->length > end)
            count = append(changed, count, part_of(piece, end, UINT64_MAX));
    }
    error = splice(table, first, last, changed, count);
    free(changed);
    return error;
}

int lm_space_unmap(struct lm_space_table *table, uint64_t start, uint64_t end)
{
    return change(table, start, end, true);
}

int lm_space_remove(struct lm_space_table *table, uint64_t start, uint64_t end)
{
    return change(table, start, end, false);
}

int lm_space_move(struct lm_space_table *table, uint64_t from, uint64_t to, uint64_t length, bool *ret_confused)
{
    size_t first = lm_space_after(table, from), last = first, i;
    struct lm_space_table changed = { 0 };
    struct lm_space_piece *moved;
    int error = 0;

    *ret_confused = false;
    while (last < table->count && table->pieces[last].at < from + length)
        last++;
    moved = malloc((last - first + 1) * sizeof *moved);
    if (moved == NULL)
        return -ENOMEM;
    for (i = first; i < last; i++) {
        moved[i - first] = part_of(&table->pieces[i], from, from + length);
        moved[i - first].at += to - from;
    }
    error = lm_space_copy(&changed, table); /* all of it or nothing */
    if (error == 0)
        error = lm_space_unmap(&changed, from, from + length);
    if (error == 0) {
        size_t at = lm_space_after(&changed, to);

        *ret_confused = at < changed.count && changed.pieces[at].at < to + length;
        if (*ret_confused)
            error = lm_space_unmap(&changed, to, to + length);
        for (i = first; i < last && error == 0 && !*ret_confused; i++)
            error = lm_space_add(&changed, &moved[i - first]);
    }
    free(moved);
    if (error < 0) {
        lm_space_clear(&changed);
        return error;
    }
    lm_space_clear(table);
    *table = changed;
    return 0;
}

int lm_space_copy(struct lm_space_table *into, const struct lm_space_table *from)
{
    struct lm_space_table copy = { 0 };
    int error = make_room(&copy, from->count);

    if (error < 0)
        return error;
    if (from->count > 0)
        memcpy(copy.pieces, from->pieces, from->count * sizeof *copy.pieces);
    copy.count = from->count;
    *into = copy;
    return 0;
}
