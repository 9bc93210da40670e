"""The comparisons, each a function that gives the lines of its table."""

import csv
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from harness import ROOT, THREADS, Side, flops_per_token, multiply_rates, paired, run, say, script
from turns import Runner, slower_by

VOCAB_SIZE = 10_000


@dataclass(frozen=True)
class Setting:
    """`folder` keeps what is made; `peers` is the Python that has the others; `data` is Multi30k's, encoded."""

    folder: Path
    peers: Path
    data: Path
    rounds: int
    pairs: int

    @property
    def encoded(self) -> Path:
        return self.data / "encoded"


def training(setting: Setting) -> list[str]:
    """Tokens a second of ours, of MarianMTModel and of torch.nn.Transformer."""
    ceilings = multiply_rates(THREADS)
    ceiling = max(ceilings.values())
    found = ", ".join(f"{rate / 1e9:.0f} GFLOP/s by {name}" for name, rate in ceilings.items())
    lines = [
        "**Training**, steps of about 4,096 target tokens, single precision. The ceiling is the better of torch's "
        f"libraries at a product of 2048 x 2048 x 2048: {found}. Padding of ours: {_padding(setting):.1%}.",
        "",
        "| | target tokens/s | GFLOP/s | share of the ceiling | ours to it | peak memory |",
        "|---|---:|---:|---:|---|---:|",
    ]
    profiles = []
    for preset, steps, rounds in (("tiny", 10, setting.rounds), ("base", 1, max(3, setting.rounds - 2))):
        config = _config(preset)
        common = ("--corpus", setting.encoded, "--sizes", json.dumps(vars(config)), "--steps", steps)
        common += ("--threads", THREADS)
        ours = Side(f"{preset}, ours", script("training.py", sys.executable, "ours", *common))
        others = [
            Side(f"{preset}, {name}", script("training.py", setting.peers, side, *common))
            for side, name in (("marian", "transformers' MarianMTModel"), ("torch", "torch.nn.Transformer"))
        ]
        paired([ours, *others], rounds, profile=True)
        profiles.append(_profile(ours))
        flops = flops_per_token(config, setting.encoded)
        for side in (ours, *others):
            rate = side.median("tokens_per_s")
            ratio = "" if side is ours else ours.ratio(side, "tokens_per_s")
            speed, share = f"{rate * flops / 1e9:.0f}", f"{rate * flops / ceiling:.0%}"
            cells = (side.name, f"{rate:,.0f}", speed, share, ratio, f"{side.peak_bytes / 1e9:.2f} GB")
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *profiles]


def decoding(setting: Setting) -> list[str]:
    """Sentences a second of ours, of MarianMTModel.generate and of CTranslate2, from the same weights."""
    lines = [
        "**Decoding**, beam 4, Multi30k's test 2016. Tiny was trained for four epochs; base has random weights, and "
        "every output has its source's pieces and 10 more. CTranslate2 ends a search with four finished outputs, "
        "whatever else is growing; with patience 2, which evaluate.engine has for the outputs of ours, with eight.",
        "",
        "| | sentences/s | output pieces/s | ours to it | peak memory |",
        "|---|---:|---:|---|---:|",
    ]
    profiles = []
    for preset, sentences, rounds in (("tiny", 1000, setting.rounds), ("base", 100, max(3, setting.rounds - 2))):
        model = _model(setting, preset)
        common = ("--encoded", setting.encoded, "--sentences", sentences, "--threads", THREADS)
        common += ("--cap",) if preset == "base" else ()
        ours = Side(f"{preset}, ours", script("decoding.py", sys.executable, "ours", "--model", model, *common))
        generate = script("decoding.py", setting.peers, "generate", "--model", model, *common)
        others = [Side(f"{preset}, transformers' generate", generate)]
        for side, workers, patience in (("float32", 2, 1), ("float32", 2, 2), ("float32", 1, 1), ("int8", 2, 1)):
            export = model / f"ctranslate2-{side}"
            options = ("--model", export, "--workers", workers, "--patience", patience, *common)
            name = f"{preset}, CTranslate2 {side}, {workers} x {THREADS // workers} threads"
            name += ", patience 2" if patience == 2 else ""
            others.append(Side(name, script("decoding.py", sys.executable, side, *options)))
        paired([ours, *others], rounds, profile=True)
        profiles.append(_profile(ours))
        for side in (ours, *others):
            ratio = "" if side is ours else ours.ratio(side, "sentences_per_s")
            rates = (f"{side.median('sentences_per_s'):,.1f}", f"{side.median('tokens_per_s'):,.0f}")
            lines.append(f"| {side.name} | {' | '.join(rates)} | {ratio} | {side.peak_bytes / 1e9:.2f} GB |")
    return [*lines, "", *profiles]


