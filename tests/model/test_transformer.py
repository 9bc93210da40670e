"""The model compared with torch's modules, the paper's numbers, and the properties that define its parts."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BOS, EOS, MAX_RELATIVE_DISTANCE, PAD, Positions, TransformerConfig
from model.transformer import (
    Attention,
    Embedding,
    Residual,
    Transformer,
    alibi_bias,
    relative_bias,
    rotary_angles,
    rotate,
    sinusoids,
)
from tests.factories import BASE, build, config, sentences, shifted

POSITIONS = get_args(Positions)


# --- compared with torch.nn.Transformer


def torch_twin(model: Transformer) -> nn.Transformer:
    """torch's Transformer with our weights. The biases of its attention, which the paper does not have, are 0."""
    c = model.config
    pre = c.norm == "pre"
    norms = [nn.LayerNorm(c.d_model) if pre else None for _ in range(2)]
    sizes = {"dim_feedforward": c.d_ff, "dropout": 0.0, "batch_first": True, "norm_first": pre}
    twin = nn.Transformer(
        c.d_model,
        c.num_heads,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(c.d_model, c.num_heads, **sizes),
            c.num_layers,
            norms[0],
            enable_nested_tensor=False,
        ),
        custom_decoder=nn.TransformerDecoder(
            nn.TransformerDecoderLayer(c.d_model, c.num_heads, **sizes), c.num_layers, norms[1]
        ),
        batch_first=True,
    ).eval()

    def copy_attention(theirs: nn.MultiheadAttention, ours: Attention) -> None:
        theirs.in_proj_weight.copy_(ours.w_qkv)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.w_o.weight)
        theirs.out_proj.bias.zero_()

    def copy_rest(theirs: nn.Module, ours: nn.Module, names: list[str]) -> None:
        copy_attention(theirs.self_attn, ours.self_attention)
        for their, our in ((theirs.linear1, ours.feed_forward.w_1), (theirs.linear2, ours.feed_forward.w_2)):
            their.load_state_dict(our.state_dict())
        for i, name in enumerate(names, start=1):
            getattr(theirs, f"norm{i}").load_state_dict(getattr(ours, f"{name}_residual").norm.state_dict())

    with torch.no_grad():
        for theirs, ours in zip(twin.encoder.layers, model.encoder, strict=True):
            copy_rest(theirs, ours, ["attention", "feed_forward"])
        for theirs, ours in zip(twin.decoder.layers, model.decoder, strict=True):
            copy_rest(theirs, ours, ["self_attention", "cross_attention", "feed_forward"])
            copy_attention(theirs.multihead_attn, ours.cross_attention)
        if pre:
            twin.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
            twin.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    return twin


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_transformer_gives_the_logits_of_torchs_with_the_same_weights(norm):
    model = build(config(d_model=30, d_k=10, d_v=10, norm=norm))
    with torch.no_grad():  # gain 1 and bias 0 would hide a misplaced norm
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    twin, src, tgt = torch_twin(model), sentences([11, 5, 7]), shifted(sentences([3, 13, 8], seed=3))
    src_embedded = F.embedding(src, model.embedding.weight) * math.sqrt(30) + sinusoids(src.size(1), 30)
    tgt_embedded = F.embedding(tgt, model.embedding.weight) * math.sqrt(30) + sinusoids(tgt.size(1), 30)
    theirs = twin(
        src_embedded,
        tgt_embedded,
        tgt_mask=torch.ones(13, 13, dtype=torch.bool).triu(1),
        src_key_padding_mask=src == PAD,
        memory_key_padding_mask=src == PAD,
    )
    ours = model.logits(model(src, tgt))
    torch.testing.assert_close(ours, F.linear(theirs, model.embedding.weight), atol=1e-5, rtol=0)


# --- sizes: Table 3


def num_parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    ("changes", "published"),  # in millions; base has 65
    [
        ({"d_k": 16}, 58),
        ({"d_k": 32}, 60),
        ({"num_layers": 2}, 36),
        ({"num_layers": 4}, 50),
        ({"num_layers": 8}, 80),
        ({"d_ff": 1024}, 53),
        ({"d_ff": 4096}, 90),
    ],
)
def test_transformer_parameter_counts_differ_as_in_table_3(changes, published):
    difference = (num_parameters(replace(BASE, **changes)) - num_parameters(BASE)) / 1e6
    assert difference == pytest.approx(published - 65, abs=1)  # both printed numbers are rounded


