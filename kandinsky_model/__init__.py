# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5.0: the leanest model that consumes `kandinsky_kernels` end to end."""
