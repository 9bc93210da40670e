"""What all commands have in common: --help, the error line, the exit code."""

import ast
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.common.cli import exit_on_error

REPOSITORY = Path(__file__).parents[3]
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("pipeline", "sweeps")
    for path in (REPOSITORY / folder).glob("*.py")
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)
)


def test_commands_are_found():
    assert len(COMMANDS) >= 13
    assert {"pipeline.train", "sweeps.run"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_purpose_example_and_files_in_the_users_words(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["anything", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    shown = capsys.readouterr().out
    usage, purpose, rest = shown.split("\n\n", maxsplit=2)
    assert usage.startswith(f"usage: python -m {name} ")
    assert re.fullmatch(r"[A-Z].*\.", purpose), "one line, a sentence"
    assert f"python -m {name}" in rest.split("\n\n")[0], "an example"
    assert re.search(r"\b(reads|writes|gets)\b", rest, re.IGNORECASE), "the files"
    names = {name for name in vars(module) if re.search("_|[a-z][A-Z]|^[A-Z]+$", name.strip("_"))}
    words = re.findall(r"\w+", shown.replace(name, ""))
    assert not names & set(words), "the code's own names teach a user nothing"


class OurError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("train.beta1 is 2"), 1, "train: train.beta1 is 2"),
        (ConnectionError("no server answers"), 1, "train: no server answers"),
        (OSError(28, "No space left on device", "data/raw"), 1, "train: data/raw: No space left on device"),
        (OurError("a worker died"), 1, "train: a worker died"),
        (ValueError("no http://us:secret@mirror/x"), 1, "train: no http://mirror/x"),
        (OSError(2, "No such file", "ftp://us:secret@host/x"), 1, "train: ftp://host/x: No such file"),
        (KeyboardInterrupt(), 130, "train: interrupted; run it again"),
    ],
)
def test_exit_on_error_prints_one_line_and_ends_with_its_code(raised, code, line, capsys):
    with (
        pytest.raises(SystemExit) as ended,
        exit_on_error("train", OurError, interrupted="interrupted; run it again"),
    ):
        raise raised
    assert ended.value.code == code
    assert capsys.readouterr() == ("", f"{line}\n")


def test_exit_on_error_leaves_bugs_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_on_error("train", OurError):
        raise RuntimeError("a bug")


def test_exit_on_error_ends_without_a_word_when_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline.preset", "--list"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("obeys", [True, False])
def test_end_with_dvc_ends_a_process_whose_parent_was_killed(obeys, tmp_path):
    child = f"""
import os, signal, time
from pathlib import Path
from pipeline.common import cli
if not {obeys}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
cli.GRACE_S = 0.5
cli.end_with_dvc()
Path("written").write_text(str(os.getpid()))
Path("written").rename("pid")
time.sleep(60)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"DVC_STAGE": "train", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment) as process:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        orphan = psutil.Process(int((tmp_path / "pid").read_text()))
        process.kill()
    deadline = time.monotonic() + 10
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
