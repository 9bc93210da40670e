"""Training of one rank on a small corpus on disk, with real batch plan and checkpoints, without Ray."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model.config import BOS, EOS
from model.transformer import Transformer
from pipeline.common.settings import Settings, load_settings
from pipeline.common.storage import cache
from pipeline.data.batching import BatchPlan
from pipeline.data.dataset import SIDES, EncodedSplit, encoded_paths
from pipeline.training import checkpoint, loop
from pipeline.training.loop import TrainState
from pipeline.training.trainer import batch_plan, rate_of_step, share_advice, train_rank
from tests.factories import PAIRS, VALID_WORDS, update_sums, write_corpus
from tests.factories import settings as make_settings

VOCAB = 23


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    """Matrices this small gain nothing from a second thread, and are much slower with it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "encoded")
    return tmp_path / "encoded"


class Stopped(Exception):  # noqa: N818, not an error
    """Raised in a run to stop it as a kill would."""


def stop_at(step: int | None) -> Callable[[TrainState, float], None]:
    def progress(state: TrainState, loss: float) -> None:
        assert math.isfinite(loss)
        if state.step == step:
            raise Stopped

    return progress


def run(
    data: Path,
    folder: Path,
    settings: Settings | None = None,
    *,
    stop: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    rank: int = 0,
    num_ranks: int = 1,
) -> TrainState:
    return train_rank(
        settings or make_settings(), data, folder, rank=rank, num_ranks=num_ranks, device=torch.device("cpu"),
        report=report, progress=stop_at(stop), log=log,
    )  # fmt: skip


def tensors(folder: Path, step: int = 9) -> dict[str, Tensor]:
    """Return weights and moments of the checkpoint of this step."""
    return load_file(checkpoint.folder_of(folder, step) / "tensors.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def without_time(state: TrainState) -> dict[str, Any]:
    content = asdict(state)
    del content["seconds"]
    for point in content["training_curve"]:
        del point["tokens_per_second"]
    return content


def model_of(folder: Path, step: int = 9) -> Transformer:
    model = Transformer(make_settings().model.config(VOCAB))
    weights = tensors(folder, step)
    model.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    return model.eval()


def test_train_rank_trains_to_the_last_step_and_leaves_checkpoints(data, tmp_path):
    reported: list[tuple[int, bool]] = []
    state = run(data, tmp_path / "run", report=lambda m, step: reported.append((step, "valid_loss" in m)))
    assert (state.step, state.position, state.finished) == (9, (2, 1), True)
    assert [path.name[-1] for path in checkpoint.folders(tmp_path / "run")] == ["3", "6", "9"]
    assert [step for step, of_validation in reported if of_validation] == [4, 8, 9]
    content = json.loads((checkpoint.folder_of(tmp_path / "run", 9) / "state.json").read_text())
    assert content["settings"] == asdict(make_settings())


def test_train_rank_counts_every_target_token_of_an_epoch_with_its_eos(data, tmp_path):
    state = run(data, tmp_path / "run", make_settings(train={"max_steps": 4}))
    offsets = np.load(encoded_paths(data, "train", "tgt")[1])
    assert state.position == (1, 0)
    assert state.tokens == offsets[-1] + PAIRS["train"]


def test_train_rank_validates_by_the_cross_entropy_of_torch(data, tmp_path):
    last = run(data, tmp_path / "run").validation_curve[-1]
    model = model_of(tmp_path / "run")
    total, tokens = 0.0, 0
    sides = [[np.load(path).astype(np.int64) for path in encoded_paths(data, "valid", side)] for side in SIDES]
    for i in range(PAIRS["valid"]):
        src, tgt = (ids[offsets[i] : offsets[i + 1]].tolist() for ids, offsets in sides)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*src, EOS]]), torch.tensor([[BOS, *tgt]])))[0]
        total += F.cross_entropy(logits, torch.tensor([*tgt, EOS]), reduction="sum").item()
        tokens += len(tgt) + 1
    assert last["valid_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert last["valid_ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert last["valid_ppl_word"] == pytest.approx(math.exp(total / VALID_WORDS), rel=1e-3)


def test_train_rank_scores_at_each_validation_on_rank_0_and_not_in_the_time_of_steps(data, tmp_path, monkeypatch):
    now = [0.0]

    def later(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: later(1)))
    for rank, scores in ((0, [7.5] * 3), (1, [None] * 3)):
        state = train_rank(
            make_settings(), data, tmp_path / f"{rank}", rank=rank, num_ranks=2, device=torch.device("cpu"),
            report=lambda metrics, step: None, progress=lambda state, loss: None, log=lambda line: None,
            score=lambda model: {"valid_bleu": 7.5, "other": later(100)},
        )  # fmt: skip
        assert [point.get("valid_bleu") for point in state.validation_curve] == scores
        assert state.seconds == 9.0  # one second per step


