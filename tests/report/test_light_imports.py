"""`resist report` (HTML) and `resist watch` need no torch, numpy or matplotlib, so that they start at once."""

import subprocess
import sys
from pathlib import Path

import resist
from report_runs import make_run

# The package and its command line import everything as long as they are not lazy; here they are empty packages.
SCRIPT = """
import importlib.abc, sys, types
from pathlib import Path

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "numpy", "matplotlib"):
            raise ImportError(name + " is imported")

root = Path(sys.argv[1])
for name in ("resist", "resist.cli"):
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    package.__version__ = "0"
    sys.modules[name] = package
sys.meta_path.insert(0, Refuse())

from resist.cli.report import ReportConfig, run_report
from resist.cli.watch import WatchConfig, run_watch
import resist.runs.directory

run, out = map(Path, sys.argv[2:])
assert run_report(ReportConfig((run,), out), []) == 0
assert run_watch(WatchConfig(run), []) == 0
"""


def test_reports_and_displays_need_no_torch(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run", rounds=4), tmp_path / "report.html"
    command = [sys.executable, "-c", SCRIPT, str(Path(resist.__file__).parent), str(run), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished after round 4" in done.stdout
    assert out.stat().st_size > 10_000
