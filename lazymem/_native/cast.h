/* SPDX-License-Identifier: Apache-2.0
 *
 * cast.h: numbers of one floating-point format -> another. Pure functions on plain memory, aligned or not;
 * the results are those of torch's and ml_dtypes' own conversions: exact where the target is wider, else
 * rounded to nearest, ties to even, by way of float32.
 */
#ifndef LM_CAST_H
#define LM_CAST_H

#include <stdbool.h>

#include "lazymem.h"

/* Bytes of an element before and after; false for a cast that does not exist. LM_CAST_NONE: 1 and 1. */
bool lm_cast_widths(uint32_t cast, unsigned *ret_from, unsigned *ret_to);

#endif
