"""SPLADE encoders: a masked language model whose logits, pooled over the tokens of a text, weigh the terms.

Shape letters: B = texts, S = tokens of the longest text, N = tokens of all texts one after the other, H = hidden width,
V = terms, T = terms of a tile, E = weights above 0 of a tile.

`SpladeEncoder` is sentence-transformers' ``Transformer`` + ``SpladePooling``, with a forward pass of its own: it takes
the hidden states in front of the output embedding and gives them to `soju.sparse.splade_head`, so that the
``(B, S, V)`` logits are never built. Its modules stay the stock ones, which is how its folders load where soju is not
installed. Inside the language model two modules are replaced by ones that share their weights: the output embedding,
so that the hidden states can be had, and a tied input embedding, so that both uses share one gradient.
"""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from soju.core.errors import UserError
from soju.core.progress import track
from soju.sparse.splade_head import TiedEmbedding, TileReducer, signed_maxima, splade_weights, tiles

WINDOW = 8192
"""Texts that are tokenized, and sorted by length, at a time."""


class SpladeEncoder(SparseEncoder):
    """A `SparseEncoder` of any masked language model that never builds the ``(B, S, V)`` logits.

    ``forward`` gives the term weights in ``sentence_embedding`` and the signed maxima they come from in
    ``signed_maxima``, both ``(B, V)`` and in one graph.

    Args:
        model_name_or_path: Folder or hub id of a masked language model, or of a SPLADE model saved by
            sentence-transformers. None with ``modules``.
        max_seq_length: Tokens after which texts are cut; by default what the tokenizer says.
        **kwargs: Passed on to `SparseEncoder`: ``device``, ``model_kwargs``, ``prompts``, ...

    Raises:
        UserError: If there is no model, or it is no masked language model with max pooling.
    """

    def __init__(
        self, model_name_or_path: str | Path | None = None, *, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        if model_name_or_path is not None:
            model_name_or_path = str(model_name_or_path)
            if Path(model_name_or_path).is_dir():
                kwargs["local_files_only"] = True  # or a relative path would be looked up on the hub
            kwargs["model_kwargs"] = {**(kwargs.get("model_kwargs") or {}), "use_safetensors": True}  # never a pickle
        try:
            super().__init__(model_name_or_path, **kwargs)
        except OSError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"{model_name_or_path}: no model with weights as safetensors can be loaded; {why}"
            ) from error
        self._limit_length(max_seq_length)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Wrap a masked language model in memory; its weights are shared, not copied, and its tokenizer is copied.

        The other arguments, and what is refused, are as in the class.
        """
        modules = [_stock_transformer(model, tokenizer), SpladePooling("max")]
        return cls(modules=modules, max_seq_length=max_seq_length, local_files_only=True, **kwargs)

    @property
    def output_embedding(self) -> OutputEmbedding:
        """What hidden states are multiplied with, one row a term."""
        output = self[0].model.get_output_embeddings()
        assert isinstance(output, OutputEmbedding), type(output)
        return output

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Write ``signed_maxima`` and ``sentence_embedding``, both ``(B, V)`` and at least float32, into the features.

        Further arguments are ignored: they are for kinds of modules that a SPLADE model has none of.
        """
        hidden_NH, lengths_B = self.hidden_states(input)
        output = self.output_embedding
        input["signed_maxima"] = signed_maxima(hidden_NH, output.weight, output.bias, lengths_B)
        input["sentence_embedding"] = self.term_weights(input["signed_maxima"])
        return input

    def hidden_states(self, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the input of the output embedding for all tokens ``(N, H)``, and how many each text has ``(B,)``."""
        transformer = self[0]
        with hidden_states_only():
            hidden_BSH = transformer(features).pop(transformer.module_output_name)
        return unpad(hidden_BSH, features)

    def term_weights(self, maxima: Tensor) -> Tensor:
        """Return the term weights of signed maxima, with the activation that the stock pooling names."""
        weights = splade_weights(maxima)
        return splade_weights(weights) if self[1].activation_function == "log1p_relu" else weights

    @torch.inference_mode()
    def encode_sparse(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        max_active_terms: int | None = None,
        show_progress: bool = False,
    ) -> csr_array:
        """Return the term weights of texts, the same as `SparseEncoder.encode` gives.

        Texts are tokenized once and batched by their number of tokens, so that little is spent on padding.

        Args:
            texts: Texts, any number.
            batch_size: Texts the model sees at a time.
            max_active_terms: Keep at most this many of the largest weights of each text.
            show_progress: Whether to show a bar.

        Returns:
            ``(B, V)`` float32, one row a text in the order given, only weights > 0.

        Raises:
            ValueError: If ``batch_size`` or ``max_active_terms`` is below 1.
        """
        if batch_size < 1 or (max_active_terms is not None and max_active_terms < 1):
            raise ValueError(f"batch_size and max_active_terms must be >= 1, got {batch_size} and {max_active_terms}")
        self.eval()
        output = self.output_embedding
        if not texts:
            return csr_array(np.empty((0, output.out_features), np.float32))
        batches: Iterable[tuple[NDArray[np.int64], dict[str, Tensor]]] = self._batches(texts, batch_size)
        if show_progress:
            count = sum(-(-min(WINDOW, len(texts) - start) // batch_size) for start in range(0, len(texts), WINDOW))
            batches = track(batches, "Encoding", total=count)
        places, rows = [], []
        for place_B, features in batches:
            hidden_NH, lengths_B = self.hidden_states(features)
            places.append(place_B)
            rows.append(
                sparse_weights(
                    hidden_NH,
                    output.weight,
                    output.bias,
                    lengths_B,
                    weights=self.term_weights,
                    max_active_terms=max_active_terms,
                )
            )
        return csr_array(vstack(rows, format="csr")[np.argsort(np.concatenate(places))])

    def _batches(self, texts: Sequence[str], batch_size: int) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
        """Yield the places of texts of about one length, and what the model is called with for them."""
        tokenizer = self.tokenizer
        prompt = self._resolve_prompt(None, None) or ""
        for start in range(0, len(texts), WINDOW):
            tokens = tokenizer([prompt + text for text in texts[start : start + WINDOW]], truncation="longest_first")
            # Longest first, so that a batch that does not fit into memory is met at once.
            order = np.argsort([-len(ids) for ids in tokens["input_ids"]], kind="stable")
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                rows = {key: [values[i] for i in chosen] for key, values in tokens.items()}
                padded = tokenizer.pad(rows, return_tensors="pt")
                yield chosen + start, {key: value.to(self.device) for key, value in padded.items()}

    def as_stock(self) -> SparseEncoder:
        """Return a stock encoder of this one's modules; this one stays as it is."""
        stock = SparseEncoder(
            modules=OrderedDict(self.named_children()),
            device=self.device,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            trust_remote_code=self.trust_remote_code,
            model_card_data=copy.copy(self.model_card_data),
            similarity_fn_name=self.similarity_fn_name,
            max_active_dims=self.max_active_dims,
        )
        stock._model_card_text = self._model_card_text  # of the folder it was loaded from
        return stock

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write stock modules, and a model card of a stock encoder, to a folder, which is made when it is missing."""
        training = {module: module.training for module in self.modules()}
        self.as_stock().save(path, *args, **kwargs)
        for module, mode in training.items():  # writing the model card encodes examples
            module.training = mode

    def save_pretrained(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write what `save` writes, without a model card unless it is asked for: a trainer's checkpoints need none."""
        self.save(path, *args, **{"create_model_card": False, **kwargs})

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[nn.Module], dict[str, Any]]:
        """Refuse what is no masked language model before its weights are read."""
        if Path(model_name_or_path).is_dir() and not Path(model_name_or_path, "config.json").is_file():
            raise FileNotFoundError(f"{model_name_or_path} has no config.json")
        hub = {key: kwargs[key] for key in ("token", "revision", "trust_remote_code", "local_files_only")}
        config = AutoConfig.from_pretrained(model_name_or_path, cache_dir=kwargs["cache_folder"], **hub)
        if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
            raise UserError(
                f"{model_name_or_path}: {', '.join(config.architectures or [config.model_type])} is no masked language "
                "model, so it has no weights for terms; choose a checkpoint whose architecture ends in ForMaskedLM"
            )
        return super()._load_default_modules(model_name_or_path, **kwargs)

    def _post_init(self) -> None:
        """Prepare the language model: this is the last step of every way to construct an encoder."""
        model = self.transformers_model
        prepare(list(self), name=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        super()._post_init()

    def _limit_length(self, wanted: int | None) -> None:
        """Cut texts at the number of tokens wanted, and never beyond the positions that the model knows."""
        limit = known_positions(self[0].model)
        if wanted is not None and not 1 <= wanted <= (limit or wanted):
            raise UserError(f"max_seq_length is {wanted}, but the model knows {limit} positions; choose 1 to {limit}")
        if wanted is not None or (limit is not None and self[0].max_seq_length > limit):
            self[0].max_seq_length = wanted or limit


def known_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a text can have, None when the configuration does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    for module in model.modules():
        embedding = getattr(module, "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            # The RoBERTa family counts from behind the padding id: of 514 positions 512 are for tokens.
            return int(positions - embedding.padding_idx - 1)
    return int(positions)


# The language model: hidden states in the place of logits.


_skip_output: ContextVar[bool] = ContextVar("_skip_output", default=False)
"""A variable of the context, not of the module: another thread may want logits of the same model meanwhile."""


class OutputEmbedding(nn.Linear):
    """An output embedding that takes the place of another, with its parameters, and hands its input through when told.

    So the hidden states of any architecture are those that its own forward pass would multiply with the vocabulary,
    while the same model still gives logits to whoever else calls it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        # On "meta" nothing is allocated and no random number drawn for parameters that are replaced at once.
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, or the hidden states inside `hidden_states_only`."""
        return input if _skip_output.get() else super().forward(input)


@contextmanager
def hidden_states_only() -> Iterator[None]:
    """Let masked language models return the input of their output embedding in the place of logits."""
    token = _skip_output.set(True)
    try:
        yield
    finally:
        _skip_output.reset(token)


def prepare(modules: list[Any], *, name: str) -> None:
    """Replace the embeddings of a masked language model by ones with the same parameters that suit the tiled head.

    Args:
        modules: ``Transformer`` and ``SpladePooling``.
        name: What to call the model in messages.

    Raises:
        UserError: If they are something else, or the model's logits are not its output embedding times hidden states.
    """
    if len(modules) != 2 or not isinstance(modules[0], Transformer) or not isinstance(modules[1], SpladePooling):
        names = " + ".join(type(module).__name__ for module in modules)
        raise UserError(f"{name}: {names} is no SPLADE model; expected Transformer + SpladePooling")
    transformer, pooling = modules
    if pooling.pooling_strategy != "max":
        raise UserError(f"{name}: pools with {pooling.pooling_strategy!r}; only 'max' can do without all logits")
    model = transformer.model
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if transformer.transformer_task != "fill-mask" or not isinstance(output, nn.Linear):
        raise UserError(
            f"{name}: {type(model).__name__} is no masked language model with a linear output embedding, "
            "so it has no weights for terms; choose a checkpoint whose architecture ends in ForMaskedLM"
        )
    if not isinstance(output, OutputEmbedding):
        plain, output = output, OutputEmbedding(output)
        _replace(model, plain, output)
    embedding = model.get_input_embeddings()
    if embedding.weight is output.weight and TiedEmbedding.can_replace(embedding):
        _replace(model, embedding, TiedEmbedding(embedding))
    pooling.embedding_dimension = output.out_features
    if not _hidden_states_give_logits(model, output):
        raise UserError(
            f"{name}: {type(model).__name__} does more to its logits than its output embedding does, which "
            "the tiled head cannot repeat; choose another architecture"
        )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in every place of another; names and order of parameters stay."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


@torch.no_grad()
def _hidden_states_give_logits(model: PreTrainedModel, output: OutputEmbedding) -> bool:
    """Compare the model's own logits for four tokens with what the head would make of its hidden states."""
    if output.weight.device.type == "meta":
        return True
    token_ids = torch.arange(4, device=output.weight.device).remainder(output.out_features)[None]
    call = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    training = model.training
    model.eval()
    try:
        logits = model(**call).logits
        with hidden_states_only():
            hidden = model(**call).logits
        if hidden.shape[-1] != output.in_features:
            return False
        return torch.allclose(output(hidden), logits, rtol=1e-3, atol=1e-3)
    except RuntimeError:  # shapes that do not match where something is added to the logits
        return False
    finally:
        model.train(training)


def unpad(hidden_BSH: Tensor, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Drop the hidden states of padding.

    Args:
        hidden_BSH: ``(B, S, H)``, or ``(1, N, H)`` where the texts were joined for flash attention.
        features: What the model was called with.

    Returns:
        Hidden states ``(N, H)`` and lengths ``(B,)``, these on the CPU.
    """
    if "cu_seq_lens_q" in features:
        return hidden_BSH.squeeze(0), features["cu_seq_lens_q"].diff().cpu()
    mask_BS = features["attention_mask"].bool()
    lengths_B = mask_BS.sum(dim=1).cpu()
    flat_NH = hidden_BSH.flatten(0, 1)
    if int(lengths_B.sum()) == len(flat_NH):
        return flat_NH, lengths_B
    # No index occurs twice, so the backward pass of index_select is deterministic on a GPU, too.
    return flat_NH.index_select(0, mask_BS.flatten().nonzero().squeeze(1)), lengths_B


def _stock_transformer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Transformer:
    """Return a stock ``Transformer`` around a model in memory.

    Its constructor knows only folders, so a class of our own loads tokenizer and configuration from one. A stock module
    takes its state over, the way copying does, because saving writes the name of a module's class.
    """

    class InMemory(Transformer):
        def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return model

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = InMemory(folder, transformer_task="fill-mask")
    stock = Transformer.__new__(Transformer)
    stock.__setstate__(vars(loaded))
    return stock


# Inference: hidden states to sparse weights, tile by tile.


@torch.inference_mode()
def sparse_weights(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lengths_B: Tensor,
    *,
    weights: Callable[[Tensor], Tensor],
    max_active_terms: int | None = None,
    tile: int | None = None,
) -> csr_array:
    """Return the term weights of texts as a sparse matrix; no dense ``(B, V)`` matrix is built.

    Args:
        hidden_NH: This and the next three as in `soju.sparse.splade_head.signed_maxima`.
        weight_VH: See there.
        bias_V: See there.
        lengths_B: See there.
        weights: From signed maxima to weights.
        max_active_terms: Keep at most this many of the largest weights of each text; ties go to the lower id.
        tile: Terms to work on at a time.

    Returns:
        ``(B, V)`` float32, rows sorted by term, only weights > 0.
    """
    texts, terms = len(lengths_B), len(weight_VH)
    lengths_B = lengths_B.to("cpu", torch.int64)
    reducer = TileReducer(hidden_NH, weight_VH, lengths_B, tile=tile)
    empty_B = (lengths_B == 0).to(hidden_NH.device)
    buffer = hidden_NH.new_empty(texts * reducer.width, dtype=reducer.maxima_dtype)
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    for part in tiles(terms, reducer.width):
        maxima_BT = buffer[: texts * (part.stop - part.start)].view(texts, -1)
        reducer.reduce(part, maxima_BT, None, start=0)
        # Bias, then texts without tokens, then weights: the order of `signed_maxima`, and so the same numbers.
        if bias_V is not None:
            maxima_BT += bias_V[part]
        maxima_BT[empty_B] = 0
        weights_BT = weights(maxima_BT).float()
        text_E, term_E = weights_BT.nonzero().unbind(dim=1)
        value_E = weights_BT[text_E, term_E].cpu().numpy()
        parts.append((text_E.cpu().numpy(), (term_E + part.start).cpu().numpy(), value_E))
    rows, columns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # Tiles ascend, and terms within a tile, so a stable sort by text leaves the terms of each text ascending.
    order = np.argsort(rows, kind="stable")
    indptr = np.zeros(texts + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=texts), out=indptr[1:])
    matrix = csr_array((values[order], columns[order], indptr), shape=(texts, terms))
    return matrix if max_active_terms is None else keep_largest(matrix, max_active_terms)


def keep_largest(matrix_BV: csr_array, count: int) -> csr_array:
    """Keep the largest ``count`` >= 1 weights of each row, which is sorted by column; ties go to the lower column."""
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    lengths = np.diff(matrix_BV.indptr)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((matrix_BV.indices, -matrix_BV.data, rows))
    rank = np.arange(len(rows)) - matrix_BV.indptr[rows]
    kept = np.sort(order[rank < count])
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.minimum(lengths, count), out=indptr[1:])
    return csr_array((matrix_BV.data[kept], matrix_BV.indices[kept], indptr), shape=matrix_BV.shape)
