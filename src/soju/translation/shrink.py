"""A small M2M100 made from a large one: what is least active is left out, and what is kept is corrected for it.

Layers are kept evenly, the last always; heads, feed-forward neurons and channels of the residual stream by their mean
absolute activation. Then both models read the same sentences side by side, layer by layer, and each normalisation and
each projection of the small one is corrected by ridge least squares towards what the large one computes there. Errors
of earlier layers, of dropped ones too, are thereby taken back by later ones as far as a linear map can. Correcting the
output projections alone leaves up to twice the divergence (measured on a toy pair).

Shape letters: B = sentences, T = target or query positions, S = source or key positions, N = real positions,
D = channels, K = inputs and M = outputs of one map, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import M2M100Config, M2M100ForConditionalGeneration

from soju.core.config import Settings
from soju.core.errors import ConfigError

Batch = Mapping[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``decoder_input_ids``; ``labels`` where padding of the target is not told by
the padding token."""
IGNORED = -100


class StudentShape(Settings):
    """Sizes of the student; layers, heads and neurons are those of either side."""

    d_model: int = Field(512, ge=8, multiple_of=2)
    """Channels of the residual stream."""
    layers: int = Field(6, ge=1)
    """Encoder layers, and as many decoder layers."""
    attention_heads: int = Field(8, ge=1)
    """Heads of each attention; one must have as many channels as the teacher's."""
    ffn_dim: int = Field(2_048, ge=1)
    """Neurons of each feed-forward block."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which parts of the teacher the student is made of."""

    channels: tuple[int, ...]
    """Of the residual stream of both sides, in the student's order."""
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    heads: Mapping[str, tuple[int, ...]]
    """Name of the attention in the teacher -> its heads."""
    neurons: Mapping[str, tuple[int, ...]]
    """Name of the layer in the teacher -> its feed-forward neurons."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for the metadata of the student."""
        return asdict(self)


def initial_student(
    teacher: M2M100ForConditionalGeneration,
    shape: StudentShape,
    batches: Sequence[Batch] = (),
    *,
    how: Literal["shrunk", "truncated", "random"] = "shrunk",
    ridge: float = 1e-3,
    seed: int = 0,
) -> tuple[M2M100ForConditionalGeneration, Kept | None]:
    """Make the student that distillation starts from.

    Args:
        teacher: In float32 and with tied embeddings; it is left as it is.
        shape: Sizes of the student.
        batches: Sentence pairs to measure activity on and to correct with, some 512; read for ``shrunk`` only.
        how: ``shrunk``; ``truncated`` takes the first layers, heads, neurons and channels as they are; ``random`` takes
            nothing. The last two are controls.
        ridge: Penalty on the change of a map, as a share of the mean square of its inputs.
        seed: Seed of the random weights.

    Returns:
        The student in evaluation mode, and what was kept.

    Raises:
        ConfigError: If the student does not fit into the teacher or no sentence pair was given.
    """
    if how != "random":
        _check_fits(teacher.config, shape)
    student = _empty_student(teacher.config, shape, seed).to(teacher.device)
    if how == "random":
        return student, None
    if how == "shrunk" and not batches:
        raise ConfigError('student.init: "shrunk" needs sentence pairs to measure activity on; give some 512')
    activity = measure_activity(teacher, batches) if how == "shrunk" else None
    kept = choose(teacher, shape, activity)
    with torch.no_grad():
        _copy(teacher, student, kept)
        if how == "shrunk":
            _Corrector(teacher, student, kept, batches, ridge).correct()
    return student, kept


