"""The Hugging Face hub: the files of a model fetched into the cache on this machine, a folder pushed as one commit.

The hub is spoken to by huggingface_hub alone, so what steers it steers us: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE,
HF_TOKEN and `hf auth login`. Its errors become sentences here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nextblock.checkpoints.hub_errors import LOG_IN, Request, hub_name, in_sentences, patiently
from nextblock.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
OPTIONAL = ("README.md",)

_NAME = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)(\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w(?:[\w./+-]*[\w+-])?", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Whether the text has the form of a name on the hub: "owner/name", or "owner/name@revision".

    "runs/mine" has it too, so look for a folder of that name first.
    """
    name, at, revision = text.partition("@")
    return bool(_NAME.fullmatch(name)) and bool(_REVISION.fullmatch(revision) if at else True)


def fetch(name: str, *, revision: str | None = None, files: Sequence[str] = FILES, token: str | None = None) -> Path:
    """The folder, in the cache of huggingface_hub, that holds these files of a model on the hub.

    What is in the cache and unchanged on the hub is not fetched again. Without a network, with HF_HUB_OFFLINE, or
    while the hub is down, the cache answers. Every file is checked, each time, against the hash that the hub gave; a
    damaged one is fetched once more.

    Args:
        name: "owner/name" or "owner/name@revision".
        revision: a branch, a tag or a commit; the main branch by default.
        files: exact names. Nothing else is fetched, whatever the repository holds: no pickle, no code.
        token: to be known by; by default HF_TOKEN or that of `hf auth login`.

    Raises CheckpointError when the files cannot be had, with what to do.
    """
    name, revision = _split(name, revision)
    for file in files:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
            raise CheckpointError(f"'{file}' cannot be fetched: give the name of a file inside the repository.")
    folder = _snapshot(name, revision, files, token)
    if _without_damaged(folder, files):
        folder = _snapshot(name, revision, files, token)
        if damaged := _without_damaged(folder, files):
            raise CheckpointError(
                f"{', '.join(damaged)} of {name} arrived damaged twice: the content is not what {hub_name()} "
                "announced. Try again later, or over another network."
            )
    _refuse_missing(name, folder, files)
    return folder


def push(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add the model",
    token: str | None = None,
    files: Sequence[str] = FILES,
) -> str:
    """Upload a weights folder as one commit: all of it is there afterwards, or nothing.

    Args:
        folder: that holds the files.
        name: "owner/name" or "owner/name@revision"; made when it is not there.
        private: whom it is shown to when it is made; False leaves it to the owner's setting, which is public unless
            changed. An existing public repository is refused when this is True.
        revision: the branch, made when it is not there; the main branch by default.
        message: of the commit.
        token: one that may write; by default HF_TOKEN or that of `hf auth login`.
        files: exact names of what is uploaded. Other files of the repository stay as they are.

    Returns the address to open in a browser. Raises CheckpointError when it cannot be done, with what to do.
    """
    name, revision = _split(name, revision)
    folder = Path(folder)
    missing = [file for file in files if not (folder / file).is_file()]
    if set(missing) - set(OPTIONAL):
        raise CheckpointError(f"{folder} is not a weights folder: {', '.join(missing)} missing. Nothing was pushed.")

    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not token and not get_token():
        raise CheckpointError(f"Nobody is logged in to {hub_name()}: {LOG_IN}, with a token that may write.")
    api = HfApi(token=token or None, library_name="nextblock")

    def send() -> None:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise CheckpointError(
                f"{name} is there already and public. Make it private in its settings on {hub_name()}, or push under "
                "another name. Nothing was pushed."
            )
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        # one commit of our own: upload_folder may split a folder into several
        added = [CommitOperationAdd(file, folder / file) for file in files if file not in missing]
        api.create_commit(name, added, commit_message=message, revision=revision)

    with in_sentences(Request("push", name, revision, token)):
        patiently(send)
    return f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision else "")


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of "owner/name@revision". Raises CheckpointError when they are not of that form."""
    plain, at, given = name.partition("@")
    if at and revision is not None and revision != given:
        raise CheckpointError(f"{name} names the revision '{given}', but revision is '{revision}': give one of them.")
    revision = given if at else revision
    if not _NAME.fullmatch(plain):
        raise CheckpointError(
            f"'{name}' is neither a folder here nor a name on the hub, which is owner/name: letters, digits, and "
            "- _ . between them."
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise CheckpointError(f"'{revision}' cannot be a revision: give a branch, a tag or a commit.")
    return plain, revision


def _snapshot(name: str, revision: str | None, files: Sequence[str], token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(file) for file in files]

    def load() -> str:
        return snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            token=token or None,
            library_name="nextblock",
            tqdm_class=_bar(name),
        )

    with in_sentences(Request("fetch", name, revision, token)):
        return Path(patiently(load))


def _bar(name: str) -> Any:
    """One progress bar, of bytes, that says nothing while there is nothing to fetch."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            if options.get("name") != "huggingface_hub.snapshot_download":  # others count files, and the bytes again
                options["disable"] = True
            super().__init__(*args, **options | {"desc": f"Fetching {name}"})  # type: ignore[no-untyped-call]

        def set_description(self, *args: Any, **options: Any) -> None:
            """It keeps the one that it has."""

        def display(self, *args: Any, **options: Any) -> Any:
            return super().display(*args, **options) if self.total else None

        def close(self) -> None:
            if not self.total:
                self.disable = True
            super().close()

    return Bar


def _without_damaged(folder: Path, files: Sequence[str]) -> list[str]:
    """Remove those whose content is not what their name in the cache says, and name them.

    A file of a snapshot is a link to blobs/HASH: SHA-256 of a large file, git's SHA-1 of a small one. huggingface_hub
    itself compares lengths only. Where links cannot be made there is a copy, and nothing to compare with.
    """
    damaged = []
    for path in (folder / file for file in files):
        promised = Path(os.readlink(path)).name if path.is_symlink() and path.exists() else ""
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", promised) and _content_hash(path, promised) != promised:
            damaged.append(path.name)
            path.resolve().unlink()
            path.unlink()
    return damaged


def _content_hash(path: Path, like: str) -> str:
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _refuse_missing(name: str, folder: Path, files: Sequence[str]) -> None:
    missing = [file for file in files if file not in OPTIONAL and not (folder / file).is_file()]
    if not missing:
        return
    try:
        from huggingface_hub import get_cached_repo_tree

        there = [file.path for file in get_cached_repo_tree(name, revision=folder.name)]
    except Exception as error:  # an older huggingface_hub left no list, and the hub was not asked now
        raise CheckpointError(
            f"{', '.join(missing)} of {name} is not on this machine, and {hub_name()} could not be asked. Try again "
            "with a network."
        ) from error
    holds = f"It holds {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}." if there else "It is empty."
    if "config.json" in missing:
        raise CheckpointError(f"{name} is not a model of nextblock: it has no config.json. {holds}")
    raise CheckpointError(f"{name} on {hub_name()} has no {', '.join(missing)}. {holds}")
