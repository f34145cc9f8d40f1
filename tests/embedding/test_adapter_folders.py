import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoModel

from embedding.pico_qwen import save_pico_qwen
from soju.core.errors import UserError
from soju.embedding.adapter_modules import AdapterSettings
from soju.embedding.adapters import adapter_parameters, add_adapters, fold_adapters, load_adapted, save_adapted

TEXTS = ["한국어 문장입니다.", "A short one.", "물"]

SCRIPT = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "soju":
            raise ImportError("soju is not to be imported")

if sys.argv[3] == "without":
    sys.meta_path.insert(0, Refuse())
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
print("CLASS" + type(model[0]).__module__)
print("VECTORS" + json.dumps(model.encode(json.loads(sys.argv[2]), show_progress_bar=False).tolist()))
"""


def load(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", **options)


def encode(model):
    return model.encode(TEXTS, show_progress_bar=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pico_qwen(tmp_path_factory.mktemp("pico") / "qwen")


@pytest.fixture
def adapted(folder):
    return make_adapted(folder)


def make_adapted(folder, kind="gated"):
    model = load(folder)
    add_adapters(model, AdapterSettings(kind, hidden=5, layers=(1,)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)
    return model


def test_the_pico_model_pools_the_last_token_of_texts_padded_on_the_left(folder):
    model = load(folder)
    ids = model.preprocess(TEXTS)["input_ids"]
    assert (ids[:, -1] == 0).all()  # the end, after which Qwen3-Embedding pools
    assert ids[2, 0] == 0  # padding
    np.testing.assert_allclose(encode(model)[2], model.encode(TEXTS[2]), atol=1e-6)


def test_adapters_are_saved_and_loaded_with_the_model(adapted, folder, tmp_path):
    assert not np.allclose(encode(adapted), encode(load(folder)), atol=1e-3)
    save_adapted(adapted, tmp_path)
    loaded = load_adapted(tmp_path, device="cpu")
    np.testing.assert_array_equal(encode(loaded), encode(adapted))
    assert loaded[0].adapter_settings == adapted[0].adapter_settings


def test_a_text_has_one_embedding_whatever_it_is_encoded_with(adapted):
    for text, vector in zip(TEXTS, encode(adapted), strict=True):
        np.testing.assert_allclose(adapted.encode(text), vector, atol=1e-6)


def test_the_rest_of_the_folder_is_the_stock_model(adapted, folder, tmp_path):
    save_adapted(adapted, tmp_path)
    plain, stock = AutoModel.from_pretrained(tmp_path), AutoModel.from_pretrained(folder)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("soju", [pytest.param("with", marks=pytest.mark.slow), "without"])
def test_stock_sentence_transformers_loads_the_folder_when_told_to_trust_it(adapted, tmp_path, soju):
    save_adapted(adapted, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path / "model"), json.dumps(TEXTS), soju],
        capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CLASStransformers_modules." in done.stdout  # the shipped file
    np.testing.assert_allclose(json.loads(done.stdout.split("VECTORS")[1]), encode(adapted), atol=1e-6)


def test_stock_sentence_transformers_refuses_it_otherwise_and_the_readme_says_so(adapted, tmp_path):
    save_adapted(adapted, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(tmp_path)
    assert 'SentenceTransformer("...", trust_remote_code=True)' in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["linear", "parallel"])
def test_folded_adapters_need_no_code(folder, tmp_path, kind):
    model = make_adapted(folder, kind)
    expected = encode(model)
    fold_adapters(model)
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    assert type(loaded[0]) is Transformer
    np.testing.assert_allclose(encode(loaded), expected, atol=1e-5)
    assert not list(tmp_path.glob("*adapters*"))


def test_a_checkpoint_of_a_trainer_loads_too(adapted, tmp_path):
    adapted.save_pretrained(str(tmp_path))  # which names our class, not the shipped file
    np.testing.assert_array_equal(encode(load_adapted(tmp_path, device="cpu")), encode(adapted))


def test_folders_that_lack_a_file_or_hold_other_adapters_are_refused(adapted, folder, tmp_path):
    save_adapted(adapted, tmp_path)
    settings = json.loads((tmp_path / "adapters.json").read_text())
    (tmp_path / "adapters.json").write_text(json.dumps(settings | {"layers": [0]}))
    with pytest.raises(ValueError, match="not of these adapters"):
        load_adapted(tmp_path, device="cpu")
    (tmp_path / "adapters.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapters\.safetensors is missing"):
        load_adapted(tmp_path, device="cpu")
    with pytest.raises(UserError, match="has no adapters; save it with save_pretrained"):
        save_adapted(load(folder), tmp_path)
