"""A process that has imported the package once, and forks others that each run one command line, to be killed.

So a real process group costs a hundredth of a second instead of some seconds. Talks in lines of JSON. On stdin:
{"start": arguments, "log": file, "suicide": [pattern, count] or null, "env": {}} or {"poll": pid}. On stdout:
{"pid": n}, or {"code": n}, null while it runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_USED_LATE = (
    "torch.utils.tensorboard", "torch.utils.data", "torch._dynamo", "matplotlib.pyplot", "sklearn.metrics",
    "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.BmpImagePlugin", "diffusers.models.autoencoders.autoencoder_kl",
    "jsonargparse", "nextblock.figures.curves", "nextblock.figures.samples", "nextblock.figures.probe",
    "nextblock.figures.suite", "nextblock.figures.reconstruction",
)  # fmt: skip


class ForkServer:
    """The server as seen from a test. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | ONE_THREAD, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(
        self,
        arguments: list[str],
        log: Path,
        suicide: tuple[str, int] | None = None,
        env: dict[str, str] | None = None,
    ) -> int:
        """A process in a group of its own that runs `nextblock ARGUMENTS`; returns its number.

        suicide: a pattern and n: it kills its group before the n-th time that it opens, makes, renames or removes
            something with the pattern in its path.
        env: what its environment holds besides.
        """
        asked = {"start": arguments, "log": str(log), "suicide": suicide, "env": env or {}}
        return int(self._ask(asked)["pid"])

    def poll(self, pid: int) -> int | None:
        """Its exit code, minus the number of the signal that ended it, or None while it runs."""
        code: int | None = self._ask({"poll": pid})["code"]
        return code

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _serve() -> None:
    from nextblock import cli

    for module in (*(module for module, _ in cli.VERBS.values()), *_USED_LATE):
        import_module(module)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # it minds forks itself
    assert len(threads) == 1, f"a process with threads cannot be forked: {threads}"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nobody's print may come in between
    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                os.close(answers.fileno())
                _be_killed(**question)
            print(json.dumps({"pid": pid}), file=answers, flush=True)
        else:
            print(json.dumps({"code": _code(int(question["poll"]), codes)}), file=answers, flush=True)
    os._exit(0)


def _code(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def _be_killed(start: list[str], log: str, suicide: list[Any] | None, env: dict[str, str]) -> None:
    """In the forked process: never returns."""
    code = 70
    try:
        os.setsid()
        os.environ |= env
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["nextblock", *start]
        if suicide is not None:
            _arm(*suicide)
        from nextblock import cli

        code = cli.main(start)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _arm(pattern: str, count: int) -> None:
    """Kill the own group before the `count`-th operation on a path with `pattern`."""
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    mine, left = os.getpid(), [count]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in events or os.getpid() != mine:
            return
        if any(pattern in str(argument) for argument in arguments if isinstance(argument, str | os.PathLike)):
            left[0] -= 1
            if left[0] == 0:
                os.killpg(mine, signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    _serve()
