"""Checkpoints: written atomically, verified on load, without pickled objects. A run keeps the last k of them.

A run's folder has subfolders such as step_00000100/, each with tensors.safetensors (weights, Adam's moments),
state.json (the loop's TrainState, the settings) and SHA256SUMS. No random state is saved: loop.py derives it from
the seed, the step and the micro-batch. `replace_folder` writes a checkpoint, so a folder with the final name is
complete. Checksums are verified on load. If a checkpoint is damaged, the one before it is used.

Why not ray.train.Checkpoint with CheckpointConfig: Ray tracks the newest checkpoint, but not whether it is complete.
It saves only together with reported metrics, and keeps checkpoints under its own names, so that the files could not
be read without Ray. Why not torch.distributed.checkpoint: it is for weights that are sharded over ranks, and has no
checksums. Here every rank has all weights, and a checkpoint must be read back bit for bit.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import TransformerConfig
from model.transformer import Transformer
from pipeline.common.atomic_io import SUMS, read_sums, replace_folder, sha256_of, sums_text
from pipeline.common.checksums import verify, write_sums
from pipeline.common.settings import Train
from pipeline.common.storage import AnyPath, as_os_error, link_or_copy, local_copy, remove
from pipeline.data.batching import Position
from pipeline.training.loop import TrainState, end_of

FILES = ("tensors.safetensors", "state.json")
MOMENTS = ("exp_avg", "exp_avg_sq")


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or differs from what was written."""


class DiskFullError(OSError):
    """The disk is full: a retry cannot help before somebody frees some space."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. The names of `tensors` are "model.…", "adam.exp_avg.…" and "adam.exp_avg_sq.…"."""

    folder: AnyPath
    tensors: dict[str, Tensor]
    state: TrainState

    def restore(self, model: Transformer, optimizer: torch.optim.Adam) -> TrainState:
        """Load weights and moments into `model` and `optimizer`. Returns the state of training."""
        model.load_state_dict(_part(self.tensors, "model."))
        for name, p in model.named_parameters():
            moments = {m: self.tensors[f"adam.{m}.{name}"].to(p.device) for m in MOMENTS}
            step = torch.tensor(float(self.state.step), device=p.device)
            optimizer.state[p] = {"step": step, **moments}
        return self.state


def save(
    run_folder: AnyPath,
    model: Transformer,
    optimizer: torch.optim.Adam,
    state: TrainState,
    settings: dict[str, Any],
    keep: int,
    every: int = 1,
) -> AnyPath:
    """Write step_<n>, then delete old checkpoints.

    Keeps the newest `keep` checkpoints, this one included. Deletes earlier ones whose step is not a multiple of
    `every`: they are the last checkpoints of shorter runs that this run continues. Later ones are damaged, or
    training would have resumed from them. They are overwritten when training reaches their step. Any that are left
    are deleted when the last checkpoint of the run is written.

    Raises DiskFullError or OSError; in both cases the earlier checkpoints are kept.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        tensors |= {f"adam.{m}.{name}": optimizer.state[p][m] for m in MOMENTS}
    target = folder_of(run_folder, state.step)
    try:
        with replace_folder(target) as folder:
            _write(folder, tensors, state, settings)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = os.strerror(error.errno) if full else error.strerror or error  # type: ignore[arg-type]
        message = f"checkpoint of step {state.step} not written to {run_folder}: {reason}; earlier ones are kept"
        if full:
            raise DiskFullError(f"{message}: free some space and run again") from error
        raise OSError(message) from error
    found = folders(run_folder)
    earlier = [folder for folder in found if step_of(folder) < state.step]
    ends = [folder for folder in earlier if step_of(folder) % every]
    regular = [folder for folder in earlier if folder not in ends]
    old = regular[: max(0, len(regular) + 1 - keep)]
    later = [folder for folder in found if step_of(folder) > state.step] if state.finished else []
    for obsolete in (*ends, *old, *later):
        remove(obsolete)
    return target


def copy(source: AnyPath, target: AnyPath) -> None:
    """Copy a checkpoint atomically into another run's folder and verify it. On one disk, hard links are used.

    Raises DamagedCheckpointError, also if the checkpoint was deleted in the meantime, and OSError.
    """
    with _damage_named(source), replace_folder(target) as partial:
        _require_files(source, *FILES, SUMS)
        with as_os_error(source):
            for name in (*FILES, SUMS):
                link_or_copy(source / name, partial / name)
        for name in FILES:
            _verify(partial, name, source)


def _write(folder: Path, tensors: dict[str, Tensor], state: TrainState, settings: dict[str, Any]) -> None:
    path = folder / "tensors.safetensors"
    _save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    content = {"state": asdict(state), "settings": settings}
    (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
    sums = {name: sha256_of(folder / name) for name in FILES}
    (folder / SUMS).write_text(sums_text(sums), encoding="utf-8")


def folder_of(run_folder: AnyPath, step: int) -> AnyPath:
    return run_folder / f"step_{step:08d}"


def step_of(folder: AnyPath) -> int:
    return int(folder.name.removeprefix("step_"))


def folders(run_folder: AnyPath) -> list[AnyPath]:
    """The folders of a run's checkpoints, oldest first. Raises OSError when the store cannot be reached."""
    with as_os_error(run_folder):
        found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((path for path in found if not isinstance(path, Path) or path.is_dir()), key=step_of)


