"""Compare the speed of training, decoding and more with other toolkits.

    python -m tools.benchmarks                      # all parts, more than an hour
    python -m tools.benchmarks training decoding    # some parts

Prints a table for each part. When all parts run, also writes the tables to
docs/performance.md.

The first call installs the other toolkits (tools/benchmarks/peers.txt) in an
environment of their own. Reads Multi30k from the web, or from the folder
CORPUS_MIRROR. Writes to .benchmarks/, which later calls use again.
"""

import datetime
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.common.cli import exit_on_error, parser
from tools.benchmarks.cases import CASES, Setting, new_project
from tools.benchmarks.harness import ROOT, THREADS, CommandError, log, machine, run

PEERS = Path(__file__).with_name("peers.txt")
DOCUMENT, BEGIN, END = ROOT / "docs/performance.md", "<!-- begin -->\n", "<!-- end -->\n"


def main() -> None:
    options = parser("tools.benchmarks", __doc__)
    options.add_argument("parts", nargs="*", choices=[*CASES, []], metavar="PART", help=", ".join(CASES))
    options.add_argument("--rounds", type=int, default=5, help="rounds of each comparison (%(default)s)")
    options.add_argument(
        "--pairs", type=int, default=300_000, help="sentence pairs of the corpus for the data stages (%(default)s)"
    )
    options.add_argument(
        "--text",
        nargs=2,
        type=Path,
        metavar=("SRC", "TGT"),
        help="files of that corpus, one sentence per line (also .gz), repeated up to --pairs",
    )
    arguments = options.parse_args()
    with exit_on_error("benchmarks", CommandError):
        measure(arguments.parts, arguments.rounds, arguments.pairs, arguments.text)


def measure(parts: list[str], rounds: int, pairs: int, text: list[Path] | None) -> None:
    """Print the table of each part. Without `parts`, measure all and write their tables to DOCUMENT, too."""
    folder = ROOT / ".benchmarks"
    folder.mkdir(exist_ok=True)
    source_and_target = (text[0], text[1]) if text else None
    setting = Setting(folder, _peers(folder), _corpus(folder), rounds, pairs, source_and_target)
    table = f"{datetime.date.today()}; {machine()}; {THREADS} threads.\n"
    print(table)
    for name in parts or CASES:
        log(f"{name} ...")
        part = "\n".join([*CASES[name](setting), ""])
        print(part, flush=True)  # at once, in case a later part fails
        table += f"\n{part}"
    if not parts:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(before + BEGIN + table + END + after, encoding="utf-8")


def _peers(folder: Path) -> Path:
    """Install the other toolkits in an environment, once. Returns its Python."""
    wanted, python = PEERS.read_text(), folder / "peers/bin/python"
    installed = folder / "peers/installed.txt"
    if not installed.is_file() or installed.read_text() != wanted:
        log("installing the other toolkits, once")
        shutil.rmtree(folder / "peers", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "peers"], check=True)
        run([python, "-m", "pip", "install", "-r", PEERS], folder)
        installed.write_text(wanted)
    return python


def _corpus(folder: Path) -> Path:
    """Run the data stages on Multi30k, once. Returns the data folder."""
    project = folder / "multi30k"
    if not (project / "data/encoded/meta.json").is_file():
        log("preparing the corpus, once")
        new_project(project, data="multi30k", model="tiny")
        for stage in ("download", "validate", "train_tokenizer", "encode"):
            run([sys.executable, "-m", f"pipeline.{stage}"], project)
    return project / "data"


if __name__ == "__main__":
    main()
