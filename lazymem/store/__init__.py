# SPDX-License-Identifier: Apache-2.0
"""Bytes by URL and range: local files now, object stores next."""
