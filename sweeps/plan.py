"""Estimate what a sweep will cost before it starts: FLOPs, hours and money, row by row.

    python -m sweeps.plan                on this machine, at the rate that is measured here
    python -m sweeps.plan --devices 8    on eight devices

Reads params.yaml, whose section `sweep` can state the devices' rate and price, and data/encoded; prints a table and
writes nothing. FLOPs follow from the sizes of model and batches; trials that are done already are left out.
"""

import os
from pathlib import Path

import torch

from pipeline.common import cli
from sweeps.cost import render_plan
from sweeps.trials import load_sweep


def main() -> None:
    parser = cli.parser("sweeps.plan", __doc__)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="how many compute at once (default: all of this machine)"
    )
    arguments = parser.parse_args()
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices must be >= 1, got {arguments.devices}")
    gpus = torch.cuda.device_count()
    with cli.exit_on_error("plan"):
        sweep = load_sweep(Path().resolve())
        gpu = sweep.base.hardware.device == "gpu" or (sweep.base.hardware.device == "auto" and gpus > 0)
        if gpu and not gpus and not sweep.base.sweep.flops_per_second:
            raise ValueError(
                "hardware.device is gpu and there is none here: state its rate in sweep.flops_per_second"
            )
        here = gpus if gpu else len(os.sched_getaffinity(0))
        print(render_plan(sweep, Path().resolve(), arguments.devices or here, gpu))


if __name__ == "__main__":
    main()
