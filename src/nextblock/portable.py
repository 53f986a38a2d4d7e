"""What a person expects on a model class: `from_pretrained`, `save_pretrained`, `push_to_hub`.

How weights lie in files is the business of `checkpoints`, a floor above the models; these methods only hand over to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

_WEIGHTS_FOLLOW: ContextVar[bool] = ContextVar("weights follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Models made here, in this thread, leave out their initialisation: every number is about to be loaded."""
    before = _WEIGHTS_FOLLOW.set(True)
    try:
        yield
    finally:
        _WEIGHTS_FOLLOW.reset(before)


def initialization_is_needed() -> bool:
    """False within `weights_follow`."""
    return not _WEIGHTS_FOLLOW.get()


class Portable:
    """Mixed into every model that can be kept in a folder of weights.

    Attributes:
        preprocessing: how an image becomes the model's input, plain values (see `data.preprocess.Preprocessing`); None
            for a model that was made here, which then takes images of its configured size, normalised as ImageNet's.
        about: what else belongs to the weights (of a generator: its VAE and classes, under "generator").
    """

    preprocessing: Mapping[str, Any] | None = None
    about: Mapping[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, where: str | Path, *, revision: str | None = None, token: str | None = None) -> Self:
        """A model with its weights, on the CPU, in eval mode.

        Args:
            where: a folder of weights, a finished run, or a name on the Hugging Face hub: "owner/name".
            revision: branch, tag or commit on the hub.
            token: for private repositories; by default the one that `hf auth login` has kept.

        Raises CheckpointError when it is not there, damaged, or of another kind of model.
        """
        from nextblock.checkpoints.pretrained import open_as

        return open_as(cls, where, revision=revision, token=token)

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write config.json, model.safetensors, preprocessor_config.json and README.md into a new folder.

        Args:
            folder: new, or empty.
            card: the model card, Markdown; one that tells the sizes and how to load it when left out.

        Raises CheckpointError when there is something in the folder already.
        """
        from nextblock.checkpoints.pretrained import save_new

        return save_new(folder, self, card)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload weights",
        token: str | None = None,
        card: str | None = None,
    ) -> str:
        """Save to a repository of the Hugging Face hub, made when it is not there; returns its address.

        Args:
            name: "owner/name".
            private: whether a repository that is made is private.
            revision: the branch.
            message: of the commit.
            token: with the right to write; by default the one that `hf auth login` has kept.
            card: as in `save_pretrained`.

        Raises CheckpointError when it cannot be reached or written.
        """
        from nextblock.checkpoints.pretrained import push_model

        return push_model(self, name, card, private=private, revision=revision, message=message, token=token)
