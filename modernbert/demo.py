"""`modernbert demo`: the main job from end to end, with nothing but what is installed.

A tokenizer is trained on the sentences below, a model gets random weights, both are saved in the
layout of the official checkpoints, loaded like any other, and used.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from modernbert.config import ModernBertConfig
from modernbert.console import similarity_table
from modernbert.model import ModernBertModel
from modernbert.sentence import SentenceEncoder
from modernbert.tokenizer import Tokenizer

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
TRAINING_TEXT = [
    *SENTENCES,
    "The sun was out all day, and the children played in the garden until it was dark.",
    "It rained in the morning, but the afternoon was warm and the sky was clear.",
    "She took the bus to the station because her car would not start.",
    "They drove along the coast to see the match at the new stadium.",
    "We walked outside for an hour and talked about what the weather would be like.",
    "The train was late, so he read the newspaper and drank a cup of coffee.",
    "A good book, a quiet room and a little time are all that one needs.",
    "How long does it take to learn a language if you speak it every day?",
    "The team won the game in the last minute, and the whole town was happy.",
]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def run() -> Iterator[str]:
    """The lines that the demo prints."""
    yield "No trained checkpoint ships yet: this model has RANDOM weights, its scores mean nothing."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo-model"
        build_checkpoint(folder)
        encoder = SentenceEncoder.from_pretrained(folder)
        vectors = encoder.encode(SENTENCES)
        count = sum(parameter.numel() for parameter in encoder.parameters())
        yield (
            f"Saved and loaded in the official layout: {len(list(folder.rglob('*.*')))} files, "
            f"{count:,} parameters, vocabulary {encoder.tokenizer.vocab_size:,}."
        )
        yield f"{len(vectors)} sentences -> vectors of {vectors.shape[1]} dimensions. Similarity:"
        yield ""
        yield from similarity_table(SENTENCES, encoder.similarity(vectors, vectors).tolist())


def build_checkpoint(folder: Path) -> None:
    """Write a small sentence encoder with random weights, always the same ones."""
    tokenizer = train_tokenizer(TRAINING_TEXT)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = ModernBertConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=2,
        initializer_range=0.1,
        classifier_pooling="mean",
        max_position_embeddings=8192,
        bos_token_id=ids["[CLS]"],
        cls_token_id=ids["[CLS]"],
        eos_token_id=ids["[SEP]"],
        sep_token_id=ids["[SEP]"],
        pad_token_id=ids["[PAD]"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ModernBertModel(config).eval()
    ours = Tokenizer(tokenizer.to_str().encode(), settings={"model_max_length": 8192})
    SentenceEncoder(model, ours).save_pretrained(folder)


def train_tokenizer(texts: list[str], vocab_size: int = 512) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with the pipeline and special tokens of ModernBERT."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, lstrip=t == "[MASK]", special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return tokenizer
