import gzip
import json
import logging
import operator
import random
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, trainers

from modernbert.tokenizer import Tokenizer
from modernbert.training import store as store_module
from modernbert.training.readers import is_validation, read_records
from modernbert.training.store import TokenStore, build_store

RECORDS = [{"text": f"Text number {i}, é 漢\u2028 and\rmore.", "id": i} for i in range(2500)]


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def jsonl(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reads_records(tmp_path: Path, name: str):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=700)
    else:
        write(path, "\ufeff" + jsonl(RECORDS) + "\n")
    assert list(read_records(str(path))) == RECORDS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_reads_a_record_from_each_line_that_is_not_blank(tmp_path: Path, name: str):
    path = write(tmp_path / name, "one\u2028two\r\n\n \t\n three\rfour")
    assert list(read_records(path)) == [{"text": "one\u2028two"}, {"text": " three\rfour"}]


def test_a_pattern_gives_its_files_in_the_order_of_their_names(tmp_path: Path):
    for name in ("b.txt", "a10.txt", "a2.txt", "sub/c.txt", "sub/sub/d.txt", "other.jsonl"):
        write(tmp_path / name, f"{name}\n")

    def names(pattern):
        return [record["text"] for record in read_records(tmp_path / pattern)]

    assert names("*.txt") == ["a10.txt", "a2.txt", "b.txt"]
    assert names("**/*.txt") == ["a10.txt", "a2.txt", "b.txt", "sub/c.txt", "sub/sub/d.txt"]
    write(tmp_path / "[ab].txt", "itself\n")
    assert names("[ab].txt") == ["itself"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl.gz", '{"text": "a"}\n\n["a"]\n', r"a\.jsonl\.gz, line 3 is list, not an object"),
        ("a.txt", b"caf\xe9\n", r"a\.txt is not UTF-8.*iconv"),
        ("a.txt.gz", b"caf\xe9\n", r"a\.txt\.gz is not UTF-8"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet, at row 0: .*"),
        ("a.csv", "text\na\n", r"a\.csv: the format is not clear.*\.jsonl, \.txt, \.parquet"),
        ("a.gz", "text\n", r"a: the format is not clear"),
    ],
)
def test_says_where_a_file_is_broken(tmp_path: Path, name: str, content, message: str):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_records(path))


def test_says_which_gzip_file_is_broken(tmp_path: Path):
    good = gzip.compress(random.Random(0).randbytes(9000).hex().encode())
    for content in (good[:-2000], b"not gzip\n", good[:2000] + bytes(100) + good[2100:]):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.txt\.gz is broken.*download it again"):
            list(read_records(tmp_path / "a.txt.gz"))


def test_says_when_nothing_matches(tmp_path: Path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"no file matches .*\.txt; check the path"):
        list(read_records(tmp_path / "*.txt"))


KEYS = ("a", "b", "c", "é", "", "\ud800")
HELD_OUT = [True, False, True, False, False, True]


def test_validation_is_a_matter_of_the_key():
    keys = [f"document {i}" for i in range(20_000)]
    for fraction in (0.0, 0.01, 0.3, 1.0):
        held_out = {key for key in keys if is_validation(key, fraction)}
        assert len(held_out) / len(keys) == pytest.approx(fraction, abs=0.012)
        assert held_out <= {key for key in keys if is_validation(key, min(1.0, fraction + 0.1))}
    # Their hashes begin with 40, 84, 37, cb, e4 and 42 (base 16): a split must never change.
    assert [is_validation(key, 0.5) for key in KEYS] == HELD_OUT
    with pytest.raises(ValueError, match="fraction is 1.5"):
        is_validation("a", 1.5)


def trained_tokenizer(vocab_size: int = 400) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[CLS]", "[SEP]", "[MASK]", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([record["text"] for record in RECORDS[:50]], trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    return Tokenizer(backend.to_str().encode())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained_tokenizer()


def sequences(store: TokenStore) -> list[list[int]]:
    return [ids.tolist() for ids in store]


def build(folder: Path, sources, tokenizer: Tokenizer, **options) -> TokenStore:
    return build_store(folder, sources, tokenizer, progress=False, **options)


