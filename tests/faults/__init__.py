# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around lazy memory, and that it goes wrong as it should.

userfaultfd's known ways to fail, and the test that fails without the remedy. C tests are in tests/native.

Ways to read wrong bytes:
1. last descriptor closed: test_faults_process.test_closing_all_descriptors_never_shows_zeros
2. fork without EVENT_FORK: test_faults_fork.test_child_reads_right_bytes_populated_before_and_after
3. raw clone that skips handlers: no remedy inside the process (MADV_DONTFORK is the application's:
   test_places.c, test_child_has_windows_and_holes_as_its_parent_does); EVENT_FORK is the external pager's
4. mremap: test_places.c, test_moved_memory_shows_the_same_bytes; test_faults_addresses
5. MADV_DONTNEED races with an install: test_engine.c, test_pages_given_back_come_again and
   test_eviction_races_touches. Bytes of a snapshot are the same before and after, so none are stale
6. WAKE instead of CONTINUE: memfd only, the external pager's
7. short last chunk, short read: test_engine.c (TAIL), test_faults_damage.test_file_cut_short_*
8. buffer used again under COPY: one owner a buffer; test_engine.c under ASan and TSan

Ways to hang:
1. a lock of the faulting thread's: test_faults_gil, test_engine.c, test_fork_waits_for_a_thread_that_touches
2. EEXIST without WAKE: test_uffd.c, test_copy_steps_over_present_pages
3. EAGAIN while an event is unread: test_uffd.c, test_changes_wait_until_their_event_is_read;
   test_places.c, test_moving_races_everything_else
4., 5. partial COPY, negative errno in its count: test_uffd.c, test_copy_steps_over_present_pages
6. poll on a blocking descriptor: all of test_engine.c (it is opened O_NONBLOCK)
7. descriptor closed and its number used again: test_faults_process.test_closing_all_descriptors_*;
   test_places.c, test_unmapping_does_not_wait_for_an_engine_that_is_lost
8. speculation before demand: test_faults_process.test_what_is_waited_for_goes_before_what_is_only_queued
"""
