from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mlx_tune as mt
from mlx_tune import lm

CHARACTERS = SimpleNamespace(encode=lambda text: [ord(c) for c in text], eos_token_id=0)


def test_rows_are_the_text_with_an_end_after_each_document(tmp_path: Path) -> None:
    for name, text in (("b.txt", "wxyz"), ("a.txt", "abc")):
        (tmp_path / name).write_text(text)
    batches = lm.token_batches(CHARACTERS, tmp_path, batch_size=2, length=4)
    assert [batch.tolist() for batch in batches] == [[[97, 98, 99, 0], [119, 120, 121, 122]]]


def test_a_seed_shuffles_rows_and_loses_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwx")
    rows = [
        [
            tuple(row)
            for batch in lm.token_batches(CHARACTERS, tmp_path, batch_size=3, length=4, seed=seed)
            for row in batch.tolist()
        ]
        for seed in (None, 1, 1, 2)
    ]
    assert rows[1] == rows[2] != rows[3]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[3])


def test_jsonl_and_token_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "ab"}) + "\n\n" + json.dumps({"prompt": "c", "completion": "d"}) + "\n")
    assert list(lm.read_texts(file)) == ["ab", "cd"]
    np.save(tmp_path / "t.npy", np.arange(10, dtype=np.uint16))
    batches = lm.token_batches(CHARACTERS, [file, tmp_path / "t.npy"], batch_size=1, length=4, max_batches=3)
    assert [batch.tolist()[0] for batch in batches] == [[97, 98, 0, 99], [100, 0, 0, 1], [2, 3, 4, 5]]


def test_files_that_are_no_text_are_passed_over_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "b.txt").write_text("text")
    assert list(lm.read_texts(tmp_path)) == ["text"]
    with pytest.raises(mt.InvalidArgumentError, match="is not UTF-8 text"):
        list(lm.read_texts(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("sources", "options", "text"),
    [
        (["a.txt"], {"batch_size": 0}, "batch_size=0: give a whole number of at least 1"),
        (["a.txt"], {"length": 0}, "length=0"),
        (["a.txt"], {"max_batches": 0}, "max_batches=0"),
        (["a.txt"], {}, "6 tokens in .*a.txt.* make 0 rows of 256"),
        ([], {}, "sources is empty"),
        (["nowhere"], {}, "no file or folder .*nowhere"),
        (["nowhere.npy"], {}, "no file .*nowhere.npy"),
        (["floats.npy"], {}, "holds float64: tokens are whole numbers"),
        (["broken.jsonl"], {}, "Line 2 of .*broken.jsonl.* is not JSON"),
        (["other.jsonl"], {}, r"holds \['words'\]: a document is under 'text'"),
        (["list.jsonl"], {}, "holds list"),
        (["empty"], {}, "No text file lies below"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, sources: list[str], options, text: str) -> None:
    (tmp_path / "a.txt").write_text("abcde")
    np.save(tmp_path / "floats.npy", np.zeros(4))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(mt.InvalidArgumentError, match=text):
        lm.token_batches(CHARACTERS, [tmp_path / name for name in sources], **options)
