import ast

from tools import mutate
from tools.mutate import choose, mutations_of


def test_choose_takes_folders_in_turn_and_breaks_one_place():
    mutations = choose(["model", "sweeps"], 10, seed=3)
    assert [mutation.file.partition("/")[0] for mutation in mutations] == ["model", "sweeps"] * 5
    for mutation in mutations:
        code = (mutate.REPOSITORY / mutation.file).read_text()
        assert ast.dump(ast.parse(mutation.code)) != ast.dump(ast.parse(code))
        assert mutation.code.count("\n") == code.count("\n") - mutation.old.count("\n")
    assert choose(["model", "sweeps"], 10, seed=3) == mutations
    assert choose(["model", "sweeps"], 10, seed=4) != mutations


def test_mutations_of_a_function_are_its_operators_constants_and_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "REPOSITORY", tmp_path)
    (tmp_path / "code.py").write_text('''
SIZE = 3

def f(values: list[int] = []) -> int:
    """Not 1 + 1."""
    if len(values) < 2 or not values:
        raise ValueError(f"{1 + 1} or more")
    log(1 + 1)
    values.sort()
    total = values[0] - 5
    return total
''')
    found = [(mutation.line, mutation.old, mutation.new) for mutation in mutations_of("code.py")]
    assert found == [
        (6, "len(values) < 2 or not values", "(len(values) < 2 and (not values))"),
        (6, "len(values) < 2", "(len(values) <= 2)"),
        (6, "2", "(3)"),
        (6, "not values", "(values)"),
        (9, "values.sort()", "pass"),
        (10, "values[0] - 5", "(values[0] + 5)"),
        (10, "0", "(1)"),
        (10, "5", "(6)"),
    ]
