"""The model as MLflow stores and serves it: sentences in, translations out. `tracking.results.log_model` logs it.

    source .venv/bin/activate; export MLFLOW_TRACKING_URI=sqlite:///mlflow.db
    mlflow models serve --model-uri models:/m-... --env-manager local
    curl http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' -d '{"inputs": ["the dog sleeps"]}'

MLflow runs this file to get the object that it calls (`set_model` below), which is why something happens here at
import, and why this file imports mlflow, as only pipeline/tracking/ does otherwise.
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
    """Beam search with the beam, alpha and max_extra that the model was evaluated with. What is too long for it is
    translated in parts or cut, and the log has it; an empty sentence stays empty."""

    def load_context(self, context: PythonModelContext) -> None:
        model, tokenizer = load_trained(Path(context.artifacts["weights"]).parent)
        settings = Evaluate(**context.model_config, engine="torch", batch_tokens=BATCH_TOKENS, num_samples=0)
        self.translate = LineTranslator(model, tokenizer, settings)
        self.search = threading.Lock()

    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]  # MLflow wants the types
        def say(index: int, fate: str) -> None:
            logger.warning("sentence %d of %d %s", index + 1, len(model_input), fate)

        with self.search:  # it has all cores, and changes the number of torch's threads, which others would take over
            found = self.translate(model_input, say)
        return [best[0].text if best else "" for best in found]


set_model(Translator())