def test_a_store_holds_the_ids_of_every_text(tmp_path: Path, tokenizer: Tokenizer):
    write(tmp_path / "a.jsonl.gz", jsonl(RECORDS[:1700]))
    write(tmp_path / "b.jsonl", jsonl(RECORDS[1700:]))
    store = build(tmp_path / "store", str(tmp_path / "*.jsonl*"), tokenizer)
    expected = tokenizer([r["text"] for r in RECORDS], add_special_tokens=False).input_ids
    assert sequences(store) == expected
    assert len(store) == 2500 and store.fields == ("text",)
    assert store.lengths.dtype == np.int64 and store.lengths.tolist() == list(map(len, expected))
    assert store[7].dtype == np.uint16 and store[-1].tolist() == expected[-1]
    for index in (2500, -2501):
        with pytest.raises(IndexError, match=f"sequence {index} of a store with 2500"):
            store[index]
    again = TokenStore(tmp_path / "store")
    assert sequences(again) == expected and again.manifest == store.manifest
    assert store.manifest["sequences"] == 2500
    assert store.manifest["tokens"] == sum(map(len, expected))
    assert [source["file"] for source in store.manifest["sources"]] == ["a.jsonl.gz", "b.jsonl"]
    assert store.manifest["sources"][1]["bytes"] == (tmp_path / "b.jsonl").stat().st_size


def test_worker_processes_make_the_same_store(tmp_path: Path, tokenizer: Tokenizer):
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS * 4))
    for workers in (1, 2):
        build(tmp_path / str(workers), str(path), tokenizer, workers=workers)
    for name in ("tokens.npy", "offsets.npy", "manifest.json"):
        one, two = (tmp_path / workers / name for workers in "12")
        assert one.read_bytes() == two.read_bytes()


def test_records_with_several_fields_give_as_many_sequences(tmp_path: Path, tokenizer: Tokenizer):
    triples = [{"c": "third", "a": "first", "b": "second"}, {"a": "x", "b": "", "c": "y", "d": 1}]
    path = write(tmp_path / "a.jsonl", jsonl(triples))
    store = build(tmp_path / "store", str(path), tokenizer, fields=("a", "b", "c"))
    texts = [tokenizer.decode(ids) for ids in store]
    assert texts == ["first", "second", "third", "x", "", "y"]
    assert store.fields == ("a", "b", "c") and store.lengths[4] == 0


def test_prompts_stand_before_their_fields_and_do_not_move_the_split(
    tmp_path: Path, tokenizer: Tokenizer
):
    pairs = [{"a": record["text"], "b": "passage"} for record in RECORDS[:200]]
    path = write(tmp_path / "a.jsonl", jsonl(pairs))
    options = {"fields": ("a", "b"), "split": "train", "validation": 0.2}
    plain = build(tmp_path / "plain", str(path), tokenizer, **options)
    store = build(tmp_path / "store", str(path), tokenizer, prompts=("q: ", "p: "), **options)
    texts = [tokenizer.decode(ids) for ids in plain]
    prompts = ["q: ", "p: "] * (len(texts) // 2)
    assert len(texts) < 400
    assert [tokenizer.decode(ids) for ids in store] == list(map(operator.add, prompts, texts))
    with pytest.raises(ValueError, match="1 prompts for 2 fields"):
        build(tmp_path / "store", str(path), tokenizer, prompts=("q: ",), **options)


def test_texts_cannot_plant_special_tokens(tmp_path: Path, tokenizer: Tokenizer):
    path = write(tmp_path / "a.txt", "Who writes [MASK] [SEP] here?\n")
    (ids,) = sequences(build(tmp_path / "store", str(path), tokenizer))
    assert min(ids) > 3 and tokenizer.decode(ids) == "Who writes [MASK] [SEP] here?"
    assert tokenizer.mask_token_id in tokenizer("[MASK]").input_ids[0]  # the user's is not changed


def test_many_tokens_take_32_bits(tmp_path: Path):
    vocabulary = {f"w{i}": i for i in range(70_000)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wide = Tokenizer(backend.to_str().encode())
    path = write(tmp_path / "a.txt", "w69999 w65536\nw65535\n")
    store = build(tmp_path / "store", str(path), wide)
    assert sequences(store) == [[69999, 65536], [65535]] and store[0].dtype == np.uint32


def test_a_split_never_moves(tmp_path: Path, tokenizer: Tokenizer):
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS[:600]))

    def texts(split, validation=0.2):
        store = build(tmp_path / "store", str(path), tokenizer, split=split, validation=validation)
        return [tokenizer.decode(ids) for ids in store]

    every = texts("all")
    train, held_out = texts("train"), texts("validation")
    assert every == [record["text"] for record in RECORDS[:600]]
    assert sorted(train + held_out) == sorted(every) and 80 <= len(held_out) <= 160
    write(path, jsonl(RECORDS[599:299:-1]))
    assert set(texts("validation")) == set(held_out) & {r["text"] for r in RECORDS[300:600]}
    with pytest.raises(ValueError, match="no record of .* is in the validation split"):
        texts("validation", validation=0.0)


