"""Temporary copies of the project with a miniature corpus and model, used through the real command lines.

Starting Ray takes longer than all computations of such a copy, so `trained` is made once and shared.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SOURCES = (
    ".dvc",
    ".dvcignore",
    ".gitignore",
    ".rayignore",
    "conf",
    "data/.gitignore",
    "dvc.yaml",
    "metrics/.gitignore",
    "model",
    "models/.gitignore",
    "params.yaml",
    "pipeline",
    "reports/.gitignore",
    "sweeps",
)
PATIENCE_S = 900

CORPUS = {
    "data": dict(corpus="grammar", src="en", tgt="de", seed=5, train_pairs=700, valid_pairs=37, test_pairs=23),
    "validate": dict(max_words=50, max_length_ratio=4.0, max_dropped_share=0.2, drop_copies=False),
    "tokenize": dict(vocab_size=400, lowercase=False),
}
MODEL = {
    "model": dict(num_layers=1, d_model=16, d_ff=24, num_heads=2, d_k=8, d_v=8, dropout=0.1)
    | dict(positions="sinusoidal", norm="post", max_length=256),
    "train": dict(seed=1, label_smoothing=0.1, batch_tokens=700, max_steps=400, warmup_steps=50, lr_scale=1.0)
    | dict(beta1=0.9, beta2=0.98, eps=1e-9, max_grad_norm=0.0, log_every=7, validate_every=100, patience=0)
    | dict(bleu_sentences=10, checkpoint_every=10, keep_checkpoints=100, average_checkpoints=2),
}
HARDWARE = {
    "hardware": dict(num_workers=1, device="cpu", cpus_per_worker=1, precision="fp32", compile=False)
    | dict(micro_batch_tokens=256, max_failures=3)
}
EVALUATE = dict(beam=2, alpha=0.6, max_extra=3, engine="torch", batch_tokens=1024, num_samples=3)
SWEEP = dict(rows=["dropout"], seeds=[0], grid=None, scheduler="fifo", cpus_per_worker=1, num_workers=None) | dict(
    flops_per_second=1e9, price_per_device_hour=0.5
)


class Project:
    """A copy of the project in `root`, with methods that run its command lines."""

    def __init__(self, root: Path):
        self.root = root
        self.output = ""  # for `trained`: the output of `dvc repro`

    def copy(self, root: Path, without: tuple[str, ...]) -> "Project":
        """Copy the project except for MLflow's store, which has absolute paths, and `without`."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts", *without))
        return Project(root)

    def untrained_copy(self, root: Path) -> "Project":
        """Copy the project with its encoded corpus, but without training, also in DVC's lock and run cache."""
        copy = self.copy(
            root, without=("checkpoints", "models", "runs", "tmp", "train.json", "test.json", "evaluation.json")
        )
        lock = yaml.safe_load((root / "dvc.lock").read_text())
        del lock["stages"]["train"], lock["stages"]["evaluate"]
        copy.write_yaml("dvc.lock", lock)
        return copy

    @property
    def environment(self):
        not_ours = ("COVERAGE_", "DVC_", "MLFLOW_", "RAY_")  # coverage would also run in Ray's own processes
        ours = {name: value for name, value in os.environ.items() if not name.startswith(not_ours)}
        others = "CORPUS_MIRROR GIT_COMMIT OMP_NUM_THREADS PYTHONDONTWRITEBYTECODE PYTHONPATH RUN_STORAGE VIRTUAL_ENV"
        for name in others.split():
            ours.pop(name, None)
        identity = {
            f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        patient = {"OMP_WAIT_POLICY": "passive", "RAY_worker_niceness": "0"}  # for a machine with other work
        return ours | identity | patient | {"PATH": path}

    def run(self, *command, code=0, **environment):
        """Run a command that must end with `code`, and return its stdout and stderr together."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == code, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    @contextmanager
    def started(self, *command, **environment):
        """Start a command, whose output is in `log`. The end of the block kills it and all that it started."""
        environment = self.environment | environment
        with (self.root / "log.txt").open("w") as out:
            process = psutil.Popen(command, cwd=self.root, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                for ours in (*process.children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        ours.kill()
            process.wait()

    def wait_for(self, condition, what, patience_s=PATIENCE_S):
        """Wait until `condition` returns a true value, and return it."""
        deadline = time.monotonic() + patience_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{patience_s} s, and still no {what}"
            time.sleep(0.05)
        return found

    def log(self):
        return (self.root / "log.txt").read_text()

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def edit(self, path, key, value):
        """Set "section.key" of a YAML file."""
        values = yaml.safe_load((self.root / path).read_text())
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
        self.write_yaml(path, values)

    def write_yaml(self, path, values):
        self.write(path, yaml.safe_dump(values, sort_keys=False))

    def commit(self):
        self.run("git", "add", ".")
        self.run("git", "commit", "--quiet", "--message", "a miniature")

    def json(self, path):
        return json.loads((self.root / path).read_text())

    def experiments(self):
        """Return {branch or experiment: values of params.yaml}, as listed by `dvc exp show`."""
        baselines = json.loads(self.run("dvc", "exp", "show", "--json"))
        revisions = baselines + [r for b in baselines for e in b["experiments"] or () for r in e["revs"]]
        return {r["name"]: r["data"]["params"]["params.yaml"]["data"] for r in revisions if r["name"]}

    def checkpoints(self):
        return sorted(self.root.glob("checkpoints/*/step_*"))

    def weights(self):
        """Return the bytes of the final weights and of the last checkpoint, which has Adam's moments."""
        last = self.checkpoints()[-1] / "tensors.safetensors"
        return (self.root / "models/final/weights.safetensors").read_bytes(), last.read_bytes()

    @property
    def tracking_uri(self):
        return f"sqlite:///{self.root}/mlflow.db"

    def runs(self):
        """Return this project's MLflow runs."""
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("transformer")
        return client.search_runs([experiment.experiment_id])

    def only_run(self):
        (run,) = self.runs()
        return run

    def curve(self, metric):
        """Return (step, value) of each point in MLflow, in the order of arrival."""
        run_id = self.only_run().info.run_id
        return [
            (point.step, point.value) for point in MlflowClient(self.tracking_uri).get_metric_history(run_id, metric)
        ]


def make_project(root: Path) -> Project:
    """Make a copy in its own Git repository. Python finds model/ and pipeline/ of the current folder first."""
    root.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, root / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
            )
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / name)
    project = Project(root)
    for section, values in (CORPUS | MODEL | HARDWARE | {"evaluate": EVALUATE, "sweep": SWEEP}).items():
        project.edit("params.yaml", section, values)
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.commit()
    return project


@pytest.fixture
def new_project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which no stage has run. A test that edits it must undo the edit."""
    return make_project(tmp_path_factory.mktemp("untouched") / "project")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after one undisturbed `dvc repro` from raw text to BLEU, committed. `copy` it before changing it."""
    project = make_project(tmp_path_factory.mktemp("trained") / "project")
    project.output = project.run("dvc", "repro", "evaluate")
    project.commit()
    return project


FIGURES: dict[str, dict[str, object]] = {}
"""For the faults that tests have caused: what was lost, and how long recovery took."""


@pytest.fixture(scope="session")
def figures():
    """figures("what happened", **{"steps lost": 3}) is shown at the end of the tests."""

    def add(what: str, **values: object) -> None:
        FIGURES[what] = values

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for what, values in FIGURES.items():
            terminalreporter.line(f"{what}: {', '.join(f'{key} {value}' for key, value in values.items())}")
