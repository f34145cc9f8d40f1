"""Tokenizers and matrices small enough to work by hand."""

import numpy as np
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Whitespace

PIECES = ("<unk>", "서버", "server", "쌀", "rice", "소주")


def tiny_tokenizer() -> Tokenizer:
    """One piece a word; every other word is unknown."""
    tokenizer = Tokenizer(Unigram([(piece, -float(index)) for index, piece in enumerate(PIECES)], unk_id=0))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def tiny_weights() -> csr_array:
    """Every piece stands for itself; 서버 also for server (0.7), 쌀 for rice (0.5); <unk> for nothing."""
    weights = np.diag(np.float32([0, 1, 1, 1, 1, 1]))
    weights[1, 2] = 0.7
    weights[3, 4] = 0.5
    return csr_array(weights)
