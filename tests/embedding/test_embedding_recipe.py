"""Recipe `embedding` from end to end at the command line, on the preset of the demo."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from embedding.pico_embedding import embedding_config, run_embedding, write_passages
from embedding.pico_expansion import save_pico_base
from soju.cli import app
from soju.core.errors import RegressionError, UserError
from soju.core.files import verify_manifest
from soju.embedding.adapters import load_float32
from soju.embedding.config import DistillationSettings
from soju.embedding.data import read_embedding_data
from soju.embedding.retention import KOREAN, RetentionCheck
from soju.embedding.scratch_base import make_scratch_base, projection, rows_from_teacher, taught_rows
from soju.embedding.trainer import transformer_of

QUICK = (
    "base.vocabulary=700", "base.donor_vocabulary=600", "base.hidden_size=16", "base.heads=2",
    "base.key_value_heads=1", "base.intermediate_size=32", "base.max_length=24", "base.tokenizer_texts=100",
    "base.distillation.max_steps=4", "base.distillation.texts=64", "expansion.init_probe=[mean, noise]",
    "expansion.probe_steps=1", "stage1.max_steps=2", "stage1.eval_steps=2", "stage2.max_steps=2",
    "stage2.eval_steps=2", "stage3.max_steps=2", "stage3.eval_steps=2", "retention.max_pairs=12",
    "retention.max_sentences=8", "retention.english_drop=2", "retention.korean_drop=2", "retention.min_cosine=-1",
    "evaluation.limit=8", "evaluation.resamples=100", "evaluation.timed_texts=4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def soju(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pico"
    result = soju("train", "embedding-pico", *QUICK, "--out", str(folder))
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def test_a_run_leaves_every_stage_as_a_stock_folder(finished):
    for name in ("base", "stage0", "stage1", "stage2", "stage3", "best", "final"):
        verify_manifest(finished / name)
        model = SentenceTransformer(str(finished / name), device="cpu")
        vectors = model.encode(["한국어", "English"], show_progress_bar=False)
        assert vectors.shape == (2, 16)
    assert soju("verify", str(finished)).exit_code == 0


def test_base_and_stages_are_measured_side_by_side(finished):
    scores = json.loads((finished / "scores.json").read_text(encoding="utf-8"))
    assert {score["subject"] for score in scores} == {"BASE", "S0", "S1", "S2", "S3"}
    assert {"spearman", "ndcg@10", "tokens", "parameters"} <= {score["name"] for score in scores}
    by = {(score["subject"], score["test_set"], score["name"]): score["value"] for score in scores}
    assert by["S0", "samples-en/en", "tokens"] == by["BASE", "samples-en/en", "tokens"]
    assert by["S0", "samples-ko/ko", "tokens"] < by["BASE", "samples-ko/ko", "tokens"]
    for stage in ("S0", "S1"):  # old rows are frozen: English vectors are the same bits
        assert by[stage, "samples-en", "spearman"] == by["BASE", "samples-en", "spearman"]


def test_the_report_shows_curves_neighbours_and_drift(finished):
    page = (finished / "report.md").read_text(encoding="utf-8")
    for part in (
        "stage1: losses",
        "stage2: what the retention check saw",
        "how far they turned",
        "Length of rows",
        "S3",
    ):
        assert part in page
    searches = json.loads((finished / "searches.json").read_text(encoding="utf-8"))
    assert {search["engine"] for search in searches} == {"rows nearest in S0", "rows nearest in S3"}
    card = (finished / "best" / "README.md").read_text(encoding="utf-8")
    assert "SentenceTransformer" in card
    assert "trust_remote_code" not in card  # linear adapters were folded
    again = soju("report", str(finished))
    assert again.exit_code == 0
    assert (finished / "report.md").read_text(encoding="utf-8") == page


def test_the_probe_records_what_each_initialiser_came_to(finished):
    probe = json.loads((finished / "training" / "probe" / "probe.json").read_text(encoding="utf-8"))
    assert probe.keys() == {"mean", "noise"}
    assert all(KOREAN in found["after"] for found in probe.values())


def test_a_finished_run_that_is_resumed_changes_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("stage*/model.safetensors")}
    result = soju("train", "embedding-pico", *QUICK, "--out", str(finished), "--resume")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("stage*/model.safetensors")} == before


def test_a_stage_that_is_not_accepted_ends_the_run_with_a_report_of_the_rest(tmp_path, monkeypatch):
    write_passages(tmp_path)
    original = RetentionCheck.__call__
    seen = []

    def look(self, model, *args, **more):
        found = original(self, model, *args, **more)
        if hasattr(self, "of_base"):
            seen.append(None)
            found[KOREAN] = 0.5 if len(seen) == 1 else 0.1
        return found

    monkeypatch.setattr(RetentionCheck, "__call__", look)
    quick = ("stages=[0, 1]", "stage1.max_steps=2", "retention.korean_drop=0.1", "retention.max_rollbacks=0")
    with pytest.raises(RegressionError, match="korean_spearman"):
        run_embedding(tmp_path / "run", tmp_path, *quick)
    assert "stage after stage0 was not accepted" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    verify_manifest(tmp_path / "run" / "best")
    assert not (tmp_path / "run" / "stage1").exists()


@pytest.fixture
def data(tmp_path):
    write_passages(tmp_path)
    return read_embedding_data(embedding_config(tmp_path))


def test_a_base_is_made_once_and_by_seed_alone(data, tmp_path):
    settings = embedding_config(tmp_path).base
    first, donor = make_scratch_base(settings, data, tmp_path / "a", seed=1)
    written = (first / "model.safetensors").stat().st_mtime_ns
    make_scratch_base(settings, data, tmp_path / "a", seed=1)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    again, _ = make_scratch_base(settings, data, tmp_path / "b", seed=1)
    other, _ = make_scratch_base(settings, data, tmp_path / "c", seed=2)
    bits = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert bits[0] == bits[1] != bits[2]
    assert (donor / "tokenizer.json").is_file()


class TwoDimensions:
    """Stands for a teacher of width 4 whose vectors hold two numbers only."""

    identity: ClassVar = {"model": "two"}

    def __init__(self, *_, **__):
        pass

    def embed(self, texts):
        angles = torch.linspace(0.1, 1.4, len(texts))
        return torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], dim=1).numpy()


def test_korean_sides_are_taught_the_vector_of_the_english(data, tmp_path, monkeypatch):
    monkeypatch.setattr("soju.embedding.scratch_base.SentenceTransformerTeacher", TwoDimensions)
    settings = embedding_config(
        tmp_path, "base.distillation.teacher=two", "base.distillation.pair_share=0.5",
        f"base.distillation.cache={tmp_path / 'cache'}", "base.distillation.texts=20",
    ).base.distillation  # fmt: skip
    rows = taught_rows(settings, data)
    korean = {pair.ko: pair.en for pair in data.pairs}
    assert len(rows) == 30
    for text, target in zip(rows.texts[20:], rows.target_of[20:], strict=True):
        assert rows.texts[target] == korean[text]


def test_a_narrower_student_keeps_the_teachers_cosines_as_far_as_they_fit():
    taught = TwoDimensions().embed(["a"] * 5)
    reduced = taught @ projection(taught, 2).numpy().T
    torch.testing.assert_close(torch.from_numpy(reduced @ reduced.T), torch.from_numpy(taught @ taught.T))
    assert projection(taught, 4) is None
    with pytest.raises(UserError, match="wider than the teacher"):
        projection(taught, 8)


def test_tokens_start_at_the_teachers_vectors_of_their_text_and_parts_of_characters_stay(tmp_path, monkeypatch):
    class Angles:
        def __init__(self, name):
            self.identity = {"model": name}

        def embed(self, texts):
            angles = np.array([sum(text.encode()) for text in texts], np.float64)
            found = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            return found.astype(np.float32)

    monkeypatch.setattr("soju.embedding.scratch_base.SentenceTransformerTeacher", Angles)
    model = load_float32(save_pico_base(tmp_path / "base"))
    old_VD = transformer_of(model).get_input_embeddings().weight.detach().clone()
    width = old_VD.shape[1]
    project_DT = torch.eye(width)[:, :2]
    rows_from_teacher(model, DistillationSettings(teacher="angles", cache=tmp_path / "cache"), project_DT)
    new_VD = transformer_of(model).get_input_embeddings().weight.detach()
    (word,) = model.tokenizer("the", add_special_tokens=False)["input_ids"]
    assert float(new_VD[word].norm()) == pytest.approx(width**0.5, rel=1e-5)
    moved = {token for token in range(len(model.tokenizer)) if not torch.equal(old_VD[token], new_VD[token])}
    readable = {
        token
        for token in set(range(len(model.tokenizer))) - set(model.tokenizer.all_special_ids)
        if (text := model.tokenizer.decode([token]).strip()) and "\ufffd" not in text
    }
    assert moved == readable
    assert len(readable) < len(model.tokenizer) - len(model.tokenizer.all_special_ids)
