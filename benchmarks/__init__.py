# SPDX-License-Identifier: Apache-2.0
"""Times the operators over the table of cases and writes what it saw, with the machine it saw it
on."""
