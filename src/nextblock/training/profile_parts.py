"""The parts of a profile: which steps there are, and which rooms a forward pass goes through."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import nn

from nextblock.errors import ConfigError
from nextblock.randomness import permutation
from nextblock.xar.model import XAR
from nextblock.xtra.model import XTRA

BEFORE, AFTER = ("data", "transfer", "inputs"), ("backward", "optimizer", "other")


@dataclass(frozen=True)
class Schedule:
    """Steps of a profile: some to warm up, then as many with marks as without, in pairs, then some that are traced.

    Raises ConfigError for a number that cannot be.
    """

    steps: int = 20
    warmup: int = 5
    traced: int = 3

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("traced", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)!r}.")

    @property
    def total(self) -> int:
        return self.warmup + 2 * self.steps + self.traced

    def kinds(self) -> list[str]:
        """What each step is: "warmup", "marked", "bare" or "traced".

        Marked and bare steps come in pairs, as a machine drifts, and in pairs without a period, as batches come in
        bursts of as many as there are workers.
        """
        pairs = (("marked", "bare") if i % 2 else ("bare", "marked") for i in permutation(0, "profile", self.steps))
        return ["warmup"] * self.warmup + list(chain.from_iterable(pairs)) + ["traced"] * self.traced


@dataclass(frozen=True)
class StepTime:
    """One step.

    Attributes:
        kind: see `Schedule.kinds`.
        total_s: seconds of the whole.
        phases: seconds of each phase; their sum is the total. Empty for a bare step.
        waited_s: seconds that the host waited for data, whether or not the device stood idle.
    """

    kind: str
    total_s: float
    phases: dict[str, float]
    waited_s: float


def rooms_of(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """The rooms of a forward pass in order: (name, the module at whose call it begins, whether after that call).

    None of these modules is compiled with the layers (`compile_layers`), where a hook would break the graph. Raises
    ConfigError for a model that is neither XTRA nor xAR.
    """
    if isinstance(model, XTRA):
        return [
            ("encoder", model, False),
            ("projection and predictor", model.projection, False),
            ("pixel heads", model.heads[0], False),
            ("loss", model.heads[-1], True),
        ]
    if isinstance(model, XAR):
        return [
            ("tokens in", model, False),
            ("layers", model.norm_in, True),
            ("tokens out", model.norm_out, False),
            ("loss", model.tokens_out, True),
        ]
    raise ConfigError(f"XTRA and xAR are profiled; got {type(model).__name__}.")
