"""What a rollout promises beside equal texts: caches, passes, kept states, limits, records, refusals."""

import json
from contextlib import contextmanager

import pytest
import torch
from cases import COSTS, Kitchen, draw_case
from pico_models import VOCABULARY, alone, pair, pico

from soju.core.errors import BadNumbersError, IntegrityError, UserError
from soju.speculative_kd.cache import reading
from soju.speculative_kd.config import RolloutSettings
from soju.speculative_kd.controller import Costs
from soju.speculative_kd.noise import Role
from soju.speculative_kd.outcome import Outcome
from soju.speculative_kd.rollout import WAYS, Rollout

QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
PRIVILEGED = [[1, 2, 5, 6, 7], [3, 3, 3, 3, 8], [9, 10, 11, 12, 13]]
IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def models():
    return pair(0.8)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def kitchen(request):
    return Kitchen(kind=request.param)


def written(student, teacher, rows=3, keep_hidden=True, **settings):
    rollout = Rollout(
        student, teacher, RolloutSettings(**({"implementation": "parallel", "seed": 4} | settings)), costs=COSTS
    )
    return rollout(QUERIES[:rows], PRIVILEGED[:rows], ids=IDS[:rows], keep_hidden=keep_hidden)


@pytest.mark.parametrize("implementation", ["sequential", "parallel", "adaptive", "compiled"])
def test_caches_are_a_fresh_prefill_after_every_block(kitchen, implementation):
    blocks = 0
    for number in range(20, 23):
        case = draw_case(number, budget=8, rows=4)
        case.settings["gamma"] = 4
        rollout = kitchen.rollout(case, implementation)
        with reading(rollout.student, rollout.teacher):
            batch = rollout.begin(case.queries, case.privileged, ids=case.ids, epoch=case.epoch)
            while batch.live:
                batch.block(rollout.gamma())
                blocks += 1
                for side, prompts in ((batch.student, case.queries), (batch.teacher, case.privileged)):
                    for slot, row in enumerate(batch.rows):
                        if row < 0:
                            assert side.cache.lengths[slot] == 0
                            continue
                        read = [*prompts[row], *batch.texts[row]][:-1]
                        assert side.cache.lengths[slot] == len(read) == len(prompts[row]) + len(batch.texts[row]) - 1
                        fresh = side.reader.model(torch.tensor([read]), use_cache=True).past_key_values
                        for found, expected in zip(side.cache.layers, fresh.layers, strict=True):
                            for name in ("keys", "values"):
                                torch.testing.assert_close(
                                    getattr(found, name)[slot, :, : len(read)], getattr(expected, name)[0]
                                )
    assert blocks > 5


@pytest.mark.parametrize("implementation", ["parallel", "adaptive", "debug", "compiled"])
def test_the_teacher_reads_once_a_block(models, implementation):
    rollout = Rollout(
        *models,
        RolloutSettings(implementation=implementation, gamma=3, max_new_tokens=10),
        costs=COSTS,
        compile_backend="eager",
    )
    text = rollout(QUERIES, PRIVILEGED, ids=IDS)
    assert text.teacher_passes == text.blocks + 1  # the prefill
    assert text.student_passes == sum(text.gammas) + 1


def test_prompts_of_one_token_need_no_prefill(models):
    settings = RolloutSettings(implementation="parallel", gamma=3, max_new_tokens=10)
    text = Rollout(*models, settings)([[5], [6]], [[5], [6]], ids=["a", "b"])
    assert text.teacher_passes == text.blocks
    settings = settings.model_copy(update={"implementation": "compiled"})
    compiled = Rollout(*models, settings, compile_backend="eager")([[5], [6]], [[5], [6]], ids=["a", "b"])
    assert compiled.tokens == text.tokens


def test_sequential_reads_a_pass_for_each_tested_position(models):
    text = written(*models, rows=1, implementation="sequential", gamma=5, max_new_tokens=12)
    assert text.teacher_passes == text.tested + 1


