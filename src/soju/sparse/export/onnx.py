"""A neural model as a folder that onnxruntime and tokenizers serve, without torch and without soju.

The graph ends in the heaviest terms of each text. What it gives is compared with the model before the folder is kept.

Shape letters: B = texts, S = tokens of the longest text, V = terms, K = terms kept.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from soju.core.errors import UserError, require_extra
from soju.core.files import write_json, write_manifest, write_text

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("term_ids", "weights")
_EXAMPLE = (2, 7)
"""Texts and tokens the graph is traced with; both are dynamic in the graph."""


class HeaviestTerms(nn.Module):
    """Token ids in, the k heaviest terms out: ``topk(log1p(relu(max over tokens of the logits)))``.

    The maximum comes first, which gives the same weights, since ``log1p(relu(x))`` never falls, and takes the logarithm
    of V numbers a text instead of S·V.

    Args:
        model: Gives ``logits``, ``(B, S, V)``.
        k: Terms to keep, 1 to V.
        activations: How often ``log1p(relu)`` is taken; twice with sentence-transformers' ``log1p_relu``.
    """

    def __init__(self, model: nn.Module, *, k: int, activations: int = 1) -> None:
        super().__init__()
        self.model = model
        self.k = k
        self.activations = activations

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return term ids and weights, both ``(B, K)``, heaviest first; spare places weigh 0."""
        logits_BSV = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        lowest = torch.finfo(logits_BSV.dtype).min
        weights_BV = logits_BSV.masked_fill(attention_mask[:, :, None] == 0, lowest).amax(dim=1)
        for _ in range(self.activations):
            weights_BV = torch.log1p(torch.relu(weights_BV))
        weights_BK, ids_BK = torch.topk(weights_BV, self.k, dim=1)
        return ids_BK, weights_BK


def write_graph(path: Path, model: nn.Module, *, k: int, terms: int, activations: int = 1) -> int:
    """Write the graph; beyond 2 GB, which a file of this format cannot hold, the weights stand beside it.

    Args:
        path: ``.onnx`` file.
        model: See `HeaviestTerms`; float32, on the CPU.
        k: Terms to keep.
        terms: V.
        activations: See `HeaviestTerms`.

    Returns:
        The version of the operator set.

    Raises:
        MissingExtraError: If ONNX is not installed.
        UserError: If the vocabulary has fewer than k terms, or the exporter cannot trace the model.
    """
    require_onnx()
    if k > terms:
        raise UserError(f"--top-terms {k}: the model has {terms:,} terms; ask for at most that many")
    shape = torch.Size(_EXAMPLE)
    input_ids = torch.arange(shape.numel()).remainder(terms).reshape(shape)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                HeaviestTerms(model, k=k, activations=activations).eval(),
                (input_ids, attention_mask),
                dynamo=True,
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                input_names=INPUTS,
                output_names=OUTPUTS,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"{type(model).__name__} cannot be traced ({why}); serve its folder with sentence-transformers instead"
        ) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(path)
    return int(program.model.opset_imports[""])


