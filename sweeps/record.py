"""Read data/sweep/trials.json, which `sweeps.run` writes, and check the keys that the report needs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from sweeps.table3 import BLEU, PPL, TEST_BLEU

FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
WebAddress = Annotated[str, Field(pattern=r"^https?://")]
Value = int | FiniteFloat | str
OVERHEAD = ("seconds", "seconds_to_first_step", "seconds_of_overhead")
"""Seconds of a trial: in all, until its first step was finished, and in neither training nor evaluation (imports, Ray
and MLflow)."""
OF_FINISHED = ("translations", "parameters", "steps", "tokens_per_second", "device_hours", "flops", "attempts")


class _Strict(BaseModel):
    """Other keys are allowed: sweeps.run writes some for people who read the file."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Published(_Strict):
    ppl: float
    bleu: float
    params: int | None


class _Row(_Strict):
    id: str
    group: str
    axis: str
    label: str
    changes: dict[str, Value]
    published: _Published | None
    skipped: str | None


class _Trial(_Strict):
    row: str
    seed: int
    name: str
    status: Literal["finished", "failed", "stopped", "unfinished"]
    error: str | None = None
    attempts: int | None = None
    metrics: dict[str, float]
    translations: FileName | None = None
    mlflow_run_id: str | None = None
    mlflow_page: WebAddress | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    device_hours: float | None = None
    evaluation_device_hours: float | None = None
    flops: float | None = None
    seconds: float | None = None
    seconds_to_first_step: float | None = None
    seconds_of_overhead: float | None = None

    @model_validator(mode="after")
    def _check_finished(self) -> "_Trial":
        if self.status == "finished":
            missing = [key for key in OF_FINISHED if getattr(self, key) is None]
            missing += [f"metrics.{name}" for name in (BLEU, TEST_BLEU, PPL) if name not in self.metrics]
            if self.seconds is not None:
                missing += [key for key in OVERHEAD if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{self.name} is finished and has no {missing[0]}")
        return self


class _Sweep(_Strict):
    data: str
    base_name: str
    date: str
    commit: str
    machine: str
    device: str
    seeds: list[int] = Field(min_length=1)
    price_per_device_hour: float
    bleu_signature: str
    mlflow_parent: str
    base: dict[str, Any]
    rows: list[_Row] = Field(min_length=1)
    trials: list[_Trial]

    @model_validator(mode="after")
    def _check_rows(self) -> "_Sweep":
        ids = [row.id for row in self.rows]
        if len(set(ids)) < len(ids):
            raise ValueError("two rows have the same id")
        if not isinstance(self.base.get("data.tgt"), str):
            raise ValueError("base has no data.tgt, the target language")
        for trial in self.trials:
            if trial.row not in ids:
                raise ValueError(f"{trial.name} belongs to row {trial.row!r}, which does not exist")
        return self


def read_trials(path: Path) -> dict[str, Any]:
    """The content of trials.json, with each text as one line without backticks.

    Raises ValueError that names the file and what is wrong.
    """
    again = "run the sweep again (python -m sweeps.run)"
    try:
        content = _plain(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
        _Sweep.model_validate(content)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the sweep first (python -m sweeps.run)") from None
    except ValidationError as error:
        first = error.errors()[0]
        place, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path} is damaged ({place or 'its content'}: {reason}): {again}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from None
    return content


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is not a finite number")


def _plain(value: Any) -> Any:
    """The value, with each text in it as one printable line without backticks."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in " ".join(value.split())).replace("`", "'")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
