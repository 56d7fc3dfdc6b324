import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, processors

from hymba.errors import HymbaError
from hymba.training.data import (
    Corpus,
    describe_data,
    describe_tokenizer,
    find_files,
    read_documents,
    split_held_out,
    tokenise,
)

TINY = Path(__file__).parents[2] / "src/hymba/assets/tiny"


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


def test_odd_lines_that_hold_a_text_are_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "same"}\r\n',
        b"  \r\n",
        b'{"text": "same", "score": 1e999, "id": ' + b"9" * 5000 + b"}\n",
        b'{"text": "first", "text": "last", "n": NaN}\n',
        b'{"text": " \\t"}\n',
        b'{"text": "\\ud83d\\ude00 \xe2\x80\xa8 end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    assert list(read_documents(tmp_path / "a.jsonl")) == ["same", "same", "last", "\U0001f600 \u2028 end"]


def test_characters_across_the_blocks_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba.training.data.BLOCK", 5)
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve 漢字 🙂🙂\r\n\n".encode())
    assert list(read_documents(tmp_path / "a.txt")) == ["naïve 漢字 🙂🙂\r\n\n"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00data", "is not UTF-8 text: line 1 holds the byte 0xff"),
        ("a.txt", b"one\n" * 50_000 + b"caf\xe9\n", "is not UTF-8 text: line 50001 holds the byte 0xe9"),
        ("a.txt", b"one\ntwo\ncut \xf0\x9f", "is not UTF-8 text: line 3 holds the byte 0xf0"),
        ("a.txt", b"half a pair \xed\xa0\xbd", "is not UTF-8 text: line 1 holds the byte 0xed"),
        ("a.txt", b"ELF\n\n\0\0\0", "holds a zero byte in line 3"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "line 2 is not JSON: Unterminated string"),
        ("a.jsonl", b'{"body": "x"}\n', 'line 1 has no "text" field'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no "text" field'),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n', 'line 2 has no "text" field'),
        ("a.jsonl", b'{"text": "fine"}\nnull\n', 'line 2 has no "text" field'),
        ("a.jsonl", b"\xff\xfe", "line 1 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": "caf\xe9"}\n', "line 3 is not UTF-8 text"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": "half \\ud83d pair"}\n',
            r"line 2: its text holds half of a surrogate",
        ),
        ("a.jsonl", b'{"text": "pair \\ude00\\ud83d"}\n', r"written \ude00"),
        ("a.jsonl", b'{"text": "one\\u0000two"}\n', "line 1: its text holds a zero byte"),
        ("a.jsonl", b'{"text": "fine"}\n' + bytes(20), "line 2 holds a zero byte"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 nests too many"),
        ("a.jsonl", b'{"text": "x", "y": ' + b'{"y":' * 100_000, "line 1 nests too many"),
        ("A.JSONL", b"plain text", "line 1 is not JSON"),
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


def test_tokens_are_kept_by_content_not_by_name_or_time(tmp_path: Path, books: Path, tokenizer: Any) -> None:
    files, directory, done = find_files([books]), tmp_path / "tokens", []
    tokenise(files, tokenizer, directory, done.append)
    done.clear()
    os.utime(files[0])
    moved = books.rename(tmp_path / "moved")
    (moved / "cats.txt").rename(moved / "a.txt")
    tokenise(find_files([moved]), tokenizer, directory, done.append)
    assert done == []
    before, text = (moved / "a.txt").stat(), (moved / "a.txt").read_bytes()
    (moved / "a.txt").write_bytes(text.replace(b"cat", b"cow"))
    os.utime(moved / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    tokenise(find_files([moved]), tokenizer, directory, done.append)
    assert done != []


def test_a_line_of_json_and_the_same_bytes_as_text_are_different_data(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    one, other = describe_data([tmp_path / "a.txt", tmp_path / "a.jsonl"])
    assert one != other


def change_merges(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"].reverse()
    return Tokenizer.from_str(json.dumps(state))


def change_normalizer(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def change_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(["cat"])
    return tokenizer


def change_pattern(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str().replace("isolated", "MergedWithNext").replace("Isolated", "Removed"))


@pytest.mark.parametrize("change", [change_merges, change_normalizer, change_added_tokens, change_pattern])
def test_a_tokenizer_with_any_difference_makes_new_tokens(
    tmp_path: Path, books: Path, tokenizer: Any, change: Any
) -> None:
    old = tokenise(find_files([books]), tokenizer, tmp_path / "tokens")
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenise(find_files([books]), tokenizer, tmp_path / "tokens").fingerprint == old.fingerprint
    changed = type(tokenizer)(
        tokenizer_object=change(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())), eos_token="</s>"
    )
    assert describe_tokenizer(changed.backend_tokenizer) != describe_tokenizer(tokenizer.backend_tokenizer)
    assert tokenise(find_files([books]), changed, tmp_path / "tokens").fingerprint != old.fingerprint


def test_special_tokens_spelled_in_text_stay_text(tmp_path: Path, tokenizer: Any) -> None:
    text = "price <s>20</s> dollars. [PAD] end</s>"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    corpus = tokenise([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, tmp_path / "tokens")
    for start, stop in ((0, corpus.offsets[1]), corpus.offsets[1:]):
        ids = corpus.tokens[start:stop].tolist()
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "content"), [("about.json", b""), ("about.json", b"{}"), ("tokens.bin", b"ab"), ("offsets.bin", b"")]
)
def test_damaged_tokens_are_made_again(tmp_path: Path, books: Path, tokenizer: Any, name: str, content: bytes) -> None:
    whole = tokenise(find_files([books]), tokenizer, tmp_path / "tokens").tokens.tolist()
    (tmp_path / "tokens" / name).write_bytes(content)
    with pytest.raises(HymbaError, match="damaged"):
        Corpus.open(tmp_path / "tokens")
    assert tokenise(find_files([books]), tokenizer, tmp_path / "tokens").tokens.tolist() == whole


MEASURE = """
import resource, sys
from pathlib import Path
from hymba.text import load_tokenizer
from hymba.training.data import tokenise
tokenizer = load_tokenizer(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
tokenise([Path(sys.argv[1])], tokenizer, Path(sys.argv[1]).with_suffix(".tokens"))
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("a.txt", "It was a cold morning and nobody was there. " * 100_000, 120),
        ("b.txt", "\U0001f642\U0001f600漢" * 400_000, 120),
        ("c.jsonl", json.dumps({"text": "It was a cold morning and nobody was there. " * 100_000}), 140),
    ],
    ids=["no line ends", "a token a byte", "one line of JSON"],
)
def test_memory_does_not_grow_with_the_text(tmp_path: Path, name: str, text: str, limit: int) -> None:
    """4 MB; encoded at once they take 300 MB and more."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(TINY)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < limit


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
