"""Write our model in CTranslate2's format: the files of an export, and the mapping of the weights."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from ctranslate2.specs import model_spec, transformer_spec
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BOS, EOS, UNK, TransformerConfig
from model.transformer import Attention, DecoderLayer, EncoderLayer, FeedForward, Residual, Transformer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


Quantization = Literal["float32", "int8"]


def write_export(
    model: Transformer, tokenizer: "SentencePieceProcessor", folder: Path, quantization: Quantization
) -> None:
    """Write model.bin, config.json, shared_vocabulary.json and spm.model into an existing folder.

    Raises ValueError if a weight is not finite: CTranslate2 would translate with it without an error.
    """
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError("the model has weights that are not finite: train it again with a lower train.lr_scale")
    spec = specification(model, tokenizer)
    spec.validate()
    spec.optimize(quantization)  # one copy of the shared embeddings; with int8, every matrix in 8 bits, row by row
    if quantization == "int8":
        model_spec.visit_spec(spec, _to_seven_bits)
    spec.save(str(folder))
    (folder / "spm.model").write_bytes(tokenizer.serialized_model_proto())


def specification(model: Transformer, tokenizer: "SentencePieceProcessor") -> transformer_spec.TransformerSpec:
    """Return the same Transformer as a CTranslate2 spec, for all settings of the model. Its outputs differ from ours
    by rounding only.

    Like our model, CTranslate2 appends EOS to a source, scales embeddings by sqrt(d_model) and starts an output with
    BOS. Settings that it does not have are expressed by others:

    - d_k and d_v that differ: the smaller heads are padded with zeros, which add nothing to any product;
    - alibi, which it has for decoders only, with offsets in one direction: T5's bias by offset, see `alibi_bias`;
    - relative positions on keys only: those of Shaw et al., without the values;
    - positions "none": a table of zeros. Without a table it adds sinusoids of its own, which differ from the paper's.
    """
    c = model.config
    options = {
        "pre_norm": c.norm == "pre",
        "head_dim": _head_dim(c),
        "relative_position": c.positions == "relative",
        "relative_attention_bias": c.positions == "alibi",
        "rotary_dim": c.d_k if c.positions == "rotary" else None,
        "rotary_interleave": False,  # halves, see model.transformer.rotate
    }
    encoder = transformer_spec.TransformerEncoderSpec(c.num_layers, c.num_heads, **options)
    decoder = transformer_spec.TransformerDecoderSpec(c.num_layers, c.num_heads, **options)
    encoder_layers = cast(list[EncoderLayer], list(model.encoder))
    decoder_layers = cast(list[DecoderLayer], list(model.decoder))
    for spec, layer in zip(encoder.layer, encoder_layers, strict=True):
        _attention(spec.self_attention, layer.self_attention, layer.attention_residual, c)
        _feed_forward(spec.ffn, layer.feed_forward, layer.feed_forward_residual)
    for spec, part in zip(decoder.layer, decoder_layers, strict=True):
        _attention(spec.self_attention, part.self_attention, part.self_attention_residual, c)
        _attention(spec.attention, part.cross_attention, part.cross_attention_residual, c)
        _feed_forward(spec.ffn, part.feed_forward, part.feed_forward_residual)
    for stack, norm in ((encoder, model.encoder_norm), (decoder, model.decoder_norm)):
        if isinstance(norm, nn.LayerNorm):  # norm "pre"
            _norm(stack.layer_norm, norm)
    embeddings = _array(model.embedding.weight)
    for place in (encoder.embeddings[0], decoder.embeddings, decoder.projection):
        place.weight = embeddings
    if c.positions in ("sinusoidal", "learned", "none"):
        added = model.embedding.positions
        table = _array(torch.zeros(c.max_length, c.d_model) if added is None else added)
        encoder.position_encodings.encodings = decoder.position_encodings.encodings = table

    whole = transformer_spec.TransformerSpec(encoder, decoder)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    whole.register_source_vocabulary(pieces)
    whole.register_target_vocabulary(pieces)
    whole.config.unk_token, whole.config.eos_token = pieces[UNK], pieces[EOS]
    whole.config.bos_token = whole.config.decoder_start_token = pieces[BOS]
    whole.config.add_source_eos = True
    whole.config.layer_norm_epsilon = encoder_layers[0].attention_residual.norm.eps
    return whole


def _attention(
    spec: transformer_spec.attention_spec.MultiHeadAttentionSpec,
    attention: Attention,
    residual: Residual,
    c: TransformerConfig,
) -> None:
    size = _head_dim(c)
    q, k, v = (_fill_heads(weight, c.num_heads, size) for weight in attention.w_qkv.split(attention.split))
    if len(spec.linear) == 2:  # self-attention
        qkv_linear, output_linear = spec.linear
        qkv_linear.weight = _array(torch.cat((q, k, v)))
    else:  # cross-attention: keys and values come from another sequence than the queries
        q_linear, kv_linear, output_linear = spec.linear
        q_linear.weight, kv_linear.weight = _array(q), _array(torch.cat((k, v)))
    output_linear.weight = _array(_fill_heads(attention.w_o.weight.T, c.num_heads, size).T)
    spec.queries_scale = 1 / math.sqrt(c.d_k)  # the default divides by the root of the padded size
    _norm(spec.layer_norm, residual.norm)
    if attention.positions == "relative":
        spec.relative_position_keys = _array(F.pad(attention.offset_keys, (0, size - c.d_k)))
        spec.relative_position_values = model_spec.OPTIONAL
    if attention.positions == "alibi":
        spec.relative_attention_bias = _array(alibi_bias(c.max_length, c.num_heads))
        spec.relative_attention_max_distance = np.int32(4 * c.max_length)  # required; larger than any offset


def alibi_bias(max_length: int, num_heads: int) -> Tensor:
    """Return ALiBi's bias on the logits of each head as T5's bias table: [4 * max_length, num_heads], by offset.

    T5 divides its rows by direction. In the first half of a direction's rows, each distance has its own row; longer
    distances share the second half. A decoder, which only looks back, uses all rows: distance n is row n. An encoder
    uses half of them for each direction: n back is row n, n ahead is row 2 * max_length + n.
    """
    distance = torch.arange(4 * max_length) % (2 * max_length)
    head = torch.arange(1, num_heads + 1)
    return -torch.exp2(-8 * head / num_heads) * distance[:, None]


def _feed_forward(spec: transformer_spec.FeedForwardSpec, feed_forward: FeedForward, residual: Residual) -> None:
    for place, linear in ((spec.linear_0, feed_forward.w_1), (spec.linear_1, feed_forward.w_2)):
        place.weight, place.bias = _array(linear.weight), _array(linear.bias)
    _norm(spec.layer_norm, residual.norm)


def _norm(spec: transformer_spec.common_spec.LayerNormSpec, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _head_dim(c: TransformerConfig) -> int:
    return max(c.d_k, c.d_v)


def _fill_heads(weight: Tensor, num_heads: int, size: int) -> Tensor:
    """[heads * d, d_model] -> [heads * size, d_model], each head padded with rows of zeros."""
    by_head = weight.unflatten(0, (num_heads, -1))
    return F.pad(by_head, (0, 0, 0, size - by_head.size(1))).flatten(0, 1)


def _to_seven_bits(layer: model_spec.LayerSpec, name: str, value: object) -> None:
    """Halve int8 weights to [-64, 64], and their scales. Without VNNI (AVX2), libraries add two products in 16 bits.
    2 * 255 * 64 fits; with all 8 bits the sums overflow, on AMD's processors unnoticed ("Nuances of int8
    computations" in oneDNN's guide)."""
    scale = getattr(layer, f"{name.rpartition('/')[2]}_scale", None)
    if isinstance(scale, model_spec.NumpyVariable) and isinstance(value, model_spec.NumpyVariable):
        value.array = np.rint(value.array / 2).astype(np.int8)
        scale.array = (scale.array / 2).astype(np.float32)


def _array(tensor: Tensor) -> np.ndarray:
    """A copy, because CTranslate2 quantizes arrays in place, which would change our model's weights."""
    return tensor.detach().cpu().numpy().copy()
