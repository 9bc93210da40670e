#!/usr/bin/env python3
"""A Ray cluster of three hosts on this machine: namespaces, with addresses, names, processes and files of their own.

    tools/local_cluster.py up          a head and two workers, token authentication, dashboard, an MLflow server
    eval "$(tools/local_cluster.py env)"        how to reach them, for this shell
    tools/local_cluster.py status
    tools/local_cluster.py down        ends and removes all that `up` made, and nothing else

To see what it survives:

    tools/local_cluster.py kill worker1     the host's raylet dies (-9), and with it what runs there; or head, mlflow
    tools/local_cluster.py cut worker1      its link goes down; `mend` brings it up
    tools/local_cluster.py start worker1    Ray again on a host that was killed or cut; or head, mlflow
    tools/local_cluster.py exec head ray status

Needs root, iproute2, and the project's .venv. Everything lies in LOCAL_CLUSTER_DIR (/var/tmp/local-cluster); `shared`
in it is what all hosts see, as they would a network file system. Another folder is another cluster, beside the first.
"""

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

BIN = Path(__file__).resolve().parents[1] / ".venv" / "bin"
STATE = Path(os.environ.get("LOCAL_CLUSTER_DIR", "/var/tmp/local-cluster"))
HOSTS = ("head", "worker1", "worker2")
MOST_CLUSTERS = 256
"""On one machine: cluster n has the network 10.77.n.0/24."""
PATIENCE_S = 120
EXPORTS = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI", "RUN_STORAGE")
"""RAY_API_SERVER_ADDRESS is that of the dashboard; RAY_ADDRESS would make a program here part of the cluster."""
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoClusterError(OSError):
    """Nothing is up in STATE."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up_parser = commands.add_parser("up", help="make and start it")
    up_parser.add_argument("--cpus", type=int, default=1, help="that each host says it has (default: 1)")
    commands.add_parser("status", help="who is there")
    commands.add_parser("down", help="end and remove it")
    commands.add_parser("env", help="exports for a shell: addresses, token, storage")
    for name, what in (("kill", "a raylet, or the MLflow server (-9)"), ("start", "it again")):
        commands.add_parser(name, help=what).add_argument("host", choices=[*HOSTS, "mlflow"])
    for name, what in (("cut", "a host's link"), ("mend", "it")):
        commands.add_parser(name, help=what).add_argument("host", choices=HOSTS)
    exec_parser = commands.add_parser("exec", help="a command on a host")
    exec_parser.add_argument("host", choices=HOSTS)
    exec_parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args()
    try:
        if arguments.command != "env":
            _require_rights()
        if arguments.command not in ("up", "down"):
            _number()  # or an error
        if arguments.command == "up":
            up(arguments.cpus)
        elif arguments.command == "exec":
            raise SystemExit(subprocess.call([*_into(arguments.host), *arguments.words], env=_environment()))
        else:
            action = dict(status=status, down=down, env=env, kill=kill, start=start, cut=cut, mend=mend)
            action[arguments.command](*([arguments.host] if "host" in arguments else []))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None)
        raise SystemExit(f"local-cluster: {error}{f': {output.strip()}' if output else ''}") from None


def up(cpus: int) -> None:
    if STATE.exists():
        raise OSError(f"{STATE} is there already: tools/local_cluster.py down, or LOCAL_CLUSTER_DIR=another/folder")
    for folder in (STATE / "shared", STATE / "tmp", *(STATE / host / "tmp" for host in HOSTS)):
        folder.mkdir(parents=True)
    STATE.chmod(0o700)
    (STATE / "cpus").write_text(str(cpus))
    (STATE / "token").write_text(secrets.token_hex(32))
    try:
        _make_bridge()
        for host in HOSTS:
            _make_host(host)
        for name in ("head", "mlflow", "worker1", "worker2"):
            start(name, wait=name == "head")  # the workers need it
        for name in ("mlflow", "worker1", "worker2"):
            _await(name)
    except BaseException:
        down()
        raise
    status()
    print('\nNow: eval "$(tools/local_cluster.py env)"')


def _make_bridge() -> None:
    """With the first free number, and marked as ours."""
    for number in range(MOST_CLUSTERS):
        name = f"lc{number}-bridge"
        done = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
        if done.returncode == 0:
            break
        if not Path("/sys/class/net", name).exists():
            raise OSError(f"no bridge can be made: {done.stderr.strip()}")
    else:
        raise OSError(f"there are {MOST_CLUSTERS} local clusters already")
    _run("ip", "link", "set", name, "alias", str(STATE))
    _run("ip", "addr", "add", f"{_gateway()}/24", "dev", name)
    _run("ip", "link", "set", name, "up")


def _make_host(host: str) -> None:
    name = _netns(host)
    etc = Path("/etc/netns") / name  # what the host sees as its /etc/hosts: its own name is 127.0.1.1, as on Debian
    etc.mkdir(parents=True, exist_ok=True)  # a restart of the machine leaves it there, and nothing else
    others = "".join(f"{_address(other)} {_netns(other)}\n" for other in HOSTS)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", name, "master", f"lc{_number()}-bridge", "up")
    _run("ip", "-n", name, "addr", "add", f"{_address(host)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", "-n", name, "link", "set", device, "up")
    _run("ip", "-n", name, "route", "add", "default", "via", _gateway())


def start(name: str, wait: bool = True) -> None:
    """Ray on a host, or the MLflow server."""
    if name == "mlflow":
        words = [BIN / "mlflow", "server", "--workers", "1", "--host", _gateway(), "--port", "5000"]
        words += ["--allowed-hosts", f"{_gateway()}:5000", "--backend-store-uri", f"sqlite:///{STATE}/mlflow.db"]
        words += ["--artifacts-destination", STATE / "artifacts"]
        if (STATE / "mlflow.pid").exists():
            kill("mlflow")
        process = _spawn(words, STATE / "mlflow.log", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        (STATE / "mlflow.pid").write_text(str(process.pid))
    else:
        _end_processes(name)
        words = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", _address(name)]
        words += ["--num-cpus", (STATE / "cpus").read_text(), "--object-store-memory", "100000000"]
        if name == "head":
            words += ["--head", "--port", "6379", "--dashboard-host", _address(name)]
        else:
            words += ["--address", f"{_address('head')}:6379"]
        _spawn([*_on(name), *words], STATE / name / "log")
    if wait:
        _await(name)


def _await(name: str) -> None:
    if name == "mlflow":
        _wait(lambda: _get(f"{_mlflow()}/health") is not None, "answer from MLflow", STATE / "mlflow.log")
    else:
        _wait(lambda: name in alive(), f"sign of Ray on {name}", STATE / name / "log")


def status() -> None:
    there = alive()
    for host in HOSTS:
        link = "up" if "state UP" in _run("ip", "link", "show", _netns(host)) else "cut"
        print(f"{host:8} {_address(host):10} link {link:4} Ray {'alive' if host in there else 'away'}")
    print(f"mlflow   {_mlflow()} {'answers' if _get(f'{_mlflow()}/health') is not None else 'is away'}")
    print(f"dashboard {_dashboard()} {'answers' if there else 'is away'}; token in {STATE}/token")


def alive() -> list[str]:
    """The hosts that Ray knows and believes to be alive."""
    try:
        nodes = json.loads(_get(f"{_dashboard()}/api/v0/nodes") or "")["data"]["result"]["result"]
    except (ValueError, LookupError, TypeError):
        return []
    addresses = {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
    return [host for host in HOSTS if _address(host) in addresses]


def down() -> None:
    if not STATE.exists():
        raise OSError(f"there is no cluster in {STATE} (LOCAL_CLUSTER_DIR names another)")
    if (STATE / "mlflow.pid").exists():
        kill("mlflow")
    with suppress(NoClusterError):  # a restart of the machine has taken the rest
        for host in HOSTS:
            name = _netns(host)
            if (Path("/run/netns") / name).exists():
                _end_processes(host)
                _run("ip", "netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        _run("ip", "link", "del", f"lc{_number()}-bridge")
    shutil.rmtree(STATE)
    print(f"It is gone. In a shell that knew it: unset {' '.join(EXPORTS)}")


def env() -> None:
    values = (_dashboard(), "token", STATE / "token", _mlflow(), STATE / "shared")
    for name, value in zip(EXPORTS, values, strict=True):
        print(f"export {name}={shlex.quote(str(value))}")


def kill(name: str) -> None:
    if name == "mlflow":
        group = int((STATE / "mlflow.pid").read_text())
        ours = [pid for pid in _group(group) if "mlflow" in _command_line(pid)]  # the number may be another's by now
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        _wait(lambda: not any(_command_line(pid) for pid in ours), "end of MLflow", STATE / "mlflow.log")
        return
    for pid in _processes(name):
        if "/raylet/raylet" in _command_line(pid) or (name == "head" and "gcs_server" in _command_line(pid)):
            os.kill(pid, signal.SIGKILL)


def cut(host: str) -> None:
    _run("ip", "link", "set", _netns(host), "down")


def mend(host: str) -> None:
    _run("ip", "link", "set", _netns(host), "up")


def _number() -> int:
    """The cluster's: of the bridge that has STATE as its alias. Names and addresses follow from it. (A number kept in
    STATE would be another cluster's after a restart of the machine.)"""
    for path in Path("/sys/class/net").glob("lc*-bridge/ifalias"):
        if path.read_text().strip() == str(STATE):
            return int(path.parent.name[2:].partition("-")[0])
    raise NoClusterError(f"there is no cluster in {STATE}: tools/local_cluster.py up")


