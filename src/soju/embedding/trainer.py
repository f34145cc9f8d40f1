"""The parameters that a stage trains, and its trainer.

Checkpoints hold what is trained; all else is where the stage started. Groups of parameters may join one after another.
Where only new rows of the embedding are trained, the optimiser is given a tail that is a parameter of its own: zeroing
the gradient of old rows would not leave them alone, as weight decay still moves them, and would pay for a gradient and
two moments of rows that never change.

Shape letters: V = old rows, N = new rows, D = width; I = ids of any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from soju.core.errors import IntegrityError, UserError
from soju.core.files import verify_manifest
from soju.embedding.adapter_modules import layers_of
from soju.embedding.config import StageSettings
from soju.embedding.data import Rows
from soju.training.reliable import OwnProgress, ReliableTrainer
from soju.training.sampling import LengthBuckets
from soju.training.settings import stock_arguments

TRAINABLE_FILE = "trainable.safetensors"


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that join in at the same time."""

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    joins_at: float = 0.0
    """Share of the steps after which its learning rate leaves 0."""


def transformer_of(model: Any) -> nn.Module:
    """Return the Hugging Face model inside a sentence-transformers model."""
    module: nn.Module = model[0].model
    return module


def set_dropout(model: Any, share: float) -> None:
    """Give attention, and dropout layers that are there, this dropout in training; configuration stays as it is."""
    for module in transformer_of(model).modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share  # type: ignore[assignment]  # read at each pass in training
        elif isinstance(module, nn.Dropout):
            module.p = share


def embedding_group(model: Any) -> Group:
    """Let all rows of the embedding move."""
    embedding = transformer_of(model).get_input_embeddings()  # type: ignore[operator]
    return _group("rows", model, embedding)


def block_group(model: Any, count: int) -> Group:
    """Let the last layers move, with what they carry.

    Raises `UserError` if there are fewer.
    """
    try:
        layers = layers_of(transformer_of(model))
    except ValueError as error:
        raise UserError(f"blocks: {error}; train stage 1 alone") from None
    if count > len(layers):
        raise UserError(f"blocks: {count} of {len(layers)} layers; give at most {len(layers)}")
    return _group("blocks", model, *layers[len(layers) - count :])


def all_group(model: Any) -> Group:
    """Let everything move: a base from scratch."""
    return _group("all", model, model)


def _group(name: str, model: Any, *modules: nn.Module) -> Group:
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    found = {key: parameter for key, parameter in model.named_parameters() if id(parameter) in chosen}
    return Group(name, _moving(found))


