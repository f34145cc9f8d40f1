from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
from soju.sparse.term_activation import probe_models
from soju.sparse.export.formats import export
from soju.sparse.model import load
assert load("ko-en-static").expand("물")
assert probe_models(["ko-en-static"])
export(load("ko-en-static").encoder, Path(sys.argv[1]), "tsv")
print(*sorted({"torch", "transformers", "sentence_transformers"} & set(sys.modules)))
"""


def test_a_static_model_answers_without_waiting_for_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "table.tsv")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
