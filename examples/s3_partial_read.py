# SPDX-License-Identifier: Apache-2.0
"""A few rows of an array in an object store: one request to open, and then only what is touched.

    python examples/s3_partial_read.py s3://bucket/model.lzm [NAME]

Takes a snapshot, or a .safetensors or .npy object as it is, by s3:// or https://. Credentials, region and
endpoint are found where boto3 finds them.
"""

import sys
import time

import lazymem

if len(sys.argv) < 2:
    raise SystemExit(__doc__)
url = sys.argv[1]

started = time.perf_counter()
with lazymem.open(url, readahead=0) as snap:
    print(f"open:  {(time.perf_counter() - started) * 1e3:.0f} ms, {len(snap)} arrays, {snap.nbytes:,} bytes")

    # Shapes come from the index. Looking up an array reads nothing either.
    name = sys.argv[2] if len(sys.argv) > 2 else max(snap, key=lambda name: snap.info(name).nbytes)
    array = snap[name]
    print(f"array: {name}: {array.dtype} {array.shape}, {array.nbytes:,} bytes")

    started = time.perf_counter()
    picked = array[:: max(1, len(array) // 4)][:4].copy()  # up to four rows; here the chunks are fetched
    print(f"touch: {(time.perf_counter() - started) * 1e3:.0f} ms")
    print(picked)
    stats = snap.stats()
    print(f"stats: {stats.chunks_populated} of {snap.chunk_count} chunks, {stats.bytes_read:,} bytes read")
    del array
