"""A run that continues another is bit for bit what it would have been without interruption."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from upath import UPath

from pipeline.common.settings import Settings, Train
from pipeline.common.storage import AnyPath
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState
from pipeline.training.siblings import ORIGIN, continue_sibling, origin_of, steps_left
from pipeline.training.trainer import train_rank
from tests.factories import settings, write_corpus


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """Matrices this small gain nothing from a second thread, and are much slower with it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "encoded"
    write_corpus(folder)
    return folder


class Stopped(Exception):  # noqa: N818, not an error
    """Raised in a run to stop it as a kill would."""


def folder_of(parent: AnyPath, train: Train, trajectory: str = "0123456789ab") -> AnyPath:
    """Return a folder as `run_folder` names it. test_run.py tests the trajectory in its name."""
    patience = f"-p{train.patience}" if train.patience else ""
    return parent / f"grammar-mini-1-{trajectory}-{train.max_steps}{patience}"


def train(
    data: Path,
    parent: AnyPath,
    changed: Settings,
    *,
    stop: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> TrainState:
    """Continue a sibling, if there is one, and train to the end, as the train stage does."""

    def progress(state: TrainState, loss: float) -> None:
        assert math.isfinite(loss)
        if state.step == stop:
            raise Stopped

    folder = folder_of(parent, changed.train)
    continue_sibling(folder, changed.train, log)
    return train_rank(
        changed, data, folder, rank=0, num_ranks=1, device=torch.device("cpu"), report=report, progress=progress,
        log=log,
    )  # fmt: skip


def without_time(points: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in points]


def result(folder: AnyPath, average: int) -> dict[str, Any]:
    """Return all that must be equal: weights, moments, state, the steps that are averaged, and the average."""
    last = checkpoint.folders(folder)[-1]
    state = asdict(checkpoint.load_state(last))
    del state["seconds"], state["since_seconds"]
    state["training_curve"] = without_time(state["training_curve"])
    with checkpoint.local_copy(last) as local:
        tensors = load_file(local / "tensors.safetensors")
    weights, steps = checkpoint.average(folder, average, pytest.fail)
    named = {**tensors, **{f"average.{name}": value for name, value in weights.items()}}
    kept = [path.name for path in checkpoint.folders(folder)]
    return {"state": state, "averaged": steps, "kept": kept, "tensors": named}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    tensors = ours.pop("tensors"), theirs.pop("tensors")
    assert ours == theirs
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def with_ends(**values: Any) -> Settings:
    """Return settings that validate every 4 steps, save every 3 and log every 2."""
    return settings(train={"log_every": 2, "keep_checkpoints": 3, "average_checkpoints": 3, **values})


ENDS = {
    "on all grids, doubled": ((12, 24), {}),
    "off all grids, doubled": ((5, 10), {}),
    "off all grids, one more": ((7, 8), {}),
    "to the next checkpoint": ((8, 9), {}),
    "one before and one after a checkpoint": ((11, 13), {}),
    "before the first point of anything": ((1, 2, 3, 4), {}),
    "thrice, each off the grid": ((5, 7, 11, 20), {}),
    "checkpoints only at the end": ((5, 10), {"checkpoint_every": 1000}),
    "a log beyond the end": ((5, 10), {"log_every": 7}),
    "none but the last is kept": ((5, 10), {"keep_checkpoints": 1, "average_checkpoints": 1}),
}


@pytest.mark.parametrize(
    ("ends", "values", "num_threads"),
    [*((*case, 1) for case in ENDS.values()), (*ENDS["thrice, each off the grid"], 2)],
    ids=[*ENDS, "thrice, by two threads"],
)
def test_continue_sibling_in_parts_equals_all_at_once_bit_for_bit(data, tmp_path, ends, values, num_threads):
    torch.set_num_threads(num_threads)
    whole = with_ends(max_steps=ends[-1], **values)
    reported: dict[str, list[Any]] = {"once": [], "parts": []}

    def report_to(name: str) -> Callable[[dict[str, float], int], None]:
        return lambda metrics, step: reported[name].append({"step": step, **metrics})

    train(data, tmp_path / "once", whole, report=report_to("once"))
    for end in ends:
        reported["parts"].clear()
        messages: list[str] = []
        part = with_ends(max_steps=end, **values)
        train(data, tmp_path / "parts", part, log=messages.append, report=report_to("parts"))
    assert messages == [f"continuing from the checkpoint of step {ends[-2]}"]
    average = whole.train.average_checkpoints
    ours, theirs = (result(folder_of(tmp_path / name, whole.train), average) for name in ("parts", "once"))
    assert_same(ours, theirs)
    points = [sorted(without_time(reported[name]), key=lambda p: (p["step"], "valid_loss" in p)) for name in reported]
    assert points[0] == points[1]  # in MLflow, the longer run has the complete curve and no other point


def test_continue_sibling_leaves_the_shorter_run_as_it_is(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=5))
    short = folder_of(tmp_path, with_ends(max_steps=5).train)
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    longer = with_ends(max_steps=10)
    folder = folder_of(tmp_path, longer.train)
    origin = continue_sibling(folder, longer.train, pytest.fail)
    assert origin is not None
    assert origin.description == f"{short.name}, trained to step 5"
    assert origin.share == 1.0
    assert origin_of(folder) == origin
    assert origin_of(short) is None
    train(data, tmp_path, longer)
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before
    assert continue_sibling(folder, longer.train, pytest.fail) is None  # it has started already
    assert origin_of(folder) == origin


