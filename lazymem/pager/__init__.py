# SPDX-License-Identifier: Apache-2.0
"""The pager: one process that serves the memory of others, by the engine that every process has for its own.

The fault path is the core's (_native/pager.c). Here is what goes before it: who may have what, which
snapshot, which memory. Clients come by a socket (`server`; _native/pager_protocol.h) or as Firecracker does.
"""
