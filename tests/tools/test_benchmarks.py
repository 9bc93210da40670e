"""The benchmarks run, and compute ratios and FLOPs. Speeds are not tested: they need a quiet machine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import TransformerConfig
from model.transformer import Transformer
from pipeline.training.checkpoint import save_model
from tests.support.settings_files import NANO
from tools.benchmarks.decoding import BATCH, CAP_EXTRA, chosen, timed
from tools.benchmarks.harness import (
    OPERATORS,
    ROOT,
    CommandError,
    System,
    environment,
    flops_per_token,
    module,
    paired,
    sentence_lengths,
    write_corpus,
)
from tools.benchmarks.turns import MICRO_BATCHES, OTHER_THREADS, Runner, slower_by

CONFIG = TransformerConfig(**NANO, positions="sinusoidal", norm="post", max_length=256, vocab_size=101)
PAIRS = 300


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path, PAIRS, CONFIG.vocab_size)
    return tmp_path


def flops_of_search(source: int, output: int) -> int:
    """Return the FLOPs for one sentence of CONFIG with beam 4.

    The encoder and the keys and values of cross-attention count once, the decoder four times.
    """
    c, inner = CONFIG, CONFIG.num_heads * CONFIG.d_k
    src, tgt = source + 1, output + 1  # with EOS
    feed_forward, keys_values = 2 * c.d_model * c.d_ff, 2 * src * c.d_model * inner
    encoder = src * (4 * c.d_model * inner + feed_forward) + 2 * src * src * inner
    decoder = tgt * (6 * c.d_model * inner + feed_forward + c.d_model * c.vocab_size) + 2 * tgt * (tgt + src) * inner
    return 2 * (encoder + keys_values + 4 * decoder)


def test_paired_measures_training_of_ours_and_of_torchs_own_modules(corpus: Path):
    options = ("--corpus", corpus, "--sizes", json.dumps(vars(CONFIG)), "--steps", 1)
    options += ("--threads", 2, "--batch-tokens", 1000, "--micro-batch-tokens", 300)
    ours, torchs = (System(name, module("training", sys.executable, name, *options)) for name in ("ours", "torch"))
    paired([ours, torchs], rounds=2, profile=True)
    for system in (ours, torchs):
        assert len(system.blocks) == 2
        assert all(block["tokens_per_s"] > 0 for block in system.blocks)
        assert all(0 <= block["padding"] < 0.2 for block in system.blocks)
        assert 1e8 < system.peak_bytes < 3e9  # torch alone needs more than 100 MB
    ratios = sorted(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours.blocks, torchs.blocks, strict=True))
    assert ours.ratio(torchs, "tokens_per_s") == f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})"
    assert 0.1 < ours.shares.pop(OPERATORS) <= 1
    assert 0.3 < sum(ours.shares.values()) <= 1
    assert not torchs.shares


def test_paired_measures_decoding_from_weights_on_disk(tmp_path: Path):
    torch.manual_seed(1)
    save_model(tmp_path, Transformer(CONFIG).state_dict(), CONFIG)
    lengths = [3] * 70 + [5] * 66
    np.save(tmp_path / "test.src.ids.npy", np.random.default_rng(1).integers(4, 101, sum(lengths)))
    np.save(tmp_path / "test.src.offsets.npy", np.cumsum([0, *lengths]))
    options = ("--model", tmp_path, "--encoded", tmp_path, "--sentences", 2 * BATCH, "--threads", 2, "--cap")
    ours = System("ours", module("decoding", sys.executable, "ours", *options))
    paired([ours], rounds=1)
    [block] = ours.blocks
    # With random weights, almost all outputs reach the limit, which is the source's length + CAP_EXTRA.
    assert block["tokens_per_s"] / block["sentences_per_s"] == pytest.approx(4 + CAP_EXTRA + 1, rel=0.2)
    flops = block["flops_per_s"] / block["sentences_per_s"]
    assert flops == pytest.approx(flops_of_search(source=4, output=4 + CAP_EXTRA), rel=0.2)


def test_chosen_with_a_cap_takes_few_lengths_with_a_batch_of_each():
    sources = [[7] * length for length in range(1, 9) for _ in range(60 + length)]
    lengths = [len(source) for source in chosen(sources, 3 * BATCH, cap=True)]
    assert lengths == [4] * 64 + [6] * 64 + [8] * 64


def test_timed_counts_the_flops_of_four_hypotheses_as_long_as_the_output():
    found = timed(lambda: [[8] * 9], vars(CONFIG), [[5] * 6])
    assert found["flops_per_s"] / found["sentences_per_s"] == pytest.approx(flops_of_search(source=6, output=9))


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu():
    command = [sys.executable, "-m", "tools.benchmarks.gpu", "--device", "cpu", "--presets", "mini"]
    command += ["--batch-tokens", "500", "--steps", "1", "--rounds", "1"]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "| mini, ours |" in printed
    assert "| mini, torch.nn.Transformer |" in printed


def test_harness_imports_nothing_that_another_environment_may_lack():
    imports = f"import sys; sys.path.append({str(ROOT)!r}); import tools.benchmarks.harness"
    subprocess.run([sys.executable, "-ISc", imports], check=True)


@pytest.mark.parametrize("name", ["training", "decoding"])
def test_systems_of_other_toolkits_import_torch_and_numpy_alone(name: str):
    """Modules import this project and its other dependencies only inside the functions that measure ours."""
    code = (
        "import sys, torch, numpy\nbefore = {*sys.modules}\n"
        f"import tools.benchmarks.{name}\nfound = {{name.partition('.')[0] for name in {{*sys.modules}} - before}}\n"
        "print(*found - sys.stdlib_module_names - {'torch', 'numpy', 'tools'})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_paired_names_a_system_that_dies_with_its_command():
    system = System("the third", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(CommandError, match=r"the third ended with exit code 3: .*SystemExit"):
        paired([system], rounds=1)


COUNTS = """import json, os, sys, time
step = 0
while True:
    step, end = step + 1, time.perf_counter() + 0.01
    while time.perf_counter() < end:
        pass
    open("new", "w").write(json.dumps({"step": step, "text": "", "messages": []}))
    os.replace("new", sys.argv[1])
