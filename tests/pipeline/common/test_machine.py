"""The description of this machine."""

import os
from pathlib import Path

import pytest

from pipeline.common import machine


def test_machine_name_has_the_cores_of_this_process_and_the_processors_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "Path", lambda path: {"/proc/cpuinfo": info}[path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 9} if process == 0 else set())
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert machine.machine_name() == "3 cores of riscv64"
    info.write_text("processor\t: 0\nmodel name\t: Some Processor 7\nprocessor\t: 1\nmodel name\t: Another\n")
    assert machine.machine_name() == "3 cores of Some Processor 7"