def _moving(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; small steps would round away, load the model in float32")
        parameter.requires_grad_(True)
    return parameters


def gradual(groups_of_layers: dict[int, dict[str, nn.Parameter]], over: float) -> list[Group]:
    """Let the parameters of layers join in from the top down."""
    numbers = sorted(groups_of_layers, reverse=True)
    return [
        Group(f"layer {number}", _moving(groups_of_layers[number]), joins_at=over * place / len(numbers))
        for place, number in enumerate(numbers)
    ]


def tensors_of(groups: list[Group]) -> dict[str, nn.Parameter]:
    """Return everything that moves, by name."""
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


def save_trainable(groups: list[Group], folder: Path) -> None:
    """Write what moves; the rest is where the stage started."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(groups).items()}
    save_file(tensors, folder / TRAINABLE_FILE)


@torch.no_grad()
def load_trainable(groups: list[Group], folder: Path) -> None:
    """Read what `save_trainable` wrote.

    Raises `UserError` if other parameters were trained.
    """
    saved, ours = load_file(folder / TRAINABLE_FILE), tensors_of(groups)
    if differing := sorted(_differing(saved, ours)):
        raise UserError(
            f"{folder}: was trained with other parameters ({differing[0]} and {len(differing) - 1} more differ); "
            "resume with the settings it was started with"
        )
    for name, parameter in ours.items():
        parameter.copy_(saved[name])


def _differing(saved: dict[str, torch.Tensor], ours: dict[str, nn.Parameter]) -> Iterator[str]:
    yield from saved.keys() ^ ours.keys()
    yield from (name for name in saved.keys() & ours.keys() if saved[name].shape != ours[name].shape)


class PartitionedEmbedding(nn.Module):
    """Looks ids below `first_id` up in `base`, the others in `tail`.

    In a state dict it is one ``weight``, as of a plain embedding, so that a checkpoint loads into either. While
    it is in a model, the model must not be resized nor its weights tied.
    """

    def __init__(self, base_VD: Tensor, tail_ND: Tensor, *, padding_idx: int | None = None) -> None:
        super().__init__()
        # A parameter rather than a buffer: DDP sends every buffer from the first rank to all before each forward pass.
        self.base = nn.Parameter(base_VD, requires_grad=False)
        self.tail = nn.Parameter(tail_ND.float())
        self.padding_idx = padding_idx

    @property
    def first_id(self) -> int:
        """The first id whose row is trained."""
        return len(self.base)

    @property
    def num_embeddings(self) -> int:
        """How many rows there are in all."""
        return len(self.base) + len(self.tail)

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.base.shape[1]

    @property
    def weight(self) -> Tensor:
        """All rows as they would be folded, in the base's type: a detached copy, made anew at every access."""
        return torch.cat([self.base.detach(), self.tail.detach().to(self.base.dtype)])

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up; returns ``(*I, D)`` in the base's type, as a plain embedding of that type would."""
        # Both lookups for every id, then a choice, rather than a selection of ids: no shape depends on the data, and
        # the tail has a gradient in every step, which DDP waits for. Old ids add zeros to that of its first row.
        is_new = input >= self.first_id
        padding = None if self.padding_idx is None or self.padding_idx < self.first_id else self.padding_idx
        old = embedding(input.clamp(max=self.first_id - 1), self.base)
        new = embedding(
            (input - self.first_id).clamp(min=0), self.tail, None if padding is None else padding - self.first_id
        )
        return torch.where(is_new.unsqueeze(-1), new.to(old.dtype), old)

    def extra_repr(self) -> str:
        """Say how many rows there are of each kind."""
        return f"{self.first_id:,} frozen + {len(self.tail):,} trained, {self.embedding_dim}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # In the wider of both types: nothing of the trained rows is rounded away between a checkpoint and a resumption.
        wide = torch.promote_types(self.base.dtype, self.tail.dtype)
        destination[f"{prefix}weight"] = torch.cat([self.base.detach().to(wide), self.tail.detach().to(wide)])

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight_VD = state_dict.get(f"{prefix}weight")
        if weight_VD is None:
            missing_keys.append(f"{prefix}weight")
        elif weight_VD.shape != (self.num_embeddings, self.embedding_dim):
            ours = (self.num_embeddings, self.embedding_dim)
            error_msgs.append(
                f"size mismatch for {prefix}weight: {tuple(weight_VD.shape)} in the checkpoint, {ours} here"
            )
        else:
            with torch.no_grad():
                self.base.copy_(weight_VD[: self.first_id])
                self.tail.copy_(weight_VD[self.first_id :])


def partition_embedding(model: Any, first_id: int) -> PartitionedEmbedding:
    """Replace the input embedding of a transformers model, in place, by one of which only the rows from an id on learn.

    Args:
        model: Any model with ``get_input_embeddings``; for a sentence-transformers model its first module's ``model``.
        first_id: The first id that is trained: how many rows the model had before it was expanded.

    Returns:
        The new embedding, which is in the model now; the old one's memory is free.

    Raises:
        UserError: If there are no rows from `first_id` on, the output embedding is the same weight, or the embedding
            does more than look rows up.
    """
    plain = model.get_input_embeddings()
    name = type(model).__name__
    plainly = isinstance(plain, nn.Embedding) and type(plain).forward in _LOOKUPS
    if not plainly or plain.max_norm is not None or plain.scale_grad_by_freq or plain.sparse:
        raise UserError(f"{name}: its {type(plain).__name__} does more than look rows up; train all rows instead")
    if not 0 < first_id < plain.num_embeddings:
        raise UserError(
            f"{name}: it has {plain.num_embeddings:,} rows, none to train from id {first_id:,} on; expand it first"
        )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and getattr(output, "weight", None) is plain.weight:
        raise UserError(f"{name}: its output embedding is the same weight; load it without a language modelling head")
    weight_VD = plain.weight.detach()
    # Copies, so that the whole matrix is not kept alive by two views of it.
    partitioned = PartitionedEmbedding(
        weight_VD[:first_id].clone(), weight_VD[first_id:].clone(), padding_idx=plain.padding_idx
    )
    partitioned.train(plain.training)
    model.set_input_embeddings(partitioned)
    return partitioned


def fold_embedding(model: Any) -> nn.Embedding:
    """Put a plain embedding back in the place of a partitioned one: old rows bit for bit, new rows in the base's type.

    Raises `ValueError` if the embedding is not partitioned.
    """
    partitioned = model.get_input_embeddings()
    if not isinstance(partitioned, PartitionedEmbedding):
        raise ValueError(f"{type(model).__name__}: its embedding is a {type(partitioned).__name__}, not partitioned")
    weight_VD = partitioned.weight
    plain = nn.Embedding(len(weight_VD), weight_VD.shape[1], padding_idx=partitioned.padding_idx, _weight=weight_VD)
    plain.train(partitioned.training)
    model.set_input_embeddings(plain)
    return plain


_LOOKUPS = (nn.Embedding.forward,)
"""A subclass with a forward pass of its own may scale its rows, as Gemma's does."""


def warm_up_and_decay(step: int, *, planned: int, warmup: int, joins_at: float = 0.0) -> float:
    """Return the factor on the learning rate: up in `warmup` steps, down in the rest, 0 before `joins_at` of all steps.

    >>> [warm_up_and_decay(step, planned=4, warmup=2) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < joins_at * planned:
        return 0.0
    if step < warmup:
        return step / warmup
    return max(0.0, (planned - step) / max(1, planned - warmup))


class _MovingPart(SentenceTransformerTrainer):
    """The stock trainer, whose checkpoints hold what moves; all else is where the stage started."""

    groups: list[Group]
    optimizer: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trainable(self.groups, folder)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        load_trainable(self.groups, Path(checkpoint_path))


class StageTrainer(OwnProgress, ReliableTrainer, _MovingPart):
    """Trains groups of parameters with a linear schedule, each from when it joins in.

    Args:
        groups: What moves.
        **more: See `ReliableTrainer`.
    """

    def __init__(self, *, groups: list[Group], **more: Any) -> None:
        self.groups = groups
        super().__init__(**more)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make AdamW over the groups; what is no matrix (norms, biases, gates) does not decay."""
        if self.optimizer is None:
            settings = self.args
            self.optimizer = AdamW(
                [
                    {
                        "params": [value for value in group.parameters.values() if (value.ndim > 1) is decays],
                        "weight_decay": settings.weight_decay if decays else 0.0,
                    }
                    for group in self.groups
                    for decays in (True, False)
                ],
                lr=settings.learning_rate,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make schedules that are pure functions of the step."""
        if getattr(self, "lr_scheduler", None) is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            schedules: list[Callable[[int], float]] = [
                partial(warm_up_and_decay, planned=num_training_steps, warmup=warmup, joins_at=group.joins_at)
                for group in self.groups
                for _ in (True, False)
            ]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _weights_to_save(self) -> Iterable[Tensor]:
        return tensors_of(self.groups).values()


def stage_arguments(
    settings: StageSettings, folder: Path, lengths: Any, *, seed: int, data_order: int = 0, chosen_by: str | None
) -> SentenceTransformerTrainingArguments:
    """Translate the settings.

    Args:
        settings: Of the stage.
        folder: Gets ``checkpoints`` and ``tensorboard``.
        lengths: Of the rows, in any unit; rows of a batch are of similar length.
        seed: Of the run.
        data_order: Of the attempt; another number is another order of the rows.
        chosen_by: Validation score of which the best checkpoint has most; no validation when ``None``.

    Returns:
        The stock arguments.
    """
    return SentenceTransformerTrainingArguments(
        **stock_arguments(settings, folder, seed=seed, chosen_by=chosen_by),
        batch_sampler=LengthBuckets(lengths, seed=seed + data_order),
        dataloader_drop_last=True,
    )


def places_of(rows: Rows) -> Dataset:
    """Return what the trainer counts and shuffles: places of rows."""
    return Dataset.from_dict({"row": list(range(len(rows)))})


def is_whole(folder: Path) -> bool:
    """Tell whether a folder verifies against its manifest."""
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True


def refuse_few_rows(rows: int, settings: StageSettings, *, place: str, ranks: int) -> None:
    """Refuse rows that fill no batch (`UserError`)."""
    whole = settings.per_device_train_batch_size * ranks
    if rows < whole:
        raise UserError(
            f"{place}: {rows:,} rows do not fill one batch of {whole:,}; give more, or lower "
            "per_device_train_batch_size"
        )
