# SPDX-License-Identifier: Apache-2.0
"""The packages that ``make test-oldest`` and ``make test-newest`` install: all that the package and
its tests need, each in the oldest version that pyproject.toml allows, or by name alone.

``python tests/support/oldest.py [--names]`` prints them in one line. It runs before anything is
installed, and on Python 3.10, which cannot read TOML: so it looks for the bounds themselves.
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def bounds() -> dict[str, str]:
    """Package -> its lower bound, of the dependencies and of every extra."""
    text = PYPROJECT.read_text(encoding="utf-8")
    packages = text[text.index("\ndependencies = ") : text.index("[project.scripts]")]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', packages))


if __name__ == "__main__":
    names = "--names" in sys.argv[1:]
    print(*(name if names else f"{name}=={version}" for name, version in bounds().items()))
