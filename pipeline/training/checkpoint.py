"""Checkpoints: complete, verified, safe to load (no pickled objects), the last k of them.

A run's folder holds step_00000100/ and so on, each with tensors.safetensors (weights, Adam's moments), state.json
(the loop's TrainState, the settings) and SHA256SUMS. There is no random state: loop.py derives it from seed and step.
A checkpoint is written by `replace_folder`: one that has its name is whole. Checksums are verified on load, and a
damaged one is passed over for the one before it.

Not ray.train.Checkpoint with CheckpointConfig: Ray knows which checkpoint is the newest, not whether it is whole; it
saves when metrics are reported, and keeps checkpoints under names and in a store of its own, so that the same files
could not be read without it. Not torch.distributed.checkpoint: it is for weights that are sharded over ranks, and
has no checksums. Here every rank holds all weights, and what is read back has to be the bits that were written.
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
    """A checkpoint that is not what was written."""


class DiskFullError(OSError):
    """There is no room for a checkpoint, nor will there be before somebody makes some."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: `tensors` by name, "model.…" and "adam.exp_avg.…"."""

    folder: AnyPath
    tensors: dict[str, Tensor]
    state: TrainState

    def restore(self, model: Transformer, optimizer: torch.optim.Adam) -> TrainState:
        """Put weights and moments back; returns where training was."""
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
    """Write step_<n>, then delete all but the last `keep` up to it; and one from which training has gone on although
    its step is no multiple of `every`, for it is the end of a shorter run.

    Later ones, which are damaged (or training would have gone on from them), are replaced at their step; the last
    checkpoint of a run removes them. Raises DiskFullError or OSError; earlier checkpoints are kept.
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
    """Bring a checkpoint into another run's folder, verified, whole or not at all; on one disk by hard links. Raises
    DamagedCheckpointError, also for one that was deleted meanwhile, and OSError."""
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
    """The run's checkpoints, oldest first. Raises OSError when their store cannot be reached."""
    with as_os_error(run_folder):
        found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((path for path in found if not isinstance(path, Path) or path.is_dir()), key=step_of)


def load(folder: AnyPath) -> Checkpoint:
    """Read and verify one. Raises DamagedCheckpointError; and OSError when it cannot be read, for it may well be
    whole, and to go back behind it would lose work."""
    with _damage_named(folder), local_copy(folder) as local:
        for name in FILES:
            _verify(local, name, folder)
        return Checkpoint(folder, load_file(local / "tensors.safetensors"), _read_state(local))


def load_state(folder: AnyPath) -> TrainState:
    """The state of one, verified, without its tensors. Raises DamagedCheckpointError and OSError as `load`."""
    with _damage_named(folder), as_os_error(folder):
        _verify(folder, "state.json", folder)
        return _read_state(folder)


def finished_state(run_folder: AnyPath, settings: Train) -> TrainState | None:
    """The state of the newest checkpoint, if training by these settings ends with it and it is whole. None otherwise.

    Of a checkpoint that is not the last of its run, only state.json is read; tensors are read but never loaded, for
    their checksum.
    """
    for folder in folders(run_folder)[-1:]:
        try:
            state = load_state(folder)
            if state.finished and state.step >= end_of(state, settings):
                with _damage_named(folder), as_os_error(folder):
                    _verify(folder, "tensors.safetensors", folder)
                return state
        except DamagedCheckpointError:
            pass  # `load_latest`, which passes it over, names it
    return None


def _read_state(folder: AnyPath) -> TrainState:
    content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = TrainState(**content["state"])
    state.position = Position(*state.position)
    return state


def _require_files(folder: AnyPath, *names: str) -> None:
    """Refuse on a disk what would be another error, or be waited for: folders, links to nowhere, pipes."""
    for name in names:
        path = folder / name
        if isinstance(path, Path) and not path.is_file():
            raise FileNotFoundError(f"{name} is missing, or no file")


def _verify(folder: AnyPath, name: str, shown: AnyPath) -> None:
    _require_files(folder, name, SUMS)
    if sha256_of(folder / name) != read_sums(folder)[name]:
        raise DamagedCheckpointError(f"{shown / name} is damaged: its checksum is not the one in {SUMS}")


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
    """The newest whole one, or None; each damaged one that is passed over is named to `warn`."""
    for folder in reversed(folders(run_folder)):
        try:
            return load(folder)
        except DamagedCheckpointError as error:
            warn(f"{error}; going back to the checkpoint before it")
    return None


def average(run_folder: AnyPath, count: int, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], list[int]]:
    """The mean of the weights of the last `count` whole checkpoints (section 6.1), and their steps."""
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
        raise ValueError(f"{run_folder} holds no whole checkpoint")
    return {name: (value / len(steps)).float() for name, value in total.items()}, steps


MODEL_FILES = ("weights.safetensors", "config.json")


def save_model(folder: Path, weights: dict[str, Tensor], config: TransformerConfig) -> None:
    """Write MODEL_FILES and their checksums. Raises OSError."""
    _save_tensors(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    write_sums(folder, MODEL_FILES)


def load_model(folder: Path) -> Transformer:
    """The model of `save_model`, verified, in evaluation mode. Raises ValueError that names what is missing or
    damaged, before it takes memory for a model."""
    verify(folder, MODEL_FILES, "train")
    try:
        config = TransformerConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        _check_tensors(folder / "weights.safetensors", config)
        model = Transformer(config)
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]  # torch names every tensor, each on a line
        again = "run the train stage again (dvc repro --force --single-item train)"
        raise ValueError(f"{folder} is damaged ({reason}): {again}") from error
    return model.eval()


def _check_tensors(path: Path, config: TransformerConfig) -> None:
    """Raise ValueError if the file's header has other names, types or shapes than a model of these sizes."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        stored = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
    if config.num_layers > len(stored):
        raise ValueError(f"config.json has {config.num_layers} layers, {path.name} {len(stored)} tensors")
    with torch.device("meta"):
        expected = {name: f"F32 {list(value.shape)}" for name, value in Transformer(config).state_dict().items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise ValueError(f"{name} is {stored.get(name)} in {path.name}, {expected.get(name)} by config.json")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' own error, of a full disk for example, is no OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else errno.EIO, str(error), str(path)) from error
