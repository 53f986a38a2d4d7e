"""What the processes of a run tell each other of an error, where none may wait in vain."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nextblock.errors import NextblockError, RunError
from nextblock.training.launch import Fabric, is_lost

AGREE_S = 20.0  # how long after one process the others may meet the same error: they open files, perhaps slowly
_POLL_S = 0.05
_MOST = 2000  # letters of an error that are compared


def require_alike(fabric: Fabric, what: str, error: Exception | SystemExit, advice: str) -> str:
    """The words of an error that each process of a run has met at `what`, so that they may go on with something else.

    One that went on alone would wait for the others, which are still there: where they do not all say the same, this
    raises RunError, ending in `advice`, or the error where that says that another process has ended. Then the launcher
    ends all. An exit with 0 of a process other than the first leaves the words to the first, see `on_first_process`.
    """
    told = str(error) if isinstance(error, NextblockError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        if error.code or fabric.is_global_zero:
            raise error
        told = ""
    if fabric.world_size == 1:
        return told
    if is_lost(error):
        raise error
    said = _said_by_all(fabric, what, told)
    if said is not None:
        fabric.barrier()  # so that the first process, whose store it may be, does not end before all have read it
        return said
    if isinstance(error, SystemExit):
        raise error
    raise RunError(
        f"{what}, on process {fabric.global_rank} of {fabric.world_size}, from 0, and not on all alike: "
        f"{told.rstrip('.')}. So all processes end. {advice}"
    ) from error


def _said_by_all(fabric: Fabric, what: str, told: str) -> str | None:
    """What all say, None where they do not say the same within AGREE_S. An empty word agrees with the first process.

    Nobody can hang here: words are left in the store by which the processes have found each other, not exchanged. And
    they can go on together only from the same exchange, so those that stand at different ones do not meet.
    """
    stores: Any = dist  # whose types do not export them
    corner = f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_exchanges()}/{what}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = stores.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=AGREE_S))
        return _all_told(stores.PrefixStore(corner, store), fabric, told[:_MOST])
    except RuntimeError:  # the first process is gone, and the store with it
        return None


def _all_told(store: Any, fabric: Fabric, told: str) -> str | None:
    store.set(str(fabric.global_rank), told)
    names = [str(rank) for rank in range(fabric.world_size)]
    deadline = time.monotonic() + AGREE_S
    while not store.check(names):
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    said = [store.get(name).decode() for name in names]
    return said[0] if all(words in (said[0], "") for words in said) else None


def _exchanges() -> int:
    """How many exchanges this process has begun."""
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group())  # torch has no public name for it
