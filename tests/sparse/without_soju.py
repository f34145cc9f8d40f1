"""Encode texts with sentence-transformers alone: in this process, or in one in which soju cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder

_SCRIPT = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "soju":
            raise ImportError("soju is not to be imported")

sys.meta_path.insert(0, Refuse())
try:
    import soju
except ImportError:
    pass
else:
    raise SystemExit("soju could be imported")
from sentence_transformers import SparseEncoder
folder, texts = sys.argv[1], json.loads(sys.argv[2])
encoder = SparseEncoder(folder, device="cpu")
vectors = encoder.encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False)
print("VECTORS" + json.dumps(vectors.float().tolist()))
"""


def encode_without_soju(folder: Path, texts: list[str]) -> np.ndarray:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SCRIPT, str(folder), json.dumps(texts)],
        capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(folder)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.split("VECTORS")[1]), np.float32)


def encode_stock(folder: Path, texts: list[str]) -> csr_array:
    encoder = SparseEncoder(str(folder), device="cpu")
    return csr_array(encoder.encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False).float().numpy())
