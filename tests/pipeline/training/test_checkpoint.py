import hashlib
import json
import math
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from upath import UPath

from model.config import TransformerConfig
from model.transformer import Transformer
from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpointError
from pipeline.training.loop import TrainState, adam
from tests.factories import train_settings, update_sums
from tests.support.damage import DAMAGES

CONFIG = TransformerConfig(
    vocab_size=23, num_layers=1, d_model=14, d_ff=17, num_heads=3, d_k=5, d_v=7,
    dropout=0.1, positions="learned", norm="post", max_length=41,
)  # fmt: skip
SETTINGS = {"seed": 7, "train": {"eps": 1e-9}}
TRAIN = train_settings(max_steps=7)
COPIED = (*checkpoint.FILES, "SHA256SUMS")


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """A model this small gains nothing from a second thread."""
    torch.set_num_threads(1)


def trained(seed: int) -> tuple[Transformer, torch.optim.Adam]:
    """Return a model and its optimizer after one step along a random gradient."""
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, keep: int = 100) -> Path:
    """Write a checkpoint whose weights depend on its step."""
    return checkpoint.save(folder, *trained(step), TrainState(step=step), SETTINGS, keep)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.folders(folder)]


def test_load_returns_every_field_weight_and_moment_that_was_saved(tmp_path):
    state = TrainState(
        step=13,
        position=(3, 5),
        tokens=10**12 + 1,
        seconds=math.pi,
        finished=True,
        since_loss=5.5,
        since_tokens=17,
        since_seconds=0.5,
        training_curve=[{"step": 7, "train_loss": 1 / 3}],
        validation_curve=[{"step": 11, "valid_loss": 2 / 3}],
    )
    fresh = TrainState()
    assert all(value != getattr(fresh, name) for name, value in vars(state).items()), "a field has its default"
    model, optimizer = trained(1)
    folder = checkpoint.save(tmp_path, model, optimizer, state, SETTINGS, keep=1)

    other, other_optimizer = Transformer(CONFIG), None
    other_optimizer = adam(other, 0.9, 0.98, 1e-9)
    found = checkpoint.load(folder)
    assert found.restore(other, other_optimizer) == state
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[ours][moment], other_optimizer.state[theirs][moment])
        assert other_optimizer.state[theirs]["step"] == 13
    assert json.loads((folder / "state.json").read_text())["settings"] == SETTINGS


def test_load_returns_a_state_without_validation(tmp_path):
    assert checkpoint.load(save(tmp_path, 3)).state == TrainState(step=3)


def test_save_keeps_the_last_k(tmp_path):
    for step in (3, 5, 7, 11, 13):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [7, 11, 13]


def test_save_deletes_the_end_of_a_shorter_run_and_does_not_count_it(tmp_path):
    def save_every_three(step: int) -> None:
        checkpoint.save(tmp_path, *trained(step), TrainState(step=step), SETTINGS, keep=3, every=3)

    for step, kept in ((3, [3]), (6, [3, 6]), (7, [3, 6, 7]), (8, [3, 6, 8]), (9, [3, 6, 9]), (12, [6, 9, 12])):
        save_every_three(step)
        assert steps(tmp_path) == kept


def test_copy_on_a_disk_is_by_hard_links_and_outlives_its_source(tmp_path):
    source, target = save(tmp_path / "one", 7), checkpoint.folder_of(tmp_path / "other", 7)
    checkpoint.copy(source, target)
    for name in COPIED:
        assert (target / name).samefile(source / name)
    shutil.rmtree(source)
    assert checkpoint.load(target).state.step == 7
    assert files(tmp_path / "other") == {Path("step_00000007"), *(Path("step_00000007") / n for n in COPIED)}


