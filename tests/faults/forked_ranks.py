"""The processes of a run, forked from one that has imported everything: a start costs tenths of a second.

`Ranks().run("module:function", world=2, arguments)` calls the function in `world` processes that find each other as
those of a launcher do; `arguments` go through JSON. The parent never computes anything: a process that has threads of
its own cannot be forked safely.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

TIMEOUT_S = 100


class Ranks:
    """Started once, used for any number of runs; use as a context manager."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        self._parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.kill()  # it holds nothing
        self._parent.communicate()

    def run(self, call: str, world: int, arguments: dict[str, Any]) -> None:
        """Raise AssertionError, with what they wrote, unless all processes end well."""
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps({"call": call, "world": world, "arguments": arguments}) + "\n")
        self._parent.stdin.flush()
        codes, output = json.loads(self._parent.stdout.readline())
        assert codes == [0] * world, f"exit codes {codes}\n{output}"


def _serve() -> None:
    import nextblock.jobs.pretrain
    import nextblock.jobs.train_generator  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")  # what the processes print does not belong there
    os.dup2(2, 1)
    for line in sys.stdin:
        wanted = json.loads(line)
        import_module(wanted["call"].partition(":")[0])
        with tempfile.TemporaryFile("w+") as output:
            codes = _run(wanted["call"], wanted["world"], wanted["arguments"], output)
            output.seek(0)
            print(json.dumps([codes, output.read()[-4000:]]), file=answers, flush=True)


def _run(call: str, world: int, arguments: dict[str, Any], output: Any) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [os.fork() or _rank(rank, call, world, arguments, port, output) for rank in range(world)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(codes) < world:
        for pid in set(pids) - set(codes):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            if (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
                if codes[pid]:  # the others would wait for it
                    deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _rank(rank: int, call: str, world: int, arguments: dict[str, Any], port: int, output: Any) -> int:
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        if world > 1:
            os.environ |= {
                "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world),
            }  # fmt: skip
        module, _, function = call.partition(":")
        getattr(import_module(module), function)(**arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
