"""The rows compared with a second copy of the paper's table, and their scaling to other sizes."""

import re
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.transformer import Transformer
from pipeline.common.settings import RowName, Settings, flatten, load_settings
from sweeps.table3 import Row, apply, rows
from tests.support.settings_files import MINI, REPOSITORY

NAMES = get_args(RowName)

# Each row in full; the paper leaves base's values blank. "-": the paper prints no number of parameters (1e6).
TABLE = """
row          N d_model d_ff  h d_k d_v P_drop eps_ls kilosteps  ppl bleu params
base         6     512 2048  8  64  64    0.1    0.1       100 4.92 25.8     65
A-h1         6     512 2048  1 512 512    0.1    0.1       100 5.29 24.9      -
A-h4         6     512 2048  4 128 128    0.1    0.1       100 5.00 25.5      -
A-h16        6     512 2048 16  32  32    0.1    0.1       100 4.91 25.8      -
A-h32        6     512 2048 32  16  16    0.1    0.1       100 5.01 25.4      -
B-dk16       6     512 2048  8  16  64    0.1    0.1       100 5.16 25.1     58
B-dk32       6     512 2048  8  32  64    0.1    0.1       100 5.01 25.4     60
C-N2         2     512 2048  8  64  64    0.1    0.1       100 6.11 23.7     36
C-N4         4     512 2048  8  64  64    0.1    0.1       100 5.19 25.3     50
C-N8         8     512 2048  8  64  64    0.1    0.1       100 4.88 25.5     80
C-dmodel256  6     256 2048  8  32  32    0.1    0.1       100 5.75 24.5     28
C-dmodel1024 6    1024 2048  8 128 128    0.1    0.1       100 4.66 26.0    168
C-dff1024    6     512 1024  8  64  64    0.1    0.1       100 5.12 25.4     53
C-dff4096    6     512 4096  8  64  64    0.1    0.1       100 4.75 26.2     90
D-dropout0.0 6     512 2048  8  64  64    0.0    0.1       100 5.77 24.6      -
D-dropout0.2 6     512 2048  8  64  64    0.2    0.1       100 4.95 25.5      -
D-ls0.0      6     512 2048  8  64  64    0.1    0.0       100 4.67 25.3      -
D-ls0.2      6     512 2048  8  64  64    0.1    0.2       100 5.47 25.7      -
E-learned    6     512 2048  8  64  64    0.1    0.1       100 4.92 25.7      -
big          6    1024 4096 16  64  64    0.3    0.1       300 4.33 26.4    213
"""
PAPER = [line.split() for line in TABLE.strip().splitlines()[1:]]
PAPERS_GROUPS = ["A", "B", "C", "D", "E", "big"]


@cache
def preset(name: str) -> Settings:
    """Return the project's settings with another preset of conf/model, or with the tests' mini."""
    if name != "mini":
        return load_settings(REPOSITORY, model=name)
    own = load_settings(REPOSITORY)
    own = replace(own, train=replace(own.train, max_steps=900))
    return changed(own, **MINI, positions="sinusoidal", norm="post", label_smoothing=0.1)


def changed(settings: Settings, **changes: Any) -> Settings:
    """Return settings with these fields of `model` changed. `label_smoothing` is a field of `train`."""
    train = {"label_smoothing": changes.pop("label_smoothing")} if "label_smoothing" in changes else {}
    return replace(settings, model=replace(settings.model, **changes), train=replace(settings.train, **train))


def by_id(settings: Settings, chosen: list[str] | tuple[str, ...] = NAMES, grid: Any = None) -> dict[str, Row]:
    found = rows(settings, chosen, grid or {})
    assert len({row.id for row in found}) == len(found)
    return {row.id: row for row in found}


# --- the paper


