"""Copy the encoded corpus to storage that all nodes of a cluster can read.

    RUN_STORAGE=s3://bucket/runs python -m pipeline.publish

Training on a cluster then copies it to the disk of each node, once.

Reads data/encoded, data/tokenizer, and the validation and test splits of
data/clean. Writes them to <RUN_STORAGE>/data/<name>-<digest>/, and the name of
that folder to <RUN_STORAGE>/data/<name>.json. If the corpus changes, it gets a
new folder, so a run in progress keeps the corpus that it started with.
"""

from pathlib import Path

from tqdm import tqdm

from pipeline.common import cli
from pipeline.common.atomic_io import SUMS, sums_text, write_json, write_text
from pipeline.common.checksums import verify
from pipeline.common.environment import RUN_STORAGE_ENV
from pipeline.common.paths import CLEAN, ENCODED, TOKENIZER
from pipeline.common.settings import Settings, load_settings
from pipeline.common.storage import AnyPath, as_os_error, copy_file, run_storage
from pipeline.data.dataset import TOKENIZER_FILE, CorpusInfo


def publish(settings: Settings, root: Path, storage: AnyPath) -> AnyPath:
    """Copy data/ of `root` to `storage`, unless it is already there; return the folder in `storage`.

    Raises ValueError or OSError with a one-line message.
    """
    target = storage / "data" / f"{settings.data_name}-{CorpusInfo.open(root / ENCODED).sha256[:12]}"
    paths = _files(settings, root)
    for folder in (ENCODED, TOKENIZER):
        verify(root / folder, None, "tokenize")
    with as_os_error(storage):
        if not (target / SUMS).exists():
            size = sum(path.stat().st_size for path in paths)
            with tqdm(total=size, desc="publish", unit="B", unit_scale=True) as bar:
                names = {path: path.relative_to(root).as_posix() for path in paths}
                sums = {name: copy_file(path, target / name, bar.update) for path, name in names.items()}
            write_text(target / SUMS, sums_text(sums))  # last: it marks the folder as complete
    write_json(storage / "data" / f"{settings.data_name}.json", {"folder": target.name})
    return target


def _files(settings: Settings, root: Path) -> list[Path]:
    """The files that `publish` copies. Raises ValueError if one is missing."""
    texts = [
        root / CLEAN / f"{split}.{language}"
        for split in ("valid", "test")
        for language in (settings.data.src, settings.data.tgt)
    ]
    tokenizer = [root / TOKENIZER / name for name in (TOKENIZER_FILE, SUMS)]
    paths = [*sorted((root / ENCODED).iterdir()), *tokenizer, *texts]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run dvc repro tokenize first")
    return paths


def main() -> None:
    cli.parser("pipeline.publish", __doc__).parse_args()
    root = Path().resolve()
    with cli.exit_on_error("publish"):
        storage = run_storage(root)
        if storage == root:
            raise ValueError(
                f"{RUN_STORAGE_ENV} is not set: set it to a folder that all nodes share, or to a URI such as "
                "s3://bucket/runs"
            )
        print(publish(load_settings(), root, storage))


if __name__ == "__main__":
    main()
