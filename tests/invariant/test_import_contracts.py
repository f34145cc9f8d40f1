"""The import contracts hold, and a deliberate breach of each is caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def contracts(folder: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--config", "pyproject.toml", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PROJECT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "packaged"))
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy):
    result = contracts(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/score.py", "import soju.data.log"),
        ("models/canonical.py", "import soju.recipes.splade.config"),
        ("search/exact.py", "import soju.models.static_encoder"),
        ("evaluation/retrieval.py", "import torch"),
        ("recipes/splade/config.py", "import soju.recipes.embedding"),
        ("recipes/judged_training.py", "import soju.recipes.splade.config"),
    ],
)
def test_a_breach_is_caught(copy, file, line):
    path = copy / "src" / "soju" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    result = contracts(copy)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout
