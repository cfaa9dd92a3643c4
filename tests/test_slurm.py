"""docs/files/slurm.sbatch under a real SLURM: daemons of this test only, and one machine in the role of two nodes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import Commands, free_port
from resist.runs.history import read_history
from test_docs import DOCS, ROOT, SMALL

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name, path=PATH)]
NODES = ("127.0.0.1", "127.0.0.2")  # names that lead to this machine without an entry anywhere
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# In the first run every step takes long enough that the signal comes before the end, however fast the machine is.
SLOW = """
import sys, time
from resist.job import Job
from resist.__main__ import main
step = Job.step
Job.step = lambda *arguments, **options: (time.sleep(0.15), step(*arguments, **options))[1]
sys.argv[0] = "resist"
main()
"""


class Cluster:
    """munged, slurmctld and two slurmd, with all of their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]

    def start(self) -> None:
        folder, host = self.folder, os.uname().nodename.partition(".")[0]
        lines = [CONFIGURATION.format(folder=folder, host=host, port=free_port())]
        for name in NODES:
            lines.append(f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={free_port()} CPUs=2\n")
        (folder / "slurm.conf").write_text("".join(lines))
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        self._daemon("munged", "--foreground", *(f"--{name}={folder / file}" for name, file in files.items()))
        self.until(lambda: (folder / "munge.socket").exists(), 20)
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self.until(lambda: self.run("sinfo", "--noheader", "--Node", "--format=%t", check=False) == "idle\nidle\n", 60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **more: str) -> str:
        environment = self.environment | more
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says about a job: its state, the reason for which it waits, how often it was started again."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def until(self, ready: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.5)

    def logs(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """End the daemons, and what they have started: it knows the configuration of this test."""
        import psutil

        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Not below the folder of pytest, which only root may enter: munge refuses to put its socket there."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.end()


@pytest.mark.nightly
@pytest.mark.timeout(500)
@pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of SLURM have to be started by root")
def test_a_job_is_queued_again_at_its_time_limit_and_finishes(
    cluster: Cluster, commands: Commands, tmp_path: Path
) -> None:
    """Its time is 2 minutes; SLURM sends the signal 50 s before, or up to 30 s earlier."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    (tmp_path / "slow.py").write_text(SLOW)
    python.write_text(
        f'#!/bin/bash\n[ -n "$SLURM_RESTART_COUNT" ] || set -- slow.py "${{@:3}}"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=2"]
    options += ["--signal=TERM@50", "--parsable", str(DOCS / "files/slurm.sbatch")]
    arguments = ["--workers", "2", "--min-depth", "0", *SMALL, "--epochs", "20"]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])
    number = cluster.run("sbatch", *options, *arguments, cwd=tmp_path, PYTHONPATH=path).strip()
    run = tmp_path / "runs" / number

    cluster.until(lambda: cluster.job(number)["Restarts"] == "1", 200)
    log = tmp_path / f"resist-{number}.log"
    assert "interrupted after round" in log.read_text()
    assert not (run / "model.safetensors").exists()
    cluster.until(lambda: cluster.job(number)["Reason"] == "BeginTime", 30)  # in two minutes, if nobody changes it
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now", "TimeLimit=10")
    cluster.until(lambda: cluster.job(number)["JobState"] == "COMPLETED", 200)

    assert (cluster.job(number)["Restarts"], cluster.job(number)["ExitCode"]) == ("1", "0:0")
    assert "test accuracy" in log.read_text()
    assert (run / "model.safetensors").is_file()
    history = read_history(run)
    assert [record["round"] for record in history.rounds] == list(range(1, len(history.rounds) + 1))
    reported = commands.run("report", run)
    assert reported.returncode == 0, reported.stderr
