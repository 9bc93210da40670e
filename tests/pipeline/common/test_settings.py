"""All ways in which a settings file can be wrong, and that the code reads each setting."""

import ast
import re
import shutil
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from model.config import Positions
from pipeline.common.settings import GRID_KEYS, SECTIONS, RowName, flatten, load_settings
from pipeline.common.yaml_files import read_yaml
from tests.support.settings_files import REPOSITORY, copy_settings

EACH_KEY = f"each key of sweep.grid must be one of {', '.join(GRID_KEYS)}"
POSITIONS = ", ".join(get_args(Positions))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the project's settings, which a test may change."""
    copy_settings(tmp_path)
    return tmp_path


def set_value(root: Path, section: str, key: str, value: Any = MISSING) -> None:
    """Set a value, or remove the key."""
    path = root / "params.yaml"
    content = yaml.safe_load(path.read_text())
    values = content[section] if section else content
    values.pop(key, None)
    if value is not MISSING:
        values[key] = value
    path.write_text(yaml.safe_dump(content))


def refused(root: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{root}/params.yaml: {message}')}$"):
        load_settings(root)


FIELDS = [(section, field.name, field.type) for section, cls in SECTIONS.items() for field in fields(cls)]
KEYS = [f"{section}.{key}" for section, key, _ in FIELDS]
GRAMMAR_KEYS = ("seed", "train_pairs", "valid_pairs", "test_pairs")
"""Keys of the section data that only the generated corpus has."""


@pytest.mark.parametrize(("section", "key", "of_type"), FIELDS, ids=KEYS)
def test_load_settings_names_a_missing_value(root, section, key, of_type):
    set_value(root, section, key)
    if section == "data" and key in GRAMMAR_KEYS:
        refused(root, f"data.{key} must be a whole number >= 1 for the corpus grammar, got null")
    else:
        refused(root, f"{section}.{key} is missing")


WORDS = {
    "data.corpus": "text (in quotes)",
    "data.train_pairs": "a whole number >= 1",
    "validate.max_length_ratio": "a number >= 1",
    "validate.max_dropped_share": "a number in [0, 1]",
    "tokenize.vocab_size": "> 4, the number of reserved tokens",
    "tokenize.lowercase": "true or false",
    "model.num_layers": "a whole number >= 1",
    "model.dropout": "a number in [0, 1)",
    "model.norm": "one of post, pre",
    "train.seed": "a whole number in [0, 2^63)",
    "train.eps": "a number > 0",
    "train.max_grad_norm": "a number >= 0",
    "hardware.num_workers": "a whole number >= 1 or [least, most]",
    "hardware.max_failures": "a whole number >= 0",
    "sweep.rows": "a list",
    "sweep.seeds": "a list of different numbers in [0, 2^63)",
    "sweep.grid": "`name: value` lines",
    "tracking.experiment": "text (in quotes)",
}
"""One value of each type."""


@pytest.mark.parametrize("name", WORDS)
def test_load_settings_names_a_value_of_the_wrong_type_and_what_it_must_be(root, name):
    section, key = name.split(".")
    own = read_yaml(root / "params.yaml")[section][key]
    for value, printed in ((3.5, "3.5"), ({"a": 1}, "{'a': 1}"), (True, "true"), ("x", "'x'"), ([3.5], "[3.5]")):
        if type(value) is type(own) or (type(own) is float and type(value) is float) or name == "sweep.grid":
            continue
        set_value(root, section, key, value)
        refused(root, f"{name} must be {WORDS[name]}, got {printed}")


@pytest.mark.parametrize(("section", "key", "of_type"), FIELDS, ids=KEYS)
def test_load_settings_refuses_a_value_of_another_type_everywhere(root, section, key, of_type):
    set_value(root, section, key, {3: [1]})
    with pytest.raises(ValueError, match=rf"params\.yaml: (each key of )?{section}\.{key} must be .*, got "):
        load_settings(root)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("rows", ["heads", "Z"], f"sweep.rows must be one of {', '.join(get_args(RowName))}, got 'Z'"),
        ("rows", [None], f"sweep.rows must be one of {', '.join(get_args(RowName))}, got null"),
        ("seeds", [2, "3"], "sweep.seeds must be a list of different numbers in [0, 2^63), got [2, '3']"),
        ("seeds", [2, -1], "sweep.seeds must be a list of different numbers in [0, 2^63), got [2, -1]"),
        ("seeds", [True], "sweep.seeds must be a list of different numbers in [0, 2^63), got [true]"),
        ("grid", {"model.d_ff": 64}, "sweep.grid.model.d_ff must be a list, got 64"),
        ("grid", {"model.d_ff": ["64"]}, "sweep.grid.model.d_ff must be a whole number >= 1, got '64'"),
        ("grid", {"model.d_ff": [64, 0]}, "sweep.grid.model.d_ff must be >= 1, got 0"),
        (
            "grid",
            {"model.positions": ["polar"]},
            f"sweep.grid.model.positions must be one of {POSITIONS}, got 'polar'",
        ),
        (
            "grid",
            {"model.d_k": [5], "model.d_ff": []},
            "sweep.grid.model.d_ff must be a list of one value or more, got []",
        ),
        ("grid", {"d_ff": [64]}, f"each key of sweep.grid must be one of {', '.join(GRID_KEYS)}, got 'd_ff'"),
        (
            "grid",
            {"train.seed": [1]},
            f"each key of sweep.grid must be one of {', '.join(GRID_KEYS)}, got 'train.seed'",
        ),
        ("num_workers", {"heads": 2, "big": "4"}, "sweep.num_workers.big must be a whole number >= 1, got '4'"),
        ("num_workers", {"heads": 2, "d_k": 0}, "sweep.num_workers.d_k must be >= 1, got 0"),
        (
            "num_workers",
            {"Z": 2},
            f"each key of sweep.num_workers must be one of {', '.join(get_args(RowName))}, got 'Z'",
        ),
    ],
)
def test_load_settings_names_what_is_wrong_inside_a_list(root, key, value, fault):
    set_value(root, "sweep", key, value)
    refused(root, fault)