def test_rows_on_the_papers_base_are_the_papers():
    base, found = preset("base"), by_id(preset("base"), PAPERS_GROUPS)
    assert list(found) == [line[0] for line in PAPER]
    for name, *sizes, _, _, _ in PAPER:
        settings = apply(base, found[name])
        m, t = settings.model, settings.train
        ours = (m.num_layers, m.d_model, m.d_ff, m.num_heads, m.d_k, m.d_v, m.dropout, t.label_smoothing)
        assert [str(value) for value in (*ours, t.max_steps // 1000)] == sizes, name
        assert m.positions == ("learned" if name == "E-learned" else "sinusoidal")
        assert found[name].skipped is None


def test_rows_big_is_the_preset_big_but_for_what_table_3_leaves_out():
    big = apply(preset("base"), by_id(preset("base"))["big"])
    assert big.model == preset("big").model
    assert (big.train.max_steps, big.train.label_smoothing) == (300_000, 0.1)


def test_rows_have_what_the_paper_prints():
    found = by_id(preset("mini"))
    for name, *_, ppl, bleu, params in PAPER:
        published = found[name].published
        assert published is not None
        ours = (
            f"{published.ppl:.2f}",
            f"{published.bleu:.1f}",
            "-" if published.params is None else f"{published.params}",
        )
        assert ours == (ppl, bleu, params), name
    assert {row.id for row in found.values() if row.published is None} == {
        "positions-none", "positions-relative", "positions-rotary", "positions-alibi", "norm-pre",
    }  # fmt: skip


def num_parameters(settings: Settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(settings.model.config(vocab_size=37_000)).parameters())


def test_rows_differ_from_base_in_parameters_as_in_table_3():
    base, count = preset("base"), num_parameters(preset("base"))
    for row in rows(base, ["B", "layers", "d_ff"], {})[1:]:
        assert row.published is not None
        assert row.published.params is not None
        difference = (num_parameters(apply(base, row)) - count) / 1e6
        assert difference == pytest.approx(row.published.params - 65, abs=1), row.id  # both numbers are rounded
    for row in rows(base, ["A", "D"], {}):
        assert num_parameters(apply(base, row)) == count, row.id


# --- at other sizes


def test_rows_on_mini_are_scaled_by_the_papers_ratio():
    found = by_id(preset("mini"))  # 2 layers, d_model 128, d_ff 256, 4 heads of 32, 900 steps
    assert {row.label: dict(row.changes) for row in found.values() if row.skipped is None} == {
        "base": {},
        "A: 2 heads": {"model.num_heads": 2, "model.d_k": 64, "model.d_v": 64},
        "A: 8 heads": {"model.num_heads": 8, "model.d_k": 16, "model.d_v": 16},
        "A: 16 heads": {"model.num_heads": 16, "model.d_k": 8, "model.d_v": 8},
        "B: d_k 8": {"model.d_k": 8},
        "B: d_k 16": {"model.d_k": 16},
        "C: d_model 64": {"model.d_model": 64, "model.d_k": 16, "model.d_v": 16},
        "C: d_model 256": {"model.d_model": 256, "model.d_k": 64, "model.d_v": 64},
        "C: d_ff 128": {"model.d_ff": 128},
        "C: d_ff 512": {"model.d_ff": 512},
        "D: dropout 0.0": {"model.dropout": 0.0},
        "D: dropout 0.2": {"model.dropout": 0.2},
        "D: label smoothing 0.0": {"train.label_smoothing": 0.0},
        "D: label smoothing 0.2": {"train.label_smoothing": 0.2},
        "E: learned positions": {"model.positions": "learned"},
        "big": {
            "model.d_model": 256,
            "model.d_ff": 512,
            "model.num_heads": 8,
            "model.dropout": 0.3,
            "train.max_steps": 2700,
        },
        "no positions": {"model.positions": "none"},
        "relative positions": {"model.positions": "relative"},
        "rotary positions": {"model.positions": "rotary"},
        "alibi positions": {"model.positions": "alibi"},
        "norm pre": {"model.norm": "pre"},
    }
    assert {row.id: row.skipped for row in found.values() if row.skipped} == {
        "A-h1": "4 heads x 1/8 is 0.5 heads",
        "C-N2": "2 layers x 1/3 is 0.667 layers",
        "C-N4": "2 layers x 2/3 is 1.333 layers",
        "C-N8": "2 layers x 4/3 is 2.667 layers",
    }


def test_rows_on_tiny_scale_its_own_dropout():
    found = by_id(preset("tiny"))  # dropout 0.3, 8,000 steps
    assert found["D-dropout0.0"].changes == {"model.dropout": 0.0}
    assert found["D-dropout0.2"].changes == {"model.dropout": 0.6}
    assert found["big"].changes["model.dropout"] == 0.9
    assert found["big"].changes["train.max_steps"] == 24_000


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 99), st.integers(1, 40), st.integers(1, 33))
def test_rows_keep_the_papers_ratios_or_are_skipped(num_heads: int, d_k: int, num_layers: int, hundredths: int):
    sizes = {"num_heads": num_heads, "d_k": d_k, "num_layers": num_layers, "dropout": hundredths / 100}
    ours = changed(preset("mini"), positions="none", **sizes)
    paper, papers_base, at_hand = by_id(preset("base"), PAPERS_GROUPS), flatten(preset("base")), flatten(ours)
    for row in rows(ours, PAPERS_GROUPS, {}):
        exact = {
            key: Fraction(str(at_hand[key])) * Fraction(str(value)) / Fraction(str(papers_base[key]))
            for key, value in paper[row.id].changes.items()
            if not isinstance(value, str)
        }
        shares = ("model.dropout", "train.label_smoothing")
        if all(value.denominator == 1 for key, value in exact.items() if key not in shares):
            assert row.skipped is None
            assert {key: Fraction(str(row.changes[key])) for key in exact} == exact
        else:
            assert " x " in str(row.skipped)
            with pytest.raises(ValueError, match="must be a whole number >= 1, got"):
                apply(ours, row)


