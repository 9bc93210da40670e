"""The settings of a run: all of params.yaml, as typed and checked sections.

params.yaml is the only source of settings. Presets (presets.py) are starting points: `python -m pipeline.preset`
writes their values into params.yaml. `load_settings` checks all sections, so a command that calls it fails on any
error before it does anything else.
"""

import difflib
import reprlib
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from model.config import Norm, Positions, TransformerConfig
from pipeline.common.presets import PRESETS, find_preset, nearest_preset
from pipeline.common.yaml_files import read_yaml

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# A string in Annotated replaces the generated text in error messages.
Seed = Annotated[int, Field(ge=0, lt=2**63), "a whole number in [0, 2^63)"]
Workers = Annotated[int | list[int], "a whole number >= 1 or [least, most]"]

MAX_NUMBERS = 10**11
"""The maximum number of parameters, plus position embeddings, of a model: 500 times that of the paper's big one."""
RowName = Literal[
    "A", "B", "C", "D", "E", "big", "heads", "d_k", "layers", "d_model", "d_ff", "dropout", "label_smoothing",
    "positions", "norm",
]  # fmt: skip
"""Names for rows of Table 3: their group in the paper, or the setting that they vary."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {allowed}, got {shown(value)}")


def shown(value: object) -> str:
    """The value as in YAML, shortened to one line for an error message."""
    return _SHOWN.repr(value)


class _Repr(reprlib.Repr):
    """`reprlib.Repr` with YAML's true, false and null; it calls repr_X for a value of type X."""

    def repr_bool(self, value: bool, _: int) -> str:
        return str(value).lower()

    def repr_NoneType(self, _value: None, _: int) -> str:  # noqa: N802
        return "null"


