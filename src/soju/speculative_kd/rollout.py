"""The rollout: the student proposes, the teacher reads with more knowledge and replaces what it would not have said.

For each row, with C the committed tokens and the last of prompt + C in neither cache:

1. the student proposes up to γ tokens, never past the budget and never behind an end token;
2. the teacher reads that last token and all proposals but the last one, in one pass;
3. a proposal passes if it is the teacher's most probable token, or among its `top_k` with at least `min_prob`;
4. the leading run is committed, then, if it is shorter than the block, one token of the teacher. There is no bonus
   token behind a whole block;
5. both caches keep the prompt and all of C but its last token.

Each committed token was therefore tested exactly once: it is a proposal that passed, or the replacement of one that did
not. With keyed noise nothing else decides, so block length, batch and implementation change no token.

The steps themselves are in `soju.speculative_kd.batch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soju.core.errors import UserError
from soju.speculative_kd.batch import Batch, Side
from soju.speculative_kd.cache import Reader, reading
from soju.speculative_kd.config import Implementation, RolloutSettings, progress_at
from soju.speculative_kd.controller import Costs, GammaController, measure_costs
from soju.speculative_kd.outcome import RolloutResult


@dataclass(frozen=True, slots=True)
class _Way:
    """What one implementation does differently."""

    adaptive: bool = False
    token_by_token: bool = False
    compiled: bool = False
    logged: bool = False


WAYS: dict[Implementation, _Way] = {
    "sequential": _Way(token_by_token=True),
    "parallel": _Way(),
    "adaptive": _Way(adaptive=True),
    "compiled": _Way(compiled=True),
    "debug": _Way(logged=True),
}


class Rollout:
    """Writes texts with a student and a teacher.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    >>> student, teacher = (LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=n)) for n in (1, 2))
    >>> settings = RolloutSettings(implementation="parallel", max_new_tokens=8, eos=(2,))
    >>> text = Rollout(student, teacher, settings)([[5, 6]], [[9, 9, 5, 6]], ids=["tradition_001"])
    >>> 1 <= len(text.tokens[0]) == len(text.teacher_hidden[0]) <= 8
    True
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        settings: RolloutSettings,
        *,
        costs: Costs | Path | None = None,
        total_steps: int | None = None,
        around_teacher: Callable[[], AbstractContextManager[Any]] | None = None,
        compile_backend: str = "inductor",
    ) -> None:
        """Look at both models.

        Args:
            student: A causal decoder of transformers.
            teacher: One with the same vocabulary; may be the same object and on other devices.
            settings: How to write.
            costs: Of ``adaptive``: values, or the file to read them from. Measured in the first call, and written to
                the file, if there are none.
            total_steps: Training steps of the run; needed when a setting moves over them.
            around_teacher: Entered around the teacher's passes, for example ``student.disable_adapter`` when the
                teacher is the student without its LoRA.
            compile_backend: Of ``compiled``, as `torch.compile` takes it.

        Raises:
            UserError: If a model cannot be read row by row, the vocabularies differ, or `total_steps` is missing.
        """
        self.settings = settings
        self.way = WAYS[settings.implementation]
        self.student = Reader(student, "student")
        self.teacher = Reader(teacher, "teacher", around=around_teacher)
        if self.student.vocabulary != self.teacher.vocabulary:
            raise UserError(
                f"student has {self.student.vocabulary:,} tokens and teacher {self.teacher.vocabulary:,}; "
                "take two models of one family with equal vocab_size"
            )
        if settings.scheduled and total_steps is None:
            raise UserError("rollout.top_k or min_prob moves over the steps; give total_steps, or one number each")
        self.total_steps = total_steps
        self.costs_path = costs if isinstance(costs, Path) else None
        self.controller: GammaController | None = None
        self._state: dict[str, Any] | None = None
        if isinstance(costs, Costs):
            self._control(costs)
        elif self.costs_path is not None and self.costs_path.exists():
            self._control(Costs.read(self.costs_path))
        self.steps: list[Callable[..., Tensor]] = []
        if self.way.compiled:
            self.steps = [_compiled(reader, compile_backend) for reader in (self.student, self.teacher)]

    def __call__(
        self,
        queries: Sequence[Sequence[int]],
        privileged: Sequence[Sequence[int]],
        *,
        ids: Sequence[str | int],
        epoch: int = 0,
        step: int = 0,
        keep_hidden: bool = True,
    ) -> RolloutResult:
        """Write one text a row.

        Args:
            queries: The student's prompts, as token ids.
            privileged: The teacher's prompts for the same rows.
            ids: Of the rows; with seed and epoch they decide all draws.
            epoch: Pass over the data.
            step: Training step, for settings that move.
            keep_hidden: Keep the teacher's hidden states for the loss.

        Returns:
            The texts and counts.

        Raises:
            UserError: If a prompt is empty, has unknown tokens, or leaves too little context for the budget.
            BadNumbersError: If logits are not finite.
        """
        self._check(queries, privileged, ids)
        start = time.perf_counter()
        with reading(self.student, self.teacher):
            if self.way.adaptive and self.controller is None:
                self._measure(queries, privileged)
            batch = self.begin(queries, privileged, ids=ids, epoch=epoch, step=step, keep_hidden=keep_hidden)
            while batch.live:
                tested, passed = batch.block(self.gamma())
                if self.controller is not None:
                    self.controller.observe(tested, passed)
        result = batch.result()
        result.seconds = time.perf_counter() - start
        return result

    def begin(
        self,
        queries: Sequence[Sequence[int]],
        privileged: Sequence[Sequence[int]],
        *,
        ids: Sequence[str | int],
        epoch: int = 0,
        step: int = 0,
        keep_hidden: bool = True,
    ) -> Batch:
        """Read the prompts and return the batch before its first block. See `__call__`."""
        progress = 0 if self.total_steps is None else progress_at(step, self.total_steps)
        budget, gamma = self.settings.max_new_tokens, self.settings.gamma
        student_step, teacher_step = self.steps or (None, None)
        return Batch(
            Side(self.student, queries, budget, gamma, step=student_step),
            Side(self.teacher, privileged, budget, gamma, step=teacher_step, step_width=gamma),
            self.settings,
            self.settings.rule(progress),
            ids=ids,
            epoch=epoch,
            token_by_token=self.way.token_by_token,
            logged=self.way.logged,
            keep_hidden=keep_hidden,
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain JSON; texts need no state, block lengths do."""
        return {} if self.controller is None else self.controller.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over `state`, now or as soon as costs are known."""
        if not state:
            return
        self._state = state
        if self.controller is not None:
            self.controller.restore(state)

    def gamma(self) -> int:
        """Return the length of the next block."""
        if self.way.adaptive and self.controller is not None:
            return self.controller.gamma()
        return self.settings.gamma

    def _control(self, costs: Costs) -> None:
        self.controller = GammaController(costs, self.settings.gamma)
        if self._state is not None:
            self.controller.restore(self._state)

    def _measure(self, queries: Sequence[Sequence[int]], privileged: Sequence[Sequence[int]]) -> None:
        """Measure costs for this batch, in the middle of its texts."""
        longest = max(map(len, [*queries, *privileged]))
        context = longest + min(self.settings.max_new_tokens, longest + 64) // 2
        costs = measure_costs(self.student, self.teacher, self.settings, rows=len(queries), context=context)
        if self.costs_path is not None:
            costs.write(self.costs_path)
        self._control(costs)

    def _check(
        self, queries: Sequence[Sequence[int]], privileged: Sequence[Sequence[int]], ids: Sequence[str | int]
    ) -> None:
        if not len(queries) == len(privileged) == len(ids) > 0:
            raise ValueError(
                "queries, privileged and ids must be equally many, at least one; "
                f"got {len(queries)}, {len(privileged)}, {len(ids)}"
            )
        for reader, prompts in ((self.student, queries), (self.teacher, privileged)):
            context = getattr(reader.config, "max_position_embeddings", None)
            for row, prompt in zip(ids, prompts, strict=True):
                place = f'row "{row}": the {reader.side}\'s prompt'
                if not len(prompt):
                    raise UserError(f"{place} is empty; it needs at least one token")
                if not 0 <= min(prompt) <= max(prompt) < reader.vocabulary:
                    raise UserError(
                        f"{place} has ids outside 0..{reader.vocabulary - 1}; use the model's own tokenizer"
                    )
                if context is not None and len(prompt) + self.settings.max_new_tokens > context:
                    raise UserError(
                        f"{place} of {len(prompt):,} tokens and max_new_tokens {self.settings.max_new_tokens:,} exceed "
                        f"its context of {context:,}; shorten the text or lower rollout.max_new_tokens"
                    )


def _compiled(reader: Reader, backend: str) -> Callable[..., Tensor]:
    """Compile the decoder for fixed shapes: one graph for each number of rows, of tokens and of slots."""
    step: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]
        reader.forward, dynamic=False, backend=backend, recompile_limit=64, isolate_recompiles=True
    )
    return step