def data(setting: Setting) -> list[str]:
    """The stages from text to pieces, beside SentencePiece alone; the plan of an epoch."""
    project = setting.folder / "data"
    _clear(project)
    new_project(project, data="files", model="mini")
    _write_pairs(setting.data / "raw", project / "data/own", setting.pairs)
    lines = [
        f"**Data**, {setting.pairs:,} pairs, each two of Multi30k's by chance, {VOCAB_SIZE:,} pieces.",
        "",
        "| | seconds | pairs/s | peak memory |",
        "|---|---:|---:|---:|",
    ]
    edit(project / "conf/data/files.yaml", "tokenize.vocab_size", VOCAB_SIZE)
    rows = []
    for stage in ("download", "validate", "train_tokenizer", "encode"):
        say(stage)
        rows.append((stage, *run([sys.executable, "-m", f"pipeline.{stage}"], project)))
    sides = [
        Side(f"pieces by {name}", script("preparation.py", sys.executable, side, "--data", project / "data"))
        for side, name in (("encode", "encode"), ("sentencepiece", "SentencePiece alone"))
    ]
    paired(sides, 3)
    rows += [(side.name, side.median("seconds"), side.peak_bytes) for side in sides]
    lines += [
        f"| {name} | {took:.1f} | {setting.pairs / took:,.0f} | {peak / 1e9:.2f} GB |" for name, took, peak in rows
    ]
    plan = Side("plan", script("preparation.py", sys.executable, "plan"))
    paired([plan], 1)
    (block,) = plan.blocks
    lines += [
        "",
        f"Encode over SentencePiece alone, pairs a second: {sides[0].ratio(sides[1], 'pairs_per_s')}.",
        f"The plan of 4.5 million pairs: {block['plan_s']:.1f} s once, {block['epoch_s']:.1f} s an epoch, "
        f"{block['resume_s']:.1f} s to the first batch in the middle of one, {plan.peak_bytes / 1e9:.2f} GB.",
    ]
    return lines


def _write_pairs(raw: Path, own: Path, num_pairs: int) -> None:
    """Two sentences make about the length of WMT's."""
    rng = random.Random(1)
    for split in ("train", "valid", "test"):
        sides = [(raw / f"{split}.{code}").read_text(encoding="utf-8").splitlines() for code in ("en", "de")]
        number = num_pairs if split == "train" else len(sides[0])
        chosen = [rng.choices(range(len(sides[0])), k=2) for _ in range(number)]
        for lines, code in zip(sides, ("en", "de"), strict=True):
            text = "".join(f"{lines[i]} {lines[j]}\n" for i, j in chosen)
            (own / f"{split}.{code}").write_text(text, encoding="utf-8")


