# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that need a GPU: ``gate.sh`` builds, tests and runs them all on one."""