_SHOWN = _Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict = 3, 10, 10
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 100


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(cls: type[T]) -> type[T]:
    """Decorator: a frozen, keyword-only dataclass whose values pydantic checks by annotation and `__post_init__`.

    The constructor raises ValueError with one line that names the section, key, value and allowed values.
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    check = made.__init__

    def __init__(self: T, **values: Any) -> None:  # noqa: N807
        try:
            check(self, **values)
        except ValidationError as error:
            raise ValueError(_line(made, values, error)) from None

    made.__init__ = __init__
    return made


@checked
class Data:
    """The corpus: a name in pipeline/data/catalog.py, "own" (data/own), or "grammar", which needs seed and sizes."""

    corpus: str
    src: str  # language codes
    tgt: str
    seed: Count | None = None
    train_pairs: Count | None = None
    valid_pairs: Count | None = None
    test_pairs: Count | None = None

    def __post_init__(self) -> None:
        for key in ("seed", "train_pairs", "valid_pairs", "test_pairs"):
            value = getattr(self, key)
            if self.corpus == "grammar":
                require(value is not None, f"data.{key}", value, "a whole number >= 1 for the corpus grammar")
            else:
                way_out = f"python -m pipeline.preset data={self.corpus} writes the settings of {self.corpus}"
                require(value is None, f"data.{key}", value, f"left out unless data.corpus is grammar ({way_out})")
        require(self.src != self.tgt, "data.tgt", self.tgt, "a language other than data.src")


@checked
class Validate:
    """Limits of a sentence pair, the share of pairs that may be faulty (dropped or kept), and whether to drop
    untranslated pairs, whose source equals their target."""

    max_words: Count
    max_length_ratio: Annotated[float, Field(ge=1)]
    max_dropped_share: Share
    drop_copies: bool


@checked
class Tokenize:
    """The joint byte-pair encoding (section 5.1)."""

    vocab_size: Annotated[int, Field(gt=4), "> 4, the number of reserved tokens"]
    lowercase: bool  # the tokenizer lower-cases its input


@checked
class Model:
    """TransformerConfig without the vocabulary size, which depends on the tokenizer."""

    num_layers: Count
    d_model: Count
    d_ff: Count
    num_heads: Count
    d_k: Count
    d_v: Count
    dropout: Fraction
    positions: Positions
    norm: Norm
    max_length: Count

    def __post_init__(self) -> None:
        try:
            self.config(vocab_size=1_000)  # for its checks
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        layer = 6 * self.d_model * self.num_heads * (self.d_k + self.d_v) + 4 * self.d_model * self.d_ff
        numbers = self.num_layers * layer + self.max_length * self.d_model  # of encoder, decoder and positions
        if numbers > MAX_NUMBERS:
            raise ValueError(f"model must have at most {MAX_NUMBERS:.0e} parameters and positions, got {numbers:.0e}")

    def config(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig(vocab_size=vocab_size, **asdict(self))


@checked
class Train:
    """Section 5 of the paper: batches, Adam, the learning rate, label smoothing, averaging."""

    seed: Seed
    label_smoothing: Fraction
    batch_tokens: Count
    max_steps: Count
    warmup_steps: Count
    lr_scale: Positive
    beta1: Fraction
    beta2: Fraction
    eps: Positive
    max_grad_norm: NotNegative
    log_every: Count
    validate_every: Count
    bleu_sentences: CountOrZero
    patience: CountOrZero
    checkpoint_every: Count
    keep_checkpoints: Count
    average_checkpoints: Count

    def __post_init__(self) -> None:
        kept, averaged = self.keep_checkpoints, self.average_checkpoints
        allowed = f"in [1, train.keep_checkpoints ({kept})]"
        require(averaged <= kept, "train.average_checkpoints", averaged, allowed)


@checked
class Hardware:
    """The devices that training runs on.

    Only `precision` and `micro_batch_tokens` are part of a run's identity. `device` and `compile` change rounding and
    dropout draws; the others change at most the order of sums.
    """

    num_workers: Workers
    device: Literal["auto", "cpu", "gpu"]
    cpus_per_worker: CountOrZero
    precision: Literal["fp32", "bf16"]
    compile: bool
    micro_batch_tokens: Count
    max_failures: CountOrZero

    def __post_init__(self) -> None:
        least_and_most = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers] * 2
        fits = len(least_and_most) == 2 and 1 <= least_and_most[0] <= least_and_most[1]
        require(fits, "hardware.num_workers", self.num_workers, "a whole number >= 1 or [least, most]")

    @property
    def min_workers(self) -> int:
        """The minimum number of workers to start or continue training."""
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


@checked
class Evaluate:
    """The beam search of section 6.1 (beam size, length penalty alpha, longest output) and its engine."""

    beam: Count
    alpha: NotNegative
    max_extra: CountOrZero
    engine: Literal["torch", "ctranslate2", "ctranslate2-int8"]
    batch_tokens: Count
    num_samples: CountOrZero


@checked
class Sweep:
    """The rows of Table 3 (and others) that a sweep runs, and their seeds.

    The base row uses the sections `model` and `train` unchanged, except for the seed.
    """

    rows: list[RowName]
    seeds: Annotated[list[Seed], "a list of different numbers in [0, 2^63)"]
    grid: dict[str, list[Any]] | None
    scheduler: Literal["fifo", "asha"]
    cpus_per_worker: CountOrZero
    num_workers: dict[RowName, Count] | None
    flops_per_second: NotNegative
    price_per_device_hour: NotNegative

    def __post_init__(self) -> None:
        different = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(different, "sweep.seeds", self.seeds, "a list of different numbers in [0, 2^63)")
        require(bool(self.rows or self.grid), "sweep.rows", self.rows, "one row or more when sweep.grid is empty")
        for key, values in (self.grid or {}).items():
            require(bool(values), f"sweep.grid.{key}", values, "a list of one value or more")
        comparable = (
            "empty when sweep.scheduler is asha, which stops trials early, so that rows would not be comparable (use "
            "sweep.grid, or sweep.scheduler fifo)"
        )
        require(not (self.scheduler == "asha" and self.rows), "sweep.rows", self.rows, comparable)


@checked
class Tracking:
    """The MLflow experiment of the runs, and whether to log the machine's use of CPU, memory, disk and GPU."""

    experiment: str
    system_metrics: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sections of params.yaml.

    `data_name` and `model_name` are the names of the nearest presets ("custom", or corpus and languages, if none is
    near). `changes` are the values that differ from these presets, {"model.d_k": 4, ...}. All three are used in names
    for people and are not part of a run's identity.
    """

    data: Data
    validate: Validate
    tokenize: Tokenize
    model: Model
    train: Train
    hardware: Hardware
    evaluate: Evaluate
    sweep: Sweep
    tracking: Tracking
    data_name: str
    model_name: str
    changes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for key, values in (self.sweep.grid or {}).items():
            _check_grid(key, values)

    @property
    def seed(self) -> int:
        """train.seed, which decides the initial weights, the order of the data, and dropout."""
        return self.train.seed

    def with_seed(self, seed: int) -> "Settings":
        return replace(self, train=replace(self.train, seed=seed))


SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(Settings) if is_dataclass(f.type)}
GRID_KEYS = [f"{name}.{f.name}" for name in ("model", "train") for f in fields(SECTIONS[name]) if f.name != "seed"]
"""The settings that trials of a sweep may vary, besides the seed.

