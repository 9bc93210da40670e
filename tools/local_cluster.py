"""Run a Ray cluster of three hosts on this machine, each in a network namespace.

    python -m tools.local_cluster up               start a head, two workers and MLflow
    eval "$(python -m tools.local_cluster env)"    let this shell reach them
    python -m tools.local_cluster status           print what answers
    python -m tools.local_cluster down             stop and remove all that `up` made

To see what the cluster survives:

    python -m tools.local_cluster kill worker1     kill (-9) its raylet; or head, mlflow
    python -m tools.local_cluster start worker1    start Ray again; or head, mlflow
    python -m tools.local_cluster cut worker1      take its network link down
    python -m tools.local_cluster mend worker1     bring the link up
    python -m tools.local_cluster exec head ray status

Each host has its own address, name, processes and temporary files. Ray has token
authentication and a dashboard. Needs root, iproute2 and the project's environment.

Writes to LOCAL_CLUSTER_DIR (/var/tmp/local-cluster) and /etc/netns. All hosts see
the folder `shared` in LOCAL_CLUSTER_DIR, as they would see a network file system.
Another LOCAL_CLUSTER_DIR is another cluster on the same machine.

`exec` ends with the exit code of its command; all others end with 1 after an error.
"""

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.common.cli import exit_on_error, parser
from pipeline.common.environment import TELEMETRY

BIN = Path(sys.executable).parent
STATE = Path(os.environ.get("LOCAL_CLUSTER_DIR", "/var/tmp/local-cluster"))
COMMAND = "python -m tools.local_cluster"
HOSTS = ("head", "worker1", "worker2")
MAX_CLUSTERS = 256
"""On one machine. Cluster n has the network 10.77.n.0/24."""
TIMEOUT_S = 120
EXPORTS = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI", "RUN_STORAGE")
"""The variables that `env` prints. RAY_API_SERVER_ADDRESS is the dashboard. RAY_ADDRESS is not among them: with it, a
program in this shell would join the cluster."""
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoClusterError(OSError):
    """No cluster is up in STATE."""


def up(cpus: int) -> None:
    """Make and start the cluster; after an error, remove what was made."""
    if STATE.exists():
        raise OSError(f"{STATE} exists: run {COMMAND} down, or set LOCAL_CLUSTER_DIR to another folder")
    for folder in (STATE / "shared", STATE / "tmp", *(STATE / host / "tmp" for host in HOSTS)):
        folder.mkdir(parents=True)
    STATE.chmod(0o700)
    (STATE / "cpus").write_text(str(cpus))
    (STATE / "token").write_text(secrets.token_hex(32))
    try:
        make_bridge()
        for host in HOSTS:
            make_host(host)
        for name in ("head", "mlflow", "worker1", "worker2"):
            start(name, wait=name == "head")  # the workers need the head
        for name in ("mlflow", "worker1", "worker2"):
            _await(name)
    except BaseException:
        down()
        raise
    status()
    print(f'\nNow: eval "$({COMMAND} env)"')


