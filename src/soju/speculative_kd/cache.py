"""A key-value cache whose rows have their own lengths, and a model that reads through it.

`RowCache` writes the tokens of each row behind that row's own last token. Nothing is padded on the left, moved or
cropped: taking tokens back is a smaller length, and what lies behind it is masked until it is overwritten. The stock
caches of transformers 5.23 have one length for all rows.

Shape letters: B = rows, Q = tokens a row that one pass reads, L = slots of the cache, H = hidden width,
A = key-value heads, D = their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from soju.core.errors import BadNumbersError, UserError


class RowLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, ``(B, A, L, D)``."""

    is_compileable = True
    is_sliding = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because a masked slot still takes part in a product with weight 0, and 0 x NaN is NaN."""
        rows, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.owner.slots, width)
        self.values = value_states.new_zeros(rows, heads, self.owner.slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, A, Q, D) at the announced positions and return the slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, used = self.owner.common_start, self.owner.used
        if start is not None:  # all rows have one length: a slice is cheaper than an index
            self.keys[:, :, start : start + key_states.shape[2]] = key_states
            self.values[:, :, start : start + key_states.shape[2]] = value_states
        else:
            rows_B1, positions_BQ = self.owner.places_on(key_states.device)
            self.keys[rows_B1, :, positions_BQ] = key_states.transpose(1, 2)
            self.values[rows_B1, :, positions_BQ] = value_states.transpose(1, 2)
        return self.keys[:, :, :used], self.values[:, :, :used]

    def resize(self, slots: int) -> None:
        """Move what is written into longer tensors."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], slots, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the slots a mask covers, and where it begins."""
        return self.owner.used, 0

    def get_seq_length(self) -> int:
        """Return the length of the longest row."""
        return max(self.owner.lengths)

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.owner.slots