def _check_fits(config: M2M100Config, shape: StudentShape) -> None:
    if not config.tie_word_embeddings:
        raise ConfigError("teacher: its output and input embeddings are not tied; shrinking needs one table")
    size = config.d_model // config.encoder_attention_heads
    if config.d_model // config.decoder_attention_heads != size:
        raise ConfigError("teacher: encoder and decoder heads differ in size; shrinking needs the same")
    if shape.d_model != size * shape.attention_heads:
        raise ConfigError(
            f"student: d_model is {shape.d_model}, and {shape.attention_heads} heads of the teacher's {size} channels "
            f"make {size * shape.attention_heads}; set attention_heads to d_model / {size}"
        )
    limits = {
        "d_model": config.d_model,
        "layers": min(config.encoder_layers, config.decoder_layers),
        "attention_heads": min(config.encoder_attention_heads, config.decoder_attention_heads),
        "ffn_dim": min(config.encoder_ffn_dim, config.decoder_ffn_dim),
    }
    for name, limit in limits.items():
        if getattr(shape, name) > limit:
            raise ConfigError(f"student: {name} is {getattr(shape, name):,}, the teacher has {limit:,}; give no more")


def _empty_student(config: M2M100Config, shape: StudentShape, seed: int) -> M2M100ForConditionalGeneration:
    sides = {
        f"{side}_{name}": getattr(shape, name)
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads", "ffn_dim")
    }
    changed = {"d_model": shape.d_model, "num_hidden_layers": shape.layers, **sides}
    drops = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return M2M100ForConditionalGeneration(M2M100Config.from_dict(config.to_dict() | changed | drops)).eval()


@dataclass(frozen=True, slots=True)
class Activity:
    """Mean absolute activations of the teacher."""

    channels_D: Tensor
    """Of the residual stream; each place it is read at counts alike."""
    heads: Mapping[str, Tensor]
    """Name of the attention -> value of each head, mean over its channels."""
    neurons: Mapping[str, Tensor]
    """Name of the layer -> value of each neuron."""


def measure_activity(teacher: M2M100ForConditionalGeneration, batches: Sequence[Batch]) -> Activity:
    """Run the teacher over sentence pairs and return how active its parts are at real positions."""
    sums: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}

    def observe(name: str, side: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        active_K = inputs[0][real[side]].abs().double().sum(dim=0)
        sums[name] = sums[name] + active_K if name in sums else active_K

    with _evaluating(teacher), torch.no_grad():
        handles = [
            module.register_forward_pre_hook(partial(observe, name, name.split(".")[1]))
            for name, module in teacher.named_modules()
            if name.endswith(("out_proj", "fc2")) or isinstance(module, nn.LayerNorm)
        ]
        try:
            for batch in batches:
                real["encoder"], real["decoder"] = _real_source(batch), _real_target(batch, teacher.config.pad_token_id)
                teacher.model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    decoder_input_ids=batch["decoder_input_ids"],
                    use_cache=False,
                )
        finally:
            for handle in handles:
                handle.remove()
    norms = [sums[name] / sums[name].sum() for name in sums if name.endswith("layer_norm")]
    size = teacher.config.d_model // teacher.config.encoder_attention_heads
    return Activity(
        channels_D=torch.stack(norms).sum(dim=0),
        heads={
            name.removesuffix(".out_proj"): active_K.view(-1, size).mean(dim=1)
            for name, active_K in sums.items()
            if name.endswith("out_proj")
        },
        neurons={name.removesuffix(".fc2"): active_K for name, active_K in sums.items() if name.endswith("fc2")},
    )


def choose(teacher: M2M100ForConditionalGeneration, shape: StudentShape, activity: Activity | None) -> Kept:
    """Choose what is kept: the most active parts, or the first ones without an activity."""

    def best(active_K: Tensor | None, count: int) -> tuple[int, ...]:
        if active_K is None:
            return tuple(range(count))
        # Equal parts by place, so that the choice does not depend on the sort.
        order = torch.argsort(active_K, descending=True, stable=True)[:count]
        return tuple(sorted(order.tolist()))

    names = dict(teacher.named_modules())
    heads = [name for name in names if name.endswith(("self_attn", "encoder_attn"))]
    layers = [name for name, module in names.items() if hasattr(module, "fc1")]
    counts = teacher.config.encoder_layers, teacher.config.decoder_layers
    even = [_evenly(count, shape.layers) if activity else tuple(range(shape.layers)) for count in counts]
    return Kept(
        channels=best(activity.channels_D if activity else None, shape.d_model),
        encoder_layers=even[0],
        decoder_layers=even[1],
        heads={name: best(activity.heads[name] if activity else None, shape.attention_heads) for name in heads},
        neurons={name: best(activity.neurons[name] if activity else None, shape.ffn_dim) for name in layers},
    )


