"""Print the addresses of the prepared views in MLflow's UI.

    python -m pipeline.views

There is one view that compares runs of training, and one that compares the rows
of a sweep. Start the UI with `make ui`.

Reads MLflow's store: MLFLOW_TRACKING_URI, or mlflow.db if that is not set.
"""

from pathlib import Path

from pipeline.common import cli
from pipeline.common.storage import tracking_uri


def main() -> None:
    cli.parser("pipeline.views", __doc__).parse_args()
    with cli.exit_on_error("views"):
        from pipeline.tracking.views import view_addresses  # imported here, so that --help does not wait for MLflow

        addresses = view_addresses(tracking_uri(Path()))
        for experiment, address in addresses.items():
            print(f"{experiment}: {address}")
        if not addresses:
            print("there is no run yet: start one with dvc repro")


if __name__ == "__main__":
    main()
