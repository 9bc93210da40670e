"""Damage that disks, memory and people do to a file, without a change of its time stamps."""

import os
import random
from collections.abc import Callable
from pathlib import Path


def _in_place(change: Callable[[bytearray, random.Random], object]) -> Callable[[Path], None]:
    """Change bytes of a file and keep its times. The random places depend only on the file's name."""

    def damage(path: Path) -> None:
        before, content = path.stat(), bytearray(path.read_bytes())
        while bytes(content) == path.read_bytes():
            change(content, random.Random(path.name))
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def _flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _overwrite(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start : start + 512] = bytes(255 - byte for byte in content[start : start + 512])


def _cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def _become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _become_a_link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


flip_a_bit = _in_place(_flip)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip_a_bit,
    "a block overwritten": _in_place(_overwrite),
    "cut off": _in_place(_cut),
    "empty": _in_place(lambda content, chance: content.clear()),
    "bytes added": _in_place(lambda content, chance: content.extend(b"\0\0")),
    "gone": Path.unlink,
    "a folder": _become_a_folder,
    "a link to itself": _become_a_link_loop,
    "a pipe": _become_a_pipe,
}
