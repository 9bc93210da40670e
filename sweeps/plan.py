"""Estimate what a sweep will cost before it starts: FLOPs, hours and money.

    python -m sweeps.plan                       the sweep of params.yaml, here
    python -m sweeps.plan --devices 8           on eight devices
    python -m sweeps.plan --rows A B --seeds 1 2 3 --model base
                                                other rows, seeds, another model

Reads params.yaml, data/encoded, checkpoints and data/sweep; prints a table and
writes nothing. FLOPs follow from the sizes of model and batches. "to train" is
the number of trials that need training: not those that are done, nor those that
only need evaluation, such as base after the train stage. "left" is for the
steps that no checkpoint has yet.

Hours are FLOPs divided by the rate of one device: sweep.flops_per_second or, if
that is 0, the rate of earlier training (of trials that are done, or of base).
If nothing is trained yet, the rate is measured in three seconds of training.
"""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.common import cli
from pipeline.common.paths import SWEEP
from pipeline.common.settings import Settings, load_settings, make_section
from sweeps.cost import has_results, is_done, render_plan
from sweeps.trials import load_sweep


def main() -> None:
    parser = cli.parser("sweeps.plan", __doc__)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="number of devices to compute on (default: all of this machine)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="replace sweep.rows, and ignore sweep.grid")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="replace sweep.seeds")
    parser.add_argument("--model", metavar="PRESET", help="replace `model` and `train` by a preset of conf/model")
    arguments = parser.parse_args()
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices must be >= 1, got {arguments.devices}")
    gpus = torch.cuda.device_count()
    with cli.exit_on_error("plan"):
        root = Path().resolve()
        sweep = load_sweep(root, settings_of(arguments))
        gpu = sweep.base.hardware.device == "gpu" or (sweep.base.hardware.device == "auto" and gpus > 0)
        if gpu and not gpus and not sweep.base.sweep.flops_per_second:
            raise ValueError(
                "hardware.device is gpu, but this machine has no GPU: set the rate of one in sweep.flops_per_second"
            )
        here = gpus if gpu else len(os.sched_getaffinity(0))
        if has_results(sweep, root) and not all(map(is_done, sweep.trials)):
            print(
                f"{SWEEP} has the results of all trials: `dvc repro` runs none, unless `dvc status sweep`\n"
                "reports a change. Not all of their checkpoints are here; running the sweep again would cost:\n"
            )
        print(render_plan(sweep, root, arguments.devices or here, gpu))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings of params.yaml, changed by the options of the command line."""
    settings = load_settings(Path(), **({"model": arguments.model} if arguments.model else {}))
    changes: dict[str, Any] = {}
    if arguments.rows:
        changes |= {"rows": arguments.rows, "grid": None}
    if arguments.seeds:
        changes["seeds"] = arguments.seeds
    return replace(settings, sweep=make_section("sweep", asdict(settings.sweep) | changes))


if __name__ == "__main__":
    main()