"""


def test_runner_takes_no_step_while_it_waits_for_its_turn(tmp_path: Path):
    runner = Runner([sys.executable, "-c", COUNTS, str(tmp_path / "progress.json")], tmp_path, "progress.json")
    with runner.started(steps=3):
        asleep = (tmp_path / "progress.json").read_text()
        time.sleep(0.3)
        assert (tmp_path / "progress.json").read_text() == asleep
        while len(runner.reached) < 2:
            runner.work(0.1)
        assert runner.reached[0][0] < runner.reached[1][0]
        process = runner.process
    assert not process.is_running()


def test_runner_threads_are_those_of_its_children_too(tmp_path: Path):
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\n{COUNTS}"
    runner = Runner([sys.executable, "-c", code, str(tmp_path / "progress.json")], tmp_path, "progress.json")
    with runner.started(steps=3):
        before = runner.threads()
        assert runner.used_s == before
        assert len({process for process, _ in before}) == 2
        runner.work(1.0)
        after = runner.threads()
    assert all(after[thread] > before[thread] for thread in before)


def test_runner_shares_are_of_the_busiest_threads_then_of_the_others(monkeypatch):
    runner = Runner([], Path(), "", awake_s=10.0, used_s={(1, 1): 2.0})
    used = {(1, 1): 10.0, (1, 2): 6.0, (1, 3): 1.0, (2, 2): 1.0, (3, 3): 2.0, (4, 4): 0.2}
    monkeypatch.setattr(runner, "threads", lambda: used)
    monkeypatch.setattr(runner, "_name", lambda process: "raylet" if process == 3 else "monitor")
    shares = runner.shares()
    assert shares == pytest.approx({MICRO_BATCHES: 0.7, OTHER_THREADS: 0.05, "raylet": 0.1, "monitor": 0.06})
    assert list(shares) == [MICRO_BATCHES, OTHER_THREADS, "raylet", "monitor"]


def test_runner_names_processes_by_their_script_or_program(tmp_path: Path):
    (tmp_path / "progress.json").write_text('{"step": 1}')
    code = (
        "import subprocess, sys\nopen('watch.py', 'w').write('import time; time.sleep(60)')\n"
        "subprocess.Popen([sys.executable, 'watch.py']), subprocess.Popen(['sleep', '60'])\n"
        "import time; time.sleep(60)"
    )
    runner = Runner([sys.executable, "-c", code], tmp_path, "progress.json")
    with runner.started(steps=1):
        names: set[str] = set()
        for _ in range(200):  # a child has its parent's name until it starts its program
            if names == {"watch.py", "sleep"}:
                break
            runner.work(0.05)
            names = {runner._name(child.pid) for child in runner.process.children()}
        assert names == {"watch.py", "sleep"}
        assert runner._name(runner.process.pid) == "the driver"


def test_slower_by_compares_the_same_steps_by_awake_time():
    awake = [(10, 1.0), (20, 2.0), (40, 6.0)]
    runner, bare = (Runner([], Path(), "", reached=[*reached]) for reached in (awake, [(5, 0.5), (30, 3.0)]))
    assert runner.seconds(10, 30) == pytest.approx(3.0)
    assert slower_by(runner, bare, turns=0, turn_s=0) == pytest.approx(0.5)


def test_runner_that_ends_before_its_turn_is_an_error_with_its_output(tmp_path: Path):
    runner = Runner([sys.executable, "-c", "raise SystemExit('no data')"], tmp_path, "progress.json")
    with pytest.raises(CommandError, match=r"ended with exit code 1:\nno data"), runner.started(steps=1):
        pass


def test_flops_per_token_are_those_of_the_sentences_without_padding(corpus: Path):
    """Compares with a second formula for a layer: 6 FLOPs per weight and token, plus attention's products."""
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
