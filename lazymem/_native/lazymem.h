/* SPDX-License-Identifier: Apache-2.0
 *
 * lazymem.h: the one public header of the native core.
 *
 * Everything between the two CFFI markers is read by cffi's cdef() as it stands, so it is declared
 * once: no preprocessor beyond "#define NAME number" may appear there.
 *
 * Conventions. Functions that can fail return 0 (or a count) on success and a negative code on
 * failure: an errno negated, or one of LM_E_* below. Out-parameters are named ret_x and are written
 * only on success. Nothing here calls Python, needs the GIL, or logs; the one line that a failed
 * touch prints (DESIGN.md, failure policy) goes straight to descriptor 2.
 *
 * Host byte order is little-endian: lm_run and lm_chunk_record are the snapshot file's own records
 * (format/FORMAT.md, sections RUNS and CHNK) and are used where they lie.
 */
#ifndef LAZYMEM_H
#define LAZYMEM_H

#include <stddef.h>
#include <stdint.h>

/* CFFI-BEGIN */

/* ---- codes: our own failures lie below every errno ---- */
#define LM_E_SHORT      -1001 /* the source ended before the chunk's bytes did */
#define LM_E_CHECKSUM   -1002 /* XXH3-64 of the stored bytes differs from the record's */
#define LM_E_DECODE     -1003 /* the decoder refused the bytes or gave another length */
#define LM_E_RECORD     -1004 /* the record names an unknown codec, filter or source, or a bad size */
#define LM_E_CODEC      -1005 /* the decoder that the record needs was not found on this machine */
#define LM_E_CLOSED     -1006 /* the region is closed or closing */
#define LM_E_FEATURE    -1007 /* userfaultfd is there but lacks what we need */
#define LM_E_FULL       -1008 /* too many spans are queued; wait for something and ask again */
/* What a store said; the sentence that goes with it travels beside the code. */
#define LM_E_STORE      -1009 /* it did not deliver, for as long as we were willing to ask */
#define LM_E_GONE       -1010 /* nothing lies under the URL */
#define LM_E_DENIED     -1011 /* no, or not these, credentials */
#define LM_E_CHANGED    -1012 /* the object was replaced after it was opened */
#define LM_E_OPTION     -1013 /* the URL or an option cannot be right */
#define LM_E_FETCHER    -1014 /* the fetcher cannot be started, or does not answer */
#define LM_E_LOST       -1015 /* no thread of ours serves the memory any more: it was made inaccessible */

/* The application's doing. */
#define LM_E_MOVED      -1016 /* it has unmapped or moved the memory that was asked for */

/* ---- chunks ---- */
#define LM_CODEC_RAW    0
#define LM_CODEC_LZ4    1
#define LM_CODEC_ZSTD   2

#define LM_FILTER_NONE         0
#define LM_FILTER_PLANES       1
#define LM_FILTER_FLOAT_PLANES 2

/* Flag: a container read in place. No checksum; a raw chunk may be shorter than its place, zeros follow. */
#define LM_CHUNK_UNCHECKED 1

#define LM_ZERO_RUN 0xFFFFFFFFFFFFFFFF

/* Chunks [first_chunk, first_chunk + count) are records first_record, first_record + 1, ...
 * or, where first_record is LM_ZERO_RUN, all zeros. */
typedef struct {
    uint64_t first_chunk;
    uint64_t count;
    uint64_t first_record;
} lm_run;

typedef struct {
    uint64_t offset;        /* of the stored bytes within their source */
    uint32_t stored_length; /* bytes */
    uint8_t codec;          /* LM_CODEC_* */
    uint8_t filter;         /* LM_FILTER_* applied before the codec */
    uint8_t width;          /* element size of the filter in bytes, else 0 */
    uint8_t flags;          /* LM_CHUNK_* */
    uint16_t source;        /* 0 is the snapshot file itself */
    uint16_t reserved0;
    uint32_t reserved1;
    uint64_t checksum;      /* XXH3-64 of the stored bytes */
} lm_chunk_record;