@pytest.mark.parametrize("num_threads", [1, 2])
def test_resume_equals_the_undisturbed_run_bit_for_bit(data, tmp_path, num_threads):
    torch.set_num_threads(num_threads)
    whole = run(data, tmp_path / "whole")
    messages: list[str] = []
    for stop in (5, 8):
        with pytest.raises(Stopped):
            run(data, tmp_path / "parts", stop=stop, log=messages.append)
    parts = run(data, tmp_path / "parts", log=messages.append)
    assert messages == [f"continuing from the checkpoint of step {step}" for step in (3, 6)]
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))
    assert without_time(parts) == without_time(whole)


def test_resume_behind_a_damaged_checkpoint_logs_it_and_ends_the_same(data, tmp_path):
    run(data, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(data, tmp_path / "parts", stop=8)
    (checkpoint.folder_of(tmp_path / "parts", 6) / "state.json").unlink()
    messages: list[str] = []
    run(data, tmp_path / "parts", log=messages.append)
    assert len(messages) == 2
    assert "step_00000006 is damaged" in messages[0]
    assert messages[1] == "continuing from the checkpoint of step 3"
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_resume_reports_the_points_of_its_checkpoint_again(data, tmp_path):
    whole: list[tuple[int, dict[str, float]]] = []
    run(data, tmp_path / "whole", report=lambda metrics, step: whole.append((step, metrics)))
    with pytest.raises(Stopped):
        run(data, tmp_path / "parts", stop=8)
    again: list[tuple[int, dict[str, float]]] = []
    run(data, tmp_path / "parts", report=lambda metrics, step: again.append((step, metrics)))

    def points(reported: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
        timeless = [(step, {k: v for k, v in m.items() if k != "tokens_per_second"}) for step, m in reported]
        return sorted(timeless, key=lambda point: (point[0], "valid_loss" in point[1]))

    assert points(again) == points(whole)


@pytest.mark.parametrize(("micro_batch_tokens", "advises"), [(600, True), (64, False)])
def test_train_rank_logs_once_that_workers_would_wait_for_others(data, tmp_path, micro_batch_tokens, advises):
    settings = make_settings(train={"batch_tokens": 400}, hardware={"micro_batch_tokens": micro_batch_tokens})
    advice = share_advice(batch_plan(EncodedSplit.open(data, "train"), settings), 3)
    assert (advice is not None) == advises
    for rank in range(3):  # one after the other: without a process group, none waits for another
        messages: list[str] = []
        with pytest.raises(Stopped):
            run(data, tmp_path / f"{rank}", settings, stop=1, log=messages.append, rank=rank, num_ranks=3)
        assert messages == ([advice] if advises and rank == 0 else [])


def plan_of(batch_tokens: int, micro_batch_tokens: int) -> BatchPlan:
    lengths = np.random.default_rng(3).integers(1, 30, (2, 5000))
    return BatchPlan(
        *lengths, batch_tokens=batch_tokens, micro_batch_tokens=micro_batch_tokens, max_length=64, seed=1
    )


@pytest.mark.parametrize("batch_tokens", [4096, 25_000])
@pytest.mark.parametrize("num_ranks", [3, 5, 6, 7, 8, 12, 24])
def test_share_advice_that_is_followed_is_not_repeated(batch_tokens, num_ranks):
    advice = share_advice(plan_of(batch_tokens, 100_000), num_ranks)
    assert advice is not None
    found = re.fullmatch(
        f"{num_ranks} workers share 4 micro-batches per step, so some wait for others: "
        r"set hardware\.micro_batch_tokens to (\d+), which starts another run",
        advice,
    )
    assert found is not None
    assert share_advice(plan_of(batch_tokens, int(found[1])), num_ranks) is None


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_share_advice_is_none_for_one_two_and_four_workers(num_ranks):
    assert share_advice(plan_of(4096, 100_000), num_ranks) is None


@pytest.mark.parametrize(
    ("longest", "way_out"), [(64, "set hardware.micro_batch_tokens to 64"), (65, "use fewer workers")]
)
def test_share_advice_is_a_size_that_has_room_for_the_longest_pair(longest, way_out):
    plan = SimpleNamespace(most_micro_batches=4, budget=112, longest=longest)  # 112 * 4 // 8 * 8 // 7 = 64
    assert way_out in share_advice(plan, 3)


def test_share_advice_is_fewer_workers_if_sentences_are_too_long():
    assert share_advice(plan_of(1024, 1100), 64) == (
        "64 workers share 4 micro-batches per step, so some wait for others: use fewer workers"
    )


def test_share_advice_ignores_a_few_steps_short_of_a_micro_batch():
    plan = plan_of(1024, 600)
    assert sorted(len(step) for step in plan.steps(0)) == [3] * 2 + [4] * (plan.num_steps - 2)
    assert share_advice(plan, 4) is None


def test_train_rank_trains_a_finished_run_no_further(data, tmp_path):
    first = run(data, tmp_path / "run")
    before = tensors(tmp_path / "run")
    assert run(data, tmp_path / "run") == first
    assert same(tensors(tmp_path / "run"), before)


CHANGES: list[tuple[str, Any]] = [
    ("train.label_smoothing", 0.3),
    ("train.batch_tokens", 400),
    ("train.warmup_steps", 2),
    ("train.lr_scale", 0.7),
    ("train.beta1", 0.5),
    ("train.beta2", 0.5),
    ("train.eps", 1e-3),
    ("train.max_grad_norm", 1e-6),
    ("hardware.precision", "bf16"),
    ("hardware.micro_batch_tokens", 97),
    ("model.dropout", 0.3),
    ("model.num_heads", 5),
    ("train.seed", 2),
]


def test_train_rank_weights_change_with_each_setting_of_the_run_key(data, tmp_path):
    short = make_settings(train={"max_steps": 3})
    run(data, tmp_path / "plain", short)
    plain = tensors(tmp_path / "plain", 3)["model.embedding.weight"]
    run(data, tmp_path / "again", short)
    assert torch.equal(tensors(tmp_path / "again", 3)["model.embedding.weight"], plain)
    for key, value in CHANGES:
        section, _, name = key.partition(".")
        inner = replace(getattr(short, section), **{name: value})
        run(data, tmp_path / key, replace(short, **{section: inner}))
        assert not torch.equal(tensors(tmp_path / key, 3)["model.embedding.weight"], plain), key


def test_train_rank_leaves_out_training_pairs_that_are_too_long(data, tmp_path):
    for side in SIDES:  # validation fits: each sentence has five tokens
        ids_path, offsets_path = encoded_paths(data, "valid", side)
        np.save(ids_path, np.full(5 * PAIRS["valid"], EOS + 1, np.uint16))
        np.save(offsets_path, 5 * np.arange(PAIRS["valid"] + 1))
    update_sums(data)
    lengths = [np.diff(np.load(encoded_paths(data, "train", side)[1])) + 1 for side in SIDES]
    too_long = int((np.maximum(*lengths) > 9).sum())
    settings = make_settings()
    messages: list[str] = []
    run(data, tmp_path / "run", replace(settings, model=replace(settings.model, max_length=9)), log=messages.append)
    assert messages == [f"{too_long} training pairs are longer than model.max_length and are left out"]


def test_train_rank_refuses_validation_pairs_that_are_too_long(data, tmp_path):
    settings = make_settings()
    lengths = np.stack([np.diff(np.load(encoded_paths(data, "valid", side)[1])) + 1 for side in SIDES])
    longest, others = int(lengths.max()), int((lengths.max(axis=0) > 7).sum()) - 1
    side, pair = np.unravel_index(lengths.argmax(), lengths.shape)
    message = (
        rf"^data/clean/valid\.{('en', 'de')[side]}, line {pair + 1}, has {longest} tokens, more than "
        rf"model\.max_length \(7\), and {others} more pairs are too long: set model\.max_length to {longest}, or"
    )
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "run", replace(settings, model=replace(settings.model, max_length=7)))
    assert not (tmp_path / "run").exists()


def test_train_rank_names_the_split_of_a_pair_that_no_micro_batch_holds(data, tmp_path):
    settings = make_settings()
    small = replace(settings, hardware=replace(settings.hardware, micro_batch_tokens=7))
    with pytest.raises(
        ValueError, match=r"^train: the longer sentence of line \d+ has \d+ tokens, more than hardware"
    ):
        run(data, tmp_path / "run", small)


def test_train_rank_has_torch_keep_compiled_code_where_others_cannot_write(tmp_path, monkeypatch):
    """Must be set before the first Adam: torch chooses the folder when it makes one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restores the variable after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(ValueError, match="run the tokenize stage"):
        run(tmp_path / "no corpus", tmp_path / "run")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == cache() / "inductor"
    assert cache().stat().st_mode & 0o077 == 0


def as_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
    messages: list[str] = []
    try:
        run(
            Path(folder) / "encoded",
            Path(folder) / "parts",
            stop=8,
            log=messages.append,
            rank=rank,
            num_ranks=num_ranks,
        )
    except Stopped:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(messages))
    dist.barrier()  # Gloo aborts a process whose peer has left
    dist.destroy_process_group()


def test_resume_with_other_numbers_of_ranks_changes_only_rounding(data, tmp_path):
    """Takes steps 1 to 3 on one rank, 4 to 6 on two, 7 to 9 on one. Weights equal one rank's up to rounding."""
    whole = run(data, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(data, tmp_path / "parts", stop=4)
    torch.multiprocessing.spawn(as_rank, (2, str(tmp_path)), nprocs=2)
    assert json.loads((tmp_path / "0.json").read_text()) == ["continuing from the checkpoint of step 3"]
    assert json.loads((tmp_path / "1.json").read_text()) == []
    parts = run(data, tmp_path / "parts")
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert (parts.step, parts.position, parts.tokens) == (whole.step, whole.position, whole.tokens)
    for point, expected in zip(parts.validation_curve, whole.validation_curve, strict=True):
        assert point["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-4)


def test_rate_of_step_peaks_at_the_end_of_warm_up():
    settings = load_settings(Path(__file__).parents[3])
    m, t = settings.model, settings.train
    rate = rate_of_step(settings)
    assert rate(t.warmup_steps) == pytest.approx(t.lr_scale * (m.d_model * t.warmup_steps) ** -0.5)
    assert rate(t.warmup_steps) > max(rate(t.warmup_steps - 1), rate(t.warmup_steps + 1))
