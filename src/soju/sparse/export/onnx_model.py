"""A folder that onnxruntime and tokenizers serve, without torch and without soju.

Shape letters: B = texts, S = tokens of the longest text, V = terms, K = terms kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest, write_text
from soju.sparse.export.fidelity import fidelity
from soju.sparse.export.onnx_graph import INPUTS, OUTPUTS, open_graph, quantise, require_onnx, write_graph
from soju.sparse.export.onnx_readme import onnx_readme

GRAPH, INT8_GRAPH, SETTINGS, TERMS = "model.onnx", "model.int8.onnx", "soju_onnx.json", "terms.json"
TOLERANCE = 1e-4
"""Largest difference of a weight that is taken for rounding."""
PARITY_TEXTS = (
    "검색",
    "search",
    "인공지능이 병을 진단할 수 있나요?",
    "how do vaccines protect people from infectious diseases",
    "GPU 서버에서 machine learning 모델을 학습하는 방법",
    "한국어와 영어가 섞인 긴 글도 같은 뜻의 낱말을 찾아야 하며, 조사와 어미가 붙은 말도 놓치지 않아야 한다.",
    "A passage of several sentences. It has commas, numbers such as 42 and 3.14, and names like Seoul. It ends here.",
    "東京 naïve café 🙂 <unk> [MASK]",
    "",
)
"""What a written graph is compared with the model on: both languages, short and long, odd characters, nothing."""


@dataclass(frozen=True)
class OnnxSource:
    """What is exported."""

    model: nn.Module
    """The masked language model, float32, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[Sequence[str]], csr_array]
    """The exact weights of texts, ``(B, V)``."""
    terms: Sequence[str]
    """Readable name of every term, by id."""
    max_length: int
    """Tokens after which texts are cut."""
    activations: int = 1
    """How often ``log1p(relu)`` is taken."""
    about: dict[str, Any] = field(default_factory=dict)
    """Written into the settings: ``source_sha256``, ``similarity``, ``prompt``."""


def export_onnx(target: Path, source: OnnxSource, *, k: int = 128, int8: bool = False) -> dict[str, Any]:
    """Write the folder and compare what it gives with the model.

    Args:
        target: A new folder.
        source: What to export.
        k: Terms to keep of each text.
        int8: Also write the graph with int8 weights. How close it comes is measured and written down; what is close
            enough is for the reader to say.

    Returns:
        The settings as written, with ``parity`` and, with int8, ``int8``.

    Raises:
        MissingExtraError: If ONNX is not installed.
        UserError: If the vocabulary has fewer than k terms, the tokenizer has no fast form, or a weight of the graph
            is off by more than `TOLERANCE`. Nothing is left behind.
    """
    require_onnx()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        tokenizer = _write_tokenizer(folder, source)
        opset = write_graph(folder / GRAPH, source.model, k=k, terms=len(source.terms), activations=source.activations)
        settings: dict[str, Any] = {
            "k": k,
            "max_length": source.max_length,
            "terms": len(source.terms),
            "prompt": "",
            "split_special_tokens": tokenizer.encode_special_tokens,
            "inputs": {name: ["batch", "sequence", "int64"] for name in INPUTS},
            "outputs": dict(zip(OUTPUTS, (["batch", k, "int64"], ["batch", k, "float32"]), strict=True)),
            "opset": opset,
            **source.about,
            "versions": {
                name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
            },
        }
        exact_BV = source.encode(PARITY_TEXTS)
        graph_BV, settings["parity"] = _parity(folder / GRAPH, tokenizer, exact_BV, settings)
        if int8:
            settings["int8"] = _int8(folder, tokenizer, graph_BV, settings)
        write_json(folder / SETTINGS, settings)
        write_json(folder / TERMS, list(source.terms))
        write_text(folder / "README.md", onnx_readme(target.name, settings))
        write_manifest(folder)
        folder.rename(target)
    return settings


