"""Faults on a cluster of three hosts (tools/local_cluster.py): training always ends with the undisturbed weights.

    python -m pytest -m host tests/system/test_hosts.py

It prints figures at its end, which are those of docs/cluster.md.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from tools import local_cluster

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]
REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tools.local_cluster"]
CHECKPOINT_EVERY, STEPS = 10, 200
LONG = 50_000
"""More steps than a test waits for; the test stops the run."""
PATIENCE_S = 400
LOSS_TOLERANCE = 5e-3
"""Relative tolerance of the validation loss after all steps, if only the order of additions differs."""


class Cluster:
    """tools/local_cluster.py in a separate folder. All hosts see `shared`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared = folder, folder / "shared"
        self.variables = os.environ | {"LOCAL_CLUSTER_DIR": str(folder), "PYTHONPATH": str(REPOSITORY)}

    @cached_property
    def network(self) -> str:
        """Return the first three numbers of all addresses."""
        return re.search(r"http://(\d+\.\d+\.\d+)\.", self.environment["MLFLOW_TRACKING_URI"]).group(1)

    def __call__(self, *words: str) -> str:
        done = subprocess.run([*COMMAND, *words], env=self.variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that `python -m tools.local_cluster env` exports."""
        return dict(line.removeprefix("export ").split("=", 1) for line in self("env").splitlines())

    def workers(self) -> dict[str, list[psutil.Process]]:
        """Return the training workers on each host."""
        found: dict[str, list[psutil.Process]] = {}
        for host in ("head", "worker1", "worker2"):
            pids = subprocess.run(
                ["ip", "netns", "pids", f"lc{self.network.split('.')[2]}-{host}"], capture_output=True, text=True
            ).stdout.split()
            for pid in map(int, pids):
                try:
                    process = psutil.Process(pid)
                    if "".join(process.cmdline()[:1]).startswith("ray::RayTrainWorker"):  # empty if it is ending
                        found.setdefault(host, []).append(process)
                except psutil.NoSuchProcess:
                    continue
        return found

    def busy_worker_host(self) -> str:
        """Return a host with training workers that is not the head."""
        return next(host for host in self.workers() if host != "head")

    def heal(self) -> None:
        """Restore all hosts, links and servers as `up` made them."""
        status = self("status")
        for host in ("head", "worker1", "worker2"):
            line = next(line for line in status.splitlines() if line.startswith(host))
            if "link cut" in line:
                self("mend", host)
            if "Ray away" in line or "link cut" in line:
                self("start", host)
        if "is away" in next(line for line in status.splitlines() if line.startswith("mlflow")):
            self("start", "mlflow")


class Run:
    """A training of the miniature on the cluster, with its own storage and experiment."""

    def __init__(self, project, cluster: Cluster, name: str, published: Path) -> None:
        self.project, self.cluster, self.storage = project, cluster, cluster.shared / name
        shutil.copytree(published / "data", self.storage / "data", dirs_exist_ok=True)
        project.edit("params.yaml", "tracking.experiment", name)
        self.experiment = name

    @property
    def environment(self) -> dict[str, str]:
        return self.cluster.environment | {"RUN_STORAGE": str(self.storage)}

    def submit(self, *words: str, code: int = 0) -> str:
        self.output = self.project.run(
            "python", "-m", "pipeline.submit", "train", *words, code=code, **self.environment
        )
        return self.output

    @contextmanager
    def submitted(self, what: str = "train") -> Iterator[psutil.Popen]:
        """Start the command that submits the job and shows its log.

        The end of the block stops a job that still runs, as a user would, even if the test has failed: otherwise it
        would take the next test's CPUs.
        """
        with self.project.started("python", "-m", "pipeline.submit", what, **self.environment) as process:
            try:
                yield process
            finally:
                stop = [line for line in self.project.log().splitlines() if line.startswith("  stop:")]
                if process.poll() is None and stop:
                    self.project.run(*stop[0].split()[1:], **self.environment)
                    self.project.wait_for(lambda: not self.cluster.workers(), "end of the workers", PATIENCE_S)

    def finish(self, process: psutil.Popen, code: int = 0) -> None:
        assert process.wait(PATIENCE_S) == code, self.project.log()
        self.output = self.project.log()

    @property
    def folder(self) -> Path | None:
        return next(self.storage.glob("checkpoints/*"), None)

    def step(self) -> int:
        """Return the step that training has reported."""
        try:
            return json.loads((self.folder / "progress.json").read_text())["step"] if self.folder else 0
        except (OSError, ValueError):
            return 0

    def checkpoint(self) -> int:
        """Return the step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in self.storage.glob("checkpoints/*/step_*")), default=0)

    def await_step(self, step: int) -> None:
        self.project.wait_for(lambda: self.step() >= step, f"step {step}: {self.project.log()}", PATIENCE_S)

    def disturb(self, fault) -> dict[str, float]:
        """Cause a fault during training, wait until training is where it was, and return the figures."""
        self.project.wait_for(
            lambda: self.step() > 20 and self.step() % CHECKPOINT_EVERY > 4, f"step: {self.project.log()}", PATIENCE_S
        )
        before, saved, began = self.step(), self.checkpoint(), time.monotonic()
        fault()
        resumed = self.project.wait_for(self.resumed, f"recovery: {self.project.log()}", PATIENCE_S)
        self.await_step(before + 1)
        seconds = time.monotonic() - began
        assert resumed >= saved
        assert before - resumed <= CHECKPOINT_EVERY
        return {"steps lost": max(0, before - resumed), "seconds to recover": round(seconds)}

    def resumed(self) -> int:
        """Return the step from which training last resumed, or 0."""
        try:
            messages = json.loads((self.folder / "progress.json").read_text())["messages"]
        except (OSError, ValueError):  # not written yet
            return 0
        steps = [re.fullmatch(r"continuing from the checkpoint of step (\d+)", line) for line in messages]
        return int(steps[-1].group(1)) if steps and steps[-1] else 0

    def state(self, step: int = STEPS) -> dict:
        return json.loads((self.folder / f"step_{step:08d}" / "state.json").read_text())["state"]

    def tensors(self, step: int = STEPS) -> Path:
        return self.folder / f"step_{step:08d}" / "tensors.safetensors"

    def mlflow_run(self):
        client = MlflowClient(self.cluster.environment["MLFLOW_TRACKING_URI"])
        (run,) = client.search_runs([client.get_experiment_by_name(self.experiment).experiment_id])
        return run

    def curve(self, metric: str) -> list[tuple[int, float]]:
        client = MlflowClient(self.cluster.environment["MLFLOW_TRACKING_URI"])
        return [(p.step, p.value) for p in client.get_metric_history(self.mlflow_run().info.run_id, metric)]

    def assert_curves_are_whole(self) -> None:
        state = self.state()
        for name, points in (("train_loss", state["training_curve"]), ("valid_loss", state["validation_curve"])):
            assert self.curve(name) == [(point["step"], point[name]) for point in points]
        assert self.mlflow_run().info.status == "FINISHED"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="lc", dir="/var/tmp"))  # the paths of sockets in it must be short
    folder.rmdir()
    cluster = Cluster(folder)
    cluster("up")  # leaves nothing if it fails
    try:
        yield cluster
    finally:
        cluster("down")


