import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.training.data import Corpus, cut_text, find_files, read_documents, split_held_out, tokenise


def test_files_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "c.md", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path / "c.md", tmp_path, tmp_path / "b.txt"])
    assert [file.name for file in found] == ["c.md", "a.jsonl", "b.txt", "d.txt"]


def test_documents_of_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ntwo — three".encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "four\nfive", "n": 1}) + '\n\n{"text": "six"}\n')
    assert list(read_documents(tmp_path / "a.txt")) == ["one\r\n\ntwo — three"]
    assert list(read_documents(tmp_path / "b.jsonl")) == ["four\nfive", "six"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00data", "is not UTF-8 text"),
        ("a.txt", b"ELF\0\0\0", "holds a zero byte"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', 'line 1 has no "text" field'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no "text" field'),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_bad_data_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HymbaError) as error:
        list(read_documents(tmp_path / name))
    assert complaint in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data_is_told(tmp_path: Path) -> None:
    for paths, complaint in (
        ([tmp_path / "none.txt"], "no data at"),
        ([tmp_path], "no .txt or .jsonl file in"),
        ([], "no data: give"),
    ):
        with pytest.raises(HymbaError, match=complaint):
            find_files(paths)
    with pytest.raises(HymbaError, match=r"held_out names 'x.txt'"):
        split_held_out([Path("a.txt")], ["x.txt"])
    with pytest.raises(HymbaError, match="nothing is left to train on"):
        split_held_out([Path("a.txt")], ["a.txt"])


@given(text=st.text(alphabet="ab\n ", max_size=200), size=st.integers(1, 50))
def test_cutting_a_text_loses_nothing(text: str, size: int) -> None:
    pieces = list(cut_text(text, size))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") and len(piece) >= size for piece in pieces[:-1])


def test_tokens_decode_to_the_text_and_are_kept(tmp_path: Path, books: Path, tokenizer: Any) -> None:
    files = find_files([books])
    done: list[int] = []
    corpus = tokenise(files, tokenizer, tmp_path / "tokens", done.append)
    assert sum(done) == corpus.num_bytes == sum(file.stat().st_size for file in files)
    for file, start, stop in zip(files, corpus.offsets[:-1], corpus.offsets[1:], strict=True):
        ids = corpus.tokens[start:stop].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids[:-1]) == file.read_text(encoding="utf-8")
    assert tokenise(files, tokenizer, tmp_path / "tokens", done.append).fingerprint == corpus.fingerprint
    assert sum(done) == corpus.num_bytes
    (books / "cats.txt").write_text("Other text.")
    renewed = tokenise(files, tokenizer, tmp_path / "tokens")
    assert renewed.fingerprint != corpus.fingerprint
    assert len(renewed.tokens) < len(corpus.tokens)


def test_an_unfinished_cache_is_ignored(tmp_path: Path, books: Path, tokenizer: Any) -> None:
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "tokens.partial" / "tokens.bin").write_bytes(b"half")
    (books / "bad.jsonl").write_text('{"text": "good"}\nbad')
    with pytest.raises(HymbaError, match=r"bad.jsonl line 2 is not JSON"):
        tokenise(find_files([books]), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    (books / "bad.jsonl").unlink()
    corpus = tokenise(find_files([books]), tokenizer, tmp_path / "tokens")
    assert np.array_equal(Corpus.open(tmp_path / "tokens").tokens, corpus.tokens)