def test_continue_sibling_works_in_a_store(data, tmp_path):
    store = UPath(f"memory://siblings/{tmp_path.name}")
    whole = with_ends(max_steps=10)
    train(data, store / "once", whole)
    for end in (5, 10):
        train(data, store / "parts", with_ends(max_steps=end))
    assert origin_of(folder_of(store / "parts", whole.train)).step == 5  # type: ignore[union-attr]
    assert_same(*(result(folder_of(store / name, whole.train), 3) for name in ("parts", "once")))


def losses(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float]) -> None:
    """Make validation return these losses by step, whatever the model. Patience depends on nothing else."""
    from pipeline.training import trainer

    now: list[int] = []
    monkeypatch.setattr(trainer, "cross_entropy", lambda *_: (by_step[now[-1]], 1))
    rate_of_step = trainer.rate_of_step
    monkeypatch.setattr(
        trainer, "rate_of_step", lambda s: lambda step: now.append(step) or rate_of_step(s)(step)
    )  # fmt: skip


VALIDATION = {4: 3.0, 5: 9.9, 8: 2.0, 10: 9.9, 12: 2.5, 16: 2.1, 18: 1.0, 20: 1.5, 24: 1.6, 26: 9.9}
"""Losses by step. Patience 2 ends at 16, patience 3 never. 5, 10, 18 and 26 are ends off the grid."""


@pytest.mark.parametrize(
    ("parts", "begins_at"),
    [
        ([(26, 2), (26, 3)], 16),  # ended by patience 2, continues with 3
        ([(26, 2), (26, 0)], 16),
        ([(10, 3), (26, 2)], 10),  # patience has not run out yet
        ([(18, 2), (26, 2)], 16),  # with the same patience, a longer run has the same end
        ([(18, 0), (26, 3)], 18),
        ([(18, 0), (26, 2)], 15),  # 18 is beyond the end at 16: an earlier checkpoint is used
        ([(26, 0), (26, 2)], 0),  # as before, but the earlier checkpoints are deleted
        ([(26, 3), (26, 0)], 26),  # patience has not ended it
        ([(5, 1), (10, 0), (26, 3)], 10),
    ],
)
def test_continue_sibling_with_another_patience_ends_where_it_would_have(
    data, tmp_path, monkeypatch, parts, begins_at
):
    losses(monkeypatch, VALIDATION)
    made = [with_ends(max_steps=end, patience=patience) for end, patience in parts]
    whole = made[-1]
    train(data, tmp_path / "once", whole)
    for part in made:
        train(data, tmp_path / "parts", part)
    folder = folder_of(tmp_path / "parts", whole.train)
    origin = origin_of(folder)
    assert (origin.step if origin else 0) == begins_at
    assert_same(*(result(folder_of(tmp_path / name, whole.train), 3) for name in ("parts", "once")))
    assert checkpoint.finished_state(folder, whole.train) is not None