@pytest.fixture(scope="module")
def project(trained, tmp_path_factory):
    """The miniature with its encoded corpus, for two workers of one CPU each. Steps are long enough to interrupt."""
    project = trained.untrained_copy(tmp_path_factory.mktemp("cluster") / "project")
    project.edit("params.yaml", "hardware.num_workers", 2)
    project.edit("params.yaml", "train.batch_tokens", 2800)
    project.edit("params.yaml", "train.max_steps", STEPS)
    project.edit("params.yaml", "train.checkpoint_every", CHECKPOINT_EVERY)
    project.edit("params.yaml", "train.validate_every", 40)
    project.commit()
    return project


@pytest.fixture(scope="module")
def published(cluster: Cluster, project) -> Path:
    project.run("python", "-m", "pipeline.publish", **cluster.environment)
    return cluster.shared


@pytest.fixture
def new_run(cluster: Cluster, project, published: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    cluster.heal()
    changed = ("params.yaml", "params.yaml", "params.yaml")
    settings = {path: (project.root / path).read_text() for path in changed}
    name = re.sub(r"\W+", "_", request.node.name.removeprefix("test_"))[:60]
    project.wait_for(lambda: not cluster.workers(), "end of the workers before", PATIENCE_S)
    yield Run(project, cluster, name, published)
    for path, text in settings.items():
        project.write(path, text)
    cluster.heal()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, project, published: Path) -> Run:
    """A training by two workers on two hosts, without a fault."""
    run = Run(project, cluster, "undisturbed", published)
    with run.submitted() as job:
        run.await_step(10)
        run.hosts = list(cluster.workers())
        run.finish(job)
    return run


