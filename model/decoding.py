"""Beam search (section 6.1) over anything that turns tokens into logits; greedy search is beam 1."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import BOS, EOS, PAD

HYPOTHESES_PER_CHUNK, HYPOTHESES_PER_CHUNK_GPU = 128, 4096
"""Rows whose logits are in memory at once: on a CPU few enough for its cache; on a GPU each chunk costs launches."""
BLOCK = 64
"""Tokens of a block, most of which are ruled out by their maximum: of a large vocabulary, one topk of all tokens is
slower (docs/log.md)."""


class Decoder(Protocol):
    """A batch of sentences being translated, each with the same number of rows, next to one another.

    A row is a hypothesis that still grows; the decoder keeps the tokens fed to it. See kv_cache.BeamKVCache.
    """

    def step(self, tokens: Tensor) -> Tensor:
        """Feed each row its next token [rows]; return what `logits` needs to know of it [rows, any].

        The first call has one row per sentence, and feeds BOS.
        """

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next token, for some of the rows that `step` returned: [some, any] -> [some, vocab]."""

    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row `rows[i]`; the rows of a sentence stay with it, their number may change."""

    def select_sentences(self, sentences: Tensor) -> None:
        """Continue with these sentences alone (indices into the present batch), in this order."""


@dataclass(frozen=True)
class Hypothesis:
    """One output. `score` is log_prob / length_penalty, by which hypotheses are ranked."""

    tokens: list[int]  # without BOS and EOS
    log_prob: float  # sum over the tokens in nats, EOS included if finished
    score: float
    finished: bool  # False: cut off at its maximum length


def length_penalty(length: Tensor | int, alpha: float) -> Tensor:
    """lp(Y) = ((5 + |Y|) / 6)^alpha (Wu et al. 2016, equation 14); |Y| counts EOS."""
    return ((5 + torch.as_tensor(length)) / 6) ** alpha


@torch.inference_mode()
def beam_search(
    decoder: Decoder, max_lengths: Tensor, *, beam: int, alpha: float, num_best: int | None = None
) -> list[list[Hypothesis]]:
    """The `num_best` (default: `beam`) best finished hypotheses of every sentence, best first.

    `max_lengths` [sentences]: the maximum length of an output, EOS not counted. Each step considers the 2 * beam most
    probable continuations of a sentence: those that end are finished, the best `beam` of the others live on, so an
    ending takes no place in the beam. With beam 1 one continuation is considered, which is greedy search whatever
    alpha. PAD and BOS are never chosen. A sentence without a finished hypothesis returns those that reached its
    maximum length, by log_prob.

    A sentence leaves the batch as soon as its result is settled: a live log_prob can only fall, so no live hypothesis
    can score above log_prob / lp(max_length + 1). This changes no result; a smaller `num_best` only ends earlier. Of
    finished hypotheses with equal scores the first found comes first; of equal continuations torch.topk chooses,
    which sees that sentence alone.

    Raises ValueError for a beam or num_best below 1, an alpha or length below 0, logits that are not finite.
    """
    num_best = beam if num_best is None else num_best
    for name, value, least in (("beam", beam, 1), ("num_best", num_best, 1), ("alpha", alpha, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}: {least} or more is needed")
    if len(max_lengths) and int(max_lengths.min()) < 0:
        raise ValueError(f"max_lengths holds {int(max_lengths.min())}: 0 or more is needed")
    results: list[list[Hypothesis]] = [[] for _ in max_lengths]
    if not results:
        return results
    num_sentences = len(results)
    sentences = torch.arange(num_sentences, device=max_lengths.device)  # those still in the batch
    considered = 1 if beam == 1 else 2 * beam

    tokens = max_lengths.new_empty(num_sentences, 1, 0)
    log_prob = torch.zeros(num_sentences, 1, device=max_lengths.device)
    done_tokens = max_lengths.new_empty(num_sentences, num_best, 0)
    done_log_prob = torch.full((num_sentences, num_best), -torch.inf, device=max_lengths.device)
    done_score = done_log_prob
    last = max_lengths.new_full((num_sentences,), BOS)

    for length in range(int(max_lengths.max()) + 1):  # of the live hypotheses
        num_sentences, num_live = log_prob.shape
        new_log_prob, parent, token = _continue(decoder, decoder.step(last), log_prob, considered)
        new_tokens = torch.cat((_pick(tokens, parent), token[:, :, None]), 2)

        ends = token == EOS
        score = (new_log_prob / length_penalty(length + 1, alpha)).masked_fill(~ends, -torch.inf)
        scores, order = torch.cat([done_score, score], 1).sort(dim=1, descending=True, stable=True)
        done_score, order = scores[:, :num_best], order[:, :num_best]
        done_log_prob = _pick(torch.cat([done_log_prob, new_log_prob], 1), order)
        done_tokens = _pick(torch.cat([F.pad(done_tokens, (0, 1), value=PAD), new_tokens], 1), order)

        over = ends | (max_lengths[sentences] == length)[:, None]
        new_log_prob, order = new_log_prob.masked_fill(over, -torch.inf).sort(dim=1, descending=True, stable=True)
        bound = new_log_prob[:, 0] / length_penalty(max_lengths[sentences] + 1, alpha)
        settled = done_score[:, -1] >= bound  # -inf >= -inf when nothing is alive
        for i in settled.nonzero().flatten().tolist():
            finished = _finished(done_tokens[i], done_log_prob[i], done_score[i])
            unfinished = _unfinished(tokens[i], log_prob[i], alpha)
            results[int(sentences[i])] = finished or unfinished[:num_best]

        # The living: first the sentences that stay, then in each the best `beam` hypotheses.
        stay = (~settled).nonzero().flatten()
        if len(stay) == 0:
            break
        if len(stay) < num_sentences:  # the last take the places of those that leave, and few have to move
            left = settled[: len(stay)]
            stay = torch.arange(len(stay), device=stay.device).masked_scatter(left, stay[stay >= len(stay)])
            decoder.select_sentences(stay)
        sentences = sentences[stay]
        done_tokens, done_log_prob, done_score = done_tokens[stay], done_log_prob[stay], done_score[stay]
        order = order[stay, :beam]
        log_prob = new_log_prob[stay, :beam]
        tokens = _pick(new_tokens[stay], order)
        last = tokens[:, :, -1].flatten()
        first_row = num_live * torch.arange(len(stay), device=max_lengths.device)
        decoder.reorder((first_row[:, None] + _pick(parent[stay], order)).flatten())
    return results


def _continue(decoder: Decoder, x: Tensor, log_prob: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` most probable continuations of each sentence, best first: their log_prob, the hypothesis that each
    continues and the token that it adds [sentences, most]. `x` is from decoder.step, `log_prob` [sentences, live]."""
    num_live = log_prob.shape[1]
    size = max(1, (HYPOTHESES_PER_CHUNK if x.device.type == "cpu" else HYPOTHESES_PER_CHUNK_GPU) // num_live)
    parts = zip(x.split(size * num_live), log_prob.split(size), strict=True)
    found = [_most_probable(decoder.logits(rows), part, most) for rows, part in parts]
    new_log_prob, parent, token = (torch.cat(values) for values in zip(*found, strict=True))
    if new_log_prob.isnan().any():
        raise ValueError("the decoder's logits are not finite numbers")
    return new_log_prob, parent, token


def _most_probable(logits: Tensor, log_prob: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_continue`. A token among the `most` best of a sentence is in one of the `most` blocks with the highest
    maxima, or behind the last whole block: topk sees only those."""
    steps = logits.float().log_softmax(1)
    steps[:, PAD] = steps[:, BOS] = -torch.inf
    num_live, vocab = log_prob.shape[1], steps.shape[1]
    steps = steps.unflatten(0, log_prob.shape)  # [sentences, live, vocab]
    whole = vocab - vocab % BLOCK
    maxima = steps[:, :, :whole].unflatten(2, (whole // BLOCK, BLOCK)).amax(3) + log_prob[:, :, None]
    block = maxima.flatten(1).topk(min(most, num_live * whole // BLOCK), sorted=False).indices

    row = vocab * torch.arange(num_live, device=logits.device)[:, None]  # its first index
    first = (row + torch.arange(0, whole, BLOCK, device=logits.device)).flatten()[block]  # [sentences, blocks]
    inside = (first[:, :, None] + torch.arange(BLOCK, device=logits.device)).flatten(1)
    behind = (row + torch.arange(whole, vocab, device=logits.device)).flatten().expand(len(steps), -1)
    index = torch.cat((inside, behind), 1)
    continued = steps.flatten(1).gather(1, index) + log_prob.gather(1, index // vocab)
    new_log_prob, order = continued.topk(min(most, continued.shape[1]))
    index = index.gather(1, order)
    return new_log_prob, index // vocab, index % vocab


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values [sentences, n] or [sentences, n, length] at index [sentences, m], along the second dimension."""
    if values.dim() == 3:
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
    return values.gather(1, index)


def _finished(tokens: Tensor, log_prob: Tensor, score: Tensor) -> list[Hypothesis]:
    found = zip(tokens.tolist(), log_prob.tolist(), score.tolist(), strict=True)
    return [Hypothesis(t[: t.index(EOS)], p, s, True) for t, p, s in found if s > -torch.inf]


def _unfinished(tokens: Tensor, log_prob: Tensor, alpha: float) -> list[Hypothesis]:
    penalty = float(length_penalty(tokens.shape[1], alpha))
    found = zip(tokens.tolist(), log_prob.tolist(), strict=True)
    return [Hypothesis(t, p, p / penalty, False) for t, p in found if p > -torch.inf]
