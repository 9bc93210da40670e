"""Small models of random sizes, whose outputs do end, and a tokenizer for them."""

import io
import random

import sentencepiece
import torch
from torch import nn

from model.config import BOS, EOS, PAD, UNK, Positions, TransformerConfig
from model.transformer import Transformer

VOCAB, MAX_LENGTH = 41, 31


def random_tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ein Mann singt im Haus", "eine Frau liest das Buch", "das Kind malt"]),
        model_writer=model, model_type="bpe", vocab_size=VOCAB, minloglevel=2,
        pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def random_model(seed: int, positions: Positions) -> Transformer:
    """Return a model in which all parameters matter, also biases and gains."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=VOCAB, num_layers=draw.randint(1, 2), d_model=2 * draw.randint(5, 11), d_ff=draw.randint(7, 31),
        num_heads=draw.randint(1, 5), d_k=2 * draw.randint(1, 5), d_v=draw.randint(1, 11), dropout=0.1,
        positions=positions, norm=draw.choice(["pre", "post"]), max_length=MAX_LENGTH,
    )  # fmt: skip
    model = Transformer(config).eval()
    last = model.decoder_norm if config.norm == "pre" else model.decoder[-1].feed_forward_residual.norm
    assert isinstance(last, nn.LayerNorm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embedding.weight":
                parameter.add_(0.2 * torch.randn_like(parameter))
        last.weight.fill_(2.0)
        last.bias.fill_(1.0)  # adds the sum of a token's embedding to its logit
        embeddings = model.embedding.weight
        embeddings[EOS] += (1.5 - embeddings[EOS].sum()) / config.d_model
    return model
