"""Mode ``terms`` from end to end at the command line, on twelve sentence pairs, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from sentence_transformers import SparseEncoder

from fixtures.pico_terms import DEV, SCRATCH, WORDS, no_figures, save_start
from fixtures.small_bilingual import PAIRS, TERMS
from fixtures.without_soju import encode_without_soju
from soju.cli import app
from soju.core.errors import IntegrityError, UserError
from soju.core.files import read_json_lines, verify_manifest
from soju.sparse.indexing import Index, read_documents
from soju.sparse.model import load, load_encoder
from soju.sparse.neural_encoders import NeuralEncoder, spelled_pieces
from soju.sparse.splade import SpladeEncoder
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.term_activation import PROBES
from soju.training.checkpoints import list_checkpoints
from teachers.pico_teacher import save_pico_teacher

HELD_OUT = [
    ("의사가 학교에 갔다", "the doctor went to school"),
    ("학생이 바다를 찾는다", "a student looks for the sea"),
    ("책이 부족하다", "the book is scarce"),
    ("백신이 크다", "the vaccine is big"),
]
OTHER_WORDS = [("사람", "people"), ("보호", "protection"), ("부족", "scarcity"), ("크다", "big"), ("갔다", "went")]
TEXTS = ["백신", "의사가 책을 읽는다", "a student reads a book"]


def write_data(folder):
    """Write pairs, head words, a test set and ``pico.yaml``."""
    pairs = [f"{pair.ko}\t{pair.en}\n" for pair in PAIRS]
    (folder / "pairs.tsv").write_text("".join(pairs), encoding="utf-8")
    (folder / "held_out.tsv").write_text("".join(f"{ko}\t{en}\n" for ko, en in HELD_OUT), encoding="utf-8")
    rows = [{"ko": row.ko, "terms": [{"term": t.text, "sim": t.similarity} for t in row.terms]} for row in TERMS + DEV]
    rows += [{"ko": ko, "terms": [en]} for ko, en in OTHER_WORDS]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "terms.jsonl").write_text(text, encoding="utf-8")
    data = {**SCRATCH["data"], "root": str(folder), "pairs": ["pairs.tsv"], "terms": ["terms.jsonl"]}
    data |= {"dev_terms": 0.3, "held_out_terms": 0.25}
    sets = [{"name": "held_out", "pairs": ["held_out.tsv"]}]
    config = {**SCRATCH, "data": data, "evaluation": {**SCRATCH["evaluation"], "sets": sets}}
    (folder / "pico.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


def soju(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terms")
    write_data(folder)
    soju("train", folder / "pico.yaml", "--out", folder / "run", "--workers", 1)
    return folder


@pytest.fixture(scope="session")
def run(folder):
    return folder / "run"


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("soju.report.plots.draw_figures", no_figures)


def test_a_run_leaves_everything_the_report_promises(run):
    for name in ("config.yaml", "resolved.yaml", "environment.json", "data.json", "scores.json", "comparisons.json"):
        assert (run / name).stat().st_size > 0
    for name in ("report.html", "report.md", "best/README.md", "final/README.md", "plots/training_curves.png"):
        assert (run / name).stat().st_size > 0
    for name in ("best", "final", "static", "untrained"):
        verify_manifest(run / name)
    assert not list(run.rglob("*.bin"))
    soju("verify", run)


def test_rows_and_planned_steps_are_written_down_before_training(run):
    rows = json.loads((run / "data.json").read_text(encoding="utf-8"))["rows"]
    assert rows["kept"] >= len(PAIRS)
    assert rows["texts"] > rows["kept"] > rows["with_english"] / 2
    assert (rows["batches"], rows["steps"]) == (-(-rows["kept"] // 4), 12)


def test_history_holds_each_raw_loss_and_validations_show_the_probes(run):
    history = read_json_lines(run / "history.jsonl")
    trained = [row for row in history if "loss" in row]
    names = {"loss_self", "loss_korean", "loss_english", "loss_margin", "loss_flops", "loss_active_terms"}
    assert all(names <= row.keys() for row in trained)
    assert [row["step"] for row in history if "eval_ko + 2 en" in row] == [3, 6, 9, 12]
    probes = read_json_lines(run / "probes.jsonl")
    assert [row["step"] for row in probes] == [3, 6, 9, 12]
    assert probes[0]["top"].keys() == {probe.source for probe in PROBES}
    assert probes[0]["combined"] == pytest.approx(probes[0]["preservation"] + probes[0]["activation"])


def test_the_best_checkpoint_is_the_one_with_the_highest_validation_score(run):
    verdicts = read_json_lines(run / "verdicts.jsonl")
    assert all(row["passed"] for row in verdicts)
    step = max(verdicts, key=lambda row: row["scores"][0]["value"])["step"]
    assert any(path.name == f"checkpoint-{step}" for path in list_checkpoints(run / "checkpoints"))
    best = SpladeEncoder(run / "checkpoints" / f"checkpoint-{step}", device="cpu")
    np.testing.assert_array_equal(
        best.encode_sparse(TEXTS).toarray(), SpladeEncoder(run / "best", device="cpu").encode_sparse(TEXTS).toarray()
    )


def test_the_table_has_student_untrained_static_and_every_baseline(run):
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    ours = {"soju student", "untrained student", "soju static"}
    for direction in ("ko-en", "en-ko"):
        subjects = {s["subject"] for s in scores if s["test_set"] == f"held_out/{direction}"}
        assert subjects == {*ours, "BM25", "dictionary", "soju + BM25"}
    assert {s["subject"] for s in scores if s["name"] == "activation.en@50"} == ours
    signatures = {s["signature"] for s in scores if s["name"] == "activation.en@50"}
    assert len(signatures) == 1  # the same words, expected terms and vocabulary, so that they can be compared


def test_the_best_model_is_stock(run):
    stock = SparseEncoder(str(run / "best"), device="cpu")
    found = stock.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).float().numpy()
    encoder = load(run).encoder
    np.testing.assert_allclose(found, encoder.encode_queries(TEXTS).toarray(), atol=1e-5)


@pytest.mark.slow
def test_the_best_model_encodes_where_soju_cannot_be_imported(run):
    encoder = load(run).encoder
    found = encode_without_soju(run / "best", TEXTS)
    np.testing.assert_allclose(found, encoder.encode_queries(TEXTS).toarray(), atol=1e-4)


def test_a_neural_model_is_told_from_a_static_one(run):
    assert isinstance(load_encoder(run / "best"), NeuralEncoder)
    assert isinstance(load_encoder(run / "static"), StaticEncoder)


def test_an_altered_model_is_refused(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "model")


def test_spare_rows_of_a_head_have_names_too(run):
    tokenizer = load(run).encoder.model.tokenizer
    size = len(tokenizer)
    pieces = spelled_pieces(tokenizer, size)
    assert pieces[0] == "<unk>"
    assert spelled_pieces(tokenizer, size + 2) == (*pieces, f"<{size}>", f"<{size + 1}>")


def test_documents_of_a_cosine_model_have_length_one_and_queries_stay(run, tmp_path):
    model = SpladeEncoder(run / "best", device="cpu")
    plain = NeuralEncoder(model).encode_queries(TEXTS)
    np.testing.assert_array_equal(NeuralEncoder(model).encode_documents(TEXTS).toarray(), plain.toarray())
    model.similarity_fn_name = "cosine"
    documents = NeuralEncoder(model).encode_documents([*TEXTS, ""]).toarray()
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1)[:3], 1, rtol=1e-5)
    np.testing.assert_array_equal(NeuralEncoder(model).encode_queries(TEXTS).toarray(), plain.toarray())


def test_it_indexes_finds_across_languages_and_explains(run, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [("vaccine", "vaccines protect people"), ("sea", "the sea is big"), ("book", "a doctor reads a book")]
    corpus.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in rows), encoding="utf-8")
    index = Index.build(read_documents([str(corpus)]), run, tmp_path / "index")
    assert index.vectors.description.settings.weighting.kind == "as_is"
    for query, expected in (("백신", "vaccine"), ("바다", "sea"), ("책을 읽는다", "book")):
        best = index.search(query)[0]
        assert best.document_id == expected
        assert {term.term for term in best.matched} & {"vaccine", "sea", "book", "백신", "바다", "책"}
    vaccine = index.model.expand("백신", k=5)
    assert {term.term for term in vaccine} >= {"백신", "vaccine"}
    assert [term.weight for term in vaccine] == sorted((term.weight for term in vaccine), reverse=True)


def test_search_and_expansion_at_the_command_line(run, tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("vaccines protect people\nthe sea is big\n", encoding="utf-8")
    soju("index", run, corpus, tmp_path / "index")
    capsys.readouterr()
    soju("search", tmp_path / "index", "바다", "--json")
    (hit, *_) = json.loads(capsys.readouterr().out)["hits"]
    assert hit["passage"] == "the sea is big"
    soju("expand-text", run, "sea", "--top", "3", "--json")
    terms = json.loads(capsys.readouterr().out)["terms"]
    assert 1 < len(terms) <= 3
    assert "바다" in {term["term"] for term in terms}


def test_a_saved_student_is_scored_as_the_run_scored_it(folder, run, tmp_path):
    soju("evaluate", run, folder / "pico.yaml", "--out", tmp_path / "scores.json")
    again = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    before = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    for place in (("recall@1", "held_out/ko-en"), ("mrr@10", "held_out/en-ko")):
        found, expected = (
            [row["value"] for row in scores if (row["name"], row["test_set"], row["subject"]) == (*place, ours)]
            for scores, ours in ((again, "soju run"), (before, "soju student"))
        )
        assert found == expected
        assert len(found) == 1


def test_two_models_are_compared_query_by_query_and_on_the_probes(run, capsys):
    soju("compare", run, run, "--samples", 100)
    shown = capsys.readouterr().out
    assert "+0.0000" in shown
    assert "머신러닝" in shown
    soju("compare", run / "untrained", run / "best")
    assert "음성인식" in capsys.readouterr().out


def test_the_same_settings_give_the_same_bytes(folder, run, undrawn):
    soju("train", folder / "pico.yaml", "--out", folder / "again", "evaluation.sets=[]", "--workers", 1)
    for name in ("best", "final", "untrained", "static"):
        weights = f"{name}/model.safetensors"
        assert (folder / "again" / weights).read_bytes() == (run / weights).read_bytes(), name


def test_a_finished_run_can_be_resumed_and_stays_as_it_was(folder, run, undrawn):
    before = {name: (run / name / "model.safetensors").read_bytes() for name in ("best", "final")}
    history = (run / "history.jsonl").read_bytes()
    soju("train", folder / "pico.yaml", "--out", run, "--resume", "--workers", 1)
    for name, bytes_ in before.items():
        assert (run / name / "model.safetensors").read_bytes() == bytes_
    assert (run / "history.jsonl").read_bytes() == history
    soju("verify", run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "nowhere", "--resume"], "nowhere: no run to resume; train without --resume"),
        (["--out", "RUN", "--resume", "seed=2"], "began with other settings than these, see resolved.yaml in it"),
        (["--out", "RUN"], "holds a run already"),
        (["--out", "RUN", "--resume-from", "RUN/checkpoints/checkpoint-1"], "checkpoint-1/manifest.json: missing"),
        (["--out", "RUN", "--resume-from", "RUN/best"], "not a checkpoint; name a folder like"),
    ],
)
def test_what_cannot_be_resumed_is_refused(folder, run, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        soju("train", "pico.yaml", *(argument.replace("RUN", str(run)) for argument in arguments))
    assert message in str(refused.value)


def test_the_published_preset_trains_a_pretrained_student_of_a_teacher(tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.chdir(tmp_path)
    save_start(tmp_path / "start")
    save_pico_teacher(tmp_path / "teacher")
    rows = [{"ko": ko, "terms": list(terms)} for ko, *terms in WORDS]
    (tmp_path / "terms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pico = ["student.model=start", "student.max_length=16", "teacher.model=teacher", "teacher.cache=cache"]
    pico += [
        "teacher.max_length=16",
        "training.mixed_precision=off",
        "training.max_steps=2",
        "training.per_device_train_batch_size=4",
    ]
    pico += ["data.dev_terms=0.3", "data.held_out_terms=0.1", "losses.flops_cost=inverse", "training.logging_steps=1"]
    soju("check", "splade-v19", *pico)
    assert "No problem found" in capsys.readouterr().out
    soju("train", "splade-v19", *pico)
    history = read_json_lines(tmp_path / "runs/splade-v19/history.jsonl")
    assert [row["step"] for row in history if "loss" in row] == [1, 2]
    assert history[0]["loss_distillation"] > 0
    assert list((tmp_path / "cache").rglob("*.npy"))
    model = SparseEncoder("runs/splade-v19/best", device="cpu")
    assert type(model[0].model).__name__ == "XLMRobertaForMaskedLM"
    card = Path("runs/splade-v19/best/README.md").read_text(encoding="utf-8")
    assert "taught by teacher" in card


@pytest.mark.slow
def test_the_demo_trains_both_and_answers_across_languages(tmp_path, capsys):
    soju("demo", "--out", tmp_path / "demo")
    shown = capsys.readouterr().out
    assert "Training a neural student" in shown
    for name in ("static", "student"):
        assert (tmp_path / "demo" / name / "report.html").is_file()
    found = Index.open(tmp_path / "demo" / "student" / "index").search("심장 혈관이 막혔을 때 가슴 통증", k=3)
    assert any("heart" in {term.term for term in hit.matched} for hit in found)