def test_hardware_num_workers_is_one_number_or_a_range(root):
    for value, least, most in ((3, 3, 3), ([2, 5], 2, 5)):
        set_value(root, "hardware", "num_workers", value)
        hardware = load_settings(root).hardware
        assert (hardware.min_workers, hardware.max_workers) == (least, most)
    set_value(root, "hardware", "num_workers", [2, "5"])
    refused(root, "hardware.num_workers must be a whole number >= 1 or [least, most], got [2, '5']")


def test_load_settings_reads_lists_and_sections_of_every_type(root):
    set_value(root, "sweep", "seeds", [5, 3])
    set_value(root, "sweep", "rows", [])
    grid = {"model.d_ff": [64, 256], "model.positions": ["none"], "train.beta1": [0.5]}
    set_value(root, "sweep", "grid", grid)
    set_value(root, "sweep", "num_workers", {"big": 3})
    sweep = load_settings(root).sweep
    assert (sweep.seeds, sweep.rows, sweep.grid, sweep.num_workers) == ([5, 3], [], grid, {"big": 3})


@pytest.mark.parametrize("section", SECTIONS)
def test_load_settings_names_an_unknown_key_and_lists_the_known(root, section):
    set_value(root, section, "colour", 3)
    known = ", ".join(sorted(field.name for field in fields(SECTIONS[section])))
    refused(root, f"{section}.colour is unknown: it must be one of {known}")


@pytest.mark.parametrize("section", SECTIONS)
def test_load_settings_names_a_section_that_is_unknown_missing_or_none(root, section):
    set_value(root, "", section, 3)
    refused(root, f"{section} must be a section of `key: value` lines, got 3")
    set_value(root, "", section)
    refused(root, f"{section} is missing")
    set_value(root, "", "colour", {})
    with pytest.raises(ValueError, match=re.escape("params.yaml: colour is unknown: it must be one of ")):
        load_settings(root)


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [("", "modle", "model"), ("train", "max_step", "train.max_steps"), ("model", "heads", "model.num_heads")],
)
def test_load_settings_guesses_which_key_was_meant(root, section, key, known):
    set_value(root, section, key, 4)
    refused(root, f"{section and section + '.'}{key} is unknown: did you mean {known}?")


def test_load_settings_names_the_file_relative_to_the_current_folder(root, monkeypatch):
    set_value(root, "model", "dropout", False)
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=r"^params\.yaml: model\.dropout must be a number in \[0, 1\), got false$"):
        load_settings(root)


def test_load_settings_cuts_a_value_that_would_fill_the_terminal(root):
    """A long text, and 41 short lists whose YAML aliases make a list of 9^40 elements."""
    set_value(root, "", "model", "x" * 9999)
    with pytest.raises(ValueError, match=r"got 'xxx.*\.\.\..*xxx'") as caught:
        load_settings(root)
    assert len(str(caught.value)) < 500
    lists = ["&l0 [ha]", *(f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 41))]
    set_value(root, "", "model", "LISTS")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace("LISTS", f"[{', '.join(lists)}]"))
    with pytest.raises(ValueError, match=r"got \[.*, \.\.\.\]$") as caught:
        load_settings(root)
    assert len(str(caught.value)) < 10_000


