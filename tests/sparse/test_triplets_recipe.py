"""Mode ``triplets`` from end to end at the command line, and chained after mode ``terms``."""

import json

import pytest
import yaml

from fixtures.pico_terms import no_figures, run_pico, save_start
from fixtures.pico_triplets import DEV, SCRATCH, TRIPLETS, run_triplets
from fixtures.small_bilingual import PAIRS, TERMS
from fixtures.without_soju import encode_without_soju
from soju.cli import app
from soju.core.config import read_config
from soju.core.errors import UserError
from soju.core.files import read_json_lines, verify_manifest
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.recipe import RECIPE
from soju.sparse.splade import SpladeEncoder

TEXTS = ["백신", "a student reads a book"]
HELD_OUT = [("의사가 바다에 갔다", "the doctor went to the sea"), ("책이 부족하다", "the book is scarce")]


def write_data(folder):
    def lines(name, rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")

    def plain(row):
        return {name: getattr(row, name) for name in ("query", "positive", "negative", "pair_type", "difficulty")}

    (folder / "pairs.tsv").write_text("".join(f"{p.ko}\t{p.en}\n" for p in PAIRS), encoding="utf-8")
    (folder / "held_out.tsv").write_text("".join(f"{ko}\t{en}\n" for ko, en in HELD_OUT), encoding="utf-8")
    lines("terms.jsonl", [{"ko": row.ko, "terms": [t.text for t in row.terms]} for row in TERMS])
    lines("triplets.jsonl", [plain(row) for row in TRIPLETS])
    lines("dev.jsonl", [plain(row) for row in DEV])
    data = {
        "root": str(folder), "pairs": ["pairs.tsv"], "terms": ["terms.jsonl"], "triplets": ["triplets*.jsonl"],
        "dev_triplets": ["dev.jsonl"],
    }  # fmt: skip
    sets = [{"name": "held_out", "pairs": ["held_out.tsv"]}, {"name": "dev", "triplets": ["dev.jsonl"]}]
    evaluation = {**SCRATCH["evaluation"], "sets": sets}
    config = {**SCRATCH, "data": data, "evaluation": evaluation, "sparsity": {"query_terms": 10, "document_terms": 12}}
    (folder / "pico.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


def soju(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triplets")
    write_data(folder)
    soju("train", folder / "pico.yaml", "--out", folder / "run", "--workers", 1)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return folder / "run"


def test_a_run_leaves_everything_the_report_promises(run):
    for name in ("resolved.yaml", "data.json", "scores.json", "comparisons.json", "report.html", "report.md"):
        assert (run / name).stat().st_size > 0
    for name in ("training_curves", "loss_shares", "sparsity", "validation"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 0
    for name in ("best", "final", "static", "untrained"):
        verify_manifest(run / name)


def test_rows_are_counted(run):
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert data["triplets"]["triplets"]["single_term"] == {"hard": 6}
    assert data["rows"]["kept"] == len(TRIPLETS) - 1
    assert data["rows"]["banned"] == 1  # "추천 시스템" is a probe
    assert data["rows"]["steps"] == 12


def test_retrieval_is_reported_with_both_similarities_and_every_baseline(run):
    subjects = {row["subject"] for row in json.loads((run / "scores.json").read_text(encoding="utf-8"))}
    wanted = {"soju student", "soju student (dot)", "soju static", "untrained student", "BM25", "dictionary"}
    assert wanted <= subjects


def test_a_triplet_test_set_has_a_direction_for_each_pair_type(run):
    sets = {row["test_set"] for row in json.loads((run / "scores.json").read_text(encoding="utf-8"))}
    assert {"dev/cross_lingual", "dev/single_term", "held_out/ko-en"} <= sets


def test_sentence_transformers_encodes_with_it_where_soju_cannot_be_imported(run):
    ours = NeuralEncoder(SpladeEncoder(run / "best", device="cpu")).encode_queries(TEXTS)
    theirs = encode_without_soju(run / "best", TEXTS)
    assert abs(ours.toarray() - theirs).max() < 1e-4


def test_a_finished_run_can_be_resumed_and_stays_what_it_was(run, folder, monkeypatch):
    monkeypatch.setattr("soju.report.plots.draw_figures", no_figures)
    before = (run / "best" / "model.safetensors").read_bytes()
    soju("train", folder / "pico.yaml", "--out", run, "--resume", "--workers", 1)
    assert (run / "best" / "model.safetensors").read_bytes() == before


def test_check_reads_triplets_and_trains_nothing(folder, capsys):
    soju("check", folder / "pico.yaml")
    said = capsys.readouterr().out
    assert "cross_lingual" in said
    assert "No problem found" in said


def test_a_triplet_that_holds_a_text_of_a_test_set_is_refused_or_left_out(folder, tmp_path):
    text = (folder / "triplets.jsonl").read_text(encoding="utf-8")
    leak = {
        "query": HELD_OUT[0][0],
        "positive": "x y",
        "negative": "z",
        "pair_type": "monolingual",
        "difficulty": "easy",
    }
    (folder / "triplets_leak.jsonl").write_text(json.dumps(leak, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        with pytest.raises(UserError, match="also stand"):
            soju("check", folder / "pico.yaml")
        soju(
            "check", folder / "pico.yaml", "data.drop_overlap=true",
            "evaluation.sets=[{name: held_out, pairs: [held_out.tsv]}]",
        )  # fmt: skip
    finally:
        (folder / "triplets_leak.jsonl").unlink()
    assert (folder / "triplets.jsonl").read_text(encoding="utf-8") == text


def test_held_out_head_words_are_no_single_term_triplets(folder):
    from soju.sparse.recipe import read_run_data

    values = read_config(folder / "pico.yaml", ["data.held_out_terms=0.4"])[0]
    training = read_run_data(RECIPE.configure(values, place="pico")).training
    unseen = {row.ko for row in training.unseen_terms}
    assert unseen
    single = {row.query for row in training.triplets if row.pair_type == "single_term"}
    assert single
    assert not unseen & single


def test_a_run_goes_on_from_a_run_of_mode_terms_with_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("soju.report.plots.draw_figures", no_figures)
    run_pico(tmp_path / "terms")
    student = f"student={{init: pretrained, model: {tmp_path / 'terms'}, max_length: 16}}"
    run_triplets(tmp_path / "triplets", student)
    assert (tmp_path / "triplets" / "static" / "model.safetensors").read_bytes() == (
        tmp_path / "terms" / "static" / "model.safetensors"
    ).read_bytes()
    before = SpladeEncoder(tmp_path / "terms" / "best", device="cpu").encode_sparse(TEXTS).toarray()
    start = SpladeEncoder(tmp_path / "triplets" / "untrained", device="cpu").encode_sparse(TEXTS).toarray()
    assert abs(before - start).max() < 1e-6
    assert read_json_lines(tmp_path / "triplets" / "history.jsonl")


@pytest.mark.slow
def test_a_run_starts_from_the_packaged_static_model(tmp_path, monkeypatch):
    monkeypatch.setattr("soju.report.plots.draw_figures", no_figures)
    run_triplets(tmp_path / "run", "student.static_model=ko-en-static", "training.max_steps=1")
    assert (tmp_path / "run" / "static" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["splade-v22", "splade-v23"])
def test_a_published_preset_is_checked_and_trained_with_a_pico_student(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soju.report.plots.draw_figures", no_figures)
    start = save_start(tmp_path / "start")
    pico = (
        f"data.root={folder}", "data.dev_triplets=[dev.jsonl]", f"student.model={start}", "student.max_length=16",
        "training.per_device_train_batch_size=4", "training.max_steps=3", "training.mixed_precision=off",
    )  # fmt: skip
    soju("check", name, *pico)
    soju("train", name, *pico, "--workers", 1)
    row = [row for row in read_json_lines(tmp_path / "runs" / name / "history.jsonl") if "loss" in row][-1]
    assert ("loss_share_margin" in row) == (name == "splade-v22")
    config = json.loads((tmp_path / "runs" / name / "best" / "config.json").read_text())
    assert {config[key] for key in config if "dropout" in key and config[key] is not None} == {0.1}
