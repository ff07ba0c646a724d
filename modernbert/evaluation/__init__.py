"""`modernbert evaluate`: how good vectors and masked predictions are, measured on local files.

Scores are points: 100 times a correlation, an accuracy or an nDCG. What the data folder may hold:

    wordsim_minish/         rw.txt, men.txt, ...: the seven sets of `word_similarity.SETS`
    sts_senteval/STSnn*/    STS.input.X.txt (text TAB text) beside STS.gs.X.txt (blank: no score)
    sts_benchmark/          stsbenchmark.tsv(.gz): header with split, score, sentence1, sentence2
    sick/                   SICK_test_annotated.txt as published
    cls_*/                  train and test files, as `classification.DATASETS` lists them
    NAME/                   BEIR: corpus.jsonl(.gz), queries.jsonl(.gz), qrels/test.tsv
    ret_NAME/               SMART: NAME.ALL(.gz), NAME.QRY or query.text, NAME.REL or qrels.text
    text_wikipedia_en/      *.jsonl.gz with "title" and "text"; what training holds out is used

Names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Encoder": "models",
    "Results": "scores",
    "Score": "scores",
    "Skipped": "scores",
    "Subject": "models",
    "evaluate": "runner",
    "load_subject": "models",
    "masked_lm_accuracy": "masked_lm",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from .masked_lm import masked_lm_accuracy as masked_lm_accuracy
    from .models import Encoder as Encoder
    from .models import Subject as Subject
    from .models import load_subject as load_subject
    from .runner import evaluate as evaluate
    from .scores import Results as Results
    from .scores import Score as Score
    from .scores import Skipped as Skipped


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)
