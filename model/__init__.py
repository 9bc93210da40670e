"""The model of "Attention Is All You Need" (Vaswani et al. 2017), its loss and its search, in plain torch.

In reading order, with the section of the paper:

    config.py         the sizes of a model: the columns of Table 3
    transformer.py    the Transformer (3)
    loss.py           label-smoothed cross-entropy (3.4, 5.4)
    schedule.py       the learning rate (5.3)
    decoding.py       beam search over any decoder (6.1)
    kv_cache.py       the Transformer as such a decoder
    perplexity.py     the score of Table 3 (6.2)
    flops.py          what a step computes
    cpu/              matrix product, attention and dropout that are faster on a CPU
"""
