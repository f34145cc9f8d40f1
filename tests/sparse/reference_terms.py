"""The term losses written row by row from their definition, slowly; what the vectorised ones are compared with."""

import torch
from torch.nn.functional import softplus


def published(w):
    return -torch.log(w + 1e-8)


def as_signed(m):
    """The signed weight of one maximum."""
    return torch.log1p(m) if m > 0 else m


def row_by_row(values_BV, rows, *, signed, margin=2.0, english_margin_factor=1.5):
    """Return self, korean, english and margin for rows of (source, korean, english) targets without repeated ids."""
    score = as_signed if signed else (lambda w: w)
    activation = (lambda s: softplus(-s)) if signed else published
    own = korean = english = hinges = torch.zeros((), dtype=values_BV.dtype)
    rows_with_english = 0
    for values_V, (source, korean_targets, english_targets) in zip(values_BV, rows, strict=True):
        if source:
            scores = [score(values_V[term]) for term in source]
            own = own + sum(activation(s) for s in scores) / len(scores)
            own = own + sum(torch.relu(margin - s) for s in scores) / len(scores)
        for targets, wanted in ((korean_targets, margin), (english_targets, margin * english_margin_factor)):
            if not targets:
                continue
            total = sum(similarity for _, similarity in targets) + 1e-8
            weighted = sum(similarity / total * activation(score(values_V[term])) for term, similarity in targets)
            hinges = hinges + sum(
                similarity / total * torch.relu(wanted - score(values_V[term])) for term, similarity in targets
            )
            if targets is english_targets:
                english = english + weighted
                rows_with_english += 1
            else:
                korean = korean + weighted
    count = len(rows)
    return {
        "self": own / count,
        "korean": korean / count,
        "english": english / max(rows_with_english, 1),
        "margin": hinges / count,
    }