def test_copy_without_hard_links_copies_the_bytes(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    source, target = save(tmp_path / "one", 7), checkpoint.folder_of(tmp_path / "other", 7)
    checkpoint.copy(source, target)
    assert not (target / "state.json").samefile(source / "state.json")
    assert checkpoint.load(target).state == checkpoint.load(source).state


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("change", ["flipped", "missing"])
def test_copy_of_a_damaged_checkpoint_leaves_nothing(tmp_path, name, change):
    for run_folder in (tmp_path, UPath(f"memory://copied/{tmp_path.name}")):
        path = save(run_folder / "one", 7) / name
        content = path.read_bytes()
        path.unlink()
        if change == "flipped":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(DamagedCheckpointError):
            checkpoint.copy(path.parent, checkpoint.folder_of(run_folder / "other", 7))
        assert not checkpoint.folders(run_folder / "other")


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("what", ["a folder", "a link to itself", "a pipe"])
def test_copy_of_what_is_no_file_leaves_nothing(tmp_path, name, what):
    path = save(tmp_path / "one", 7) / name
    DAMAGES[what](path)
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing or not a file"):
        checkpoint.copy(path.parent, checkpoint.folder_of(tmp_path / "other", 7))
    assert not checkpoint.folders(tmp_path / "other")


def test_load_latest_of_a_folder_without_checkpoints_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "none", pytest.fail) is None


def flip_a_byte(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-101] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "tensors.safetensors", 1009)


def change_state(change: Callable[[dict[str, Any]], Any], sum_fits: bool) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path, sums = folder / "state.json", folder / "SHA256SUMS"
        content, before = json.loads(path.read_text()), sha256(path)
        change(content)
        path.write_text(json.dumps(content))
        if sum_fits:
            sums.write_text(sums.read_text().replace(before, sha256(path)))

    return damage


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").write_bytes(b"something else")
    update_sums(folder)


def become(name: str, what: str) -> Callable[[Path], None]:
    return lambda folder: DAMAGES[what](folder / name)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip_a_byte,
    "cut off": truncate,
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: os.truncate(folder / "state.json", 53),
    "a state that is no object": lambda folder: (folder / "state.json").write_text("[]"),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "a checksum missing": lambda folder: (folder / "SHA256SUMS").write_text(""),
    "another number in the state": change_state(lambda content: content["state"].update(tokens=5), sum_fits=False),
    "an unknown field": change_state(lambda content: content["state"].update(code="import os"), sum_fits=True),
    "sums of what is no safetensors": replace_tensors,
    "a state nested too deep": lambda folder: (
        (folder / "state.json").write_text("[" * 100_000),
        update_sums(folder),
    ),
    **{
        f"{name} becomes {what}": become(name, what)
        for name in COPIED
        for what in ("a folder", "a link to itself", "a pipe")
    },
    "no position": change_state(lambda content: content["state"].update(position=[]), sum_fits=True),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_load_latest_passes_over_a_damaged_checkpoint_and_names_it(tmp_path, damage):
    save(tmp_path, 5)
    damage(save(tmp_path, 7))
    with pytest.raises(DamagedCheckpointError, match=re.escape(f"{tmp_path / 'step_00000007'}") + ".* is damaged: "):
        checkpoint.load(tmp_path / "step_00000007")
    warnings: list[str] = []
    found = checkpoint.load_latest(tmp_path, warnings.append)
    assert found is not None
    assert found.state.step == 5
    assert len(warnings) == 1
    assert "step_00000007" in warnings[0]
    assert warnings[0].endswith("; going back to the checkpoint before it")
    assert checkpoint.finished_state(tmp_path, TRAIN) is None
    assert checkpoint.load(save(tmp_path, 7)).state.step == 7


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_bytes(b"x"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "an empty folder": Path.mkdir,
    "a folder in a folder": lambda path: (path / path.name).mkdir(parents=True),
}


