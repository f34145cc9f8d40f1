"""What a person at the terminal meets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.broken_rows import write_broken_terms
from fixtures.terminal import soju
from soju import __version__

SAMPLES = "splade-static-samples"


def in_a_process(*arguments: str | bytes, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "soju", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "160", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_help_names_every_verb_and_loads_no_torch(tmp_path):
    code = "import sys, soju.cli; assert not {'torch', 'transformers', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = soju("--help", cwd=tmp_path).stdout
    for verb in (
        "demo",
        "presets",
        "check",
        "train",
        "evaluate",
        "compare",
        "index",
        "search",
        "expand-text",
        "explore",
        "export",
        "trim",
        "mine",
        "verify",
    ):
        assert verb in shown


@pytest.mark.parametrize(
    "verb",
    ["train", "index", "search", "expand-text", "explore", "check", "verify", "export", "evaluate", "trim", "mine"],
)
def test_every_verb_explains_itself(tmp_path, verb):
    result = soju(verb, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_the_version_is_an_option_and_a_verb(tmp_path):
    for shown in (soju("--version", cwd=tmp_path), soju("version", cwd=tmp_path)):
        assert (shown.returncode, shown.stdout) == (0, f"{__version__}\n")


def test_presets_are_listed_and_printed(tmp_path):
    assert SAMPLES in soju("presets", cwd=tmp_path).stdout
    assert "recipe: splade" in soju("presets", SAMPLES, cwd=tmp_path).stdout


def test_check_accepts_our_samples(tmp_path):
    result = soju("check", SAMPLES, cwd=tmp_path)
    assert result.returncode == 0
    assert "No problem found" in result.stdout


def test_one_run_lists_every_broken_row_with_place_and_remedy_and_exits_with_2(tmp_path):
    reasons = write_broken_terms(tmp_path / "broken.jsonl")
    result = soju("check", SAMPLES, "data.terms=[broken.jsonl]", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(set(reasons.values())) >= 15
    assert len(reasons) >= 20
    listed = [line for line in result.stderr.splitlines() if line.startswith("broken.jsonl:")]
    assert all("; " in line for line in listed)
    for line in reasons:
        assert any(entry.startswith(f"broken.jsonl:{line}:") for entry in listed), line


def test_broken_rows_are_skipped_and_counted_when_told_to(tmp_path):
    write_broken_terms(tmp_path / "broken.jsonl")
    override = "data.terms=[samples:terms.train, broken.jsonl]"
    result = soju("check", SAMPLES, override, "data.on_error=skip", cwd=tmp_path)
    assert result.returncode == 0
    assert "broken rows were left out" in result.stdout
    assert "No problem found" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], '"nowhere" is neither a YAML file nor a preset'),
        (["train", SAMPLES, "data.rot=1"], "data.rot: unknown setting"),
        (["train", SAMPLES, "seed"], "expected key=value"),
        (["search", "nowhere", "물"], "nowhere"),
        (["expand-text", "nowhere", "물"], "not a model folder"),
        (["verify", "nowhere"], "nothing to check"),
        (["report", "nowhere"], "nowhere"),
        (["index", "nowhere", "corpus.jsonl"], "soju index MODEL CORPUS... INDEX"),
        (
            ["compare", "a", "b"],
            "a: not a model folder or a run of a recipe (splade, embedding, spec",
        ),
    ],
)
def test_a_users_mistake_is_one_sentence_and_code_2(tmp_path, arguments, message):
    result = soju(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


def test_index_and_search_with_the_packaged_model(tmp_path):
    rows = [
        {"id": "heart", "text": "The heart pumps blood through the vessels."},
        {"id": "net", "text": "A network connects computers."},
        {"id": "tea", "text": "녹차는 따뜻한 물에 우린다."},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "corpus.jsonl").write_text(text, encoding="utf-8")
    made = in_a_process("index", "ko-en-static", "corpus.jsonl", "my-index", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "3 documents" in made.stdout
    assert "net" in in_a_process("search", "my-index", "컴퓨터 네트워크", cwd=tmp_path).stdout
    for query, expected in (("컴퓨터 네트워크", "net"), ("warm water", "tea")):
        found = soju("search", "my-index", query, "--json", cwd=tmp_path)
        assert json.loads(found.stdout)["hits"][0]["document_id"] == expected
    again = soju("index", "ko-en-static", "corpus.jsonl", "my-index", cwd=tmp_path)
    assert again.returncode == 2
    assert "my-index" in again.stderr
    assert soju("verify", "my-index", cwd=tmp_path).returncode == 0
    (tmp_path / "my-index" / "terms.json").write_text("[]", encoding="utf-8")
    assert soju("verify", "my-index", cwd=tmp_path).returncode == 2


def test_a_broken_corpus_leaves_no_index(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "tea"}\n{"id": "1", "text": "x"}\n', encoding="utf-8")
    result = soju("index", "ko-en-static", "corpus.jsonl", "my-index", cwd=tmp_path)
    assert result.returncode == 2
    assert "corpus.jsonl:2" in result.stderr
    assert not (tmp_path / "my-index").exists()


def test_an_index_grows_and_names_documents_that_cannot_be_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "tea", "text": "green tea"}\n{"id": "[/b]", "text": "?!"}\n', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"id": "rice", "text": "쌀로 밥을 짓는다"}\n', "utf-8")
    made = soju("index", "ko-en-static", "a.jsonl", "my-index", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "1 documents hold no known term and cannot be found: [/b]" in made.stdout
    assert soju("index", "ko-en-static", "b.jsonl", "my-index", "--add", cwd=tmp_path).returncode == 0
    found = soju("search", "my-index", "rice", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["hits"][0]["document_id"] == "rice"


def test_a_forgotten_index_folder_does_not_cost_the_corpus(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": "1", "text": "tea"}\n', encoding="utf-8")
    result = soju("index", "ko-en-static", "a.jsonl", "b.jsonl", cwd=tmp_path)
    assert result.returncode == 2
    assert "the last argument is the index folder" in result.stderr


def test_train_compare_and_export_from_the_command_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"ko": "", "terms": []}\n', encoding="utf-8")
    refused = soju("train", SAMPLES, "data.terms=[broken.jsonl]", "--out", "a", cwd=tmp_path)
    assert (refused.returncode, (tmp_path / "a").exists()) == (2, False)
    quick = ("evaluation.bootstrap_samples=100", "evaluation.latency_queries=2")
    assert in_a_process("train", SAMPLES, *quick, "--out", "a", cwd=tmp_path).returncode == 0
    assert soju("train", SAMPLES, *quick, "expansion.power=2", "--out", "b", cwd=tmp_path).returncode == 0
    compared = soju("compare", "a", "b", cwd=tmp_path)
    assert "samples.heldout/ko-en" in compared.stdout
    assert soju("verify", "a", cwd=tmp_path).returncode == 0
    assert soju("report", "a", cwd=tmp_path).returncode == 0
    assert soju("export", "a", "table.tsv", "--to", "tsv", cwd=tmp_path).returncode == 0
    assert (tmp_path / "table.tsv").read_text(encoding="utf-8").startswith("source\t")
    again = soju("export", "a", "table.tsv", "--to", "tsv", cwd=tmp_path)
    assert again.returncode == 2


def test_a_text_without_a_known_term_says_so(tmp_path):
    assert "boiling" in soju("expand-text", "ko-en-static", "물을 끓인다", cwd=tmp_path).stdout
    assert soju("expand-text", "ko-en-static", "?!", cwd=tmp_path).stdout == "This text activates no term.\n"


def test_a_query_that_is_not_utf8_is_refused(tmp_path):
    result = in_a_process("expand-text", "ko-en-static", b"\xb0\xa1", cwd=tmp_path)
    assert result.returncode == 2
    assert "UTF-8" in result.stderr
