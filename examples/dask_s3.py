# SPDX-License-Identifier: Apache-2.0
"""A Dask cluster computes over one array of a snapshot in an object store.

    python examples/dask_s3.py s3://bucket/model.lzm [NAME]

What goes to the workers is a handle: URL, version, options and the array's name. Each worker opens the
snapshot itself, with the credentials that it finds where boto3 finds them, and loads what its tasks touch.
Needs `pip install dask[array] distributed`.
"""

import sys

import dask.array as da
from distributed import Client, LocalCluster

import lazymem


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with lazymem.open(sys.argv[1]) as snap:
        name = sys.argv[2] if len(sys.argv) > 2 else max(snap, key=lambda name: snap.info(name).nbytes)
        handle = snap.handle(name)  # outlives the snapshot
    print(f"array:  {name}: {handle.dtype} {handle.shape}, {handle.nbytes:,} bytes")

    # A real cluster's address in place of LocalCluster() changes nothing else.
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        array = da.from_array(handle, chunks="8 MiB")
        print(f"blocks: {array.npartitions}")
        print(f"mean:   {array.mean(dtype='float64').compute():.6f}")


if __name__ == "__main__":  # the workers import this file
    main()