def test_continue_sibling_of_a_finished_run_with_the_same_end_trains_no_step(data, tmp_path):
    """max_steps ended the run; another patience gives another key."""
    train(data, tmp_path, with_ends(max_steps=9))
    patient = with_ends(max_steps=9, patience=7)
    continue_sibling(folder_of(tmp_path, patient.train), patient.train, pytest.fail)
    assert checkpoint.finished_state(folder_of(tmp_path, patient.train), patient.train) is not None


def test_continue_sibling_starts_over_if_a_longer_run_has_deleted_what_is_averaged(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=24))  # keeps the checkpoints 18, 21 and 24
    for end, begins_at in ((20, None), (23, 21), (30, 24)):
        shorter = with_ends(max_steps=end, average_checkpoints=2 if end == 23 else 3)
        origin = continue_sibling(folder_of(tmp_path, shorter.train), shorter.train, pytest.fail)
        assert (origin.step if origin else None) == begins_at
        assert origin is None or origin.share == (1.0 if end == 30 else 21 / 24)


def test_continue_sibling_continues_a_run_that_kept_fewer_than_are_averaged(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=9, keep_checkpoints=1, average_checkpoints=1))
    longer = with_ends(max_steps=10)
    assert continue_sibling(folder_of(tmp_path, longer.train), longer.train, pytest.fail).step == 9  # type: ignore[union-attr]


def test_continue_sibling_takes_the_newest_of_several_and_none_of_another_trajectory(data, tmp_path):
    for end in (5, 9):
        train(data, tmp_path, with_ends(max_steps=end))
    short = folder_of(tmp_path, with_ends(max_steps=9).train)
    for other in ("0123456789ac", "123456789ab"):
        stranger = folder_of(tmp_path, with_ends(max_steps=12).train, other)
        shutil.copytree(short, stranger)
    renamed = short.with_name("grammar-mini with 9 steps-1-0123456789ab-9")
    short.rename(renamed)
    (tmp_path / "grammar-mini-1-0123456789ab-11").mkdir()  # a run that has not started
    longer = with_ends(max_steps=20)
    origin = continue_sibling(folder_of(tmp_path, longer.train), longer.train, pytest.fail)
    assert origin is not None
    assert (origin.folder, origin.step) == (renamed, 9)


def test_steps_left_are_those_behind_the_newest_checkpoint_or_a_siblings(data, tmp_path):
    short, long = with_ends(max_steps=5).train, with_ends(max_steps=12).train
    ours, longer = folder_of(tmp_path, short), folder_of(tmp_path, long)
    assert steps_left(longer, long) == 12
    train(data, tmp_path, with_ends(max_steps=5))
    assert (steps_left(ours, short), steps_left(longer, long)) == (0, 7)
    assert not longer.exists()
    (ours / "step_00000005/state.json").write_text("{}")
    assert (steps_left(ours, short), steps_left(longer, long)) == (2, 9)


def test_steps_left_are_none_where_patience_has_ended_training(data, tmp_path, monkeypatch):
    losses(monkeypatch, VALIDATION)
    patient = with_ends(max_steps=26, patience=2)
    assert train(data, tmp_path, patient).step == 16
    assert steps_left(folder_of(tmp_path, patient.train), patient.train) == 0


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_continue_sibling_passes_over_a_damaged_checkpoint_and_ends_the_same(data, tmp_path, name):
    whole = with_ends(max_steps=10)
    train(data, tmp_path / "once", whole)
    train(data, tmp_path / "parts", with_ends(max_steps=5))
    path = folder_of(tmp_path / "parts", with_ends(max_steps=5).train) / "step_00000005" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    messages: list[str] = []
    train(data, tmp_path / "parts", whole, log=messages.append)
    assert len(messages) == 2
    assert f"{name} is damaged" in messages[0]
    assert messages[0].endswith("; not used")
    assert messages[1] == "continuing from the checkpoint of step 3"
    assert_same(*(result(folder_of(tmp_path / n, whole.train), 3) for n in ("parts", "once")))


