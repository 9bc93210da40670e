"""Export a trained model to CTranslate2's format, to translate without torch: from Python or C++, fast on CPUs.

    python -m pipeline.export
    python -m pipeline.export --quantization int8 --output models/ctranslate2-int8

Reads models/final; writes models/ctranslate2, a folder with all that translation needs:

    import ctranslate2, sentencepiece
    tokenizer = sentencepiece.SentencePieceProcessor("models/ctranslate2/spm.model")
    translator = ctranslate2.Translator("models/ctranslate2", inter_threads=2, intra_threads=1)
    source = tokenizer.encode("A man is singing.", out_type=str)
    [result] = translator.translate_batch([source], beam_size=4, patience=2, length_penalty=0.6,
                                          suppress_sequences=[["<pad>"], ["<s>"]])
    print(tokenizer.decode(result.hypotheses[0]))

Where model.max_length is below 1,024, add max_input_length with its value, and below 256 max_decoding_length too. In
that folder, `sha256sum --check SHA256SUMS` tells whether a file is damaged. The evaluate stage translates by such an
export with evaluate.engine: ctranslate2 or ctranslate2-int8 in params.yaml.
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
    parser.add_argument("--model", type=Path, default=FINAL, metavar="FOLDER", help=f"a trained model ({FINAL})")
    parser.add_argument(
        "--output", type=Path, default=CTRANSLATE2, metavar="FOLDER", help=f"replaced if it exists ({CTRANSLATE2})"
    )
    parser.add_argument(
        "--quantization",
        choices=("float32", "int8"),
        default="float32",
        help="int8: a quarter of the size and faster; some translations differ (default: float32)",
    )
    arguments = parser.parse_args()
    with cli.exit_on_error("export"):
        export(arguments.model, arguments.output, arguments.quantization)
    size = (arguments.output / "model.bin").stat().st_size
    print(f"{arguments.output}: {arguments.quantization}, {size / 1e6:.1f} MB; --help says how to translate with it")


def export(final: Path, output: Path, quantization: Quantization) -> None:
    """Write the model in `final` to `output`, with checksums, whole or not at all. Raises ValueError."""
    model, tokenizer = load_trained(final)
    if output.exists() and not (output / "model.bin").is_file():
        raise ValueError(f"{output} is there and is no export, so it is not replaced: name another --output")
    with replace_folder(output) as folder:
        write_export(model, tokenizer, folder, quantization)
        write_sums(folder, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
