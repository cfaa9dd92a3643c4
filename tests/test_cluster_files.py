"""Tests of docs/files, which users copy to a cluster: they run, with fake programs, and the commands in them parse."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from commands import free_port
from test_docs import DOCS, ROOT, SMALL, parse_resist


def test_kubernetes_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is YAML, its parts refer to one another, and its command parses."""
    parts = {part["kind"]: part for part in yaml.safe_load_all((DOCS / "files/kubernetes.yaml").read_text())}
    assert set(parts) == {"Service", "PersistentVolumeClaim", "NetworkPolicy", "Job"}
    job = parts["Job"]["spec"]
    pod, service = job["template"]["spec"], parts["Service"]
    container = pod["containers"][0]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert job["completions"] == job["parallelism"] == int(environment["WORLD_SIZE"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{parts['Job']['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(environment["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    labels = job["template"]["metadata"]["labels"]
    assert labels.items() >= service["spec"]["selector"].items()
    assert labels.items() >= parts["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    claims = {volume["name"] for volume in pod["volumes"]}
    assert claims == {mount["name"] for mount in container["volumeMounts"]}
    script = container["args"][0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    trained = [shlex.split(line)[4:] for line in script.splitlines() if "-m resist" in line]
    assert len(trained) == 2
    workers = [parse_resist(arguments, monkeypatch).method.workers for arguments in trained]
    assert workers[1] == int(environment["WORLD_SIZE"])


FAKE = {
    "ssh": 'exec bash -c "${@: -1}"',  # every host is this one
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2"; else printf "node0\\nnode1\\n"; fi',
    "srun": "for SLURM_PROCID in 0 1 2 3; do export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2)); "
    '[ "$2" = --cpus-per-task=8 ] || exit 9; "${@:3}"; done',  # srun does not know it by itself
}
SHOW = ('#!/bin/bash\necho "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR: $*"\n'
        'case "$*" in *0.5*) exit 75;; esac')  # fmt: skip


def stage(tmp_path: Path, programs: dict[str, str]) -> dict[str, str]:
    """Put programs of these names first in PATH, make a .venv, and return the environment."""
    for path in (tmp_path / "bin", tmp_path / ".venv/bin"):
        path.mkdir(parents=True)
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    (tmp_path / ".venv/bin/activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": path}


def test_slurm_file(tmp_path: Path) -> None:
    """Print the environment of each task with fake programs; an interrupted run is queued again and resumed."""
    environment = stage(tmp_path, FAKE) | {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    python = tmp_path / ".venv/bin/python"
    python.write_text(SHOW)
    python.chmod(0o755)

    def batch(*arguments: str) -> tuple[int, list[str]]:
        command = ["bash", str(DOCS / "files/slurm.sbatch"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    run = tmp_path / "runs/77"
    status, lines = batch("--data", "cifar10")
    assert status == 0
    assert lines == [f"{n} 4 {n % 2} 2 node0: -m resist train --out {run} --data cifar10" for n in range(4)]
    run.mkdir(parents=True)
    (run / "config.json").touch()
    status, lines = batch("--epochs", "0.5")
    assert lines[0].endswith(f"train --resume {run}")
    (run / "config.json").unlink()
    status, lines = batch("--epochs", "0.5")
    assert (status, lines[-1]) == (75, "requeued 77")


def test_ssh_script_starts_torchrun_on_each_host(tmp_path: Path) -> None:
    """With a torchrun that prints its arguments, and a space in the name of the folder."""
    out, environment = tmp_path / "a run", stage(tmp_path, {"ssh": FAKE["ssh"]})
    environment |= {"HOSTS": "localhost 127.0.0.1", "PORT": "123", "INTERFACE": "lo", "DIRECTORY": str(tmp_path)}
    (tmp_path / ".venv/bin/activate").write_text(f"export PATH={tmp_path / '.venv/bin'}:$PATH\n")
    torchrun = tmp_path / ".venv/bin/torchrun"
    show = 'echo "$PWD $GLOO_SOCKET_IFNAME|$(printf "%s|" "$@")"'
    torchrun.write_text(f'#!/bin/bash\n{show}\n[ "$6" = "$FAILING" ] && exit 3\nexit 0\n')
    torchrun.chmod(0o755)
    script = [str(DOCS / "files/ssh.sh"), "--workers", "2", "--out", str(out)]
    for failing in range(3):
        environment["FAILING"] = str(failing)
        done = subprocess.run(script, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (3 if failing < 2 else 0, "")
        assert sorted(done.stdout.splitlines()) == [
            f"{tmp_path} lo|--nnodes|2|--nproc-per-node|1|--node-rank|{rank}|--master-addr|localhost|--master-port|123|"
            f"-m|resist|train|--workers|2|--out|{out}|"
            for rank in range(2)
        ]


@pytest.mark.nightly
def test_ssh_script(tmp_path: Path) -> None:
    """Run on this machine in the role of two hosts, with real processes and a space in the folder's name."""
    out = tmp_path / "a run"
    port = free_port()
    environment = stage(tmp_path, {"ssh": FAKE["ssh"]}) | {
        "HOSTS": "localhost 127.0.0.1", "PORT": port, "INTERFACE": "lo", "OMP_NUM_THREADS": "1",
        "DIRECTORY": str(tmp_path),
    }  # fmt: skip
    script = [str(DOCS / "files/ssh.sh"), "--workers", "2", "--min-depth", "0", *SMALL, "--out", str(out)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (out / "model.safetensors").is_file()
