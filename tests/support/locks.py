"""Several threads that act at the same moment."""

import threading
import time

from pipeline.common.storage import AnyPath, one_at_a_time


def most_inside(folder: AnyPath, num_threads: int, seconds: float) -> list[int]:
    """Let threads enter `one_at_a_time(folder)` at the same moment and stay in it for `seconds`.

    Returns for each thread how many were in the block, itself included.
    """
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
