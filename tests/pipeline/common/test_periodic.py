import json
import threading
import time

from upath import UPath

from pipeline.common import periodic
from pipeline.common.periodic import PeriodicJsonFile, interval_of


def test_periodic_json_file_in_a_store_ends_with_the_newest_values_and_never_blocks(monkeypatch):
    path = UPath("memory://periodic/live.json")
    held = threading.Event()
    written = []

    def slowly(target, values):
        held.wait(10)
        written.append(values)
        target.write_text(json.dumps(values))

    monkeypatch.setattr(periodic, "write_json", slowly)
    live = PeriodicJsonFile(path, 1.0)
    began = time.monotonic()
    for number in range(1, 8):
        live.write({"step": number})
    assert time.monotonic() - began < 5
    held.set()
    live.close()
    assert json.loads(path.read_text()) == {"step": 7}
    assert len(written) < 4


def test_periodic_json_file_writes_the_newest_values_after_an_outage(monkeypatch):
    path = UPath("memory://periodic/away.json")
    monkeypatch.setattr(periodic, "STORE_PAUSE_S", 0.05)
    faults = [OSError("away"), OSError("away")]

    def sometimes(target, values):
        if faults:
            raise faults.pop()
        target.write_text(json.dumps(values))

    monkeypatch.setattr(periodic, "write_json", sometimes)
    live = PeriodicJsonFile(path, 1.0)
    for number in (3, 5, 7):
        live.write(number)
        time.sleep(0.2)
    assert json.loads(path.read_text()) == 7


def test_interval_of_a_file_in_a_store_is_longer(tmp_path):
    assert (interval_of(tmp_path, 0.5), interval_of(UPath("memory://files"), 0.5)) == (0.5, 5.0)
