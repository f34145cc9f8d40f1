"""The losses of training from triplets: a query, a text that answers it, a text that does not.

Shape letters: B = triplets in the batch, C = candidates (the B positives, then the B negatives), V = terms in the
vocabulary, T = (text, term) entries in the batch, K = heaviest terms of a text.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from soju.sparse.divergence import NEVER, SHORTEST
from soju.sparse.term_losses import TermEntries, signed_weights

Similarity = Literal["cosine", "dot"]
Form = Literal["published", "signed"]
"""``published``: on the weights, after ReLU; ``signed``: on the signed maxima, where a dark term has a gradient too."""


class InfoNce(NamedTuple):
    """The loss, and how hard its negatives were."""

    loss: Tensor
    """Scalar float32 >= 0, in nats."""
    effective_negatives: Tensor
    """Scalar: mean perplexity of the softmax over candidates, minus the answer itself; 0 when nothing competes."""


def similarities(queries_BV: Tensor, candidates_CV: Tensor, *, similarity: Similarity) -> Tensor:
    """Return the cosines or dot products of queries and candidates, ``(B, C)``; a zero vector has 0 with everything."""
    if queries_BV.dtype != torch.float64:
        queries_BV, candidates_CV = queries_BV.float(), candidates_CV.float()
    products_BC = queries_BV @ candidates_CV.T
    if similarity == "dot":
        return products_BC
    return products_BC * _inverse_lengths(queries_BV)[:, None] * _inverse_lengths(candidates_CV)[None, :]


def info_nce(scores_BC: Tensor, same_BC: Tensor, *, temperature: float, symmetric: bool = False) -> InfoNce:
    """Find each query's positive among all positives and negatives of the batch.

    ``-log softmax(scores / temperature)[own positive]``, averaged over queries.

    Args:
        scores_BC: Similarities, ``(B, 2 B)``; column i is the positive of query i, column B + i its negative.
        same_BC: True where a candidate is no negative although it is not the positive of this row: it equals the
            positive or the query itself. Left out of the softmax. ``(B, 2 B)`` bool.
        temperature: Scores are divided by it, > 0.
        symmetric: Also find each positive's query among all queries, and average the two.

    Returns:
        The loss, and the effective number of negatives of the direction from the query.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE). Karpukhin et al. 2020, arXiv:2004.04906 (with hard
        negatives).
    """
    rows = len(scores_BC)
    if scores_BC.ndim != 2 or rows == 0 or scores_BC.shape != (rows, 2 * rows) or same_BC.shape != scores_BC.shape:
        shapes = f"{tuple(scores_BC.shape)} and {tuple(same_BC.shape)}"
        raise ValueError(f"scores and mask must be (B, 2 B) with B >= 1, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    own_B = torch.arange(rows, device=scores_BC.device)
    keep_BC = ~same_BC
    keep_BC[own_B, own_B] = True
    logits_BC = (scores_BC / temperature).masked_fill(~keep_BC, NEVER)
    loss = cross_entropy(logits_BC, own_B)
    if symmetric:
        loss = (loss + cross_entropy(logits_BC[:, :rows].T, own_B)) / 2
    with torch.no_grad():
        log_BC = log_softmax(logits_BC, dim=1)
        perplexity_B = torch.exp(-(log_BC.exp() * log_BC).sum(dim=1))
    return InfoNce(loss, perplexity_B.mean() - 1)


def triplet_margin(scores_BC: Tensor, *, margin: float) -> Tensor:
    """Return the mean of ``relu(margin - s(q, p) + s(q, n))``; a margin above 1 is out of reach for cosines >= 0."""
    rows = len(scores_BC)
    positive_B, negative_B = scores_BC[:, :rows].diagonal(), scores_BC[:, rows:].diagonal()
    return torch.relu(margin - positive_B + negative_B).mean()


def term_activation(maxima_BV: Tensor, terms: TermEntries, *, form: Form, target: float) -> Tensor:
    """Ask a text to light up given terms.

    ``published``: minus the mean weight over the terms, which has no bound and no gradient for a dark term.
    ``signed``: the mean of ``relu(target - s)`` with the signed weight s (`signed_weights`): 0 once all are lit as far
    as asked.

    Args:
        maxima_BV: Signed maxima, ``(B, V)``.
        terms: Own terms of the same texts (*self-reconstruction*), or those of their positives (*positive activation*).
        form: See above.
        target: Weight to reach, in weight units; ``signed`` only.

    Returns:
        Scalar float32, the mean over the texts that have any term; 0 when none has.
    """
    s_T = signed_weights(maxima_BV[terms.rows_T, terms.ids_T].float())
    loss_T = -s_T.clamp_min(0) if form == "published" else torch.relu(target - s_T)
    counts_B = loss_T.new_zeros(len(maxima_BV)).index_add_(0, terms.rows_T, torch.ones_like(loss_T))
    texts = (counts_B > 0).sum().clamp_min(1)
    return (loss_T / counts_B[terms.rows_T]).sum() / texts


def minimum_activation(maxima_BV: Tensor, *, form: Form, k: int = 5, threshold: float = 0.5) -> Tensor:
    """Return the mean of ``relu(threshold - mean of the k heaviest terms)``: a guard against collapse to nothing.

    On the weights (``published``) a text that lights nothing gets no gradient; on the signed ones it does.
    """
    top_BK = signed_weights(maxima_BV.float().topk(min(k, maxima_BV.shape[1]), dim=1).values)
    if form == "published":
        top_BK = top_BK.clamp_min(0)
    return torch.relu(threshold - top_BK.mean(dim=1)).mean()


def listwise_distillation(
    scores_BC: Tensor, teacher_BC: Tensor, known_BC: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Teach the student how a teacher ranks the candidates of each query, in-batch and hard negatives alike.

    ``KL(softmax(teacher / teacher_temperature) || softmax(student / temperature))`` over the known candidates, averaged
    over the queries that know at least two. Direction: forward, the teacher is the reference.

    Args:
        scores_BC: The student's similarities, ``(B, C)``.
        teacher_BC: The teacher's scores of the same pairs, calibrated; no gradient flows into them.
        known_BC: Where the teacher has a score, bool.
        temperature: The student's scores are divided by it, > 0.
        teacher_temperature: The teacher's, > 0.

    Returns:
        Scalar float32 >= 0, in nats; 0 when no query knows two candidates.
    """
    rows_B = known_BC.sum(dim=1) >= 2
    if not bool(rows_B.any()):
        return scores_BC.sum() * 0.0
    known_BC = known_BC[rows_B]
    student_BC = (scores_BC[rows_B] / temperature).masked_fill(~known_BC, NEVER)
    target_BC = (teacher_BC[rows_B].detach() / teacher_temperature).masked_fill(~known_BC, NEVER)
    target_BC = log_softmax(target_BC, dim=1).to(student_BC.dtype)
    return kl_div(log_softmax(student_BC, dim=1), target_BC, log_target=True, reduction="batchmean")


def margin_mse(scores_BC: Tensor, teacher_margin_B: Tensor, known_B: Tensor) -> Tensor:
    """Return the mean squared difference of the student's margin s(q, p) - s(q, n) and the teacher's.

    Args:
        scores_BC: The student's similarities, ``(B, 2 B)`` as in `info_nce`.
        teacher_margin_B: The teacher's margins in the unit of the student's scores, ``(B,)``.
        known_B: Where the teacher has one, bool; 0 is returned when nowhere.

    Returns:
        Scalar float32 >= 0, in squared score units.

    References:
        Hofstätter et al. 2020, arXiv:2010.02666 (MarginMSE).
    """
    rows = len(scores_BC)
    margin_B = scores_BC[:, :rows].diagonal() - scores_BC[:, rows:].diagonal()
    if not bool(known_B.any()):
        return margin_B.sum() * 0.0
    return (margin_B - teacher_margin_B.detach())[known_B].square().mean()


def _inverse_lengths(vectors: Tensor) -> Tensor:
    squares = vectors.square().sum(dim=1)
    usable = squares > SHORTEST**2
    # Inside the square root as well, or a zero's infinite slope times 0 is NaN.
    return torch.where(usable, squares, 1.0).rsqrt() * usable
