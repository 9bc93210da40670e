from pathlib import Path

import pytest

from pipeline.common.code_digest import code_digest

SOURCE = '''\
"""A module."""

import math

LIMIT = 3
"""The most."""


class Circle:
    """A circle."""

    def area(self, r):
        """Of radius r."""
        return math.pi * r**2  # section 3.1


async def nothing():
    """Nothing."""
'''


def digest_of(tmp_path: Path, source: str, name: str = "a.py") -> str:
    (tmp_path / name).write_text(source)
    return code_digest(tmp_path, [name])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("section 3.1", "section 3.2"),
        ("  # section 3.1", ""),
        ("\nLIMIT", "\n# of what?\n\nLIMIT"),
        ('"""A module."""\n', ""),
        ('"""The most."""', '"""The least."""'),
        ('    """A circle."""\n\n', ""),
        ("Of radius r", "Of a diameter of 2 r"),
        ('"""Nothing."""', '"""Nothing at all."""'),
        ("math.pi * r**2", "(\n            math.pi * r ** 2\n        )"),
    ],
)
def test_code_digest_ignores_comments_docstrings_and_formatting(tmp_path, before, after):
    assert before in SOURCE
    assert digest_of(tmp_path, SOURCE.replace(before, after)) == digest_of(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("r**2", "r*2"),
        ("LIMIT = 3", "LIMIT = 5"),
        ("LIMIT = 3", 'LIMIT = "3"'),
        ("def area(self, r)", "def area(self, r=1)"),
        ("return math.pi", "return -math.pi"),
        ("async def", "def"),
        ("        return math.pi * r**2  # section 3.1\n", ""),
    ],
)
def test_code_digest_changes_with_what_the_code_does(tmp_path, before, after):
    assert before in SOURCE
    assert digest_of(tmp_path, SOURCE.replace(before, after)) != digest_of(tmp_path, SOURCE)


def test_code_digest_depends_on_which_file_holds_the_code_and_not_on_their_order(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").write_text("x = 2")
    before = code_digest(tmp_path, ["a.py", "b.py"])
    assert code_digest(tmp_path, ["b.py", "a.py"]) == before
    (tmp_path / "a.py").write_text("x = 2")
    (tmp_path / "b.py").write_text("x = 1")
    assert code_digest(tmp_path, ["a.py", "b.py"]) != before


def test_code_digest_names_a_file_that_is_missing_or_no_python(tmp_path):
    with pytest.raises(ValueError, match=r"a\.py does not exist: run from the project's root"):
        code_digest(tmp_path, ["a.py"])
    (tmp_path / "a.py").write_text("x = (")
    with pytest.raises(ValueError, match=r"a\.py is not valid Python: "):
        code_digest(tmp_path, ["a.py"])