@pytest.mark.parametrize(
    ("changes", "id", "reason"),
    [
        ({"num_heads": 1}, "A-h4", "1 head x 1/2 is 0.5 heads"),
        ({"d_k": 6}, "B-dk16", "d_k 6 x 1/4 is d_k 1.5"),
        ({"d_v": 7}, "A-h16", "d_v 7 x 1/2 is d_v 3.5"),
        ({"d_ff": 17}, "C-dff1024", "d_ff 17 x 1/2 is d_ff 8.5"),
        ({"d_model": 26}, "C-dmodel256", "model.d_model must be even with sinusoidal positions, got 13"),
        ({"positions": "rotary", "d_k": 12}, "B-dk16", "model.d_k must be even with rotary positions, got 3"),
        ({"d_k": 7}, "positions-rotary", "model.d_k must be even with rotary positions, got 7"),
        (
            {"dropout": 0.5},
            "D-dropout0.2",
            "model.dropout must be in [0, 1), got 1.0",
        ),
        ({"dropout": 0.4}, "big", "model.dropout must be in [0, 1), got 1.2"),
        (
            {"label_smoothing": 0.6},
            "D-ls0.2",
            "train.label_smoothing must be in [0, 1), got 1.2",
        ),
        ({"positions": "rotary"}, "positions-rotary", "is the same as base"),
        ({"positions": "learned"}, "E-learned", "is the same as base"),
        ({"dropout": 0}, "D-dropout0.0", "is the same as base"),
        ({"dropout": 0.0}, "D-dropout0.2", "is the same as base"),
    ],
)
def test_rows_that_cannot_run_have_the_reason(changes, id, reason):
    assert by_id(changed(preset("mini"), **changes))[id].skipped == reason


@pytest.mark.parametrize("name", ["base", "mini", "tiny"])
def test_apply_changes_what_the_row_names_and_nothing_else(name):
    base = preset(name)
    before = flatten(base)
    for row in rows(base, NAMES, {"model.max_length": [89], "train.warmup_steps": [7]}):
        if row.skipped is None:
            after = flatten(apply(base, row))
            assert {key: value for key, value in after.items() if value != before[key]} == row.changes, row.id


def test_apply_gives_settings_that_build_and_predict():
    torch.manual_seed(1)
    base = changed(preset("mini"), num_layers=3, num_heads=8)
    for row in rows(base, NAMES, {}):
        assert row.skipped is None
        model = Transformer(apply(base, row).model.config(vocab_size=23))
        logits = model.logits(model(torch.randint(4, 23, (2, 5)), torch.randint(4, 23, (2, 7))))
        assert logits.shape == (2, 7, 23)
        assert logits.isfinite().all(), row.id