/* ---- the rules of an index's tables, which are the file's own records, too ---- */
typedef struct {
    uint64_t offset; /* in the content */
    uint64_t nbytes;
    uint32_t name_offset;
    uint32_t name_length;
    uint32_t shape_offset; /* in dimensions */
    uint32_t dtype;
    uint8_t ndim;
    uint8_t flags;
    uint8_t reserved[6];
} lm_array_row;

typedef struct {
    uint32_t file;
    uint32_t reserved;
    uint64_t file_offset;
    uint64_t content_offset;
    uint64_t length;
} lm_extent_row;

#define LM_INDEX_HEAD_SIZE   64
#define LM_INDEX_MAX_SOURCES 17 /* the file itself, and 16 bases */
#define LM_INDEX_MAX_NDIM    64
#define LM_INDEX_MAX_NAME    65535
#define LM_INDEX_MAX_SIZE    0x4000000000000000
#define LM_INDEX_ARRAY_FLAGS 3
#define LM_INDEX_WHOLE       0xFFFFFFFFFFFFFFFF /* the table, and no one row */

typedef struct {
    uint64_t row;
    int is_newer; /* what a later version may know, nothing that is damaged */
} lm_index_fault;

/* Each returns NULL if the table keeps the rules of FORMAT.md; else what the first bad row does wrong, the end
 * of a sentence, and *ret_fault, which is zeros before. */
const char *lm_index_check_runs(const lm_run *runs, uint64_t count, uint64_t chunk_count, uint64_t record_count,
                                lm_index_fault *ret_fault);
/* last_length: of the last record's chunk. ends: where the chunks of each source end. ret_in_order: records of a
 * source follow one another; whether some overlap is the caller's to find where they do not. */
const char *lm_index_check_records(const lm_chunk_record *records, uint64_t count, uint32_t chunk_size,
                                   uint32_t last_length, const uint64_t *ends, uint64_t source_count,
                                   int *ret_in_order, lm_index_fault *ret_fault);
const char *lm_index_check_arrays(const lm_array_row *arrays, uint64_t count, const uint64_t *shapes,
                                  uint64_t shape_count, const uint64_t *item_sizes, uint64_t dtype_count,
                                  uint64_t name_bytes, uint64_t content_size, lm_index_fault *ret_fault);
/* members: deflated ones, which cover bytes of files as extents do; checked to lie in their files, and sorted by
 * file, file_offset and length. sizes: of the files. */
const char *lm_index_check_extents(const lm_extent_row *extents, uint64_t count, const lm_extent_row *members,
                                   uint64_t member_count, const uint64_t *sizes, uint64_t file_count,
                                   uint64_t content_size, int is_exact, lm_index_fault *ret_fault);

/* ---- codecs: function pointers of the wheels, or of the system's libraries ---- */
#define LM_FN_ZSTD_CREATE     0 /* ZSTD_createDCtx */
#define LM_FN_ZSTD_FREE       1 /* ZSTD_freeDCtx */
#define LM_FN_ZSTD_DECOMPRESS 2 /* ZSTD_decompressDCtx */
#define LM_FN_ZSTD_IS_ERROR   3 /* ZSTD_isError */
#define LM_FN_LZ4_DECOMPRESS  4 /* LZ4_decompress_safe */
#define LM_FN_XXH3_64         5 /* XXH3_64bits */
#define LM_FN_COUNT           6

int lm_codec_set(int which, void *function);
/* dlopen(path) and take `symbol` from it; path NULL or "" searches what is loaded already. */
int lm_codec_find(int which, const char *path, const char *symbol);
int lm_codec_present(int which);
uint64_t lm_codec_checksum(const void *data, size_t length);

/* ---- filters and scans, for the writer and for tests ---- */
int lm_bytes_are_zero(const void *data, size_t length);
/* Byte planes: plane p holds byte p of each element of `width` (2, 4 or 8) bytes; the tail of
 * length % width bytes follows as it is. With LM_FILTER_FLOAT_PLANES each element is rotated left by one
 * bit before it is split: the sign goes to the lowest bit, and the highest byte of a float32 or bfloat16
 * is its exponent. in and out must not overlap. */
