"""A Slurm of one machine: its daemons, a key of its own, and a node that claims to have GPUs. For root only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = ["slurm-wlm", "munge"]
PATIENCE_S = 240.0
HURRY_S = 6.0
CONFIG = """ClusterName=one
SlurmctldHost={host}
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdLogFile={folder}/slurmd.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str:
    """Install Slurm, where it is not; returns why that cannot be, or nothing."""
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        return ""
    if os.geteuid() or not shutil.which("apt-get"):
        return "Slurm is not installed, and only root on Debian or Ubuntu can install it: slurm-wlm, munge"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", *command], capture_output=True, text=True, env=environment, timeout=600, check=False
        )  # fmt: skip
        if done.returncode:
            return f"apt-get {command[0]}: {done.stderr[-500:]}"
    return ""


class Cluster:
    """A context manager. `environment` is what its commands and jobs run with."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        folder, ports = self.folder, []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports, host=host))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={folder}/gpu{i}\n" for i in range(8)))
        for i in range(8):  # nobody opens them
            os.mkfifo(folder / f"gpu{i}")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
            self.wait(lambda: (folder / "munge.socket").exists(), "munged", patience_s=30)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", host)
            self.wait(lambda: "idle" in self.run("sinfo", "--noheader", check=False), "an idle node", patience_s=30)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=60, check=False, cwd=self.folder
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *command: str) -> str:
        """The number of the job."""
        return self.run("sbatch", "--parsable", *command).strip()

    def states(self, job: str) -> set[str]:
        """Of its tasks, those that are still known."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return {word.partition("=")[2] for word in text.split() if word.startswith("JobState=")}

    def finish(self, job: str) -> None:
        """Wait for a job, and its tasks, to complete; hurries on one that was put back into the queue."""

        begun = time.monotonic()

        def done() -> bool:
            states = self.states(job)
            assert states <= {"PENDING", "RUNNING", "COMPLETING", "COMPLETED"}, self.told(job)
            # Not at once: the node refuses a job until it has heard that it is not the one that was just ended.
            if "PENDING" in states and time.monotonic() - begun > HURRY_S:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return states == {"COMPLETED"}

        self.wait(done, f"job {job}", job)

    def wait(self, ready: Callable[[], bool], what: str, job: str = "", patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not ready():
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.told(job)}"
            time.sleep(0.2)

    def told(self, job: str = "") -> str:
        """What the daemons and the job have said at last."""
        files = [*self.folder.glob("*.log"), *(self.folder.glob(f"*-{job}*.out") if job else [])]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out.log", "ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