# --- selection of rows


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([], ["base"]),
        (["B"], ["base", "B-dk16", "B-dk32"]),
        (["big", "d_k"], ["base", "B-dk16", "B-dk32", "big"]),
        (["d_k", "B", "d_k"], ["base", "B-dk16", "B-dk32"]),
        (["D"], ["base", "D-dropout0.0", "D-dropout0.2", "D-ls0.0", "D-ls0.2"]),
        (["label_smoothing"], ["base", "D-ls0.0", "D-ls0.2"]),
        (["dropout"], ["base", "D-dropout0.0", "D-dropout0.2"]),
        (["d_model"], ["base", "C-dmodel256", "C-dmodel1024"]),
        (["E"], ["base", "E-learned"]),
        (
            ["positions"],
            ["base", "E-learned", "positions-none", "positions-relative", "positions-rotary", "positions-alibi"],
        ),
        (["norm", "E", "heads"], ["base", "A-h1", "A-h4", "A-h16", "A-h32", "E-learned", "norm-pre"]),
    ],
)
def test_rows_are_chosen_by_group_and_axis_in_the_papers_order(chosen, expected):
    assert [row.id for row in rows(preset("base"), chosen, {})] == expected


def test_rows_of_group_c_are_its_three_axes():
    axes = [row.id for row in rows(preset("base"), ["layers", "d_model", "d_ff"], {})]
    assert [row.id for row in rows(preset("base"), ["C"], {})] == axes


def test_rows_of_norm_have_the_other_norm():
    found = by_id(changed(preset("base"), norm="pre"), ["norm"])
    assert found["norm-post"].changes == {"model.norm": "post"}
    assert found["norm-post"].label == "norm post"
    assert "norm-pre" not in found


# --- rows of a user's grid


def test_rows_have_every_combination_of_a_grid_but_base():
    found = rows(preset("mini"), [], {"model.d_ff": [64, 256], "model.dropout": [0, 0.1, 0.3]})
    assert [(row.id, row.label, row.changes) for row in found[1:]] == [
        (
            "grid-d_ff64-dropout0.0",
            "grid: d_ff 64, dropout 0.0",
            {"model.d_ff": 64, "model.dropout": 0.0},
        ),
        ("grid-d_ff64", "grid: d_ff 64", {"model.d_ff": 64}),
        (
            "grid-d_ff64-dropout0.3",
            "grid: d_ff 64, dropout 0.3",
            {"model.d_ff": 64, "model.dropout": 0.3},
        ),
        ("grid-dropout0.0", "grid: dropout 0.0", {"model.dropout": 0.0}),
        ("grid-dropout0.3", "grid: dropout 0.3", {"model.dropout": 0.3}),
    ]
    assert {(row.group, row.axis, row.published, row.skipped) for row in found[1:]} == {("grid", "grid", None, None)}


def test_rows_keep_their_names_with_more_values_in_another_order():
    before = by_id(preset("mini"), [], {"train.warmup_steps": [7, 300], "model.d_ff": [64, 512]})
    after = by_id(
        preset("mini"), [], {"model.d_ff": [8, 512, 64], "model.d_k": [3, 32], "train.warmup_steps": [7, 300]}
    )
    assert len(before) == 1 + 4
    assert before == {id: after[id] for id in before}
    assert len(after) == 1 + 3 * 2 * 2


def test_rows_leave_out_a_row_of_a_grid_that_is_another_row():
    grid = {"model.dropout": [0.2, 0.4, 0.4], "model.positions": ["sinusoidal", "rotary"]}
    found = [row.id for row in rows(preset("mini"), ["dropout", "positions"], grid)]
    assert found[-3:] == ["grid-dropout0.2-positionsrotary", "grid-dropout0.4", "grid-dropout0.4-positionsrotary"]
    assert found[:-3] == [row.id for row in rows(preset("mini"), ["dropout", "positions"], {})]


def test_rows_skip_a_combination_that_is_refused():
    found = by_id(preset("mini"), [], {"model.positions": ["rotary", "none"], "model.d_k": [7]})
    reason = "model.d_k must be even with rotary positions, got 7"
    assert [row.skipped for row in found.values()] == [None, reason, None]
    assert found["grid-d_k7-positionsnone"].label == "grid: d_k 7, no positions"


@pytest.mark.parametrize("name", ["base", "mini"])
def test_rows_have_ids_that_are_safe_in_a_files_name(name):
    grid = {"train.eps": [1e-12, 1e-7], "model.positions": ["rotary"], "train.beta2": [0.98, 0.997]}
    for id in by_id(preset(name), NAMES, grid):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", id)
