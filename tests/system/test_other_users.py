"""Another user of the machine cannot run code as the user who calls dvc.

python -m pytest -m host tests/system/test_other_users.py
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, Project, make_project

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="to act as another user needs root"),
]
NOBODY = 65534
PLANT = """
import os, pickle, shutil, sqlite3, sys

cache, mark, user = sys.argv[1:]
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))
class Planted:
    def __reduce__(self):
        return os.mkdir, (mark,)
os.rename(cache, f"{cache}.old")
shutil.copytree(f"{cache}.old", cache)
with sqlite3.connect(f"{cache}/links/cache.db") as database:
    columns = "(key, raw, store_time, access_time, mode, value)"
    row = ("params.yaml", pickle.dumps(Planted()))
    database.execute(f"INSERT INTO Cache {columns} VALUES (?, 1, 0, 0, 4, ?)", row)
"""
"""As `user`, replace DVC's database by a copy with a row that makes the folder `mark` when it is read."""


@pytest.fixture
def project() -> Iterator[Project]:
    """A project and a home folder that other users may read, as in /home on many machines."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "marks").mkdir()
    (folder / "marks").chmod(0o777)
    project = make_project(folder / "project")
    shutil.copy(ROOT / "Makefile", project.root)
    yield project
    shutil.rmtree(folder)


def plant(project: Project, **environment: str) -> tuple[int, bool]:
    """Return the exit code of another user's attempt, and whether `dvc checkout` then ran the planted code."""
    project.run("make", "site-cache", HOME=str(project.root.parent / "home"), XDG_CACHE_HOME="")
    project.run("dvc", "repro", "download", **environment)
    shown = project.run("dvc", "version", **environment)
    cache = project.root / re.search(r"Repo\.site_cache_dir: (.*)", shown)[1]
    mark = project.root.parent / "marks/run"
    command = [sys.executable, "-c", PLANT, str(cache), str(mark), str(NOBODY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or "PermissionError" in done.stderr
    project.run("dvc", "checkout", "--allow-missing", **environment)
    return done.returncode, mark.exists()


def test_other_users_cannot_plant_what_dvc_would_run(project):
    assert plant(project) == (1, False)


def test_dvc_runs_what_is_planted_in_a_folder_that_all_may_write_to(project):
    assert plant(project, DVC_SITE_CACHE_DIR=str(project.root.parent / "of-all")) == (0, True)
