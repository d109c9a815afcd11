/* SPDX-License-Identifier: Apache-2.0 */
#include "source.h"

#include <errno.h>
#include <string.h>

#include "lazymem.h"
#include "sys.h"

static struct lm_source sources[LM_SOURCES];
static uint32_t high;   /* one above the highest number ever given */
static unsigned unused; /* without users, not removed yet */

static void replace(struct lm_source *source, struct lm_source_text *what)
{
    struct lm_source_text *before = source->what;

    source->told = 0;
    source->what = what;
    if (before != NULL)
        lm_sys_free(before, sizeof *before + before->length);
}

int lm_source_change(uint32_t number, const char *text, size_t length)
{
    struct lm_source_text *what;
    void *memory;
    int error;

    if (length == 0 || length > LM_FETCH_MESSAGE_MAX - sizeof(lm_ask))
        return -EMSGSIZE;
    error = lm_sys_alloc(sizeof *what + length, &memory);
    if (error < 0)
        return error;
    what = memory;
    what->length = length;
    memcpy(what->text, text, length);
    replace(&sources[number], what);
    return 0;
}

int lm_source_add(const char *text, size_t length)
{
    uint32_t number;
    int error;

    for (number = 0; number < LM_SOURCES && sources[number].what != NULL; number++)
        ;
    if (number == LM_SOURCES)
        return -ENFILE;
    sources[number].users = 1;
    error = lm_source_change(number, text, length);
    if (error < 0)
        return error;
    if (number >= high)
        high = number + 1;
    return (int)number;
}

struct lm_source *lm_source_get(uint32_t number)
{
    return number < high && sources[number].what != NULL ? &sources[number] : NULL;
}

void lm_source_use(uint32_t number)
{
    sources[number].users++;
}

void lm_source_leave(uint32_t number)
{
    unused += --sources[number].users == 0;
}

int lm_source_unused(uint32_t number)
{
    for (; unused > 0 && number < high; number++)
        if (sources[number].what != NULL && sources[number].users == 0)
            return (int)number;
    return -1;
}

void lm_source_remove(uint32_t number)
{
    replace(&sources[number], NULL);
    unused--;
}

void lm_source_untell_all(void)
{
    uint32_t number;

    unused = 0; /* counted anew: the fork may have come in the middle of a change */
    for (number = 0; number < high; number++) {
        sources[number].told = 0;
        unused += sources[number].what != NULL && sources[number].users == 0;
    }
}
