from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from soju.recipes.splade.comparing import probe_models
from soju.recipes.splade.indexing import expand, open_model
found = expand(open_model("ko-en-static")[0], ["물"])
assert found[0].terms
assert probe_models(["ko-en-static"])
print(*sorted({"torch", "transformers", "sentence_transformers"} & set(sys.modules)))
"""


def test_a_static_model_answers_without_waiting_for_torch():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
