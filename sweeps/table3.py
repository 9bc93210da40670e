"""Table 3 of the paper as data, and its rows scaled to the base model of params.yaml.

A row is a set of changes from base. If base has other sizes than the paper's, each number is scaled by the paper's
ratio (1 head of 8 becomes x 1/8), so that with conf/model/base.yaml the rows are exactly the paper's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any

from pipeline.common.settings import GRID_KEYS, Settings, flatten
from pipeline.tracking.names import setting_name

Value = int | float | str

BLEU, PPL, TEST_BLEU = "valid_averaged_bleu", "valid_averaged_ppl", "test_bleu"
"""The metrics of the table, by their names in MLflow, all with averaged weights: two of the validation split, as in
the paper's Table 3, and one of the test split."""


@dataclass(frozen=True)
class Published:
    """The paper's numbers: perplexity per wordpiece and BLEU on newstest2013, and millions of parameters, None where
    the paper leaves them blank because they are the same as base's."""

    ppl: float
    bleu: float
    params: int | None


@dataclass(frozen=True)
class Row:
    """`changes` are the settings that differ from base. `skipped` is the reason if the row cannot be run, or None."""

    id: str  # unique, and safe as a file name
    group: str  # base, A, B, C, D, E, big; beyond (the paper); grid (the user's own)
    axis: str  # base, heads, d_k, layers, d_model, d_ff, dropout, label_smoothing, positions, norm, big, grid
    label: str
    changes: Mapping[str, Value]
    published: Published | None = None
    skipped: str | None = None


def _named(key: str, value: Value) -> str:
    return setting_name(key, value, {"num_heads": "heads", "num_layers": "layers"})


def _label(group: str, changes: Mapping[str, Value]) -> str:
    if group in ("base", "big"):
        return group
    named = [_named(key, value) for key, value in changes.items()]
    if group == "grid":
        return f"grid: {', '.join(named)}"
    return named[0] if group == "beyond" else f"{group}: {named[0]}"  # the others follow from the first


def _row(
    id: str,
    group: str,
    axis: str,
    changes: Mapping[str, Value],
    ppl: float | None = None,
    bleu: float | None = None,
    params: int | None = None,
) -> Row:
    published = Published(ppl, bleu, params) if ppl is not None and bleu is not None else None
    return Row(id, group, axis, _label(group, changes), changes, published)


BASE: Mapping[str, int | float] = {
    "model.num_layers": 6,
    "model.d_model": 512,
    "model.d_ff": 2048,
    "model.num_heads": 8,
    "model.d_k": 64,
    "model.d_v": 64,
    "model.dropout": 0.1,
    "train.label_smoothing": 0.1,
    "train.max_steps": 100_000,
}
"""The first row of Table 3. The numbers of all other rows are scaled relative to it."""

BIG: Mapping[str, Value] = {
    "model.d_model": 1024,
    "model.d_ff": 4096,
    "model.num_heads": 16,
    "model.dropout": 0.3,
    "train.max_steps": 300_000,
}

TABLE_3 = (
    _row("base", "base", "base", {}, 4.92, 25.8, 65),
    _row("A-h1", "A", "heads", {"model.num_heads": 1, "model.d_k": 512, "model.d_v": 512}, 5.29, 24.9),
    _row("A-h4", "A", "heads", {"model.num_heads": 4, "model.d_k": 128, "model.d_v": 128}, 5.00, 25.5),
    _row("A-h16", "A", "heads", {"model.num_heads": 16, "model.d_k": 32, "model.d_v": 32}, 4.91, 25.8),
    _row("A-h32", "A", "heads", {"model.num_heads": 32, "model.d_k": 16, "model.d_v": 16}, 5.01, 25.4),
    _row("B-dk16", "B", "d_k", {"model.d_k": 16}, 5.16, 25.1, 58),
    _row("B-dk32", "B", "d_k", {"model.d_k": 32}, 5.01, 25.4, 60),
    _row("C-N2", "C", "layers", {"model.num_layers": 2}, 6.11, 23.7, 36),
    _row("C-N4", "C", "layers", {"model.num_layers": 4}, 5.19, 25.3, 50),
    _row("C-N8", "C", "layers", {"model.num_layers": 8}, 4.88, 25.5, 80),
    _row("C-dmodel256", "C", "d_model", {"model.d_model": 256, "model.d_k": 32, "model.d_v": 32}, 5.75, 24.5, 28),
    _row(
        "C-dmodel1024", "C", "d_model", {"model.d_model": 1024, "model.d_k": 128, "model.d_v": 128}, 4.66, 26.0, 168
    ),
    _row("C-dff1024", "C", "d_ff", {"model.d_ff": 1024}, 5.12, 25.4, 53),
    _row("C-dff4096", "C", "d_ff", {"model.d_ff": 4096}, 4.75, 26.2, 90),
    _row("D-dropout0.0", "D", "dropout", {"model.dropout": 0.0}, 5.77, 24.6),
    _row("D-dropout0.2", "D", "dropout", {"model.dropout": 0.2}, 4.95, 25.5),
    _row("D-ls0.0", "D", "label_smoothing", {"train.label_smoothing": 0.0}, 4.67, 25.3),
    _row("D-ls0.2", "D", "label_smoothing", {"train.label_smoothing": 0.2}, 5.47, 25.7),
    _row("E-learned", "E", "positions", {"model.positions": "learned"}, 4.92, 25.7),
    _row("big", "big", "big", BIG, 4.33, 26.4, 213),
)

