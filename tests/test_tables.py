"""Tables of texts in, files of vectors out: formats, types, hostile input, atomic output."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import tables, vector_files
from modernbert.tables import Block, format_of, read_table, started, with_results
from modernbert.vector_files import vector_writer

# No surrogates, and nothing that ends a line: the rest may stand in any field.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=30)


def rows_of(path: Path, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for block in read_table(str(path), **options):
        keys = block.keys
        if not isinstance(keys, list):
            keys = keys.to_pylist() if keys.num_columns else [{}] * len(block.texts)
        rows += list(zip(block.texts, keys, strict=True))
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=8))
def test_csv_and_jsonl_and_parquet_give_back_any_text(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    with open(folder / "t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *pairs])
    with open(folder / "t.jsonl", "w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps({"id": i, "text": t}) + "\r\n" for i, t in pairs)
    pq.write_table(pa.Table.from_pylist([{"id": i, "text": t} for i, t in pairs]), folder / "t.pq")
    expected = [(text, {"id": name}) for name, text in pairs]
    for name in ("t.csv", "t.jsonl", "t.pq"):
        assert rows_of(folder / name) == expected, name


@settings(max_examples=60, deadline=None)
@given(st.lists(LINE, min_size=1, max_size=8))
def test_txt_is_a_text_per_line_and_keeps_empty_ones(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("txt") / "t.txt"
    for end in ("\n", "\r\n"):
        # The first line must not begin with a byte order mark, which is not part of the text.
        path.write_bytes("".join(f"-{line}{end}" for line in lines).encode())
        assert rows_of(path) == [(f"-{line}", {}) for line in lines]
    path.write_bytes(b"\xef\xbb\xbfmarked\n\nlast, without an end")
    assert [text for text, _ in rows_of(path)] == ["marked", "", "last, without an end"]


def test_tsv_quotes_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('text\tid\n"He said\t1\n5" screen, "new"\t2\n')
    assert rows_of(path) == [('"He said', {"id": "1"}), ('5" screen, "new"', {"id": "2"})]


def test_real_tables_are_read_whole(shared_data: Path) -> None:
    with open(shared_data / "cls_banking77" / "test.csv", encoding="utf-8", newline="") as file:
        expected = [row["text"] for row in csv.DictReader(file)]
    rows = rows_of(shared_data / "cls_banking77" / "test.csv")
    assert len(rows) == 3080 and [text for text, _ in rows] == expected
    assert {key for _, keys in rows for key in keys} == {"category"}


def test_blocks_are_bounded_in_rows_and_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x\n" * 2500)
    assert [len(block.texts) for block in read_table(str(path))] == [1024, 1024, 452]
    path.write_text(("y" * 9_000_000 + "\n") * 3)
    assert [len(block.texts) for block in read_table(str(path))] == [2, 1]


def test_keep_chooses_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1, "text": "x", "b": [2], "c": null}\n\n{"c": 3, "text": "y", "a": 4}\n')
    assert rows_of(path, keep=["a"]) == [("x", {"a": 1}), ("y", {"a": 4})]
    assert rows_of(path, keep=["text", "c"]) == [
        ("x", {"text": "x", "c": None}),
        ("y", {"text": "y", "c": 3}),
    ]
    with pytest.raises(
        ValueError, match=r"t.jsonl, line 3: no column 'b'; there are 'c', 'a', 'te"
    ):
        rows_of(path, keep=["b"])


DEEP = "[" * 100_000
BAD_FILES = {
    "latin1.txt": (b"caf\xe9\n", "is not UTF-8"),
    "half.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b'["a"]\n', "line 1 is list, not an object"),
    "null.jsonl": (b'{"text": null}\n', "column 'text' holds null, not a text"),
    "number.jsonl": (b'{"text": 5}\n', "column 'text' holds int, not a text"),
    "deep.jsonl": (f'{{"text": {DEEP}'.encode(), "nests JSON too deep"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"9" * 10_000 + b"}", "line 1 is not JSON"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', "has half a surrogate pair"),
    "wrong.csv": (b"txt,id\na,1\n", "no column 'text'; there are 'txt', 'id'"),
    "long.csv": (b"text,id\na,1,2\n", "line 2 has 3 fields, the header 2"),
    "twice.csv": (b"text,text\na,b\n", "a column name appears twice"),
    "quote.csv": (b'text,id\n"a"b,1\n', "line 2 is broken"),
    "open.csv": (b'text,id\n"a,1\n', "is broken"),
    "no.parquet": (b"PAR1 this is none", "no.parquet: "),
    "empty.parquet": (b"", "empty.parquet: "),
    "what.bin": (b"", "the format is not clear from the suffix"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name_and_place(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        rows_of(tmp_path / name)
    assert name in str(caught.value)


def test_a_line_without_end_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 100)
    for name in ("t.txt", "t.jsonl", "t.csv"):
        (tmp_path / name).write_text("text\n" + "x" * 101)
        with pytest.raises(ValueError, match="line . (has more than 100 characters|is not JSON)"):
            rows_of(tmp_path / name)
    (tmp_path / "t.csv").write_text('text\n"' + "x\n" * 200)
    with pytest.raises(ValueError, match="is broken: field larger than field limit"):
        rows_of(tmp_path / "t.csv")


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(ValueError, match="t.parquet: row 1: column 'text' holds null"):
        rows_of(path)
    with pytest.raises(ValueError, match="t.parquet: row 0: column 'n' holds int"):
        rows_of(path, column="n")
    with pytest.raises(ValueError, match="t.parquet: no column 'body'; there are 'text', 'n'"):
        rows_of(path, column="body")
    with pytest.raises(ValueError, match="cannot be read from standard input"):
        read_table("-", format="parquet").__next__()
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + bytes(b ^ 255 for b in raw[20:60]) + raw[60:])
    with pytest.raises(ValueError, match="t.parquet: "):
        rows_of(path)


def test_formats_are_checked() -> None:
    assert format_of("A.TXT", tables.READABLE) == "txt"
    assert format_of("a.ndjson", tables.READABLE) == "jsonl"
    with pytest.raises(ValueError, match="format is 'xml'; choose from txt, jsonl"):
        read_table("a.xml", format="xml")
    with pytest.raises(ValueError, match="without columns such as 'id' to keep"):
        read_table("a.txt", keep=["id"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=12), st.integers(1, 20))
def test_results_come_back_beside_their_keys(sizes: list[int], window: int) -> None:
    """Whatever the blocks, and however far the stream reads ahead."""
    waiting = 0

    def blocks() -> Iterator[Block]:
        nonlocal waiting
        number = 0
        for size in sizes:
            names = [str(number + i) for i in range(size)]
            number += size
            waiting += 1
            yield Block(names, [{"id": name} for name in names])

    def stream(texts: Iterator[str]) -> Iterator[np.ndarray]:
        pending: list[str] = []
        for text in texts:
            pending.append(text)
            if len(pending) == window:
                yield from (np.array([float(text)]) for text in pending)
                pending = []
        yield from (np.array([float(text)]) for text in pending)

    seen = []
    for keys, vectors in with_results(started(blocks()), stream):
        waiting -= 1
        assert waiting <= window + 2 + sizes.count(0)  # no more is held than was read ahead
        seen += [(row["id"], float(vector[0])) for row, vector in zip(keys, vectors, strict=True)]
    assert seen == [(str(i), float(i)) for i in range(sum(sizes))]


VECTORS = np.array([[0.1, -1e-9, 3.0], [1 / 3, 7e8, -0.0]], dtype=np.float32)
ROWS = [{"id": 1, "name": "α\u2028"}, {"id": 2, "name": None}]
FACTS = {"model": "some/model", "dimensions": "3"}


def write(
    path: Path, *, like: np.ndarray = VECTORS[:0], force: bool = False, **blocks: Any
) -> None:
    kind = format_of(str(path), vector_files.WRITABLE)
    with vector_writer(str(path), kind, like=like, metadata=FACTS, force=force) as writer:
        for keys, vectors in blocks.get("blocks", [(ROWS, VECTORS), (ROWS, 2 * VECTORS)]):
            writer.write(keys, vectors)


def test_npy(tmp_path: Path) -> None:
    write(tmp_path / "v.npy")
    loaded = np.load(tmp_path / "v.npy")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, np.concatenate([VECTORS, 2 * VECTORS]))
    write(tmp_path / "none.npy", blocks=[])
    assert np.load(tmp_path / "none.npy").shape == (0, 3)


def test_jsonl_keeps_every_bit_of_a_vector(tmp_path: Path) -> None:
    write(tmp_path / "v.jsonl")
    lines = [
        json.loads(line) for line in (tmp_path / "v.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert [line["name"] for line in lines] == ["α\u2028", None] * 2
    back = np.array([line["embedding"] for line in lines]).astype(np.float32)
    np.testing.assert_array_equal(back.view(np.int32)[:2], VECTORS.view(np.int32))
    assert list(lines[0]) == ["id", "name", "embedding"]


def test_jsonl_writes_dates_and_surrogates_but_no_bytes(tmp_path: Path) -> None:
    row = {"t": datetime(2026, 1, 2), "d": Decimal("1.50"), "s": "\ud800"}
    write(tmp_path / "v.jsonl", blocks=[([row], VECTORS[:1])])
    line = json.loads((tmp_path / "v.jsonl").read_text("utf-8"))
    assert (line["t"], line["d"], line["s"]) == ("2026-01-02T00:00:00", "1.50", "\ud800")
    with pytest.raises(ValueError, match="a column holds bytes, which JSON has no form for"):
        write(tmp_path / "w.jsonl", blocks=[([{"b": b"x"}], VECTORS[:1])])


def test_parquet_has_typed_vectors_and_says_what_made_them(tmp_path: Path) -> None:
    write(tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert table.schema.metadata[b"modernbert.model"] == b"some/model"
    assert table.column("id").to_pylist() == [1, 2, 1, 2]
    flat = table.column("embedding").combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat.reshape(-1, 3)[:2], VECTORS)
    write(tmp_path / "codes.parquet", like=np.zeros((0, 2), np.uint8), blocks=[])
    schema = pq.read_schema(tmp_path / "codes.parquet")
    assert schema.field("embedding").type == pa.list_(pa.uint8(), 2)


def test_parquet_to_parquet_keeps_types(tmp_path: Path) -> None:
    source = pa.table(
        {
            "when": pa.array([datetime(2026, 1, 2)] * 3, pa.timestamp("ns", "UTC")),
            "text": pa.array(["a", "b", "a"]).dictionary_encode(),
            "small": pa.array([1, None, 3], pa.int8()),
            "nested": pa.array([[{"x": 1}], [], None], pa.list_(pa.struct([("x", pa.int16())]))),
        }
    )
    pq.write_table(source, tmp_path / "t.parquet")
    [block] = read_table(str(tmp_path / "t.parquet"))
    assert block.texts == ["a", "b", "a"]
    write(tmp_path / "v.parquet", blocks=[(block.keys, np.zeros((3, 3)))])
    written = pq.read_table(tmp_path / "v.parquet").drop(["embedding"])
    expected = source.drop(["text"])
    assert written.schema.types == expected.schema.types
    assert written.to_pydict() == expected.to_pydict()


def test_parquet_row_groups_are_of_useful_size(tmp_path: Path) -> None:
    blocks = [([{}] * 1000, np.zeros((1000, 3)))] * 20
    write(tmp_path / "v.parquet", blocks=blocks)
    file = pq.ParquetFile(tmp_path / "v.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [9000, 9000, 2000]


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"n": 1}, {"n": "one"}, "column 'n' is not int64 as before"),
        ({"n": 1}, {"m": 1}, "the columns change from 'n', 'embedding' to 'n', 'm', 'embedding'"),
        ({"embedding": 1}, {}, "the input has a column 'embedding' already"),
        ({"n": 2**70}, {}, "column 'n' is not of one type"),
    ],
)
def test_parquet_columns_that_change(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    blocks = [([first], VECTORS[:1]), ([second], VECTORS[:1])]
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "v.parquet", blocks=blocks)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", vector_files.WRITABLE)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "body", "interrupt"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str
) -> None:
    path = tmp_path / f"v.{kind}"
    path.write_bytes(b"old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def blocks() -> Iterator[tuple[Any, np.ndarray]]:
        yield ROWS, VECTORS
        if call == "body":
            raise OSError(errno.EIO, "Input/output error")
        if call == "interrupt":
            raise KeyboardInterrupt

    if call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, full)
    if call == "write":

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                if self.tell() > 20:
                    full()
                return super().write(data)

        monkeypatch.setattr(vector_files, "open", lambda p, mode: Full(p, "x"), raising=False)
    with pytest.raises(KeyboardInterrupt if call == "interrupt" else OSError):
        write(path, force=True, blocks=blocks())
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
    write(path, force=True)
    assert path.read_bytes() != b"old"


def test_the_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    umask = os.umask(0o027)
    try:
        with vector_writer(str(path), "npy", like=VECTORS[:0], metadata=FACTS) as writer:
            writer.write([], VECTORS)
            assert not path.exists()
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"old")
    with pytest.raises(ValueError, match="v.npy exists; pass --force"):
        write(tmp_path / "v.npy")
    (tmp_path / "pipe.npy").mkdir()
    for path in (tmp_path / "pipe.npy", Path(os.devnull)):
        with pytest.raises(ValueError, match="exists and is not a regular file"):
            vector_files.check_output(str(path), force=True)
    with pytest.raises(ValueError, match="there is no folder .*gone; make it first"):
        write(tmp_path / "gone" / "v.npy")
    with pytest.raises(ValueError, match="npy cannot be written to standard output"):
        with vector_writer("-", "npy", like=VECTORS[:0], metadata={}):
            raise AssertionError("not reached")


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("real.npy")
    write(tmp_path / "link.npy", force=True)
    assert (tmp_path / "link.npy").is_symlink()
    assert len(np.load(tmp_path / "real.npy")) == 4
