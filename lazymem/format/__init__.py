# SPDX-License-Identifier: Apache-2.0
"""The snapshot file (.lzm): the only code that knows its bytes. FORMAT.md is the specification."""
