"""The model as MLflow stores and serves it: sentences in, translations out. `tracking.results.log_model` logs it.

    source .venv/bin/activate; export MLFLOW_TRACKING_URI=sqlite:///mlflow.db
    mlflow models serve --model-uri models:/m-... --env-manager local
    curl http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' -d '{"inputs": ["the dog sleeps"]}'

MLflow runs this file to get the object that it calls (`set_model` below), which is why something happens here at
import, and why this file imports mlflow, as only pipeline/tracking/ does otherwise.
"""

import threading
from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.common.settings import Evaluate
from pipeline.inference.trained_model import load_trained
from pipeline.inference.translate import translate

BATCH_TOKENS = 8192
"""Source tokens (padding counted) that are decoded together; changes memory and speed, no translation."""


class Translator(PythonModel):
    """Beam search with the beam, alpha and max_extra that the model was evaluated with."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model, self.tokenizer = load_trained(Path(context.artifacts["weights"]).parent)
        self.search = threading.Lock()
        self.settings = Evaluate(**context.model_config, engine="torch", batch_tokens=BATCH_TOKENS, num_samples=0)

    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]  # MLflow wants the types
        sources = self.tokenizer.encode(model_input)
        with self.search:  # it has all cores, and changes the number of torch's threads, which others would take over
            outputs = translate(self.model, self.tokenizer, sources, self.settings, progress=False)
        return [output.text for output in outputs]


set_model(Translator())
