"""The description of a run on MLflow's page: model, data, changed settings, result, command, links."""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Run

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as the description of a run or an experiment."""
LONGEST = 7_500
"""In characters. MLflow truncates the value of a tag at 8,000."""
VS_BASE = "vs_base/"
"""The prefix of the metrics that compare a run with base. MLflow shows them as a separate section of charts."""
SCORES = {
    "valid_averaged_bleu": "validation BLEU {:.2f}",
    "test_bleu": "test BLEU {:.2f}",
    "valid_averaged_ppl": "validation perplexity {:.3f}",
}


def describe_run(client: MlflowClient, run_id: str) -> None:
    """Update the run's description from its current tags, parameters and metrics in MLflow."""
    client.set_tag(run_id, NOTE, run_note(client.get_run(run_id)))


def run_note(run: Run) -> str:
    """The description, in Markdown, of a run of `open_run`."""
    metrics, tags = run.data.metrics, run.data.tags
    result = ", ".join(form.format(metrics[name]) for name, form in SCORES.items() if name in metrics)
    lines = {
        "Model": _model(run.data.params),
        "Changes": tags.get("change", ""),
        "Result": result or tags.get("ended", ""),
        "Compared with base": _comparison(metrics, tags),
        "Command": _command(tags),
        "Links": _links(run),
    }
    return "\n\n".join(f"**{name}:** {text}" for name, text in lines.items() if text)


def _model(params: Mapping[str, str]) -> str:
    sizes = ("num_layers", "d_model", "d_ff", "num_heads", "d_k", "dropout")
    shape = ", ".join(f"{name} {params[name]}" for name in sizes)
    data = f"{params['corpus']}, {params['src']} to {params['tgt']}"
    return f"{shape}; {params['max_steps']} steps of {params['batch_tokens']} tokens on {data}; seed {params['seed']}"


def _comparison(metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
    if f"{VS_BASE}bleu" not in metrics:
        return ""
    difference, low, high = (metrics[f"{VS_BASE}{name}"] for name in ("bleu", "low", "high"))
    return f"{difference:+.2f} BLEU (95% interval {low:+.2f} to {high:+.2f}): {tags['verdict']}"


def _command(tags: Mapping[str, str]) -> str:
    dirty = " with uncommitted changes" if tags.get("git_dirty") == "true" else ""
    commit = f", at commit {tags['git_commit'][:10]}{dirty}" if "git_commit" in tags else ""
    return f"`{tags['mlflow.source.name']}`{commit}"


def _links(run: Run) -> str:
    here = f"#/experiments/{run.info.experiment_id}/runs/"
    links = {"settings": f"{here}{run.info.run_id}/artifacts/settings.yaml"}
    if any(name in run.data.metrics for name in SCORES):
        links["translations"] = f"{here}{run.info.run_id}/artifacts/evaluation"
    if parent := run.data.tags.get("mlflow.parentRunId"):
        links["parent run"] = f"{here}{parent}"
    return ", ".join(f"[{name}]({address})" for name, address in links.items())


def shortened(note: str) -> str:
    """The note, without its last lines if it is too long for MLflow."""
    if len(note) <= LONGEST:
        return note
    return note[: note.rindex("\n", 0, LONGEST)] + "\n\nThe rest is in the artifacts."
