"""Label-smoothed cross-entropy (section 5.4), fused with the pre-softmax projection (section 3.4).

The logits [tokens, vocab] would be by far the largest tensor in a small model's step. Here they never exist as a
whole: they are computed in chunks of tokens, and each chunk is used for the loss and for its gradients before the
next one replaces it. docs/performance.md compares the peak memory of a step with that of implementations that keep
the whole matrix.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import PAD
from model.cpu.matmul import ROW_MULTIPLE, accumulate_tn, alloc_accumulator, alloc_scratch, matmul_nt, pad_rows

CHUNK_LOGITS, CHUNK_LOGITS_GPU = 1 << 22, 1 << 26
"""Logits in a chunk, before its rows are rounded up to a multiple of ROW_MULTIPLE. On a CPU they are 16 MB in single
precision for each thread that trains, about the size of the CPU's cache. On a GPU they are 256 MB, because each chunk
adds kernel launches."""


def label_smoothed_loss(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy between softmax(x weight^T) and the smoothed targets, in nats, summed over the target tokens.

    x: the decoder's output [..., d_model]; weight: the embedding matrix [vocab, d_model]; target: tokens [...]. A
    smoothed target is (1 - smoothing) on the target token, plus smoothing / vocab on every token of the vocabulary,
    the target token included. PAD targets are left out.

    Returns a scalar, equal to torch's cross_entropy(logits, target, ignore_index=PAD, label_smoothing=smoothing,
    reduction="sum"). Sums are accumulated in at least single precision.
    """
    x, target = x.flatten(0, -2), target.flatten()  # [tokens, d_model], [tokens]
    real = (target != PAD).nonzero()[:, 0]  # step 1: drop padding
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _ProjectionLoss.apply(x[real], weight, target[real], smoothing, needs_grad)


class _ProjectionLoss(torch.autograd.Function):
    """The projection and the loss as one operation, whose forward pass also computes the gradients.

    With logits z = x W^T, vocabulary size V, smoothing e and 1_target, the one-hot vector of the target:

        loss        = logsumexp(z) - (1 - e) z_target - e / V sum(z)
        d loss / dz = softmax(z)   - (1 - e) 1_target - e / V

    In each line the first term is the softmax part, the second the target's part and the third the uniform part.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, needs_grad: bool
    ) -> Tensor:
        """Return the loss; save grad x and grad W for `backward`, if they are needed.

        1. Drop padding. The caller has done this: x [tokens, d_model], target [tokens].
        2. Choose the number of rows in a chunk, for about CHUNK_LOGITS logits (`_rows_per_chunk`). Allocate what
           all chunks share: the buffer for logits [chunk, vocab], and grad W [vocab, d_model], which starts as its
           uniform part, -e / V sum(x) in every row.
        3. For each chunk, compute the loss without its uniform part (`_chunk_loss`):

               logits   = x W^T                                     [chunk, vocab]
               exp      = exp(logits - max), in place of the logits [chunk, vocab]
               row sums = sum(exp)                                  [chunk, 1]
               loss     = max + log(row sums) - (1 - e) z_target    [chunk, 1]

        4. For each chunk, compute the softmax part of the gradients. softmax(z) = exp / row sums is not computed: exp
           is the largest tensor, so x (for grad W) and the product with W (for grad x) are divided instead. The
           second product accumulates directly into grad W.

               grad x  = (exp W) / row sums                         [chunk, d_model]
               grad W += exp^T (x / row sums)                       [vocab, d_model]

        5. Once, after the last chunk, subtract what needs no logits. Since sum(z) = x . sum(W), the uniform part
           needs only sum(x) and sum(W) [d_model]. The target's part is one row of W or x for each token.

               loss           -= e / V sum(x) . sum(W)
               grad x         -= (1 - e) W[target] + e / V sum(W)
               grad W[target] -= (1 - e) x

        `backward` multiplies both gradients by the gradient of the loss, a scalar.
        """
        num_tokens, uniform = len(x), smoothing / len(weight)  # e / V
        x_sum, weight_sum = x.sum(0), weight.sum(0)  # [d_model]
        padded = pad_rows(x)  # [rows, d_model]: the tokens, then zeros
        padded_target = F.pad(target, (0, len(padded) - num_tokens))  # [rows]
        chunk = _rows_per_chunk(padded, len(weight))
        scratch = alloc_scratch(padded, chunk, len(weight))  # [chunk, vocab]
        losses, grads_x = [], []
        if needs_grad:
            grad_weight = alloc_accumulator((-uniform * x_sum).to(weight.dtype).expand_as(weight))  # [vocab, d_model]
        for x_chunk, target_chunk in zip(padded.split(chunk), padded_target.split(chunk), strict=True):
            loss, exp, exp_sum = _chunk_loss(matmul_nt(x_chunk, weight, scratch), target_chunk, smoothing)
            losses.append(loss)  # [chunk, 1]
            if needs_grad:
                exp = exp.to(x.dtype)  # [chunk, vocab]
                grads_x.append((matmul_nt(exp, weight.T) / exp_sum).to(x.dtype))  # [chunk, d_model]
                accumulate_tn(grad_weight, exp, (x_chunk / exp_sum).to(x.dtype))  # rows of padding add 0
        loss = torch.cat(losses)[:num_tokens].sum()
        loss -= uniform * (x_sum.to(loss.dtype) * weight_sum.to(loss.dtype)).sum()
        if needs_grad:
            grad_x = torch.cat(grads_x)[:num_tokens]  # [tokens, d_model]
            grad_x -= (1 - smoothing) * weight[target] + uniform * weight_sum
            grad_weight = grad_weight.contiguous().index_add_(0, target, x.to(weight.dtype), alpha=smoothing - 1)
            ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None, None


def _rows_per_chunk(x: Tensor, vocab: int) -> int:
    """Step 2: the number of rows in every chunk but the last, which may have fewer; x is [rows, d_model]."""
    most = CHUNK_LOGITS if x.device.type == "cpu" else CHUNK_LOGITS_GPU
    num_chunks = max(1, -(-len(x) * vocab // most))
    return max(1, -(-len(x) // (num_chunks * ROW_MULTIPLE))) * ROW_MULTIPLE


def _chunk_loss(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Step 3: logits [chunk, vocab], target [chunk] -> the loss without its uniform part [chunk, 1],
    exp(logits - max) [chunk, vocab] and its row sums [chunk, 1]. exp overwrites `logits`, unless they are in half
    precision."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_target = logits.gather(1, target[:, None])  # [chunk, 1]
    largest = logits.amax(1, keepdim=True)  # [chunk, 1]
    exp = logits.sub_(largest).exp_()
    exp_sum = exp.sum(1, keepdim=True)  # [chunk, 1]
    return largest + exp_sum.log() - (1 - smoothing) * at_target, exp, exp_sum
