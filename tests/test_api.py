"""``import soju``: what it offers, what it loads, and that every example in a docstring is true."""

import doctest
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import soju
from embedding.pico_expansion import save_pico_base, save_pico_donor
from soju.core.errors import UserError

PACKAGES = ("soju", "soju.sparse", "soju.embedding")
NAMES = [
    (package, name)
    for package in PACKAGES
    for name in import_module(package).__all__
    if name != "__version__" and not isinstance(getattr(import_module(package), name), ModuleType)
]
EXAMPLES = {}
for package, name in NAMES:
    thing = getattr(import_module(package), name)
    if thing.__module__.startswith("soju."):
        for found in doctest.DocTestFinder(exclude_empty=True).find(thing, f"{package}.{name}"):
            if found.examples:
                EXAMPLES[found.name] = found
EXAMPLES["soju"] = doctest.DocTestParser().get_doctest(soju.__doc__, {}, "soju", None, 0)


@pytest.fixture(scope="session")
def embedding_models(tmp_path_factory):
    """A base that spells Korean in bytes, and a donor of Korean tokens."""
    root = tmp_path_factory.mktemp("expansion")
    return {"base": save_pico_base(root / "base"), "donor": save_pico_donor(root / "donor")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_of_a_docstring_is_true(name, tmp_path, request, capsys):
    names = {"folder": tmp_path}
    if name.startswith("soju.embedding"):
        names |= request.getfixturevalue("embedding_models")
    example = EXAMPLES[name]
    example.globs = names
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.DocTestRunner(optionflags=flags).run(example)
    assert (result.failed, result.attempted > 0) == (0, True), capsys.readouterr().out


def test_every_public_name_is_documented_and_stands_in_an_example():
    source = "".join(example.source for found in EXAMPLES.values() for example in found.examples)
    for package, name in NAMES:
        thing = getattr(import_module(package), name)
        assert inspect.getdoc(thing), name
        assert re.search(rf"\b{package}\.{name}\b", source), name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_what_it_offers_and_refuses_other_names(package):
    module = import_module(package)
    assert dir(module) == sorted(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'; it has"):
        _ = module.nothing


def loaded_by(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_soju_loads_nothing_but_soju():
    heavy = {"torch", "transformers", "sentence_transformers", "numpy", "scipy", "pydantic", "rich", "kiwipiepy"}
    assert not loaded_by("import soju") & heavy
    assert not loaded_by("import soju.sparse, soju.embedding") & heavy


def test_a_static_model_is_loaded_indexed_and_searched_without_torch(tmp_path):
    code = f"import soju; soju.Index.build(['물'], 'ko-en-static', {str(tmp_path / 'index')!r}).search('water')[0]"
    assert not loaded_by(code) & {"torch", "transformers", "sentence_transformers"}


def test_the_readme_opens_with_python_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL).group(1)
    assert sum(bool(line) for line in block.splitlines()) == 5
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["index"].documents == 2
    assert names["hits"][0].document_id == "vessels"


def test_settings_given_as_a_mapping_train_what_the_preset_trains(tmp_path):
    from soju.core.config import read_config

    quick = {"evaluation.sets": [], "evaluation.terms": []}
    named = soju.train("splade-static-samples", out=tmp_path / "a", overrides=quick)
    plain = soju.train(read_config("splade-static-samples")[0], out=str(tmp_path / "b"), overrides=quick)
    assert named.model.fingerprint == plain.model.fingerprint
    assert "# override: evaluation.sets=[]" in (named.folder / "config.yaml").read_text(encoding="utf-8")
    assert read_config(plain.folder / "config.yaml")[0]["evaluation"]["sets"] == []
    assert named.report.is_file()
    assert named.recipe == "splade"
    vectors = soju.load(named).encode_queries(["물", ""])
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, len(named.model.terms)))


def test_mined_negatives_are_those_of_the_command(tmp_path):
    from soju.core.files import read_json_lines
    from soju.sparse.mine import mine

    rows = [("물을 마신다", "drinks water"), ("물이 끓는다", "the water boils"), ("책을 읽는다", "reads a book")]
    (tmp_path / "pairs.tsv").write_text("".join(f"{ko}\t{en}\n" for ko, en in rows), encoding="utf-8")
    mine([str(tmp_path / "pairs.tsv")], tmp_path / "out.jsonl")
    ours = soju.sparse.mine_negatives([soju.PairRow(*row) for row in rows])
    written = read_json_lines(tmp_path / "out.jsonl")
    assert written
    assert [(t.query, t.negative, t.negative_score) for t in ours] == [
        (row["query"], row["negative"], row["negative_score"]) for row in written
    ]


def test_what_is_no_document_is_refused_with_what_would_be(tmp_path):
    with pytest.raises(UserError, match=r"documents\[0\]: a dict is no document; give a mapping from id to text"):
        soju.Index.build([{"id": "a", "text": "물"}], "ko-en-static", tmp_path / "index")


def test_a_notebook_shows_models_indexes_and_runs_in_a_line(tmp_path):
    model = soju.load("ko-en-static")
    index = soju.Index.build({"a": "물", "b": "tea"}, model, tmp_path / "index")
    assert re.fullmatch(r"Model\('.*ko-en-static', StaticEncoder, [\d,]+ terms\)", repr(model))
    assert repr(index) == f"Index('{tmp_path / 'index'}', 2 documents)"
    assert soju.Run(str(tmp_path)).folder == tmp_path