class RowCache(Cache):
    """A transformers cache with one length a row, known on the host, so that no pass waits for the device."""

    def __init__(
        self, layers: int, rows: int, *, slots: int, most: int | None = None, device: torch.device, fixed: bool = False
    ) -> None:
        """Make an empty cache.

        Args:
            layers: Decoder layers.
            rows: B.
            slots: Tokens a row can hold; grows by doubling unless `fixed`.
            most: It grows no further than this.
            device: Where position ids and masks are made.
            fixed: Attend to all slots and write by index, so that shapes never change and one compiled graph serves.
        """
        self.slots = slots
        self.most = most
        self.fixed = fixed
        self.home = device
        self.lengths = [0] * rows
        """Tokens held, one number a row; assign smaller ones to take tokens back."""
        self.used = 0
        self.common_start: int | None = None
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])

    def announce(self, width: int) -> tuple[Tensor, Tensor]:
        """Prepare a pass.

        Args:
            width: Q, tokens a row.

        Returns:
            Position ids (B, Q), and the mask (B, 1, Q, slots in use), True where a token attends.
        """
        longest = max(self.lengths) + width
        if longest > self.slots:
            self._grow(longest)
        lengths_B = torch.tensor(self.lengths, device=self.home)
        positions_BQ = lengths_B[:, None] + torch.arange(width, device=self.home)
        rows_B1 = torch.arange(len(self.lengths), device=self.home)[:, None]
        self._places = {self.home: (rows_B1, positions_BQ)}
        self.used = self.slots if self.fixed else longest
        equal = not self.fixed and min(self.lengths) == max(self.lengths)
        self.common_start = self.lengths[0] if equal else None
        mask_BQL = torch.arange(self.used, device=self.home) <= positions_BQ[:, :, None]
        return positions_BQ, mask_BQL[:, None]

    def places_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return row and position of each written token on the device of a layer."""
        if device not in self._places:
            rows_B1, positions_BQ = self._places[self.home]
            self._places[device] = (rows_B1.to(device), positions_BQ.to(device))
        return self._places[device]

    def written(self, width: int) -> None:
        """Count the tokens of a pass."""
        self.lengths = [length + width for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other rows."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            if layer.is_initialized:
                index = torch.tensor(rows, dtype=torch.long, device=layer.keys.device)
                layer.keys, layer.values = layer.keys[index], layer.values[index]

    def _grow(self, needed: int) -> None:
        if self.fixed:
            raise RuntimeError(f"a fixed cache of {self.slots:,} slots was asked for {needed:,}")
        self.slots = power_of_two(needed) if self.most is None else max(needed, min(power_of_two(needed), self.most))
        for layer in self.layers:
            if layer.is_initialized:
                layer.resize(self.slots)


class Reader:
    """A causal language model, split into what reads tokens and what makes logits, that reads through `RowCache`."""

    def __init__(
        self, model: Any, side: str, *, around: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        """Look at the model and try it.

        Args:
            model: A decoder of transformers, alone or under PEFT.
            side: What errors call it, ``student`` or ``teacher``.
            around: Entered around every pass, for example ``model.disable_adapter``.

        Raises:
            UserError: If the model cannot be read row by row.
        """
        self.model = model
        self.side = side
        self.around = around or nullcontext
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = base.config
        self.name = type(base).__name__
        self.head: Any = base.get_output_embeddings()
        self.body: Any = base.base_model
        self.refuse_unless(self.head is not None and self.body is not base, "it is no decoder with an output embedding")
        self.layers = self._full_attention_layers()
        self.vocabulary = len(self.head.weight)
        self.device: torch.device = base.get_input_embeddings().weight.device
        self._try(base)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return ``(N, V)``."""
        with self.around():
            result: Tensor = self.head(hidden_NH)
        return result

    def read(self, ids_BQ: Tensor, cache: RowCache, body: Callable[..., Any] | None = None) -> Tensor:
        """Read tokens behind what the cache holds and return their hidden states, ``(B, Q, H)``.

        Args:
            ids_BQ: One row of tokens for each row of the cache.
            cache: Written to.
            body: The compiled form, when there is one.

        Returns:
            What the output embedding takes.
        """
        positions_BQ, mask_B1QL = cache.announce(ids_BQ.shape[1])
        if self.config._attn_implementation == "eager":  # adds its mask
            dtype = self.head.weight.dtype
            mask_B1QL = torch.zeros_like(mask_B1QL, dtype=dtype).masked_fill_(~mask_B1QL, torch.finfo(dtype).min)
        with self.around():
            hidden_BQH: Tensor = (body or self.forward)(ids_BQ.to(self.device), positions_BQ, mask_B1QL, cache)
        cache.written(ids_BQ.shape[1])
        return hidden_BQH

    def forward(self, ids_BQ: Tensor, positions_BQ: Tensor, mask_B1QL: Tensor, cache: RowCache) -> Tensor:
        """Call the decoder; this is what gets compiled."""
        output = self.body(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            attention_mask=mask_B1QL,
            past_key_values=cache,
            use_cache=True,
        )
        hidden_BQH: Tensor = output.last_hidden_state
        return hidden_BQH

    def cache(self, rows: int, *, slots: int, most: int | None = None, fixed: bool = False) -> RowCache:
        """Return an empty cache for this model; see `RowCache`."""
        return RowCache(self.layers, rows, slots=slots, most=most, device=self.device, fixed=fixed)

    def prefill(self, cache: RowCache, prompts: Sequence[Sequence[int]]) -> bool:
        """Read all tokens of the prompts but the last of each; return whether there were any."""
        longest = max(len(prompt) for prompt in prompts) - 1
        if longest < 1:
            return False
        ids = [[*prompt[:-1], *[0] * (longest - len(prompt) + 1)] for prompt in prompts]
        self.read(torch.tensor(ids, device=self.device), cache)
        cache.lengths = [len(prompt) - 1 for prompt in prompts]
        return True

    def refuse_unless(self, holds: bool, why: str) -> None:
        """Raise a `UserError` that names the model, unless something holds."""
        if not holds:
            raise UserError(
                f"{self.side} {self.name}: {why}; rollouts need a decoder with full attention in every layer, "
                "such as Llama or Qwen3"
            )

    def not_finite(self, place: str) -> BadNumbersError:
        """Return the error for NaN or infinite logits."""
        return BadNumbersError(
            f"{self.side} {self.name}: logits of {place} are not finite; "
            "check the weights, and use bfloat16 or float32 if they are float16"
        )

    def _full_attention_layers(self) -> int:
        """Return the number of layers, or refuse a model of which one attends to less than all tokens."""
        config = self.config.get_text_config(decoder=True)
        number = getattr(config, "num_hidden_layers", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
            kinds = ["full_attention" if window is None else "sliding_attention"]
        other = sorted(set(kinds) - {"full_attention"})
        self.refuse_unless(not other, f"it has layers of the kind {', '.join(other)}")
        self.refuse_unless(isinstance(number, int), "its config does not say how many layers it has")
        return int(number or 0)

    @torch.no_grad()
    def _try(self, base: Any) -> None:
        """Compare four tokens read at once with the same read in two ragged passes, and the head with the model's own.

        Configs do not tell everything: a model may keep other state than keys and values, derive positions from
        elsewhere, or scale its logits.
        """
        ids = torch.arange(1, 5, device=self.device) % self.vocabulary
        cache = self.cache(2, slots=8)
        with reading(self), self.around():
            whole = self.body(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            try:
                self.read(torch.stack([ids[:2], ids[:2]]), cache)
                cache.lengths = [1, 2]  # the first row takes a token back and reads it again
                ragged = self.read(torch.stack([ids[1:3], ids[2:4]]), cache)
            except (TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
                self.refuse_unless(False, f"it does not read through a cache with one length a row ({error})")
            self.refuse_unless(
                all(layer.is_initialized for layer in cache.layers), "it does not keep keys and values in the cache"
            )
            expected = torch.stack([whole[1:3], whole[2:4]])
            self.refuse_unless(_close(ragged, expected), "it reads a token differently after others than among them")
            logits = base(input_ids=ids[None], use_cache=False).logits[0]
            self.refuse_unless(_close(self.head(whole), logits), "it changes its logits after the output embedding")


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(expected.dtype, 0.1)
    found, expected = found.double(), expected.double().to(found.device)
    return bool((found - expected).norm() <= tolerance * expected.norm())


@contextmanager
def reading(*readers: Reader) -> Iterator[None]:
    """Switch off dropout and gradients, and attention that takes no mask a row; afterwards all is as it was."""
    training, attention = [], []
    for reader in readers:
        training += [module for module in reader.model.modules() if module.training]
        if reader.config._attn_implementation not in ("sdpa", "eager"):
            attention.append((reader.config, reader.config._attn_implementation))
            reader.config._attn_implementation = "sdpa"
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config, implementation in attention:
            config._attn_implementation = implementation


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is not below a number.

    >>> [power_of_two(n) for n in (1, 3, 4, 5)]
    [1, 4, 4, 8]
    """
    return 1 << max(0, least - 1).bit_length()