BEYOND = tuple(
    _row(f"positions-{kind}", "beyond", "positions", {"model.positions": kind})
    for kind in ("none", "relative", "rotary", "alibi")
)


def rows(settings: Settings, chosen: Sequence[str], grid: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Base, the rows of the chosen groups and axes in the paper's order, and every combination of the grid's values.

    `settings` describe base. `grid` is {"model.d_ff": values, ...}; combinations that equal base or another row are
    left out. A row that would have a fraction of something (a head, say), that has invalid settings, or that equals
    base is included, with the reason in `skipped`.
    """
    other_norm = "pre" if settings.model.norm == "post" else "post"
    norm = _row(f"norm-{other_norm}", "beyond", "norm", {"model.norm": other_norm})
    wanted = {"base", *chosen}
    found = [_scaled(settings, row) for row in (*TABLE_3, *BEYOND, norm) if wanted & {row.group, row.axis}]
    for row in _grid_rows(settings, grid):
        if all(row.changes != other.changes for other in found):
            found.append(row)
    return found


def apply(settings: Settings, row: Row) -> Settings:
    """The settings with the row's changes. Raises ValueError if they are invalid."""
    changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for key, value in row.changes.items():
        section, name = key.split(".")
        changes[section][name] = value
    model, train = replace(settings.model, **changes["model"]), replace(settings.train, **changes["train"])
    return replace(settings, model=model, train=train)


def _scaled(settings: Settings, row: Row) -> Row:
    """The paper's row, scaled to the base that `settings` describe."""
    ours = _values(settings)
    changes: dict[str, Value] = {}
    skipped = None
    for key, value in row.changes.items():
        if isinstance(value, str):
            changes[key] = value
            continue
        ratio = _exact(value) / _exact(BASE[key])
        number = _exact(ours[key]) * ratio
        if isinstance(value, float):
            changes[key] = float(number)
        elif number.denominator == 1:
            changes[key] = int(number)
        else:
            changes[key] = round(float(number), 3)
            skipped = skipped or f"{_named(key, ours[key])} x {ratio} is {_named(key, changes[key])}"
    row = replace(row, label=_label(row.group, changes), changes=changes)
    return replace(row, skipped=skipped or _refused(settings, row))


def _grid_rows(settings: Settings, grid: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """The rows of the grid. They are named after what differs from base, so that more values or settings, or another
    order, do not change the names."""
    ours = _values(settings)
    keys = [key for key in GRID_KEYS if key in grid]
    lists = [[float(value) if isinstance(ours[key], float) else value for value in grid[key]] for key in keys]
    for combination in product(*lists):
        changes = {key: value for key, value in zip(keys, combination, strict=True) if value != ours[key]}
        name = "-".join(["grid", *(f"{key.partition('.')[2]}{value}" for key, value in changes.items())])
        row = Row(name, "grid", "grid", _label("grid", changes), changes)
        yield replace(row, skipped=_refused(settings, row))


def _refused(settings: Settings, row: Row) -> str | None:
    try:
        same = apply(settings, row) == settings
    except ValueError as error:
        return str(error)
    return "is the same as base" if same and row.group != "base" else None


def _values(settings: Settings) -> dict[str, Any]:
    return flatten(settings.model, "model.") | flatten(settings.train, "train.")


def _exact(number: float) -> Fraction:
    return Fraction(str(number))  # the decimal as written, so that 3 x 0.1 is 0.3
