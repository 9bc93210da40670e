"""Command-line conventions: --help, error lines, exit codes."""

import os
import signal
import threading
import time


def end_with_dvc() -> None:
    """Under DVC, end when it does. `kill -9` of `dvc repro` would otherwise leave training running unseen, in the
    way of the next `dvc repro`. Started by hand (nohup, say), training outlives its parent."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "DVC_STAGE" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