All trials share the data, the search and, except for the number of workers, the hardware."""


def load_settings(root: Path = Path(), **presets: str) -> Settings:
    """Read and check `root`/params.yaml. `presets`, such as model="tiny", replace the values of their sections.

    Raises a ValueError that names the file, key, value and allowed values if a setting is unknown, missing or
    invalid.
    """
    path = root / "params.yaml"
    values = read_yaml(path)
    for kind, name in presets.items():
        preset = read_yaml(find_preset(root, kind, name))
        for section in PRESETS[kind]:
            kept = {key: value for key, value in values[section].items() if key not in optional_keys(section)}
            values[section] = kept | preset[section]
    try:
        _check_keys("", values, SECTIONS)
        sections = {name: make_section(name, values[name]) for name in SECTIONS}
        data_name, of_data = nearest_preset(root, "data", values)
        model_name, of_model = nearest_preset(root, "model", values)
        return Settings(**sections, data_name=data_name, model_name=model_name, changes=of_data | of_model)
    except ValueError as error:
        shown_path = path.name if path.parent.resolve() == Path.cwd() else path
        raise ValueError(f"{shown_path}: {error}") from None


def make_section(name: str, values: Any) -> Any:
    """Make and check a section. Raises ValueError with one line, without the file's name."""
    if not isinstance(values, dict):
        advice = ""
        if isinstance(values, str) and (kinds := [kind for kind, sections in PRESETS.items() if name in sections]):
            advice = f"; for a preset's values, run python -m pipeline.preset {kinds[0]}={values[:100]}"
        raise ValueError(f"{name} must be a section of `key: value` lines, got {shown(values)}{advice}")
    cls = SECTIONS[name]
    _check_keys(f"{name}.", values, [f.name for f in fields(cls)], optional_keys(name))
    section = cls(**values)
    for key, value in values.items():
        numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
        require(all(abs(number) < 2**63 for number in numbers), f"{name}.{key}", value, "below 2^63")
    return section


def optional_keys(section: str) -> set[str]:
    """The keys of a section that may be left out of params.yaml."""
    return {f.name for f in fields(SECTIONS[section]) if f.default is None}


def _check_keys(prefix: str, given: Iterable[str], known: Collection[str], optional: Collection[str] = ()) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"it must be one of {', '.join(sorted(known))}"
            raise ValueError(f"{prefix}{key} is unknown: {hint}")
    for key in known:
        if key not in given and key not in optional:
            raise ValueError(f"{prefix}{key} is missing")


def _check_grid(key: str, values: list[Any]) -> None:
    """Raise ValueError if trials cannot vary this setting, or if a value is not allowed for it."""
    if key not in GRID_KEYS:
        raise ValueError(f"each key of sweep.grid must be one of {', '.join(GRID_KEYS)}, got {key!r}")
    section, name = key.split(".")
    kind: Any = next(f.type for f in fields(SECTIONS[section]) if f.name == name)
    for value in values:
        try:
            TypeAdapter(kind, config=STRICT).validate_python(value)
        except ValidationError as error:
            ranges = error.errors()[0]["type"] in RANGE_ERRORS
            raise ValueError(f"sweep.grid.{key} must be {_allowed(kind, ranges)}, got {shown(value)}") from None


RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _line(cls: Any, values: Mapping[str, Any], error: ValidationError) -> str:
    """The first of pydantic's errors, in the wording of `require`."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # from a __post_init__
        return str(first["ctx"]["error"])
    name, *places = map(str, first["loc"])
    key, value = f"{cls.__name__.lower()}.{name}", values[name]
    kind: Any = next(f.type for f in fields(cls) if f.name == name)
    if places and places[-1] == "[key]":
        return f"each key of {key} must be {_allowed(get_args(_bare(kind))[0])}, got {places[0]!r}"
    for place in places:
        if _text(kind):  # it describes the value as a whole
            break
        kind = get_args(_bare(kind))[-1]
        key, value = (key, value[int(place)]) if isinstance(value, list) else (f"{key}.{place}", value[place])
    return f"{key} must be {_allowed(kind, first['type'] in RANGE_ERRORS)}, got {shown(value)}"


def _allowed(kind: Any, ranges: bool = False) -> str:
    """Describe the values that an annotation allows; with `ranges`, only their range, since the type is right."""
    if text := _text(kind):
        return text
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return f"one of {', '.join(get_args(bare))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes)", list: "a list"}
    word = words.get(get_origin(bare) or bare, "`name: value` lines")
    bounds = _bounds(kind)
    return bounds if ranges else f"{word} {bounds}".strip()


def _text(kind: Any) -> str | None:
    """The string in the metadata of Annotated, if any."""
    return next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, str)), None)


def _bounds(kind: Any) -> str:
    """The range in the metadata of pydantic's Field: "in [0, 1)", ">= 1", "> 0" or ""."""
    kind = _not_none(kind)
    infos = [item for item in getattr(kind, "__metadata__", ()) if isinstance(item, FieldInfo)]
    limits = {name: getattr(item, name) for info in infos for item in info.metadata for name in item.__slots__}
    if "ge" in limits and ("lt" in limits or "le" in limits):
        upper = f"{limits['lt']})" if "lt" in limits else f"{limits['le']}]"
        return f"in [{limits['ge']}, {upper}"
    return f">= {limits['ge']}" if "ge" in limits else f"> {limits['gt']}" if "gt" in limits else ""


def _bare(kind: Any) -> Any:
    """The annotation without None and metadata."""
    kind = _not_none(kind)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _not_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next(item for item in get_args(kind) if item is not types.NoneType)
    return kind


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten Settings or one section to {"train.max_steps": 600, ...}. Keys that are not set are left out."""
    flat: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        elif value is not None:
            flat[f"{prefix}{f.name}"] = value
    return flat