def _address(host: str) -> str:
    return f"10.77.{_number()}.{2 + HOSTS.index(host)}"


def _gateway() -> str:
    return f"10.77.{_number()}.1"


def _dashboard() -> str:
    return f"http://{_address('head')}:8265"


def _mlflow() -> str:
    return f"http://{_gateway()}:5000"


def _netns(host: str) -> str:
    return f"lc{_number()}-{host}"


def _on(host: str) -> list[str]:
    """The words before a command that make a host of it: with a name, and temporary files and processes of its own.
    (Ray looks for another head among all processes that it sees.)"""
    own, seen = (shlex.quote(str(STATE / place)) for place in (f"{host}/tmp", "tmp"))
    inside = f'hostname {_netns(host)} && mount --bind {own} {seen} && "$@"'
    namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["ip", "netns", "exec", _netns(host), *namespaces, "sh", "-c", inside, host]


def _into(host: str) -> list[str]:
    """The words before a command that run it among the host's processes, in the folder of here."""
    found = [pid for pid in _processes(host) if "/raylet/raylet" in _command_line(pid)]
    if not found:
        raise OSError(f"Ray does not run on {host}: tools/local_cluster.py start {host}")
    namespaces = ["--mount", "--uts", "--net", "--pid"]
    return ["nsenter", "--target", str(found[0]), *namespaces, f"--wdns={Path().resolve()}"]


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DVC_"))}
    ours = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(STATE / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # the hosts share this machine's cores: nobody yields to anybody
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": str(STATE / "tmp"),  # each host's own
        "RAY_TMPDIR": str(STATE / "tmp"),
    }
    return kept | ours | more


def _spawn(words: list, log: Path, **environment: str) -> subprocess.Popen:
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
    done = subprocess.run(["ip", "netns", "pids", _netns(host)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def _group(leader: int) -> list[int]:
    """The processes of a process group."""
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
    deadline = time.monotonic() + PATIENCE_S
    while found := _processes(host):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise OSError(f"processes {found} of {host} do not end")
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
        with DIRECTLY.open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def _wait(condition, what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise OSError(
                f"no {what} after {PATIENCE_S} s: see {log}; a firewall, Docker's for one, may block what "
                f"passes between the bridged hosts\n{log.read_text()[-2000:]}"
            )
        time.sleep(0.5)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _require_rights() -> None:
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise OSError("root and iproute2 (the command ip) are needed for network namespaces")
    if not (BIN / "ray").exists():
        raise OSError(f"{BIN / 'ray'} does not exist: make .venv/installed first")


if __name__ == "__main__":
    main()
