"""Label-smoothed cross-entropy (section 5.4), fused with the pre-softmax projection, in chunks of tokens.

The matrix of logits [tokens, vocab] is by far the largest of a small model's step. Here it never exists: a chunk
is made, used for the loss and for its gradient, and dropped. The chunks share one buffer, and the product itself adds
up the gradient of the weights. docs/performance.md has a step's peak memory and that of implementations with the
whole matrix.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import PAD
from model.cpu.matmul import ROW_MULTIPLE, accumulate_tn, alloc_accumulator, alloc_scratch, matmul_nt, pad_rows

CHUNK_LOGITS, CHUNK_LOGITS_GPU = 1 << 22, 1 << 26
"""Logits in memory at once, rounded up to ROW_MULTIPLE rows: 16 MB in single precision (for each thread that trains),
near a CPU's cache; 256 MB on a GPU, where every chunk costs the launch of its operators."""


def label_smoothed_loss(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The sum over the target tokens (PAD left out) of the cross-entropy, in nats, between softmax(x weight^T)
    and (1 - smoothing) on the target + smoothing / vocab on every token, the target among them.

    x: [..., d_model], the decoder's output; weight: [vocab, d_model]; target: [...]. Equal to torch's
    cross_entropy(logits, target, ignore_index=PAD, label_smoothing=smoothing, reduction="sum"). Sums are taken in
    single precision at least.
    """
    x, target = x.flatten(0, -2), target.flatten()  # [tokens, d_model], [tokens]
    real = (target != PAD).nonzero()[:, 0]  # step 1: drop padding
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _ProjectionLoss.apply(x[real], weight, target[real], smoothing, needs_grad)


class _ProjectionLoss(torch.autograd.Function):
    """With logits z = x W^T, a vocabulary of V and smoothing e: loss = logsumexp(z) - (1 - e) z_target - e / V sum(z)
    and d loss / d z = softmax(z) - (1 - e) [target] - e / V. In steps:

    1. Drop padding (above).
    2. Choose the rows of a chunk.
    3. Of each chunk: logits, exp(logits - largest), sums of rows, loss but for its uniform part.
    4. Of each chunk: gradients of the softmax part by two products, of exp with W and x, divided by the sums of rows.
       The softmax itself is never made.
    5. At the end, once: the target's part of the gradients, a row of W or x each; the uniform part of loss and
       gradients, which needs only sum(W) and sum(x).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, needs_grad: bool
    ) -> Tensor:
        num_tokens, uniform = len(x), smoothing / len(weight)  # uniform: e / V
        x_sum, weight_sum = x.sum(0), weight.sum(0)  # [d_model]
        padded = pad_rows(x)  # [rows, d_model], zeros behind the tokens
        padded_target = F.pad(target, (0, len(padded) - num_tokens))  # [rows]
        chunk = _rows_per_chunk(padded, len(weight))
        scratch = alloc_scratch(padded, chunk, len(weight))  # [chunk, vocab]
        losses, grads_x = [], []
        if needs_grad:  # starts as the uniform part
            grad_weight = alloc_accumulator((-uniform * x_sum).to(weight.dtype).expand_as(weight))  # [vocab, d_model]
        for x_chunk, target_chunk in zip(padded.split(chunk), padded_target.split(chunk), strict=True):
            loss, exp, exp_sum = _chunk_loss(matmul_nt(x_chunk, weight, scratch), target_chunk, smoothing)
            losses.append(loss)  # [chunk, 1]
            if needs_grad:
                exp = exp.to(x.dtype)  # [chunk, vocab]
                grads_x.append((matmul_nt(exp, weight.T) / exp_sum).to(x.dtype))  # [chunk, d_model]
                accumulate_tn(grad_weight, exp, (x_chunk / exp_sum).to(x.dtype))  # padding is zeros in x_chunk
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
    """Rows of x [rows, d_model] whose logits are in memory at once: step 2. All chunks have as many, but the last."""
    most = CHUNK_LOGITS if x.device.type == "cpu" else CHUNK_LOGITS_GPU
    num_chunks = max(1, -(-len(x) * vocab // most))
    return max(1, -(-len(x) // (num_chunks * ROW_MULTIPLE))) * ROW_MULTIPLE


def _chunk_loss(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Step 3: the loss of each row but for its uniform part [chunk, 1], exp(logits - largest) in place of `logits`
    [chunk, vocab], and its sums of rows [chunk, 1]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_target = logits.gather(1, target[:, None])  # [chunk, 1]
    largest = logits.amax(1, keepdim=True)  # [chunk, 1]
    exp = logits.sub_(largest).exp_()
    exp_sum = exp.sum(1, keepdim=True)  # [chunk, 1]
    return largest + exp_sum.log() - (1 - smoothing) * at_target, exp, exp_sum
