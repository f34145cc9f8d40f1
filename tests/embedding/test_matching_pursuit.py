from itertools import pairwise

import numpy as np
import pytest
import torch

from soju.embedding.expansion.initialise import chunk_size, matching_pursuit


def problem(*, targets=9, atoms=40, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atom = torch.randn(atoms, width, generator=generator) * torch.rand(atoms, 1, generator=generator).add(0.1)
    return torch.randn(targets, width, generator=generator), atom


def one_by_one(target, atoms, sparsity):
    """Repeat the method for one target with numpy's least squares."""
    target, atoms = target.double().numpy(), atoms.double().numpy()
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen, rest = [], target
    for _ in range(sparsity):
        scores = np.abs(unit @ rest)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        coefficients = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        rest = target - coefficients @ atoms[chosen]
    return chosen, coefficients


@pytest.mark.parametrize("sparsity", [1, 5, 12])
def test_many_at_once_is_one_by_one(sparsity):
    targets, atoms = problem()
    index, coefficient = matching_pursuit(targets, atoms, sparsity)
    for row, target in enumerate(targets):
        chosen, expected = one_by_one(target, atoms, sparsity)
        assert index[row].tolist() == chosen
        np.testing.assert_allclose(coefficient[row].numpy(), expected, rtol=2e-3, atol=2e-4)


def test_scikit_learn_finds_the_same():
    linear_model = pytest.importorskip("sklearn.linear_model")
    targets, atoms = problem()
    atoms = torch.nn.functional.normalize(atoms, dim=1)  # which it asks for
    index, coefficient = matching_pursuit(targets, atoms, 5)
    expected = linear_model.orthogonal_mp(atoms.double().numpy().T, targets.double().numpy().T, n_nonzero_coefs=5).T
    dense = torch.zeros(len(targets), len(atoms)).scatter(1, index, coefficient)
    np.testing.assert_allclose(dense.numpy(), expected, atol=1e-4)


def test_more_atoms_leave_less():
    targets, atoms = problem()
    left = []
    for sparsity in range(1, 13):
        index, coefficient = matching_pursuit(targets, atoms, sparsity)
        left.append((targets - torch.einsum("bk,bkf->bf", coefficient, atoms[index])).norm(dim=1))
    assert all((after <= before + 1e-5).all() for before, after in pairwise(left))
    assert left[-1].max() < 1e-3


def test_a_target_that_is_met_takes_no_more_atoms():
    _, atoms = problem()
    index, coefficient = matching_pursuit(3 * atoms[7:8], atoms, 6)
    assert index[0, 0] == 7
    torch.testing.assert_close(coefficient[0], torch.tensor([3.0, 0, 0, 0, 0, 0]), atol=1e-3, rtol=0)


def test_equal_atoms_do_no_harm():
    targets, atoms = problem(atoms=4)
    index, coefficient = matching_pursuit(targets, atoms.repeat(3, 1), 8)
    assert coefficient.isfinite().all()
    best = torch.linalg.lstsq(atoms.T, targets.T).solution.T @ atoms
    found = torch.einsum("bk,bkf->bf", coefficient, atoms.repeat(3, 1)[index])
    torch.testing.assert_close(found, best, atol=1e-3, rtol=1e-3)


def test_no_more_atoms_than_there_are_dimensions():
    targets, atoms = problem(width=3)
    assert matching_pursuit(targets, atoms, 64)[0].shape == (9, 3)


def test_chunks_hold_what_was_allowed():
    assert chunk_size(torch.empty(1000, 10), 64, numbers=10**6) == 10**6 // (2000 + 10 * 20)
    assert chunk_size(torch.empty(1000, 10), 64, numbers=1) == 1