def orchestration(setting: Setting) -> list[str]:
    """What Ray Train, MLflow and checkpoints add; how long until the first step; two workers; nothing to do."""
    project = setting.folder / "orchestration"
    _clear(project)
    new_project(project, data="multi30k", model="tiny")
    shutil.copytree(setting.data, project / "data", dirs_exist_ok=True)
    starts = []
    _lengths(project, "tiny", max_steps=2, checkpoint_every=2)
    for number in range(3):
        say(f"round {number + 1} of 3: two steps")
        _forget(project)
        began = time.time()
        run([sys.executable, "-m", "pipeline.train"], project)
        (usage,) = (json.loads(path.read_text()) for path in project.glob("checkpoints/*/usage/*.json"))
        starts.append(usage["first_step_at"] - began)
    slower = []
    _lengths(project, "tiny", max_steps=10_000, checkpoint_every=100)
    for number in range(setting.rounds):
        say(f"round {number + 1} of {setting.rounds}: python -m pipeline.train and the bare loop in turns")
        _forget(project)
        whole = Runner([sys.executable, "-m", "pipeline.train"], project, "checkpoints/*/progress.json")
        alone = project / "bare"
        _clear(alone)
        alone.mkdir()
        command = script("orchestration.py", sys.executable, "--project", project, "--progress", alone / "told.json")
        bare = Runner(command, alone, "told.json")
        with whole.started(25), bare.started(3):  # after the first point of the curve, for which MLflow is imported
            slower.append(slower_by(whole, bare, turns=24, turn_s=5))
            shares = [[f"{share:.1%}" for share in runner.shares()] for runner in (whole, bare)]
    lines = [
        "**Orchestration**",
        "",
        "- A step of tiny under Ray Train with MLflow and a checkpoint every 100, beside the bare loop's: "
        f"{statistics.median(slower):+.1%} ({min(slower):+.1%} to {max(slower):+.1%}).",
        "- Of the cores' time, in the last round: {} by the two threads at micro-batches, {} by the worker's others "
        "(one adds gradients and updates weights), {} by other processes; of the bare loop, {}, {}, {}.".format(
            *shares[0], *shares[1]
        ),
        f"- Command to first step: {statistics.median(starts):.1f} s ({min(starts):.1f} to {max(starts):.1f}).",
    ]
    edit(project / "params.yaml", "model", "base")
    _lengths(project, "base", max_steps=6, checkpoint_every=6)
    edit(project / "conf/model/base.yaml", "train.batch_tokens", 4096)
    edit(project / "conf/model/base.yaml", "train.log_every", 1)
    edit(project / "conf/hardware/auto.yaml", "hardware.cpus_per_worker", 1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(setting.rounds):
        for workers, found in rates.items():
            say(f"round {number + 1} of {setting.rounds}: base on {workers} workers of one thread")
            edit(project / "conf/hardware/auto.yaml", "hardware.num_workers", workers)
            _clear(project / "checkpoints")  # or one worker's run would be two's as well
            run([sys.executable, "-m", "pipeline.train"], project, OMP_NUM_THREADS="1")
            points = csv.DictReader((project / "reports/training_curve.csv").read_text().splitlines())
            found.append(statistics.median([float(point["tokens_per_second"]) for point in points][2:]))
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    one, two = map(statistics.median, rates.values())
    lines.append(
        f"- Base on workers of one thread, from the third step on: {one:,.0f} tokens/s by one, {two:,.0f} by two: "
        f"{statistics.median(ratios):.2f} times as many ({min(ratios):.2f} to {max(ratios):.2f})."
    )
    _clear(project)
    new_project(project, data="grammar", model="nano")
    _lengths(project, "nano", max_steps=20, checkpoint_every=20)
    for command in (["git", "init", "-q"], ["git", "add", "."], ["git", *WHO, "commit", "-qm", "benchmark"]):
        run(command, project)
    say("dvc repro evaluate, and again")
    dvc = [Path(sys.executable).parent / "dvc", "repro", "evaluate"]
    run(dvc, project)
    nothing = [run(dvc, project)[0] for _ in range(3)]
    lines.append(f"- `dvc repro evaluate` with nothing to do: {statistics.median(nothing):.1f} s.")
    return lines


CASES: dict[str, Callable[[Setting], list[str]]] = {
    "training": training,
    "decoding": decoding,
    "data": data,
    "orchestration": orchestration,
}
WHO = ("-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost")


def new_project(root: Path, **presets: str) -> None:
    """What the stages need, in a folder of its own; `presets` as in params.yaml."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("conf", "model", "pipeline", "sweeps", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True, ignore=ignored)
    for name in ("params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "data/own/.gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for key, value in presets.items():
        edit(root / "params.yaml", key, value)


def edit(path: Path, key: str, value: Any) -> None:
    """Set "section.key" of a YAML file."""
    values = yaml.safe_load(path.read_text())
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[name] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _lengths(project: Path, preset: str, max_steps: int, checkpoint_every: int) -> None:
    for key, value in (("max_steps", max_steps), ("checkpoint_every", checkpoint_every), ("validate_every", 1000)):
        edit(project / f"conf/model/{preset}.yaml", f"train.{key}", value)


def _forget(project: Path) -> None:
    """The runs."""
    _clear(*(project / name for name in ("checkpoints", "mlflow.db", "mlartifacts", "models")))


def _profile(side: Side) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in side.shares.items())
    return f"- {side.name}, by operator: {shares}."


def _clear(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _config(preset: str) -> Any:
    from pipeline.params import load_settings

    return load_settings(ROOT, model=preset).model.config(VOCAB_SIZE)


def _padding(setting: Setting) -> float:
    """The share of padding in our training batches."""
    from pipeline.corpus import EncodedSplit
    from pipeline.params import load_settings
    from pipeline.worker import batch_plan

    settings = load_settings(ROOT, model="tiny")
    return batch_plan(EncodedSplit.open(setting.encoded, "train"), settings).padding_share()


def _model(setting: Setting, preset: str) -> Path:
    """Weights to decode by, and their export."""
    folder = setting.folder / "models" / preset
    if not (folder / "config.json").is_file():
        say(f"{preset}: makes the weights, once")
        options = (preset, "--folder", folder, "--data", setting.data)
        run(script("weights.py", sys.executable, *options), setting.folder)
    for kind in ("float32", "int8"):
        output = folder / f"ctranslate2-{kind}"
        if not (output / "model.bin").is_file():
            command = [sys.executable, "-m", "pipeline.export", "--quantization", kind, "--model", folder]
            run([*command, "--tokenizer", setting.data / "tokenizer", "--output", output], setting.folder)
    return folder
