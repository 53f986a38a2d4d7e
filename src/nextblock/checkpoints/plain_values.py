"""What a foreign pickle may hold besides tensors, and how it becomes plain values.

PyTorch's restricted reader (`weights_only=True`) makes tensors, numbers, texts, lists and dicts, and calls only what a
list allows. Training scripts save their options beside the weights, as objects of many packages. The list here lets
none of those packages in: each name is answered by a stand-in of ours that keeps what it is handed and does nothing,
so what a file can cause ends where the stand-ins end. `plain` then takes the value out of each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH = 64  # options are nested a few levels deep; the limit keeps Python's stack from running out
MAX_VALUES = 10_000_000  # an optimiser's state of the largest models has some hundred thousand
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
Plain = Callable[[Any], Any]


class NotPlain(ValueError):
    """A value with no plain form; the message is one clause about it."""


class TooMuch(NotPlain):
    """More than an honest file holds."""


class StandIn:
    """In the place of a foreign object: what it was made from (`args`) and filled with (`state`), both only kept.

    The reader calls `__new__` with the file's arguments and `__setstate__` with the file's state. Neither looks at
    them, so nothing runs and nothing but this object changes.
    """

    title: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def plain(self, plain: Plain) -> Any:
        """The attributes, as a dict."""
        if self.state is not None and not isinstance(self.state, Mapping):
            raise NotPlain(f"a {self.title} of an unknown form")
        return plain(dict(self.state or {}))


class _Value(StandIn):
    """An enum: its class was called with its value."""

    def plain(self, plain: Plain) -> Any:
        return plain(self.args[0])


class _Posix(StandIn):
    """A path: its class was called with its parts. As text; nothing is looked up on the disk."""

    def plain(self, plain: Plain) -> Any:
        return str(PurePosixPath(*map(str, plain(self.args))))


class _Windows(StandIn):
    def plain(self, plain: Plain) -> Any:
        return str(PureWindowsPath(*map(str, plain(self.args))))


class _Dtype(StandIn):
    """A numpy dtype, called with 'f8' and the like; its byte order is in the state."""

    def plain(self, plain: Plain) -> Any:
        return str(self.numpy())

    @staticmethod
    def of(value: Any) -> np.dtype[Any]:
        """What stands where a dtype should; a file can put anything there."""
        if not isinstance(value, _Dtype):
            raise NotPlain("a numpy array without a type")
        return value.numpy()

    def numpy(self) -> np.dtype[Any]:
        """Only of kinds that are numbers: with "O" for objects, numpy would take pointers from the file."""
        order = self.state[1] if self.state else "="
        if self.args[0][:1] not in tuple("biufc") or not self.args[0][1:].isdecimal() or order not in tuple("<>|="):
            raise NotPlain("a numpy array of something else than numbers")
        return np.dtype(self.args[0]).newbyteorder(order)


class _Scalar(StandIn):
    """A numpy number: its dtype and its bytes."""

    def plain(self, plain: Plain) -> Any:
        dtype, raw = self.args
        return np.frombuffer(raw, _Dtype.of(dtype), count=1)[0].item()


class _Array(StandIn):
    """A numpy array, as a tensor. The state: version, shape, dtype, whether column-major, bytes."""

    def plain(self, plain: Plain) -> Any:
        _, shape, dtype, column_major, raw = self.state
        kind = _Dtype.of(dtype)
        values = np.frombuffer(raw, kind).reshape(shape, order="F" if column_major else "C")
        return torch.from_numpy(np.array(values, kind.newbyteorder("="), order="C"))


class _Content(StandIn):
    """A container of omegaconf: of its state only the content, not the way back to its parent."""

    def plain(self, plain: Plain) -> Any:
        return plain(self.state["_content"])


class _Node(StandIn):
    """A value of omegaconf."""

    def plain(self, plain: Plain) -> Any:
        return plain(self.state["_val"])


def _new_dict(*factory: Any) -> dict[Any, Any]:
    """In the place of collections.defaultdict; the factory, which a defaultdict would call, is dropped."""
    return {}


_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
_KINDS: dict[type[StandIn], tuple[str, ...]] = {
    StandIn: (
        # bags of attributes: options of training scripts
        "argparse.Namespace", "types.SimpleNamespace",
        # state of DeepSpeed's loss scaling
        "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        # named, not made: types of options, factories of a defaultdict, and the callbacks by which old Lightning
        # files are keyed; were one made after all, it would be one more bag
        "builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.list", "builtins.dict",
        "builtins.tuple", "typing.Any", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
        *(f"{package}.callbacks.{name}" for package in _LIGHTNING for name in (
            "model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor",
        )),
    ),
    _Value: ("deepspeed.runtime.zero.config.ZeroStageEnum",),
    _Posix: tuple(f"{room}.{kind}PosixPath" for room in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
    _Windows: tuple(f"{room}.{kind}WindowsPath" for room in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
    _Dtype: ("numpy.dtype",),
    _Scalar: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    # an array is begun by calling _reconstruct(ndarray, (0,), b"b"); the call gives our stand-in, too
    _Array: ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray"),
    _Content: ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    _Node: tuple(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean")),
}  # fmt: skip
_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "easydict.EasyDict",
)  # fmt: skip


def _allowed() -> list[tuple[Callable[..., Any], str]]:
    """(stand-in, the name it answers to), as `torch.serialization.safe_globals` takes them.

    One class a name, so that what only is named keeps its name. The dicts with attributes are plain OrderedDicts: the
    reader fills only these, dict and Counter; an OrderedDict of the standard library calls nothing it is given.
    """
    found: list[tuple[Callable[..., Any], str]] = [(_new_dict, "collections.defaultdict")]
    for kind, names in _KINDS.items():
        found += [(type(kind.__name__, (kind,), {"title": name}), name) for name in names]
    return [*found, *((OrderedDict, name) for name in _DICTS)]


ALLOWED = _allowed()


def plain(value: Any, max_bytes: int) -> Any:
    """The same with stand-ins, sets and tuples as dicts, lists, numbers and texts; tensors stay, without extras.

    Raises NotPlain for what is none of these, holds itself, is nested too deep, or claims more than `max_bytes` (of
    the file): a few bytes can describe a tensor of any size.
    """
    return _Plainer(max_bytes).of(value)


class _Plainer:
    """One conversion. What occurs twice is converted once, and counted twice: what a small file can hold by naming
    lists within lists again and again is more than anyone could go through afterwards."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._depth, self._count = max_bytes, 0, 0
        # by id: the value, which so stays alive; what it became; how many values are in it
        self._done: dict[int, tuple[Any, Any, int]] = {}
        self._open: set[int] = set()

    def of(self, value: Any) -> Any:
        self._count += 1
        if type(value) in _ATOMS:
            return value
        key = id(value)
        if key in self._open or self._depth == MAX_DEPTH:
            raise TooMuch("a list or dict that holds itself, or is nested too deep")
        if key in self._done:
            self._count += self._done[key][2]
        else:
            before = self._count
            self._open.add(key)
            self._depth += 1
            self._done[key] = value, self._converted(value), self._count - before
            self._depth -= 1
            self._open.remove(key)
        if self._count > MAX_VALUES:
            raise TooMuch(f"a list or dict that unfolds to more than {MAX_VALUES} values")
        return self._done[key][1]

    def _converted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, StandIn):
            return self._stand_in(value)
        if isinstance(value, type) and issubclass(value, StandIn):
            return value.title
        if type(value) in (dict, OrderedDict, Counter):
            return {self._name(name): self.of(each) for name, each in value.items()}
        if type(value) in (list, tuple, set, torch.Size):
            return [self.of(each) for each in tuple(value)]
        if type(value) is bytearray and len(value) <= self._max_bytes:
            return bytes(value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout)):
            return str(value)
        raise NotPlain(f"a {type(value).__name__}")

    def _name(self, key: Any) -> Any:
        found = self.of(key)
        if type(found) not in _ATOMS:
            raise NotPlain(f"a dict with a {type(found).__name__} as a key")
        return found

    def _stand_in(self, value: StandIn) -> Any:
        try:
            return type(value).plain(value, self.of)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise error if isinstance(error, NotPlain) else NotPlain(f"a {value.title} of an unknown form") from error

    def _tensor(self, value: Tensor) -> Tensor:
        if value.layout == torch.strided and value.numel() * value.element_size() > self._max_bytes:
            raise TooMuch(f"a tensor {list(value.shape)}, which is more than the whole file")
        return Tensor.detach(value)  # a new one: a file can hang hooks and attributes on the one it makes
