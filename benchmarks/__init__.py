# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of lazymem beside what a user would pick instead and beside the physical bounds.

One module a question; `python -m benchmarks` runs them. Never imported by lazymem.
"""
