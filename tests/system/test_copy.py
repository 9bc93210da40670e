"""A model learns to copy and to reverse (Sockeye's system test), through the command line and new presets.

One corpus has both: "copy b a d" becomes "b a d", "turn b a d" becomes "d a b". Each run of the test has a new seed,
so that the thresholds hold for the task and not for one curve.
"""

import csv
import random

import pytest
from sacrebleu import corpus_bleu

pytestmark = pytest.mark.slow

PAIRS = {"train": 6000, "valid": 100, "test": 100}
CORPUS = {
    "data": dict(corpus="own", src="en", tgt="de"),
    "validate": dict(max_words=20, max_length_ratio=4.0, max_dropped_share=0.0, drop_copies=False),
    "tokenize": dict(vocab_size=290, lowercase=False),
}
MODEL = {
    "model": dict(num_layers=1, d_model=64, d_ff=128, num_heads=4, d_k=16, d_v=16, dropout=0.0)
    | dict(positions="sinusoidal", norm="pre", max_length=64),
    "train": dict(label_smoothing=0.0, batch_tokens=2000, max_steps=600, warmup_steps=100, lr_scale=1.0)
    | dict(beta1=0.9, beta2=0.98, eps=1e-9, max_grad_norm=0.0, log_every=50, validate_every=200, patience=0)
    | dict(checkpoint_every=25, keep_checkpoints=5, average_checkpoints=5),
}


def sentence_pairs(rng, count):
    """Return `count` different pairs."""
    pairs = {}
    while len(pairs) < count:
        letters = [rng.choice("abcdefgh") for _ in range(rng.randint(4, 6))]
        marker = rng.choice(("copy", "turn"))
        pairs[" ".join((marker, *letters))] = " ".join(letters if marker == "copy" else reversed(letters))
    return list(pairs.items())


def test_exp_run_learns_to_copy_and_to_reverse(new_project):
    seed = random.randrange(1_000_000)
    pairs = iter(sentence_pairs(random.Random(seed), sum(PAIRS.values())))
    for split, count in PAIRS.items():
        texts = zip(*(next(pairs) for _ in range(count)), strict=True)
        for code, lines in zip(("en", "de"), texts, strict=True):
            new_project.write(f"data/own/{split}.{code}", "\n".join(lines) + "\n")
    new_project.write_yaml("conf/data/letters.yaml", CORPUS)
    new_project.write_yaml("conf/model/copier.yaml", MODEL)
    new_project.run("python", "-m", "pipeline.preset", "data=letters", "model=copier")
    new_project.commit()
    settings = ("--set-param", f"train.seed={seed}", "--set-param", "hardware.micro_batch_tokens=2048")
    new_project.run("dvc", "exp", "run", "--name", "both", *settings, "evaluate")

    assert new_project.json("reports/evaluation.json")["test"]["ppl"] <= 1.05, f"seed {seed}"
    with (new_project.root / "reports/translations.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for marker in ("copy", "turn"):
        ours = [row for row in rows if row["source"].startswith(marker)]
        bleu = corpus_bleu([row["translation"] for row in ours], [[row["reference"] for row in ours]], force=True)
        assert bleu.score >= 95, f"{marker}, seed {seed}: {bleu}"
    listed = new_project.experiments()["both"]
    assert (listed["data"]["corpus"], listed["model"]["d_model"], listed["train"]["seed"]) == ("own", 64, seed)
