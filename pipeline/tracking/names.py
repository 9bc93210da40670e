"""Names of runs, from the model, the data and the changed settings. Does not import MLflow."""

from collections.abc import Mapping
from typing import Any

from pipeline.common.settings import Settings

MOST_CHANGES = 3
"""The most changes in a name: a longer one would not fit into a column of MLflow's table."""
COUNTED = {
    "num_heads": "heads",
    "num_layers": "layers",
    "max_steps": "steps",
    "warmup_steps": "warmup steps",
    "train_pairs": "training pairs",
    "valid_pairs": "validation pairs",
    "test_pairs": "test pairs",
}
"""Settings that count something, with the noun."""


def run_name(settings: Settings) -> str:
    """The name of a run, such as "mini on grammar, dropout 0.15, 100 steps, seed 2"."""
    return f"{setup_name(settings)}, seed {settings.seed}"


def setup_name(settings: Settings) -> str:
    """The nearest presets and the differences from them: "mini on grammar, dropout 0.15, 100 steps"."""
    model = settings.model
    sizes = f" ({setting_name('model.num_layers', model.num_layers)}, {setting_name('model.d_model', model.d_model)})"
    name = settings.model_name + (sizes if settings.model_name == "custom" else "")
    changes = [setting_name(key, value) for key, value in settings.changes.items()]
    if len(changes) > MOST_CHANGES:
        changes[MOST_CHANGES:] = [f"and {len(changes) - MOST_CHANGES} more"]
    return ", ".join([f"{name} on {settings.data_name}", *changes]).replace(", and ", " and ")


def changes_text(settings: Settings) -> str:
    """All differences from the nearest presets: "dropout 0.15, 100 steps".

    "none" if there are none, "custom" if the model is far from all presets.
    """
    nothing = "custom" if settings.model_name == "custom" else "none"
    return ", ".join(setting_name(key, value) for key, value in settings.changes.items()) or nothing


def setting_name(key: str, value: Any, counted: Mapping[str, str] = COUNTED) -> str:
    """A setting in words: "4 heads", "no positions", "100 steps", "d_ff 64". `counted` is {setting: plural noun}."""
    name = key.partition(".")[2]
    if name in counted:
        noun = counted[name]
        return f"{value} {noun.removesuffix('s') if value == 1 else noun}"
    match name:
        case "positions":
            return "no positions" if value == "none" else f"{value} positions"
        case "label_smoothing":
            return f"label smoothing {value}"
        case _:
            return f"{name} {str(value).lower() if isinstance(value, bool) else value}"
