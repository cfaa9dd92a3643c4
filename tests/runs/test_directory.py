"""Run directories: never overwritten, and their configuration comes back."""

from pathlib import Path

import pytest

from resist.errors import UserError
from resist.runs.config import NetworkConfig, RunConfig, TrainConfig
from resist.runs.config_file import read_config
from resist.runs.directory import Run, check_free


def test_a_run_directory_brings_its_configuration_back_and_is_never_overwritten(tmp_path) -> None:
    config = TrainConfig(network=NetworkConfig(model_args=("width=8",)), run=RunConfig(out=tmp_path / "a" / "b"))
    run = Run(tmp_path / "a" / "b", config)
    run.append({"round": 1})
    assert read_config(run.path) == config
    assert (run.path / "metrics.jsonl").read_text() == '{"round": 1}\n'
    run.close()
    with pytest.raises(UserError, match="never overwritten"):
        Run(run.path, config)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        (tmp_path / "file" / "run", r"file is not a directory that you may write to"),
        (tmp_path / ("x" * 300) / "run", r"cannot be made: File name too long"),
        (tmp_path.joinpath(*["x" * 99] * 39, "x" * 90), r"`out` has a path of 40\d\d bytes, more than 3\d\d\d; give a"),
        (tmp_path / "link", r"exists already and is never overwritten"),
    ):
        with pytest.raises(UserError, match=message):
            check_free(out)
    check_free(tmp_path / "b" / "c" / "d")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs a file system that refuses new folders")
def test_an_out_below_a_missing_folder_where_none_can_be_made_is_found_by_the_check() -> None:
    with pytest.raises(UserError, match=r"cannot be made: /proc is not a directory that you may write to \(.*\)"):
        check_free(Path("/proc/none/run"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"network": 3}', '{"network": {"data": 3}}', '{"more": {}}', "\x00"])
def test_damaged_configurations_are_named(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