def quantise(source: Path, target: Path) -> None:
    """Write the graph with the weights of its matrix products in int8, one scale a column; activations are dynamic."""
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def open_graph(path: Path) -> Any:
    """Open a graph on the CPU with onnxruntime."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def require_onnx() -> None:
    """Raise `MissingExtraError` unless everything that writes and runs graphs is installed."""
    require_extra("ONNX export", "export")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' notes about themselves from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def onnx_readme(name: str, settings: dict[str, Any]) -> str:
    """Write the README of a folder from what was measured when it was written."""
    int8 = ""
    if "int8" in settings:
        figures = settings["int8"]
        overlaps = [
            f"{value:.3f} of the {key.split('_')[1]} heaviest terms"
            for key, value in figures.items()
            if key.startswith("top_")
        ]
        int8 = _INT8.format(overlaps=" and ".join(overlaps), **figures)
    return _README.format(
        name=name, usage=USAGE, k=settings["k"], max_length=settings["max_length"], int8=int8,
        worst=settings["parity"]["largest_difference"], texts=settings["parity"]["texts"],
    )  # fmt: skip


USAGE = """import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(".")  # this one
settings, terms = (json.loads((folder / name).read_text("utf-8")) for name in ("soju_onnx.json", "terms.json"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = settings["split_special_tokens"]
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
tokens = tokenizer.encode_batch([settings["prompt"] + text for text in ("검색 엔진", "a search engine")])
rows = {"input_ids": [t.ids for t in tokens], "attention_mask": [t.attention_mask for t in tokens]}
outputs = session.run(["term_ids", "weights"], {name: np.array(ids, np.int64) for name, ids in rows.items()})
for ids, weights in zip(*outputs):
    print([(terms[i], round(float(w), 4)) for i, w in zip(ids, weights) if w > 0])
"""

_README = """# {name}

A cross-lingual sparse encoder for Korean and English as an ONNX graph, written by `soju export --to onnx`. It takes
`input_ids` and `attention_mask`, int64 `(batch, sequence)`, and gives `term_ids`, int64, and `weights`, float32, both
`(batch, {k})`: the {k} heaviest terms of each text, heaviest first. A text with fewer terms has weight 0 in the places
left over, whose ids mean nothing. Texts are cut after {max_length} tokens.

`pip install numpy onnxruntime tokenizers` is all it needs:

```python
{usage}```

On {texts} texts, in one padded batch and one by one, no weight of `model.onnx` differs from the model's by more than
{worst:.1e}; a difference above 1e-4 is refused when the folder is written.
{int8}
`soju_onnx.json` says what was exported with which versions. The logits inside the graph take 4 · batch · sequence ·
terms bytes while a batch is computed; keep batches of long texts small.
"""

_INT8 = """
`model.int8.onnx` has int8 weights ({bytes:,} bytes instead of {bytes_float32:,}). On {texts} texts it shares {overlaps}
with `model.onnx`; the mean cosine of their vectors is {cosine_mean:.4f}, the 5th percentile {cosine_p5:.4f}.
"""


def fidelity(
    exact_BV: csr_array, stock_BV: csr_array, *, folder: Path | None = None, top: Sequence[int] = (10, 50)
) -> dict[str, float | int]:
    """Compare the vectors of the same texts.

    Args:
        exact_BV: Vectors of the exact encoder, ``(B, V)``, finite, >= 0.
        stock_BV: Vectors of the stock form, ``(B, V)``.
        folder: The saved stock form, for its size.
        top: For each k, the share of the k heaviest exact terms that are among the k heaviest stock terms (texts with
            fewer exact terms: that many). Equal weights rank by term id.

    Returns:
        ``texts`` (those with an exact term), ``empty_texts`` (left out), ``cosine_mean``, ``cosine_p5`` (a stock vector
        of no terms has cosine 0), ``top_K_overlap`` in [0, 1], ``exact_active_terms`` and ``stock_active_terms`` per
        text, ``spurious_mass`` (share of the stock weight on terms without exact weight) and ``bytes`` of the folder.

    Raises:
        UserError: If the shapes differ or no text has a term.
    """
    if exact_BV.shape != stock_BV.shape:
        raise UserError(f"exact vectors are {exact_BV.shape}, stock ones {stock_BV.shape}; encode the same texts")
    kept = np.flatnonzero(np.asarray(exact_BV.sum(axis=1)).ravel() > 0)
    if not len(kept):
        raise UserError("no text has a term of the vocabulary; pass other texts")
    exact, stock = csr_array(exact_BV)[kept].astype(np.float64), csr_array(stock_BV)[kept].astype(np.float64)
    norms = np.sqrt(np.asarray(exact.power(2).sum(axis=1)) * np.asarray(stock.power(2).sum(axis=1))).ravel()
    cosines = np.asarray(exact.multiply(stock).sum(axis=1)).ravel() / np.maximum(norms, 1e-12)
    on_exact = float(stock.multiply(exact > 0).sum())
    result: dict[str, float | int] = {
        "texts": len(kept),
        "empty_texts": exact_BV.shape[0] - len(kept),
        "cosine_mean": float(cosines.mean()),
        "cosine_p5": float(np.quantile(cosines, 0.05)),
        **{f"top_{k}_overlap": _overlap(exact, stock, k) for k in top},
        "exact_active_terms": float(np.mean((exact > 0).sum(axis=1))),
        "stock_active_terms": float(np.mean((stock > 0).sum(axis=1))),
        "spurious_mass": 1 - on_exact / max(float(stock.sum()), 1e-12),
    }
    if folder is not None:
        result["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return result


def _overlap(exact: csr_array, stock: csr_array, k: int) -> float:
    shares = []
    for row in range(exact.shape[0]):
        wanted = _top(exact, row, k)
        shares.append(len(set(wanted) & set(_top(stock, row, len(wanted)))) / len(wanted))
    return float(np.mean(shares))


def _top(vectors: csr_array, row: int, k: int) -> list[int]:
    start, stop = vectors.indptr[row : row + 2]
    terms, weights = vectors.indices[start:stop], vectors.data[start:stop]
    order = np.lexsort((terms, -weights))
    return [int(term) for term in terms[order][:k]]


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
