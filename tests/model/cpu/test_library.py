"""The choice between MKL and oneDNN: by setting, by measurement, cached for every process."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model.cpu import library
from model.cpu.library import chosen, processor, speedup


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and a processor with AVX-512."""
    monkeypatch.delenv("MODEL_CPU_MATMUL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    chosen.cache_clear()
    yield tmp_path / "attention-pipeline"
    chosen.cache_clear()


def in_another_process() -> str:
    chosen.cache_clear()
    return chosen()


def refuse() -> float:
    raise AssertionError("measured again")


@pytest.mark.parametrize("wanted", ["mkl", "onednn"])
def test_chosen_is_the_library_set_in_the_environment_unmeasured(wanted, cache, monkeypatch):
    monkeypatch.setattr(library, "speedup", refuse)
    monkeypatch.setenv("MODEL_CPU_MATMUL", wanted)
    assert chosen() == wanted
    assert not cache.exists()


def test_chosen_refuses_an_unknown_library(monkeypatch):
    monkeypatch.setenv("MODEL_CPU_MATMUL", "blas")
    with pytest.raises(ValueError, match=r"^MODEL_CPU_MATMUL must be one of mkl, onednn, got 'blas'$"):
        chosen()


@pytest.mark.parametrize(("measured", "expected"), [(0.0, "mkl"), (1.19, "mkl"), (1.21, "onednn"), (2.5, "onednn")])
def test_chosen_is_onednn_where_it_is_clearly_faster_and_measured_once(measured, expected, monkeypatch):
    monkeypatch.setattr(library, "speedup", lambda: measured)
    assert chosen() == expected
    monkeypatch.setattr(library, "speedup", refuse)
    assert in_another_process() == expected


@pytest.mark.parametrize(("name", "value"), [("processor", lambda: "another"), ("SHAPES", ((1, 1, 1),))])
def test_chosen_is_measured_again_for_another_processor_or_other_shapes(name, value, monkeypatch):
    monkeypatch.setattr(library, "speedup", lambda: 9.0)
    assert chosen() == "onednn"
    monkeypatch.setattr(library, name, value)
    monkeypatch.setattr(library, "speedup", lambda: 0.5)
    assert in_another_process() == "mkl"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "\x00" * 99, "library", "processor"])
def test_chosen_is_measured_again_where_the_cache_is_damaged(damage, cache, monkeypatch):
    monkeypatch.setattr(library, "speedup", lambda: 9.0)
    assert chosen() == "onednn"
    [file] = cache.glob("*.json")
    content = file.read_text(encoding="utf-8")
    is_field = damage in json.loads(content)
    file.write_text(json.dumps(json.loads(content) | {damage: "?"}) if is_field else damage, encoding="utf-8")
    assert in_another_process() == "onednn"
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(content)


def test_chosen_is_mkl_unmeasured_where_the_cache_cannot_be_written(cache, monkeypatch):
    monkeypatch.setattr(library, "speedup", refuse)
    cache.write_text("a file where the folder would be", encoding="utf-8")
    assert chosen() == "mkl"


def test_chosen_is_mkl_without_avx512(monkeypatch):
    monkeypatch.setattr(library, "speedup", refuse)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert chosen() == "mkl"


def test_chosen_is_the_same_for_all_processes_that_start_at_once(monkeypatch):
    """Uses threads in place of processes: like processes, they share only the file and its lock."""
    barrier, measured = threading.Barrier(8), []

    def another_each_time() -> float:
        measured.append(0)
        time.sleep(0.05)
        return 9.0 if len(measured) % 2 else 0.5

    def choose(_: int) -> str:
        barrier.wait()
        return chosen.__wrapped__()

    monkeypatch.setattr(library, "speedup", another_each_time)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(choose, range(8)))) == 1
    assert len(measured) == 1


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError, TypeError])
def test_speedup_is_0_where_the_operator_fails(error, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(library, "onednn_matmul", fail)
    assert speedup() == 0


def test_speedup_is_0_where_the_operator_gives_other_values(monkeypatch):
    monkeypatch.setattr(library, "onednn_matmul", lambda a, b: 1.1 * a @ b.T)
    assert speedup() == 0


def test_speedup_is_measured_out_of_reach_of_autocast_and_fake_tensors(cache, own_threads):
    torch.set_num_threads(2)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        chosen()
    [file] = cache.glob("*.json")
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert (json.loads(file.read_text(encoding="utf-8"))["speedup"] > 0.01) == has_operator
    assert torch.get_num_threads() == 2


def test_processor_names_more_than_its_brand():
    assert len(processor().split(", ")) >= 5


def test_chosen_is_not_called_by_an_import():
    code = (
        "import model.kv_cache, model.loss, model.perplexity; from model.cpu.library import chosen; "
        "assert chosen.cache_info().misses == 0"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
