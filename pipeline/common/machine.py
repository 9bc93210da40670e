"""A short description of this machine."""

import os
import platform
from pathlib import Path


def machine_name() -> str:
    """Cores that this process may use and the CPU model: "2 cores of AMD EPYC 7763"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"