def start(name: str, wait: bool = True) -> None:
    """Start Ray on a host, or the MLflow server."""
    if name == "mlflow":
        words: list[object] = [BIN / "mlflow", "server", "--workers", "1", "--host", gateway(), "--port", "5000"]
        words += ["--allowed-hosts", f"{gateway()}:5000", "--backend-store-uri", f"sqlite:///{STATE}/mlflow.db"]
        words += ["--artifacts-destination", STATE / "artifacts"]
        if (STATE / "mlflow.pid").exists():
            kill("mlflow")
        process = _spawn(words, STATE / "mlflow.log", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        (STATE / "mlflow.pid").write_text(str(process.pid))
    else:
        _end_processes(name)
        words = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", address(name)]
        words += ["--num-cpus", (STATE / "cpus").read_text(), "--object-store-memory", "100000000"]
        if name == "head":
            words += ["--head", "--port", "6379", "--dashboard-host", address(name)]
        else:
            words += ["--address", f"{address('head')}:6379"]
        _spawn([*_on(name), *words], STATE / name / "log")
    if wait:
        _await(name)


def status() -> None:
    """Print which hosts and servers answer."""
    answering = alive()
    for host in HOSTS:
        link = "up" if "state UP" in _run("ip", "link", "show", netns_name(host)) else "cut"
        print(f"{host:8} {address(host):10} link {link:4} Ray {'alive' if host in answering else 'away'}")
    print(f"mlflow   {_mlflow()} {'answers' if _get(f'{_mlflow()}/health') is not None else 'is away'}")
    print(f"dashboard {_dashboard()} {'answers' if answering else 'is away'}; token in {STATE}/token")


def down() -> None:
    """Stop and remove the cluster."""
    if not STATE.exists():
        raise OSError(f"there is no cluster in {STATE}: set LOCAL_CLUSTER_DIR if it is in another folder")
    if (STATE / "mlflow.pid").exists():
        kill("mlflow")
    with suppress(NoClusterError):  # after a restart of the machine, only the files are left
        for host in HOSTS:
            name = netns_name(host)
            if (Path("/run/netns") / name).exists():
                _end_processes(host)
                _run("ip", "netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        _run("ip", "link", "del", f"lc{cluster_number()}-bridge")
    shutil.rmtree(STATE)
    print(f"Removed. In a shell with its variables: unset {' '.join(EXPORTS)}")


def env() -> None:
    """Print exports for a shell: addresses, token, storage."""
    values = (_dashboard(), "token", STATE / "token", _mlflow(), STATE / "shared")
    for name, value in zip(EXPORTS, values, strict=True):
        print(f"export {name}={shlex.quote(str(value))}")


def kill(name: str) -> None:
    """Kill (-9) a host's raylet, on the head also the GCS; or the MLflow server."""
    if name == "mlflow":
        group = int((STATE / "mlflow.pid").read_text())
        # Another process may have the group's number by now.
        ours = [pid for pid in _group(group) if "mlflow" in _command_line(pid)]
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        _wait(lambda: not any(_command_line(pid) for pid in ours), "end of the MLflow server", STATE / "mlflow.log")
        return
    for pid in _processes(name):
        if "/raylet/raylet" in _command_line(pid) or (name == "head" and "gcs_server" in _command_line(pid)):
            os.kill(pid, signal.SIGKILL)


def cut(host: str) -> None:
    """Take a host's link down."""
    _run("ip", "link", "set", netns_name(host), "down")


def mend(host: str) -> None:
    """Bring a host's link up."""
    _run("ip", "link", "set", netns_name(host), "up")


def execute(host: str, words: list[str]) -> int:
    """Run a command on a host, in the current folder. Returns its exit code."""
    return subprocess.call([*_into(host), *words], env=_environment())


def cluster_number() -> int:
    """The number of the cluster in STATE, from which names and addresses follow. Raises NoClusterError if none is up.

    It is the number of the network bridge whose alias is STATE. A number kept in a file could belong to another
    cluster after a restart of the machine.
    """
    for path in Path("/sys/class/net").glob("lc*-bridge/ifalias"):
        if path.read_text().strip() == str(STATE):
            return int(path.parent.name[2:].partition("-")[0])
    raise NoClusterError(f"there is no cluster in {STATE}: run {COMMAND} up")


def address(host: str) -> str:
    return f"10.77.{cluster_number()}.{2 + HOSTS.index(host)}"


def gateway() -> str:
    return f"10.77.{cluster_number()}.1"


def _dashboard() -> str:
    return f"http://{address('head')}:8265"


def _mlflow() -> str:
    return f"http://{gateway()}:5000"


def netns_name(host: str) -> str:
    return f"lc{cluster_number()}-{host}"


def make_bridge() -> None:
    """Make the network bridge, with the first free number and STATE as its alias."""
    for number in range(MAX_CLUSTERS):
        name = f"lc{number}-bridge"
        done = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
        if done.returncode == 0:
            break
        if not Path("/sys/class/net", name).exists():
            raise OSError(f"cannot make the network bridge {name}: {done.stderr.strip()}")
    else:
        raise OSError(f"there are {MAX_CLUSTERS} local clusters already")
    _run("ip", "link", "set", name, "alias", str(STATE))
    _run("ip", "addr", "add", f"{gateway()}/24", "dev", name)
    _run("ip", "link", "set", name, "up")


def make_host(host: str) -> None:
    name = netns_name(host)
    etc = Path("/etc/netns") / name  # the host's /etc: its own name has the address 127.0.1.1, as on Debian
    etc.mkdir(parents=True, exist_ok=True)  # it is still there after a restart of the machine
    others = "".join(f"{address(other)} {netns_name(other)}\n" for other in HOSTS)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", name, "master", f"lc{cluster_number()}-bridge", "up")
    _run("ip", "-n", name, "addr", "add", f"{address(host)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", "-n", name, "link", "set", device, "up")
    _run("ip", "-n", name, "route", "add", "default", "via", gateway())


def _on(host: str) -> list[str]:
    """Prefix of a command that starts a host: it gets the host's name and its own temporary files and processes.

    Its own processes, because Ray looks for another head among all processes that it sees.
    """
    own, seen = (shlex.quote(str(STATE / place)) for place in (f"{host}/tmp", "tmp"))
    inside = f'hostname {netns_name(host)} && mount --bind {own} {seen} && "$@"'
    namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["ip", "netns", "exec", netns_name(host), *namespaces, "sh", "-c", inside, host]


def _into(host: str) -> list[str]:
    """Prefix of a command that joins a host's processes, in the current folder. Raises OSError if Ray does not run
    there."""
    found = [pid for pid in _processes(host) if "/raylet/raylet" in _command_line(pid)]
    if not found:
        raise OSError(f"Ray does not run on {host}: run {COMMAND} start {host}")
    namespaces = ["--mount", "--uts", "--net", "--pid"]
    return ["nsenter", "--target", str(found[0]), *namespaces, f"--wdns={Path().resolve()}"]


def _environment(**more: str) -> dict[str, str]:
    """Environment of a host's processes: this shell's, without what points to other servers or other code."""
    foreign = ("RAY_", "MLFLOW_", "DVC_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ours = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(STATE / "token"),
        "RAY_worker_niceness": "0",  # no host yields to another: they share this machine's cores
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": str(STATE / "tmp"),  # each host's own
        "RAY_TMPDIR": str(STATE / "tmp"),
    }
    return kept | TELEMETRY | ours | more


def _spawn(words: list[object], log: Path, **environment: str) -> subprocess.Popen:
    with log.open("ab") as output:
        return subprocess.Popen(
            list(map(str, words)),
            cwd=STATE,
            env=_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _processes(host: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", netns_name(host)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def _group(leader: int) -> list[int]:
    """The process ids in a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # after the name, which may have spaces
        except OSError:
            continue
        if int(fields[2]) == leader:
            found.append(int(stat.parent.name))
    return found


def _end_processes(host: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while found := _processes(host):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise OSError(f"processes {found} of {host} did not end within {TIMEOUT_S} s")
        time.sleep(0.1)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _get(url: str) -> str | None:
    token = (STATE / "token").read_text() if (STATE / "token").exists() else ""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with WITHOUT_PROXY.open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def _await(name: str) -> None:
    if name == "mlflow":
        _wait(lambda: _get(f"{_mlflow()}/health") is not None, "answer from the MLflow server", STATE / "mlflow.log")
    else:
        _wait(lambda: name in alive(), f"answer from Ray on {name}", STATE / name / "log")


def alive() -> list[str]:
    """The hosts that Ray reports as alive."""
    try:
        nodes = json.loads(_get(f"{_dashboard()}/api/v0/nodes") or "")["data"]["result"]["result"]
    except (ValueError, LookupError, TypeError):
        return []
    addresses = {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
    return [host for host in HOSTS if address(host) in addresses]


def _wait(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise OSError(
                f"no {what} after {TIMEOUT_S} s: see {log}; a firewall, such as Docker's, may block traffic between "
                f"the bridged hosts\n{log.read_text()[-2000:]}"
            )
        time.sleep(0.5)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _require_rights() -> None:
    """Raise OSError without root, iproute2 or Ray."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise OSError("network namespaces need root and iproute2 (the command ip)")
    if not (BIN / "ray").exists():
        raise OSError(
            f"{BIN / 'ray'} does not exist: source .venv/bin/activate first (make .venv/installed makes it)"
        )


def main() -> None:
    options = parser("tools.local_cluster", __doc__)
    commands = options.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="make and start the cluster").add_argument(
        "--cpus", type=int, default=1, help="CPUs of each host for Ray (%(default)s)"
    )
    commands.add_parser("status", help="print which hosts and servers answer")
    commands.add_parser("down", help="stop and remove the cluster")
    commands.add_parser("env", help="print exports for a shell: addresses, token, storage")
    for name, what in (("kill", "kill (-9) a host's raylet or the MLflow server"), ("start", "start it again")):
        commands.add_parser(name, help=what).add_argument("host", choices=[*HOSTS, "mlflow"])
    for name, what in (("cut", "take a host's network link down"), ("mend", "bring it up")):
        commands.add_parser(name, help=what).add_argument("host", choices=HOSTS)
    execute_options = commands.add_parser("exec", help="run a command on a host")
    execute_options.add_argument("host", choices=HOSTS)
    execute_options.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = options.parse_args()
    with exit_on_error("local-cluster"):
        if arguments.command != "env":
            _require_rights()
        if arguments.command not in ("up", "down"):
            cluster_number()  # raises if there is none
        if arguments.command == "up":
            up(arguments.cpus)
        elif arguments.command == "exec":
            raise SystemExit(execute(arguments.host, arguments.words))
        elif "host" in arguments:
            {"kill": kill, "start": start, "cut": cut, "mend": mend}[arguments.command](arguments.host)
        else:
            {"status": status, "down": down, "env": env}[arguments.command]()


if __name__ == "__main__":
    main()
