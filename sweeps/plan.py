"""Estimate what a sweep will cost before it starts: FLOPs, hours and money, row by row.

    python -m sweeps.plan                                           what params.yaml asks for, on this machine
    python -m sweeps.plan --devices 8                               on eight devices
    python -m sweeps.plan --rows A B --seeds 1 2 3 --model base     of other rows, with other seeds, on another model

Reads params.yaml, whose section `sweep` can state the devices' rate and price (else the rate is measured here), and
data/encoded; prints a table and writes nothing. FLOPs follow from the sizes of model and batches. The plan has the
cost of the whole sweep, and of what is not done yet.
"""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.common import cli
from pipeline.common.settings import Settings, load_settings, make_section
from sweeps.cost import render_plan
from sweeps.trials import load_sweep


def main() -> None:
    parser = cli.parser("sweeps.plan", __doc__)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="how many compute at once (default: all of this machine)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="in place of sweep.rows (and without sweep.grid)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="in place of sweep.seeds")
    parser.add_argument("--model", metavar="PRESET", help="in place of `model` and `train`: a preset of conf/model")
    arguments = parser.parse_args()
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices must be >= 1, got {arguments.devices}")
    gpus = torch.cuda.device_count()
    with cli.exit_on_error("plan"):
        sweep = load_sweep(Path().resolve(), settings_of(arguments))
        gpu = sweep.base.hardware.device == "gpu" or (sweep.base.hardware.device == "auto" and gpus > 0)
        if gpu and not gpus and not sweep.base.sweep.flops_per_second:
            raise ValueError(
                "hardware.device is gpu and there is none here: state its rate in sweep.flops_per_second"
            )
        here = gpus if gpu else len(os.sched_getaffinity(0))
        print(render_plan(sweep, Path().resolve(), arguments.devices or here, gpu))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Those of params.yaml, with what the command line names in their place."""
    settings = load_settings(Path(), **({"model": arguments.model} if arguments.model else {}))
    changes: dict[str, Any] = {}
    if arguments.rows:
        changes |= {"rows": arguments.rows, "grid": None}
    if arguments.seeds:
        changes["seeds"] = arguments.seeds
    return replace(settings, sweep=make_section("sweep", asdict(settings.sweep) | changes))


if __name__ == "__main__":
    main()
