from __future__ import annotations

import pytest

from mlx_tune.cli.demo.corpus import read_corpus
from mlx_tune.errors import InvalidArgumentError


def test_held_out_text_is_apart_from_training_text(text):
    corpus = read_corpus(str(text))
    assert corpus.held_out
    assert not set(corpus.held_out) & set(corpus.training)
    assert len(corpus.held_out) + len(corpus.training) == 24


def test_a_single_file_is_cut_so_that_some_can_be_held_out(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i}\n" for i in range(500)))
    corpus = read_corpus(str(file))
    assert corpus.held_out
    assert "".join(sorted(corpus.held_out + corpus.training, key=lambda t: int(t.split()[1]))) == file.read_text()


def test_too_little_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InvalidArgumentError, match="too little text"):
        read_corpus(str(tmp_path / "empty.txt"))


def test_the_standard_library_is_the_default():
    corpus = read_corpus(None)
    assert sum(map(len, corpus.training)) > 1_000_000
    assert len(corpus.held_out) > 5