def test_load_settings_names_the_command_where_a_section_is_a_presets_name(root):
    set_value(root, "", "model", "tiny")
    refused(
        root,
        "model must be a section of `key: value` lines, got 'tiny'; for a preset's values, run "
        "python -m pipeline.preset model=tiny",
    )
    set_value(root, "", "sweep", "tiny")
    with pytest.raises(ValueError, match=r"got 'tiny'; for a preset's values, run .* model=tiny"):  # the first error
        load_settings(root)


FROM_1 = ">= 1"
FROM_0 = ">= 0"
SHARE = "in [0, 1)"
IMPOSSIBLE = [
    *[("data", key, 0, FROM_1) for key in GRAMMAR_KEYS],
    ("data", "tgt", "en", "a language other than data.src"),
    ("validate", "max_words", 0, FROM_1),
    ("validate", "max_length_ratio", 0.9, ">= 1"),
    ("validate", "max_dropped_share", 1.01, "in [0, 1]"),
    ("validate", "max_dropped_share", -0.1, "in [0, 1]"),
    ("tokenize", "vocab_size", 4, "> 4, the number of reserved tokens"),
    *[
        ("model", key, 0, FROM_1)
        for key in ("num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "max_length")
    ],
    ("model", "dropout", 1.0, SHARE),
    ("model", "dropout", 1.5, SHARE),
    ("train", "label_smoothing", 1.0, SHARE),
    ("train", "beta1", 1, SHARE),
    ("train", "beta2", -0.1, SHARE),
    *[
        ("train", key, 0, FROM_1)
        for key in (
            "batch_tokens",
            "max_steps",
            "warmup_steps",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "average_checkpoints",
        )
    ],
    ("train", "max_steps", 2**63, "below 2^63"),
    ("hardware", "num_workers", [1, 2**63], "below 2^63"),
    ("train", "lr_scale", 0.0, "> 0"),
    ("train", "eps", 0, "> 0"),
    ("train", "max_grad_norm", -1.0, FROM_0),
    ("train", "patience", -1, FROM_0),
    ("train", "average_checkpoints", 10_000, None),
    ("train", "seed", -1, "a whole number in [0, 2^63)"),
    ("train", "seed", 2**63, "a whole number in [0, 2^63)"),
    *[
        ("hardware", "num_workers", workers, "a whole number >= 1 or [least, most]")
        for workers in (0, [], [3], [0, 3], [3, 2], [2, 3, 5])
    ],
    ("hardware", "micro_batch_tokens", 0, FROM_1),
    ("hardware", "cpus_per_worker", -1, FROM_0),
    ("hardware", "max_failures", -1, FROM_0),
    ("evaluate", "beam", 0, FROM_1),
    ("evaluate", "batch_tokens", 0, FROM_1),
    ("evaluate", "alpha", -0.6, FROM_0),
    ("evaluate", "max_extra", -1, FROM_0),
    ("evaluate", "num_samples", -1, FROM_0),
    *[("sweep", "seeds", seeds, "a list of different numbers in [0, 2^63)") for seeds in ([], [3, 5, 3])],
    ("sweep", "rows", [], "one row or more when sweep.grid is empty"),
    ("sweep", "cpus_per_worker", -1, FROM_0),
    ("sweep", "flops_per_second", -1.0, FROM_0),
    ("sweep", "price_per_device_hour", -0.5, FROM_0),
]


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"), IMPOSSIBLE, ids=[f"{i[0]}.{i[1]}={i[2]}" for i in IMPOSSIBLE]
)
def test_load_settings_names_an_impossible_value_and_what_is_allowed(root, section, key, value, allowed):
    allowed = allowed or f"in [1, train.keep_checkpoints ({load_settings(root).train.keep_checkpoints})]"
    set_value(root, section, key, value)
    refused(root, f"{section}.{key} must be {allowed}, got {value!r}")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("d_model", 7, "model.d_model must be even with sinusoidal positions, got 7"),
        ("positions", "rotary", "model.d_k must be even with rotary positions, got 5"),
        ("num_layers", 10**9, "model must have at most 1e+11 parameters and positions, got 2e+14"),
        ("max_length", 10**12, "model must have at most 1e+11 parameters and positions, got 1e+14"),
    ],
)
def test_load_settings_names_sizes_that_contradict_each_other(root, key, value, fault):
    set_value(root, "model", "d_k", 5)
    set_value(root, "model", key, value)
    refused(root, fault)


def test_load_settings_refuses_asha_for_rows_and_takes_it_for_a_grid(root):
    set_value(root, "sweep", "rows", ["heads"])
    set_value(root, "sweep", "grid", {"model.d_ff": [64]})
    set_value(root, "sweep", "scheduler", "asha")
    refused(
        root,
        "sweep.rows must be empty when sweep.scheduler is asha, which stops trials early, so that rows would not be "
        "comparable (use sweep.grid, or sweep.scheduler fifo), got ['heads']",
    )
    set_value(root, "sweep", "rows", [])
    assert load_settings(root).sweep.scheduler == "asha"