def run_graph(
    session: Any, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Encode texts as one batch; returns term ids and weights, both ``(B, K)``, heaviest first."""
    encodings = tokenizer.encode_batch(list(texts))
    rows = {"input_ids": [e.ids for e in encodings], "attention_mask": [e.attention_mask for e in encodings]}
    ids_BK, weights_BK = session.run(OUTPUTS, {name: np.array(rows[name], np.int64) for name in INPUTS})
    return ids_BK, weights_BK


def as_matrix(ids_BK: NDArray[np.int64], weights_BK: NDArray[np.float32], terms: int) -> csr_array:
    """Return what a graph gave as ``(B, V)``, without the spare places."""
    text_E, place_E = np.nonzero(weights_BK)
    values_E = weights_BK[text_E, place_E]
    return csr_array((values_E, (text_E, ids_BK[text_E, place_E])), shape=(len(ids_BK), terms))


def largest_difference(exact_V: NDArray[np.float32], ids_K: NDArray[np.int64], weights_K: NDArray[np.float32]) -> float:
    """Return how far a text's heaviest terms are from the exact weights.

    Args:
        exact_V: Exact weights.
        ids_K: Term ids of the graph.
        weights_K: Their weights, heaviest first.

    Returns:
        The largest difference of a weight, or by how much a term left out outweighs the lightest one kept; infinite
        where something is no number.
    """
    left_out_V = exact_V.copy()
    left_out_V[ids_K] = 0
    differences = [left_out_V.max() - weights_K[-1], *np.abs(exact_V[ids_K] - weights_K)]
    return max(0.0, *(float(value) if np.isfinite(value) else float("inf") for value in differences))


def _write_tokenizer(folder: Path, source: OnnxSource) -> Tokenizer:
    """Write the tokenizer so that it cuts and pads by itself; returns it as it is read from there."""
    wrapped = source.tokenizer
    if not wrapped.is_fast or wrapped.pad_token is None:
        raise UserError("the model's tokenizer has no tokenizer.json or no padding token; export needs both")
    wrapped.save_pretrained(folder)
    tokenizer = Tokenizer.from_str(wrapped.backend_tokenizer.to_str())
    tokenizer.enable_truncation(source.max_length)
    tokenizer.enable_padding(pad_id=wrapped.pad_token_id, pad_token=wrapped.pad_token, direction=wrapped.padding_side)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    read = Tokenizer.from_file(str(path))
    read.encode_special_tokens = bool(wrapped.split_special_tokens)  # no file keeps it
    return read


def _parity(
    path: Path, tokenizer: Tokenizer, exact_BV: csr_array, settings: dict[str, Any]
) -> tuple[csr_array, dict[str, Any]]:
    """Compare the graph with the model, all texts in one batch with padding and each alone."""
    session = open_graph(path)
    texts = [settings["prompt"] + text for text in PARITY_TEXTS]
    together = run_graph(session, tokenizer, texts)
    worst = 0.0
    for row, text in enumerate(texts):
        exact_V = exact_BV[[row]].toarray()[0]
        found = [(together[0][row], together[1][row])]
        if tokenizer.encode(text).ids:
            ids_BK, weights_BK = run_graph(session, tokenizer, [text])
            found.append((ids_BK[0], weights_BK[0]))
        worst = max(worst, *(largest_difference(exact_V, *pair) for pair in found))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{GRAPH}: weights are off by up to {worst:.2g}, more than {TOLERANCE:g}, so it was not kept; export with "
            "the versions of constraints.txt, and report the model if that does not help"
        )
    figures = {"texts": len(texts), "largest_difference": worst, "tolerance": TOLERANCE}
    return as_matrix(*together, settings["terms"]), figures


def _int8(folder: Path, tokenizer: Tokenizer, graph_BV: csr_array, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the int8 graph and compare its heaviest terms with those of the other."""
    quantise(folder / GRAPH, folder / INT8_GRAPH)
    texts = [settings["prompt"] + text for text in PARITY_TEXTS]
    int8_BV = as_matrix(*run_graph(open_graph(folder / INT8_GRAPH), tokenizer, texts), settings["terms"])
    measured = fidelity(graph_BV, int8_BV, top=sorted({min(10, settings["k"]), settings["k"]}))
    names = [name for name in measured if name.startswith(("texts", "cosine", "top_"))]
    return {
        "file": INT8_GRAPH,
        "bytes": _bytes(folder, INT8_GRAPH),
        "bytes_float32": _bytes(folder, GRAPH),
        **{name: measured[name] for name in names},
    }


def _bytes(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))
