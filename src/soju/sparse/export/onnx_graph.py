"""A masked language model as an ONNX graph that ends in the heaviest terms of each text.

Shape letters: B = texts, S = tokens of the longest text, V = terms, K = terms kept.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soju.core.errors import MissingExtraError, UserError

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
    """Write the graph with the weights of its matrix products in int8, one scale a column; activations are dynamic.

    Args:
        source: What `write_graph` wrote.
        target: ``.onnx`` file.
    """
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
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        raise MissingExtraError("ONNX export", "export")


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
