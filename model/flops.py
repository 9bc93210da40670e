"""Floating-point operations of the Transformer, from its sizes alone."""

from model.config import MAX_RELATIVE_DISTANCE, TransformerConfig


def training_flops(config: TransformerConfig, batch: int, src: int, tgt: int) -> int:
    """FLOPs of the forward and backward pass of model and loss: three times `forward_flops`.

    The backward pass has two matrix products for each of the forward pass: one for the gradient of each factor. What
    a fused kernel recomputes in its backward pass is not counted. The loss drops padding, so a micro-batch really
    takes 6 d_model vocab_size FLOPs less for each padded target position.
    """
    return 3 * forward_flops(config, batch, src, tgt)


def forward_flops(config: TransformerConfig, batch: int, src: int, tgt: int) -> int:
    """FLOPs of the forward pass on `batch` sentence pairs, padded to `src` and `tgt` positions.

    Counts the matrix products in the paper's formulas and nothing else, with 2 FLOPs for a multiply-add. The
    decoder's self-attention counts in full, although the causal mask hides half of it. The pre-softmax projection
    counts at every target position.
    """
    batch, src, tgt = int(batch), int(src), int(tgt)  # numpy's int32 would overflow
    c = config
    heads_width = c.num_heads * (c.d_k + c.d_v)
    offsets = 2 * MAX_RELATIVE_DISTANCE + 1 if c.positions == "relative" else 0

    # Each function returns the multiply-adds for one sentence pair.
    def attention(queries: int, keys: int) -> int:
        projections = (queries + keys) * c.d_model * heads_width  # W^Q and W^O, W^K and W^V
        return projections + queries * keys * heads_width  # Q K^T, and its softmax times V

    def self_attention(length: int) -> int:
        return attention(length, length) + length * offsets * c.num_heads * c.d_k

    def feed_forward(length: int) -> int:
        return length * 2 * c.d_model * c.d_ff

    encoder_layer = self_attention(src) + feed_forward(src)
    decoder_layer = self_attention(tgt) + attention(tgt, src) + feed_forward(tgt)
    projection = tgt * c.d_model * c.vocab_size
    return 2 * batch * (c.num_layers * (encoder_layer + decoder_layer) + projection)
