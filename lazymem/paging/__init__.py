# SPDX-License-Identifier: Apache-2.0
"""Memory of this process that a pager serves: the protocol's packets (`wire`), and lazymem's own client."""