@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=list(IN_THE_WAY))
def test_load_latest_passes_over_and_save_replaces_what_only_has_a_checkpoints_name(tmp_path, make):
    save(tmp_path, 5)
    make(tmp_path / "step_99999999")
    make(tmp_path / "step_00000007")
    found = checkpoint.load_latest(tmp_path, lambda line: None)
    assert found is not None
    assert found.state.step == 5
    assert checkpoint.average(tmp_path, 2, lambda line: None)[1] == [5]
    assert checkpoint.load(save_finished(tmp_path, 7)).state.step == 7
    assert checkpoint.finished_state(tmp_path, TRAIN) == TrainState(step=7, finished=True)


def test_load_latest_is_none_and_names_each_when_all_are_damaged(tmp_path):
    for step in (5, 7):
        flip_a_byte(save(tmp_path, step))
    warnings: list[str] = []
    assert checkpoint.load_latest(tmp_path, warnings.append) is None
    assert ["step_00000007" in warnings[0], "step_00000005" in warnings[1]] == [True, True]


def test_save_replaces_a_damaged_checkpoint_of_its_step(tmp_path):
    flip_a_byte(save(tmp_path, 7))
    assert checkpoint.load(save(tmp_path, 7)).state.step == 7


def test_save_replaces_later_damaged_checkpoints_at_their_steps(tmp_path):
    save(tmp_path, 3)
    for step in (5, 7):
        flip_a_byte(save(tmp_path, step))
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4, 5, 7]
    save(tmp_path, 5, keep=2)
    save(tmp_path, 7, keep=2)
    assert steps(tmp_path) == [5, 7]
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 7)).state.step == 7


def test_save_writes_the_same_files_to_a_store_and_a_disk(tmp_path):
    store = UPath("memory://checkpoints/run")
    for step in (3, 5, 7):
        on_disk, stored = save(tmp_path, step, keep=2), save(store, step, keep=2)
    assert steps(store) == steps(tmp_path) == [5, 7]
    for name in ("tensors.safetensors", "state.json", "SHA256SUMS"):
        assert (stored / name).read_bytes() == (on_disk / name).read_bytes()
    ours, theirs = checkpoint.load_latest(store, print), checkpoint.load(on_disk)
    assert ours is not None
    assert ours.state == theirs.state
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())
    assert [p.name for p in store.iterdir()] == ["step_00000005", "step_00000007"]