def test_continue_sibling_without_any_whole_checkpoint_begins_at_step_0(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=2))
    (folder_of(tmp_path, with_ends(max_steps=2).train) / "step_00000002" / "SHA256SUMS").unlink()
    longer = with_ends(max_steps=4)
    folder = folder_of(tmp_path, longer.train)
    assert continue_sibling(folder, longer.train, lambda line: None) is None
    assert origin_of(folder) is None
    assert checkpoint.folders(folder) == []


def test_continue_sibling_passes_over_what_its_own_training_deletes_meanwhile(data, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        train(data, tmp_path, with_ends(max_steps=1000), stop=11)  # has the checkpoints 3, 6 and 9
    copy = checkpoint.copy

    def late(source: AnyPath, target: AnyPath) -> None:
        shutil.rmtree(source.parent / "step_00000003", ignore_errors=True)
        copy(source, target)

    monkeypatch.setattr(checkpoint, "copy", late)
    other = with_ends(max_steps=30)
    folder = folder_of(tmp_path, other.train)
    origin = continue_sibling(folder, other.train, pytest.fail)
    assert origin is not None
    assert origin.step == 9
    assert [path.name[-1] for path in checkpoint.folders(folder)] == ["6", "9"]


def test_continue_sibling_killed_while_it_copies_checkpoints_ends_the_same(data, tmp_path, monkeypatch):
    whole = with_ends(max_steps=20)
    train(data, tmp_path / "once", whole)
    train(data, tmp_path / "parts", with_ends(max_steps=10))
    copy, left = checkpoint.copy, [2]

    def killed(source: AnyPath, target: AnyPath) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "copy", killed)
        with pytest.raises(Stopped):
            train(data, tmp_path / "parts", whole)
    messages: list[str] = []
    train(data, tmp_path / "parts", whole, log=messages.append)
    assert messages == ["continuing from the checkpoint of step 9"]
    assert_same(*(result(folder_of(tmp_path / name, whole.train), 3) for name in ("parts", "once")))


def test_continue_sibling_killed_afterwards_resumes_and_ends_the_same(data, tmp_path):
    whole = with_ends(max_steps=20)
    train(data, tmp_path / "once", whole)
    train(data, tmp_path / "parts", with_ends(max_steps=10))
    for stop in (11, 14):
        with pytest.raises(Stopped):
            train(data, tmp_path / "parts", whole, stop=stop)
    train(data, tmp_path / "parts", whole)
    assert_same(*(result(folder_of(tmp_path / name, whole.train), 3) for name in ("parts", "once")))


def test_continue_sibling_with_another_log_every_uses_it_from_then_on(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=8, log_every=3))
    state = train(data, tmp_path, with_ends(max_steps=16, log_every=5))
    assert [point["step"] for point in state.training_curve] == [3, 6, 10, 15, 16]


@pytest.mark.parametrize("content", ["", "[]", '{"run": "another"}'])
def test_origin_of_a_damaged_record_is_none(tmp_path, content):
    (tmp_path / ORIGIN).write_text(content)
    assert origin_of(tmp_path) is None


def test_continue_sibling_replaces_a_record_that_is_no_file(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=5))
    longer = with_ends(max_steps=10)
    folder = folder_of(tmp_path, longer.train)
    (folder / ORIGIN).mkdir(parents=True)
    assert origin_of(folder) is None
    origin = continue_sibling(folder, longer.train, pytest.fail)
    assert origin is not None
    assert origin_of(folder) == origin


def test_continue_sibling_writes_what_it_continues(data, tmp_path):
    train(data, tmp_path, with_ends(max_steps=9))
    longer = with_ends(max_steps=10)
    folder = folder_of(tmp_path, longer.train)
    continue_sibling(folder, longer.train, pytest.fail)
    assert json.loads((folder / ORIGIN).read_text()) == {
        "run": "grammar-mini-1-0123456789ab-9", "step": 9, "share": 1.0,
    }  # fmt: skip