@pytest.mark.parametrize("implementation", ["sequential", "parallel", "compiled"])
def test_kept_states_are_those_of_a_teacher_forced_pass(kitchen, implementation):
    for number in range(20, 23):
        case = draw_case(number, budget=8, rows=4)
        case.settings["gamma"] = 4
        text = kitchen.run(case, implementation)
        for prompt, tokens, found in zip(case.privileged, text.tokens, text.teacher_hidden, strict=True):
            with torch.no_grad():
                states = kitchen.teacher.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
            torch.testing.assert_close(found, states[len(prompt) - 1 : -1])


def test_states_are_not_kept_when_not_wanted(models):
    assert written(*models, keep_hidden=False, max_new_tokens=4).teacher_hidden is None


def test_kept_states_hold_no_more_memory_than_they_need(models):
    text = written(*models, gamma=8, max_new_tokens=12)
    for states, tokens in zip(text.teacher_hidden, text.tokens, strict=True):
        assert states.untyped_storage().nbytes() == len(tokens) * 32 * 8


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_teacher_that_passes_all_leaves_the_students_text(models, temperature):
    settings = {"student_temperature": temperature, "max_new_tokens": 15, "eos": (3, 4, 30, 31)}
    text = written(*models, top_k=VOCABULARY, min_prob=0.0, gamma=4, **settings)
    assert text.acceptance == 1
    assert text.outside == [0, 0, 0]
    for row, prompt in enumerate(QUERIES):
        expected = alone(
            models[0], prompt, seed=4, epoch=0, row=IDS[row], role=Role.PROPOSE, temperature=temperature, budget=15,
            eos=settings["eos"],
        )  # fmt: skip
        assert text.tokens[row] == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_teacher_that_rejects_all_leaves_its_own_text(temperature):
    # The student proposes only what the teacher finds least probable, greedily.
    student, teacher = pair(1.0)
    with torch.no_grad():
        student.load_state_dict(pico(layers=1, seed=9).state_dict())
        student.lm_head.weight.zero_()
        student.lm_head.weight[VOCABULARY - 1] = 1.0
        student.model.norm.weight.copy_(torch.ones(32))
        for layer in student.model.layers:  # a constant state: the last token always has the largest logit
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        student.model.embed_tokens.weight.fill_(1.0)
        teacher.lm_head.weight[VOCABULARY - 1].zero_()
    settings = {"teacher_temperature": temperature, "student_temperature": 0.0, "max_new_tokens": 15}
    text = written(student, teacher, top_k=1, min_prob=1.0, gamma=4, eos=(3, 4), **settings)
    assert text.acceptance == 0
    for row, prompt in enumerate(PRIVILEGED):
        expected = alone(
            teacher, prompt, seed=4, epoch=0, row=IDS[row], role=Role.REPLACE, temperature=temperature, budget=15,
            eos=(3, 4),
        )  # fmt: skip
        assert text.tokens[row] == expected


def test_equal_models_do_not_accept_everything_when_the_student_draws():
    # A draw leaves the top of its own distribution.
    teacher = pico(seed=3, sharp=2.0)
    rollout = Rollout(teacher, teacher, RolloutSettings(implementation="parallel", max_new_tokens=40, top_k=2))
    drawn = rollout(QUERIES, QUERIES, ids=IDS)
    assert drawn.acceptance < 0.95
    rollout = Rollout(teacher, teacher, rollout.settings.model_copy(update={"student_temperature": 0.0}))
    assert rollout(QUERIES, QUERIES, ids=IDS).acceptance == 1


