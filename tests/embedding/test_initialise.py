import pytest
import torch
from scipy.sparse import csr_array, random_array

from soju.core.errors import UserError
from soju.embedding.expansion.initialise import INITIALISERS, DonorVectors, initialise

OLD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [-1.0, 1.0]])


def random_donor(*, new=7, anchors=20, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    known = torch.ones(new, dtype=torch.bool)
    vectors = torch.randn(new, width, generator=generator)
    return DonorVectors(vectors, known, torch.randn(anchors, width, generator=generator), torch.arange(anchors) + 2)


def test_mean_is_the_mean_of_the_old_rows():
    assert initialise(OLD, [(0, 1), (2,), (2, 3, 3)]).tolist() == [[0.5, 1.0], [3.0, 4.0], [pytest.approx(1 / 3), 2.0]]


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(50, 5, generator=generator)
    spelled = [torch.randint(50, (size,), generator=generator).tolist() for size in (1, 3, 2, 7, 1, 4, 2)]
    translations = random_array((7, 50), density=0.1, rng=0, format="csr", dtype="float32")
    arguments = {"donor": random_donor(), "translations": translations}
    expected = {method: initialise(old, spelled, method, **arguments) for method in INITIALISERS}
    monkeypatch.setattr("soju.embedding.expansion.initialise.CHUNK", 1)
    for method in INITIALISERS:
        found = initialise(old, spelled, method, **arguments)
        torch.testing.assert_close(found, expected[method], atol=1e-5, rtol=1e-5)


def test_rows_are_float32_whatever_the_old_ones_are():
    for method in ("mean", "noise"):
        assert initialise(OLD.bfloat16(), [(0, 1)], method).dtype == torch.float32


def test_old_rows_are_not_changed():
    old = OLD.clone()
    for method in ("mean", "noise"):
        initialise(old, [(0, 1)], method)
    assert torch.equal(old, OLD)


def test_noise_has_the_mean_and_deviation_of_the_old_rows_and_comes_from_the_seed():
    old = torch.randn(3000, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0])
    old += torch.tensor([3.0, 0.0])
    new = initialise(old, [(0,)] * 3000, "noise", seed=7)
    torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), atol=0.3, rtol=0)
    torch.testing.assert_close(new.std(dim=0), old.std(dim=0), atol=0.0, rtol=0.1)
    assert torch.equal(new, initialise(old, [(0,)] * 3000, "noise", seed=7))
    assert not torch.equal(new, initialise(old, [(0,)] * 3000, "noise", seed=8))


def test_omp_finds_the_sum_that_the_donor_was_made_of():
    donor = random_donor(new=1, anchors=12, width=8)
    target = 2.0 * donor.anchor_AF[4] - 0.5 * donor.anchor_AF[9]
    donor = DonorVectors(target[None], donor.known_N, donor.anchor_AF, donor.anchor_ids_A)
    old = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    row = initialise(old, [(0, 1)], "omp", donor=donor)[0]
    torch.testing.assert_close(row, 2.0 * old[6] - 0.5 * old[11], atol=1e-4, rtol=1e-4)


def test_what_the_donor_does_not_know_gets_its_mean():
    full = random_donor(new=2)
    donor = DonorVectors(full.new_NF, torch.tensor([True, False]), full.anchor_AF, full.anchor_ids_A)
    old = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    rows = initialise(old, [(0, 1), (2, 3)], "omp", donor=donor)
    torch.testing.assert_close(rows[1], old[2:4].mean(dim=0))
    assert not torch.allclose(rows[0], old[:2].mean(dim=0))


def test_a_donor_that_knows_none_of_the_tokens_changes_nothing():
    donor = DonorVectors.match(OLD, [b"a", b"b", b"c", b"d"], base_tokens=[b"a", b"b"], new_tokens=[b"zz"])
    assert torch.equal(initialise(OLD, [[0, 1]], "omp", donor=donor), initialise(OLD, [[0, 1]]))


def test_a_translated_token_gets_the_rows_of_its_translations_as_long_as_these_are_on_average():
    translations = csr_array([[0.0, 0.0, 0.0, 1.0], [0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype="float32")
    rows = initialise(OLD, [(0, 1), (1,), (1, 2)], "aligned", translations=translations)
    assert rows[0].tolist() == pytest.approx([-1.0, 1.0])
    length = 0.75 * 1 + 0.25 * 2
    direction = torch.tensor([0.75, 0.5]) / torch.tensor([0.75, 0.5]).norm()
    torch.testing.assert_close(rows[1], length * direction)
    assert rows[2].tolist() == [1.5, 3.0]  # no translation: the mean


def test_no_new_tokens_are_no_rows():
    assert initialise(OLD, []).shape == (0, 2)
    assert initialise(OLD, [], "noise").shape == (0, 2)


@pytest.mark.parametrize(
    ("decompositions", "message"),
    [
        ([(0,), ()], "new token 1 has no old tokens"),
        ([(0, 4)], "old ids are below 4"),
        ([(-1,)], "old ids are below 4"),
    ],
)
def test_wrong_spellings_are_refused(decompositions, message):
    with pytest.raises(ValueError, match=message):
        initialise(OLD, decompositions)


def test_wrong_methods_and_shapes_are_refused():
    with pytest.raises(UserError, match="none of mean, omp"):
        initialise(OLD, [(0,)], "zero")
    with pytest.raises(UserError, match="omp needs vectors of a donor"):
        initialise(OLD, [(0,)], "omp")
    with pytest.raises(UserError, match="give sentence pairs"):
        initialise(OLD, [(0,)], "aligned")
    with pytest.raises(ValueError, match=r"translations must be \(1, 4\)"):
        initialise(OLD, [(0,)], "aligned", translations=csr_array((2, 4)))
    with pytest.raises(ValueError, match="of 7 new tokens, not of 1"):
        initialise(torch.randn(30, 2), [(0,)], "omp", donor=random_donor())
