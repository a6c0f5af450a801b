# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that need a GPU: ``gate.sh`` installs a wheel and runs them all on one."""