def test_acceptance_is_the_mass_of_the_accept_set():
    # Expected acceptance of one position = sum of the student's probabilities over what passes.
    from soju.speculative_kd.acceptance import accept_set

    student, teacher = pair(0.7)
    settings = RolloutSettings(implementation="parallel", max_new_tokens=1, min_prob=0.02)
    rows = 600
    text = Rollout(student, teacher, settings)([QUERIES[0]] * rows, [PRIVILEGED[0]] * rows, ids=range(rows))
    with torch.no_grad():
        p = torch.softmax(student(torch.tensor([QUERIES[0]])).logits[0, -1] / 0.7, -1)
        passes = accept_set(teacher(torch.tensor([PRIVILEGED[0]])).logits[:, -1], settings.rule(0))[0]
    expected = float(p[passes].sum())
    assert 0.05 < expected < 0.95
    assert abs(text.acceptance - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5


@pytest.mark.parametrize("gamma", [1, 3, 12])
def test_an_end_token_at_any_place_of_a_block_ends_the_text(models, gamma):
    free = written(*models, rows=1, gamma=gamma, max_new_tokens=12).tokens[0]
    for place, token in enumerate(free):
        first = free.index(token)
        ended = written(*models, rows=1, gamma=gamma, max_new_tokens=12, eos=(95, token)).tokens[0]
        assert ended == free[: min(first, free.index(95) if 95 in free else place) + 1]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_nothing_is_proposed_past_the_budget(models, budget):
    text = written(*models, gamma=4, max_new_tokens=budget)
    assert [len(tokens) for tokens in text.tokens] == [budget] * 3
    assert max(text.gammas) <= budget
    assert text.gammas[0] == min(4, budget)


def test_nothing_is_proposed_behind_an_end_token_when_no_row_needs_it():
    model = pico(seed=3)
    token = written(model, model, rows=1, max_new_tokens=1, top_k=VOCABULARY, min_prob=0).tokens[0][0]
    text = written(model, model, rows=1, gamma=8, eos=(token,), max_new_tokens=20, top_k=VOCABULARY, min_prob=0)
    assert text.tokens == [[token]]
    assert text.student_passes == 2  # the prefill and the proposal of the end


def test_counts_do_not_depend_on_the_block_length(models):
    counts = set()
    for gamma in (1, 2, 5, 20):
        text = written(*models, gamma=gamma, max_new_tokens=15)
        assert (
            text.tested == sum(map(len, text.tokens)) == text.passed + text.rejected_by_rank + text.rejected_by_min_prob
        )
        by_position = text.acceptance_by_position()
        assert sum(tested for tested, _ in by_position) == text.tested
        assert sum(passed for _, passed in by_position) == text.passed
        assert text.acceptance == text.passed / text.tested
        counts.add((text.passed, text.rejected_by_rank, text.rejected_by_min_prob, tuple(text.outside), *by_position))
    assert len(counts) == 1
    assert text.passed
    assert text.rejected_by_rank
    assert text.rejected_by_min_prob


def test_replacements_are_inside_unless_drawn_from_all_tokens():
    student, teacher = pair(0.3)
    settings = {"max_new_tokens": 30, "top_k": 2, "teacher_temperature": 1.0}
    ways = ("full", "accept_set", "argmax")
    outside = {way: sum(written(student, teacher, replacement=way, **settings).outside) for way in ways}
    assert outside["full"] > 0
    assert outside["accept_set"] == outside["argmax"] == 0


def test_debug_logs_every_tested_position(models):
    settings = {"gamma": 5, "max_new_tokens": 12, "min_prob": 0.1}
    text = written(*models, implementation="debug", **settings)
    assert len(text.events) == text.tested
    for row, tokens in enumerate(text.tokens):
        events = [event for event in text.events if event.row == row]
        assert [event.position for event in events] == list(range(len(tokens)))
        assert [event.token for event in events] == tokens
        assert [event.outcome for event in events] == text.outcomes[row]
        with torch.no_grad():
            logits = [
                model(torch.tensor([[*prompts[row], *tokens]])).logits[0, len(prompts[row]) - 1 : -1]
                for model, prompts in zip(models, (QUERIES, PRIVILEGED), strict=True)
            ]
        for place, event in enumerate(events):
            s, t = (torch.softmax(z[place] / 0.7, -1)[event.proposal] for z in logits)
            assert (event.student_probability, event.teacher_probability) == pytest.approx((float(s), float(t)))
            assert event.rank == int((logits[1][place] > logits[1][place][event.proposal]).sum())
            assert (event.token == event.proposal) or event.outcome is not Outcome.PASSED
    assert written(*models, **settings).events == []


def test_an_event_reads_as_a_sentence(models):
    texts = "\n".join(
        map(str, written(*models, implementation="debug", gamma=5, max_new_tokens=40, min_prob=0.1).events)
    )
    for part in (
        "passed as the teacher's first",
        "passed in the top 5",
        "rejected by top 5",
        "rejected by min_prob 0.1",
    ):
        assert part in texts
    assert texts.startswith("block 0 position 0: proposal ")


# Settings that move over the steps.


def test_a_schedule_moves_by_step_and_not_by_block():
    settings = RolloutSettings(top_k=(25, 1), min_prob=(0.0, 0.1))
    assert [settings.rule(progress).top_k for progress in (0, 0.25, 0.5, 1)] == [25, 19, 13, 1]
    assert settings.rule(0.25).min_prob == pytest.approx(0.025)


def test_a_schedule_reaches_both_ends(models):
    moving = RolloutSettings(implementation="parallel", top_k=(VOCABULARY, 1), min_prob=(0.0, 0.5), max_new_tokens=12)
    rollout = Rollout(*models, moving, total_steps=11)

    def texts(rollout, step):
        return rollout(QUERIES, PRIVILEGED, ids=IDS, step=step).tokens

    for step, fixed in ((0, {"top_k": VOCABULARY, "min_prob": 0.0}), (10, {"top_k": 1, "min_prob": 0.5})):
        expected = texts(Rollout(*models, moving.model_copy(update=fixed)), 0)
        assert texts(rollout, step) == expected
    assert texts(rollout, 0) != texts(rollout, 10)
    assert texts(rollout, 99) == texts(rollout, 10)


def test_a_schedule_needs_to_know_the_run(models):
    with pytest.raises(UserError, match="give total_steps"):
        Rollout(*models, RolloutSettings(top_k=(20, 5)))


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 0}, {"top_k": "none"}, {"min_prob": 1.5}, {"gamma": 0}, {"max_new_tokens": 0}, {"eos": (1, 1)},
     {"teacher_temperature": -1}, {"replacement": "residual"}, {"unknown": 1}, {"eos": (-1,)}],
)  # fmt: skip
def test_settings_refuse_what_has_no_meaning(wrong):
    with pytest.raises(ValueError, match="validation error"):
        RolloutSettings(**wrong)


