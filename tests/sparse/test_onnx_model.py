"""Graphs that end in the heaviest terms, served by onnxruntime alone."""

import ast
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput

from fixtures.pico_masked_lms import NEEDED, OTHERS, build
from soju.core.errors import MissingExtraError, UserError
from soju.core.files import verify_manifest
from soju.sparse.export import onnx
from soju.sparse.export.formats import export, export_graph
from soju.sparse.export.onnx import (
    PARITY_TEXTS,
    HeaviestTerms,
    as_matrix,
    export_onnx,
    largest_difference,
    open_graph,
    run_graph,
)
from soju.sparse.model import load
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.splade import SpladeEncoder

K = 24
TEXTS = [*NEEDED, *OTHERS, "검색", ""]


@functools.cache
def encoder_of(kind):
    model, tokenizer = build(kind)
    with torch.no_grad():
        model.get_output_embeddings().bias -= 0.5  # some texts then have fewer than K terms, and all have some
    return NeuralEncoder(SpladeEncoder.from_model(model, tokenizer, max_seq_length=32, device="cpu"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """ModernBERT, the architecture of our students, with the int8 graph."""
    folder = tmp_path_factory.mktemp("onnx") / "modern"
    written = export_graph(encoder_of("modern-bpe"), folder, top_terms=K, int8=True, fingerprint="ab" * 32)
    return folder, written


def tokenizer_of(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "soju_onnx.json").read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = settings["split_special_tokens"]
    return tokenizer


def graph_of(folder, name="model.onnx"):
    session, tokenizer = open_graph(folder / name), tokenizer_of(folder)
    return lambda texts: run_graph(session, tokenizer, texts)


def assert_heaviest(exact_BV, ids_BK, weights_BK):
    """The weights are the K largest in falling order, each with an id of that weight."""
    dense = exact_BV.toarray()
    np.testing.assert_allclose(weights_BK, -np.sort(-dense, axis=1)[:, : weights_BK.shape[1]], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(dense, ids_BK, axis=1), weights_BK, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in ids_BK.tolist())


@pytest.mark.parametrize("count", [1, 5, len(TEXTS)])
def test_a_batch_has_the_heaviest_terms_of_the_model_heaviest_first(exported, count):
    # lengths and batch sizes differ from those the graph was traced with, and the batches hold padding
    assert_heaviest(encoder_of("modern-bpe").encode_queries(TEXTS[:count]), *graph_of(exported[0])(TEXTS[:count]))


def test_padding_changes_no_vector(exported):
    run = graph_of(exported[0])
    ids_BK, weights_BK = run(TEXTS)
    for row, text in enumerate(TEXTS[:-1]):  # alone, nothing is no sequence for a tokenizer without a start token
        alone_ids, alone = run([text])
        np.testing.assert_allclose(alone[0], weights_BK[row], atol=1e-6)
        heavy = alone[0] > alone[0][-1] + 1e-5
        assert set(alone_ids[0][heavy]) <= set(ids_BK[row])


def test_a_text_beyond_the_length_is_cut_where_the_model_cuts_it(exported):
    long = " ".join(NEEDED + OTHERS)
    assert len(tokenizer_of(exported[0]).encode(long).ids) == 32
    assert_heaviest(encoder_of("modern-bpe").encode_queries([long]), *graph_of(exported[0])([long]))


def test_the_folder_says_what_it_holds(exported):
    folder, written = exported
    verify_manifest(folder)
    settings = json.loads((folder / "soju_onnx.json").read_text(encoding="utf-8"))
    assert settings == written
    assert (settings["k"], settings["max_length"], settings["source_sha256"]) == (K, 32, "ab" * 32)
    assert settings["parity"]["texts"] == len(PARITY_TEXTS)
    assert 0 < settings["parity"]["largest_difference"] < 1e-5
    assert len(json.loads((folder / "terms.json").read_text(encoding="utf-8"))) == settings["terms"]
    assert re.search(r"/(?:tmp|home|root|work|usr)/", (folder / "model.onnx").read_bytes().decode("latin-1")) is None


def test_the_graph_gives_the_heaviest_terms_and_no_logits(exported):
    outputs = {
        output.name: (output.shape, output.type) for output in open_graph(exported[0] / "model.onnx").get_outputs()
    }
    assert outputs == {"term_ids": (["batch", K], "tensor(int64)"), "weights": (["batch", K], "tensor(float)")}


def test_int8_is_smaller_and_says_how_close_it_is(exported):
    folder, written = exported
    figures = written["int8"]
    assert (folder / "model.int8.onnx").stat().st_size == figures["bytes"] < figures["bytes_float32"]
    assert 0.5 < figures["top_10_overlap"] <= 1
    assert 0.9 < figures["cosine_p5"] <= figures["cosine_mean"] <= 1
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"shares {figures['top_10_overlap']:.3f} of the 10 heaviest terms" in readme
    int8, exact = (
        as_matrix(*graph_of(folder, name)(TEXTS), written["terms"]) for name in ("model.int8.onnx", "model.onnx")
    )
    assert abs(int8 - exact).max() > 0


def test_the_program_of_the_readme_runs_where_torch_and_soju_cannot_be_imported(exported):
    folder, _ = exported
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(program.strip().splitlines()) <= 20
    refuse = (
        "import sys\nclass Refuse:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('soju', 'torch', 'transformers', 'sentence_transformers'):\n"
        "            raise ImportError(name)\nsys.meta_path.insert(0, Refuse())\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-X", "utf8", "-c", refuse + program],
        cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=300, env={"PATH": "", "HOME": "/"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    encoder = encoder_of("modern-bpe")
    vectors = encoder.encode_queries(["검색 엔진", "a search engine"]).toarray()
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    for weights_V, pairs in zip(vectors, printed, strict=True):
        expected = -np.sort(-weights_V)[: min(K, np.count_nonzero(weights_V))]
        np.testing.assert_allclose([weight for _, weight in pairs], expected, atol=1e-4)
        assert pairs[0][0] == encoder.terms[weights_V.argmax()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "byte-bpe", "word-piece"])
def test_other_architectures_give_the_heaviest_terms_of_the_model(tmp_path, kind):
    encoder = encoder_of(kind)
    export_graph(encoder, tmp_path / "out", top_terms=K, fingerprint="")
    assert_heaviest(encoder.encode_queries(TEXTS), *graph_of(tmp_path / "out")(TEXTS))


class Table(nn.Module):
    """Two tokens, three terms; the logits of a token are its row."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor([[1.0, -2.0, 0.0], [0.5, -1.0, np.e - 1], [9.0, 9.0, 9.0]]))

    def forward(self, input_ids, attention_mask):
        return MaskedLMOutput(logits=self.rows[input_ids])


def test_weights_worked_by_hand():
    ids, weights = HeaviestTerms(Table(), k=2)(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1, 1], [1, 0]]))
    # maxima of the first text: 1, -1, e - 1; of the second, whose other token is padding: 1, -2, 0
    assert ids[0].tolist() == [2, 0]
    torch.testing.assert_close(weights, torch.tensor([[1.0, np.log(2)], [np.log(2), 0.0]], dtype=torch.float32))


def test_a_text_of_padding_alone_weighs_nothing():
    _, weights = HeaviestTerms(Table(), k=3)(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


def test_log1p_relu_is_taken_as_often_as_the_model_does():
    _, weights = HeaviestTerms(Table(), k=1, activations=2)(torch.tensor([[1]]), torch.tensor([[1]]))
    torch.testing.assert_close(weights, torch.tensor([[np.log(2.0)]], dtype=torch.float32))


@pytest.mark.parametrize(
    ("ids", "weights", "expected"),
    [
        ([1, 2], [3.0, 2.0], 0.0),
        ([1, 2], [3.0, 1.5], 0.5),  # a weight is off
        ([1, 0], [3.0, 1.0], 1.0),  # term 2 was left out for term 0
        ([1, 2], [3.0, float("nan")], float("inf")),
    ],
)
def test_the_difference_counts_wrong_weights_and_terms_left_out(ids, weights, expected):
    exact = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    assert largest_difference(exact, np.array(ids), np.array(weights, np.float32)) == pytest.approx(expected)


def test_a_graph_that_differs_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    write = onnx.write_graph

    def other(path, model, **options):
        return write(path, build("modern-bpe", seed=1)[0], **options)

    monkeypatch.setattr(onnx, "write_graph", other)
    with pytest.raises(UserError, match="weights are off by up to"):
        export_graph(encoder_of("modern-bpe"), tmp_path / "out", top_terms=4, fingerprint="")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    encoder = encoder_of("modern-bpe")
    with pytest.raises(UserError, match=r"--top-terms 100000: the model has [\d,]+ terms"):
        export_graph(encoder, tmp_path / "out", top_terms=100_000, fingerprint="")
    with pytest.raises(UserError, match=r"a static model has no network.*tsv, query-tokens, stock-static, low-rank"):
        export_graph(load("ko-en-static").encoder, tmp_path / "out", fingerprint="")
    with pytest.raises(UserError, match="copy its folder, or use --to onnx"):
        export(encoder, tmp_path / "out", "tsv")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_graph(encoder, tmp_path / "taken", fingerprint="")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'soju\[export\]'"):
        export_graph(encoder, tmp_path / "out", fingerprint="")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_exporting_needs_a_tokenizer_that_stands_alone(tmp_path):
    class Slow:
        is_fast, pad_token = False, "<pad>"

    source = onnx.OnnxSource(nn.Identity(), Slow(), list, [], 8)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        export_onnx(tmp_path / "out", source)
