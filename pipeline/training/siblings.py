"""Runs that differ only in their end (siblings): a run starts from the checkpoints of another.

Siblings have the same trajectory (`run_key`) in the names of their folders. Training to step k and then to 2k gives
the same weights, bit for bit, as training to 2k at once: a checkpoint of the shorter run is also one of the longer
run, and `go_on` in loop.py removes what the end of the shorter run added. Each run has its own folder, so the shorter
run is kept, and both can train at the same time.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.common.atomic_io import write_json
from pipeline.common.settings import Train
from pipeline.common.storage import AnyPath, as_os_error, remove
from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpointError, folder_of, step_of
from pipeline.training.loop import TrainState, end_of

ORIGIN = "continues.json"


@dataclass(frozen=True)
class Origin:
    """The start of a run: step `step` of the run in `folder`, after a `share` in [0, 1] of that run's training."""

    folder: AnyPath
    step: int
    share: float

    @property
    def description(self) -> str:
        return f"{self.folder.name}, trained to step {self.step}"


def origin_of(run_folder: AnyPath) -> Origin | None:
    """The origin of the run in this folder; None if it started at step 0."""
    path = run_folder / ORIGIN
    if isinstance(path, Path) and not path.is_file():
        return None
    try:
        with as_os_error(path):
            content = json.loads(path.read_text(encoding="utf-8"))
        return Origin(run_folder.parent / content["run"], int(content["step"]), float(content["share"]))
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def continue_sibling(run_folder: AnyPath, settings: Train, log: Callable[[str], None]) -> Origin | None:
    """Copy into `run_folder` the newest checkpoint of a sibling from which training with these settings can continue.

    The earlier checkpoints that this run would have kept are copied first, so that a kill in between leaves a valid
    earlier start. Returns the origin, or None if the folder has checkpoints already or no sibling has a usable one.
    Raises OSError when the store cannot be reached or the disk is full.
    """
    if checkpoint.folders(run_folder):
        return None
    remove(run_folder / ORIGIN)
    for origin, steps in _origins(run_folder, settings, log):
        with _passing_over_damage(folder_of(origin.folder, origin.step), log):
            _bring(origin, steps, run_folder, settings, log)
            return origin
    remove(run_folder / ORIGIN)
    return None


def start_of(run_folder: AnyPath, settings: Train) -> tuple[AnyPath, TrainState] | None:
    """The folder and the state of the checkpoint from which training in this folder would continue.

    It is the newest intact one of this folder or, if the folder has none at all, the one that `continue_sibling`
    would copy. None if training would start at step 0. Reads only the state.json of checkpoints. Raises OSError when
    the store cannot be reached.
    """
    origins = (folder_of(origin.folder, origin.step) for origin, _ in _origins(run_folder, settings, lambda _: None))
    for folder in reversed(checkpoint.folders(run_folder) or list(islice(origins, 1))):
        with suppress(DamagedCheckpointError):
            return folder, checkpoint.load_state(folder)
    return None


def steps_left(run_folder: AnyPath, settings: Train) -> int:
    """The number of steps that are left to train in this folder: from `start_of` to max_steps or, if `patience` has
    already ended training, to that end."""
    start = start_of(run_folder, settings)
    return max(0, end_of(start[1], settings) - start[1].step) if start else settings.max_steps


def _origins(run_folder: AnyPath, settings: Train, log: Callable[[str], None]) -> Iterator[tuple[Origin, list[int]]]:
    """Yield the sibling checkpoints from which training with these settings can continue, newest first.

    Each comes with the steps of all checkpoints of its run.
    """
    found = {sibling: checkpoint.folders(sibling) for sibling in _siblings(run_folder)}
    newest_first = sorted(
        ((step_of(path), sibling) for sibling, paths in found.items() for path in paths),
        key=lambda candidate: (-candidate[0], candidate[1].name),
    )
    for step, sibling in newest_first:
        steps = [step_of(path) for path in found[sibling]]
        if not _has_what_is_averaged(steps, step, settings):
            continue
        with _passing_over_damage(folder_of(sibling, step), log):
            if _is_on_the_way(folder_of(sibling, step), settings):
                yield Origin(sibling, step, step / steps[-1]), steps


def all_of_trajectory(run_folder: AnyPath) -> AnyPath:
    """A pattern for the folders of this run and its siblings. If all are deleted, the run starts at step 0."""
    return run_folder.parent / f"*-{trajectory_of(run_folder)}-*"


def trajectory_of(run_folder: AnyPath) -> str:
    """The trajectory in a folder's name. Raises ValueError if the name is not that of a run."""
    key = re.search(r"-([0-9a-f]{12})-\d+(-p\d+)?$", run_folder.name)
    if key is None:
        raise ValueError(f"{run_folder} is not named after a run")
    return key[1]


def _siblings(run_folder: AnyPath) -> list[AnyPath]:
    """The folders of the other runs of this trajectory. The parts of their names before it may differ."""
    with as_os_error(run_folder):
        found: list[AnyPath] = list(run_folder.parent.glob(all_of_trajectory(run_folder).name))
    return [path for path in found if path.name != run_folder.name]


def _is_on_the_way(folder: AnyPath, settings: Train) -> bool:
    """Whether training with these settings passes this checkpoint, or ends at it like the run that wrote it."""
    state = checkpoint.load_state(folder)
    end = end_of(state, settings)
    return state.step < end or (state.step == end and state.finished)


def _has_what_is_averaged(steps: list[int], start: int, settings: Train) -> bool:
    """Whether a run that starts at `start` will have all checkpoints to average at max_steps.

    `steps` are the checkpoints of the run that it would start from. If that run is longer, it may have deleted some
    that are needed. If it is not longer, missing ones are accepted: its settings kept fewer, and averaging fewer
    (which `write_model` logs) is better than training again from step 0.
    """
    every, last = settings.checkpoint_every, settings.max_steps
    averaged = sorted({*range(every, last + 1, every), last})[-settings.average_checkpoints :]
    return steps[-1] <= last or all(step in steps for step in averaged if step < start)


def _bring(
    origin: Origin, steps: list[int], run_folder: AnyPath, settings: Train, log: Callable[[str], None]
) -> None:
    regular = [step for step in steps if step < origin.step and step % settings.checkpoint_every == 0]
    content = {"run": origin.folder.name, "step": origin.step, "share": origin.share}
    write_json(run_folder / ORIGIN, content)
    for step in regular[max(0, len(regular) + 1 - settings.keep_checkpoints) :]:
        with _passing_over_damage(folder_of(origin.folder, step), log):
            checkpoint.copy(folder_of(origin.folder, step), folder_of(run_folder, step))
    checkpoint.copy(folder_of(origin.folder, origin.step), folder_of(run_folder, origin.step))


@contextmanager
def _passing_over_damage(folder: AnyPath, log: Callable[[str], None]) -> Iterator[None]:
    """Log a damaged checkpoint. No line if its folder is gone: a run in training may have deleted it."""
    try:
        yield
    except DamagedCheckpointError as error:
        with as_os_error(folder):
            if folder.exists():
                log(f"{error}; not used")
