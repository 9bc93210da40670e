"""Every way in which a settings file can be wrong, and that no setting is idle."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from pipeline.common.settings import PRESETS, SECTIONS, flatten, load_settings

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project's settings, to be changed."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    return tmp_path


def file_of(root: Path, kind: str) -> Path:
    """Of this kind, the one that params.yaml names."""
    path = root / "params.yaml"
    return path if kind == "params" else root / "conf" / kind / f"{yaml.safe_load(path.read_text())[kind]}.yaml"


def edit(root: Path, kind: str, section: str, key: str, value: Any = MISSING) -> Path:
    """Set a value, or take it away."""
    path = file_of(root, kind)
    content = yaml.safe_load(path.read_text())
    values = content[section] if section else content
    values.pop(key, None)
    if value is not MISSING:
        values[key] = value
    path.write_text(yaml.safe_dump(content))
    return path


def refused(root: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_settings(root)


def all_fields() -> Iterator[tuple[str, str, str, Any]]:
    """kind of file, section, key, type."""
    for kind, sections in SECTIONS.items():
        for section, cls in sections.items():
            for field in fields(cls):
                yield kind, section, field.name, field.type


FIELDS = list(all_fields())
KEYS = [f"{section}.{key}" for _, section, key, _ in FIELDS]


@pytest.mark.parametrize(("kind", "section", "key", "of_type"), FIELDS, ids=KEYS)
def test_load_settings_names_a_missing_value_and_its_file(root, kind, section, key, of_type):
    path = edit(root, kind, section, key)
    if section == "download" and key not in ("corpus", "src", "tgt"):  # of the corpus that is generated
        refused(root, f"{path}: download.{key} must be >= 1, got None")
    else:
        refused(root, f"{path}: {section}.{key} is missing")


ALLOWED = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes)"}
COLLECTIONS = {list: "a list", dict: "`name: value` lines, or {}"}


@pytest.mark.parametrize(("kind", "section", "key", "of_type"), FIELDS, ids=KEYS)
def test_load_settings_names_a_value_of_the_wrong_type_and_what_it_must_be(root, kind, section, key, of_type):
    if get_origin(of_type) is Literal:
        allowed = f"one of {', '.join(get_args(of_type))}"
    elif get_origin(of_type) in COLLECTIONS:
        allowed = COLLECTIONS[get_origin(of_type)]
    else:
        allowed = ALLOWED[of_type if of_type in ALLOWED else get_args(of_type)[0]]
    for value in ([3], None, {"a": 1}, 2.5 if of_type is not float else "2.5", "x" if of_type is not str else 7):
        if type(value) is get_origin(of_type) or (
            key == "num_workers" and value == [3] and of_type == int | list[int]
        ):
            continue  # of what is in it: the next tests
        path = edit(root, kind, section, key, value)
        refused(root, f"{path}: {section}.{key} must be {allowed}, got {value!r}")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("rows", ["heads", 3], "sweep.rows must be text (in quotes), got 3"),
        ("rows", [None], "sweep.rows must be text (in quotes), got None"),
        ("seeds", [2, "3"], "sweep.seeds must be a whole number, got '3'"),
        ("seeds", [2, 3.0], "sweep.seeds must be a whole number, got 3.0"),
        ("seeds", [True], "sweep.seeds must be a whole number, got True"),
        ("free", {"model.d_ff": 64}, "sweep.free.model.d_ff must be a list, got 64"),
        ("free", {"model.d_k": [5], "model.d_ff": {"a": 64}}, "sweep.free.model.d_ff must be a list, got {'a': 64}"),
        ("num_workers", {"heads": 2, "big": "4"}, "sweep.num_workers.big must be a whole number, got '4'"),
        ("num_workers", {"big": [4]}, "sweep.num_workers.big must be a whole number, got [4]"),
    ],
)
def test_load_settings_names_what_has_the_wrong_type_inside_a_list(root, key, value, fault):
    path = edit(root, "params", "sweep", key, value)
    refused(root, f"{path}: {fault}")


def test_hardware_num_workers_is_one_number_or_a_range(root):
    for value, least, most in ((3, 3, 3), ([2, 5], 2, 5)):
        edit(root, "hardware", "hardware", "num_workers", value)
        hardware = load_settings(root).hardware
        assert (hardware.min_workers, hardware.max_workers) == (least, most)
    path = edit(root, "hardware", "hardware", "num_workers", [2, "5"])
    refused(root, f"{path}: hardware.num_workers must be a whole number, got '5'")


def test_load_settings_reads_lists_and_sections_of_every_type(root):
    edit(root, "params", "sweep", "seeds", [5, 3])
    edit(root, "params", "sweep", "rows", [])
    free = {"model.d_ff": [64, 256], "model.positions": ["none"], "train.beta1": [0.5]}
    edit(root, "params", "sweep", "free", free)
    edit(root, "params", "sweep", "num_workers", {"big": 3})
    sweep = load_settings(root).sweep
    assert (sweep.seeds, sweep.rows, sweep.free, sweep.num_workers) == ([5, 3], [], free, {"big": 3})


@pytest.mark.parametrize(("kind", "section"), [(kind, section) for kind in SECTIONS for section in SECTIONS[kind]])
def test_load_settings_names_an_unknown_key_and_lists_the_known(root, kind, section):
    path = edit(root, kind, section, "colour", 3)
    known = ", ".join(sorted(field.name for field in fields(SECTIONS[kind][section])))
    refused(root, f"{path}: {section}.colour is unknown: it must be one of {known}")


@pytest.mark.parametrize("kind", SECTIONS)
def test_load_settings_names_a_section_that_is_unknown_missing_or_none(root, kind):
    section = next(iter(SECTIONS[kind]))
    path = edit(root, kind, "", section, 3)
    refused(root, f"{path}: {section} must be a section of `key: value` lines, got 3")
    edit(root, kind, "", section)
    refused(root, f"{path}: {section} is missing")
    edit(root, kind, "", "colour", {})
    with pytest.raises(ValueError, match=re.escape(f"{path}: colour is unknown: it must be one of ")):
        load_settings(root)


FROM_1 = ">= 1"
FROM_0 = ">= 0"
SHARE = "in [0, 1)"
DIFFERENT = "a list of different numbers in [0, 2^63)"
IMPOSSIBLE = [
    ("data", "download", "train_pairs", 0, FROM_1),
    ("data", "download", "valid_pairs", -2, FROM_1),
    ("data", "download", "test_pairs", 0, FROM_1),
    ("data", "download", "seed", 0, FROM_1),
    ("data", "download", "tgt", "en", "a language other than src"),
    ("data", "validate", "max_words", 0, FROM_1),
    ("data", "validate", "max_length_ratio", 0.9, ">= 1"),
    ("data", "validate", "max_dropped_share", 1.01, "in [0, 1]"),
    ("data", "validate", "max_dropped_share", -0.1, "in [0, 1]"),
    ("data", "tokenize", "vocab_size", 4, "> 4, the number of reserved tokens"),
    *[
        ("model", "model", key, 0, "a whole number >= 1")
        for key in ("num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "max_length")
    ],
    ("model", "model", "dropout", 1.0, SHARE),
    ("model", "train", "label_smoothing", 1.0, SHARE),
    ("model", "train", "beta1", 1, SHARE),
    ("model", "train", "beta2", -0.1, SHARE),
    *[
        ("model", "train", key, 0, FROM_1)
        for key in ("batch_tokens", "max_steps", "warmup_steps", "log_every", "validate_every", "checkpoint_every")
    ],
    ("model", "train", "lr_scale", 0.0, "> 0"),
    ("model", "train", "eps", 0, "> 0"),
    ("model", "train", "max_grad_norm", -1.0, FROM_0),
    ("model", "train", "patience", -1, FROM_0),
    ("model", "train", "average_checkpoints", 0, "in [1, train.keep_checkpoints (5)]"),
    ("model", "train", "average_checkpoints", 6, "in [1, train.keep_checkpoints (5)]"),
    *[
        ("hardware", "hardware", "num_workers", workers, ">= 1 or [least, most]")
        for workers in (0, [], [3], [0, 3], [3, 2], [2, 3, 5])
    ],
    ("hardware", "hardware", "micro_batch_tokens", 0, FROM_1),
    ("hardware", "hardware", "cpus_per_worker", -1, FROM_0),
    ("hardware", "hardware", "max_failures", -1, FROM_0),
    ("params", "evaluate", "beam", 0, FROM_1),
    ("params", "evaluate", "batch_tokens", 0, FROM_1),
    ("params", "evaluate", "alpha", -0.6, FROM_0),
    ("params", "evaluate", "max_extra", -1, FROM_0),
    ("params", "evaluate", "num_samples", -1, FROM_0),
    *[("params", "sweep", "seeds", seeds, DIFFERENT) for seeds in ([], [3, 5, 3], [2, -1])],
    ("params", "sweep", "rows", [], "one row or more, for sweep.free is empty"),  # where sweep.free is {}
    ("params", "sweep", "average_checkpoints", 0, ">= 1"),
    ("params", "sweep", "cpus_per_worker", -1, FROM_0),
    ("params", "sweep", "flops_per_second", -1.0, FROM_0),
    ("params", "sweep", "price_per_device_hour", -0.5, FROM_0),
    ("params", "", "seed", -1, "in [0, 2^63)"),
    ("params", "", "seed", 2**63, "in [0, 2^63)"),
    ("params", "", "seed", "one", "a whole number"),
]


@pytest.mark.parametrize(
    ("kind", "section", "key", "value", "allowed"), IMPOSSIBLE, ids=[f"{i[1]}.{i[2]}={i[3]}" for i in IMPOSSIBLE]
)
def test_load_settings_names_an_impossible_value_and_what_is_allowed(root, kind, section, key, value, allowed):
    path = edit(root, kind, section, key, value)
    refused(root, f"{path}: {section}{'.' if section else ''}{key} must be {allowed}, got {value!r}")


def test_load_settings_refuses_a_row_without_workers_or_values(root):
    path = edit(root, "params", "sweep", "num_workers", {"heads": 2, "d_k": 0})
    refused(root, f"{path}: sweep.num_workers.d_k must be >= 1, got 0")
    edit(root, "params", "sweep", "num_workers", {})
    edit(root, "params", "sweep", "free", {"model.d_k": [5], "model.d_ff": []})
    refused(root, f"{path}: sweep.free.model.d_ff must be a list of one value or more, got []")


def test_load_settings_refuses_asha_for_rows_and_takes_it_for_free(root):
    edit(root, "params", "sweep", "rows", ["heads"])
    edit(root, "params", "sweep", "free", {"model.d_ff": [64]})
    path = edit(root, "params", "sweep", "scheduler", "asha")
    refused(
        root,
        f"{path}: sweep.rows must be empty with sweep.scheduler asha, which ends trials early: rows of a table must "
        "be comparable, values of sweep.free need not, got ['heads']",
    )
    edit(root, "params", "sweep", "rows", [])
    assert load_settings(root).sweep.scheduler == "asha"


@pytest.mark.parametrize(("kind", "section", "key"), [f[:3] for f in FIELDS if f[3] is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_settings_refuses_numbers_that_are_not_finite(root, kind, section, key, value):
    path = edit(root, kind, section, key, value)
    refused(root, f"{path}: {section}.{key} must be a number, got {value!r}")


def test_load_settings_refuses_a_seed_and_sizes_but_for_grammar(root):
    path = edit(root, "data", "download", "corpus", "multi30k")
    refused(root, f"{path}: download.seed must be left out (only grammar is generated), got 2017")


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("name", ["huge", 7, None, "../model"])
def test_load_settings_names_an_unknown_preset_and_lists_the_known(root, kind, name):
    path = edit(root, "params", "", kind, name)
    folder = root / "conf" / kind
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    refused(root, f"{path}: {kind} must be one of {known} (files of {folder}), got {name!r}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "is not valid YAML: "),
        (b"tracking: {experiment: \xff}", "is not valid YAML: "),
        (b"", " must hold sections of `key: value` lines"),
        (b"- 3", " must hold sections of `key: value` lines"),
    ],
)
def test_load_settings_names_a_file_that_is_no_settings_file(root, content, message):
    (root / "params.yaml").write_bytes(content)
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{root / 'params.yaml'}") + " ?" + re.escape(message.strip())
    ):
        load_settings(root)


def test_load_settings_tells_where_to_run_if_params_yaml_is_missing(tmp_path):
    refused(tmp_path, f"{tmp_path / 'params.yaml'} does not exist: run from the project's root folder")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-09", 1e-9), ("1e-9", 1e-9), ("1.0e-9", 1e-9), ("2E+3", 2e3), ("1", 1)]
)
def test_load_settings_reads_numbers_as_dvc_writes_them(root, text, value):
    path = file_of(root, "model")
    path.write_text(re.sub(r"\beps: \S+", f"eps: {text}", path.read_text()))
    assert load_settings(root).train.eps == value


PRESET_FILES = [(kind, path.stem) for kind in PRESETS for path in sorted((REPOSITORY / "conf" / kind).glob("*.yaml"))]


@pytest.mark.parametrize(("kind", "name"), PRESET_FILES)
def test_load_settings_reads_every_preset(root, kind, name):
    edit(root, "params", "", kind, name)
    assert getattr(load_settings(root), f"{kind}_name") == name


def test_load_settings_takes_another_model_than_params_yaml(root):
    edit(root, "params", "", "model", "tiny")
    own, other = load_settings(root), load_settings(root, model="nano")
    values = yaml.safe_load((root / "conf/model/nano.yaml").read_text())
    assert (flatten(other.model), flatten(other.train)) == (values["model"], values["train"])
    assert (own.model_name, other.model_name) == ("tiny", "nano")
    assert replace(other, model_name="tiny", model=own.model, train=own.train) == own
    with pytest.raises(ValueError, match=re.escape(f"must be one of base, big, mini, nano, tiny (files of {root}")):
        load_settings(root, model="huge")


def test_presets_are_the_folders_of_conf():
    assert sorted(path.name for path in (REPOSITORY / "conf").iterdir()) == sorted(PRESETS)


def test_load_settings_finds_every_value_in_exactly_one_file():
    files = [file_of(REPOSITORY, kind) for kind in SECTIONS]
    found = [
        f"{section}.{key}"
        for path in files
        for section, values in yaml.safe_load(path.read_text()).items()
        if isinstance(values, dict)
        for key in values
    ]
    assert len(found) == len(set(found))
    assert set(found) == {key for key in flatten(load_settings(REPOSITORY)) if "." in key}


def test_settings_have_no_default_that_a_file_could_contradict():
    defaults = {
        f"{section}.{field.name}": field.default
        for sections in SECTIONS.values()
        for section, cls in sections.items()
        for field in fields(cls)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    generated_only = ("seed", "train_pairs", "valid_pairs", "test_pairs")
    assert defaults == {f"download.{key}": None for key in generated_only}


def test_load_settings_has_the_files_values(root):
    edit(root, "model", "model", "d_k", 37)
    edit(root, "params", "evaluate", "alpha", 1)
    settings = load_settings(root)
    assert (settings.model.d_k, settings.evaluate.alpha) == (37, 1)
    assert settings.model.config(vocab_size=101).d_k == 37


def test_settings_check_a_changed_copy_too():
    with pytest.raises(ValueError, match=r"seed must be in .*got -3"):
        replace(load_settings(REPOSITORY), seed=-3)


def attributes_read(folders: tuple[str, ...]) -> set[str]:
    """Names read as `something.name` in these folders, outside the checks (`__post_init__`)."""
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
    keys = {key for _, _, key, _ in FIELDS} | {"seed"}
    assert keys <= read, f"no code reads {sorted(keys - read)}"


def test_settings_command_prints_all_with_their_files(root):
    command = [sys.executable, "-m", "pipeline.settings"]
    printed = subprocess.run(
        command, cwd=root, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True
    ).stdout
    lines = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert lines["seed"] == ["seed", "1", "params.yaml"]
    assert lines["train.beta2"] == ["train.beta2", "0.98", str(file_of(root, "model").relative_to(root))]
    assert lines["evaluate.beam"][2] == "params.yaml"
    assert len(lines) == len(flatten(load_settings(root)))


def test_settings_command_ends_with_one_line_for_a_fault(root):
    edit(root, "params", "evaluate", "beam", 0)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.settings"],
        cwd=root, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "settings: params.yaml: evaluate.beam must be >= 1, got 0\n"
