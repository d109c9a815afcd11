/* SPDX-License-Identifier: Apache-2.0
 *
 * Where there is no libFuzzer: replays the files of a corpus, then changes of them, the same ones each time.
 *
 *   fuzz_core FOLDER SECONDS
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <string.h>
#include <time.h>

#include "harness.h"

#define FILES 1000
#define LONGEST 65536

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct { uint8_t *bytes; size_t length; } files[FILES];
static size_t file_count;

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static void load(const char *folder)
{
    struct dirent **entries;
    int i, count = scandir(folder, &entries, NULL, by_name);
    char path[4096];

    CHECK(count > 0);
    for (i = 0; i < count; i++) {
        FILE *file;

        snprintf(path, sizeof path, "%s/%s", folder, entries[i]->d_name);
        file = entries[i]->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (file != NULL && file_count < FILES) {
            files[file_count].bytes = malloc(LONGEST);
            CHECK(files[file_count].bytes != NULL);
            files[file_count].length = fread(files[file_count].bytes, 1, LONGEST, file);
            file_count++;
        }
        if (file != NULL)
            fclose(file);
        free(entries[i]);
    }
    free(entries);
    CHECK(file_count > 0);
}

static void change(uint8_t *bytes, size_t *length, uint64_t *random)
{
    static const uint8_t telling[] = { 0, 1, 2, 4, 8, 0x7F, 0x80, 0xFE, 0xFF };
    size_t times = 1 + next_random(random) % 6, at, some;

    while (times-- > 0 && *length > 0) {
        at = next_random(random) % *length;
        switch (next_random(random) % 5) {
        case 0: bytes[at] ^= (uint8_t)(1u << next_random(random) % 8); break;
        case 1: bytes[at] = telling[next_random(random) % sizeof telling]; break;
        case 2: bytes[at] = (uint8_t)(next_random(random) >> 24); break;
        case 3: *length = at + 1; break;
        default:
            some = next_random(random) % 64;
            if (*length + some <= LONGEST) {
                memmove(bytes + at + some, bytes + at, *length - at);
                memset(bytes + at, (int)(next_random(random) % 256), some);
                *length += some;
            }
        }
    }
}

int main(int argc, char **argv)
{
    static uint8_t bytes[LONGEST];
    uint64_t random = 88172645463325252u, runs = 0;
    time_t end;
    size_t i;

    CHECK(argc == 3);
    load(argv[1]);
    for (i = 0; i < file_count; i++)
        (void)LLVMFuzzerTestOneInput(files[i].bytes, files[i].length);
    for (end = time(NULL) + atoi(argv[2]); time(NULL) < end; runs++) {
        size_t chosen = next_random(&random) % file_count, length = files[chosen].length;
        uint8_t *exact;

        memcpy(bytes, files[chosen].bytes, length);
        change(bytes, &length, &random);
        exact = malloc(length + 1);
        CHECK(exact != NULL);
        memcpy(exact, bytes, length);
        (void)LLVMFuzzerTestOneInput(exact, length);
        free(exact);
    }
    printf("ok: %zu files, %llu changed ones\n", file_count, (unsigned long long)runs);
    return 0;
}