def assert_same_weights(run: Run, undisturbed: Run) -> None:
    assert run.tensors().read_bytes() == undisturbed.tensors().read_bytes()


def assert_close_early(run: Run, undisturbed: Run, step: int = 20) -> None:
    """Compare weights and moments of an early step: rounding errors grow with the steps."""
    ours, theirs = load_file(run.tensors(step)), load_file(undisturbed.tensors(step))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_local_cluster_next_to_another_has_its_own_names_and_ends_alone(cluster, tmp_path, monkeypatch):
    cluster.heal()
    monkeypatch.setattr(local_cluster, "STATE", tmp_path)
    local_cluster.make_bridge()
    local_cluster.make_host("head")
    network = local_cluster.gateway().rpartition(".")[0]
    namespace = Path("/run/netns", local_cluster.netns_name("head"))
    assert namespace.exists()
    local_cluster.down()
    assert network != cluster.network
    assert not namespace.exists()
    assert cluster("status").count("Ray alive") == 3


def test_train_on_two_hosts_reaches_the_loss_of_one(undisturbed, new_run, figures):
    new_run.project.edit("params.yaml", "hardware.num_workers", 1)
    new_run.submit()
    assert len(undisturbed.hosts) == 2
    assert_close_early(new_run, undisturbed)
    ours, theirs = (run.state()["validation_curve"][-1]["valid_loss"] for run in (new_run, undisturbed))
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    difference = f"{abs(ours - theirs) / theirs:.1e} of it"
    figures("two workers on two hosts against one", **{"validation loss differs by": difference})
    tags = undisturbed.mlflow_run().data.tags
    assert (tags["run.nodes"], tags["device"]) == ("3", "cpu")
    commit = new_run.project.run("git", "rev-parse", "HEAD").strip()
    assert (tags["git_commit"], tags["git_dirty"]) == (commit, "true")


def test_train_resumes_after_a_killed_worker(undisturbed, new_run, figures):
    with new_run.submitted() as job:

        def fault():
            next(iter(new_run.cluster.workers().values()))[0].kill()

        figures("a worker process is killed (-9)", **new_run.disturb(fault))
        new_run.finish(job)
    assert_same_weights(new_run, undisturbed)
    new_run.assert_curves_are_whole()


@pytest.mark.parametrize(
    ("fault", "name"),
    [("kill", "a host's raylet is killed (-9)"), ("cut", "the link to a host is cut")],
    ids=["kill", "cut"],
)
def test_train_resumes_after_a_lost_host(undisturbed, new_run, figures, fault, name):
    with new_run.submitted() as job:
        figures(name, **new_run.disturb(lambda: new_run.cluster(fault, new_run.cluster.busy_worker_host())))
        new_run.finish(job)
    assert_same_weights(new_run, undisturbed)
    new_run.assert_curves_are_whole()


def test_train_shrinks_with_a_lost_host_and_grows_when_it_returns(undisturbed, new_run, figures):
    new_run.project.edit("params.yaml", "hardware.num_workers", [1, 3])
    new_run.project.edit("params.yaml", "train.max_steps", LONG)
    new_run.project.edit("params.yaml", "train.keep_checkpoints", 1000)

    def num_workers() -> int:
        return sum(map(len, new_run.cluster.workers().values()))

    with new_run.submitted():
        new_run.project.wait_for(lambda: num_workers() == 3, f"three workers: {new_run.project.log()}", PATIENCE_S)
        new_run.await_step(new_run.step() + CHECKPOINT_EVERY)  # it may have started with two workers
        lost = new_run.cluster.busy_worker_host()
        taken_over = new_run.disturb(lambda: new_run.cluster("kill", lost))
        assert num_workers() == 2
        new_run.cluster("start", lost)
        began, before = time.monotonic(), new_run.step()
        new_run.project.wait_for(lambda: num_workers() == 3, f"third worker: {new_run.project.log()}", PATIENCE_S)
        resumed = new_run.project.wait_for(
            lambda: (n := new_run.resumed()) >= before and n, f"resumption: {new_run.project.log()}", PATIENCE_S
        )
        new_run.await_step(max(STEPS, resumed) + 1)
        figures("[1, 3] workers: a host of three is lost", **taken_over)
        figures("[1, 3] workers: the host is back", **{"seconds until it works": round(time.monotonic() - began)})
    assert_close_early(new_run, undisturbed)
    curves = [{p["step"]: p["valid_loss"] for p in r.state()["validation_curve"]} for r in (new_run, undisturbed)]
    for step, loss in curves[1].items():
        assert curves[0][step] == pytest.approx(loss, rel=LOSS_TOLERANCE), step
    assert new_run.state()["tokens"] == undisturbed.state()["tokens"]  # so the global batches were the same


