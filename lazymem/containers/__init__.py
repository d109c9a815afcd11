# SPDX-License-Identifier: Apache-2.0
"""Somebody else's file formats, read in place."""
