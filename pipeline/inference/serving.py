"""The model that MLflow serves: it takes sentences and returns translations. `tracking.results.log_model` logs it.

    source .venv/bin/activate; export MLFLOW_TRACKING_URI=sqlite:///mlflow.db
    mlflow models serve --model-uri models:/m-... --env-manager local
    curl http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' -d '{"inputs": ["the dog sleeps"]}'

MLflow runs this file to get the object to call (`set_model` below). That is why importing it has an effect, and why
it imports mlflow, as otherwise only pipeline/tracking/ does.
"""

import logging
import threading
from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.common.settings import Evaluate
from pipeline.inference.lines import BATCH_TOKENS, LineTranslator
from pipeline.inference.trained_model import load_trained

logger = logging.getLogger(__name__)


class Translator(PythonModel):
    """Translates by beam search, with the beam, alpha and max_extra of the model's evaluation. A sentence that is too
    long is translated in parts or cut, and a warning is logged. An empty sentence stays empty."""

    def load_context(self, context: PythonModelContext) -> None:
        model, tokenizer = load_trained(Path(context.artifacts["weights"]).parent)
        settings = Evaluate(**context.model_config, engine="torch", batch_tokens=BATCH_TOKENS, num_samples=0)
        self.translate = LineTranslator(model, tokenizer, settings)
        self.search = threading.Lock()

    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]  # MLflow wants the types
        def log(index: int, message: str) -> None:
            logger.warning("sentence %d of %d %s", index + 1, len(model_input), message)

        with self.search:  # one at a time: a search uses all cores and changes torch's number of threads for all
            found = self.translate(model_input, log)
        return [best[0].text if best else "" for best in found]


set_model(Translator())
