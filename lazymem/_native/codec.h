/* SPDX-License-Identifier: Apache-2.0
 *
 * codec.h: stored bytes -> the chunk's bytes. Owns the table of borrowed decoder functions and the
 * per-thread decoder; knows nothing of memory that faults. Allocates only in lm_decoder_new and when
 * a decoder first meets a larger chunk, and then from mmap.
 */
#ifndef LM_CODEC_H
#define LM_CODEC_H

#include "lazymem.h"

/* The two halves of lm_decoder_decode, for callers that time them apart. */
int lm_codec_check(const lm_chunk_record *record, const void *stored);
int lm_codec_decode(lm_decoder *decoder, const lm_chunk_record *record, const void *stored, void *out,
                    size_t raw_length);

#endif
