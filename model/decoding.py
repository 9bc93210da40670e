"""Beam search (section 6.1) over any model that implements `Decoder`. A beam of 1 is greedy search."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import BOS, EOS, PAD

HYPOTHESES_PER_CHUNK, HYPOTHESES_PER_CHUNK_GPU = 128, 4096
"""Hypotheses whose logits are computed at once: few on a CPU, to stay in its cache; many on a GPU, to launch fewer
kernels."""
BLOCK = 64
"""Tokens in a block of the vocabulary. Blocks with a low maximum are skipped, which is faster than one topk over all
tokens (docs/log.md)."""


class Decoder(Protocol):
    """The state of a model that decodes a batch of sentences. kv_cache.BeamKVCache is the Transformer's.

    A row is a live hypothesis, whose earlier tokens the decoder keeps. All sentences have the same number of rows;
    the rows of a sentence are next to each other.
    """

    def step(self, tokens: Tensor) -> Tensor:
        """Feed each row its next token: [rows] -> the decoder's output [rows, any], the input of `logits`.

        The first call has one row per sentence and feeds BOS.
        """

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next token for some rows of `step`'s output: [some rows, any] -> [some rows, vocab]."""

    def reorder(self, rows: Tensor) -> None:
        """New row i continues old row `rows[i]` (an index over all rows, of the same sentence).

        The number of rows per sentence may change.
        """

    def select_sentences(self, sentences: Tensor) -> None:
        """Keep only these sentences (indices into the present batch) with their rows, in this order."""


@dataclass(frozen=True)
class Hypothesis:
    """One output. Hypotheses are ranked by `score`, which is log_prob / length_penalty."""

    tokens: list[int]  # without BOS and EOS
    log_prob: float  # sum over the tokens in nats, EOS included if finished
    score: float
    finished: bool  # with EOS; False: cut off at the maximum length


def length_penalty(length: Tensor | int, alpha: float) -> Tensor:
    """lp(Y) = ((5 + |Y|) / 6)^alpha (Wu et al. 2016, equation 14); |Y| counts EOS."""
    return ((5 + torch.as_tensor(length)) / 6) ** alpha


