"""The trainer: all texts of an optimiser step are written at once, then learnt token by token.

The stock trainer asks `get_batch_samples` for the micro-batches of a step. There the texts are written, for all of them
together, and handed on as labels; so it counts the committed tokens over micro-batches and ranks itself, and the loss
is one mean over the tokens of the global step. A text has at least one token, so no rank is without any.

Shape letters: B = rows, L = tokens of a padded row, N = tokens of all texts, H and G = hidden widths of student and
teacher.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from soju.core.files import write_json
from soju.speculative_kd.cache import Reader
from soju.speculative_kd.config import DivergenceSettings, Method, RolloutSettings
from soju.speculative_kd.controller import Costs, measure_costs
from soju.speculative_kd.data import Example
from soju.speculative_kd.divergence import Projection, token_divergence
from soju.speculative_kd.forced import hidden_at_labels, log_likelihoods, pack, parts_of, read_texts
from soju.speculative_kd.outcome import Outcome, RolloutResult
from soju.speculative_kd.rollout import Rollout
from soju.training.history import LOSS
from soju.training.ranks import from_all, on_main_process
from soju.training.reliable import OwnProgress, ReliableTrainer
from soju.training.state import kept_random_state

Target = Literal["teacher", "start"]
"""Whose distribution a row learns."""


@dataclass(frozen=True, slots=True)
class Way:
    """What a method does."""

    privileged: bool
    """Whether the teacher reads the knowledge."""
    text: Literal["together", "student", "teacher"]
    """Who writes what is learnt on."""
    hard: bool = False
    """Whether the tokens themselves are learnt, not distributions."""


WAYS: dict[Method, Way] = {
    "lupi_skd": Way(True, "together"),
    "skd": Way(False, "together"),
    "opd": Way(True, "student"),
    "kd": Way(True, "teacher"),
    "sft": Way(True, "teacher", hard=True),
}


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a student learns, from whom, and how."""

    examples: Sequence[Example]
    """One row each."""
    teacher: Any
    method: Method
    rollout: RolloutSettings
    loss: DivergenceSettings
    general: Sequence[Example] = ()
    """General questions to choose from."""
    slots: int = 0
    """Rows of an epoch that are general questions; each epoch goes on where the last one ended."""
    start: Any = None
    """The student before training, when general questions are learnt from it and it is not the teacher."""

    @property
    def way(self) -> Way:
        """What the method does."""
        return WAYS[self.method]

    def __len__(self) -> int:
        return len(self.examples) + self.slots

    def example(self, row: int, epoch: int) -> Example:
        """Return what a row asks in an epoch."""
        if row < len(self.examples):
            return self.examples[row]
        return self.general[(row - len(self.examples) + epoch * self.slots) % len(self.general)]

    def target(self, row: int) -> Target:
        """Return whom a row is learnt from."""
        return "start" if row >= len(self.examples) and self.start is not None else "teacher"

    def model_of(self, target: Target) -> Any:
        """Return the frozen model."""
        return self.start if target == "start" else self.teacher

    def prompt(self, example: Example) -> list[int]:
        """Return what the teacher reads before a text."""
        return example.privileged if self.way.privileged else example.plain


def write_teacher_texts(lesson: Lesson, path: Path) -> dict[str, list[int]]:
    """Let the teacher write a text for each question, with the knowledge, once: what ``kd`` and ``sft`` learn.

    The teacher is its own student, and all that it proposes passes, so the texts are pure draws from it.

    Args:
        lesson: The questions.
        path: Where texts are kept and read from.

    Returns:
        Texts by id.
    """
    if path.exists():
        texts: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return texts
    settings = _nothing_rejected(lesson.rollout, lesson.teacher).model_copy(
        update={"student_temperature": lesson.rollout.teacher_temperature}
    )
    texts = {}
    for target, examples in (("teacher", lesson.examples), (lesson.target(len(lesson.examples)), lesson.general)):
        writer = Rollout(lesson.model_of(target), lesson.model_of(target), settings)  # type: ignore[arg-type]
        for start in range(0, len(examples), 16):
            part = examples[start : start + 16]
            prompts = [lesson.prompt(one) for one in part]
            written = writer(prompts, prompts, ids=[one.id for one in part], keep_hidden=False)
            texts |= {one.id: tokens for one, tokens in zip(part, written.tokens, strict=True)}
    write_json(path, texts)
    return texts


