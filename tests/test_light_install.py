"""The wheel alone: what `pip install soju` gives, in an environment that has its base dependencies and nothing else."""

import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from soju.core.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE_OF = {"opensearch-py": "opensearchpy", "PyStemmer": "Stemmer"}
IMPORT_ALL = """
import importlib, pkgutil, sys
from soju.core.errors import EXTRAS, missing_extra
for package in ("core", "data", "search", "alignment", "evaluation"):
    module = importlib.import_module(f"soju.{package}")
    for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # metrics of translations need a package of their own, which is no torch
            if error.name in EXTRAS["neural"] or missing_extra(error) is None:
                raise
import soju.sparse.static.encoder
print(*sorted({"torch", "transformers", "sentence_transformers"} & set(sys.modules)))
"""


WITHOUT_NEURAL = """
import sys
from soju.core.errors import EXTRAS

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS["neural"] + EXTRAS["hub"]:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
from soju.cli import main
main()
"""


def closure(requirements):
    """Name the distributions that requirements without extras bring, themselves included."""
    found, waiting = {}, [Requirement(text) for text in requirements]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in found:
            found[name] = distribution(name)
            needed = map(Requirement, found[name].requires or ())
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def soju(tmp_path_factory):
    """Install the wheel in a new environment; returns what runs one of its verbs."""
    folder = tmp_path_factory.mktemp("light")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--disable-pip-version-check", str(wheel)], check=True)
    allowed = folder / "base"
    allowed.mkdir()
    for found in closure(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in found.files or () if not file.parts[0].startswith(("..", "__pycache__"))}:
            (allowed / top).symlink_to(Path(found.locate_file(top)))
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "base.pth").write_text(f"{allowed}\n", encoding="utf-8")

    def run(*arguments, command="soju"):
        # JIT off: compiling the loops again for a new environment takes a minute and tests nothing here.
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "COLUMNS": "160", "PYTHONUTF8": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(python.with_name(command)), *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    (folder / "corpus.tsv").write_text("a\tchest pain and a blocked artery\nb\tgreen tea leaves\n", encoding="utf-8")
    (folder / "terms.jsonl").write_text('{"ko": "가슴", "terms": ["chest"]}\n', encoding="utf-8")
    return run


def test_a_korean_query_finds_an_english_document(soju):
    assert soju("-q", "index", "ko-en-static", "corpus.tsv", "index")[0] == 0
    code, out, errors = soju("search", "index", "가슴 통증", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(out)["hits"][0]["document_id"] == "a"


def test_a_text_is_expanded(soju):
    code, out, _ = soju("expand-text", "ko-en-static", "가슴 통증", "--json")
    assert code == 0
    assert {"chest", "pain"} <= {term["term"] for term in json.loads(out)["terms"]}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "splade-pico", "--out", "run"), "neural"),
        (("explore", "ko-en-static"), "explore"),
        *(
            pytest.param(arguments, extra, marks=pytest.mark.slow)
            for arguments, extra in (
                (("mine", "terms.jsonl", "out.jsonl", "--miner", "bm25"), "train"),
                (
                    ("index", "ko-en-static", "corpus.tsv", "x", "--engine", "opensearch", "--url", "http://x"),
                    "engines",
                ),
                (("mteb", "ko-en-static", "corpus"), "mteb"),
                (("index", "ko-en-static", "hub:owner/name:train", "x"), "hub"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_verb_that_needs_more_names_the_line_to_type(soju, arguments, extra):
    code, _, errors = soju("-q", *arguments)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.endswith(f"; run: pip install 'soju[{extra}]'\n")


def test_what_needs_no_torch_imports_without_it(soju):
    assert soju("-c", IMPORT_ALL, command="python") == (0, "\n", "")


@pytest.mark.slow
def test_a_static_encoder_is_trained_measured_and_reported_without_torch(tmp_path):
    command = ["-q", "--offline", "train", "splade-static-samples", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NEURAL, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"final", "index", "report.html", "scores.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_extras_are_those_of_the_project():
    for extra, modules in EXTRAS.items():
        names = [Requirement(text).name for text in PROJECT["optional-dependencies"][extra]]
        assert set(modules) <= {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