int lm_planes_split(const void *in, void *out, size_t length, int width, int filter);
int lm_planes_join(const void *in, void *out, size_t length, int width, int filter);

/* ---- casts: numbers of one floating-point format as those of another ---- */
#define LM_FLOAT_16          1
#define LM_FLOAT_BRAIN       2 /* bfloat16 */
#define LM_FLOAT_32          3
#define LM_FLOAT_64          4
#define LM_FLOAT_8_E4M3FN    5 /* the formats of 8 bits can only be cast from */
#define LM_FLOAT_8_E5M2      6
#define LM_FLOAT_8_E4M3FNUZ  7
#define LM_FLOAT_8_E5M2FNUZ  8
#define LM_FLOAT_COUNT       9

/* A cast is LM_FLOAT_* of the source * 256 + LM_FLOAT_* of the target, or this: bytes as they are. */
#define LM_CAST_NONE 0
int lm_cast(const void *in, void *out, size_t count, uint32_t cast);

/* ---- one decoder a thread: stored bytes -> the chunk's bytes ---- */
typedef struct lm_decoder lm_decoder;
int lm_decoder_new(lm_decoder **ret_decoder);
void lm_decoder_free(lm_decoder *decoder);
/* Checks the checksum, decodes and joins `stored` into exactly `raw_length` bytes at `out`. */
int lm_decoder_decode(lm_decoder *decoder, const lm_chunk_record *record, const void *stored,
                      void *out, size_t raw_length);

/* ---- what this machine offers ---- */
#define LM_WAY_DEVICE    0 /* /dev/userfaultfd */
#define LM_WAY_SYSCALL   1 /* userfaultfd(2), kernel faults too */
#define LM_WAY_USER_ONLY 2 /* userfaultfd(2) with UFFD_USER_MODE_ONLY */
#define LM_WAY_COUNT     3

#define LM_CAN_COPY     1
#define LM_CAN_ZEROPAGE 2
#define LM_CAN_WAKE     4
#define LM_CAN_POISON   8
#define LM_CAN_MOVE     16

typedef struct {
    int error;         /* 0, or the errno that this way in ended with */
    uint64_t features; /* UFFD_FEATURE_* as the kernel reports them */
    uint64_t ioctls;   /* the bit mask of ioctls on a registered range */
    unsigned can;      /* LM_CAN_*, each tried on a throw-away page */
} lm_way_report;

int lm_probe_way(int way, lm_way_report *ret_report);
/* Whether LM_BACKEND_SIGSEGV can work here: 0 or a negative errno. */
int lm_probe_sigsegv(void);

/* ---- the fetcher ----
 *
 * A process of its own that reads byte ranges of remote objects (lazymem/fetcher). It has a
 * SOCK_SEQPACKET socket to the engine as descriptor 3 and a memfd as descriptor 4 that both map. The
 * engine asks, and says where in that memory the bytes shall lie; the fetcher puts them there and answers
 * once. It keeps nothing that matters: when it dies the engine starts another, tells it the sources again
 * (LM_ASK_SOURCE) and asks again. When the socket ends it exits.
 *
 * A message is one packet: one of the two structures below, then payload_length bytes. This is the one
 * definition of the protocol; Python reads it through cffi (_native/__init__.py, ASK and ANSWER).
 */
#define LM_FETCH_SOCKET 3
#define LM_FETCH_MEMORY 4
#define LM_FETCH_MESSAGE_MAX 65536 /* bytes, payload included */

/* Payload: JSON {"url", "options", "size", "identity"}. From now on `source` means this object. Sent
 * again to a new fetcher, and again with size and identity once they are known. No answer. */
#define LM_ASK_SOURCE  1
/* One request to the store: size and identity of the source, its last `length` bytes (or all) at `place`.
 * Answer: DONE, length: bytes put there, payload: JSON {"size", "identity", "client"}. */
