"""Weight files of other people, read without running code from them.

A pickle is a program: whoever made the file decides what it calls. It is read here by PyTorch's restricted reader
(`weights_only=True`) with the stand-ins of `plain_values`, and in no other way. What that refuses stays refused; the
message has the lines that re-save such a file elsewhere.
"""

from __future__ import annotations

import os
import pickle
import re
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nextblock.checkpoints.pickle_size import file_unfolds
from nextblock.checkpoints.plain_values import ALLOWED, NotPlain, TooMuch, plain
from nextblock.errors import CheckpointError, shown

WRAPPERS = ("state_dict", "module")  # of a Lightning .ckpt; of DeepSpeed's mp_rank_00_model_states.pt
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_TEXTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file it stands for. Fetch that with git lfs pull, or "
    "with the download button of the site",
    b"<!doctype html": "is a web page, not weights: the link was to a page about the file, or needs a login",
    b"<html": "is a web page, not weights: the link was to a page about the file, or needs a login",
    b"<?xml": "is an XML text, not weights: most likely a server's error message",
    b"\x1f\x8b": "is packed with gzip. Unpack it first: gunzip",
}
_RESAVE = """\
If you trust its author, re-save its tensors on a machine you can throw away, for this runs the code in the file:
    import torch
    from safetensors.torch import save_file
    found = torch.load({name!r}, map_location="cpu", weights_only=False)
    found = found.state_dict() if hasattr(found, "state_dict") else found
    found = next((found[name] for name in {wrappers!r} if name in found), found)
    save_file({{k: v.clone().contiguous() for k, v in found.items() if isinstance(v, torch.Tensor)}}, "new.safetensors")
Then give new.safetensors here."""
_LOADING = threading.Lock()


@dataclass(frozen=True)
class ForeignWeights:
    """tensors: by name. wrapper: the name in the file under which they were; None when they are the whole file.
    beside: the other names there."""

    tensors: dict[str, Tensor]
    wrapper: str | None
    beside: tuple[str, ...]


