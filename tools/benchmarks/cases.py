"""The comparisons: each is a function that returns the Markdown lines of its part."""

import csv
import gzip
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pipeline.preset import write_presets
from tools.benchmarks.harness import (
    OPERATORS,
    ROOT,
    THREADS,
    System,
    flops_per_token,
    log,
    module,
    multiply_rates,
    paired,
    run,
)
from tools.benchmarks.turns import Runner, slower_by

VOCAB_SIZE = 10_000
WMT_VOCAB_SIZE = 37_000  # section 5.1
CTRANSLATE2 = (("float32", 2, 1), ("float32", 2, 2), ("float32", 1, 1), ("int8", 2, 1), ("int8", 1, 1))
"""Precision of the weights, translators that share the threads, patience."""


@dataclass(frozen=True)
class Setting:
    """What the comparisons share.

    `folder` keeps what is made; `peers` is the Python that has the other toolkits; `data` is Multi30k's, encoded;
    `text` is source and target of a corpus for the data stages.
    """

    folder: Path
    peers: Path
    data: Path
    rounds: int
    pairs: int
    text: tuple[Path, Path] | None

    @property
    def encoded(self) -> Path:
        return self.data / "encoded"


def training(setting: Setting) -> list[str]:
    """Tokens per second of ours, MarianMTModel and torch.nn.Transformer."""
    ceiling, found = _ceiling()
    lines = [
        f"**Training**, steps of about 4,096 target tokens, single precision. {found}",
        "",
        "| | target tokens/s | padding | GFLOP/s | share of the ceiling | ours / theirs | peak memory |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    profiles = []
    for preset, steps, rounds in (("tiny", 10, setting.rounds), ("base", 1, max(3, setting.rounds - 2))):
        config = _config(preset)
        common: list[object] = ["--corpus", setting.encoded, "--sizes", json.dumps(vars(config)), "--steps", steps]
        common += ["--threads", THREADS]
        ours = System(f"{preset}, ours", module("training", sys.executable, "ours", *common))
        others = [
            System(f"{preset}, {name}", module("training", setting.peers, peer, *common))
            for peer, name in (("marian", "transformers' MarianMTModel"), ("torch", "torch.nn.Transformer"))
        ]
        paired([ours, *others], rounds, profile=True)
        profiles.append(_profile(ours))
        flops = flops_per_token(config, setting.encoded)
        for system in (ours, *others):
            rate = system.median("tokens_per_s")
            ratio = "" if system is ours else ours.ratio(system, "tokens_per_s")
            speed, share = f"{rate * flops / 1e9:.0f}", f"{rate * flops / ceiling:.0%}"
            padding, peak = f"{system.median('padding'):.1%}", f"{system.peak_bytes / 1e9:.2f} GB"
            lines.append(f"| {' | '.join((system.name, f'{rate:,.0f}', padding, speed, share, ratio, peak))} |")
    return [*lines, "", *profiles]


def decoding(setting: Setting) -> list[str]:
    """Sentences per second of ours, MarianMTModel.generate and CTranslate2, from the same weights."""
    ceiling, found = _ceiling()
    lines = [
        "**Decoding**, beam 4, Multi30k's test 2016. Tiny was trained for four epochs. Base has random weights and "
        "translates sentences of two lengths, 64 of each; an output has 10 tokens more than its source. CTranslate2 "
        "ends a search when four outputs have finished, even if other hypotheses could still overtake them. With "
        "patience 2, which evaluate.engine uses so that outputs match ours, it ends when eight have finished. For "
        "the share of the ceiling, FLOPs are counted as if all four hypotheses were as long as the output. "
        f"{found}",
        "",
        "| | sentences/s | output tokens/s | share of the ceiling | ours / theirs | peak memory |",
        "|---|---:|---:|---:|---|---:|",
    ]
    profiles = []
    for preset, sentences, rounds in (("tiny", 1000, setting.rounds), ("base", 128, max(3, setting.rounds - 2))):
        model = _model(setting, preset)
        common: list[object] = ["--model", model, "--encoded", setting.encoded, "--sentences", sentences]
        common += ["--threads", THREADS, *(["--cap"] if preset == "base" else [])]
        ours = System(f"{preset}, ours", module("decoding", sys.executable, "ours", *common))
        generate = module("decoding", setting.peers, "generate", *common)
        others = [System(f"{preset}, transformers' generate", generate)]
        for weights, workers, patience in CTRANSLATE2:
            name = f"{preset}, CTranslate2 {weights}, {workers} x {THREADS // workers} threads"
            name += ", patience 2" if patience == 2 else ""
            search = ("--workers", workers, "--patience", patience)
            others.append(System(name, module("decoding", sys.executable, weights, *search, *common)))
        if preset == "tiny":
            tokenizer = ("--tokenizer", setting.data / "tokenizer")
            engine = module("decoding", sys.executable, "engine", *tokenizer, *common)
            others.append(System(f"{preset}, evaluate.engine ctranslate2, its export included", engine))
            lines_of_text = module("decoding", sys.executable, "lines", *tokenizer, *common)
            others.append(System(f"{preset}, ours from text to text, as pipeline.translate", lines_of_text))
        paired([ours, *others], rounds, profile=True)
        profiles.append(_profile(ours))
        for system in (ours, *others):
            ratio = "" if system is ours else ours.ratio(system, "sentences_per_s")
            rates = (f"{system.median('sentences_per_s'):,.1f}", f"{system.median('tokens_per_s'):,.0f}")
            share, peak = f"{system.median('flops_per_s') / ceiling:.0%}", f"{system.peak_bytes / 1e9:.2f} GB"
            lines.append(f"| {' | '.join((system.name, *rates, share, ratio, peak))} |")
    return [*lines, "", *profiles]


def data(setting: Setting) -> list[str]:
    """Time of the stages from text to tokens, compared with SentencePiece alone; time of an epoch's plan."""
    project = setting.folder / "data"
    _clear(project)
    new_project(project, data="own", model="mini")
    if setting.text:
        what = f"{setting.text[0].name}, repeated with numbers added to reach {setting.pairs:,} pairs"
        vocab_size = WMT_VOCAB_SIZE
        _write_copies(setting.text, project / "data/own", setting.pairs)
    else:
        what = f"{setting.pairs:,} pairs, each made of two random pairs of Multi30k"
        vocab_size = VOCAB_SIZE
        _write_pairs(setting.data / "raw", project / "data/own", setting.pairs)
    lines = [
        f"**Data**: {what}; vocabulary {vocab_size:,}. The download reads files on the same disk.",
        "",
        "| | seconds | pairs/s | peak memory |",
        "|---|---:|---:|---:|",
    ]
    edit(project / "params.yaml", "tokenize.vocab_size", vocab_size)
    rows = []
    for stage in ("download", "validate", "train_tokenizer", "encode"):
        log(stage)
        rows.append((stage, *run([sys.executable, "-m", f"pipeline.{stage}"], project)))
    rows.append(("download to encoded", sum(took for _, took, _ in rows), max(peak for *_, peak in rows)))
    names = {"encode": "encode alone", "sentencepiece": "SentencePiece alone", "decode": "decode the tokens"}
    systems = [
        System(name, module("preparation", sys.executable, what, "--data", project / "data"))
        for what, name in names.items()
    ]
    paired(systems, 3 if setting.pairs <= 500_000 else 1)
    rows += [(system.name, system.median("seconds"), system.peak_bytes) for system in systems]
    shares = [system.median("cores_s") / systems[0].median("cores_s") for system in systems]
    lines += [
        f"| {name} | {took:.1f} | {setting.pairs / took:,.0f} | {peak / 1e9:.2f} GB |" for name, took, peak in rows
    ]
    plan = System("plan", module("preparation", sys.executable, "plan"))
    paired([plan], 1)
    (block,) = plan.blocks
    lines += [
        "",
        f"- The rate of encode divided by SentencePiece's: {systems[0].ratio(systems[1], 'pairs_per_s')}. "
        f"SentencePiece takes {shares[1]:.0%} of encode's CPU time to encode the text, and {shares[2]:.0%} to decode "
        "the tokens again, so that they can be compared with the text. Reading, comparing, counting and writing take "
        f"{1 - shares[1] - shares[2]:.0%}.",
        f"- The batch plan of 4.5 million pairs takes {block['plan_s']:.1f} s once, {block['epoch_s']:.1f} s per "
        f"epoch and {plan.peak_bytes / 1e9:.2f} GB. A run that resumes in the middle of an epoch has its first batch "
        f"after {block['resume_s']:.1f} s.",
    ]
    return lines


def _write_pairs(raw: Path, own: Path, num_pairs: int) -> None:
    """Write pairs of two random sentences each, which have about the length of WMT's."""
    rng = random.Random(1)
    for split in ("train", "valid", "test"):
        texts = [(raw / f"{split}.{code}").read_text(encoding="utf-8").splitlines() for code in ("en", "de")]
        number = num_pairs if split == "train" else len(texts[0])
        chosen = [rng.choices(range(len(texts[0])), k=2) for _ in range(number)]
        for lines, code in zip(texts, ("en", "de"), strict=True):
            text = "".join(f"{lines[i]} {lines[j]}\n" for i, j in chosen)
            (own / f"{split}.{code}").write_text(text, encoding="utf-8")


def _write_copies(text: tuple[Path, Path], own: Path, num_pairs: int) -> None:
    """Write the pairs of `text` again and again, each with its number in front: copies are dropped as duplicates."""
    texts = []
    for path in text:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            texts.append(file.read().removesuffix("\n").split("\n"))
    held_out = 2000
    for lines, code in zip(texts, ("en", "de"), strict=True):
        for split, first in (("valid", -held_out), ("test", -2 * held_out)):
            chosen = lines[first : first + held_out or None]
            (own / f"{split}.{code}").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        with open(own / f"train.{code}", "w", encoding="utf-8") as file:
            file.writelines(f"{n + 1}. {lines[n % (len(lines) - 2 * held_out)]}\n" for n in range(num_pairs))


def start(setting: Setting) -> list[str]:
    """Time from the command to the first step."""
    project = _tiny_on_multi30k(setting)
    starts: dict[str, list[float]] = {"a new project": [], "one that has MLflow's store": []}
    parts = []  # of the second
    _lengths(project, max_steps=2, checkpoint_every=2)
    for number in range(3):
        _forget(project)
        for where, seconds in starts.items():
            log(f"round {number + 1} of 3: two steps in {where}")
            _clear(project / "checkpoints")
            began = time.time()
            run([sys.executable, "-m", "pipeline.train"], project)
            (usage,) = project.glob("checkpoints/*/usage/*.json")
            first_step_at = json.loads(usage.read_text())["first_step_at"]
            seconds.append(first_step_at - began)
        parts.append([b - a for a, b in pairwise((began, int(usage.stem) / 1e9, first_step_at))])
    imports, first = map(statistics.median, zip(*parts, strict=True))
    first_steps = "; ".join(
        f"in {where}, {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        for where, seconds in starts.items()
    )
    return [
        "**Start**",
        "",
        f"- Command to first step: {first_steps}. Of the latter, {imports:.1f} s are imports, checks and "
        f"MLflow's store, and {first:.1f} s are data, model and the first step.",
    ]


def orchestration(setting: Setting) -> list[str]:
    """What the command, with MLflow and checkpoints, adds to a step; speed-up by two workers; time of `dvc repro`
    without work."""
    project = _tiny_on_multi30k(setting)
    slower = []
    _lengths(project, max_steps=10_000, checkpoint_every=100)
    for number in range(setting.rounds):
        log(f"round {number + 1} of {setting.rounds}: python -m pipeline.train and the bare loop in turns")
        _forget(project)
        whole = Runner([sys.executable, "-m", "pipeline.train"], project, "checkpoints/*/progress.json")
        alone = project / "bare"
        _clear(alone)
        alone.mkdir()
        command = module("orchestration", sys.executable, "--project", project, "--progress", alone / "told.json")
        bare = Runner(command, alone, "told.json")
        with whole.started(25), bare.started(3):  # after the first point of the curve, for which MLflow is imported
            slower.append(slower_by(whole, bare, turns=24, turn_s=5))
            shares = [
                ", ".join(f"{who} {share:.1%}" for who, share in runner.shares().items() if share >= 0.0005)
                for runner in (whole, bare)
            ]
    lines = [
        "**Orchestration**",
        "",
        "- A step of tiny under `python -m pipeline.train`, with MLflow and a checkpoint every 100 steps, takes "
        f"{statistics.median(slower):.1%} longer than in the bare loop ({min(slower):.1%} to {max(slower):.1%}).",
        f"- Use of the cores in the last round: {shares[0]}. In the bare loop: {shares[1]}.",
    ]
    write_presets(["model=base"], project)
    _lengths(project, max_steps=6, checkpoint_every=6)
    edit(project / "params.yaml", "train.batch_tokens", 4096)
    edit(project / "params.yaml", "train.log_every", 1)
    edit(project / "params.yaml", "hardware.cpus_per_worker", 1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(setting.rounds):
        for workers, found in rates.items():
            log(f"round {number + 1} of {setting.rounds}: base on {workers} workers of one thread")
            edit(project / "params.yaml", "hardware.num_workers", workers)
            _clear(project / "checkpoints")  # or one worker's run would be two's as well
            run([sys.executable, "-m", "pipeline.train"], project, OMP_NUM_THREADS="1")
            points = csv.DictReader((project / "reports/training_curve.csv").read_text().splitlines())
            found.append(statistics.median([float(point["tokens_per_second"]) for point in points][2:]))
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    one, two = map(statistics.median, rates.values())
    lines.append(
        f"- Base on workers with one thread each, from the third step on: {one:,.0f} tokens/s with one worker, "
        f"{two:,.0f} with two, a speedup of {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})."
    )
    _clear(project)
    new_project(project, data="grammar", model="mini")
    _lengths(project, max_steps=20, checkpoint_every=20)
    for command in (["git", "init", "-q"], ["git", "add", "."], ["git", *WHO, "commit", "-qm", "benchmark"]):
        run(command, project)
    log("dvc repro evaluate, and again")
    dvc = [Path(sys.executable).parent / "dvc", "repro", "evaluate"]
    run(dvc, project)
    nothing = [run(dvc, project)[0] for _ in range(3)]
    lines.append(f"- `dvc repro evaluate` with nothing to do: {statistics.median(nothing):.1f} s.")
    return lines


CASES: dict[str, Callable[[Setting], list[str]]] = {
    "training": training,
    "decoding": decoding,
    "data": data,
    "start": start,
    "orchestration": orchestration,
}
WHO = ("-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost")


def new_project(root: Path, **presets: str) -> None:
    """Copy what the stages need into a folder of its own, with these presets in params.yaml."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("conf", "model", "pipeline", "sweeps", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True, ignore=ignored)
    for name in ("params.yaml", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    write_presets([f"{kind}={name}" for kind, name in presets.items()], root)


def edit(path: Path, key: str, value: Any) -> None:
    """Set "section.key" of a YAML file."""
    values = yaml.safe_load(path.read_text())
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[name] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _tiny_on_multi30k(setting: Setting) -> Path:
    """Make a project that trains tiny on Multi30k."""
    project = setting.folder / "orchestration"
    _clear(project)
    new_project(project, data="multi30k", model="tiny")
    shutil.copytree(setting.data, project / "data", dirs_exist_ok=True)
    return project


def _lengths(project: Path, max_steps: int, checkpoint_every: int) -> None:
    for key, value in (("max_steps", max_steps), ("checkpoint_every", checkpoint_every), ("validate_every", 1000)):
        edit(project / "params.yaml", f"train.{key}", value)


def _forget(project: Path) -> None:
    """Delete the runs."""
    _clear(*(project / name for name in ("checkpoints", "mlflow.db", "mlartifacts", "models")))


def _profile(system: System) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in system.shares.items() if name != OPERATORS)
    return (
        f"- {system.name}: operators take {system.shares[OPERATORS]:.0%} of the threads' time; the rest is overhead "
        f"between operators and waiting. Of the operators' time: {shares}."
    )


def _clear(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _config(preset: str) -> Any:
    from pipeline.common.settings import load_settings

    return load_settings(ROOT, model=preset).model.config(VOCAB_SIZE)


def _ceiling() -> tuple[float, str]:
    """FLOP/s of large products, and a sentence about it for the table."""
    rates = multiply_rates(THREADS)
    found = ", ".join(f"{rate / 1e9:.0f} GFLOP/s ({name})" for name, rate in rates.items())
    return max(rates.values()), (
        "The ceiling is the speed of a 2048 x 2048 x 2048 matrix product with the faster of torch's two libraries: "
        f"{found}."
    )


def _model(setting: Setting, preset: str) -> Path:
    """Make the weights for the search, and their exports."""
    folder = setting.folder / "models" / preset
    if not (folder / "spm.model").is_file():
        log(f"{preset}: makes the weights, once")
        options = (preset, "--folder", folder, "--data", setting.data)
        run(module("weights", sys.executable, *options), setting.folder)
    for kind in ("float32", "int8"):
        output = folder / f"ctranslate2-{kind}"
        if not (output / "model.bin").is_file():
            command = [sys.executable, "-m", "pipeline.export", "--quantization", kind, "--model", folder]
            run([*command, "--output", output], setting.folder)
    return folder
