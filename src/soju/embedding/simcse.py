"""Does a text find itself again after another dropout, among all others?

Shape letters: B = texts, N = texts of all ranks, D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, normalize


def simcse(
    first_BD: Tensor, second_BD: Tensor, *, temperature: float = 0.05, negatives_ND: Tensor | None = None, rank: int = 0
) -> Tensor:
    """Let each text of one pass tell its own vector of the other pass from those of all other texts.

    ``-log softmax(cos(first_b, second) / temperature)[b]``, averaged over the batch: InfoNCE with the cosine, in
    the one direction that is published.

    Args:
        first_BD: Vectors of one pass, ``(B, D)``, any float dtype.
        second_BD: Vectors of the same texts in a pass with another dropout, ``(B, D)``.
        temperature: Cosines are divided by it, > 0.
        negatives_ND: The second passes of all ranks, ``(N, D)``, from `gathered`; those of this rank alone when not
            given.
        rank: Which block of B rows of `negatives_ND` is this rank's.

    Returns:
        Scalar float32 >= 0, in nats; log N when all vectors are equal.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Gao et al. 2021, arXiv:2104.08821 (SimCSE). van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE).
    """
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        shapes = f"{tuple(first_BD.shape)} and {tuple(second_BD.shape)}"
        raise ValueError(f"both passes must be (B, D) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    candidates_ND = second_BD if negatives_ND is None else negatives_ND
    start = rank * len(first_BD)
    if candidates_ND.shape[1:] != first_BD.shape[1:] or not 0 <= start <= len(candidates_ND) - len(first_BD):
        shape = tuple(candidates_ND.shape)
        raise ValueError(f"candidates of shape {shape} do not hold {len(first_BD)} texts of rank {rank}")
    # Half precision is no good for numbers that are divided by 0.05 and exponentiated.
    with torch.autocast(first_BD.device.type, enabled=False):
        cosines_BN = normalize(_wide(first_BD), dim=1) @ normalize(_wide(candidates_ND), dim=1).T
        own_B = torch.arange(start, start + len(first_BD), device=first_BD.device)
        return cross_entropy(cosines_BN / temperature, own_B)


def gathered(vectors_BD: Tensor) -> tuple[Tensor, int]:
    """Collect the vectors of all ranks, with gradients for the vectors of each.

    The gradient of a rank's vectors is the sum of what all ranks ask of them, so the average over ranks that DDP takes
    is the gradient of the mean loss of all texts.

    Args:
        vectors_BD: This rank's vectors, ``(B, D)``; B must be the same on all ranks.

    Returns:
        All vectors, ``(N, D)``, rank by rank, and this rank. Without a process group the vectors as given, and 0.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return vectors_BD, 0
    from torch.distributed.nn import functional  # loads a good deal that one process never needs

    parts = functional.all_gather(vectors_BD.contiguous())  # type: ignore[no-untyped-call]
    return torch.cat(parts), distributed.get_rank()


def passes_are_equal(first_BD: Tensor, second_BD: Tensor) -> bool:
    """Tell whether two passes of a batch came out equal, up to rounding, for every text: then dropout is off.

    A model without dropout (Qwen3 has ``attention_dropout: 0``) gives the same vector twice; the loss then has nothing
    to pull together and only pushes texts apart. A single text may come out equal by chance: a very short one gives
    attention dropout little to drop. Not-a-number differs from itself, so such passes count as different.

    Args:
        first_BD: Vectors of one pass, ``(B, D)``.
        second_BD: Vectors of the same texts in another, ``(B, D)``.

    Returns:
        True when no text moved by more than a millionth of its length.

    Raises:
        ValueError: If the shapes differ or there is no text.
    """
    if first_BD.shape != second_BD.shape or first_BD.ndim != 2 or len(first_BD) == 0:
        shapes = f"{tuple(first_BD.shape)} and {tuple(second_BD.shape)}"
        raise ValueError(f"both passes must be (B, D) of the same B >= 1 texts, got {shapes}")
    first, second = _wide(first_BD.detach()), _wide(second_BD.detach())
    return bool(((first - second).norm(dim=1) <= 1e-6 * first.norm(dim=1)).all())


def _wide(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
