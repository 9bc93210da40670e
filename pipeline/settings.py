"""Print every setting that a run here would use, and the file that holds it.

    python -m pipeline.settings

Reads params.yaml and the presets of conf/ that it names; writes nothing.
"""

from pipeline.common import cli
from pipeline.common.settings import PRESETS, SECTIONS, flatten, load_settings


def main() -> None:
    cli.parser("pipeline.settings", __doc__).parse_args()
    with cli.exit_on_error("settings"):
        settings = load_settings()
        names = {kind: getattr(settings, f"{kind}_name") for kind in PRESETS}
        origin = {
            section: "params.yaml" if kind == "params" else f"conf/{kind}/{names[kind]}.yaml"
            for kind, sections in SECTIONS.items()
            for section in sections
        }
        for key, value in flatten(settings).items():
            if key.endswith("_name"):
                key = key.removesuffix("_name")
            print(f"{key:32} {value!s:16} {origin.get(key.split('.')[0] if '.' in key else '', 'params.yaml')}")


if __name__ == "__main__":
    main()