def test_submit_again_after_a_killed_head_resumes(undisturbed, new_run, figures):
    new_run.project.edit("params.yaml", "train.max_steps", LONG)  # the test stops it earlier
    new_run.project.edit("params.yaml", "train.keep_checkpoints", 1000)
    with new_run.submitted() as job:
        new_run.await_step(25)
        for host in ("head", "worker1", "worker2"):  # without the head, the workers would end a minute later
            new_run.cluster("kill", host)
        assert job.wait(PATIENCE_S) == 1
        assert "restart it and submit again" in new_run.project.log()
    before, saved = new_run.step(), new_run.checkpoint()
    assert before < STEPS
    for host in ("head", "worker1", "worker2"):
        new_run.cluster("start", host)
    began = time.monotonic()
    with new_run.submitted():
        resumed = new_run.project.wait_for(new_run.resumed, f"resumption: {new_run.project.log()}", PATIENCE_S)
        new_run.await_step(before + 1)
        seconds = time.monotonic() - began
        new_run.await_step(STEPS + 10)
    assert resumed == saved
    assert_same_weights(new_run, undisturbed)
    values = {"steps lost": max(0, before - resumed), "seconds from submission": round(seconds)}
    figures("the head is killed (-9), the job submitted again", **values)


def test_train_continues_while_the_tracking_server_is_away(new_run, figures):
    new_run.project.edit("params.yaml", "train.max_steps", LONG)
    new_run.project.edit("params.yaml", "train.keep_checkpoints", 1000)
    with new_run.submitted():
        new_run.await_step(100)
        new_run.cluster("kill", "mlflow")
        first, began = new_run.step(), time.monotonic()
        while time.monotonic() - began < 60:
            new_run.await_step(min(new_run.step() + 1, LONG))
            time.sleep(1)
        last = new_run.step()
        new_run.cluster("start", "mlflow")
        new_run.await_step(last + 100)
        new_run.project.wait_for(lambda: "reachable again and has all" in new_run.project.log(), "return", PATIENCE_S)
    state = new_run.state(new_run.checkpoint())
    curve = state["training_curve"]
    away = [p["tokens_per_second"] for p in curve if first + 7 < p["step"] <= last]
    there = [p["tokens_per_second"] for p in curve if 20 < p["step"] <= first or p["step"] > last + 7]
    for name, points in (("train_loss", curve), ("valid_loss", state["validation_curve"])):
        expected = [(point["step"], point[name]) for point in points if point["step"] <= last]
        assert new_run.curve(name)[: len(expected)] == expected
    share = statistics.median(away) / statistics.median(there)
    figures("the tracking server is away for 60 s", **{"steps lost": 0, "rate meanwhile": f"{share:.0%}"})


