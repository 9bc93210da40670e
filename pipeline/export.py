"""Export a trained model to CTranslate2: fast on CPUs, from Python or C++.

    python -m pipeline.export
    python -m pipeline.export --quantization int8 --output models/int8

Reads models/final. Writes models/ctranslate2, a folder that needs neither torch
nor this project. To translate with it:

    import ctranslate2, sentencepiece
    folder = "models/ctranslate2"
    tokenizer = sentencepiece.SentencePieceProcessor(f"{folder}/spm.model")
    translator = ctranslate2.Translator(
        folder, inter_threads=2, intra_threads=1)
    source = tokenizer.encode("A man is singing.", out_type=str)
    [result] = translator.translate_batch(
        [source], beam_size=4, patience=2, length_penalty=0.6,
        suppress_sequences=[["<pad>"], ["<s>"]])
    print(tokenizer.decode(result.hypotheses[0]))

By default CTranslate2 cuts inputs at 1,024 tokens and outputs at 256. If
model.max_length is below 1,024, pass its value as max_input_length; if it is
below 256, as max_decoding_length too.

In the folder, `sha256sum --check SHA256SUMS` finds damaged files. With
evaluate.engine: ctranslate2 or ctranslate2-int8 in params.yaml, the evaluate
stage translates with such an export.
"""

from pathlib import Path

from pipeline.common import cli
from pipeline.common.atomic_io import replace_folder
from pipeline.common.checksums import write_sums
from pipeline.common.paths import CTRANSLATE2, FINAL
from pipeline.inference.ctranslate2_export import Quantization, write_export
from pipeline.inference.trained_model import load_trained


def main() -> None:
    parser = cli.parser("pipeline.export", __doc__)
    parser.add_argument(
        "--model", type=Path, default=FINAL, metavar="FOLDER", help="the trained model (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=CTRANSLATE2,
        metavar="FOLDER",
        help="where to write; replaced if it is an export already (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=("float32", "int8"),
        default="float32",
        help="int8 is a quarter of the size and faster; some translations differ (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with cli.exit_on_error("export"):
        export(arguments.model, arguments.output, arguments.quantization)
    size = (arguments.output / "model.bin").stat().st_size
    print(f"{arguments.output}: {arguments.quantization}, {size / 1e6:.1f} MB; --help shows how to translate with it")


def export(final: Path, output: Path, quantization: Quantization) -> None:
    """Write the model of the folder `final` to the folder `output`, with checksums, atomically.

    Raises ValueError if `final` has no sound model, or if `output` exists and is not an export.
    """
    model, tokenizer = load_trained(final)
    if output.exists() and not (output / "model.bin").is_file():
        raise ValueError(f"{output} exists and is not an export, so it is not replaced: name another --output")
    with replace_folder(output) as folder:
        write_export(model, tokenizer, folder, quantization)
        write_sums(folder, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