def identity(folder: Path) -> list[tuple[int, int]]:
    stats = [path.stat() for path in sorted(folder.iterdir())]
    return [(s.st_ino, s.st_mtime_ns) for s in stats]


def test_a_store_is_reused_until_something_differs(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="modernbert")
    folder = tmp_path / "store"
    first = write(tmp_path / "a.jsonl", jsonl(RECORDS[:20]))
    build(folder, str(first), tokenizer)
    (folder / "notes.md").write_text("mine")
    before = identity(folder)
    moved = write(tmp_path / "moved" / "a.jsonl", first.read_bytes())
    for same in (first, moved):
        build(folder, [str(same)], tokenizer, workers=2)
        assert identity(folder) == before and not caplog.records
    other = trained_tokenizer(270)
    for reason, sources, given, options in [
        ("sources", write(tmp_path / "a.jsonl", jsonl(RECORDS[:21])), tokenizer, {}),
        ("vocab_size, tokenizer", first, other, {}),
        ("split, validation", first, other, {"split": "train", "validation": 0.1}),
        ("fields", first, other, {"fields": ("text", "text")}),
    ]:
        caplog.clear()
        options = {"split": "all"} | options
        build(folder, str(sources), given, **options)
        assert reason in caplog.text and "is made again" in caplog.text
    assert len(TokenStore(folder)) == 42
    assert (folder / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "manifest.json"])
def test_a_broken_store_is_refused_and_made_again(
    tmp_path: Path, tokenizer: Tokenizer, name: str, caplog: pytest.LogCaptureFixture
):
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS[:20]))
    folder = tmp_path / "store"
    expected = sequences(build(folder, str(path), tokenizer))
    raw = (folder / name).read_bytes()
    for broken in (raw[: len(raw) // 2], b"", b"{}", b"[]"):
        (folder / name).write_bytes(broken)
        with pytest.raises(ValueError, match="holds no token store.*build it again"):
            TokenStore(folder)
    assert sequences(build(folder, str(path), tokenizer)) == expected
    assert "build it again" in caplog.text
    np.save(folder / "offsets.npy", np.arange(21)[::-1])
    with pytest.raises(ValueError, match="is broken; build it again"):
        TokenStore(folder)
    with pytest.raises(ValueError, match="holds no token store"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"id": 3}, "line 2101: field 'text' holds NoneType, not a text; there are 'id'"),
        ({"text": ["a"]}, "line 2101: field 'text' holds list, not a text"),
        ({"text": "\ud800"}, "line 2101: field 'text' has half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_the_old_store(
    tmp_path: Path, tokenizer: Tokenizer, record: dict, message: str, workers: int
):
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS[:5]))
    expected = sequences(build(tmp_path / "store", str(path), tokenizer))
    write(path, jsonl([*RECORDS[:2100], record]))
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "store", str(path), tokenizer, workers=workers)
    assert sequences(TokenStore(tmp_path / "store")) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "store"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "test"}, "split is 'test'; choose from train, validation, all"),
        ({"fields": "text"}, "fields is 'text'; give a list"),
        ({"fields": ()}, "give a list"),
        ({"workers": 0}, "workers is 0"),
        ({"validation": 2.0}, "fraction is 2.0"),
    ],
)
def test_senseless_arguments_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, options: dict, message: str
):
    path = write(tmp_path / "a.txt", "a\n")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "store", str(path), tokenizer, **options)
    assert not (tmp_path / "store").exists()


def test_progress_shows_the_tokens(tmp_path: Path, tokenizer: Tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS[:100]))
    build_store(tmp_path / "store", str(path), tokenizer)
    assert "tokens" in capsys.readouterr().err


def test_real_text_gives_the_ids_of_the_tokenizer(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_module, "CHUNK_CHARACTERS", 20_000)
    modernbert = Tokenizer.from_file(shared_data / "tokenizer_modernbert" / "tokenizer.json")
    with gzip.open(shared_data / "text_wikipedia_en" / "enwiki_core_AA_0.jsonl.gz") as file:
        lines = [file.readline() for _ in range(40)]
    path = write(tmp_path / "wiki.jsonl.gz", b"".join(lines))
    store = build(tmp_path / "store", str(path), modernbert)
    for ids, line in zip(store, lines, strict=True):
        text = json.loads(line)["text"]
        expected = modernbert(text, add_special_tokens=False, truncation=False).input_ids[0]
        assert ids.tolist() == expected