def test_load_latest_passes_over_incomplete_and_damaged_ones_in_a_store(tmp_path):
    store = UPath("memory://checkpoints/damaged")
    for step in (3, 5, 7, 9):
        save(store, step)
    (store / "step_00000009" / "SHA256SUMS").unlink()  # written last, so the checkpoint is incomplete
    (store / "step_00000007" / "state.json").unlink()
    data = bytearray((store / "step_00000005" / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (store / "step_00000005" / "tensors.safetensors").write_bytes(bytes(data))
    warnings: list[str] = []
    found = checkpoint.load_latest(store, warnings.append)
    assert found is not None
    assert found.state.step == 3
    assert [name in line for name, line in zip(("009", "007", "005"), warnings, strict=True)] == [True] * 3


def test_load_latest_raises_when_the_store_is_away(tmp_path, monkeypatch):
    store = UPath("memory://checkpoints/away")
    save(store, 3)

    def refuse(*arguments: object) -> None:
        raise OSError("memory://checkpoints/away cannot be reached: no route")

    monkeypatch.setattr(checkpoint, "local_copy", refuse)
    with pytest.raises(OSError, match="cannot be reached"):
        checkpoint.load_latest(store, print)


@pytest.fixture(params=["disk", "store"])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path if request.param == "disk" else UPath(f"memory://finished/{tmp_path.name}")


def save_finished(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, *trained(step), TrainState(step=step, finished=True), SETTINGS, keep=100)


def test_finished_state_is_that_of_the_newest_checkpoint_if_training_is_done(run_folder, monkeypatch):
    assert checkpoint.finished_state(run_folder, TRAIN) is None
    save(run_folder, 5)
    assert checkpoint.finished_state(run_folder, TRAIN) is None
    save_finished(run_folder, 7)
    monkeypatch.setattr(checkpoint, "load_file", lambda path: pytest.fail("it loads the tensors"))
    assert checkpoint.finished_state(run_folder, TRAIN) == TrainState(step=7, finished=True)
    assert checkpoint.finished_state(run_folder, train_settings(max_steps=8)) is None  # 7 ended a shorter run


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("change", ["flipped", "missing"])
def test_finished_state_of_a_damaged_checkpoint_is_none(run_folder, name, change):
    save(run_folder, 5)
    path = save_finished(run_folder, 7) / name
    content = path.read_bytes()
    path.unlink()
    if change == "flipped":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert checkpoint.finished_state(run_folder, TRAIN) is None


def test_finished_state_reads_no_tensors_of_a_run_in_progress(run_folder):
    (save(run_folder, 5) / "tensors.safetensors").unlink()
    save(run_folder, 3)
    assert checkpoint.finished_state(run_folder, TRAIN) is None


def test_finished_state_raises_when_the_store_is_away(monkeypatch):
    store = UPath("memory://finished/away")
    save_finished(store, 3)

    def refuse(path: UPath) -> None:
        raise OSError("no route")

    monkeypatch.setattr(checkpoint, "sha256_of", refuse)
    with pytest.raises(OSError, match="no route"):
        checkpoint.finished_state(store, TRAIN)


def test_load_latest_unpickles_nothing(tmp_path):
    marker = tmp_path / "unpickled"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return marker.touch, ()

    save(tmp_path / "run", 5)
    folder = save(tmp_path / "run", 7)
    torch.save(Payload(), folder / "tensors.safetensors")
    assert checkpoint.load_latest(tmp_path / "run", lambda line: None).state.step == 5  # type: ignore[union-attr]
    assert not marker.exists()


# --- a disk that is full


@contextmanager
def almost_full_disk() -> Iterator[None]:
    """Limit each file to 20 KB: the system refuses further bytes, as on a full disk.

    Not a fixture: before teardown, pytest writes its report, which may be larger.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_save_that_fails_leaves_earlier_checkpoints_and_nothing_else(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 5)
    before = files(tmp_path)
    message = rf"^checkpoint of step 7 not written to {re.escape(str(tmp_path))}: .*; earlier ones are kept$"
    with almost_full_disk(), pytest.raises(OSError, match=message):
        save(tmp_path, 7, keep=1)
    assert files(tmp_path) == before
    assert checkpoint.load_latest(tmp_path, pytest.fail).state.step == 5  # type: ignore[union-attr]


def test_save_that_cannot_write_the_state_leaves_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, 3)
    before = files(tmp_path)
    model, optimizer = trained(5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OSError,
        match=r"of step 5 .*: No space left on device; earlier ones are kept: free",
    ):
        checkpoint.save(tmp_path, model, optimizer, TrainState(step=5), SETTINGS, keep=1)
    assert files(tmp_path) == before


def test_save_model_that_fails_is_an_os_error_that_names_the_file(tmp_path):
    model, _ = trained(1)
    with almost_full_disk(), pytest.raises(OSError, match=r"too large .*weights\.safetensors"):
        checkpoint.save_model(tmp_path, model.state_dict(), CONFIG)


# --- the average (section 6.1)


def test_average_is_the_mean_of_the_last_checkpoints_weights(tmp_path):
    for step in (3, 5, 7, 11):
        save(tmp_path, step)
    weights, averaged = checkpoint.average(tmp_path, 3, pytest.fail)
    assert averaged == [11, 7, 5]
    models = [trained(step)[0].state_dict() for step in (5, 7, 11)]
    assert weights.keys() == models[0].keys()
    for name, value in weights.items():
        expected = torch.stack([model[name].double() for model in models]).mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
        assert value.dtype == torch.float32


def test_average_leaves_a_damaged_checkpoint_out_and_takes_one_more(tmp_path):
    for step in (3, 5, 7, 11):
        save(tmp_path, step)
    flip_a_byte(tmp_path / "step_00000007")
    warnings: list[str] = []
    _, averaged = checkpoint.average(tmp_path, 3, warnings.append)
    assert averaged == [11, 5, 3]
    assert len(warnings) == 1
    assert warnings[0].endswith("; left out of the average")


def test_average_of_more_checkpoints_than_exist_is_that_of_all(tmp_path):
    save(tmp_path, 3)
    weights, averaged = checkpoint.average(tmp_path, 5, pytest.fail)
    assert averaged == [3]
    assert all(torch.equal(value, trained(3)[0].state_dict()[name]) for name, value in weights.items())


def test_average_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no intact checkpoint"):
        checkpoint.average(tmp_path, 5, pytest.fail)


# --- the final model


def test_load_model_returns_what_was_saved_in_evaluation_mode(tmp_path):
    model, _ = trained(1)
    checkpoint.save_model(tmp_path, model.state_dict(), CONFIG)
    loaded = checkpoint.load_model(tmp_path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_load_model_names_the_stage_that_makes_a_missing_file(tmp_path, name):
    checkpoint.save_model(tmp_path, trained(1)[0].state_dict(), CONFIG)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} does not exist: run the train stage first")):
        checkpoint.load_model(tmp_path)


def edit_config(before: str, after: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace(before, after)
    )


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        change(weights)
        save_file(weights, folder / "weights.safetensors")

    return edit


EMBEDDING = "embedding.weight"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "Expecting"),
        (lambda folder: (folder / "config.json").write_text('{"vocab_size": 23}'), "missing 10 required"),
        (edit_config("17", "19"), r"w_1.bias is F32 \[17\] in weights.safetensors, but F32 \[19\] according to"),
        (edit_config('"num_layers": 1', '"num_layers": 1000000000'), "config.json has 1000000000 layers, but"),
        (edit_config('"d_ff": 17', '"d_ff": 1000000000000'), r"\[17\] in .*, but F32 \[1000000000000\] according"),
        (lambda folder: os.truncate(folder / "weights.safetensors", 1009), "deserializing"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"something else"), "deserializing"),
        (edit_weights(lambda weights: weights.pop(EMBEDDING)), f"{EMBEDDING} is missing in"),
        (edit_weights(lambda weights: weights.update(x=torch.zeros(3))), r"x is F32 \[3\] in .*, but missing acc"),
        (
            edit_weights(lambda weights: weights.update({EMBEDDING: weights[EMBEDDING].double()})),
            rf"{EMBEDDING} is F64 \[23, 14\] in weights.safetensors, but F32 \[23, 14\] according to config.json",
        ),
        (edit_weights(lambda weights: weights.update({EMBEDDING: weights[EMBEDDING].int()})), f"{EMBEDDING} is I32"),
    ],
    ids=[
        "no JSON", "a field missing", "other sizes", "too many layers", "too large", "cut off", "no safetensors",
        "a weight missing", "one too many", "double precision", "whole numbers",
    ],
)  # fmt: skip
def test_load_model_refuses_what_fits_its_checksums_alone_before_it_takes_memory(
    tmp_path, monkeypatch, damage, reason
):
    checkpoint.save_model(tmp_path, trained(1)[0].state_dict(), CONFIG)
    damage(tmp_path)
    update_sums(tmp_path)
    monkeypatch.setattr(checkpoint, "load_file", lambda path: pytest.fail("it loads the weights"))
    with pytest.raises(
        ValueError, match=re.escape(str(tmp_path)) + rf" is damaged \(.*{reason}.*\): run the train stage again"
    ):
        checkpoint.load_model(tmp_path)


def test_save_model_writes_one_file_that_other_tools_read(tmp_path):
    model, _ = trained(1)
    checkpoint.save_model(tmp_path, model.state_dict(), CONFIG)
    assert load_file(tmp_path / "weights.safetensors").keys() == model.state_dict().keys()
