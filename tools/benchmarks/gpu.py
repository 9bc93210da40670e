"""Measure the speed of training base and big on a GPU.

    python -m tools.benchmarks.gpu
    python -m tools.benchmarks.gpu --device cpu --presets tiny --batch-tokens 500 \\
        --steps 1                                   # a short trial without a GPU

Steps have the paper's 25,000 source and 25,000 target tokens. Ours and
torch.nn.Transformer train alternately, with bf16 autocast, on random tokens.
Lengths of sentences are like those of WMT 2014 English-German. Ours uses
torch.compile and the settings of conf/hardware/gpu.yaml. Prints tokens per
second, the share of the GPU's rate in an 8192 x 8192 x 8192 matrix product,
peak memory, and the hours for the paper's number of steps.

Reads params.yaml and conf/. Of the dependencies, needs only torch, numpy,
pydantic, ruamel.yaml, filelock, psutil and tqdm.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.common.cli import exit_on_error, parser
from pipeline.common.settings import load_settings
from tools.benchmarks.harness import (
    ROOT,
    CommandError,
    System,
    flops_per_token,
    module,
    multiply_rate,
    paired,
    write_corpus,
)

VOCAB_SIZE, PAIRS = 37_000, 200_000  # section 5.1


def main() -> None:
    options = parser("tools.benchmarks.gpu", __doc__)
    options.add_argument(
        "--device", type=torch.device, default=torch.device("cuda"), help="device of torch (%(default)s)"
    )
    options.add_argument("--presets", nargs="+", default=["base", "big"], help="presets of conf/model (base big)")
    options.add_argument("--batch-tokens", type=int, default=25_000, help="target tokens per step (%(default)s)")
    options.add_argument("--steps", type=int, default=50, help="steps in a block (%(default)s)")
    options.add_argument("--rounds", type=int, default=5, help="blocks of each system (%(default)s)")
    arguments = options.parse_args()
    with exit_on_error("gpu", CommandError):
        measure(**vars(arguments))


def measure(device: torch.device, presets: list[str], batch_tokens: int, steps: int, rounds: int) -> None:
    """Print the table, each preset's rows as soon as they are measured."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU; try the benchmark with --device cpu")
    ceiling = _multiply_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    print(f"{name}, torch {torch.__version__}: a matrix product in bf16 runs at {ceiling / 1e12:.3g} TFLOP/s.\n")
    print("| | target tokens/s | TFLOP/s | share of that rate | ours / theirs | peak memory | hours for all steps |")
    print("|---|---:|---:|---:|---|---:|---:|")
    profiles = []
    with TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus(corpus, PAIRS, VOCAB_SIZE)
        for preset in presets:
            settings = load_settings(ROOT, model=preset, hardware="gpu")
            config = settings.model.config(VOCAB_SIZE)
            shared: list[object] = ["--corpus", corpus, "--sizes", json.dumps(vars(config)), "--device", device]
            shared += ["--bf16", "--threads", torch.get_num_threads(), "--steps", steps]
            shared += ["--batch-tokens", batch_tokens]
            own: list[object] = [
                "--compile",
                "--micro-batch-tokens",
                max(512, settings.hardware.micro_batch_tokens * batch_tokens // 25_000),
            ]
            ours = System(f"{preset}, ours", module("training", sys.executable, "ours", *shared, *own))
            peer = System(f"{preset}, torch.nn.Transformer", module("training", sys.executable, "torch", *shared))
            paired([ours, peer], rounds, profile=True)
            flops = flops_per_token(config, corpus)
            for system in (ours, peer):
                rate = system.median("tokens_per_s")
                hours = settings.train.max_steps * settings.train.batch_tokens / rate / 3600
                speed, share = f"{rate * flops / 1e12:.3g}", f"{rate * flops / ceiling:.0%}"
                ratio = "" if system is ours else ours.ratio(system, "tokens_per_s")
                cells = (system.name, f"{rate:,.0f}", speed, share, ratio, f"{system.peak_bytes / 1e9:.1f} GB")
                print(f"| {' | '.join(cells)} | {hours:.2f} |", flush=True)
            shares = ", ".join(f"{kernel[:60]} {share:.0%}" for kernel, share in ours.shares.items())
            profiles.append(f"- {ours.name}, where the time goes: {shares}.")
    print("", *profiles, sep="\n")


def _multiply_rate(device: torch.device) -> float:
    """FLOP/s of a large product in bf16: the ceiling of training."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    return multiply_rate(lambda: a @ b, size)


if __name__ == "__main__":
    main()
