"""The trainer: one mean over the tokens of a global step, nothing of the knowledge, and a resume to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico_lessons import COSTS, examples, lesson, make
from pico_models import alone, pico
from safetensors.torch import load_file

from soju.core.errors import StoppedError
from soju.speculative_kd.controller import GammaController
from soju.speculative_kd.divergence import forward_kl
from soju.speculative_kd.forced import likelihoods_after, pack
from soju.speculative_kd.noise import Role
from soju.speculative_kd.trainer import WAYS, SkdTrainer, Window, write_teacher_texts
from soju.training.checkpoints import list_checkpoints

CANARY = 95


def weights(trainer):
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def same_bits(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


class Recording(SkdTrainer):
    """Keeps what it wrote, and every micro-batch."""

    def __init__(self, **more):
        self.written, self.batches = [], []
        super().__init__(**more)

    def write(self, rows):
        result = super().write(rows)
        self.written.append((self.state.global_step, {one.id: text for one, text, _ in result}))
        return result

    def _packed(self, rows):
        batch = super()._packed(rows)
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums of several threads differ in the last bits, and pico models are slower with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = make(folder, cls=Recording)
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (4, 1)])
def test_accumulation_changes_no_text_and_no_weight_but_for_rounding(straight, tmp_path, batch, accumulation):
    trainer, _ = straight
    other = make(tmp_path, cls=Recording, batch=batch, accumulation=accumulation)
    other.train()
    assert other.written == trainer.written
    assert largest_difference(weights(trainer), weights(other)) < 1e-9


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(straight):
    trainer, folder = straight
    student, given = lesson()
    _, texts = trainer.written[0]
    total = tokens = 0
    for one in given.examples:
        if text := texts.get(one.id):
            logits = [
                model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
                for model, prompt in ((student, one.query), (given.teacher, one.privileged))
            ]
            total, tokens = total + forward_kl(*logits).sum().item(), tokens + len(text)
    first = history(folder)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_the_student_comes_closer_to_the_teacher(tmp_path):
    make(tmp_path, epochs=8, learning_rate=1e-3).train()
    losses = [row["loss"] for row in history(tmp_path) if "loss" in row]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_no_gradient_reaches_the_teacher(straight):
    teacher = straight[0].lesson.teacher
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert same_bits(teacher.state_dict(), lesson()[1].teacher.state_dict())


def test_gradient_is_zero_at_prompt_and_padding():
    student, given = lesson(rows=2)
    texts = [[7, 8, 9], [6]]
    packed = pack([one.query for one in given.examples], texts)
    seen = {}

    def keep(module, inputs, output):
        seen["hidden"] = output.last_hidden_state
        output.last_hidden_state.retain_grad()

    student.base_model.register_forward_hook(keep)
    trainer = SkdTrainer.__new__(SkdTrainer)
    trainer.lesson = given
    batch = {
        "input_ids": packed.ids_BL,
        "attention_mask": packed.mask_BL,
        "shift_labels": packed.labels_BL,
        "hidden_teacher": torch.randn(4, 32, dtype=torch.float64),
        "from_start": torch.zeros(4, dtype=torch.bool),
    }
    trainer._sum_of_tokens(student, batch).backward()
    gradient_BL = seen["hidden"].grad.abs().sum(-1)
    assert torch.equal(gradient_BL > 0, packed.labels_BL >= 0)
    one, text = given.examples[1], texts[1]
    assert packed.labels_BL[1, len(one.query) - 1] == text[0]
    unseen = ~torch.isin(torch.arange(96), packed.ids_BL[packed.mask_BL.bool()])
    assert student.get_input_embeddings().weight.grad[unseen].abs().sum() == 0


def test_a_canary_in_the_knowledge_reaches_no_student_tensor(tmp_path):
    student, given = lesson(made=examples(canary=CANARY))
    read = []
    student.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    # The teacher cannot say the canary, so that it could only come from the knowledge.
    given.teacher.lm_head.bias = torch.nn.Parameter(-50.0 * (torch.arange(96) == CANARY).double())
    trainer = make(tmp_path, built=(student, given), cls=Recording, epochs=1)
    trainer.train()
    said = {token for _, texts in trainer.written for text in texts.values() for token in text}
    assert all(CANARY in one.privileged for one in given.examples)
    assert CANARY not in said
    assert read
    assert not any((ids == CANARY).any() for ids in read)
    for batch in trainer.batches:
        assert not (batch["input_ids"] == CANARY).any()


def test_shuffled_knowledge_leaves_the_prompts_of_the_student_equal(tmp_path):
    made = examples()
    shuffled = [
        type(one)(one.id, one.query, one.plain, [*other.privileged[: -len(other.query)], *one.query], None)
        for one, other in zip(made, [*made[1:], made[0]], strict=True)
    ]
    prompts = []
    for name, rows in (("as they are", made), ("shuffled", shuffled)):
        student, given = lesson(made=rows)
        trainer = make(tmp_path / name, built=(student, given), cls=Recording, epochs=1)
        trainer.train()
        found = []
        for batch in trainer.batches:
            for ids, labels in zip(batch["input_ids"], batch["shift_labels"], strict=True):
                end = int((labels >= 0).nonzero()[0]) + 1
                found.append(ids[:end].tolist())
        prompts.append(found)
    assert prompts[0] == prompts[1]
    assert sorted(prompts[0]) == sorted(one.query for one in made)


@pytest.mark.parametrize("method", sorted(WAYS))
def test_every_method_trains(tmp_path, method):
    trainer = make(tmp_path, method, epochs=1)
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())
    row = history(tmp_path)[0]
    assert row["loss"] > 0
    assert ("acceptance" in row) is (method in ("lupi_skd", "skd", "opd"))
    if method == "opd":
        assert row["acceptance"] == 1


def test_skd_reads_no_knowledge(tmp_path):
    trainer = make(tmp_path, "skd", cls=Recording, epochs=1)
    assert all(trainer.lesson.prompt(one) == one.plain for one in trainer.lesson.examples)


def test_teacher_texts_are_drawn_once_and_are_pure_draws_of_the_teacher(tmp_path):
    _, given = lesson("kd", rows=3)
    texts = write_teacher_texts(given, tmp_path / "texts.json")
    one = given.examples[2]
    settings = {"seed": 5, "epoch": 0, "role": Role.PROPOSE, "temperature": 0.7, "budget": 12, "eos": (3,)}
    assert texts[one.id] == alone(given.teacher, one.privileged, row=one.id, **settings)
    (tmp_path / "texts.json").write_text(json.dumps({"kept": [1]}), encoding="utf-8")
    assert write_teacher_texts(given, tmp_path / "texts.json") == {"kept": [1]}


def test_general_questions_move_on_from_epoch_to_epoch_and_are_learnt_from_the_start(tmp_path):
    start = pico(layers=1, seed=9)
    student, given = lesson(start=start, slots=2)
    assert [given.example(12, epoch).id for epoch in range(3)] == ["general/0", "general/2", "general/0"]
    assert [given.target(row) for row in (0, 11, 12, 13)] == ["teacher", "teacher", "start", "start"]
    trainer = make(tmp_path, built=(student, given), cls=Recording)
    trainer.train()
    assert set(trainer.rollout_state.rollouts) == {"teacher", "start"}
    assert any(batch["from_start"].any() and not batch["from_start"].all() for batch in trainer.batches)
    said = {name for _, texts in trainer.written for name in texts if name.startswith("general/")}
    assert said == {f"general/{number}" for number in range(4)}


def test_an_end_at_once_does_not_break_a_step(tmp_path):
    student, given = lesson()
    with torch.no_grad():  # the end token wins everywhere, for both
        for model in (student, given.teacher):
            model.lm_head.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(50.0 * (torch.arange(96) == 3).double())
    trainer = make(tmp_path, built=(student, given), cls=Recording, epochs=1)
    trainer.train()
    assert {tuple(text) for _, texts in trainer.written for text in texts.values()} == {(3,)}
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_stopped_run_resumes_to_the_same_bits(straight, tmp_path, step):
    trainer, folder = straight

    class Stopping(Recording):
        def write(self, rows):
            if self.state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().write(rows)

    with pytest.raises(StoppedError):
        make(tmp_path, cls=Stopping).train()
    again = make(tmp_path, cls=Recording)
    again.train(True)
    assert same_bits(weights(trainer), weights(again))
    assert history(tmp_path) == history(folder)
    state = again.rollout_state.rollouts["teacher"].state()
    assert state == trainer.rollout_state.rollouts["teacher"].state()
    assert state["tested"] > 0


def test_a_killed_run_resumes_to_the_same_bits(straight, tmp_path):
    program = [sys.executable, str(Path(__file__).with_name("pico_lessons.py")), str(tmp_path), "save_steps=1"]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    while not list_checkpoints(tmp_path / "checkpoints") and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "final.safetensors").exists()
    subprocess.run(program, check=True, stderr=subprocess.DEVNULL)
    assert history(tmp_path) == history(straight[1])
    assert same_bits(weights(straight[0]), load_file(tmp_path / "final.safetensors"))


def test_two_ranks_train_as_one_with_twice_the_rows(straight, tmp_path):
    trainer, folder = straight
    program = [str(Path(__file__).with_name("pico_lessons.py")), str(tmp_path), "batch=2", "accumulation=1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert largest_difference(weights(trainer), load_file(tmp_path / "final.safetensors")) < 1e-9
    for one, two in zip(history(folder), history(tmp_path), strict=True):
        assert two["loss"] == pytest.approx(one["loss"])
        assert two["acceptance"] == one["acceptance"]


def test_block_lengths_come_from_the_costs_of_the_run(straight):
    rollout = straight[0].rollout_state.rollouts["teacher"]
    assert isinstance(rollout.controller, GammaController)
    assert rollout.controller.costs == COSTS


def test_costs_are_measured_once_and_kept(tmp_path):
    folder = tmp_path / "run"
    trainer = make(folder, epochs=1)
    (folder / "costs.json").unlink()
    trainer.train()
    assert json.loads((folder / "costs.json").read_text())["rows"] == 4


def test_the_log_says_what_became_of_proposals(straight):
    row = history(straight[1])[-2]
    assert 0 < row["acceptance"] < 1
    assert row["acceptance"] + row["rejected_by_rank"] + row["rejected_by_min_prob"] == pytest.approx(1)
    assert row["acceptance_en"] == row["acceptance"]
    assert {"acceptance_c0", "acceptance_c1", "gamma", "length", "repetition", "privileged_gain", "misled_gain"} <= set(
        row
    )
    assert 1 <= row["length"] <= 12


def test_repetition_is_the_share_of_runs_of_four_that_stood_before():
    window = Window()
    window.add_texts([[1, 2, 3, 4, 1, 2, 3, 4], [5]])
    assert Window.report(window.sums)["repetition"] == pytest.approx(1 / 5)
    assert Window.report(window.sums)["length"] == 4.5


def test_privileged_gain_is_the_difference_of_two_likelihoods(straight):
    trainer, folder = straight
    _, given = lesson()
    _, texts = trainer.written[0]
    order = list(texts)[:4]
    asked = {one.id: one for one in given.examples}
    sides = [
        likelihoods_after(
            given.teacher, [getattr(asked[name], side) for name in order], [texts[name] for name in order]
        )
        for side in ("privileged", "plain")
    ]
    expected = (sum(sides[0]) - sum(sides[1])) / sum(len(texts[name]) for name in order)
    assert history(folder)[0]["privileged_gain"] == pytest.approx(expected, rel=1e-6)