def test_train_passes_over_damaged_checkpoints(undisturbed, new_run, figures):
    shutil.copytree(undisturbed.storage / "checkpoints", new_run.storage / "checkpoints")
    cut, flipped = (new_run.tensors(step) for step in (STEPS, STEPS - CHECKPOINT_EVERY))
    os.truncate(cut, cut.stat().st_size // 2)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    log = new_run.submit()
    for path in (cut, flipped):
        assert f"{path} is damaged: its checksum differs from SHA256SUMS; going back" in log
    resumed = STEPS - 2 * CHECKPOINT_EVERY
    assert f"continuing from the checkpoint of step {resumed}" in log
    assert_same_weights(new_run, undisturbed)
    new_run.assert_curves_are_whole()
    figures("the last checkpoint is cut short, the one before has a byte flipped", **{"steps lost": STEPS - resumed})


def test_sweep_continues_without_a_host_and_fetches_its_results(new_run, figures):
    new_run.project.edit("params.yaml", "hardware.num_workers", 1)
    new_run.project.edit("params.yaml", "sweep.rows", ["dropout"])
    # The first trial must still train when the last starts.
    new_run.project.edit("params.yaml", "train.max_steps", 2 * STEPS)

    def busy() -> bool:
        begun = {step.parent for step in new_run.storage.glob("checkpoints/*/step_*")}
        return len(new_run.cluster.workers()) == 3 and len(begun) == 3

    with new_run.submitted("sweep") as job:
        new_run.project.wait_for(busy, f"trial on each host: {new_run.project.log()}", PATIENCE_S)
        new_run.cluster("kill", new_run.cluster.busy_worker_host())
        new_run.finish(job)
    shutil.rmtree(new_run.project.root / "data/sweep", ignore_errors=True)
    began = time.monotonic()
    new_run.project.run("python", "-m", "sweeps.run", **new_run.environment)
    seconds = time.monotonic() - began
    trials = new_run.project.json("data/sweep/trials.json")["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 3
    assert sum(trial["attempts"] for trial in trials) >= 4  # one lost its host
    client = MlflowClient(new_run.cluster.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("table3-grammar-custom")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 4
    figures("a sweep of three trials loses a host", **{"trials lost": 0, "seconds to fetch": round(seconds)})


def refused(cluster: Cluster, root: Path, **changes: str) -> str:
    """Run `python -m pipeline.train` on the head, check that it starts nothing, and return its last line."""
    environment = {"RAY_ADDRESS": f"{cluster.network}.2:6379"} | cluster.environment | changes
    storage = Path(environment["RUN_STORAGE"] or root)
    before = {*storage.glob("checkpoints/*"), *storage.glob(".probe*")}
    words = [f"{name}={value}" for name, value in environment.items() if value]
    command = [*COMMAND, "exec", "head", "env", *words, "python", "-m", "pipeline.train"]
    done = subprocess.run(command, cwd=root, env=cluster.variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert {*storage.glob("checkpoints/*"), *storage.glob(".probe*")} == before
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def on_head(cluster: Cluster, project, published: Path) -> Path:
    """The project, without its data, in a folder that all hosts see."""
    shutil.copytree(project.root, cluster.shared / "project")
    shutil.rmtree(cluster.shared / "project/data")
    return cluster.shared / "project"


def test_preflight_refuses_storage_and_tracking_of_one_host(cluster, on_head):
    cluster.heal()
    shutil.copytree(cluster.shared / "data", on_head / "data", dirs_exist_ok=True)
    encoded = next((cluster.shared / "data").glob("grammar-*/data"))
    shutil.copytree(encoded, on_head / "data", dirs_exist_ok=True)
    line = refused(cluster, on_head, RUN_STORAGE="")
    assert line.startswith("train: the cluster has 3 nodes, but RUN_STORAGE is not set: set it to a folder that all")
    line = refused(cluster, on_head, MLFLOW_TRACKING_URI="sqlite:////var/tmp/x.db")
    assert line.startswith(
        "train: the cluster has 3 nodes, but MLFLOW_TRACKING_URI is sqlite:////var/tmp/x.db, a file:"
    )
    line = refused(cluster, on_head, MLFLOW_TRACKING_URI=f"http://{cluster.network}.1:5999")
    assert f"gets no answer from http://{cluster.network}.1:5999" in line
    assert line.endswith("set MLFLOW_TRACKING_URI to an address that all nodes reach")


def test_preflight_refuses_data_that_a_node_cannot_read(cluster, on_head):
    cluster.heal()
    shutil.copytree(cluster.shared / "data", cluster.folder / "head/tmp/mine/data", dirs_exist_ok=True)
    own = f"{cluster.folder}/tmp/mine"  # only the head has this folder
    line = refused(cluster, on_head, RUN_STORAGE=own)
    assert line.startswith(f"train: node {cluster.network}.")
    assert f"cannot read and write {own} (" in line
    assert not list((cluster.folder / "head/tmp/mine").glob(".probe*"))


def test_preflight_refuses_more_workers_than_fit(cluster, on_head):
    cluster.heal()
    settings = (on_head / "params.yaml").read_text()
    (on_head / "params.yaml").write_text(settings.replace("num_workers: 2", "num_workers: 4"))
    line = refused(cluster, on_head)
    (on_head / "params.yaml").write_text(settings)
    assert line == (
        "train: hardware.num_workers is 4, with 1 CPUs each: the cluster has 3 on 3 nodes, room for 3; "
        "lower it, or hardware.cpus_per_worker, or write [least, most] to use as many as fit"
    )


@pytest.mark.parametrize("token", ["wrong", None])
def test_token_wrong_or_missing_is_reported_by_submit_and_train(cluster, project, on_head, tmp_path, token):
    cluster.heal()
    path = cluster.shared / f"token-{token}"
    if token:
        path.write_text("0" * 64)
    changes = {"RAY_AUTH_TOKEN_PATH": str(path)}
    line = refused(cluster, on_head, **changes)
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in line
    output = project.run("python", "-m", "pipeline.submit", "train", code=1, **(cluster.environment | changes))
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in output.strip().splitlines()[-1]
    assert "Traceback" not in output