@torch.inference_mode()
def beam_search(
    decoder: Decoder, max_lengths: Tensor, *, beam: int, alpha: float, num_best: int | None = None
) -> list[list[Hypothesis]]:
    """Find the best finished hypotheses of every sentence, `num_best` (default: `beam`) of them, best first.

    `max_lengths` [sentences] is the maximum length of each output, without EOS; `alpha` is that of `length_penalty`.

    Each step considers the 2 * beam most probable continuations of a sentence. Those that end in EOS are finished;
    the best `beam` of the others live on. So a finished hypothesis takes no place in the beam. A beam of 1 considers
    one continuation, which is greedy search for any alpha. PAD and BOS are never chosen. If no hypothesis of a
    sentence has finished, the result consists of the hypotheses that reached the maximum length, ranked by log_prob.

    A sentence leaves the batch as soon as its result is settled. The log_prob of a live hypothesis can only fall, so
    its final score cannot exceed log_prob / lp(max_length + 1), and leaving early never changes a result. With a
    smaller `num_best`, sentences leave earlier.

    Ties: of finished hypotheses with equal scores, the one found first comes first. Between equal continuations
    torch.topk decides, for each sentence on its own, so the rest of the batch has no influence.

    Raises ValueError if beam or num_best is below 1, if alpha or a maximum length is below 0, or if the
    logits contain NaN or +inf.
    """
    num_best = beam if num_best is None else num_best
    for name, value, least in (("beam", beam, 1), ("num_best", num_best, 1), ("alpha", alpha, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if len(max_lengths) and int(max_lengths.min()) < 0:
        raise ValueError(f"max_lengths must be >= 0, got {int(max_lengths.min())}")
    results: list[list[Hypothesis]] = [[] for _ in max_lengths]
    if not results:
        return results
    num_sentences = len(results)
    sentences = torch.arange(num_sentences, device=max_lengths.device)  # indices into the first batch
    considered = 1 if beam == 1 else 2 * beam

    tokens = max_lengths.new_empty(num_sentences, 1, 0)  # of live hypotheses: [sentences, live, length]
    log_prob = torch.zeros(num_sentences, 1, device=max_lengths.device)  # [sentences, live]
    done_tokens = max_lengths.new_empty(num_sentences, num_best, 0)  # of finished hypotheses, with EOS and PAD
    done_log_prob = torch.full((num_sentences, num_best), -torch.inf, device=max_lengths.device)
    done_score = done_log_prob  # -inf: no hypothesis
    last = max_lengths.new_full((num_sentences,), BOS)

    for length in range(int(max_lengths.max()) + 1):  # of the live hypotheses
        # Add a token to the live hypotheses: new_log_prob, parent and token are [sentences, considered].
        num_sentences, num_live = log_prob.shape
        new_log_prob, parent, token = _continue(decoder, decoder.step(last), log_prob, considered)
        new_tokens = torch.cat((_pick(tokens, parent), token[:, :, None]), 2)

        # Put those that end among the finished ones. The stable sort keeps the first found of equal scores.
        ends = token == EOS
        score = (new_log_prob / length_penalty(length + 1, alpha)).masked_fill(~ends, -torch.inf)
        scores, order = torch.cat([done_score, score], 1).sort(dim=1, descending=True, stable=True)
        done_score, order = scores[:, :num_best], order[:, :num_best]
        done_log_prob = _pick(torch.cat([done_log_prob, new_log_prob], 1), order)
        done_tokens = _pick(torch.cat([F.pad(done_tokens, (0, 1), value=PAD), new_tokens], 1), order)

        # Sort the others by log_prob. A sentence is settled if none can beat the worst of its `num_best` finished
        # hypotheses.
        over = ends | (max_lengths[sentences] == length)[:, None]
        new_log_prob, order = new_log_prob.masked_fill(over, -torch.inf).sort(dim=1, descending=True, stable=True)
        bound = new_log_prob[:, 0] / length_penalty(max_lengths[sentences] + 1, alpha)
        settled = done_score[:, -1] >= bound  # -inf >= -inf when nothing is alive
        for i in settled.nonzero().flatten().tolist():
            finished = _finished(done_tokens[i], done_log_prob[i], done_score[i])
            unfinished = _unfinished(tokens[i], log_prob[i], alpha)
            results[int(sentences[i])] = finished or unfinished[:num_best]

        # Keep the sentences that are not settled, and the best `beam` live hypotheses of each.
        stay = (~settled).nonzero().flatten()
        if len(stay) == 0:
            break
        if len(stay) < num_sentences:  # the last fill the gaps, so that few move
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
    """The top `most` continuations of each sentence, best first: their log_prob, the live hypothesis that
    each continues, and the token that it adds, all [sentences, most].

    `x` is the output of decoder.step, `log_prob` [sentences, live] that of the live hypotheses.
    """
    num_live = log_prob.shape[1]
    size = max(1, (HYPOTHESES_PER_CHUNK if x.device.type == "cpu" else HYPOTHESES_PER_CHUNK_GPU) // num_live)
    # A part is the rows of `size` sentences.
    parts = zip(x.split(size * num_live), log_prob.split(size), strict=True)
    found = [_most_probable(decoder.logits(rows), part, most) for rows, part in parts]
    new_log_prob, parent, token = (torch.cat(values) for values in zip(*found, strict=True))
    if new_log_prob.isnan().any():
        raise ValueError("the decoder's logits contain NaN or +inf")
    return new_log_prob, parent, token


def _most_probable(logits: Tensor, log_prob: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_continue` for one chunk of logits [sentences * live, vocab].

    The top `most` tokens of a sentence are all in the `most` blocks with the highest maxima, or in the rest of the
    vocabulary, which is shorter than a block. The second topk sees only those.
    """
    steps = logits.float().log_softmax(1)
    steps[:, PAD] = steps[:, BOS] = -torch.inf
    num_live, vocab = log_prob.shape[1], steps.shape[1]
    steps = steps.unflatten(0, log_prob.shape)  # [sentences, live, vocab]
    whole = vocab - vocab % BLOCK
    maxima = steps[:, :, :whole].unflatten(2, (whole // BLOCK, BLOCK)).amax(3) + log_prob[:, :, None]
    block = maxima.flatten(1).topk(min(most, num_live * whole // BLOCK), sorted=False).indices

    row = vocab * torch.arange(num_live, device=logits.device)[:, None]  # index of its first token
    first = (row + torch.arange(0, whole, BLOCK, device=logits.device)).flatten()[block]  # [sentences, blocks]
    inside = (first[:, :, None] + torch.arange(BLOCK, device=logits.device)).flatten(1)
    behind = (row + torch.arange(whole, vocab, device=logits.device)).flatten().expand(len(steps), -1)
    index = torch.cat((inside, behind), 1)
    continued = steps.flatten(1).gather(1, index) + log_prob.gather(1, index // vocab)
    new_log_prob, order = continued.topk(min(most, continued.shape[1]))
    index = index.gather(1, order)
    return new_log_prob, index // vocab, index % vocab


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Gather along dimension 1: values [sentences, n] or [sentences, n, length] at index [sentences, m]."""
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
