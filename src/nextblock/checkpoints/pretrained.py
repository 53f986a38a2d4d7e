"""Our own weights folder: config.json, model.safetensors, preprocessor_config.json and a README.md model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextblock.checkpoints import custom_code, hub
from nextblock.checkpoints.hashes import HASH, HASHES, require_unchanged, with_hashes
from nextblock.checkpoints.hub import FILES
from nextblock.checkpoints.kinds import KINDS, Model, describe, least_numbers, make
from nextblock.checkpoints.model_card import plain_card, with_front_matter
from nextblock.checkpoints.name_table import mismatch
from nextblock.durable import file_sha256, flush_tree, give_name, make_folder, sha256_of
from nextblock.errors import CheckpointError, ConfigError, nearest
from nextblock.portable import Portable
from nextblock.version import __version__
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.model import XTRA, Encoder

FORMAT = 1  # raised when an older version of the package could no longer read the folder
_TRANSFORMERS = {"image_processor_type", "auto_map"}
# what load_pretrained's config.json holds beside `about`
_OURS = {
    "format",
    "nextblock",
    *HASHES,
    "model_type",
    "config",
    "head",
    "classes",
    *custom_code.IN_CONFIG,
}
# what wrong values in the files raise; RuntimeError: sizes for which there is no memory
_UNREADABLE = (ValueError, RecursionError, SafetensorError, ConfigError, KeyError, TypeError, AttributeError,
               RuntimeError, MemoryError, ArithmeticError)  # fmt: skip
_ORIGIN = {"origin", "origin_sha256", "official"}  # of weights that are still those of a file
Some = TypeVar("Some", bound=Portable)


def save_pretrained(
    folder: Path,
    model: Model,
    preprocessing: Mapping[str, Any],
    card: str | None,
    about: Mapping[str, Any] | None = None,
    *,
    replace: bool = True,
) -> Path:
    """Write the folder whole or not at all.

    Args:
        folder: where; made new.
        model: the whole model: encoder and predictor, encoder, encoder and head, head, or a generator.
        preprocessing: plain values that say how an image becomes the model's input.
        card: the model card, Markdown; None: one that tells the sizes and how to load it.
        about: what else config.json shall hold, ready for JSON; see `read_about`. An "origin" is left out once the
            weights are no longer those that it tells of.
        replace: take the place of an older folder; otherwise only of an empty one.

    Raises CheckpointError when it cannot be written, or would replace something that it must not.
    """
    whole = Path(folder).resolve()
    beside = whole.with_name(f".{whole.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        make_folder(beside)
        _write(beside, model, preprocessing, card, dict(about or {}))
        _put(beside, whole, replace)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write(
    folder: Path, model: Model, preprocessing: Mapping[str, Any], card: str | None, about: dict[str, Any]
) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digest = file_sha256(folder / "model.safetensors")
    if about.get("origin_sha256", digest) != digest:
        about = {name: value for name, value in about.items() if name not in _ORIGIN}
    elif "origin" in about:
        about["origin_sha256"] = digest
    described = describe(model)
    told = {"format": FORMAT, "nextblock": __version__, "sha256": digest}
    for_others = custom_code.for_transformers(described["model_type"])
    if for_others:
        (folder / custom_code.FILE).write_text(custom_code.code())
    said = with_hashes(about | described | told | for_others)
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(preprocessing_text(preprocessing))
    card = plain_card(model, about) if card is None else card
    (folder / "README.md").write_text(with_front_matter(card, model))
    shutil.copymode(folder / "README.md", folder / "model.safetensors")  # safetensors lets nobody but the owner read
    flush_tree(folder)


def preprocessing_text(values: Mapping[str, Any]) -> str:
    """The content of preprocessor_config.json: the values, and a hash by which a change is noticed."""
    return json.dumps({**values, HASH: sha256_of(dict(values))}, indent=2) + "\n"


def _put(beside: Path, folder: Path, replace: bool) -> None:
    """Give the written folder its name. An older one is put aside first, so that one of them is always there."""
    aside = folder.with_name(f".{folder.name}.older")
    if replace and folder.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        give_name(beside, folder)  # over nothing, or over an empty folder
    except OSError as error:
        if folder.exists():
            raise CheckpointError(f"{folder} exists already and is not overwritten. Choose another folder.") from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def load_pretrained(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model and its preprocessing values, checked by hash and by name.

    Raises CheckpointError when a file is missing, damaged, written by a newer version, or holds other weights than
    config.json describes.
    """
    about = read_about(folder)
    try:
        preprocessing = read_preprocessing(folder)
        if file_sha256(folder / "model.safetensors") != about.get("sha256"):
            raise CheckpointError(
                f"{folder}/model.safetensors is damaged: its SHA-256 is not that in config.json. Copy or download the "
                f"folder again."
            )
        tensors = load_file(folder / "model.safetensors")
        _require_possible(about, tensors, folder)
        model = make(about, folder)
        load_weights(model, tensors, str(folder))
        require_unchanged(about, folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a weights folder: {Path(error.filename).name} is missing.") from error
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read as a weights folder: {error}") from error
    return model, preprocessing


def _require_possible(about: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse sizes for which the file has not numbers enough, before a model of such sizes is made."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    plain = [v for n, v in about["config"].items() if isinstance(v, int) and not n.endswith("seed")]
    # first the single sizes: some checks of a configuration count up to them
    if max(plain, default=0) > numbers or least_numbers(about) > numbers:
        raise CheckpointError(
            f"The weights of {folder} belong to another configuration: they are {numbers:,} numbers, too few for the "
            f"sizes in config.json."
        )


def read_about(folder: Path) -> dict[str, Any]:
    """config.json of a weights folder.

    Raises CheckpointError when it is missing or damaged, or was written by a newer version of the package.
    """
    try:
        about = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a weights folder: config.json is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a weights folder: no readable config.json ({error}).") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{folder} is not a weights folder: config.json holds no table of names and values.")
    require_format(about, folder)
    return about


def require_format(about: Mapping[str, Any], folder: object) -> None:
    """Raise CheckpointError for what a newer version of the package wrote."""
    form = FORMAT if about.get("format") is None else about["format"]
    if not isinstance(form, int) or form > FORMAT:
        raise CheckpointError(
            f"{folder} was written by a newer nextblock ({about.get('nextblock')}, format {form}); this is "
            f"{__version__}, which reads format {FORMAT}. Upgrade: pip install --upgrade nextblock."
        )


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json of a weights folder; what transformers writes beside the values is left out.

    Raises CheckpointError when it is missing or damaged.
    """
    try:
        values = json.loads((folder / "preprocessor_config.json").read_text())
        found = {name: value for name, value in values.items() if name not in {*_TRANSFORMERS, HASH}}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a weights folder: preprocessor_config.json is missing.") from error
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable preprocessor_config.json: {error}") from error
    if values.get(HASH, wanted := sha256_of(found)) != wanted:
        raise CheckpointError(
            f"{folder}/preprocessor_config.json was changed since it was written. Copy or download the folder again; "
            f"if the change is meant, remove {HASH} there."
        )
    return found


def find_folder(where: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The weights folder that `where` is, has (a finished run), or names on the hub, which is then fetched.

    A name with a slash is looked for on the hub unless its first part is a folder here; "hf:owner/name" always is.
    Raises CheckpointError when there is none.
    """
    path, name = Path(where).expanduser(), str(where).removeprefix("hf:")
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{where} is a folder here, which has no revisions. Leave out revision.")
        found = next((p for p in (path / "exported", path) if (p / "config.json").is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} is not a weights folder nor a finished run: config.json is missing.")
        return found
    asked = str(where) != name
    if hub.is_hub_name(name) and (asked or not Path(name).parent.is_dir()):
        return hub.fetch(name, revision=revision, files=FILES, token=token)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    raise CheckpointError(
        f"there is no weights folder at {where}.{hint} Give a folder, or a name on the Hugging Face hub: owner/name."
    )


def open_as(kind: type[Some], where: str | Path, *, revision: str | None = None, token: str | None = None) -> Some:
    """A model of class `kind` from `find_folder(where)`, in eval mode; the encoder of a larger model where that is
    asked for. Raises CheckpointError when the folder holds another kind."""
    folder = find_folder(where, revision, token)
    about = read_about(folder)
    model, preprocessing = load_pretrained(folder)
    found: Any = model.encoder if kind is Encoder and isinstance(model, XTRA | Classifier) else model
    if not issubclass(type(found), kind):
        held = KINDS[describe(model)["model_type"]]
        raise CheckpointError(f"{folder} holds {held}, not {_WANTED.get(kind.__name__, kind.__name__)}.")
    found.preprocessing = preprocessing
    kept = _OURS if found is model else _OURS | _ORIGIN  # a part is not what the file was
    found.about = {name: value for name, value in about.items() if name not in kept}
    found.eval()
    opened: Some = found
    return opened


_WANTED = {
    "XTRA": "a pre-trained model with its predictor (an encoder alone opens with Encoder.from_pretrained)",
    "Encoder": "an encoder",
    "Classifier": "an encoder and a head",
    "XAR": "a generator",
}


def save_new(folder: str | Path, model: Any, card: str | None = None) -> Path:
    """`save_pretrained` into a new or empty folder. Raises CheckpointError when there is something in it."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already and is not overwritten. Choose another folder.")
    preprocessing = model.preprocessing or _default_preprocessing(model)
    return save_pretrained(folder, model, preprocessing, card, model.about, replace=False)


def push_model(model: Any, name: str, card: str | None, **options: Any) -> str:
    """`save_new`, then `hub.push`; returns the address."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_new(Path(scratch) / "weights", model, card)
        return hub.push(folder, name, files=sorted(path.name for path in folder.iterdir()), **options)


def _default_preprocessing(model: Model) -> dict[str, Any]:
    sizes: Any = model.config
    side = sizes.image if hasattr(sizes, "image") else sizes.grid
    return {"size_px": list(side), "channels": getattr(sizes, "channels", 3)}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Strict: every tensor there, of the right shape, and no other. Raises CheckpointError with the lists."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or extra or shapes:
        raise mismatch(f"The weights of {where} belong to another configuration.", missing, extra, shapes)
    model.load_state_dict(dict(tensors))
