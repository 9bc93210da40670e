"""How fast, beside others: training, decoding, data, start, orchestration. Takes more than an hour.

    python tools/benchmarks                          # all; the table goes to docs/performance.md
    python tools/benchmarks training decoding        # some; the table goes to the terminal alone

Others run in an environment of their own, which the first call makes (tools/benchmarks/peers.txt). The text is
Multi30k, from the web or from the folder CORPUS_MIRROR. What is made stays in .benchmarks/, for the next time.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness import HERE, ROOT, THREADS, machine, run, say

sys.path.insert(0, str(ROOT))

import cases

DOCUMENT, BEGIN, END = ROOT / "docs/performance.md", "<!-- begin -->\n", "<!-- end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[*cases.CASES, []], help=", ".join(cases.CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison (5)")
    parser.add_argument("--pairs", type=int, default=300_000, help="of the corpus for the data stages (300,000)")
    parser.add_argument(
        "--text",
        nargs=2,
        type=Path,
        metavar=("SRC", "TGT"),
        help="its text, by lines (.gz too), repeated to --pairs",
    )
    arguments = parser.parse_args()
    folder = ROOT / ".benchmarks"
    folder.mkdir(exist_ok=True)
    text = tuple(arguments.text) if arguments.text else None
    setting = cases.Setting(folder, _peers(folder), _corpus(folder), arguments.rounds, arguments.pairs, text)
    table = f"{datetime.date.today()}; {machine()}; {THREADS} threads.\n"
    print(table)
    for name in arguments.cases or cases.CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        part = "\n".join([*cases.CASES[name](setting), ""])
        print(part, flush=True)  # what is measured is not lost if a later part fails
        table += f"\n{part}"
    if not arguments.cases:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(before + BEGIN + table + END + after, encoding="utf-8")


def _peers(folder: Path) -> Path:
    """The Python of the environment with the others."""
    wanted, python = (HERE / "peers.txt").read_text(), folder / "peers/bin/python"
    installed = folder / "peers/installed.txt"
    if not installed.is_file() or installed.read_text() != wanted:
        say("installs the others, once")
        shutil.rmtree(folder / "peers", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "peers"], check=True)
        run([python, "-m", "pip", "install", "-r", HERE / "peers.txt"], folder)
        installed.write_text(wanted)
    return python


def _corpus(folder: Path) -> Path:
    """The data/ of Multi30k, encoded by the stages themselves."""
    project = folder / "multi30k"
    if not (project / "data/encoded/meta.json").is_file():
        say("makes the corpus, once")
        cases.new_project(project, data="multi30k", model="tiny")
        for stage in ("download", "validate", "train_tokenizer", "encode"):
            run([sys.executable, "-m", f"pipeline.{stage}"], project)
    return project / "data"


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