def _evenly(available: int, wanted: int) -> tuple[int, ...]:
    """Return layers at even distances, the last one included: 12 -> 6 keeps 1, 3, 5, 7, 9, 11."""
    return tuple(-(-(number + 1) * available // wanted) - 1 for number in range(wanted))


def _copy(teacher: M2M100ForConditionalGeneration, student: M2M100ForConditionalGeneration, kept: Kept) -> None:
    """Copy the kept parts."""
    channels = torch.tensor(kept.channels)
    size = teacher.config.d_model // teacher.config.encoder_attention_heads
    scale = _embedding_scale(teacher, student)
    student.model.shared.weight.copy_(teacher.model.shared.weight[:, channels] * scale)
    for side, layers in _sides(kept):
        ours, theirs = getattr(student.model, side), getattr(teacher.model, side)
        _copy_norm(theirs.layer_norm, ours.layer_norm, channels)
        for layer, number in zip(ours.layers, layers, strict=True):
            _copy_layer(theirs.layers[number], layer, kept, f"model.{side}.layers.{number}", channels, size)
    # The table that reads the last states became larger by `scale`, so they must become smaller by it.
    student.model.decoder.layer_norm.weight.div_(scale)
    student.model.decoder.layer_norm.bias.div_(scale)


def _copy_layer(theirs: nn.Module, ours: nn.Module, kept: Kept, name: str, channels: Tensor, size: int) -> None:
    for part in ("self_attn", "encoder_attn"):
        if not hasattr(ours, part):
            continue
        heads = torch.tensor(kept.heads[f"{name}.{part}"])
        rows = (heads[:, None] * size + torch.arange(size)).flatten()
        for projection in ("q_proj", "k_proj", "v_proj"):
            _copy_linear(
                getattr(getattr(theirs, part), projection), getattr(getattr(ours, part), projection), rows, channels
            )
        _copy_linear(getattr(theirs, part).out_proj, getattr(ours, part).out_proj, channels, rows)
        _copy_norm(getattr(theirs, f"{part}_layer_norm"), getattr(ours, f"{part}_layer_norm"), channels)
    neurons = torch.tensor(kept.neurons[name])
    _copy_linear(theirs.fc1, ours.fc1, neurons, channels)
    _copy_linear(theirs.fc2, ours.fc2, channels, neurons)
    _copy_norm(theirs.final_layer_norm, ours.final_layer_norm, channels)


def _copy_linear(theirs: Any, ours: Any, rows: Tensor, columns: Tensor) -> None:
    ours.weight.copy_(theirs.weight[rows][:, columns])
    ours.bias.copy_(theirs.bias[rows])


def _copy_norm(theirs: Any, ours: Any, channels: Tensor) -> None:
    ours.weight.copy_(theirs.weight[channels])
    ours.bias.copy_(theirs.bias[channels])


def _embedding_scale(teacher: M2M100ForConditionalGeneration, student: M2M100ForConditionalGeneration) -> float:
    """Return what makes up for the factor √d_model that both models put on their embeddings."""
    if not teacher.config.scale_embedding:
        return 1.0
    return math.sqrt(teacher.config.d_model) / math.sqrt(student.config.d_model)


class _LeastSquares:
    """Sums for the ridge least squares of what a map with K inputs and M outputs leaves over.

    Only the change of the map is solved for, so a map that leaves nothing over stays bit for bit.
    """

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, inputs_NK: Tensor, left_NM: Tensor) -> None:
        """Add N positions."""
        with_one = torch.cat([inputs_NK, inputs_NK.new_ones(len(inputs_NK), 1)], dim=1).double()
        self.gram = self.gram + with_one.T @ with_one
        self.cross = self.cross + with_one.T @ left_NM.double()

    def correct(self, linear: nn.Linear, ridge: float) -> None:
        """Change the map."""
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.cross, Tensor)
        penalty = ridge * self.gram.diagonal()[:-1].mean().clamp_min(torch.finfo(torch.float32).tiny)
        change = torch.linalg.solve(self.gram + penalty * torch.eye(len(self.gram)).to(self.gram), self.cross)
        linear.weight.add_(change[:-1].T.to(linear.weight.dtype))
        linear.bias.add_(change[-1].to(linear.bias.dtype))


