"""One batch of a rollout: propose, read, test, commit, take back, block after block.

Shape letters: B = rows in the batch, G = proposals of a block, Q = tokens read at once, N = positions tested at once,
H = hidden width, V = tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from soju.speculative_kd.acceptance import TESTED_AT_ONCE, Decisions, decide, decision_margin, replace
from soju.speculative_kd.cache import Reader, RowCache, power_of_two
from soju.speculative_kd.config import AcceptRule, RolloutSettings
from soju.speculative_kd.noise import Role, draw, keyed_uniform, row_keys
from soju.speculative_kd.outcome import Event, Outcome, RolloutResult

LEAST_FIXED_SLOTS = 64
"""Of a compiled batch: each size is a graph of its own, and small ones save nothing."""

EMPTY = -1
"""In place of a row: this slot of a compiled batch holds none."""


class Side:
    """One model in a batch: its cache, and the last token of each row, which it has not read."""

    def __init__(
        self,
        reader: Reader,
        prompts: Sequence[Sequence[int]],
        budget: int,
        gamma: int,
        *,
        step: Callable[..., Tensor] | None = None,
        step_width: int = 1,
    ) -> None:
        """Read the prompts.

        Args:
            reader: The model.
            prompts: Token ids, at least one a row.
            budget: Tokens a text may have.
            gamma: The longest block.
            step: The compiled decoder; then shapes stay as they are for the whole batch.
            step_width: Tokens it reads at a time.
        """
        self.reader = reader
        self.step = step
        self.step_width = step_width
        longest = max(map(len, prompts))
        most = longest + budget + gamma  # rows at their budget are read along until the block ends
        if step is None:
            slots = min(power_of_two(longest + gamma), most)
        else:
            slots = max(LEAST_FIXED_SLOTS, power_of_two(most))
            prompts = [*prompts, *[[0]] * (power_of_two(len(prompts)) - len(prompts))]
        self.cache: RowCache = reader.cache(len(prompts), slots=slots, most=most, fixed=step is not None)
        self.passes = int(reader.prefill(self.cache, prompts))
        if step is not None and not self.passes:  # tensors must not be allocated within the compiled graph
            reader.read(torch.zeros(len(prompts), 1, dtype=torch.long), self.cache)
            self.cache.lengths = [0] * len(prompts)
            self.passes = 1
        self.last = [prompt[-1] for prompt in prompts]
        self.before = list(self.cache.lengths)

    def last_B1(self) -> Tensor:
        """Return the tokens that were not read."""
        return torch.tensor(self.last, device=self.reader.device)[:, None]

    def read(self, ids_BQ: Tensor) -> Tensor:
        """Return hidden states, ``(B, Q, H)``."""
        self.passes += 1
        width = ids_BQ.shape[1]
        if self.step is not None:  # a short block is read as a whole one, and the filler taken back
            ids_BQ = pad(ids_BQ, (0, self.step_width - width))
        return self.reader.read(ids_BQ, self.cache, self.step)[:, :width]

    def commit(self, committed: Sequence[Sequence[int]]) -> None:
        """Keep what a block added to each row, all but its last token, and take the rest back."""
        self.before = [length + len(tokens) for length, tokens in zip(self.before, committed, strict=True)]
        self.cache.lengths = list(self.before)
        self.last = [tokens[-1] if tokens else last for tokens, last in zip(committed, self.last, strict=True)]

    def keep(self, slots: Sequence[int]) -> None:
        """Drop the other rows; under a compiled decoder they stay, empty."""
        if self.step is None:
            self.cache.keep(slots)
            self.last = [self.last[slot] for slot in slots]
        else:
            self.cache.lengths = [length if slot in slots else 0 for slot, length in enumerate(self.cache.lengths)]
        self.before = list(self.cache.lengths)


@dataclass
class _Block:
    """What one block is about; lists go by slot."""

    before: list[int]
    """Length of each text when it began."""
    limits: list[int]
    """Proposals of each row that count: within its budget and up to its first end token."""
    proposals: list[list[int]] = field(default_factory=list)
    chances: list[list[float]] = field(default_factory=list)
    """Probability of each proposal under the student, when events are logged."""


class Batch:
    """Rows that are written together; finished ones leave."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        settings: RolloutSettings,
        rule: AcceptRule,
        *,
        ids: Sequence[str | int],
        epoch: int,
        token_by_token: bool = False,
        logged: bool = False,
        keep_hidden: bool = True,
    ) -> None:
        """Begin with empty texts.

        Args:
            student: Has read its prompts.
            teacher: Has read its prompts.
            settings: Budget, end tokens, the student's temperature, seed.
            rule: What the teacher lets pass.
            ids: Of the rows.
            epoch: Pass over the data.
            token_by_token: Let the teacher read one proposal a pass and stop at the last rejection.
            logged: Record an `Event` for each tested position.
            keep_hidden: Record the teacher's hidden states.
        """
        self.student, self.teacher = student, teacher
        self.settings, self.rule, self.epoch, self.ids = settings, rule, epoch, ids
        self.token_by_token, self.logged = token_by_token, logged
        rows, slots = len(ids), len(student.last)
        self.rows = [*range(rows), *[EMPTY] * (slots - rows)]
        """For each slot of the batch its row in the call, or `EMPTY`."""
        self.keys = row_keys(ids)
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.outcomes: list[list[Outcome]] = [[] for _ in range(rows)]
        self.outside = [0] * rows
        self.hidden: list[list[Tensor]] | None = [[] for _ in range(rows)] if keep_hidden else None
        self.gammas: list[int] = []
        self.events: list[Event] = []

    @property
    def live(self) -> bool:
        """Whether a row is unfinished."""
        return any(row != EMPTY for row in self.rows)

    def block(self, gamma: int) -> tuple[int, int]:
        """Write one block of at most `gamma` proposals a row.

        Args:
            gamma: >= 1.

        Returns:
            How many proposals were tested, and how many passed.
        """
        budget = self.settings.max_new_tokens
        before = [0 if row == EMPTY else len(self.texts[row]) for row in self.rows]
        limits = [0 if row == EMPTY else min(gamma, budget - done) for row, done in zip(self.rows, before, strict=True)]
        block = _Block(before, limits)
        self._propose(block)
        self._test(block)
        self.gammas.append(len(block.proposals[0]))

        spans = [(row, done) for row, done in zip(self.rows, before, strict=True)]
        new = [[] if row == EMPTY else self.texts[row][done:] for row, done in spans]
        self.student.commit(new)
        self.teacher.commit(new)
        outcomes = [outcome for row, done in spans if row != EMPTY for outcome in self.outcomes[row][done:]]
        self._leave()
        return len(outcomes), outcomes.count(Outcome.PASSED)

    def result(self) -> RolloutResult:
        """Return what was written."""
        return RolloutResult(
            tokens=self.texts,
            outcomes=self.outcomes,
            outside=self.outside,
            teacher_hidden=None if self.hidden is None else [torch.cat(states) for states in self.hidden],
            teacher_passes=self.teacher.passes,
            student_passes=self.student.passes,
            gammas=self.gammas,
            events=self.events,
        )

    def _propose(self, block: _Block) -> None:
        """Let the student propose; a limit is lowered to an end token that it proposes.

        Each token is looked at on the host before the next is asked for: it may be the last that any row needs.
        """
        reader, temperature = self.student.reader, self.settings.student_temperature
        slots, width = list(range(len(self.rows))), max(block.limits)
        pairs = [(slot, place) for place in range(width) for slot in slots]
        uniform_GB = self._uniform(block, pairs, Role.PROPOSE).view(width, -1).to(reader.device)
        last_B1 = self.student.last_B1()
        columns: list[list[int]] = []
        chances: list[list[float]] = []
        while len(columns) < max(block.limits):
            place = len(columns)
            logits_BV = reader.logits(self.student.read(last_B1)[:, -1])
            tokens_B = draw(logits_BV, temperature, uniform_GB[place].to(logits_BV.device))
            columns.append(tokens_B.tolist())
            if -1 in columns[-1]:
                raise reader.not_finite(self._where(block, columns[-1].index(-1), place))
            if self.logged:
                chances.append(_probability(logits_BV, tokens_B, temperature))
            for slot, token in enumerate(columns[-1]):
                if token in self.settings.eos:
                    block.limits[slot] = min(block.limits[slot], place + 1)
            last_B1 = tokens_B[:, None]
        block.proposals = [list(row) for row in zip(*columns, strict=True)]
        block.chances = [list(row) for row in zip(*chances, strict=True)]

    def _test(self, block: _Block) -> None:
        """Commit each row's leading run and its replacement, span of places by span.

        Rows drop out at their rejection, so that few logits are made behind one, and those of the rejected position are
        still there when its replacement is drawn.
        """
        open_slots = [slot for slot, limit in enumerate(block.limits) if limit]
        for start, hidden_BQH in self._teacher_states(block):
            stop = start + hidden_BQH.shape[1]
            pairs = [(slot, place) for slot in open_slots for place in range(start, min(stop, block.limits[slot]))]
            whole = self._test_pairs(block, pairs, start, hidden_BQH)
            open_slots = [slot for slot in whole if block.limits[slot] > stop]
            if not open_slots:
                return

    def _teacher_states(self, block: _Block) -> Iterator[tuple[int, Tensor]]:
        """Yield the first place of a span and its states (B, Q, H), from which the logits at those places come."""
        proposals_BG = torch.tensor(block.proposals, device=self.teacher.reader.device)
        ids_BG = torch.cat([self.teacher.last_B1(), proposals_BG[:, :-1]], dim=1)
        if self.token_by_token:
            for place in range(ids_BG.shape[1]):
                yield place, self.teacher.read(ids_BG[:, place : place + 1])
            return
        hidden_BGH = self.teacher.read(ids_BG)
        at_once = max(1, TESTED_AT_ONCE // len(ids_BG))
        for start in range(0, ids_BG.shape[1], at_once):
            yield start, hidden_BGH[:, start : start + at_once]

    def _test_pairs(self, block: _Block, pairs: list[tuple[int, int]], start: int, hidden_BQH: Tensor) -> list[int]:
        """Test (slot, place) pairs, sorted, and commit; return the slots without a rejection."""
        slots_N, places_N = torch.tensor(pairs, device=hidden_BQH.device).unbind(dim=1)
        logits_NV = self.teacher.reader.logits(hidden_BQH[slots_N, places_N - start])
        proposed = [block.proposals[slot][place] for slot, place in pairs]
        decisions = decide(logits_NV, torch.tensor(proposed, device=logits_NV.device), self.rule)
        finite, outcomes = decisions.finite_N.tolist(), decisions.outcome_N.tolist()
        if not all(finite):
            raise self.teacher.reader.not_finite(self._where(block, *pairs[finite.index(False)]))

        # The index of each row's first rejection, or of its last pair.
        ends: dict[int, int] = {}
        for index, (slot, _) in enumerate(pairs):
            if slot not in ends or outcomes[ends[slot]] == Outcome.PASSED:
                ends[slot] = index
        rejected = [index for index in ends.values() if outcomes[index] != Outcome.PASSED]
        replacements = self._replace(block, pairs, rejected, logits_NV)
        tested = [index for index, (slot, _) in enumerate(pairs) if index <= ends[slot]]
        for index in tested:
            row = self.rows[pairs[index][0]]
            self.texts[row].append(replacements.get(index, proposed[index]))
            self.outcomes[row].append(Outcome(outcomes[index]))
        if self.hidden is not None:
            for slot, end in ends.items():  # copies: a view would keep the rest of the block in memory
                self.hidden[self.rows[slot]].append(hidden_BQH[slot, : pairs[end][1] - start + 1].clone())
        if self.logged:
            proposals_N = torch.tensor(proposed, device=logits_NV.device)
            margins = decision_margin(logits_NV, proposals_N, self.rule)[tested].tolist()
            self._log(block, [pairs[index] for index in tested], tested, decisions, margins)
        return [slot for slot, end in ends.items() if outcomes[end] == Outcome.PASSED]

    def _replace(
        self, block: _Block, pairs: list[tuple[int, int]], rejected: list[int], logits_NV: Tensor
    ) -> dict[int, int]:
        """Draw the teacher's tokens for the rejected pairs, by their index."""
        if not rejected:
            return {}
        places = [pairs[index] for index in rejected]
        logits_RV = logits_NV[torch.tensor(rejected, device=logits_NV.device)]
        uniform_R = self._uniform(block, places, Role.REPLACE).to(logits_NV.device)
        tokens_R = replace(logits_RV, uniform_R, self.rule)
        inside = decide(logits_RV, tokens_R, self.rule).passed_N.tolist()
        for (slot, _), passes in zip(places, inside, strict=True):
            self.outside[self.rows[slot]] += not passes
        return dict(zip(rejected, tokens_R.tolist(), strict=True))

    def _uniform(self, block: _Block, pairs: list[tuple[int, int]], role: Role) -> Tensor:
        """Return the keyed noise of (slot, place) pairs; an empty slot uses that of any row."""
        keys = self.keys[[self.rows[slot] for slot, _ in pairs]]
        positions = [block.before[slot] + place for slot, place in pairs]
        return torch.from_numpy(keyed_uniform(self.settings.seed, self.epoch, keys, positions, role))

    def _leave(self) -> None:
        """Let finished rows leave the batch."""
        kept = [slot for slot, row in enumerate(self.rows) if row != EMPTY and not self._finished(self.texts[row])]
        if len(kept) == sum(row != EMPTY for row in self.rows):
            return
        self.student.keep(kept)
        self.teacher.keep(kept)
        slots = kept if self.student.step is None else range(len(self.rows))
        self.rows = [self.rows[slot] if slot in kept else EMPTY for slot in slots]

    def _finished(self, text: list[int]) -> bool:
        return text[-1] in self.settings.eos or len(text) >= self.settings.max_new_tokens

    def _where(self, block: _Block, slot: int, place: int) -> str:
        return f'row "{self.ids[self.rows[slot]]}" at position {block.before[slot] + place}'

    def _log(
        self,
        block: _Block,
        pairs: list[tuple[int, int]],
        tested: list[int],
        decisions: Decisions,
        margins: list[float],
    ) -> None:
        """Record an event for each tested position."""
        columns = (decisions.probability_N, decisions.rank_N, decisions.top_k_N, decisions.outcome_N)
        seen = zip(pairs, margins, *(column[tested].tolist() for column in columns), strict=True)
        for (slot, place), margin, probability, rank, top_k, outcome in seen:
            row, position = self.rows[slot], block.before[slot] + place
            self.events.append(
                Event(
                    row=row,
                    block=len(self.gammas),
                    position=position,
                    proposal=block.proposals[slot][place],
                    student_probability=block.chances[slot][place],
                    teacher_probability=probability,
                    rank=rank,
                    top_k=top_k,
                    min_prob=self.rule.min_prob,
                    margin=margin,
                    outcome=Outcome(outcome),
                    token=self.texts[row][position],
                    untested=0 if outcome == Outcome.PASSED else block.limits[slot] - place - 1,
                )
            )


def _probability(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> list[float]:
    """Return the probability of each token; 1 when greedy."""
    if temperature == 0:
        return [1.0] * len(tokens_B)
    logs_BV = torch.log_softmax(logits_BV.double() / temperature, dim=-1)
    chosen: list[float] = logs_BV.gather(1, tokens_B[:, None]).squeeze(1).exp().tolist()
    return chosen
