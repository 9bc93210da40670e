"""The model against torch's own modules, the paper's numbers, and the properties that define its parts."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import transformer as module
from model.config import BOS, EOS, PAD, Positions, TransformerConfig
from model.transformer import (
    MAX_RELATIVE_DISTANCE,
    POOL_STEPS,
    Attention,
    Transformer,
    rotary_angles,
    rotate,
    sinusoids,
)

POSITIONS = get_args(Positions)
SMALL = TransformerConfig(
    vocab_size=23, num_layers=2, d_model=26, d_ff=17, num_heads=3, d_k=10, d_v=7,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=41,
)  # fmt: skip
BASE = TransformerConfig(
    vocab_size=37_000, num_layers=6, d_model=512, d_ff=2048, num_heads=8, d_k=64, d_v=64,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=1024,
)  # fmt: skip


def build(config: TransformerConfig, seed: int = 1) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).eval()


def sentences(lengths: list[int], vocab_size: int = 23, seed: int = 2) -> Tensor:
    """Random pieces, EOS at each end, PAD behind."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS + 1, vocab_size, (length - 1,), generator=generator) for length in lengths]
    rows = [torch.cat((row, torch.tensor([EOS]))) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def shifted(tgt: Tensor) -> Tensor:
    return torch.cat((torch.full((len(tgt), 1), BOS), tgt[:, :-1].masked_fill(tgt[:, :-1] == EOS, PAD)), dim=1)


# --- against torch.nn.Transformer


def torch_twin(model: Transformer) -> nn.Transformer:
    """torch's own Transformer with the weights of ours; the biases of its attention, which the paper lacks, are 0."""
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
def test_logits_equal_those_of_torchs_transformer_with_the_same_weights(norm):
    model = build(replace(SMALL, d_model=30, d_k=10, d_v=10, norm=norm))
    with torch.no_grad():  # the initial 1 and 0 would hide a norm in the wrong place
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
    ("changes", "published"),  # millions, against base's 65
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
def test_differences_between_parameter_counts_are_those_of_table_3(changes, published):
    difference = (num_parameters(replace(BASE, **changes)) - num_parameters(BASE)) / 1e6
    assert difference == pytest.approx(published - 65, abs=1)  # both printed numbers are rounded


@pytest.mark.parametrize("changes", [{"num_heads": h, "d_k": 512 // h, "d_v": 512 // h} for h in (1, 4, 16, 32)])
def test_rows_a_have_the_parameters_of_base(changes):
    assert num_parameters(replace(BASE, **changes)) == num_parameters(BASE)


def test_d_model_and_big_have_the_parameters_of_the_formulas():
    """Written out from section 3: V d + N (4 h d_k d ...) with a vocabulary that gives the paper's 28, 65 and 168."""

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


def test_one_matrix_serves_both_embeddings_and_the_projection():
    model = build(SMALL)
    assert [name for name, p in model.named_parameters() if 23 in p.shape] == ["embedding.weight"]


# --- what may not influence what


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_later_target_token_changes_an_earlier_logit(positions, norm):
    model = build(replace(SMALL, positions=positions, norm=norm))
    src, tgt = sentences([7]), shifted(sentences([19], seed=3))
    changed = tgt.clone()
    changed[0, 11:] = (changed[0, 11:] + 1 - EOS) % (23 - EOS) + EOS
    before, after = model(src, tgt), model(src, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11] - after[:, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_and_company_in_a_batch_change_nothing(positions):
    model = build(replace(SMALL, positions=positions))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([13, 3, 7], seed=3))
    together = model(src, tgt)
    for row, (src_length, tgt_length) in enumerate([(5, 13), (17, 3), (11, 7)]):
        alone = model(src[row : row + 1, :src_length], tgt[row : row + 1, :tgt_length])
        torch.testing.assert_close(together[row, :tgt_length], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_decoding_step_by_step_gives_the_logits_of_the_whole(positions, norm):
    model = build(replace(SMALL, positions=positions, norm=norm))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([19, 19, 19], seed=3))
    whole = model.logits(model(src, tgt))
    state = model.start(src)
    steps = torch.stack([state.logits(state.step(tgt[:, t])) for t in range(tgt.size(1))], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_of_a_search_go_on_from_what_they_are_told(positions):
    model = build(replace(SMALL, positions=positions))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([7, 7, 7], seed=3))
    state = model.start(src)
    for t in range(3):
        state.step(tgt[:, t])
    state.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # a beam of two
    next_tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    state.step(next_tokens)
    state.reorder(torch.tensor([1, 0, 2, 2, 5, 4]))
    state.keep(torch.tensor([2, 0]))
    logits = state.logits(state.step(torch.tensor([11, 12, 13, 14])))
    sentence, second = torch.tensor([2, 2, 0, 0]), torch.tensor([10, 9, 6, 5])
    whole = torch.cat((tgt[sentence, :3], second[:, None], torch.tensor([[11], [12], [13], [14]])), dim=1)
    torch.testing.assert_close(logits, model.logits(model(src[sentence], whole))[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("seed", range(3))
def test_rows_go_on_from_what_they_are_told_however_long_the_search(positions, seed):
    """Rows die out, sentences leave, and the pool is cleared many times."""
    model, random = build(replace(SMALL, positions=positions)), np.random.default_rng(seed)
    src, beam = sentences([5, 17, 11, 9]), 3
    state, left = model.start(src), [0, 1, 2, 3]
    outputs = [[[BOS]] for _ in left]  # of the sentences left, by row
    for t in range(4 * POOL_STEPS):
        last = torch.tensor([row[-1] for rows in outputs for row in rows])
        logits = state.logits(state.step(last))
        rows = torch.tensor([row for rows in outputs for row in rows])
        whole = model.logits(model(src[left].repeat_interleave(len(outputs[0]), 0), rows))[:, -1]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
        if t % 7 == 6 and len(left) > 1:
            stay = random.permutation(len(left))[:-1].tolist()
            state.keep(torch.tensor(stay))
            left, outputs = [left[i] for i in stay], [outputs[i] for i in stay]
        parents = random.integers(len(outputs[0]), size=(len(left), beam))
        first_row = len(outputs[0]) * np.arange(len(left))
        state.reorder(torch.from_numpy((first_row[:, None] + parents).ravel()))
        new = random.integers(EOS + 1, 23, size=parents.shape).tolist()
        outputs = [
            [[*rows[parent], piece] for parent, piece in zip(*chosen, strict=True)]
            for rows, *chosen in zip(outputs, parents, new, strict=True)
        ]


def test_reordering_rows_copies_no_keys_but_when_the_pool_is_full():
    state = build(SMALL).start(sentences([5, 17, 11]))
    state.step(torch.tensor([1, 1, 1]))
    state.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    places = []
    for _ in range(4 * POOL_STEPS):
        state.step(torch.arange(5, 11))
        state.reorder(torch.tensor([1, 0, 3, 3, 5, 4]))
        places.append([x.data_ptr() for keys_values in state.pool for x in keys_values])
    assert sum(before != after for before, after in pairwise(places)) <= 4


def test_the_pool_keeps_only_what_rows_go_on_from():
    state = build(SMALL).start(sentences([5, 17, 11]))
    state.step(torch.tensor([1, 1, 1]))
    state.reorder(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    for length in range(2, 6 * POOL_STEPS):
        state.step(torch.arange(5, 14))
        state.reorder(torch.tensor([1, 1, 1, 3, 3, 3, 8, 8, 8]))  # all from one
        size = state.pool[0][0].size(2)
        assert size <= length + max(3 * POOL_STEPS, length // 2), length


# --- positions, each by what defines it


def attention_logits(attention: Attention, x: Tensor, first: int = 0) -> Tensor:
    """softmax's argument, by Attention's own parts: [batch, heads, queries, keys]."""
    q, k, _ = attention.queries_keys_values(x, first)
    bias = attention._position_bias(q, k)
    logits = q @ k.transpose(-1, -2) / math.sqrt(attention.d_k)
    return logits if bias is None else logits + bias


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_logits_of_rotary_and_relative_attention_depend_on_offsets_only(positions):
    torch.manual_seed(1)
    attention = Attention(26, 3, 10, 7, positions).double()
    logits = attention_logits(attention, torch.randn(1, 1, 26, dtype=torch.float64).expand(1, 37, 26))
    for offset in range(-36, 37):
        along = logits.diagonal(offset, dim1=-2, dim2=-1)
        torch.testing.assert_close(
            along, along[..., :1].expand_as(along), atol=1e-12 if positions == "relative" else 1e-5, rtol=0
        )
    first_row = logits[0, 0, 20]
    assert (first_row[20:30] - first_row[20]).abs().max() > 1e-3  # and they do depend on them


def test_rotary_turns_keep_lengths_and_begin_at_any_position():
    x = torch.randn(2, 3, 11, 10)
    turned = rotate(x, *rotary_angles(0, 11, 10, x.device))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotate(x[:, :, 4:], *rotary_angles(4, 7, 10, x.device)), turned[:, :, 4:])


def test_rotary_logits_equal_the_complex_formula():
    """Re(q conj(k) e^(i (m - n) theta)) summed over pairs (Su et al. 2021, equation 16)."""
    q, k = torch.randn(2, 10, dtype=torch.float64).unbind()
    theta = 10_000 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    m, n = 13, 5
    as_complex = lambda v: torch.complex(v[:5], v[5:])  # noqa: E731
    expected = (as_complex(q) * as_complex(k).conj() * torch.exp(1j * (m - n) * theta)).real.sum()
    place = lambda v, p: rotate(v[None], *rotary_angles(p, 1, 10, v.device))[0]  # noqa: E731
    torch.testing.assert_close(place(q, m) @ place(k, n), expected, atol=1e-5, rtol=1e-5)


def test_alibi_lowers_logits_in_proportion_to_distance_with_the_papers_slopes():
    attention = Attention(26, 8, 3, 7, "alibi")
    q = torch.zeros(1, 8, 5, 3)
    bias = attention._position_bias(q, q)
    for head, slope in enumerate([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]):  # their section 3
        assert bias[head, 4].tolist() == pytest.approx([-4 * slope, -3 * slope, -2 * slope, -slope, 0.0])
        assert bias[head, 0].tolist() == pytest.approx([0.0, -slope, -2 * slope, -3 * slope, -4 * slope])


def test_relative_attention_adds_the_query_times_the_offsets_vector():
    torch.manual_seed(1)
    attention = Attention(26, 3, 10, 7, "relative")
    q = torch.randn(1, 3, 41, 10)
    bias = attention._position_bias(q, q)
    for i, j in [(0, 0), (3, 9), (40, 2), (7, 30), (25, 9), (9, 25)]:
        clipped = max(-MAX_RELATIVE_DISTANCE, min(MAX_RELATIVE_DISTANCE, j - i))
        expected = q[0, 2, i] @ attention.offset_keys[clipped + MAX_RELATIVE_DISTANCE] / math.sqrt(10)
        assert bias[0, 2, i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_sinusoids_equal_the_formula_written_out():
    table = sinusoids(41, 26)
    for position in (0, 1, 7, 40):
        for i in range(13):
            angle = position / 10_000 ** (2 * i / 26)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def encoder_output(positions: Positions, src: Tensor) -> Tensor:
    return build(replace(SMALL, positions=positions)).encode(src)[0]


def test_without_positions_the_encoder_only_permutes_when_its_input_is_permuted():
    src, order = sentences([17]), torch.randperm(17, generator=torch.Generator().manual_seed(3))
    straight, permuted = encoder_output("none", src), encoder_output("none", src[:, order])
    torch.testing.assert_close(straight[:, order], permuted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [p for p in POSITIONS if p != "none"])
def test_with_positions_the_encoder_sees_the_order(positions):
    src = sentences([17])
    reversed_back = encoder_output(positions, src.flip(1)).flip(1)
    assert (encoder_output(positions, src) - reversed_back).abs().max() > 1e-2 or positions == "alibi"
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    assert (encoder_output(positions, src)[:, order] - encoder_output(positions, src[:, order])).abs().max() > 1e-2


def test_learned_positions_are_parameters_of_max_length_rows():
    learned, sinusoidal = build(replace(SMALL, positions="learned")), build(SMALL)
    extra = set(dict(learned.named_parameters())) - set(dict(sinusoidal.named_parameters()))
    assert extra == {"embedding.positions"}
    assert learned.embedding.positions.shape == (41, 26)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_sentence_longer_than_max_length_is_refused_with_both_numbers(positions):
    model = build(replace(SMALL, positions=positions))
    with pytest.raises(ValueError, match=r"42 pieces: model.max_length is 41"):
        model(sentences([42]), torch.full((1, 2), BOS))


# --- dropout


def test_dropout_acts_in_training_alone_and_on_embeddings_and_sublayers():
    model = build(replace(SMALL, dropout=0.5, num_layers=1))
    src, tgt = sentences([5]), shifted(sentences([7], seed=3))
    assert torch.equal(model(src, tgt), model(src, tgt))
    counted = []
    original = module.dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dropout", lambda x, p: counted.append(p) or original(x, p))
        model.train()(src, tgt)
    assert counted == [0.5] * (2 + 2 + 3)  # two embeddings, two and three sub-layers (section 5.4)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest_to_the_same_mean(p):
    torch.manual_seed(3)
    x = torch.ones(400_003, requires_grad=True)  # no multiple of four
    dropped = module.dropout(x, p)
    kept = dropped != 0
    share = 1 - round(p * 2**16) / 2**16
    assert torch.equal(dropped, kept * torch.tensor(1 / share))
    for values in (kept, *(kept[i::4] for i in range(4))):  # four neighbours come from one draw
        deviation = math.sqrt(p * (1 - p) / len(values))
        assert abs(values.float().mean() - (1 - p)) < 5 * deviation + 2**-16
    for distance in (1, 2, 3, 4):  # independent of one another
        both = (kept[:-distance] & kept[distance:]).float().mean()
        assert abs(both - (1 - p) ** 2) < 5 * math.sqrt(0.25 / len(kept)) + 2**-15
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)


def test_dropout_of_nearly_all_is_no_division_by_nothing():
    torch.manual_seed(3)
    assert module.dropout(torch.ones(400_003), 1 - 1e-9).unique().tolist() == [0, 2**16]


def test_dropout_is_another_each_time_and_the_same_from_the_same_seed():
    x = torch.randn(31, 7, dtype=torch.float64)
    torch.manual_seed(11)
    first, second = module.dropout(x, 0.3), module.dropout(x, 0.3)
    torch.manual_seed(11)
    assert torch.equal(module.dropout(x, 0.3), first)
    assert not torch.equal(first, second)
    assert torch.equal(module.dropout(x, 0.0), x)
    assert first.shape == x.shape
    assert first.dtype == x.dtype


# --- the two ways of attention


@pytest.mark.parametrize("d_v", [3, 8])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "queries x keys", "bias of heads", "bias of all"])
def test_the_products_of_a_cpu_give_what_the_fused_kernel_gives(mask, d_v):
    torch.manual_seed(5)
    batch, heads, queries, keys, d_k = 3, 2, 5, 5 if mask == "causal" else 7, 8
    q, k, v = (
        torch.randn(batch, heads, n, d).requires_grad_() for n, d in ((queries, d_k), (keys, d_k), (keys, d_v))
    )
    masks = {
        "padding": torch.arange(keys) < torch.tensor([keys, 1, 4])[:, None, None, None],
        "queries x keys": torch.rand(queries, keys) < 0.5,
        "bias of heads": torch.randn(heads, queries, keys),
        "bias of all": torch.randn(batch, heads, queries, keys),
    }
    masks["queries x keys"][:, 0] = True  # no query without a key
    given, causal = masks.get(mask), mask == "causal"
    ours = module.scaled_dot_product_attention(q, k, v, given, causal)
    fused = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal)
    torch.testing.assert_close(ours, fused)
    up = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), up) for x in (ours, fused)), strict=True):
        torch.testing.assert_close(one, other)


def test_many_queries_go_to_the_fused_kernel(monkeypatch):
    called = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or original(*a, **k))
    for queries, expected in ((module.MAX_UNFUSED_QUERIES, 0), (module.MAX_UNFUSED_QUERIES + 1, 1)):
        q = torch.randn(1, 1, queries, 4)
        k = torch.randn(1, 1, 1000, 4)
        module.scaled_dot_product_attention(q, k, k, None, False)
        assert len(called) == expected