def _nothing_rejected(settings: RolloutSettings, model: Any) -> RolloutSettings:
    vocabulary = len(model.get_output_embeddings().weight)
    return settings.model_copy(
        update={"top_k": vocabulary, "min_prob": 0.0, "implementation": "parallel", "replacement": "full"}
    )


@dataclass
class Window:
    """Sums over the texts since the last log line, plain numbers; a checkpoint holds them."""

    sums: dict[str, float] = field(default_factory=dict)

    def count(self, more: Mapping[str, float]) -> None:
        """Add to sums by name."""
        for name, value in more.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def add(self, result: RolloutResult, examples: Sequence[Example]) -> None:
        """Count a rollout."""
        self.count(
            {
                "tested": result.tested,
                "passed": result.passed,
                "by_rank": result.rejected_by_rank,
                "by_min_prob": result.rejected_by_min_prob,
                "outside": sum(result.outside),
                "proposed": sum(result.gammas),
                "blocks": result.blocks,
                "teacher_passes": result.teacher_passes,
                "seconds": result.seconds,
            }
        )
        for example, outcomes in zip(examples, result.outcomes, strict=True):
            for group in {example.language, example.category} - {""}:
                passed = outcomes.count(Outcome.PASSED)
                self.count({f"tested/{group}": len(outcomes), f"passed/{group}": passed})

    def add_texts(self, texts: Sequence[Sequence[int]]) -> None:
        """Count texts, however they were written."""
        for text in texts:
            runs = [tuple(text[place : place + 4]) for place in range(len(text) - 3)]
            repeated = len(runs) - len(set(runs))
            self.count({"texts": 1, "tokens": len(text), "runs": len(runs), "repeated": repeated})

    @staticmethod
    def report(sums: Mapping[str, float]) -> dict[str, float]:
        """Return what is logged of the sums of all ranks."""
        ratios = {
            "acceptance": ("passed", "tested"),
            "rejected_by_rank": ("by_rank", "tested"),
            "rejected_by_min_prob": ("by_min_prob", "tested"),
            "replaced_outside": ("outside", "tested"),
            "gamma": ("proposed", "blocks"),
            "teacher_passes_a_token": ("teacher_passes", "tested"),
            "length": ("tokens", "texts"),
            "repetition": ("repeated", "runs"),
            "tokens_per_second": ("tested", "seconds"),
            "privileged_gain": ("gain", "gained"),
            "misled_gain": ("misled", "gained"),
        }
        groups = sorted(name.removeprefix("tested/") for name in sums if name.startswith("tested/"))
        ratios |= {f"acceptance_{group}": (f"passed/{group}", f"tested/{group}") for group in groups}
        return {name: sums[above] / sums[below] for name, (above, below) in ratios.items() if sums.get(below)}


class RolloutState:
    """What a checkpoint holds of the rollouts: controllers and the open window, of each rank."""

    def __init__(self) -> None:
        self.window = Window()
        self.rollouts: dict[str, Rollout] = {}
        self.waiting: dict[str, dict[str, Any]] = {}
        """States of rollouts that were restored before the rollouts were made."""
        self._gathered: list[dict[str, Any]] = []

    def gather(self) -> None:
        """Collect the state of every rank, for `state_dict`, which the first rank alone calls."""
        states = {name: rollout.state() for name, rollout in self.rollouts.items()}
        self._gathered = from_all({"rollouts": states, "sums": dict(self.window.sums)})

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"ranks": self._gathered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back this rank's part."""
        rank = torch.distributed.get_rank() if len(state["ranks"]) > 1 else 0
        own = state["ranks"][rank]
        self.window.sums = dict(own["sums"])
        self.waiting = dict(own["rollouts"])


