"""Captions: a tokenizer made from them, a small encoder that is trained with the network, and shorter captions."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch


if TYPE_CHECKING:
    from transformers import DistilBertModel, PreTrainedTokenizerFast

MAX_WORDS = 64  # of a caption; the rest is cut off
MAX_VOCABULARY = 8192
PAD, UNKNOWN = "[PAD]", "[UNK]"
TRAINED = "is_trained_with_unet"  # in the configuration of an encoder
# A caption is cut before these words, and after commas, into phrases.
_PHRASES = re.compile(r",\s*|\s+(?=(?:and|in|with|wearing|without)\b)")


def make_tokenizer(captions: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Make a tokenizer of the words in captions, in lower case. Rare words beyond 8,190 are left out.

    Args:
        captions (`Iterable[str]`): All captions of the training data.

    Raises:
        ValueError: The captions contain no words.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for caption, number in Counter(captions).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            counts[word] += number
    if not counts:
        raise ValueError("The captions contain no words.")
    words = sorted(counts, key=lambda word: (-counts[word], word))[: MAX_VOCABULARY - 2]
    vocabulary = {word: number for number, word in enumerate([PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_max_length=MAX_WORDS
    )


def make_text_encoder(tokenizer: "PreTrainedTokenizerFast", dim: int = 128) -> "DistilBertModel":
    """Make a transformer of two layers for the words of a tokenizer, with random weights.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): From [`make_tokenizer`].
        dim (`int`, defaults to 128): Length of the embedding of a text.
    """
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_WORDS,
        n_layers=2,
        n_heads=4,
        dim=dim,
        hidden_dim=2 * dim,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **{TRAINED: True},
    )
    encoder = DistilBertModel(config)
    # The default, a standard deviation of 0.02, is so small that the first steps of Adam move all words together and
    # make them the same.
    torch.nn.init.normal_(encoder.embeddings.word_embeddings.weight)
    return encoder


def shortened(caption: str, rng: np.random.Generator) -> str:
    """Drop phrases of a caption at random, and keep at least one.

    "a smiling woman in the thirties with brown hair and glasses" may become "with brown hair" or "a smiling woman and
    glasses". A model that is trained on such captions understands short prompts.
    """
    parts = phrases(caption)
    if len(parts) == 1:
        return caption
    count = int(rng.integers(1, len(parts)))
    kept = sorted(rng.permutation(len(parts))[:count])
    return " ".join(parts[i] for i in kept)


def phrases(caption: str) -> list[str]:
    """Split a caption into phrases, such as "a smiling woman", "in the thirties", "with brown hair", "and glasses"."""
    return _PHRASES.split(caption)