def read_tensors(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """The tensors of a weights file; see `read_weights`."""
    return read_weights(path, wrappers).tensors


def read_weights(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> ForeignWeights:
    """The state dict in a file that `read_file` can read: the first of `wrappers` that is there, or else all of it.

    Raises CheckpointError as `read_file` does, and when there are no tensors, or some that are not plain arrays of
    numbers.
    """
    content = read_file(path, wrappers)
    wrapper = next((name for name in wrappers if isinstance(content.get(name), Mapping)), None)
    found = content if wrapper is None else content[wrapper]
    strange = [shown(repr(name)) for name in found if not isinstance(name, str)]
    strange += [f"'{shown(n)}' ({type(value).__name__})" for n, value in found.items() if not isinstance(value, Tensor)]
    if not found or strange:
        where = "holds" if wrapper is None else f"holds, under '{wrapper}',"
        other = "is empty" if not found else f"has {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}"
        raise CheckpointError(
            f"{path} {where} no state dict of tensors: it {other}. Looked for under {', '.join(map(repr, wrappers))}, "
            "then in the file itself."
        )
    odd = [f"{shown(name)} ({kind})" for name, tensor in found.items() if (kind := _odd(tensor))]
    if odd:
        raise CheckpointError(f"{path} holds tensors that cannot be used as weights: {'; '.join(odd[:5])}.")
    return ForeignWeights(
        dict(found), wrapper, tuple(str(name) for name in content if name != wrapper) if wrapper else ()
    )


def _odd(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "without numbers, of the meta device"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    return "quantized" if tensor.is_quantized else ""


def read_file(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[Any, Any]:
    """All that a weights file holds: tensors (on the CPU), numbers, texts, lists and dicts. No code in it is run.

    Args:
        path: a PyTorch file (of today, or before 1.6), a Lightning .ckpt, a DeepSpeed model file, or safetensors. What
            the file is, its content tells and not its name.
        wrappers: where the state dict may be; only the first is used, in the advice of a refusal.

    Raises CheckpointError when it is absent, something else, damaged, or needs its own code to be read.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        return _safetensors(path)
    if kind == "zip":
        _check_archive(path)
    advice = _RESAVE.format(name=str(path), wrappers=(*wrappers, *(w for w in WRAPPERS if w not in wrappers)))
    try:
        if file_unfolds(path):
            raise TooMuch("lists that hold themselves, or that unfold to far more than the file")
        content = plain(_unpickled(path), path.stat().st_size)
    except NotPlain as error:
        more = "" if isinstance(error, TooMuch) else f" {advice}"
        raise CheckpointError(f"{path} holds {error}, which weights do not need.{more}") from error
    except Exception as error:  # a damaged or malicious pickle can raise nearly anything
        raise _refused(path, kind, error, advice) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict of tensors but a {type(content).__name__}.")
    return content


def _kind(path: Path) -> str:
    """ "zip", "safetensors" or "pickle", by the first bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder, not a weights file." if path.is_dir() else f"No such file: {path}.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"{path} is empty. Download it again.")
    for begin, told in _TEXTS.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(begin):
            raise CheckpointError(f"{path} {told}.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{":
        return "safetensors"
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file, though it is named one.")
    # PyTorch would try tar first. Its tar files, of before 0.2, hold pickles that no restricted reader can read.
    if head.startswith(b"\x80\x02") and not _is_tar(path):
        return "pickle"
    raise CheckpointError(f"{path} is not a PyTorch weights file that can be read safely, nor safetensors.")


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, ValueError, OverflowError, OSError):
        return False


def _safetensors(path: Path) -> dict[Any, Any]:
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(_MAX_HEADER, os.path.getsize(path) - 8):
        raise CheckpointError(f"{path} is not a whole safetensors file: its header claims {header} bytes.")
    try:
        return dict(load_file(path))
    except Exception as error:  # SafetensorError, and others for types that PyTorch lacks
        raise CheckpointError(f"{path} is not a whole safetensors file: {_first(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse what PyTorch never writes before PyTorch reads it: packed entries above all, which can be huge.

    That the first entry begins at byte 0 makes sure that PyTorch's reader finds the same entries.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole PyTorch file: {_first(error)}. Download it again.") from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not weights. It would have to be run to be read.")
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip archive, but not one that PyTorch wrote. If the weights are in it, unpack it first."
        )
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    claimed = sum(entry.file_size for entry in entries)
    if packed or claimed > path.stat().st_size or min(entry.header_offset for entry in entries):
        raise CheckpointError(
            f"{path} is no whole archive as PyTorch writes them: its entries are packed or overlap, or claim more "
            f"bytes ({claimed}) than the file has. Download it again."
        )


def _unpickled(path: Path) -> Any:
    # as an open file: of a path, PyTorch would look at the ending
    with open(path, "rb") as file, _only_allowed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats and unknown protocols; what matters raises
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _only_allowed() -> Iterator[None]:
    """PyTorch's list of allowed names is one for the process, and any package may have added to it. While a foreign
    file is read it is ours alone."""
    with _LOADING:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(ALLOWED))
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def _refused(path: Path, kind: str, error: Exception, advice: str) -> CheckpointError:
    """The error for a pickle that was not read. Only one that asks for code gets the advice how to run that."""
    if isinstance(error.__context__, pickle.UnpicklingError):
        error = error.__context__  # PyTorch wraps the reason in the advice to load the file unsafely
    told = str(error)
    named = re.findall(r"GLOBAL (\S+)", told)[:1]
    if kind == "zip" and named:
        try:
            with _only_allowed():
                named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or named
        except Exception:  # of a pickle that ends in nonsense; the first name is known
            pass
    if named:
        names = ", ".join(shown(name, 100) for name in named[:8]) + (", ..." if len(named) > 8 else "")
        return CheckpointError(
            f"{path} cannot be read safely: it asks for {names}, which weights do not need. {advice}"
        )
    if "Unsupported operand" in told:
        return CheckpointError(f"{path} cannot be read safely: it is pickled in a way that weights are not. {advice}")
    return CheckpointError(
        f"{path} is not a PyTorch weights file that can be read safely: {_first(error)}. Download it again."
    )


def _first(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0]).rstrip(".")
