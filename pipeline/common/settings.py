"""The settings of a run: params.yaml and the presets of conf/ that it names, as typed and checked sections.

Every value is in exactly one file, so no edit is shadowed by another: params.yaml names a preset of
conf/data, conf/model and conf/hardware, and holds what belongs to none of them. `python -m pipeline.settings`
prints all values with the file that each comes from.
"""

import math
import re
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from model.config import Norm, Positions, TransformerConfig

PRESETS = ("data", "model", "hardware")


class _Loader(yaml.SafeLoader):
    """Reads 1e-09 as a number, as YAML 1.2 does, and DVC, whose `-S` writes it so; YAML 1.1 wants 1.0e-09."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {allowed}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Download:
    """The corpus: a name of pipeline/data/catalog.py, "grammar" or "files"; for "grammar" its seed and sizes."""

    corpus: str
    src: str  # language codes
    tgt: str
    seed: int | None = None
    train_pairs: int | None = None
    valid_pairs: int | None = None
    test_pairs: int | None = None

    def __post_init__(self) -> None:
        for key in ("seed", "train_pairs", "valid_pairs", "test_pairs"):
            value = getattr(self, key)
            if self.corpus == "grammar":
                require(value is not None and value > 0, f"download.{key}", value, ">= 1")
            else:
                require(value is None, f"download.{key}", value, "left out (only grammar is generated)")
        require(self.src != self.tgt, "download.tgt", self.tgt, "a language other than src")


@dataclass(frozen=True, kw_only=True)
class Validate:
    """The limits beyond which a pair is dropped, and how many pairs may be."""

    max_words: int
    max_length_ratio: float
    max_dropped_share: float

    def __post_init__(self) -> None:
        require(self.max_words >= 1, "validate.max_words", self.max_words, ">= 1")
        require(self.max_length_ratio >= 1, "validate.max_length_ratio", self.max_length_ratio, ">= 1")
        share = self.max_dropped_share
        require(0 <= share <= 1, "validate.max_dropped_share", share, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """The joint byte-pair encoding (section 5.1)."""

    vocab_size: int
    lowercase: bool  # the encoding lower-cases what it is given

    def __post_init__(self) -> None:
        require(self.vocab_size > 4, "tokenize.vocab_size", self.vocab_size, "> 4, the number of reserved tokens")


@dataclass(frozen=True, kw_only=True)
class Model:
    """TransformerConfig without the vocabulary's size, which the tokenizer settles."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    d_k: int
    d_v: int
    dropout: float
    positions: Positions
    norm: Norm
    max_length: int

    def __post_init__(self) -> None:
        try:
            self.config(vocab_size=1_000)  # for its checks
        except ValueError as error:
            raise ValueError(f"model.{error}") from None

    def config(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig(vocab_size=vocab_size, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Section 5 of the paper: batches, Adam, the learning rate, label smoothing, averaging."""

    label_smoothing: float
    batch_tokens: int
    max_steps: int
    warmup_steps: int
    lr_scale: float
    beta1: float
    beta2: float
    eps: float
    max_grad_norm: float
    log_every: int
    validate_every: int
    patience: int
    checkpoint_every: int
    keep_checkpoints: int
    average_checkpoints: int

    def __post_init__(self) -> None:
        for key in ("batch_tokens", "max_steps", "warmup_steps", "log_every", "validate_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), ">= 1")
        for key in ("label_smoothing", "beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"train.{key}", value, "in [0, 1)")
        for key in ("lr_scale", "eps"):
            require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "> 0")
        for key in ("max_grad_norm", "patience"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), ">= 0")
        kept, averaged = self.keep_checkpoints, self.average_checkpoints
        require(
            1 <= averaged <= kept,
            "train.average_checkpoints",
            averaged,
            f"in [1, train.keep_checkpoints ({kept})]",
        )


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The devices that training runs on. Only `precision` and `micro_batch_tokens` are part of a run's identity:
    `device` and `compile` change rounding and which numbers dropout draws, the others the order of sums alone."""

    num_workers: int | list[int]
    device: Literal["auto", "cpu", "gpu"]
    cpus_per_worker: int
    precision: Literal["fp32", "bf16"]
    compile: bool
    micro_batch_tokens: int
    max_failures: int

    def __post_init__(self) -> None:
        workers = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers] * 2
        require(
            len(workers) == 2 and 1 <= workers[0] <= workers[1],
            "hardware.num_workers",
            self.num_workers,
            ">= 1 or [least, most]",
        )
        require(self.micro_batch_tokens >= 1, "hardware.micro_batch_tokens", self.micro_batch_tokens, ">= 1")
        for key in ("cpus_per_worker", "max_failures"):
            require(getattr(self, key) >= 0, f"hardware.{key}", getattr(self, key), ">= 0")

    @property
    def min_workers(self) -> int:
        """Training goes on as long as this many can run."""
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The search of section 6.1: beam, alpha, the longest output; and its engine."""

    beam: int
    alpha: float
    max_extra: int
    engine: Literal["torch", "ctranslate2", "ctranslate2-int8"]
    batch_tokens: int
    num_samples: int

    def __post_init__(self) -> None:
        for key in ("beam", "batch_tokens"):
            require(getattr(self, key) >= 1, f"evaluate.{key}", getattr(self, key), ">= 1")
        for key in ("alpha", "max_extra", "num_samples"):
            require(getattr(self, key) >= 0, f"evaluate.{key}", getattr(self, key), ">= 0")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where MLflow shows the runs."""

    experiment: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows of Table 3 (and others) that run, their seeds and base model; see sweeps/."""

    model: str  # a preset of conf/model
    rows: list[str]
    seeds: list[int]
    free: dict[str, list[object]]
    scheduler: Literal["grid", "asha"]
    average_checkpoints: int
    cpus_per_worker: int
    num_workers: dict[str, int]
    flops_per_second: float
    price_per_device_hour: float

    def __post_init__(self) -> None:
        require(
            bool(self.seeds)
            and len(set(self.seeds)) == len(self.seeds)
            and 0 <= min(self.seeds) <= max(self.seeds) < 2**63,
            "sweep.seeds",
            self.seeds,
            "a list of different numbers in [0, 2^63)",
        )
        require(
            bool(self.rows or self.free),
            "sweep.rows",
            self.rows,
            "one row or more, for sweep.free is empty",
        )
        for key, values in self.free.items():
            require(bool(values), f"sweep.free.{key}", values, "a list of one value or more")
        asha = self.scheduler == "asha"
        require(
            not (asha and self.rows),
            "sweep.rows",
            self.rows,
            "empty with sweep.scheduler asha, which ends trials early: rows of a table must be comparable, values of "
            "sweep.free need not",
        )
        require(self.average_checkpoints >= 1, "sweep.average_checkpoints", self.average_checkpoints, ">= 1")
        require(self.cpus_per_worker >= 0, "sweep.cpus_per_worker", self.cpus_per_worker, ">= 0")
        for row, workers in self.num_workers.items():
            require(workers >= 1, f"sweep.num_workers.{row}", workers, ">= 1")
        for key in ("flops_per_second", "price_per_device_hour"):
            require(getattr(self, key) >= 0, f"sweep.{key}", getattr(self, key), ">= 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of them. `data_name`, `model_name` and `hardware_name` are the presets' names."""

    data_name: str
    model_name: str
    hardware_name: str
    seed: int
    download: Download
    validate: Validate
    tokenize: Tokenize
    model: Model
    train: Train
    hardware: Hardware
    evaluate: Evaluate
    tracking: Tracking
    sweep: Sweep

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")


SECTIONS: dict[str, dict[str, type]] = {
    "data": {"download": Download, "validate": Validate, "tokenize": Tokenize},
    "model": {"model": Model, "train": Train},
    "hardware": {"hardware": Hardware},
    "params": {"evaluate": Evaluate, "tracking": Tracking, "sweep": Sweep},
}
"""The sections that each kind of file holds."""


def load_settings(root: Path = Path(), model: str | None = None) -> Settings:
    """Read `root`/params.yaml and the presets that it names; `model` is another preset of conf/model, that
    of sweep.model.

    Raises ValueError that names file, key, value and what is allowed, for one that is
    unknown, missing or impossible.
    """
    path = root / "params.yaml"
    params = _read(path)
    _check_keys(path, "", params, {*PRESETS, "seed", *SECTIONS["params"]})
    check_type(path, "seed", params["seed"], int)
    if model is not None:
        params["model"] = model
    sections = _sections(path, {key: params[key] for key in SECTIONS["params"]}, SECTIONS["params"])
    for kind in PRESETS:
        folder = root / "conf" / kind
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        if params[kind] not in known:
            key = "sweep.model" if kind == "model" and model is not None else kind
            raise ValueError(
                f"{path}: {key} must be one of {', '.join(known)} (files of {folder}), got {params[kind]!r}"
            )
        preset = folder / f"{params[kind]}.yaml"
        sections |= _sections(preset, _read(preset), SECTIONS[kind])
    presets = {f"{kind}_name": params[kind] for kind in PRESETS}
    try:
        return Settings(seed=params["seed"], **presets, **sections)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run from the project's root folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections of `key: value` lines")
    return values


def _sections(path: Path, values: dict[str, Any], sections: dict[str, type]) -> dict[str, Any]:
    _check_keys(path, "", values, set(sections))
    return {name: _section(path, name, values[name], section) for name, section in sections.items()}


def _section(path: Path, name: str, values: Any, section: type) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {name} must be a section of `key: value` lines, got {values!r}")
    known = {field.name: field for field in fields(section)}
    required = {key for key, field in known.items() if not _optional(field.type)}
    _check_keys(path, f"{name}.", values, set(known), required)
    for key, value in values.items():
        check_type(path, f"{name}.{key}", value, known[key].type)
    try:
        return section(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and types.NoneType in get_args(kind)


def _check_keys(path: Path, prefix: str, values: dict, known: set[str], required: set[str] | None = None) -> None:
    for key in sorted(set(values) - known, key=str):
        raise ValueError(f"{path}: {prefix}{key} is unknown: it must be one of {', '.join(sorted(known))}")
    for key in sorted((known if required is None else required) - set(values)):
        raise ValueError(f"{path}: {prefix}{key} is missing")


def check_type(path: Path, key: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        fits, allowed = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif _optional(kind):
        return check_type(path, key, value, get_args(kind)[0])
    elif isinstance(kind, types.UnionType):  # int | list[int]
        one, many = get_args(kind)
        return check_type(path, key, value, many if isinstance(value, list) else one)
    elif get_origin(kind) is list:
        fits, allowed = type(value) is list, "a list"
        for item in value if type(value) is list else ():
            check_type(path, key, item, get_args(kind)[0])
    elif get_origin(kind) is dict:
        fits, allowed = type(value) is dict, "`name: value` lines, or {}"
        for name, item in value.items() if type(value) is dict else ():
            check_type(path, f"{key}.{name}", item, get_args(kind)[1])
    elif kind is object:
        return
    elif kind is float:
        fits, allowed = type(value) is int or (type(value) is float and math.isfinite(value)), "a number"
    else:
        names = {int: "a whole number", bool: "true or false", str: "text (in quotes)"}
        fits, allowed = type(value) is kind, names[kind]
    if not fits:
        raise ValueError(f"{path}: {key} must be {allowed}, got {value!r}")


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.max_steps": 600, ...} of Settings or of one section; what is not set is left out."""
    flat: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        elif value is not None:
            flat[f"{prefix}{field.name}"] = value
    return flat
