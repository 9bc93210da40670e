"""The benchmarks run: sides answer in turn, and what they measure comes to ratios. A quiet machine has to say how
fast things are."""

import json
import subprocess
import sys
import time
from pathlib import Path

import decoding
import numpy as np
import pytest
from harness import HERE, OPERATORS, ROOT, Side, flops_per_token, paired, script, sentence_lengths, write_corpus
from turns import BESIDE, MICRO_BATCHES, Runner, slower_by

from model.transformer import Transformer
from pipeline.common.settings import load_settings
from pipeline.training.checkpoint import save_model

CONFIG = load_settings(ROOT, model="nano").model.config(101)
PAIRS = 300


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path, PAIRS, CONFIG.vocab_size)
    return tmp_path


def test_training_is_measured_beside_torchs_own_modules(corpus: Path):
    options = ("--corpus", corpus, "--sizes", json.dumps(vars(CONFIG)), "--steps", 1)
    options += ("--threads", 2, "--batch-tokens", 1000, "--micro-batch-tokens", 300)
    sides = [Side(name, script("training.py", sys.executable, name, *options)) for name in ("ours", "torch")]
    paired(sides, rounds=2, profile=True)
    for side in sides:
        assert len(side.blocks) == 2
        assert all(block["tokens_per_s"] > 0 for block in side.blocks)
        assert all(0 <= block["padding"] < 0.2 for block in side.blocks)
        assert side.peak_bytes > 1e6
    ours, torchs = sides
    ratios = sorted(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours.blocks, torchs.blocks, strict=True))
    assert ours.ratio(torchs, "tokens_per_s") == f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})"
    assert 0.1 < ours.shares.pop(OPERATORS) <= 1
    assert 0.3 < sum(ours.shares.values()) <= 1
    assert not torchs.shares


def test_decoding_is_measured_from_weights_on_disk(tmp_path: Path):
    save_model(tmp_path, Transformer(CONFIG).state_dict(), CONFIG)
    lengths = [3] * 70 + [5] * 66
    np.save(tmp_path / "test.src.ids.npy", np.random.default_rng(1).integers(4, 101, sum(lengths)))
    np.save(tmp_path / "test.src.offsets.npy", np.cumsum([0, *lengths]))
    options = ("--model", tmp_path, "--encoded", tmp_path, "--sentences", 2 * decoding.BATCH, "--threads", 2, "--cap")
    side = Side("ours", script("decoding.py", sys.executable, "ours", *options))
    paired([side], rounds=1)
    [block] = side.blocks
    # Almost no search of random weights ends by itself: all outputs come to their limit.
    assert block["tokens_per_s"] / block["sentences_per_s"] == pytest.approx(4 + decoding.CAP_EXTRA + 1, rel=0.2)
    assert block["flops_per_s"] > 1e6


def test_capped_sentences_are_of_few_lengths_with_a_batch_of_each():
    sources = [[7] * length for length in range(1, 9) for _ in range(60 + length)]
    lengths = [len(source) for source in decoding.chosen(sources, 3 * decoding.BATCH, cap=True)]
    assert lengths == [4] * 64 + [6] * 64 + [8] * 64


