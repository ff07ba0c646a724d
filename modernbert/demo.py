"""`modernbert demo`: semantic search and fill-mask with the model that ships, without a network."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from modernbert.console import plain
from modernbert.heads import ModernBertForMaskedLM
from modernbert.predict import fill_mask
from modernbert.sentence import SentenceEncoder
from modernbert.streaming import EncodeReport
from modernbert.tables import read_table
from modernbert.weights import EMBEDDED_NAME

SENTENCES = Path(__file__).with_name("demo_sentences.txt")
# The sentence that answers each shares no content word with it.
QUERIES = (
    "money for old age",
    "I cannot pay back my home loan",
    "a long trip through Russia",
    "puppies must go outside in bad weather",
)
MASKED = (
    "He studied at the [MASK] of Oxford.",
    "The film was released in the United [MASK].",
)
TOP = 3


def run(file: str | None = None, queries: Sequence[str] = ()) -> Iterator[str]:
    """The lines that the demo prints.

    Searches the lines of `file` ("-" is standard input), or the sentences that ship. Without
    `queries` those are `QUERIES`, or some lines of `file`, which find others. Raises `ValueError`
    for a file without text, and `CheckpointError` when the model is not installed.
    """
    start = time.perf_counter()
    texts = read_texts(file or str(SENTENCES))
    if not queries:
        queries = QUERIES if file is None else texts[:: -(-len(texts) // TOP)]
    encoder = SentenceEncoder.from_pretrained()
    yield (
        f"{EMBEDDED_NAME}: {encoder.model.num_parameters():,} parameters, on {encoder.device}, "
        f"loaded in {time.perf_counter() - start:.1f} s"
    )

    begin, report = time.perf_counter(), EncodeReport()
    watched = file is not None and sys.stderr.isatty()
    vectors = encoder.encode(texts, report=report, show_progress_bar=watched)
    seconds = time.perf_counter() - begin
    yield (
        f"{len(texts):,} texts -> vectors of {vectors.shape[1]} dimensions in {seconds:.2f} s "
        f"({report.tokens / seconds:,.0f} tokens/s)"
    )
    scores = encoder.similarity(encoder.encode(queries), vectors)  # (queries, texts)
    for query, row in zip(queries, scores, strict=True):
        yield f"\n{plain(query)}"
        best = row.topk(min(TOP + 1, len(texts))).indices.tolist()
        for i in [i for i in best if texts[i] != query][:TOP]:
            yield f"  {row[i]:6.3f}  {plain(texts[i])}"

    model = ModernBertForMaskedLM.from_pretrained(device=encoder.device)
    for text, masks in zip(MASKED, fill_mask(model, encoder.tokenizer, MASKED), strict=True):
        yield f"\n{text}"
        for guess in masks[0][:TOP]:
            yield f"  {guess['probability']:6.3f}  {plain(guess['token'])}"
    yield f"\n{time.perf_counter() - start:.1f} s in all"


def read_texts(path: str) -> list[str]:
    """The lines of a text file, without those that are empty or came before."""
    blocks = read_table(path, format="txt")
    texts = list(dict.fromkeys(text for block in blocks for text in block.texts if text.strip()))
    if not texts:
        raise ValueError(f"there is no text in {path}")
    return texts