#define LM_ASK_OPEN    2
/* Bytes [offset, offset + length) of the source at `place`. Payload: lm_piece records, the parts of it that
 * are worth caching one by one, in order; what lies between them need not be fetched, nor put anywhere. */
#define LM_ASK_RANGE   3
/* Request `id` was made ahead of need and is waited for by now. No answer of its own. */
#define LM_ASK_PROMOTE 4
/* Nobody needs request `id` any more. It is answered all the same (DONE or FAILED), as soon as nothing
 * will be written to its place. */
#define LM_ASK_CANCEL  5
/* Forget the source. No answer; requests for it have been answered. */
#define LM_ASK_FORGET  6
/* Payload of the answer: JSON with the fetcher's counters. */
#define LM_ASK_STATUS  7

#define LM_ASK_DEMAND  1 /* flag: somebody waits for it; without it the request is made ahead of need */
#define LM_ASK_REFETCH 2 /* flag: the bytes that came last time were wrong; the cache may not be believed */

typedef struct {
    uint32_t kind; /* LM_ASK_* */
    uint32_t source;
    uint64_t id; /* echoed in the answer */
    uint64_t offset, length; /* bytes, in the object */
    uint64_t place; /* in the shared memory */
    uint32_t timeout_ms; /* until then it is tried again and again; then FAILED */
    uint16_t flags;
    uint16_t reserved;
    uint32_t payload_length;
    uint32_t reserved1;
} lm_ask;

typedef struct {
    uint64_t offset; /* in the object */
    uint64_t length;
} lm_piece;

#define LM_ANSWER_DONE   1
#define LM_ANSWER_FAILED 2 /* payload: one sentence, UTF-8, free of secrets */

typedef struct {
    uint32_t kind; /* LM_ANSWER_* */
    int32_t code;  /* FAILED: LM_E_* */
    uint64_t id;
    uint64_t length;    /* bytes put in place */
    uint64_t received;  /* bytes of body that came from the store for it, all attempts; 0 from the cache */
    uint32_t requests;  /* sent to the store for it */
    uint32_t payload_length;
} lm_answer;

/* How to start it: argc arguments and then envc variables, each ended by a zero. The first call of a
 * process counts, later ones change nothing. */
int lm_fetch_command(const char *strings, size_t length, unsigned argc, unsigned envc);

/* A remote object by number, from the JSON of LM_ASK_SOURCE. Regions that read it keep it for themselves. */
int lm_source_open(const char *text, size_t length);
int lm_source_update(uint32_t source, const char *text, size_t length);
void lm_source_close(uint32_t source);

/* A question of the caller's own: LM_ASK_OPEN, LM_ASK_RANGE or LM_ASK_STATUS. LM_E_FULL: later. Every
 * question that got an id is taken or dropped. In the child of a fork the parent's ids are -ESRCH. */
int lm_fetch_ask(uint32_t kind, uint32_t source, uint64_t offset, uint64_t length, uint32_t timeout_ms,
                 uint64_t *ret_id);
/* 1: it is answered. 0: time ran out. Negative: LM_E_*, and the text to be taken says more. */
int lm_fetch_wait(uint64_t id, int timeout_ms);
#define LM_FETCH_TEXT 4096
typedef struct {
    uint64_t length; /* bytes copied to `out` */
    uint64_t received;
    uint32_t requests;
    uint32_t text_length;
    char text[4096];
} lm_fetch_result;
int lm_fetch_take(uint64_t id, void *out, size_t length, lm_fetch_result *ret_result);
void lm_fetch_drop(uint64_t id);

int lm_fetcher_pid(void);         /* 0: none runs */
uint64_t lm_fetcher_starts(void); /* in this process, restarts counted */

/* ---- regions ---- */
#define LM_BACKEND_UFFD      0 /* device, else system call */
#define LM_BACKEND_UFFD_USER 1
#define LM_BACKEND_EAGER     2 /* no faults: everything is read by lm_region_open */
#define LM_BACKEND_MAP       3 /* plain file mappings, no engine */
#define LM_BACKEND_SIGSEGV   4 /* protected pages: a touch is a signal */
#define LM_BACKEND_PAGER     6 /* served by another process (attachment.h) */
#define LM_BACKEND_STOCK     5 /* for other processes, see pager.h: nobody here may touch what is not present */

