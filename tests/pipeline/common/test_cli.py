"""What all commands have in common: --help, the error line, the exit code."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.common.cli import GRACE_S, exit_on_error, interruptible

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
def test_help_has_purpose_example_and_files_in_the_users_words(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["anything", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    shown = capsys.readouterr().out
    usage, purpose, rest = shown.split("\n\n", maxsplit=2)
    assert usage.startswith(f"usage: python -m {name} ")
    assert re.fullmatch(r"[A-Z].{,78}\.", purpose), "the purpose must be a sentence that fits one line"
    assert f"python -m {name}" in rest.split("\n\n")[0], "--help must have an example"
    assert re.search(r"\b(reads|writes|gets)\b", rest, re.IGNORECASE), "--help must name the files"
    assert "Exit code: 0 if done, 1 after an error" in rest
    names = {name for name in vars(module) if re.search("_|[a-z][A-Z]|^[A-Z]+$", name.strip("_"))}
    words = re.findall(r"\w+", shown.replace(name, ""))
    assert not names & set(words), "names of the code do not help a user"


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


def test_exit_on_error_ends_silently_when_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline.preset", "--list"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@contextmanager
def slow_command(folder, module, code, **environment):
    """Start a real command whose import of `module` runs `code` instead. Yields the process once `code` runs.

    `code` ends by itself after a minute.
    """
    (folder / f"{module}.py").write_text(f"open('begun', 'w').close()\n{code}")
    variables = os.environ | {"PYTHONPATH": f"{folder}:{REPOSITORY}"} | environment
    command = [sys.executable, "-m", "pipeline.evaluate"]
    with subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "begun").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        yield process
        process.kill()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_command_stopped_while_it_imports_ends_with_one_line(signum, code, tmp_path):
    with slow_command(tmp_path, "torch", "import time; time.sleep(60)") as process:
        process.send_signal(signum)
        assert process.communicate(timeout=3)[1] == "evaluate: interrupted\n"
    assert process.returncode == code


REPLACED = """
import time
from pipeline.common.cli import exit_on_error
with exit_on_error("evaluate"):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # as Ray does when interrupted in C++
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_command_ends_with_the_code_of_the_signal_though_the_exception_changes(signum, code, tmp_path):
    with slow_command(tmp_path, "torch", REPLACED) as process:
        process.send_signal(signum)
        assert process.communicate(timeout=3)[1] == "evaluate: interrupted\n"
    assert process.returncode == code


SWALLOWED = """
import time
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize("again", [True, False])
def test_command_that_ignores_a_signal_is_killed_after_a_grace_period(again, tmp_path):
    with slow_command(tmp_path, "torch", SWALLOWED) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if again:  # an impatient user
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[1] == "evaluate: interrupted\n"
        assert (time.monotonic() - started < GRACE_S) == again
    assert process.returncode == 143


IN_C = """
import ctypes
from pipeline.common.cli import exit_on_error, interruptible
with exit_on_error("evaluate"):
    interruptible(lambda: ctypes.CDLL(None).sleep(60))
"""


def test_command_stopped_in_a_long_call_of_c_ends_at_once(tmp_path):
    with slow_command(tmp_path, "torch", IN_C) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=3)[1] == "evaluate: interrupted\n"
    assert process.returncode == 143


def test_interruptible_passes_on_results_and_errors():
    assert interruptible(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)


def test_command_started_by_nohup_outlives_its_terminal(tmp_path):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = (
        "import sys; sys.argv = ['-m']; import pipeline, signal; signal.raise_signal(signal.SIGHUP); print('on')"
    )
    options = {"cwd": REPOSITORY, "preexec_fn": ignore, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", command], **options).stdout == "on\n"


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", SWALLOWED])
@pytest.mark.parametrize("shell", ["", "/bin/sh", "/bin/bash"])
def test_stage_ends_when_dvc_was_killed_at_any_moment(shell, code, tmp_path):
    (tmp_path / "torch.py").write_text(f"import os; open(f'begun-{{os.getpid()}}', 'w').close()\n{code}")
    command = [sys.executable, "-m", "pipeline.evaluate"]
    if shell:  # as DVC runs it; dash waits for its only command, bash replaces itself by it
        command = [shell, "-c", " ".join(command)]
    parent = f"import subprocess; subprocess.run({command})"
    variables = os.environ | {"DVC_STAGE": "evaluate", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=variables) as process:
        while not (begun := list(tmp_path.glob("begun-*"))):
            time.sleep(0.02)
        process.kill()
    stage = psutil.Process(int(begun[0].name.partition("-")[2]))
    deadline = time.monotonic() + 30
    while stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
