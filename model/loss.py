"""Label-smoothed cross-entropy (section 5.4), fused with the pre-softmax projection."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import PAD
from model.cpu.matmul import ROW_MULTIPLE, accumulate_tn, alloc_accumulator, alloc_scratch, matmul_nt, pad_rows

CHUNK_LOGITS, CHUNK_LOGITS_GPU = 1 << 22, 1 << 26
"""Logits in memory at once, to the next ROW_MULTIPLE rows: 16 MB in single precision (for each thread that trains),
near a CPU's cache; 256 MB on a GPU, where every chunk costs the start of its operators."""


def label_smoothed_loss(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The sum over the target tokens (PAD left out) of the cross-entropy, in nats, between softmax(x weight^T)
    and (1 - smoothing) on the target + smoothing / vocab on every piece, the target among them.

    x: [..., d_model], the decoder's output; weight: [vocab, d_model]; target: [...]. Equal to torch's
    cross_entropy(logits, target, ignore_index=PAD, label_smoothing=smoothing, reduction="sum"), but the logits
    are made, used for loss and gradient, and dropped chunk by chunk: the whole [tokens, vocab] matrix, by far
    the largest of a small model's step, never exists. Sums are taken in single precision at least.
    """
    x, target = x.flatten(0, -2), target.flatten()
    real = (target != PAD).nonzero()[:, 0]
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _ProjectionLoss.apply(x[real], weight, target[real], smoothing, needs_grad)


class _ProjectionLoss(torch.autograd.Function):
    """With z = x W^T, V pieces and smoothing e: loss = logsumexp(z) - (1 - e) z_target - e / V sum(z), and
    d loss / d z = softmax(z) - (1 - e) [target] - e / V.

    Only the softmax needs passes over the logits, and its normalisation none: the rows' sums divide x instead.
    The target's part is a row of W or x, and the uniform part needs just sum(W) and sum(x).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, needs_grad: bool
    ) -> Tensor:
        at_least_single = torch.promote_types(x.dtype, torch.float32)
        uniform, weight_sum, x_sum = smoothing / len(weight), weight.sum(0), x.sum(0)
        num_tokens, x_all = len(x), pad_rows(x)
        target_all = F.pad(target, (0, len(x_all) - num_tokens))
        most = CHUNK_LOGITS if x.device.type == "cpu" else CHUNK_LOGITS_GPU
        chunks = max(1, -(-len(x_all) * len(weight) // most))
        rows = max(1, -(-len(x_all) // (chunks * ROW_MULTIPLE))) * ROW_MULTIPLE  # all of a size, but for the last
        losses, grads_x = [], []
        if needs_grad:
            grad_weight = alloc_accumulator((-uniform * x_sum).to(weight.dtype).expand_as(weight))
        scratch = alloc_scratch(x_all, rows, len(weight))
        for x_chunk, target_chunk in zip(x_all.split(rows), target_all.split(rows), strict=True):
            logits = matmul_nt(x_chunk, weight, scratch).to(at_least_single)  # [rows, vocab]
            at_target = logits.gather(1, target_chunk[:, None])
            largest = logits.amax(1, keepdim=True)
            exp = logits.sub_(largest).exp_()
            exp_sum = exp.sum(1, keepdim=True)
            losses.append(largest + exp_sum.log() - (1 - smoothing) * at_target)
            if needs_grad:
                exp = exp.to(x.dtype)
                grads_x.append((matmul_nt(exp, weight.T) / exp_sum).to(x.dtype))
                accumulate_tn(grad_weight, exp, (x_chunk / exp_sum).to(x.dtype))  # rows filled up are zeros in x
        loss = torch.cat(losses)[:num_tokens].sum()
        loss -= uniform * (x_sum.to(loss.dtype) * weight_sum.to(loss.dtype)).sum()
        if needs_grad:
            grad_x = torch.cat(grads_x)[:num_tokens]
            grad_x -= (1 - smoothing) * weight[target] + uniform * weight_sum
            grad_weight = grad_weight.contiguous().index_add_(0, target, x.to(weight.dtype), alpha=smoothing - 1)
            ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None, None
