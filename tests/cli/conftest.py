# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line share: a tiny random model, and a function that runs commands."""

import shlex

import pytest

from kandinsky_model.__main__ import main

from ..support import tiny_models
from ..support.tiny_models import SMALL_ARGS

PROMPT = "a red circle moving right"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (status, stdout, stderr), in an empty directory; unless not `own`,
    `generate` gets the random model and its small size. A single argument is a whole line of the
    shell."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=str(folder), own=True):
        if len(arguments) == 1:
            arguments = shlex.split(arguments[0])
        if own and arguments[0] == "generate":
            small = [*SMALL_ARGS, "--model", model, "--device", "cpu"]
            arguments = [*arguments[:2], *small, *arguments[2:]]
        try:
            status = main([*arguments])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
