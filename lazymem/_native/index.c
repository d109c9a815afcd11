/* SPDX-License-Identifier: Apache-2.0
 *
 * index.c: the rules of the tables RUNS, CHNK, ARRS, SHAP and EXTN (format/FORMAT.md), which are looked at
 * whenever a snapshot is opened. Pure functions on plain memory. Every number is hostile: each sum comes
 * after the comparison that keeps it from wrapping, each index after the one that keeps it inside.
 *
 * What they find is the end of a sentence whose beginning names file, section and row (format/tables.py).
 */
#include <stdbool.h>
#include <stddef.h>

#include "lazymem.h"

static const char *at(lm_index_fault *fault, uint64_t row, const char *what)
{
    fault->row = row;
    return what;
}

static const char *newer(lm_index_fault *fault, uint64_t row, const char *what)
{
    fault->is_newer = 1;
    return at(fault, row, what);
}

const char *lm_index_check_runs(const lm_run *runs, uint64_t count, uint64_t chunk_count, uint64_t record_count,
                                lm_index_fault *ret_fault)
{
    uint64_t chunks = 0, records = 0, i; /* of the runs so far */

    for (i = 0; i < count; i++) {
        const lm_run *run = &runs[i];

        if (run->count < 1 || run->count > chunk_count - chunks)
            return at(ret_fault, i, "is of no chunks, or of more than there are");
        if (run->first_chunk != chunks)
            return at(ret_fault, i, "does not begin where the run before ended");
        chunks += run->count;
        if (run->first_record == LM_ZERO_RUN)
            continue;
        if (run->first_record != records)
            return at(ret_fault, i, "uses records out of order");
        if (run->count > record_count - records)
            return at(ret_fault, i, "uses more records than section CHNK has");
        records += run->count;
    }
    if (chunks != chunk_count)
        return at(ret_fault, LM_INDEX_WHOLE, "covers fewer chunks than the content has");
    if (records != record_count)
        return at(ret_fault, LM_INDEX_WHOLE, "uses fewer records than section CHNK has");
    return NULL;
}

static const char *check_record(const lm_chunk_record *record, uint64_t row, uint32_t length,
                                const uint64_t *ends, uint64_t source_count, lm_index_fault *fault)
{
    bool is_raw = record->codec == LM_CODEC_RAW, has_planes = record->filter != LM_FILTER_NONE;
    uint64_t end;

    if (record->codec > LM_CODEC_ZSTD)
        return newer(fault, row, "has an unknown codec");
    if (record->filter > LM_FILTER_FLOAT_PLANES)
        return newer(fault, row, "has an unknown filter");
    if (record->flags != 0)
        return at(fault, row, "has flags that no file may have");
    if (record->source >= source_count)
        return at(fault, row, "names a source that section SRCS lacks");
    if (record->reserved0 != 0 || record->reserved1 != 0)
        return at(fault, row, "has reserved bytes that are not zero");
    if (has_planes && record->width != 2 && record->width != 4 && record->width != 8)
        return at(fault, row, "has an impossible plane width");
    if (!has_planes && record->width != 0)
        return at(fault, row, "has a plane width but no planes");
    if (record->stored_length < 1 || record->stored_length > length)
        return at(fault, row, "has an impossible stored_length");
    if (is_raw && record->stored_length != length)
        return at(fault, row, "is raw but not of its chunk's length");
    if (is_raw && has_planes)
        return at(fault, row, "is raw but has byte planes");
    end = ends[record->source];
    if (record->offset < LM_INDEX_HEAD_SIZE || record->offset > end)
        return at(fault, row, "lies outside the file's chunks");
    if (record->stored_length > end - record->offset)
        return at(fault, row, "reaches beyond the file's chunks");
    return NULL;
}

const char *lm_index_check_records(const lm_chunk_record *records, uint64_t count, uint32_t chunk_size,
                                   uint32_t last_length, const uint64_t *ends, uint64_t source_count,
                                   int *ret_in_order, lm_index_fault *ret_fault)
{
    uint64_t reached[LM_INDEX_MAX_SOURCES] = { 0 }; /* in each source, by the records so far */
    const char *what;
    uint64_t i;

    if (source_count > LM_INDEX_MAX_SOURCES)
        return at(ret_fault, LM_INDEX_WHOLE, "has too many sources");
    *ret_in_order = 1;
    for (i = 0; i < count; i++) {
        const lm_chunk_record *record = &records[i];

        what = check_record(record, i, i == count - 1 ? last_length : chunk_size, ends, source_count, ret_fault);
        if (what != NULL)
            return what;
        if (record->offset < reached[record->source])
            *ret_in_order = 0;
        else
            reached[record->source] = record->offset + record->stored_length;
    }
    return NULL;
}

/* Whether nbytes is what the shape says, and no product of its lengths, empty arrays' too, is absurd. */
static bool is_size(const lm_array_row *array, const uint64_t *dims, uint64_t item_size)
{
    uint64_t size = item_size == 0 ? 1 : item_size;
    bool is_empty = item_size == 0;
    unsigned d;

    for (d = 0; d < array->ndim; d++) {
        is_empty = is_empty || dims[d] == 0;
        if (dims[d] != 0 && __builtin_mul_overflow(size, dims[d], &size))
            return false;
    }
    return size <= LM_INDEX_MAX_SIZE && array->nbytes == (is_empty ? 0 : size);
}

