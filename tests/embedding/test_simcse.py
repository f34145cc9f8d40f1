import math

import pytest
import torch
from torch import multiprocessing
from torch.nn.functional import cosine_similarity, normalize

from soju.embedding.losses import gathered, passes_are_equal, simcse

FIRST = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
SECOND = torch.tensor([[3.0, 0.0], [0.6, 0.8]])  # cosines: 1 and 0.6 for the first text, 0 and 0.8 for the second


def test_each_text_must_find_itself_among_the_others():
    first = math.log(math.exp(1.0) + math.exp(0.6)) - 1.0
    second = math.log(math.exp(0.0) + math.exp(0.8)) - 0.8
    assert simcse(FIRST, SECOND, temperature=1.0).item() == pytest.approx((first + second) / 2)


def test_a_loop_over_texts_gives_the_same():
    torch.manual_seed(0)
    first, second = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    total = 0.0
    for text in range(7):
        scores = [math.exp(cosine_similarity(first[text], other, dim=0).item() / 0.05) for other in second]
        total -= math.log(scores[text] / sum(scores))
    assert simcse(first, second).item() == pytest.approx(total / 7)


def test_it_is_the_ranking_loss_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(1)
    first, second = torch.randn(6, 9), torch.randn(6, 9)
    theirs = MultipleNegativesRankingLoss(model=None, scale=20.0)
    value = theirs.compute_loss_from_embeddings([first, second], labels=None)
    torch.testing.assert_close(simcse(first, second, temperature=0.05), value)


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(2)
    first = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: simcse(a, b, temperature=0.5), (first, second))


def test_when_all_vectors_are_equal_there_is_nothing_to_tell():
    assert simcse(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8))


def test_the_length_of_vectors_does_not_matter():
    torch.testing.assert_close(simcse(FIRST, SECOND), simcse(FIRST * 7, SECOND / 3))


def test_negatives_of_other_ranks_are_told_apart_too():
    torch.manual_seed(3)
    first, second = torch.randn(8, 5), torch.randn(8, 5)
    halves = [simcse(first[rank * 4 :][:4], second[rank * 4 :][:4], negatives_ND=second, rank=rank) for rank in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, simcse(first, second))
    assert halves[0] > simcse(first[:4], second[:4])


def test_half_precision_is_widened_under_autocast():
    first, second = normalize(torch.randn(4, 8), dim=1), normalize(torch.randn(4, 8), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = simcse(first, second)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, simcse(first, second))


def test_passes_without_dropout_are_equal_and_with_it_are_not():
    vectors, dropout = torch.randn(4, 16), torch.nn.Dropout(0.1)
    assert passes_are_equal(dropout.eval()(vectors), dropout(vectors))
    torch.manual_seed(0)
    dropout.train()
    assert not passes_are_equal(dropout(vectors), dropout(vectors))


def test_one_text_that_moved_is_enough_and_rounding_is_not():
    vectors = torch.randn(3, 8)
    moved = vectors.clone()
    moved[2] += 0.01
    assert not passes_are_equal(vectors, moved)
    assert passes_are_equal(vectors, vectors * (1 + 1e-7))


def test_passes_that_are_no_numbers_are_not_called_equal():
    assert not passes_are_equal(torch.full((2, 3), float("nan")), torch.full((2, 3), float("nan")))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"second_BD": SECOND[:1]}, "same B >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"negatives_ND": SECOND, "rank": 1}, "do not hold 2 texts of rank 1"),
        ({"negatives_ND": torch.ones(2, 3)}, "do not hold"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        simcse(**{"first_BD": FIRST, "second_BD": SECOND, **arguments})


def test_without_a_process_group_there_is_one_rank():
    vectors, rank = gathered(FIRST)
    assert (vectors is FIRST, rank) == (True, 0)


def on_rank(rank, rendezvous, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(4)
    first, second = torch.randn(6, 5), torch.randn(6, 5)
    mine = [side[rank * 3 :][:3].clone().requires_grad_() for side in (first, second)]
    everyone, own = gathered(mine[1])
    loss = simcse(*mine, negatives_ND=everyone, rank=own)
    loss.backward()
    results.put((rank, loss.item(), mine[0].grad.numpy(), mine[1].grad.numpy()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradient_of_one_large_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=on_rank, args=(rank, tmp_path / "meet", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join()
    torch.manual_seed(4)
    first, second = (torch.randn(6, 5).requires_grad_() for _ in range(2))
    loss = simcse(first, second)
    loss.backward()
    assert sum(item[1] for item in found) / 2 == pytest.approx(loss.item(), abs=1e-6)
    for side, whole in ((2, first.grad), (3, second.grad)):
        ours = torch.cat([torch.from_numpy(item[side]) for item in found]) / 2  # DDP averages over ranks
        torch.testing.assert_close(ours, whole)