class _Distilling(Trainer):
    """The stock trainer with texts written in `get_batch_samples` and the loss between two models."""

    lesson: Lesson
    texts: dict[str, list[int]]
    rollout_state: RolloutState
    costs: Path | None
    validation: Callable[[Any], Mapping[str, float]] | None
    control: Any
    _steps_in_epoch: int

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take the rows of a step and write their texts."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [row for batch in batches for row in batch["row"]]
        if rows:
            written = self.write(rows)
            places = iter(range(len(rows)))
            batches = [self._packed([(row, *written[next(places)]) for row in batch["row"]]) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def write(self, rows: Sequence[int]) -> list[tuple[Example, list[int], Tensor | None]]:
        """Return question, text and the teacher's hidden states of each row, in order."""
        epoch = self.state.global_step // self._steps_in_epoch
        examples = [self.lesson.example(row, epoch) for row in rows]
        written: dict[int, tuple[Example, list[int], Tensor | None]] = {}
        places: dict[Target, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            places[self.lesson.target(row)].append(place)
        # A rollout must leave the random state alone: which texts there are may not decide what dropout does.
        with kept_random_state():
            for target, of_target in places.items():
                part = [examples[place] for place in of_target]
                texts, hidden = self._texts(target, part, epoch)
                self.rollout_state.window.add_texts(texts)
                for place, text, states in zip(of_target, texts, hidden, strict=True):
                    written[place] = (examples[place], text, states)
            step = self.state.global_step + 1
            if step == 1 or step % self.args.logging_steps == 0:
                self._measure_gain([written[place] for place in sorted(written)][:4])
        return [written[place] for place in range(len(rows))]

    def _texts(
        self, target: Target, examples: Sequence[Example], epoch: int
    ) -> tuple[list[list[int]], Sequence[Tensor | None]]:
        lesson = self.lesson
        prompts, ids = [lesson.prompt(one) for one in examples], [one.id for one in examples]
        if lesson.way.text == "teacher":
            texts = [self.texts[name] for name in ids]
            if lesson.way.hard:
                return texts, [None] * len(texts)
            return texts, read_texts(lesson.model_of(target), prompts, texts)
        queries = [one.query for one in examples]
        result = self._rollouts()[target](queries, prompts, ids=ids, epoch=epoch, step=self.state.global_step)
        self.rollout_state.window.add(result, examples)
        assert result.teacher_hidden is not None
        return result.tokens, result.teacher_hidden

    def _rollouts(self) -> Mapping[str, Rollout]:
        """Return a rollout with each target, made in the first step, when models are on their devices.

        All are made at once, on every rank: measuring costs is something that ranks do together.
        """
        state, lesson = self.rollout_state, self.lesson
        if not state.rollouts:
            student = self.accelerator.unwrap_model(self.model)
            settings = lesson.rollout
            if lesson.way.text == "student":
                settings = _nothing_rejected(settings, student)
            for target in sorted({lesson.target(row) for row in range(len(lesson))}):
                costs = on_main_process(functools.partial(self._costs, target, student, settings))
                rollout = Rollout(
                    student, lesson.model_of(target), settings, total_steps=self.state.max_steps, costs=costs
                )
                rollout.restore(state.waiting.pop(target, {}))
                state.rollouts[target] = rollout
        return state.rollouts

    def _costs(self, target: Target, student: Any, settings: RolloutSettings) -> Costs | None:
        """Return the costs of a run: measured once, or read, so that a resume has the same ones."""
        if settings.implementation != "adaptive":
            return None
        name = self.costs and (self.costs.name if target == "teacher" else f"{target}.{self.costs.name}")
        path = self.costs.with_name(name) if self.costs is not None and name else None
        if path is not None and path.exists():
            return Costs.read(path)
        prompts = [ids for one in (*self.lesson.examples, *self.lesson.general) for ids in (one.query, one.privileged)]
        longest = max(map(len, prompts))
        rows = min(len(self.lesson), self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)
        context = longest + min(settings.max_new_tokens, longest + 64) // 2
        sides = Reader(student, "student"), Reader(self.lesson.model_of(target), "teacher")
        found = measure_costs(*sides, settings, rows=rows, context=context)
        if path is not None:
            found.write(path)
        return found

    @torch.no_grad()
    def _measure_gain(self, written: Sequence[tuple[Example, list[int], Tensor | None]]) -> None:
        """Note how much likelier the teacher finds texts with the knowledge, and with that of another row."""
        chosen = [(one, text) for one, text, _ in written if one.misled is not None]
        if not chosen:
            return
        texts, teacher = [text for _, text in chosen], self.lesson.teacher
        sides = [
            [one.privileged for one, _ in chosen],
            [one.plain for one, _ in chosen],
            [one.misled or [] for one, _ in chosen],
        ]
        with_it, without, misled = (
            math.fsum(log_likelihoods(teacher, read_texts(teacher, prompts, texts), texts)) for prompts in sides
        )
        tokens = sum(map(len, texts))
        self.rollout_state.window.count({"gain": with_it - without, "misled": misled - without, "gained": tokens})

    def _packed(self, rows: Sequence[tuple[int, Example, list[int], Tensor | None]]) -> dict[str, Any]:
        """Return a micro-batch. Of an example it takes `Example.query` alone: no other prompt reaches the student."""
        packed = pack([example.query for _, example, _, _ in rows], [text for _, _, text, _ in rows])
        batch: dict[str, Any] = {
            "input_ids": packed.ids_BL,
            "attention_mask": packed.mask_BL,
            "shift_labels": packed.labels_BL,
            "labels": packed.labels_BL,
        }
        for target in ("teacher", "start"):
            states = [hidden for row, _, _, hidden in rows if self.lesson.target(row) == target and hidden is not None]
            if states:
                batch[f"hidden_{target}"] = torch.cat(states)
        from_start = [self.lesson.target(row) == "start" for row, _, text, _ in rows for _ in text]
        batch["from_start"] = torch.tensor(from_start)
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch: its sum over tokens, divided by the tokens of the global step.

        It is computed in the place of the model's forward pass, inside whatever wraps the model, or DDP would not see
        the pass and would leave gradients of ranks apart.
        """
        core = self.accelerator.unwrap_model(model)
        own = vars(core).get("forward")

        def restore() -> None:
            if own is None:
                vars(core).pop("forward", None)
            else:
                core.forward = own

        def forward(batch: dict[str, Any]) -> Tensor:
            restore()
            return self._sum_of_tokens(core, batch)

        core.forward = forward
        try:
            loss = model(inputs) / num_items_in_batch
        finally:
            restore()
        # DDP takes the mean of the ranks' gradients, and the number of tokens is that of all ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _sum_of_tokens(self, student: Any, batch: dict[str, Any]) -> Tensor:
        hidden_NH = hidden_at_labels(student, batch["input_ids"], batch["attention_mask"], batch["shift_labels"])
        _, head = parts_of(student)
        if self.lesson.way.hard:
            labels_N = batch["shift_labels"][batch["shift_labels"] >= 0]
            return cross_entropy(head(hidden_NH).float(), labels_N, reduction="sum")
        total: Tensor = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
        targets: tuple[Target, ...] = ("teacher", "start")
        for target in targets:
            if f"hidden_{target}" not in batch:
                continue
            of_target_N = batch["from_start"] == (target == "start")
            _, teacher_head = parts_of(self.lesson.model_of(target))
            part_NH = hidden_NH if bool(of_target_N.all()) else hidden_NH[of_target_N]
            loss, _ = token_divergence(
                Projection(part_NH, head.weight, head.bias),
                Projection(batch[f"hidden_{target}"], teacher_head.weight, teacher_head.bias),
                self.lesson.loss,
            )
            total = total + loss
        return total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validate as the recipe says, on every rank with the same result."""
        assert self.validation is not None
        scores = self.validation(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class SkdTrainer(OwnProgress, ReliableTrainer, _Distilling):
    """Trains a student on texts that it and a frozen teacher write.

    Args:
        lesson: What it learns.
        validation: Scores a model by name; needed when the arguments ask for evaluation.
        costs: ``costs.json`` of the run, where costs of passes are kept.
        texts: What ``kd`` and ``sft`` learn, by id; see `write_teacher_texts`.
        **more: See `ReliableTrainer`.
    """

    def __init__(
        self,
        *,
        lesson: Lesson,
        validation: Callable[[Any], Mapping[str, float]] | None = None,
        costs: Path | None = None,
        texts: dict[str, list[int]] | None = None,
        **more: Any,
    ) -> None:
        self.lesson = lesson
        self.validation = validation
        self.costs = costs
        self.texts = texts or {}
        self.rollout_state = RolloutState()
        for frozen in (lesson.teacher, lesson.start):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        rows = _Rows(len(lesson))
        super().__init__(
            train_dataset=rows,
            eval_dataset=rows if validation is not None else None,
            data_collator=_numbers,
            extra_state={"rollouts": self.rollout_state},
            **more,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the step, whatever the class says

    def _state_to_save(self) -> Any:
        self.rollout_state.gather()
        return super()._state_to_save()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with what became of the proposals since the last line."""
        if LOSS in logs:
            totals = Window()
            for sums in from_all(dict(self.rollout_state.window.sums)):
                totals.count(sums)
            logs |= Window.report(totals.sums)
            self.rollout_state.window.sums.clear()
        super().log(logs, start_time)


class _Rows(torch.utils.data.Dataset[int]):
    """The numbers of rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row


def _numbers(rows: Sequence[int]) -> dict[str, list[int]]:
    return {"row": list(rows)}


def skd_arguments(arguments: dict[str, Any]) -> TrainingArguments:
    """Return the stock arguments, as this trainer needs them: no columns to remove, tokens counted over all ranks."""
    return TrainingArguments(
        **arguments,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
