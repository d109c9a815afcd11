/* SPDX-License-Identifier: Apache-2.0
 *
 * pager_stock.h: the snapshot whose memory a pager of the C tests serves: chunks of a memfd, as they lie there.
 */
#ifndef PAGER_STOCK_H
#define PAGER_STOCK_H

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

#define STOCK_MOST 64 /* chunks */

/* odd: the one chunk whose record is with `codec` and has `flip` in its checksum; `count`: none is. */
static inline lm_region *open_stock_of(const unsigned char *content, unsigned count, uint32_t chunk_size, unsigned odd,
                                       uint8_t codec, uint64_t flip)
{
    static lm_chunk_record records[STOCK_MOST];
    lm_run runs[] = { { 0, count, 0 } };
    uint64_t size = (uint64_t)count * chunk_size;
    int source = memfd_create("source", MFD_CLOEXEC);
    lm_region_spec spec = { .content_size = size, .chunk_size = chunk_size, .backend = LM_BACKEND_STOCK, .threads = 2,
                            .readahead = 2, .runs = runs, .run_count = 1, .records = records, .record_count = count,
                            .fds = &source, .source_sizes = &size, .source_count = 1, .url = "memfd" };
    lm_region *stock;
    unsigned i;

    CHECK(count <= STOCK_MOST && source >= 0 && pwrite(source, content, size, 0) == (ssize_t)size);
    for (i = 0; i < count; i++) {
        records[i] = (lm_chunk_record){ .offset = (uint64_t)i * chunk_size, .stored_length = chunk_size,
                                        .codec = i == odd ? codec : LM_CODEC_RAW };
        records[i].checksum = lm_codec_checksum(content + (size_t)i * chunk_size, chunk_size) ^ (i == odd ? flip : 0);
    }
    CHECK(lm_region_open(&spec, &stock) == 0);
    close(source);
    return stock;
}

#endif