def test_the_flops_of_a_search_are_those_of_its_hypotheses():
    """Of the encoder and the memory's keys and values once, of the decoder for each of four."""
    c, source, output = CONFIG, [[5] * 6], [[8] * 9]
    inner, keys_values = c.num_heads * c.d_k, 2 * 7 * c.d_model * c.num_heads * c.d_k
    feed_forward = 2 * c.d_model * c.d_ff
    encoder = 7 * (4 * c.d_model * inner + feed_forward) + 2 * 7 * 7 * inner
    decoder = 10 * (6 * c.d_model * inner + feed_forward + c.d_model * c.vocab_size) + 2 * 10 * (10 + 7) * inner
    found = decoding.timed(lambda: output, vars(c), source)
    flops = found["flops_per_s"] / found["sentences_per_s"]
    assert flops == pytest.approx(2 * (encoder + keys_values + 4 * decoder))


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu():
    command = [sys.executable, HERE / "gpu.py", "--device", "cpu", "--presets", "nano"]
    command += ["--batch-tokens", "500", "--steps", "1", "--rounds", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| nano, ours |" in printed
    assert "| nano, torch.nn.Transformer |" in printed


def test_the_harness_needs_nothing_that_others_may_lack():
    imports = f"import sys; sys.path.append({str(HERE)!r}); import harness"
    subprocess.run([sys.executable, "-ISc", imports], check=True)


def test_a_side_that_dies_is_named_with_its_command():
    side = Side("the third", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"the third ended with exit code 3: .*SystemExit"):
        paired([side], rounds=1)


COUNTS = """import json, os, sys, time
step = 0
while True:
    step, end = step + 1, time.perf_counter() + 0.01
    while time.perf_counter() < end:
        pass
    open("new", "w").write(json.dumps({"step": step, "text": "", "said": []}))
    os.replace("new", sys.argv[1])
"""


def test_one_that_waits_for_its_turn_takes_no_step(tmp_path: Path):
    runner = Runner([sys.executable, "-c", COUNTS, str(tmp_path / "told.json")], tmp_path, "told.json")
    with runner.started(steps=3):
        asleep = (tmp_path / "told.json").read_text()
        time.sleep(0.3)
        assert (tmp_path / "told.json").read_text() == asleep
        while len(runner.reached) < 2:
            runner.work(0.1)
        assert runner.reached[0][0] < runner.reached[1][0]
        process = runner.process
    assert not process.is_running()


def test_the_time_of_a_runs_threads_is_counted_with_those_of_its_children(tmp_path: Path):
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\n{COUNTS}"
    runner = Runner([sys.executable, "-c", code, str(tmp_path / "told.json")], tmp_path, "told.json")
    with runner.started(steps=3):
        before = runner.threads()
        assert runner.used_s == before
        assert len({process for process, _ in before}) == 2
        runner.work(1.0)
        after = runner.threads()
    assert all(after[thread] > before[thread] for thread in before)


def test_the_cores_time_is_shared_out_to_threads_at_micro_batches_and_to_others(monkeypatch):
    runner = Runner([], Path(), "", awake_s=10.0, used_s={(1, 1): 2.0})
    used = {(1, 1): 10.0, (1, 2): 6.0, (1, 3): 1.0, (2, 2): 1.0, (3, 3): 2.0, (4, 4): 0.2}
    monkeypatch.setattr(runner, "threads", lambda: used)
    monkeypatch.setattr(runner, "_name", lambda process: "raylet" if process == 3 else "monitor")
    shares = runner.shares()
    assert shares == pytest.approx({MICRO_BATCHES: 0.7, BESIDE: 0.05, "raylet": 0.1, "monitor": 0.06})
    assert list(shares) == [MICRO_BATCHES, BESIDE, "raylet", "monitor"]


def test_processes_are_named_by_their_script_or_program(tmp_path: Path):
    (tmp_path / "told.json").write_text('{"step": 1}')
    code = (
        "import subprocess, sys\nopen('watch.py', 'w').write('import time; time.sleep(60)')\n"
        "subprocess.Popen([sys.executable, 'watch.py']), subprocess.Popen(['sleep', '60'])\n"
        "import time; time.sleep(60)"
    )
    runner = Runner([sys.executable, "-c", code], tmp_path, "told.json")
    with runner.started(steps=1):
        names: set[str] = set()
        for _ in range(200):  # a child has its parent's name until it has begun
            if names == {"watch.py", "sleep"}:
                break
            runner.work(0.05)
            names = {runner._name(child.pid) for child in runner.process.children()}
        assert names == {"watch.py", "sleep"}
        assert runner._name(runner.process.pid) == "the driver"


def test_steps_are_compared_by_the_time_in_which_their_process_was_awake():
    awake = [(10, 1.0), (20, 2.0), (40, 6.0)]
    runner, bare = (Runner([], Path(), "", reached=[*reached]) for reached in (awake, [(5, 0.5), (30, 3.0)]))
    assert runner.seconds(10, 30) == pytest.approx(3.0)
    assert slower_by(runner, bare, turns=0, turn_s=0) == pytest.approx(0.5)


def test_a_run_that_ends_before_its_turn_is_named_with_its_output(tmp_path: Path):
    runner = Runner([sys.executable, "-c", "raise SystemExit('no data')"], tmp_path, "told.json")
    with pytest.raises(RuntimeError, match=r"ended with exit code 1:\nno data"), runner.started(steps=1):
        pass


def test_flops_are_those_of_the_sentences_without_padding(corpus: Path):
    """By the formula of a layer's products, written again: 6 FLOPs a weight and token, and attention's own."""
    assert CONFIG.num_layers == 1
    assert CONFIG.d_k == CONFIG.d_v
    d, inner, f, vocab = CONFIG.d_model, CONFIG.num_heads * CONFIG.d_k, CONFIG.d_ff, CONFIG.vocab_size
    flops = tokens = 0
    src_lengths, tgt_lengths = (lengths[::10].astype(int) + 1 for lengths in sentence_lengths(PAIRS))
    for s, t in zip(src_lengths, tgt_lengths, strict=True):
        encoder = s * (4 * d * inner + 2 * d * f) + 2 * s * s * inner
        decoder = t * (6 * d * inner + 2 * d * f + d * vocab) + s * 2 * d * inner + 2 * t * (t + s) * inner
        flops, tokens = flops + 6 * (encoder + decoder), tokens + t
    assert flops_per_token(CONFIG, corpus) == pytest.approx(flops / tokens)
