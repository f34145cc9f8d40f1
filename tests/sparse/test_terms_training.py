"""Training a student: the loss by its parts, validation, gate and rollback, and what no accumulation may change."""

import json

import numpy as np
import pytest
import torch

from fixtures.pico_terms import DEV_ROWS, ROWS, Pretrained, save_start
from fixtures.reference_terms import row_by_row
from soju.core.errors import RegressionError, UserError
from soju.core.files import read_json_lines, verify_manifest
from soju.data.rows import Term, TermRow
from soju.sparse import term_activation as probes
from soju.sparse.losses import flops
from soju.sparse.neural import term_costs
from soju.sparse.term_activation import Probe, probe_report
from soju.sparse.terms.losses import TermsLoss
from soju.sparse.terms.training import CHOSEN_BY, NO_TEACHER_TEXT, TermsCollator, Validation
from soju.teachers.dense import Embeddings
from soju.training.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of the student that all trainings start from."""
    return save_start(tmp_path_factory.mktemp("pretrained") / "start")


def pretrained(folder, start, *overrides, **others):
    folder.mkdir(exist_ok=True)
    return Pretrained(folder, *overrides, start=start, **others)


def teacher_vectors(pico, dimensions=8):
    rows = len(pico.rows.teacher_texts)
    vectors = np.random.default_rng(1).standard_normal((rows, dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings([vectors], np.zeros(rows), np.arange(rows))


def computed(pico, *, vectors=None, progress=1.0, rows=(0, 3, 5, 8)):
    """Return the loss terms of one batch, the raw ones, and the batch."""
    student = pico.student().eval()
    cost_V = term_costs(pico.rows, student, pico.config.losses.flops_cost)
    loss = TermsLoss(student, pico.config, term_cost_V=cost_V, position=lambda: (round(100 * progress), 100))
    batch = TermsCollator(pico.rows, vectors, pad_id=1)([{"row": row} for row in rows])
    features = {"input_ids": batch["text_input_ids"], "attention_mask": batch["text_attention_mask"]}
    weighted = loss([dict(features)], batch["label"])
    return weighted, loss.loss_components, student(dict(features))


def once(targets):
    """Each id of a kind once, with its largest similarity."""
    kinds = [{term: max(s for t, s in kind if t == term) for term, _ in kind} for kind in targets[1:]]
    return targets.source, *(kind.items() for kind in kinds)


@pytest.mark.parametrize("form", ["v19", "signed"])
def test_the_loss_is_the_weighted_sum_of_the_published_terms(tmp_path, start, form):
    pico = pretrained(tmp_path, start, f"losses.terms={form}")
    weighted, raw, output = computed(pico)
    values_BV = output["sentence_embedding" if form == "v19" else "signed_maxima"]
    targets = [once(pico.rows.targets[row][0]) for row in (0, 3, 5, 8)]
    expected = row_by_row(values_BV, targets, signed=form == "signed")
    weights = {"self": 3.0, "korean": 2.0, "english": 12.0, "margin": 2.0, "flops": 5e-5}
    assert weighted.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(raw[name], value, rtol=1e-4, atol=1e-5, check_dtype=False)
    for name, weight in weights.items():
        torch.testing.assert_close(weighted[name], weight * raw[name])
    torch.testing.assert_close(raw["flops"], flops(output["sentence_embedding"]))
    assert raw["active_terms"] == (output["sentence_embedding"] > 0).sum(1).float().mean()


def test_a_weight_of_zero_leaves_a_term_out_of_the_sum_but_in_the_log(tmp_path, start):
    weighted, raw, _ = computed(pretrained(tmp_path, start, "losses.margin=0"))
    assert "margin" not in weighted
    assert raw["margin"] > 0


def test_the_penalty_begins_at_its_share_of_the_training(tmp_path, start):
    pico = pretrained(tmp_path, start, "losses.flops_from=0.5")
    assert "flops" not in computed(pico, progress=0.49)[0]
    assert computed(pico, progress=0.5)[0]["flops"] > 0


def test_the_penalty_charges_common_terms_more_than_rare_ones(tmp_path, start):
    pico = pretrained(tmp_path, start, "losses.flops_cost=inverse")
    cost_V = term_costs(pico.rows, pico.student(), pico.config.losses.flops_cost)
    counts_V = torch.from_numpy(pico.rows.texts_with_term(len(cost_V)))
    assert counts_V.max() > 1
    assert cost_V[counts_V.argmax()] == cost_V.max() > cost_V[counts_V.argmin()]
    assert cost_V.mean().item() == pytest.approx(1)
    _, raw, output = computed(pico)
    torch.testing.assert_close(raw["flops"], flops(output["sentence_embedding"], term_cost_V=cost_V))


def test_distillation_compares_the_texts_of_the_batch_that_the_teacher_read(tmp_path, start):
    pico = pretrained(tmp_path, start, "teacher={model: a/b}", "losses.distillation=1.5")
    weighted, raw, _ = computed(pico, vectors=teacher_vectors(pico))
    assert raw["distillation"] > 0
    torch.testing.assert_close(weighted["distillation"], 1.5 * raw["distillation"])
    unread = pretrained(tmp_path / "unread", start, "teacher={model: a/b}", "losses.distillation=1.5")
    unread.rows.teacher[0] = [NO_TEACHER_TEXT]
    assert "distillation" not in computed(unread, vectors=teacher_vectors(unread), rows=(0,))[0]
    one_of_three = computed(unread, vectors=teacher_vectors(unread), rows=(0, 1, 2))[1]["distillation"]
    without_it = computed(unread, vectors=teacher_vectors(unread), rows=(1, 2))[1]["distillation"]
    torch.testing.assert_close(one_of_three, without_it, rtol=1e-3, atol=1e-5)


def test_translations_of_the_batch_are_told_apart_when_asked_for(tmp_path, start):
    pico = pretrained(tmp_path, start, "data.both_directions=true", "losses.translation=0.5")
    weighted, raw, output = computed(pico)
    weights_BV = torch.nn.functional.normalize(output["sentence_embedding"])
    cosines_BB = weights_BV @ weights_BV.T / 0.05
    cosines_BB.fill_diagonal_(-torch.inf)
    partner_B = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    expected = -cosines_BB.log_softmax(dim=1)[torch.arange(8), partner_B].mean()
    torch.testing.assert_close(raw["translation"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weighted["translation"], 0.5 * raw["translation"])


def falls(monkeypatch, at, *, times):
    """Let the validation of some steps find next to nothing, a number of times."""
    left, honest = [times], Validation.__call__

    def validate(self, model, output_path=None, epoch=-1, steps=-1, **others):
        found = honest(self, model, output_path, epoch, steps, **others)
        if steps == at and left[0] > 0:
            left[0] -= 1
            found[CHOSEN_BY] = 0.01
        return found

    monkeypatch.setattr(Validation, "__call__", validate)


def test_a_regression_is_rolled_back_recorded_and_trained_on_with_another_order(tmp_path, start, monkeypatch):
    falls(monkeypatch, 6, times=1)
    pico = pretrained(tmp_path, start)
    trained = pico.train()
    assert trained.attempts == 2
    assert trained.last.name == "checkpoint-12"
    started, rolled_back, again, finished = read_json_lines(tmp_path / "rollbacks.jsonl")
    assert (started["attempt"], started["resume_from"]) == (0, None)
    assert rolled_back["outcome"] == "rolled back"
    assert "step 6: ko + 2 en on dev terms went from" in rolled_back["reason"]
    assert (again["change"], again["data_order"], again["resume_from"]) == ("data order 1", 1, "checkpoint-3")
    assert (finished["attempt"], finished["outcome"]) == (1, "finished")
    verdicts = read_json_lines(tmp_path / "verdicts.jsonl")
    assert [(row["step"], row["attempt"], row["passed"]) for row in verdicts] == [
        (3, 0, True), (6, 0, False), (6, 1, True), (9, 1, True), (12, 1, True),
    ]  # fmt: skip
    steps = [row["step"] for row in read_json_lines(tmp_path / "history.jsonl") if "loss" in row]
    assert steps == sorted(set(steps))
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        verify_manifest(checkpoint)


def test_a_regression_that_comes_back_ends_the_run_and_loses_nothing(tmp_path, start, monkeypatch):
    falls(monkeypatch, 6, times=10)
    pico = pretrained(tmp_path, start, "training.max_rollbacks=1")
    with pytest.raises(RegressionError, match=r"gave up after 1 rollbacks, see .*rollbacks\.jsonl"):
        pico.train()
    (kept,) = list_checkpoints(tmp_path / "checkpoints")
    assert kept.name == "checkpoint-3"
    verify_manifest(kept)
    with pytest.raises(RegressionError, match="this run gave up after 1 rollbacks; change its settings"):
        pico.train()


def test_going_back_to_a_checkpoint_that_was_named_is_obeyed(tmp_path, start):
    pico = pretrained(tmp_path, start, "training.save_total_limit=9")
    straight = pico.train()
    bytes_ = (straight.last / "model.safetensors").read_bytes()
    resumed = pico.train(resume=tmp_path / "checkpoints" / "checkpoint-6")
    assert (resumed.last / "model.safetensors").read_bytes() == bytes_
    aside = {path.name for path in (tmp_path / "checkpoints").glob("abandoned-*")}
    assert aside == {"abandoned-checkpoint-9", "abandoned-checkpoint-12"}


def test_when_no_checkpoint_verifies_nothing_is_trained_over_them(tmp_path, start):
    pico = pretrained(tmp_path, start, "training.max_steps=3")
    weights = pico.train().last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"skipped checkpoint-3: (?s:.*)see soju verify, or remove"):
        pico.train()


def test_development_words_without_a_term_of_one_language_are_refused_before_training(tmp_path, start):
    vocabulary = pretrained(tmp_path, start).vocabulary
    korean_only = [TermRow("검색", (Term("엔진", 1.0),))]
    with pytest.raises(UserError, match=r"data\.dev_terms: none of the 1 development words has a term in English"):
        Validation(korean_only, vocabulary, tmp_path / "probes.jsonl")


def test_validation_measures_what_the_definition_says(tmp_path, start):
    pico = pretrained(tmp_path, start)
    student = pico.student()
    validation = Validation(DEV_ROWS, pico.vocabulary, tmp_path / "probes.jsonl")
    found = validation(student, epoch=1.0, steps=7)
    wanted = expected = 0
    for row, vector in zip(DEV_ROWS, student.encode_sparse([row.ko for row in DEV_ROWS]), strict=True):
        top = set(vector.indices[np.argsort(-vector.data, kind="stable")[:50]].tolist())
        (ids,) = pico.vocabulary.terms([" ".join(t.text for t in row.terms if t.text.isascii())])
        wanted, expected = wanted + len(top & set(ids)), expected + len(set(ids))
    assert found["activation.en@50"] == pytest.approx(wanted / expected)
    assert found[CHOSEN_BY] == pytest.approx(found["preservation.ko@50"] + 2 * found["activation.en@50"])
    (row,) = read_json_lines(tmp_path / "probes.jsonl")
    assert (row["epoch"], row["step"], row.keys() >= {"combined", "noise", "top"}) == (1.0, 7, True)


def test_probes_that_a_vocabulary_cannot_spell_stop_nothing(tmp_path, start, monkeypatch):
    monkeypatch.setattr(probes, "PROBES", (Probe("東", "東", "東"),))
    pico = pretrained(tmp_path, start)
    vectors = pico.student().encode_sparse(["東"])
    names = [str(index) for index in range(vectors.shape[1])]
    report = probe_report(vectors, lambda texts: [[] for _ in texts], names, function_words=set())
    assert (report["preservation"], report["activation"]) == (0, 0)
    json.dumps(report, allow_nan=False)


def test_layers_may_learn_at_a_rate_of_their_own(tmp_path, start):
    pico = pretrained(tmp_path, start, "training.layers_learning_rate=0.01")
    trainer = pico.trainer()
    trainer.create_optimizer()
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        rates |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    layers = {name for name in rates if ".layer." in name}
    assert layers
    assert {rates[name] for name in layers} == {0.01}
    assert {rates[name] for name in rates.keys() - layers} == {1e-3}


def test_one_text_eight_times_is_eight_texts_once(tmp_path, start):
    terms = [row for row in ROWS if any(term.text.isascii() for term in row.terms)][:8]
    assert len(terms) == 8
    found = []
    for name, batch, accumulation in (("one", 8, 1), ("eight", 1, 8)):
        sizes = (
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.max_steps=3",
        )
        pico = pretrained(tmp_path / name, start, *sizes, "losses.flops=0", "training.logging_steps=1", terms=terms)
        assert len(pico.rows) == 8
        trainer = pico.trainer()
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        rows = [row for row in read_json_lines(pico.folder / "history.jsonl") if "loss" in row]
        names = ("loss", "loss_self", "loss_korean", "loss_english", "loss_margin")
        found.append((trainer.model.state_dict(), [[row[name] for name in names] for row in rows]))
    (straight, losses), (accumulated, same_losses) = found
    np.testing.assert_allclose(losses, same_losses, rtol=1e-4)
    for name, value in straight.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-5, msg=name)
