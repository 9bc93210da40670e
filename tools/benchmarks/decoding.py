"""Decoding: sentences per second by beam search, of ours and of other toolkits, from the same weights and tokens.

All search with beam 4 on sentences of the test split. The others get batches of 64 sentences of similar length.

With --cap every output runs to the length of its source + 10, so that random weights give all systems the same work.
The others have one length limit for a batch, so the sentences then have a few lengths, with 64 sentences of each.

This module also runs in the environment of the other toolkits: at module level, import only numpy, torch, harness.py
and training.py.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.benchmarks.harness import serve
from tools.benchmarks.training import BOS, EOS, PAD, marian

BEAM, ALPHA, FREE_EXTRA, CAP_EXTRA, BATCH = 4, 0.6, 50, 10, 64
Search = Callable[[], "Outputs"]
Outputs = list[list[int]]


class Numbers:
    """A stand-in for a tokenizer. Its text is the tokens as numbers."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class Tokenizer(Numbers):
    """Numbers, with all other attributes from the tokenizer of a folder. An export needs them."""

    def __init__(self, folder: Path) -> None:
        from pipeline.data.dataset import load_tokenizer

        self.real = load_tokenizer(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def ours(model: Path, sources: Outputs, cap: bool, tokenizer: Path | None = None) -> Search:
    """pipeline/inference/translate.py, with the batches of params.yaml.

    With a tokenizer, evaluate.engine is ctranslate2 (pipeline/inference/ctranslate2_engine.py), and each call
    includes its export.
    """
    from pipeline.common.settings import load_settings
    from pipeline.inference.translate import translate
    from pipeline.training.checkpoint import load_model

    net, extra = load_model(model), CAP_EXTRA if cap else FREE_EXTRA
    settings = replace(load_settings(Path()).evaluate, beam=BEAM, alpha=ALPHA, max_extra=extra)
    numbers: Any = Numbers()
    if tokenizer:
        settings, numbers = replace(settings, engine="ctranslate2"), Tokenizer(tokenizer)

    def outputs() -> Outputs:
        found = translate(net, numbers, sources, settings, progress=False)
        return [[int(piece) for piece in best.text.split()] for best in found]

    return outputs


def by_lines(model: Path, sources: Outputs, tokenizer: Path) -> Search:
    """pipeline/inference/lines.py, as `python -m pipeline.translate` calls it: from text to text."""
    from pipeline.common.settings import load_settings
    from pipeline.data.dataset import load_tokenizer
    from pipeline.inference.lines import BATCH_TOKENS, LineTranslator
    from pipeline.training.checkpoint import load_model

    search: dict[str, Any] = dict(beam=BEAM, alpha=ALPHA, max_extra=FREE_EXTRA, batch_tokens=BATCH_TOKENS)
    real = load_tokenizer(tokenizer)
    translator = LineTranslator(load_model(model), real, replace(load_settings(Path()).evaluate, **search))
    lines = [real.decode(source) for source in sources]

    def outputs() -> Outputs:
        return [real.encode(found[0].text) for found in translator(lines, print)]

    return outputs


def generate(model: Path, sources: Outputs, cap: bool) -> Search:
    """MarianMTModel.generate of transformers, with our weights."""
    sizes = json.loads((model / "config.json").read_text())
    net = marian(sizes).eval()
    _fill(net, model, sizes)

    @torch.inference_mode()
    def outputs() -> Outputs:
        found: Outputs = [[] for _ in sources]
        for indices in _batches(sources):
            rows = [torch.tensor([*sources[i], EOS]) for i in indices]
            src = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
            limit = src.size(1) - 1 + (CAP_EXTRA if cap else FREE_EXTRA)
            pieces = net.generate(
                input_ids=src,
                attention_mask=(src != PAD).long(),
                num_beams=BEAM,
                length_penalty=ALPHA,
                max_new_tokens=limit,
                min_new_tokens=limit if cap else 0,
                bad_words_ids=[[PAD], [BOS]],
            )
            for i, row in zip(indices, pieces.tolist(), strict=True):
                found[i] = [piece for piece in row if piece not in (PAD, BOS, EOS)]
        return found

    return outputs


def ctranslate2(
    model: Path, sources: Outputs, cap: bool, compute_type: str, workers: int, threads: int, patience: float
) -> Search:
    """CTranslate2 on the output of `python -m pipeline.export`.

    `workers` translators share `threads` threads. evaluate.engine searches with a `patience` of 2.
    """
    import ctranslate2 as ct2

    translator = ct2.Translator(
        str(model), inter_threads=workers, intra_threads=threads // workers, compute_type=compute_type
    )
    pieces = json.loads((model / "shared_vocabulary.json").read_text(encoding="utf-8"))
    number = {piece: i for i, piece in enumerate(pieces)}
    texts = [[pieces[i] for i in source] for source in sources]

    def outputs() -> Outputs:
        found: Outputs = [[] for _ in sources]
        waiting = []
        for indices in _batches(sources):
            limit = max(len(sources[i]) for i in indices) + (CAP_EXTRA if cap else FREE_EXTRA)
            results = translator.translate_batch(
                [texts[i] for i in indices],
                beam_size=BEAM,
                length_penalty=ALPHA,
                patience=patience,
                max_decoding_length=limit,
                min_decoding_length=limit if cap else 0,
                suppress_sequences=[[pieces[PAD]], [pieces[BOS]]],
                asynchronous=True,
            )
            waiting.append((indices, results))
        for indices, results in waiting:
            for i, result in zip(indices, results, strict=True):
                found[i] = [number[piece] for piece in result.result().hypotheses[0]]
        return found

    return outputs


def timed(search: Search, sizes: dict[str, Any], sources: Outputs) -> dict[str, float]:
    """Run a search and return its rates per second: sentences, tokens, FLOPs.

    The FLOPs are those of BEAM hypotheses as long as the output. No search needs less; some need more.
    """
    from model.config import TransformerConfig
    from model.flops import forward_flops

    started = time.perf_counter()
    found = search()
    took = time.perf_counter() - started
    config, flops = TransformerConfig(**sizes), 0
    for source, output in zip(sources, found, strict=True):
        once = forward_flops(config, 1, len(source) + 1, 0)
        flops += once + BEAM * (forward_flops(config, 1, len(source) + 1, len(output) + 1) - once)
    return {
        "sentences_per_s": len(found) / took,
        "tokens_per_s": sum(len(output) + 1 for output in found) / took,
        "flops_per_s": flops / took,
    }


def chosen(sources: Outputs, number: int, cap: bool) -> Outputs:
    """`number` of the sources, evenly from all lengths; with `cap`, BATCH sources of each of a few lengths."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    if not cap:
        return [sources[order[i * len(order) // number]] for i in range(number)]
    of_length: dict[int, Outputs] = {}
    for i in order:
        of_length.setdefault(len(sources[i]), []).append(sources[i])
    full = [same[:BATCH] for same in of_length.values() if len(same) >= BATCH]
    several = number // BATCH
    return [source for i in range(several) for source in full[i * (len(full) - 1) // max(1, several - 1)]]


def _batches(sources: Outputs) -> Iterator[list[int]]:
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _fill(net: Any, model: Path, sizes: dict[str, Any]) -> None:
    """Load our weights into MarianMTModel: W^Q, W^K and W^V split, biases that ours lacks set to 0, our sinusoids."""
    from safetensors.torch import load_file

    ours, d_model = load_file(model / "weights.safetensors"), sizes["d_model"]
    theirs = {name: torch.zeros_like(value) for name, value in net.state_dict().items() if "bias" in name}

    def attention(their: str, our: str) -> None:
        for name, weight in zip("qkv", ours[f"{our}.w_qkv"].split(d_model), strict=True):
            theirs[f"{their}.{name}_proj.weight"] = weight
        theirs[f"{their}.out_proj.weight"] = ours[f"{our}.w_o.weight"]

    def pair(their: str, our: str) -> None:
        theirs[f"{their}.weight"], theirs[f"{their}.bias"] = ours[f"{our}.weight"], ours[f"{our}.bias"]

    for i in range(sizes["num_layers"]):
        for stack, own in (("encoder", "attention_residual"), ("decoder", "self_attention_residual")):
            their, our = f"model.{stack}.layers.{i}", f"{stack}.{i}"
            attention(f"{their}.self_attn", f"{our}.self_attention")
            pair(f"{their}.self_attn_layer_norm", f"{our}.{own}.norm")
            pair(f"{their}.fc1", f"{our}.feed_forward.w_1")
            pair(f"{their}.fc2", f"{our}.feed_forward.w_2")
            pair(f"{their}.final_layer_norm", f"{our}.feed_forward_residual.norm")
        attention(f"{their}.encoder_attn", f"{our}.cross_attention")
        pair(f"{their}.encoder_attn_layer_norm", f"{our}.cross_attention_residual.norm")
    for name, value in net.state_dict().items():
        if name.endswith("embed_positions.weight"):
            angles = torch.arange(len(value))[:, None] / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
            theirs[name] = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        elif name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")):
            theirs[name] = ours["embedding.weight"]
    net.load_state_dict(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["ours", "engine", "lines", "generate", "float32", "int8"])
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of save_model, with ctranslate2-float32 and ctranslate2-int8",
    )
    parser.add_argument("--tokenizer", type=Path, help="data/tokenizer; engine and lines need it")
    parser.add_argument("--encoded", type=Path, required=True, help="data/encoded")
    parser.add_argument("--sentences", type=int, required=True, help="sentences in a block")
    parser.add_argument("--cap", action="store_true", help="run every output to its source's length + 10")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="translators of CTranslate2 that share the threads")
    parser.add_argument("--patience", type=float, default=1, help="patience of CTranslate2's search")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids, offsets = (np.load(arguments.encoded / f"test.src.{what}.npy") for what in ("ids", "offsets"))
    sources = [ids[start:end].tolist() for start, end in pairwise(offsets)]
    sources = chosen(sources, arguments.sentences, arguments.cap)
    model, cap = arguments.model, arguments.cap
    if arguments.system in ("float32", "int8"):
        options = (arguments.system, arguments.workers, arguments.threads, arguments.patience)
        search = ctranslate2(model / f"ctranslate2-{arguments.system}", sources, cap, *options)
    elif arguments.system == "engine":
        search = ours(model, sources, cap, arguments.tokenizer)
    elif arguments.system == "lines":
        search = by_lines(model, sources, arguments.tokenizer)
    else:
        search = (ours if arguments.system == "ours" else generate)(model, sources, cap)
    sizes = json.loads((model / "config.json").read_text())
    serve(lambda: timed(search, sizes, sources))


if __name__ == "__main__":
    main()