@pytest.mark.parametrize("name", ["model.dropout", "train.eps", "evaluate.alpha", "sweep.price_per_device_hour"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_settings_refuses_numbers_that_are_not_finite(root, name, value):
    set_value(root, *name.split("."), value)
    with pytest.raises(ValueError, match=rf"{name} must be a number .*, got {value!r}$"):
        load_settings(root)


def test_load_settings_refuses_the_grammars_keys_for_another_corpus(root):
    set_value(root, "data", "corpus", "multi30k")
    refused(
        root,
        "data.seed must be left out unless data.corpus is grammar (python -m pipeline.preset data=multi30k writes "
        "the settings of multi30k), got 2017",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "is not valid YAML: "),
        (b"tracking: {experiment: \xff}", "is not valid YAML: "),
        (b"", " must contain sections of `key: value` lines"),
        (b"- 3", " must contain sections of `key: value` lines"),
        (b"data: {corpus: own, corpus: grammar}", "is not valid YAML: while constructing a mapping"),
        (b"data: {}\ndata: {}", "is not valid YAML: while constructing a mapping"),
        (b"data: " + b"[" * 800, "is not valid YAML: lists or sections are nested too deeply"),
        (b"data: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"data: 2026-13-01", "is not valid YAML: month must be in 1..12"),
        (b"#" * 300_000, "must have at most 262,144 bytes, got 300,000"),
    ],
)
def test_load_settings_names_a_file_that_is_no_settings_file(root, content, message):
    (root / "params.yaml").write_bytes(content)
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{root / 'params.yaml'}") + " ?" + re.escape(message.strip())
    ):
        load_settings(root)


def test_load_settings_names_the_folder_to_run_in_if_params_yaml_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"params\.yaml does not exist: run from the project's root folder$"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-09", 1e-9), ("1e-9", 1e-9), ("1.0e-9", 1e-9), ("2E+3", 2e3), ("1", 1)]
)
def test_load_settings_reads_numbers_as_dvc_writes_them(root, text, value):
    path = root / "params.yaml"
    path.write_text(re.sub(r"\beps: \S+", f"eps: {text}", path.read_text()))
    assert load_settings(root).train.eps == value


def test_load_settings_reads_no_other_file_for_a_value(root):
    shutil.rmtree(root / "conf")
    assert flatten(load_settings(root)) == flatten(load_settings(REPOSITORY)) | {
        "data_name": "grammar-en-de", "model_name": "custom",
    }  # fmt: skip


def test_params_yaml_has_every_setting_and_a_section_for_each():
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    assert {f"{section}.{key}" for section in values for key in values[section]} == set(KEYS)


def test_settings_have_no_default_that_params_yaml_could_contradict():
    defaults = {
        f"{section}.{field.name}": field.default
        for section, cls in SECTIONS.items()
        for field in fields(cls)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    assert defaults == {f"data.{key}": None for key in GRAMMAR_KEYS}


def test_load_settings_has_the_files_values(root):
    set_value(root, "model", "d_k", 37)
    set_value(root, "evaluate", "alpha", 1)
    settings = load_settings(root)
    assert (settings.model.d_k, settings.evaluate.alpha) == (37, 1)
    assert settings.model.config(vocab_size=101).d_k == 37


def test_load_settings_takes_presets_instead():
    own, other = load_settings(REPOSITORY), load_settings(REPOSITORY, model="base", data="multi30k")
    preset = yaml.safe_load((REPOSITORY / "conf/model/base.yaml").read_text())
    assert flatten(other.model) == preset["model"]
    assert flatten(other.train) == preset["train"] | {"seed": own.seed}
    assert (other.data.corpus, other.data.seed, other.hardware) == ("multi30k", None, own.hardware)
    with pytest.raises(ValueError, match=r"model must be one of base, big, .*, got 'huge'"):
        load_settings(REPOSITORY, model="huge")


def test_settings_are_checked_in_a_changed_copy_too():
    own = load_settings(REPOSITORY)
    with pytest.raises(ValueError, match="seed"):
        own.with_seed(-3)
    with pytest.raises(ValueError, match="average_checkpoints must be in"):
        replace(own.train, average_checkpoints=10_000)
    assert own.with_seed(3) == replace(own, train=replace(own.train, seed=3))


def attributes_read(folders: tuple[str, ...]) -> set[str]:
    """Return the names read as `something.name` in these folders, outside the checks (`__post_init__`)."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            nodes.extend(ast.iter_child_nodes(node))
    return names


def test_settings_are_all_read_by_the_code():
    read = attributes_read(("model", "pipeline", "sweeps"))
    keys = {key for _, key, _ in FIELDS}
    assert keys <= read, f"no code reads {sorted(keys - read)}"
