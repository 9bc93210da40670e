"""Print the addresses of the views on MLflow's page: single runs side by side, a sweep's rows side by side.

    python -m pipeline.views

Reads MLflow's store: MLFLOW_TRACKING_URI, else mlflow.db, which `make ui` serves.
"""

from pathlib import Path

from pipeline.common import cli
from pipeline.common.storage import tracking_uri


def main() -> None:
    cli.parser("pipeline.views", __doc__).parse_args()
    with cli.exit_on_error("views"):
        from pipeline.tracking.views import view_addresses  # here, because --help does not wait for MLflow

        addresses = view_addresses(tracking_uri(Path()))
        for experiment, address in addresses.items():
            print(f"{experiment}: {address}")
        if not addresses:
            print("there is no run yet: dvc repro makes some")


if __name__ == "__main__":
    main()