@dataclass(slots=True)
class _Pair:
    """One batch on its way through both models."""

    theirs: Tensor
    """The teacher's residual stream, ``(B, T, D)``."""
    ours: Tensor
    real: Tensor
    """``(B, T)``, whether a position is no padding."""
    allowed: Tensor
    """``(B, 1, T, T)``, whether a position may attend to another of its side."""
    normed: tuple[Tensor, Tensor] | None = None
    """What both models' current block reads."""
    memory: tuple[Tensor, Tensor, Tensor] | None = None
    """For the decoder: both encoders' states and ``(B, 1, 1, S)``, whether a source position is real."""


class _Corrector:
    """Both models side by side."""

    def __init__(
        self,
        teacher: M2M100ForConditionalGeneration,
        student: M2M100ForConditionalGeneration,
        kept: Kept,
        batches: Sequence[Batch],
        ridge: float,
    ) -> None:
        self.teacher, self.student, self.kept, self.batches, self.ridge = teacher, student, kept, batches, ridge
        self.channels = torch.tensor(kept.channels, device=teacher.device)

    def correct(self) -> None:
        """Correct the student from the first layer to the last."""
        with _evaluating(self.teacher):
            pad = self.teacher.config.pad_token_id
            sources = [(batch["input_ids"], _real_source(batch)) for batch in self.batches]
            targets = [(batch["decoder_input_ids"], _real_target(batch, pad)) for batch in self.batches]
            pairs = [self._embed("encoder", tokens, real) for tokens, real in sources]
            self._side("encoder", pairs)
            encoded = [(*self._normed(pair), pair.real[:, None, None, :]) for pair in pairs]
            pairs = [self._embed("decoder", tokens, real) for tokens, real in targets]
            for pair, memory in zip(pairs, encoded, strict=True):
                pair.memory = memory
            self._side("decoder", pairs)

    def _embed(self, side: str, tokens: Tensor, real: Tensor) -> _Pair:
        streams = []
        for model in (self.teacher, self.student):
            stack = getattr(model.model, side)
            embedded = stack.embed_tokens(tokens)
            streams.append(embedded + stack.embed_positions(tokens, embedded))
        allowed = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
        if side == "decoder":
            allowed = allowed & torch.ones_like(allowed[0, 0]).tril()
        # A padded query attends to itself, lest its softmax be over nothing.
        allowed = allowed | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        return _Pair(streams[0], streams[1], real, allowed)

    def _side(self, side: str, pairs: list[_Pair]) -> None:
        theirs, ours = getattr(self.teacher.model, side), getattr(self.student.model, side)
        kept = dict(zip(dict(_sides(self.kept))[side], ours.layers, strict=True))
        for number, layer in enumerate(theirs.layers):
            name = f"model.{side}.layers.{number}"
            self._attention(pairs, layer, kept.get(number), name, "self_attn")
            if side == "decoder":
                self._attention(pairs, layer, kept.get(number), name, "encoder_attn")
            self._feed_forward(pairs, layer, kept.get(number), name)
        self._last_norm(pairs, theirs.layer_norm, ours.layer_norm, to_logits=side == "decoder")

    def _attention(self, pairs: list[_Pair], theirs: Any, ours: Any | None, name: str, part: str) -> None:
        """Advance both streams by one attention block; where the student has none, the teacher's alone."""
        attention, crossed = getattr(theirs, part), part == "encoder_attn"
        small = None if ours is None else getattr(ours, part)
        self._norm(pairs, getattr(theirs, f"{part}_layer_norm"), ours and getattr(ours, f"{part}_layer_norm"))
        if small is not None:
            size = attention.head_dim
            heads = torch.tensor(self.kept.heads[f"{name}.{part}"], device=self.teacher.device)
            rows = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
            self._projection(pairs, attention.q_proj, small.q_proj, rows, from_memory=False)
            self._projection(pairs, attention.k_proj, small.k_proj, rows, from_memory=crossed)
            self._projection(pairs, attention.v_proj, small.v_proj, rows, from_memory=crossed)
        contexts = []
        for pair in pairs:
            query, query_small = self._normed(pair)
            key, key_small, allowed = (query, query_small, pair.allowed) if not crossed else _memory(pair)
            context = _attend(attention, query, key, allowed)
            contexts.append((context, None if small is None else _attend(small, query_small, key_small, allowed)))
        self._output(pairs, contexts, attention.out_proj, small and small.out_proj)

    def _feed_forward(self, pairs: list[_Pair], theirs: Any, ours: Any | None, name: str) -> None:
        self._norm(pairs, theirs.final_layer_norm, ours and ours.final_layer_norm)
        if ours is not None:
            neurons = torch.tensor(self.kept.neurons[name], device=self.teacher.device)
            self._projection(pairs, theirs.fc1, ours.fc1, neurons, from_memory=False)
        activities = []
        for pair in pairs:
            large, small = self._normed(pair)
            active = None if ours is None else ours.activation_fn(ours.fc1(small))
            activities.append((theirs.activation_fn(theirs.fc1(large)), active))
        self._output(pairs, activities, theirs.fc2, ours and ours.fc2)

    def _norm(self, pairs: list[_Pair], theirs: nn.LayerNorm, ours: nn.LayerNorm | None) -> None:
        """Normalise both streams, after the student's gain and bias were fitted."""
        if ours is not None:
            _fit_norm(
                ours, [(pair.ours[pair.real], theirs(pair.theirs[pair.real])[:, self.channels]) for pair in pairs]
            )
        for pair in pairs:
            pair.normed = theirs(pair.theirs), pair.ours if ours is None else ours(pair.ours)

    def _projection(
        self, pairs: list[_Pair], theirs: nn.Linear, ours: nn.Linear, rows: Tensor, *, from_memory: bool
    ) -> None:
        """Correct a map from the stream towards the kept outputs of the teacher's."""
        sums = _LeastSquares()
        for pair in pairs:
            large, small, real = (*self._normed(pair), pair.real)
            if from_memory:
                large, small, allowed = _memory(pair)
                real = allowed[:, 0, 0]
            inputs = small[real]
            sums.add(inputs, theirs(large[real])[:, rows] - ours(inputs))
        sums.correct(ours, self.ridge)

    def _output(
        self, pairs: list[_Pair], inputs: list[tuple[Tensor, Tensor | None]], theirs: nn.Linear, ours: Any | None
    ) -> None:
        """Correct a map into the stream towards the teacher's stream after it, and advance both."""
        sums = _LeastSquares()
        for pair, (large, small) in zip(pairs, inputs, strict=True):
            pair.theirs = pair.theirs + theirs(large)
            if ours is not None and small is not None:
                wanted = pair.theirs[pair.real][:, self.channels]
                sums.add(small[pair.real], wanted - (pair.ours + ours(small))[pair.real])
        if ours is None:
            return
        sums.correct(ours, self.ridge)
        for pair, (_, small) in zip(pairs, inputs, strict=True):
            pair.ours = pair.ours + ours(small)

    def _last_norm(self, pairs: list[_Pair], theirs: nn.LayerNorm, ours: nn.LayerNorm, *, to_logits: bool) -> None:
        """Fit the norm at the end of a side: towards the kept channels, or towards the same logits."""
        removed = torch.ones(self.teacher.config.d_model, dtype=torch.bool, device=self.channels.device)
        removed[self.channels] = False
        scale = _embedding_scale(self.teacher, self.student) if to_logits else 1.0
        # Removed channels spoke through their columns of the table; the kept columns say what they can of it.
        small = self.student.model.shared.weight.double()
        missing = small.T @ self.teacher.model.shared.weight[:, removed].double()
        penalty = self.ridge * (small.T @ small).diagonal().mean() * torch.eye(small.shape[1]).to(small)
        spoken = torch.linalg.solve(small.T @ small + penalty, missing).T.float()
        places = []
        for pair in pairs:
            states = theirs(pair.theirs[pair.real])
            wanted = states[:, self.channels] / scale
            if to_logits:
                wanted = wanted + states[:, removed] @ spoken
            places.append((pair.ours[pair.real], wanted))
        _fit_norm(ours, places)
        for pair in pairs:
            pair.normed = theirs(pair.theirs), ours(pair.ours)

    @staticmethod
    def _normed(pair: _Pair) -> tuple[Tensor, Tensor]:
        assert pair.normed is not None
        return pair.normed