#define LM_INSTALL_AUTO 0
#define LM_INSTALL_COPY 1
#define LM_INSTALL_MOVE 2

typedef struct lm_region lm_region;

/* A part of a composed region: `length` bytes of the stock from `from` on, cast, lie at `to` in the region. */
typedef struct {
    uint64_t to;     /* a multiple of the target's element size */
    uint64_t from;   /* need not be aligned */
    uint64_t length; /* whole elements of the cast's source */
    uint32_t cast;   /* LM_CAST_NONE, or see there */
    uint32_t reserved;
} lm_strip;

/* Everything is copied; nothing is borrowed after the call returns. */
typedef struct {
    uint64_t content_size;      /* bytes; the region is this rounded up to whole chunks */
    uint32_t chunk_size;        /* power of two, 64 KiB to 64 MiB */
    int backend;                /* LM_BACKEND_*, but not _MAP */
    int install;                /* LM_INSTALL_* */
    int writable;               /* 0: mode "r"; 1: mode "c" */
    int dropped;                /* 1: children of a fork do not get the memory. See lm_region_open_map */
    int threads;                /* resolver threads if this region starts the engine; 0: default */
    uint32_t readahead;         /* chunks to run ahead of a sequential scan at most; 0: never */
    const lm_run *runs;
    uint64_t run_count;
    const lm_chunk_record *records;
    uint64_t record_count;
    const int *fds;             /* sources; duplicated. -1: a remote one */
    const uint32_t *sources;    /* numbers of lm_source_open where fds are -1. May be absent */
    const uint64_t *source_sizes;
    int source_count;           /* all of them local, or all of them remote */
    /* Of remote sources: chunks at most this many bytes apart become one request, of this size at most;
     * and how long a request is tried again. */
    uint32_t coalesce_gap, coalesce_size, fetch_timeout_ms;
    const char *url;            /* for the line that a failed touch prints */
    /* Non-empty arrays sorted by offset: named in the same line, and read-ahead ends where they end.
     * May be absent. */
    uint64_t array_count;
    const uint64_t *array_offsets;
    const uint64_t *array_lengths;
    const uint32_t *name_offsets; /* array_count + 1 of them, into names */
    const char *names;
    /* A composed region shows another content, the stock, cut into strips: in another order, in other
     * formats. content_size, chunk_size and runs say what it shows (first_record of a run that is not of
     * zeros means nothing then), records and stock_* what it is made of. Strips are sorted by `to` and do
     * not overlap; where there are none it shows zeros. */
    const lm_strip *strips;
    uint64_t strip_count;   /* 0: not composed */
    uint64_t stock_size;    /* bytes */
    uint32_t stock_chunk_size;
    const lm_run *stock_runs;
    uint64_t stock_run_count;
} lm_region_spec;

/* A piece of a plain region: `length` bytes of fd at file_offset (a multiple of the page size)
 * shown at region_offset (likewise). Gaps are anonymous zeros. */
typedef struct {
    uint64_t region_offset;
    uint64_t file_offset;
    uint64_t length;
    int fd;
} lm_map_piece;

int lm_region_open(const lm_region_spec *spec, lm_region **ret_region);
/* dropped: a child process, however it is made, has nothing where the region lies here: touching it there
 * raises SIGSEGV. A child that ran pthread_atfork's handlers finds the region closed. */
int lm_region_open_map(uint64_t size, const lm_map_piece *pieces, uint64_t piece_count, int writable,
                       int dropped, lm_region **ret_region);
/* Unmaps and gives everything back but the handle. Calls that wait in other threads return LM_E_CLOSED
 * first, chunks in flight are finished first. Every call on the handle then says LM_E_CLOSED. Idempotent.
 * No thread may use the memory any more. */
void lm_region_close(lm_region *region);
/* The last call on a handle: close, and free it. NULL is allowed. */
void lm_region_free(lm_region *region);