const char *lm_index_check_arrays(const lm_array_row *arrays, uint64_t count, const uint64_t *shapes,
                                  uint64_t shape_count, const uint64_t *item_sizes, uint64_t dtype_count,
                                  uint64_t name_bytes, uint64_t content_size, lm_index_fault *ret_fault)
{
    uint64_t names = 0, dims = 0, reached = 0, i; /* of the arrays so far */
    size_t r;

    for (i = 0; i < count; i++) {
        const lm_array_row *array = &arrays[i];

        if (array->dtype >= dtype_count)
            return at(ret_fault, i, "has a dtype that section DTYP lacks");
        if (array->ndim > LM_INDEX_MAX_NDIM)
            return at(ret_fault, i, "has too many dimensions");
        if (array->flags > LM_INDEX_ARRAY_FLAGS)
            return at(ret_fault, i, "has unknown flags");
        for (r = 0; r < sizeof array->reserved; r++)
            if (array->reserved[r] != 0)
                return at(ret_fault, i, "has reserved bytes that are not zero");
        if (array->name_length > LM_INDEX_MAX_NAME)
            return at(ret_fault, i, "has too long a name");
        if (array->name_offset != names || array->name_length > name_bytes - names)
            return at(ret_fault, i, "does not follow the row before in section NAME");
        if (array->shape_offset != dims || array->ndim > shape_count - dims)
            return at(ret_fault, i, "does not follow the row before in section SHAP");
        if (array->offset > content_size)
            return at(ret_fault, i, "begins beyond the content");
        if (array->nbytes > content_size - array->offset)
            return at(ret_fault, i, "reaches beyond the content");
        if (array->offset < reached)
            return at(ret_fault, i, "begins before the array before it ends");
        if (!is_size(array, shapes + dims, item_sizes[array->dtype]))
            return at(ret_fault, i, "has nbytes that are not shape times item size");
        names += array->name_length;
        dims += array->ndim;
        reached = array->offset + array->nbytes;
    }
    if (names != name_bytes)
        return at(ret_fault, LM_INDEX_WHOLE, "does not use all of section NAME");
    if (dims != shape_count)
        return at(ret_fault, LM_INDEX_WHOLE, "does not use all of section SHAP");
    return NULL;
}

/* ---- extents and deflated members, which share the bytes of files ---- */

struct covered { /* what is covered of the file that is being gone through */
    const uint64_t *sizes;
    bool is_exact;
    uint64_t file;
    uint64_t reached;
};

/* Leave the present file, and all up to `file`. */
static const char *go_to(struct covered *covered, uint64_t file, uint64_t row, lm_index_fault *fault)
{
    for (; covered->file < file; covered->file++, covered->reached = 0)
        if (covered->is_exact && covered->reached != covered->sizes[covered->file])
            return at(fault, row, "leaves bytes of a file uncovered");
    return NULL;
}

static const char *cover(struct covered *covered, const lm_extent_row *next, uint64_t row, lm_index_fault *fault)
{
    const char *what = go_to(covered, next->file, row, fault);

    if (what != NULL)
        return what;
    if (next->file_offset < covered->reached)
        return at(fault, row, "has extents of one file that overlap");
    if (covered->is_exact && next->file_offset != covered->reached)
        return at(fault, row, "leaves bytes of a file uncovered");
    covered->reached = next->file_offset + next->length;
    return NULL;
}

static const char *check_extent(const lm_extent_row *extent, const lm_extent_row *before, uint64_t row,
                                const uint64_t *sizes, uint64_t file_count, uint64_t content_size,
                                lm_index_fault *fault)
{
    if (extent->reserved != 0)
        return at(fault, row, "has reserved bytes that are not zero");
    if (extent->file >= file_count)
        return at(fault, row, "is of a file that section CONT lacks");
    if (extent->content_offset > content_size || extent->length > content_size - extent->content_offset)
        return at(fault, row, "reaches beyond the content");
    if (extent->file_offset > sizes[extent->file] ||
        extent->length > sizes[extent->file] - extent->file_offset)
        return at(fault, row, "reaches beyond the end of its file");
    if (before != NULL && (extent->file < before->file ||
                           (extent->file == before->file && extent->file_offset <= before->file_offset)))
        return at(fault, row, "is not sorted by file and file_offset");
    return NULL;
}

static bool is_before(const lm_extent_row *member, const lm_extent_row *extent)
{
    if (member->file != extent->file)
        return member->file < extent->file;
    if (member->file_offset != extent->file_offset)
        return member->file_offset < extent->file_offset;
    return member->length < extent->length;
}

const char *lm_index_check_extents(const lm_extent_row *extents, uint64_t count, const lm_extent_row *members,
                                   uint64_t member_count, const uint64_t *sizes, uint64_t file_count,
                                   uint64_t content_size, int is_exact, lm_index_fault *ret_fault)
{
    struct covered covered = { .sizes = sizes, .is_exact = is_exact != 0 };
    const char *what = NULL;
    uint64_t i, m = 0;

    for (i = 0; i < count && what == NULL; i++)
        what = check_extent(&extents[i], i == 0 ? NULL : &extents[i - 1], i, sizes, file_count, content_size,
                            ret_fault);
    for (i = 0; (i < count || m < member_count) && what == NULL;) {
        if (m < member_count && (i == count || is_before(&members[m], &extents[i]))) {
            what = cover(&covered, &members[m], LM_INDEX_WHOLE, ret_fault);
            m++;
        } else {
            what = cover(&covered, &extents[i], i, ret_fault);
            i++;
        }
    }
    return what != NULL ? what : go_to(&covered, file_count, LM_INDEX_WHOLE, ret_fault);
}
