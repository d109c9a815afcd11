# SPDX-License-Identifier: Apache-2.0
"""The process that reads byte ranges of remote objects for the engine, and the application's side of it.

    client, command                                  in the application: questions, and how to start it
    process                                          the process: descriptors, signals, the loop
    scheduler                                        jobs, and what the ends of their attempts mean
    workers, queues                                  the threads, and what they take next
    fetching, job                                    one attempt; one question with its attempts
    sources, lane, concurrency, patience             objects; what a store's requests share
    messages                                         the protocol's packets (_native/lazymem.h defines them)

What a range costs in requests, retries and second attempts is decided here; which range, and where its
bytes go, by the engine (_native/fetch.c). The process keeps nothing that matters: it may be killed at
any moment, and the next one is asked again.
"""