/* Eager regions once everything is in place: writing becomes impossible where mode is "r". */
int lm_region_seal(lm_region *region);

void *lm_region_address(lm_region *region);
uint64_t lm_region_size(lm_region *region);
uint64_t lm_region_chunk_count(lm_region *region);
uint64_t lm_region_chunk_size(lm_region *region); /* of a plain mapping: the unit of the calls below */
int lm_region_backend(lm_region *region);
int lm_region_install(lm_region *region);

/* Queue spans of chunks for populating, in this order; failed ones are tried again. urgent: before what is
 * queued already, because somebody waits for them. Returns how many there was room for: the first ones. */
typedef struct {
    uint64_t first, count; /* chunks */
} lm_chunk_span;
int lm_region_prefetch_spans(lm_region *region, const lm_chunk_span *spans, int count, int urgent);
/* One span, or LM_E_FULL. */
int lm_region_prefetch(lm_region *region, uint64_t first, uint64_t count, int urgent);
/* Wait until all of them are present. 1: they are. 0: time ran out. Negative: why a chunk failed,
 * with *ret_chunk naming it. Restartable: *cursor says how far it got (start it at first). */
int lm_region_wait(lm_region *region, uint64_t first, uint64_t count, int timeout_ms,
                   uint64_t *cursor, uint64_t *ret_chunk);
/* What is known of the last failure of a chunk beyond its code: a sentence of the store's, or "". */
int lm_region_error_text(lm_region *region, uint64_t chunk, char *out, size_t length);
/* Give the pages of populated chunks back; a later touch populates them again. What was written to them in
 * mode "c" is lost. Chunks that the kernel does not take back, as of locked memory, stay as they are. */
int lm_region_evict(lm_region *region, uint64_t first, uint64_t count);
/* memcpy out of the region; the caller has populated the range. LM_E_MOVED if some of it is gone. */
int lm_region_read(lm_region *region, uint64_t offset, void *out, size_t length);
/* Read a byte of each page, as an application does: pages of populated chunks that were given back (by
 * madvise(), say) come again, if need be by a fault. The caller has populated the range. */
int lm_region_touch(lm_region *region, uint64_t offset, size_t length);

#define LM_STATE_ABSENT   0
#define LM_STATE_LOADING  1
#define LM_STATE_PRESENT  2
#define LM_STATE_FAILED   3 /* an attempt failed that nobody had touched for; tried again on touch */
#define LM_STATE_POISONED 4 /* touching it raises SIGBUS until it is asked for again */
/* One byte a chunk into ret_states (LM_STATE_*). Chunks of zeros count as present: they need nothing. */
int lm_region_states(lm_region *region, uint64_t first, uint64_t count, uint8_t *ret_states);

#define LM_LATENCY_BUCKETS 32 /* bucket b: from 2^b to 2^(b+1) nanoseconds */
typedef struct {
    uint64_t faults;           /* messages read from the kernel */
    uint64_t chunks_demand;    /* populated because a page was touched */
    uint64_t chunks_prefetch;  /* populated because somebody asked first */
    uint64_t chunks_failed;
    uint64_t bytes_populated;
    uint64_t bytes_read;       /* from the sources */
    uint64_t reads;            /* requests to the sources */
    uint64_t read_ns;
    uint64_t check_ns;
    uint64_t decode_ns;        /* codec and filter */
    uint64_t install_ns;
    uint64_t moved_chunks;     /* of the populated ones, those that went by UFFDIO_MOVE */
    uint64_t latency[32];      /* demand: message read -> pages in place */
    /* The latest of those, on CLOCK_MONOTONIC: its message read, taken up by a worker, its pages in place. */
    uint64_t last_read_ns, last_begun_ns, last_installed_ns;
} lm_stats;
int lm_region_stats(lm_region *region, lm_stats *ret_stats);

/* Regions and engine threads alive in this process, for leak checks. */
uint64_t lm_engine_region_count(void);
int lm_engine_thread_count(void);

/* CFFI-END */

#endif