def load(folder: AnyPath) -> Checkpoint:
    """Load and verify a checkpoint.

    Raises DamagedCheckpointError, and OSError when the files cannot be read: they may be intact, and going back to an
    earlier checkpoint would lose work.
    """
    with _damage_named(folder), local_copy(folder) as local:
        for name in FILES:
            _verify(local, name, folder)
        return Checkpoint(folder, load_file(local / "tensors.safetensors"), _read_state(local))


def load_state(folder: AnyPath) -> TrainState:
    """Load and verify the state of a checkpoint, without its tensors. Raises the errors of `load`."""
    with _damage_named(folder), as_os_error(folder):
        _verify(folder, "state.json", folder)
        return _read_state(folder)


def finished_state(run_folder: AnyPath, settings: Train) -> TrainState | None:
    """The state of the newest checkpoint if training with these settings ends there and it is intact, else None.

    Reads only state.json, unless the checkpoint is the last of its run. Then it verifies the checksum of the tensors
    too, without loading them.
    """
    for folder in folders(run_folder)[-1:]:
        try:
            state = load_state(folder)
            if state.finished and state.step >= end_of(state, settings):
                with _damage_named(folder), as_os_error(folder):
                    _verify(folder, "tensors.safetensors", folder)
                return state
        except DamagedCheckpointError:
            pass  # `load_latest` will log it
    return None


def _read_state(folder: AnyPath) -> TrainState:
    content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = TrainState(**content["state"])
    state.position = Position(*state.position)
    return state


def _require_files(folder: AnyPath, *names: str) -> None:
    """On a disk, raise FileNotFoundError for anything but a file: a folder, a dangling link, a pipe, which blocks."""
    for name in names:
        path = folder / name
        if isinstance(path, Path) and not path.is_file():
            raise FileNotFoundError(f"{name} is missing or not a file")


def _verify(folder: AnyPath, name: str, shown: AnyPath) -> None:
    _require_files(folder, name, SUMS)
    if sha256_of(folder / name) != read_sums(folder)[name]:
        raise DamagedCheckpointError(f"{shown / name} is damaged: its checksum differs from {SUMS}")


@contextmanager
def _damage_named(folder: AnyPath) -> Iterator[None]:
    try:
        yield
    except DamagedCheckpointError:
        raise
    except (
        FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise DamagedCheckpointError(f"{folder} is damaged: {error}") from error


def load_latest(run_folder: AnyPath, warn: Callable[[str], None]) -> Checkpoint | None:
    """Load the newest intact checkpoint; None if there is none. `warn` gets a line for each damaged one."""
    for folder in reversed(folders(run_folder)):
        try:
            return load(folder)
        except DamagedCheckpointError as error:
            warn(f"{error}; going back to the checkpoint before it")
    return None


def average(run_folder: AnyPath, count: int, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], list[int]]:
    """The mean weights of the last `count` intact checkpoints (section 6.1), and their steps, latest first.

    `warn` gets a line for each damaged one. Raises ValueError if none is intact.
    """
    total: dict[str, Tensor] = {}
    steps: list[int] = []
    for folder in reversed(folders(run_folder)):
        if len(steps) == count:
            break
        try:
            checkpoint = load(folder)
        except DamagedCheckpointError as error:
            warn(f"{error}; left out of the average")
            continue
        for name, value in _part(checkpoint.tensors, "model.").items():
            total[name] = total[name] + value.double() if name in total else value.double()
        steps.append(checkpoint.state.step)
    if not steps:
        raise ValueError(f"{run_folder} has no intact checkpoint")
    return {name: (value / len(steps)).float() for name, value in total.items()}, steps


MODEL_FILES = ("weights.safetensors", "config.json")


def save_model(folder: Path, weights: dict[str, Tensor], config: TransformerConfig) -> None:
    """Write MODEL_FILES and their checksums. Raises OSError."""
    _save_tensors(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    write_sums(folder, MODEL_FILES)


def load_model(folder: Path) -> Transformer:
    """Verify and load a model written by `save_model`, in evaluation mode.

    Raises ValueError that names what is missing or damaged, before it allocates memory for the model.
    """
    verify(folder, MODEL_FILES, "train")
    try:
        config = TransformerConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        _check_tensors(folder / "weights.safetensors", config)
        model = Transformer(config)
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]  # torch lists every tensor, one per line
        again = "run the train stage again (dvc repro --force --single-item train)"
        raise ValueError(f"{folder} is damaged ({reason}): {again}") from error
    return model.eval()


def _check_tensors(path: Path, config: TransformerConfig) -> None:
    """Raise ValueError if the names, types or shapes in the file's header are not those of a model of this config."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
        stored = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
    if config.num_layers > len(stored):
        raise ValueError(f"config.json has {config.num_layers} layers, but {path.name} has {len(stored)} tensors")
    with torch.device("meta"):
        expected = {name: f"F32 {list(value.shape)}" for name, value in Transformer(config).state_dict().items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            found, wanted = stored.get(name, "missing"), expected.get(name, "missing")
            raise ValueError(f"{name} is {found} in {path.name}, but {wanted} according to config.json")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors. Turns safetensors' own error (for a full disk, for example) into OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else errno.EIO, str(error), str(path)) from error
