# SPDX-License-Identifier: Apache-2.0
"""Snapshots as torch tensors."""
