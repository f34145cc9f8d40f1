"""What each stage moves, that it resumes in the same bits, what the retention check does, and what is handed over."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from embedding.pico_embedding import PicoStages, embedding_config, run_embedding
from soju.core.errors import ConfigError, RegressionError, StoppedError, UserError
from soju.core.files import read_json_lines, verify_manifest
from soju.embedding import stages
from soju.embedding.adapters import load_float32
from soju.embedding.expansion.merges import Expansion
from soju.embedding.retention import KOREAN, RetentionCheck
from soju.embedding.stages import begin_stage, best_passed, refuse_equal_passes, run_stage
from soju.embedding.trainer import TRAINABLE_FILE, set_dropout, warm_up_and_decay
from soju.training.rollback import Attempt

SELF = "objective=self_distillation"
ENGLISH = ["the heart pumps blood", "def f(x): return x + 1"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return PicoStages(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("base"))


def moved(pico, stage, *, steps=2):
    """Train without a retention check; return the names whose values changed."""
    settings = stage.settings.model_copy(update={"max_steps": steps, "eval_steps": steps})
    trainer = replace(stage, settings=settings).trainer(Attempt(), None)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}, trainer


@pytest.mark.parametrize("objective", ["simcse", "self_distillation"])
def test_stage_1_moves_the_new_rows_and_nothing_else(pico, tmp_path, objective):
    names, _ = moved(pico, pico.stage("stage1", tmp_path, f"stage1.objective={objective}"))
    assert {name.rpartition(".")[2] for name in names} == {"tail"}


def test_stage_1_can_move_all_rows_without_an_expansion(pico, tmp_path):
    stage = pico.stage("stage1", tmp_path, "stage1.train_rows=all", start=pico.base)
    names, _ = moved(pico, stage)
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in names] == ["embed_tokens"]


def test_stage_1_refuses_a_model_that_was_not_expanded(pico, tmp_path):
    with pytest.raises(UserError, match=r"no expansion.json.*run stage 0 first"):
        pico.stage("stage1", tmp_path, start=pico.base).started()


@pytest.mark.parametrize("kind", ["bottleneck", "parallel"])
def test_stage_2_moves_adapters_and_nothing_else(pico, tmp_path, kind):
    names, trainer = moved(pico, pico.stage("stage2", tmp_path, f"stage2.adapters.kind={kind}"))
    assert names
    assert all(".adapter." in name for name in names)
    held = load_file(tmp_path / "training" / "stage2" / "checkpoints" / "checkpoint-2" / TRAINABLE_FILE)
    assert all(".adapter." in name for name in held)
    assert sum(value.numel() for value in held.values()) < sum(p.numel() for p in trainer.model.parameters()) / 10


def test_stage_3_moves_the_last_layers_and_nothing_else(pico, tmp_path):
    names, _ = moved(pico, pico.stage("stage3", tmp_path))
    assert names
    assert all(".layers.1." in name for name in names)
    rows = read_json_lines(tmp_path / "training" / "stage3" / "history.jsonl")
    assert rows[0]["loss_start"] == 0.0  # where it started
    assert 0 < rows[-1]["loss_start"] < 1


def test_adapters_join_in_from_the_top(pico, tmp_path):
    stage = pico.stage("stage2", tmp_path, "stage2.unfreeze_over=1.0")
    names, trainer = moved(pico, stage, steps=2)  # two layers: the lower one joins in after the first step
    assert [group.name for group in trainer.groups] == ["layer 1", "layer 0"]
    assert [group.joins_at for group in trainer.groups] == [0.0, 0.5]
    alone = pico.stage("stage2", tmp_path / "alone", "stage2.unfreeze_over=1.0")
    first, _ = moved(pico, alone, steps=1)
    assert {name.split(".layers.")[1][0] for name in first} == {"1"}
    assert {name.split(".layers.")[1][0] for name in names} == {"0", "1"}


def test_the_schedule_waits_rises_and_falls():
    factors = [warm_up_and_decay(step, planned=10, warmup=2, joins_at=0.4) for step in range(11)]
    assert factors[:4] == [0.0] * 4
    assert factors[4:] == pytest.approx([0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])


def test_simcse_refuses_to_start_when_two_passes_are_equal(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "set_dropout", lambda model, share: None)  # as a model that ignores the setting
    with pytest.raises(UserError, match=r"stage1.dropout: two passes of a batch come out equal"):
        pico.stage("stage1", tmp_path).trainer(Attempt(), None)


def test_the_model_itself_has_no_dropout_and_gets_some(pico):
    model = load_float32(pico.expanded)
    features = dict(model.tokenizer(ENGLISH, padding=True, return_tensors="pt"))
    with pytest.raises(UserError, match="equal"):
        refuse_equal_passes(model, features, setting="x")
    set_dropout(model, 0.3)
    refuse_equal_passes(model, features, setting="x")
    assert model[0].model.config.attention_dropout == 0.0  # the saved configuration stays as it is


def test_a_cached_batch_is_one_large_batch(pico, tmp_path):
    """Loss and gradients of SimCSE, anchoring and the distance to the start; without dropout, which draws by batch."""
    grads = []
    for folder, own in (("a", ()), ("b", ("stage3.mini_batch_size=3",))):
        more = ("stage3.matryoshka=[4]", "stage3.anchor_weight=0.5", "stage3.l2_sp_weight=2", *own)
        trainer = pico.stage("stage3", tmp_path / folder, *more).trainer(Attempt(), None)
        set_dropout(trainer.model, 0.0)
        with torch.no_grad():  # away from the start, or its distance has no gradient
            for moving in trainer.groups[0].parameters.values():
                moving.add_(0.01)
        trainer.model.train()
        batch = trainer.data_collator([{"row": row} for row in range(5)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads.append((loss.detach(), next(p.grad for p in trainer.model.parameters() if p.grad is not None)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


def test_self_distillation_is_zero_where_nothing_was_merged(pico, tmp_path):
    """A model that was not expanded is its own teacher."""
    stage = pico.stage("stage1", tmp_path, f"stage1.{SELF}", "stage1.train_rows=all", start=pico.base)
    trainer = stage.trainer(Attempt(), None)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([{"row": row} for row in range(4)]))
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_an_accepted_stage_1_leaves_english_to_the_bit_and_loads_by_itself(pico, tmp_path):
    stage = pico.stage("stage1", tmp_path, f"stage1.{SELF}")
    accepted = run_stage(stage, pico.check(stage))
    verify_manifest(accepted.folder)
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (pico.base, accepted.folder))
    torch.testing.assert_close(before.encode(ENGLISH), after.encode(ENGLISH), rtol=0, atol=0)
    assert Expansion.load(accepted.folder) == Expansion.load(pico.expanded)
    old, new = (
        load_file(folder / "model.safetensors")["embed_tokens.weight"] for folder in (pico.expanded, accepted.folder)
    )
    first = Expansion.load(pico.expanded).first_id
    assert torch.equal(old[:first], new[:first])
    assert not torch.equal(old[first:], new[first:])
    assert accepted.looks["accepted"]["english_cosine"] == pytest.approx(1, abs=1e-6)


def test_adapters_that_cannot_be_folded_are_shipped_and_go_on_to_the_next_stage(pico, tmp_path):
    overrides = ("stage2.adapters.kind=gated", "stage2.max_steps=2")
    stage = pico.stage("stage2", tmp_path, *overrides)
    second = run_stage(stage, pico.check(stage))
    assert (second.folder / "soju_adapters.py").is_file()
    stock = SentenceTransformer(str(second.folder), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(stock.encode(ENGLISH), load_float32(second.folder).encode(ENGLISH), rtol=0, atol=0)
    names, _ = moved(pico, pico.stage("stage3", tmp_path / "next", start=second.folder))
    assert any(".adapter." in name for name in names)


def test_lora_moves_its_updates_and_is_folded_into_a_plain_model(pico, tmp_path):
    pytest.importorskip("peft")
    overrides = ("stage2.adapters={kind: lora, r: 2, top_layers: 1}", "stage2.max_steps=2")
    names, _ = moved(pico, pico.stage("stage2", tmp_path / "moved", *overrides))
    assert names
    assert all("lora_" in name and ".layers.1." in name for name in names)
    stage = pico.stage("stage2", tmp_path, *overrides)
    second = run_stage(stage, pico.check(stage))
    assert second.looks["adapters"].startswith("LoRA: ")
    stock = SentenceTransformer(str(second.folder), device="cpu")
    assert not any("lora" in name for name in stock.state_dict())
    torch.testing.assert_close(stock.encode(ENGLISH), load_float32(second.folder).encode(ENGLISH), rtol=0, atol=0)
    old, new = (load_file(folder / "model.safetensors") for folder in (pico.expanded, second.folder))
    assert old.keys() == new.keys()
    assert {name.split(".")[2] for name in old if not torch.equal(old[name], new[name])} == {"mlp"}


def stop_at_step(monkeypatch, step):
    """Send SIGTERM once, at the end of a step."""
    sent = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGTERM)

    original = stages.StageRun.trainer

    def trainer(self, attempt, check):
        made = original(self, attempt, check)
        made.add_callback(Stop())
        return made

    monkeypatch.setattr(stages.StageRun, "trainer", trainer)


@pytest.fixture(scope="module")
def straight(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    stage = pico.stage("stage2", folder, "stage2.anchor_weight=0.5")
    run_stage(stage, pico.check(stage))
    return folder


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_stage_that_was_stopped_goes_on_in_the_same_bits(pico, straight, tmp_path, monkeypatch, step):
    stop_at_step(monkeypatch, step)
    stage = pico.stage("stage2", tmp_path, "stage2.anchor_weight=0.5")
    check = pico.check(stage)
    with pytest.raises(StoppedError):
        run_stage(stage, check)
    assert not stage.result.exists()
    run_stage(stage, check)
    expected, found = (load_file(folder / "stage2" / "model.safetensors") for folder in (straight, tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    histories = (read_json_lines(folder / "training/stage2/history.jsonl") for folder in (tmp_path, straight))
    ours, theirs = ([(row["step"], row["loss"]) for row in rows if "loss" in row] for rows in histories)
    assert ours == theirs


def looks_of(monkeypatch, values):
    """Let the check see these Korean scores, in order; the last one for ever."""
    seen = []
    original = RetentionCheck.__call__

    def look(self, model, *args, **more):
        found = original(self, model, *args, **more)
        if hasattr(self, "of_base"):
            found[KOREAN] = values[min(len(seen), len(values) - 1)]
            seen.append(found[KOREAN])
        return found

    monkeypatch.setattr(RetentionCheck, "__call__", look)


def test_beyond_the_budget_the_stage_goes_back_and_learns_more_slowly(pico, tmp_path, monkeypatch):
    stage = pico.stage("stage2", tmp_path, "retention.korean_drop=0.05")
    check = pico.check(stage)
    looks_of(monkeypatch, [0.5, 0.6, 0.4, 0.7])  # the start, step 2, step 4 regresses, step 4 again
    accepted = run_stage(stage, check)
    rows = read_json_lines(stage.folder / "rollbacks.jsonl")
    assert [row.get("learning_rate_scale") for row in rows if row["outcome"] == "started"] == [1.0, 0.5]
    assert rows[2]["resume_from"] == "checkpoint-2"
    assert [row["passed"] for row in read_json_lines(stage.folder / "verdicts.jsonl")] == [True, False, True]
    assert accepted.looks["checkpoint"] == "checkpoint-4"


def test_a_stage_that_gives_up_hands_over_the_best_that_passed(pico, tmp_path, monkeypatch):
    stage = pico.stage("stage2", tmp_path, "retention.korean_drop=0.05", "retention.max_rollbacks=1")
    check = pico.check(stage)
    looks_of(monkeypatch, [0.5, 0.6, 0.4])
    assert run_stage(stage, check).looks["checkpoint"] == "checkpoint-2"
    assert best_passed(stage.folder).name == "checkpoint-2"


def test_a_stage_of_which_nothing_passed_is_refused(pico, tmp_path, monkeypatch):
    stage = pico.stage("stage2", tmp_path, "retention.korean_drop=0.05", "retention.max_rollbacks=1")
    check = pico.check(stage)
    looks_of(monkeypatch, [0.5, 0.1])
    with pytest.raises(RegressionError, match=r"korean_spearman on watched korean went from 0\.5 to 0\.1"):
        run_stage(stage, check)
    assert not stage.result.exists()


def test_english_is_compared_with_the_untouched_model(pico, tmp_path):
    stage = pico.stage("stage2", tmp_path, "retention.english_drop=0.01", "retention.min_cosine=0.9")
    check = pico.check(stage)
    gate = stages.RetentionGate(check, stage.config.retention, {KOREAN: 0.1}, tmp_path / "verdicts.jsonl")
    base = check.of_base["english_spearman"]
    kept = {KOREAN: 0.2, "english_spearman": base - 0.009, "english_cosine": 0.95}
    assert gate.verdict(kept).passed
    assert not gate.verdict(kept | {"english_spearman": base - 0.02}).passed
    assert not gate.verdict(kept | {"english_cosine": 0.89}).passed
    assert not gate.verdict(kept | {KOREAN: -1.0}).passed


def test_a_model_that_collapsed_fails_the_gate(pico, tmp_path):
    stage = pico.stage("stage2", tmp_path, "retention.english_drop=0.5", "retention.korean_drop=0.5")
    check = pico.check(stage)
    model = load_float32(pico.expanded)
    model.encode = lambda texts, **_: torch.ones(len(texts), 16).numpy()
    found = check(model)
    assert found[KOREAN] == found["english_spearman"] == -1.0
    gate = stages.RetentionGate(check, stage.config.retention, {KOREAN: 0.1}, tmp_path / "verdicts.jsonl")
    assert not gate.verdict(found).passed


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    (tmp_path / "training" / "stage1" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage2").mkdir()
    with pytest.raises(UserError, match="no checkpoint of this run"):
        begin_stage(tmp_path / "checkpoint-2", ["stage1", "stage2"], tmp_path)
    mine = tmp_path / "training" / "stage1" / "checkpoints" / "checkpoint-2"
    assert begin_stage(mine, ["stage1", "stage2"], tmp_path) == "stage1"
    assert (tmp_path / "abandoned-stage1").is_dir()
    assert (tmp_path / "abandoned-stage2").is_dir()


def test_the_supervised_phase_learns_scores(pico, tmp_path):
    from embedding.pico_embedding import write_passages

    root = write_passages(tmp_path)
    lines = ["sentence1\tsentence2\tscore", *(f"texts {n} one\ttexts {n} two\t{n % 6}" for n in range(12))]
    (root / "sts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more = {
        "similarity": ["sts.tsv"],
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "mixed_precision": "off",
        "blocks": 1,
    }
    config = embedding_config(root, supervised=more)
    from soju.embedding.data import read_embedding_data

    data = read_embedding_data(config)
    assert data.labelled[1] == ("texts 1 one", "texts 1 two", 0.2)
    stage = stages.STAGES["supervised"](
        "supervised", config.supervised, config, data, pico.expanded, pico.base, tmp_path / "run"
    )
    names, _ = moved(pico, stage)
    assert all(".layers.1." in name for name in names)
    assert "loss_cosent" in read_json_lines(tmp_path / "run/training/supervised/history.jsonl")[0]


@pytest.mark.slow
def test_a_run_killed_between_stages_ends_in_the_same_bits(tmp_path, monkeypatch):
    from embedding.pico_embedding import write_passages

    write_passages(tmp_path)
    quick = ("stage1.max_steps=2", "stage2.max_steps=2", "stages=[0, 1, 2]")
    run_embedding(tmp_path / "straight", tmp_path, *quick)
    original = stages.run_stage

    def killed(stage, check, **more):
        if stage.name == "stage2":
            raise KeyboardInterrupt
        return original(stage, check, **more)

    monkeypatch.setattr(stages, "run_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        run_embedding(tmp_path / "again", tmp_path, *quick)
    monkeypatch.setattr(stages, "run_stage", original)
    run_embedding(tmp_path / "again", tmp_path, *quick)
    for name in ("stage1", "stage2", "best"):
        expected, found = (load_file(tmp_path / run / name / "model.safetensors") for run in ("straight", "again"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert json.loads((tmp_path / "again" / "scores.json").read_text())
    with pytest.raises((UserError, ConfigError), match="other settings"):
        run_embedding(tmp_path / "again", tmp_path, *quick, "seed=14")