def _fit_norm(norm: nn.LayerNorm, places: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Change gain and bias of each channel by least squares, from inputs and wanted outputs ``(N, D)``."""
    squares, sums, crosses, left_sums = (torch.zeros_like(norm.weight, dtype=torch.float64) for _ in range(4))
    count = 0
    for inputs_ND, wanted_ND in places:
        plain_ND = layer_norm(inputs_ND, norm.normalized_shape, eps=norm.eps).double()
        left_ND = (wanted_ND - norm(inputs_ND)).double()
        squares, sums = squares + plain_ND.square().sum(dim=0), sums + plain_ND.sum(dim=0)
        crosses, left_sums = crosses + (plain_ND * left_ND).sum(dim=0), left_sums + left_ND.sum(dim=0)
        count += len(plain_ND)
    spread_D = squares - sums * sums / count
    gain_D = torch.where(spread_D > 1e-9 * count, (crosses - sums * left_sums / count) / spread_D, 0.0)
    norm.weight.add_(gain_D.to(norm.weight.dtype))
    norm.bias.add_(((left_sums - gain_D * sums) / count).to(norm.bias.dtype))


def _attend(attention: Any, query_BTD: Tensor, key_BSD: Tensor, allowed: Tensor) -> Tensor:
    """Return what the output projection reads, ``(B, T, H·C)``."""
    batch, length = query_BTD.shape[:2]
    query, key, value = (
        projection(states).view(batch, states.shape[1], -1, attention.head_dim).transpose(1, 2)
        for projection, states in (
            (attention.q_proj, query_BTD),
            (attention.k_proj, key_BSD),
            (attention.v_proj, key_BSD),
        )
    )
    context = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=attention.scaling)
    return context.transpose(1, 2).reshape(batch, length, -1)


def _memory(pair: _Pair) -> tuple[Tensor, Tensor, Tensor]:
    assert pair.memory is not None
    return pair.memory


def _sides(kept: Kept) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (("encoder", kept.encoder_layers), ("decoder", kept.decoder_layers))


def _real_source(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool()


def _real_target(batch: Batch, pad: int) -> Tensor:
    return batch["labels"] != IGNORED if "labels" in batch else batch["decoder_input_ids"] != pad


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
