/* SPDX-License-Identifier: Apache-2.0
 *
 * report.c: the one line that a failed touch prints. Built on the stack and written with write(2): the
 * thread that is about to get SIGBUS may hold any lock of the C library or of Python.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"
#include "sys.h"

static const char *cause(int code, char *buffer, size_t length)
{
    switch (code) {
    case LM_E_SHORT: return "the file ends before the chunk does";
    case LM_E_CHECKSUM: return "the stored bytes do not match their checksum";
    case LM_E_DECODE: return "the stored bytes do not decode to the chunk's size";
    case LM_E_RECORD: return "the chunk's record is not valid";
    case LM_E_CODEC: return "the decoder for this chunk is not installed";
    case LM_E_STORE: return "the store did not deliver the bytes";
    case LM_E_GONE: return "nothing lies under the URL any more";
    case LM_E_DENIED: return "the store refuses access";
    case LM_E_CHANGED: return "it was replaced or written to after it was opened";
    case LM_E_LOST: return "its memory cannot be served any more";
    case -EBADF: return "the application has closed descriptors of lazymem";
    case LM_E_FETCHER: return "the fetcher does not answer";
    default:
        /* Not strerror: this one has no translation catalogue, hence no allocation. */
        snprintf(buffer, length, "errno %d (%s)", -code, strerrordesc_np(-code));
        return buffer;
    }
}

/* Of the stored bytes: then others may be damaged, too. */
static bool is_damage(int code)
{
    return code == LM_E_SHORT || code == LM_E_CHECKSUM || code == LM_E_DECODE || code == LM_E_RECORD;
}

/* One line, whatever a path or an array's name is made of: control characters become '?'. */
static void print(char *line, int length, size_t capacity)
{
    size_t end = (size_t)length < capacity ? (size_t)length : capacity - 1, i;

    for (i = 0; i + 1 < end; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    line[end - 1] = '\n';
    lm_sys_write_patiently(STDERR_FILENO, line, end);
}

uint64_t lm_report_find_array(const struct lm_region *region, uint64_t start, uint64_t end)
{
    uint64_t low = 0, high = region->array_count;

    /* The first array that ends after start: arrays are sorted and do not overlap. */
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (region->array_offsets[middle] + region->array_lengths[middle] <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low < region->array_count && region->array_offsets[low] < end ? low : region->array_count;
}

/* What the store said, without the URL that stands in the line already. */
static const char *without_url(const struct lm_region *region, const char *said)
{
    size_t length = strlen(region->url);

    return strncmp(said, region->url, length) == 0 && strncmp(said + length, ": ", 2) == 0 ? said + length + 2
                                                                                         : said;
}

void lm_report_failed_touch(const struct lm_region *region, uint64_t chunk, int code, const char *said)
{
    uint64_t start = chunk << region->table.chunk_shift;
    uint64_t end = start + lm_table_raw_length(&region->table, chunk);
    uint64_t array = lm_report_find_array(region, start, end);
    char line[4096], text[128], name[600] = "";
    int length;

    if (array < region->array_count) {
        uint32_t from = region->name_offsets[array], to = region->name_offsets[array + 1];

        snprintf(name, sizeof name, "array '%.*s', ", to - from > 512 ? 512 : (int)(to - from),
                 region->names + from);
    }
    length = snprintf(line, sizeof line,
                      "lazymem: SIGBUS follows: touched memory cannot be filled: %.2048s: chunk %llu "
                      "(%sbytes %llu to %llu of the content): %.1024s%s\n",
                      region->url, (unsigned long long)chunk, name, (unsigned long long)start,
                      (unsigned long long)end - 1,
                      said != NULL && said[0] != '\0' ? without_url(region, said) : cause(code, text, sizeof text),
                      is_damage(code) ? "; `lazymem verify` lists all bad chunks" : "");
    print(line, length, sizeof line);
}

void lm_report_lost_region(const struct lm_region *region, const char *when, int code)
{
    char line[4096], text[128];
    int length = snprintf(line, sizeof line,
                          "lazymem: %s: %.2048s: its memory cannot be served any more and raises "
                          "SIGSEGV when touched: %s\n",
                          when, region->url, cause(code, text, sizeof text));

    print(line, length, sizeof line);
}

void lm_report_memory(const struct lm_region *region, const char *what)
{
    char line[4096];
    int length = snprintf(line, sizeof line, "lazymem: %.2048s%s%s\n", region == NULL ? "" : region->url,
                          region == NULL ? "" : ": ", what);

    print(line, length, sizeof line);
}
