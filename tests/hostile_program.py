"""A TorchScript program that writes a file while it is loaded. TorchScript reads annotations, so they are no texts."""

import warnings
from pathlib import Path

import torch


class Program(torch.nn.Module):
    place: str

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.place, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.place = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.place)


def write_program(path: Path, sentinel: Path) -> Path:
    """Also shows that it works: leaves no sentinel, but has seen one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program(str(sentinel))).save(path)
        sentinel.unlink(missing_ok=True)
        torch.jit.load(path)
    sentinel.unlink()
    return path
