# SPDX-License-Identifier: Apache-2.0
"""The @triton.jit kernels, one file per family. Imported by the launchers on first use only, for
Triton may be missing."""