def test_defaults_are_the_published_ones():
    settings = RolloutSettings()
    assert (settings.top_k, settings.min_prob, settings.gamma, settings.max_new_tokens) == (5, 0.05, 20, 4096)
    assert (settings.teacher_temperature, settings.student_temperature) == (0.7, 0.7)
    assert (settings.implementation, settings.replacement) == ("adaptive", "full")
    assert set(WAYS) == {"adaptive", "sequential", "parallel", "compiled", "debug"}


# The controller in the rollout.


def test_costs_are_measured_once_and_read_ever_after(models, tmp_path):
    path = tmp_path / "costs.json"
    settings = RolloutSettings(gamma=6, max_new_tokens=6)
    rollout = Rollout(*models, settings, costs=path)
    rollout(QUERIES, PRIVILEGED, ids=IDS)
    written = path.read_bytes()
    costs = Costs.read(path)
    assert costs.rows == 3
    assert [length for length, _ in costs.blocks] == [1, 2, 4, 6]
    assert costs.blocks[0][1] == 1
    assert rollout.controller.costs == costs
    again = Rollout(*models, settings, costs=path)
    again(QUERIES[:1], PRIVILEGED[:1], ids=IDS[:1])
    assert again.controller.costs == costs
    assert path.read_bytes() == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["costs.json"]


def test_a_resumed_rollout_takes_the_block_lengths_of_the_straight_one(models):
    settings = RolloutSettings(gamma=8, max_new_tokens=15)

    def gammas(rollout, epochs):
        return [rollout(QUERIES, PRIVILEGED, ids=IDS, epoch=epoch).gammas for epoch in epochs]

    straight = Rollout(*models, settings, costs=COSTS)
    expected = gammas(straight, range(4))
    first = Rollout(*models, settings, costs=COSTS)
    assert gammas(first, range(2)) == expected[:2]
    second = Rollout(*models, settings, costs=COSTS)
    second.restore(json.loads(json.dumps(first.state())))
    assert gammas(second, range(2, 4)) == expected[2:]
    assert second.state() == straight.state()
    assert Rollout(*models, settings, costs=COSTS).state() != straight.state()


def test_a_state_waits_for_the_costs(models, tmp_path):
    rollout = Rollout(*models, RolloutSettings(gamma=2, max_new_tokens=1), costs=tmp_path / "costs.json")
    rollout.restore({"tested": 500.0, "passed": 400.0})
    rollout(QUERIES, PRIVILEGED, ids=IDS)
    assert rollout.controller.tested > 490


