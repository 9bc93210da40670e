"""What several threads do at the same moment."""

import threading
import time

from pipeline.common.storage import AnyPath, one_at_a_time


def most_inside(folder: AnyPath, num_threads: int, seconds: float) -> list[int]:
    """How many threads each of these has found in the block of `one_at_a_time(folder)`, itself included, when all
    enter it at the same moment and stay for `seconds`."""
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        with one_at_a_time(folder):
            inside.append(1)
            most.append(len(inside))
            time.sleep(seconds)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most
