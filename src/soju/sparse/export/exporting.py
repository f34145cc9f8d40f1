"""Write a model in the formats of other programs. What ``soju export`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.search.weighting import idf
from soju.sparse.encoders import TermEncoder
from soju.sparse.export.query_tokens import write_token_table
from soju.sparse.export.term_table import write_term_table
from soju.sparse.static.static_encoder import StaticEncoder

Format = Literal["tsv", "query-tokens", "stock-static", "low-rank", "onnx", "inference-free"]
FORMATS: dict[Format, str] = {
    "tsv": "a file of source, target and weight",
    "query-tokens": "a JSONL file of the weighted terms of every piece, for OpenSearch and its kin",
    "stock-static": "a SparseEncoder folder of the unexpanded side: one weight a piece",
    "low-rank": "a SparseEncoder folder of the expanded side, approximate",
    "onnx": "a folder for onnxruntime: a graph that ends in the heaviest terms",
    "inference-free": "a SparseEncoder folder whose queries are looked up in an idf table",
}


def export(
    encoder: TermEncoder, target: Path, form: Format, *, prior_documents: float = 10_000, hidden_size: int = 512
) -> None:
    """Write one format of a static model.

    Args:
        encoder: The model.
        target: File or folder, must not exist.
        form: One of `FORMATS` but ``onnx``, which is `export_graph`, and ``inference-free``, which is
            `soju.sparse.export.make_inference_free.make_inference_free`.
        prior_documents: Weight of the training text in the idf that query weights carry outside an index of ours.
        hidden_size: Width of the low-rank form.

    Raises:
        UserError: If the target exists, or the model is a neural one, which is in its stock form already.
    """
    _refuse_taken(target)
    if not isinstance(encoder, StaticEncoder):
        raise UserError(
            "a neural model is saved as sentence-transformers loads it; copy its folder, "
            "or use --to onnx or inference-free"
        )
    if form == "tsv":
        write_term_table(target, encoder.translations_VV, encoder.terms)
    elif form == "query-tokens":
        idf_V = training_idf(encoder, prior_documents)
        write_token_table(target, encoder.query_VV, encoder.pieces, encoder.terms, idf_V=idf_V)
    elif form == "stock-static":
        from soju.sparse.export.stock_static import own_term_weights, save_stock_static

        weights_V = own_term_weights(encoder.canonical_VV, training_idf(encoder, prior_documents))
        save_stock_static(target, encoder.tokenizer, weights_V)
    else:
        from soju.sparse.export.low_rank import factorise_codes, save_low_rank

        save_low_rank(target, factorise_codes(encoder.query_VV, hidden_size=hidden_size), encoder.tokenizer)


def export_graph(
    encoder: TermEncoder, target: Path, *, top_terms: int = 128, int8: bool = False, fingerprint: str
) -> dict[str, Any]:
    """Write a neural model as an ONNX graph that ends in the heaviest terms.

    Args:
        encoder: The model; its weights become float32.
        target: Folder, must not exist.
        top_terms: Terms to keep of each text.
        int8: Also write a graph with int8 weights.
        fingerprint: What names the model, see `soju.sparse.indexing.fingerprint_of`.

    Returns:
        What was written and measured, see `soju.sparse.export.onnx_model.export_onnx`.

    Raises:
        UserError: If the target exists, the model is a static one, or the graph differs from it.
    """
    _refuse_taken(target)
    if isinstance(encoder, StaticEncoder):
        forms = ", ".join(form for form in FORMATS if form not in ("onnx", "inference-free"))
        raise UserError(f"a static model has no network to export as a graph; choose --to {forms}")
    from soju.sparse.export.onnx_model import OnnxSource, export_onnx
    from soju.sparse.neural_encoders import NeuralEncoder

    assert isinstance(encoder, NeuralEncoder)
    model = encoder.model.float()
    source = OnnxSource(
        model=model[0].model,
        tokenizer=model.tokenizer,
        encode=model.encode_sparse,
        terms=encoder.terms,
        max_length=model[0].max_seq_length,
        activations=2 if model[1].activation_function == "log1p_relu" else 1,
        about={
            "prompt": model.prompts.get(model.default_prompt_name or "", ""),
            "similarity": model.similarity_fn_name,
            "source_sha256": fingerprint,
        },
    )
    return export_onnx(target, source, k=top_terms, int8=int8)


def _refuse_taken(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: exists already; give another name or remove it first")


def training_idf(encoder: StaticEncoder, prior_documents: float) -> NDArray[np.float32]:
    """Return the idf of the training text alone, ``(V,)``, of at least one document: there is no index to count yet."""
    none_V = np.zeros(len(encoder.terms), np.int64)
    return idf(none_V, 0, prior_documents=max(prior_documents, 1.0), prior_share_V=encoder.document_share_V)