@pytest.mark.parametrize(
    "text", ["", "{", '{"rows": 1}', '{"rows": 1, "student": -1, "blocks": [[1, 1]], "teacher_seconds": 1}']
)
def test_broken_costs_are_refused(models, tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"costs\.json: not the costs of a rollout"):
        Rollout(*models, RolloutSettings(), costs=tmp_path / "costs.json")


# One set of weights, modes, attention.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks the old name
def test_the_teacher_may_be_the_student_without_its_adapter():
    from peft import LoraConfig, get_peft_model

    base = pico(seed=3)
    before = written(base, base, max_new_tokens=10, top_k=VOCABULARY, min_prob=0)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    entered = []

    @contextmanager
    def without_adapter():
        entered.append(1)
        with model.disable_adapter():
            yield

    settings = RolloutSettings(implementation="parallel", max_new_tokens=10, top_k=1, seed=4)
    found = Rollout(model, model, settings, around_teacher=without_adapter)(QUERIES, PRIVILEGED, ids=IDS)
    assert entered
    with model.disable_adapter(), torch.no_grad():
        for prompt, tokens, states in zip(PRIVILEGED, found.tokens, found.teacher_hidden, strict=True):
            expected = base.model(torch.tensor([prompt + tokens])).last_hidden_state[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(states, expected)
    adapted = Rollout(model, model, settings.model_copy(update={"top_k": VOCABULARY, "min_prob": 0.0}))
    assert adapted(QUERIES, PRIVILEGED, ids=IDS).tokens != before.tokens  # the student has its adapter


def test_modes_and_gradients_are_as_before_and_dropout_is_off(models):
    config = {"attention_dropout": 0.9}
    student = pico(seed=3, **config).train()
    student.model.norm.eval()
    expected = written(student.eval(), models[1], max_new_tokens=8).tokens
    student.train()
    student.model.norm.eval()
    assert written(student, models[1], max_new_tokens=8).tokens == expected
    assert student.training
    assert student.model.layers[0].training
    assert not student.model.norm.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("attention", ["eager", "flash_of_the_test"])
def test_attention_that_takes_no_mask_a_row_is_replaced_for_the_rollout(models, attention):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def refuses_masks(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError("a rollout must not come here")

    expected = written(*models, max_new_tokens=10).tokens
    ALL_ATTENTION_FUNCTIONS.register("flash_of_the_test", refuses_masks)
    teacher = pair(0.8)[1]
    teacher.config._attn_implementation = attention
    try:
        # transformers' eager attention takes its softmax in float32
        found = written(models[0], teacher, max_new_tokens=10)
        assert found.tokens == expected
    finally:
        assert teacher.config._attn_implementation == attention


# Refusals.


def test_vocabularies_must_be_equal(models):
    with pytest.raises(UserError, match="student has 96 tokens and teacher 97"):
        Rollout(models[0], pico(vocabulary=97), RolloutSettings())


@pytest.mark.parametrize(
    ("queries", "match"),
    [([[5], []], "row \"b\": the student's prompt is empty"), ([[5], [96]], r"ids outside 0\.\.95"),
     ([[5], [1] * 510], "exceed its context of 512")],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_refused(models, queries, match):
    rollout = Rollout(*models, RolloutSettings(implementation="parallel", max_new_tokens=10))
    with pytest.raises(UserError, match=match):
        rollout(queries, [[5], [6]], ids=["a", "b"])


def test_rows_must_be_equally_many(models):
    rollout = Rollout(*models, RolloutSettings(implementation="parallel", max_new_tokens=10))
    with pytest.raises(ValueError, match="equally many"):
        rollout([[5]], [[5], [6]], ids=["a", "b"])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_that_are_not_finite_stop_the_rollout(side):
    student, teacher = pair(1.0)
    rollout = Rollout(student, teacher, RolloutSettings(implementation="parallel", max_new_tokens=10))
    with torch.no_grad():
        {"student": student, "teacher": teacher}[side].lm_head.weight[3] = torch.nan
    with pytest.raises(
        BadNumbersError, match=f'{side} Qwen3ForCausalLM: logits of row "a" at position 0 are not finite'
    ):
        rollout(QUERIES, PRIVILEGED, ids=IDS)