@pytest.mark.parametrize("changes", [{"num_heads": h, "d_k": 512 // h, "d_v": 512 // h} for h in (1, 4, 16, 32)])
def test_transformer_of_rows_a_has_as_many_parameters_as_base(changes):
    assert num_parameters(replace(BASE, **changes)) == num_parameters(BASE)


def test_transformer_parameter_counts_are_those_of_section_3s_formulas():
    """Formulas from section 3: V d + N (4 h d_k d ...), with a vocabulary that gives the paper's 28, 65 and 168."""

    def formula(c: TransformerConfig) -> int:
        attention = c.d_model * c.num_heads * (2 * c.d_k + 2 * c.d_v)
        feed_forward = 2 * c.d_model * c.d_ff + c.d_ff + c.d_model
        norm = 2 * c.d_model
        encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
        return c.vocab_size * c.d_model + c.num_layers * (encoder + decoder)

    base = replace(BASE, vocab_size=41_100)
    rows = {
        65: base,
        28: replace(base, d_model=256, d_k=32, d_v=32),
        168: replace(base, d_model=1024, d_k=128, d_v=128),
    }
    for millions, row in rows.items():
        assert num_parameters(row) == formula(row)
        assert round(formula(row) / 1e6) == millions
    big = replace(BASE, vocab_size=36_000, d_model=1024, d_ff=4096, num_heads=16)
    assert num_parameters(big) == formula(big)
    assert round(formula(big) / 1e6) == 213


def test_embedding_matrix_is_shared_with_the_projection():
    model = build()
    assert [name for name, p in model.named_parameters() if 23 in p.shape] == ["embedding.weight"]


# --- outputs that must not depend on an input


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_transformer_changes_no_logit_by_a_later_target_token(positions, norm):
    model = build(config(positions=positions, norm=norm))
    src, tgt = sentences([7]), shifted(sentences([19], seed=3))
    changed = tgt.clone()
    changed[0, 11:] = (changed[0, 11:] + 1 - EOS) % (23 - EOS) + EOS
    before, after = model(src, tgt), model(src, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11] - after[:, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
def test_transformer_output_does_not_depend_on_padding_or_other_sentences(positions):
    model = build(config(positions=positions))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([13, 3, 7], seed=3))
    together = model(src, tgt)
    for row, (src_length, tgt_length) in enumerate([(5, 13), (17, 3), (11, 7)]):
        alone = model(src[row : row + 1, :src_length], tgt[row : row + 1, :tgt_length])
        torch.testing.assert_close(together[row, :tgt_length], alone[0], atol=1e-5, rtol=1e-5)


# --- positions, each tested by its definition


def offsets(length: int) -> Tensor:
    """Return the position of key j minus that of query i: [queries, keys]."""
    return torch.arange(length) - torch.arange(length)[:, None]


def attention_logits(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """Return the argument of softmax by the formulas: [batch, heads, queries, keys]."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(attention.d_k)
    if attention.positions == "alibi":
        return logits + alibi_bias(offsets(q.size(2)), attention.num_heads, q.dtype)
    if attention.positions == "relative":
        return logits + relative_bias(q, attention.offset_keys, offsets(q.size(2)))
    return logits


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_attention_is_softmax_of_logits_and_bias_times_values_projected(positions, causal):
    torch.manual_seed(1)
    attention, x = Attention(26, 3, 10, 7, positions), torch.randn(2, 19, 26)
    q, k, v = attention.project_qkv(x)
    logits = attention_logits(attention, q, k)
    if causal:
        logits = logits.masked_fill(offsets(19) > 0, -math.inf)
    heads = logits.softmax(-1) @ v  # [batch, heads, length, d_v]
    expected = torch.cat(heads.unbind(1), dim=-1) @ attention.w_o.weight.T
    torch.testing.assert_close(attention(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_attention_rotary_and_relative_depend_on_offsets_only(positions):
    torch.manual_seed(1)
    attention = Attention(26, 3, 10, 7, positions).double()
    q, k, _ = attention.project_qkv(torch.randn(1, 1, 26, dtype=torch.float64).expand(1, 37, 26))
    logits = attention_logits(attention, q, k)
    for offset in range(-36, 37):
        along = logits.diagonal(offset, dim1=-2, dim2=-1)
        torch.testing.assert_close(
            along, along[..., :1].expand_as(along), atol=1e-12 if positions == "relative" else 1e-5, rtol=0
        )
    first_row = logits[0, 0, 20]
    assert (first_row[20:30] - first_row[20]).abs().max() > 1e-3  # but they do depend on the offset


def test_rotate_keeps_lengths_and_begins_at_any_position():
    x = torch.randn(2, 3, 11, 10)
    turned = rotate(x, *rotary_angles(0, 11, 10, x.device))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotate(x[:, :, 4:], *rotary_angles(4, 7, 10, x.device)), turned[:, :, 4:])


def test_rotate_gives_the_logits_of_the_complex_formula():
    """Re(q conj(k) e^(i (m - n) theta)) summed over pairs (Su et al. 2021, equation 16)."""
    q, k = torch.randn(2, 10, dtype=torch.float64).unbind()
    theta = 10_000 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    m, n = 13, 5
    as_complex = lambda v: torch.complex(v[:5], v[5:])  # noqa: E731
    expected = (as_complex(q) * as_complex(k).conj() * torch.exp(1j * (m - n) * theta)).real.sum()
    place = lambda v, p: rotate(v[None], *rotary_angles(p, 1, 10, v.device))[0]  # noqa: E731
    torch.testing.assert_close(place(q, m) @ place(k, n), expected, atol=1e-5, rtol=1e-5)


def test_alibi_bias_falls_with_distance_by_the_papers_slopes():
    bias = alibi_bias(offsets(5), 8, torch.float32)
    for head, slope in enumerate([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]):  # ALiBi, section 3
        assert bias[head, 4].tolist() == pytest.approx([-4 * slope, -3 * slope, -2 * slope, -slope, 0.0])
        assert bias[head, 0].tolist() == pytest.approx([0.0, -slope, -2 * slope, -3 * slope, -4 * slope])


def test_relative_bias_is_the_query_times_the_offsets_vector():
    torch.manual_seed(1)
    q, offset_keys = torch.randn(1, 3, 41, 10), torch.randn(2 * MAX_RELATIVE_DISTANCE + 1, 10)
    bias = relative_bias(q, offset_keys, offsets(41))
    for i, j in [(0, 0), (3, 9), (40, 2), (7, 30), (25, 9), (9, 25)]:
        clipped = max(-MAX_RELATIVE_DISTANCE, min(MAX_RELATIVE_DISTANCE, j - i))
        expected = q[0, 2, i] @ offset_keys[clipped + MAX_RELATIVE_DISTANCE] / math.sqrt(10)
        assert bias[0, 2, i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_sinusoids_equal_the_formula_written_out():
    table = sinusoids(41, 26)
    for position in (0, 1, 7, 40):
        for i in range(13):
            angle = position / 10_000 ** (2 * i / 26)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def encoder_output(positions: Positions, src: Tensor) -> Tensor:
    return build(config(positions=positions)).encode(src)[0]


def test_encode_without_positions_permutes_with_its_input():
    src, order = sentences([17]), torch.randperm(17, generator=torch.Generator().manual_seed(3))
    straight, permuted = encoder_output("none", src), encoder_output("none", src[:, order])
    torch.testing.assert_close(straight[:, order], permuted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [p for p in POSITIONS if p != "none"])
def test_encode_with_positions_depends_on_the_order(positions):
    src = sentences([17])
    reversed_back = encoder_output(positions, src.flip(1)).flip(1)
    assert (encoder_output(positions, src) - reversed_back).abs().max() > 1e-2 or positions == "alibi"
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    assert (encoder_output(positions, src)[:, order] - encoder_output(positions, src[:, order])).abs().max() > 1e-2


def test_embedding_learned_positions_are_parameters_of_max_length_rows():
    learned, sinusoidal = build(config(positions="learned")), build()
    extra = set(dict(learned.named_parameters())) - set(dict(sinusoidal.named_parameters()))
    assert extra == {"embedding.positions"}
    assert learned.embedding.positions.shape == (41, 26)


@pytest.mark.parametrize("positions", POSITIONS)
def test_transformer_refuses_a_sentence_longer_than_max_length_with_both_numbers(positions):
    model = build(config(positions=positions))
    with pytest.raises(ValueError, match=r"^a sentence has 42 tokens, model.max_length is 41$"):
        model(sentences([42]), torch.full((1, 2), BOS))


# --- dropout (section 5.4)


def test_embedding_drops_elements_in_training_alone():
    embedding, tokens = Embedding(config(dropout=0.5)), torch.randint(4, 23, (7, 41))
    assert (embedding.eval()(tokens) != 0).all()
    assert (embedding.train()(tokens) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_residual_drops_the_sublayers_output_and_not_the_stream():
    residual = Residual(config(dropout=0.5, norm="pre"))
    stream, output = torch.ones(7, 41, 26), torch.full((7, 41, 26), 2.0)
    assert set(residual.eval().post(stream, output).unique().tolist()) == {3.0}
    assert set(residual.train().post(stream, output).unique().tolist()) == {1.0, 5.0}


def test_transformer_drops_at_the_embeddings_and_around_every_sublayer():
    model = build(config(num_layers=1)).train()
    dropping = {name: module for name, module in model.named_modules() if hasattr(module, "dropout")}
    assert len(dropping) == 1 + 2 + 3  # embeddings, 2 sub-layers of the encoder, 3 of the decoder
    src, tgt = sentences([5]), shifted(sentences([7], seed=3))
    for module in dropping.values():
        module.dropout = 0.0
    assert torch.equal(model(src, tgt), model(src, tgt))
    for name, module in dropping.items():
        module.dropout = 0.5
        assert not torch.equal(model(src, tgt), model(src, tgt)), name
        module.dropout = 0.0
