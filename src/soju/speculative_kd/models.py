"""Both sides of a run: loading them, making them from nothing, and what is checked before any weight is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from soju.core.errors import UserError
from soju.core.model_folder import find_model_folder
from soju.speculative_kd.config import SCRATCH, SELF, ScratchSettings, SpeculativeKdConfig, StudentSettings
from soju.speculative_kd.data import Chat

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of both sides from configs and tokenizers alone."""

    student_config: Any
    teacher_config: Any
    student: Chat
    teacher: Chat
    eos: tuple[int, ...]
    """All ids that end a text."""

    @property
    def contexts(self) -> tuple[int, int]:
        """Tokens that student and teacher can read."""
        sides = (self.student_config, self.teacher_config)
        first, second = (getattr(one, "max_position_embeddings", None) or 2**31 for one in sides)
        return first, second


def plan(config: SpeculativeKdConfig) -> Plan:
    """Read configs and tokenizers of both sides and refuse what cannot be distilled.

    Args:
        config: Of the run.

    Returns:
        The plan.

    Raises:
        UserError: If a side has no chat template, vocabularies or end tokens differ, templates do not open an answer
            in the same way, or a model's attention is not full in every layer.
    """
    of_teacher = config.student.model_copy() if config.teacher.model == SELF else config.teacher
    student_config, student_tokenizer, student_ends = _describe(config.student, config.scratch, layers="student")
    teacher_config, teacher_tokenizer, teacher_ends = _describe(of_teacher, config.scratch, layers="teacher")
    if config.teacher.model == SELF:
        teacher_config = student_config
    student = Chat(student_tokenizer, config.student, "student")
    teacher = Chat(teacher_tokenizer, config.teacher, "teacher")
    _refuse_other_vocabulary(student_config, teacher_config, student_tokenizer, teacher_tokenizer)
    if student_ends != teacher_ends:
        raise UserError(
            f"student ends texts with {_listed(student_ends)} and teacher with {_listed(teacher_ends)}; take two "
            "models of one family, or correct eos_token_id in generation_config.json"
        )
    opening = [chat.ask("?")[-3:] for chat in (student, teacher)]
    if opening[0] != opening[1]:
        raise UserError(
            f"chat templates open an answer differently, with ids {opening[0]} and {opening[1]}; take two models of "
            "one family, and the same thinking"
        )
    for side, one in (("student", student_config), ("teacher", teacher_config)):
        kinds = set(getattr(one, "layer_types", None) or ["full_attention"]) - {"full_attention"}
        if kinds:
            raise UserError(
                f"{side} {one.model_type}: it has layers of the kind {', '.join(sorted(kinds))}; rollouts need full "
                "attention in every layer, as in Llama or Qwen3"
            )
    return Plan(student_config, teacher_config, student, teacher, student_ends)


def _describe(settings: StudentSettings, scratch: ScratchSettings, *, layers: str) -> tuple[Any, Any, tuple[int, ...]]:
    """Return config, tokenizer and end tokens of a side."""
    if settings.model == SCRATCH:
        tokenizer = byte_tokenizer()
        number = scratch.student_layers if layers == "student" else scratch.teacher_layers
        return _scratch_config(scratch, number, len(tokenizer)), tokenizer, (tokenizer.eos_token_id,)
    folder = find_model_folder(settings.model, revision=settings.revision).path
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return config, tokenizer, _end_tokens(folder, config, tokenizer)


def _end_tokens(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return every id that any of a model's files calls an end, because a chat may end in several ways."""
    from transformers import GenerationConfig

    found: set[int] = set()
    generation = folder / "generation_config.json"
    sources = [getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    if generation.is_file():
        sources.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    for value in sources:
        found |= set(value) if isinstance(value, list | tuple) else set() if value is None else {value}
    if not found:
        raise UserError(f"{folder}: no file names an end token; add eos_token_id to generation_config.json")
    return tuple(sorted(found))


def _refuse_other_vocabulary(student: Any, teacher: Any, of_student: Any, of_teacher: Any) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"student has a vocab_size of {student.vocab_size:,} and teacher of {teacher.vocab_size:,}; take two "
            "models of one family with equal vocab_size"
        )
    ours, theirs = of_student.get_vocab(), of_teacher.get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise UserError(
            f"token {token!r} has id {ours.get(token)} for the student and {theirs.get(token)} for the teacher; take "
            "two models of one family with the same tokenizer"
        )


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def parameters_of(config: Any) -> int:
    """Return how many parameters a model of a config has, without allocating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_of(config: SpeculativeKdConfig, planned: Plan, *, longest: int) -> dict[str, int]:
    """Estimate the bytes that training takes on one device.

    Args:
        config: Of the run.
        planned: Of both sides.
        longest: Tokens of the longest prompt.

    Returns:
        Bytes of ``teacher``, ``student``, ``optimizer`` (gradient and two moments) and ``caches`` of a rollout, in
        float32.
    """
    student, teacher = parameters_of(planned.student_config), parameters_of(planned.teacher_config)
    rows = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    slots = longest + config.rollout.max_new_tokens + config.rollout.gamma

    def cache(one: Any) -> int:
        width = getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads
        return int(2 * one.num_hidden_layers * one.num_key_value_heads * width * rows * slots * 4)

    return {
        "teacher": 4 * teacher,
        "student": 4 * student,
        "optimizer": 12 * student,
        "caches": cache(planned.student_config) + cache(planned.teacher_config),
    }


def refuse_without_memory(needed: dict[str, int], available: int) -> None:
    """Refuse a run that does not fit (`UserError`), with the bytes of each part."""
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{name} {_gibibytes(size)}" for name, size in needed.items())
        raise UserError(
            f"training needs about {_gibibytes(total)} ({parts}) and {_gibibytes(available)} are there; take a smaller "
            "teacher or student, or lower rollout.max_new_tokens or training.per_device_train_batch_size"
        )


def available_memory() -> int:
    """Return the bytes of the device that trains: the first GPU, or this machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def load_models(config: SpeculativeKdConfig, planned: Plan) -> tuple[Any, Any]:
    """Load student and teacher in float32; the teacher ``self`` is a copy of the student's weights."""
    student = _load(config.student, planned.student_config, config.scratch, seed=config.seed)
    if config.teacher.model == SELF:
        return student, frozen_copy(student)
    teacher = _load(config.teacher, planned.teacher_config, config.scratch, seed=config.seed + 1)
    if config.student.model == config.teacher.model == SCRATCH:
        _resemble(student, teacher, config.scratch.mix)
    return student, teacher.eval().requires_grad_(False)


def frozen_copy(model: Any) -> Any:
    """Return a copy that never learns."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _load(settings: StudentSettings, config: Any, scratch: ScratchSettings, *, seed: int) -> Any:
    if settings.model != SCRATCH:
        folder = find_model_folder(settings.model, revision=settings.revision).path
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3(config)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=scratch.sharpness / math.sqrt(scratch.hidden_size))
    return model


@torch.no_grad()
def _resemble(student: Any, teacher: Any, mix: float) -> None:
    """Give the student the teacher's embedding and a share of its head, so that some proposals pass and some do not."""
    student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight)
    student.lm_head.weight.mul_(1 - mix).add_(teacher.lm_head.weight, alpha=mix)


def _scratch_config(settings: ScratchSettings, layers: int, vocabulary: int) -> Qwen3Config:
    heads = settings.hidden_size // 8
    end = byte_tokenizer().eos_token_id
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=8,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes and three special ones, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_SPECIAL[0])
    result.chat_template = _TEMPLATE
    return result
