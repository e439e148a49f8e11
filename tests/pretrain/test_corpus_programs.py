"""The corpus of programs: in the prompt's form, a third careful, with slips that are wrong, and no held-out task."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data import load, programs
from grpo.policy import model_directory
from grpo.pretrain import corpus_programs
from grpo.pretrain.__main__ import train_tokenizer

PROGRAM = re.compile(r'def f\(x, y\):\n    """(.*)"""\n    return (.*)')
CALCULATION = ("x", "-", "y"), (("*", "7"), ("+", "2"))


@pytest.fixture(scope="module")
def written():
    """[sentence, expression] of every program of 500 documents."""
    texts = list(islice(corpus_programs.corpus(0), 500))
    assert all(PROGRAM.fullmatch(part) for text in texts for part in text.split("\n\n"))
    return [PROGRAM.fullmatch(part).groups() for text in texts for part in text.split("\n\n")]


def test_a_hasty_author_leaves_something_out():
    slips = {corpus_programs.hasty(CALCULATION, random.Random(seed)) for seed in range(50)}
    assert slips == {"x - y * 7 + 2", "(x - y) * 7", "(x - y * 7 + 2"}
    assert corpus_programs.hasty((("x", "+", "3"), ()), random.Random(0)) == "x + 3", "nothing can be left out"


def test_parentheses_are_closed_in_a_third_of_the_programs_that_need_them(written):
    needed = [line for sentence, line in written if re.search(r"(plus|sum|minus).*multiply", sentence)]
    careful = sum("(" in line and line.count("(") == line.count(")") for line in needed)
    assert 0.25 < careful / len(needed) < 0.5


def test_no_held_out_task_is_in_the_corpus(written):
    held_out = {p.info["question"] for split in ("validation", "test") for p in load("programs", split)}
    assert not held_out & {sentence for sentence, _ in written}


def test_the_corpus_follows_its_seed():
    first, again, other = (list(islice(corpus_programs.corpus(seed), 5)) for seed in (0, 0, 1))
    assert first == again != other
    assert programs.SIZES["test"] >= 300


def test_the_shipped_model_reads_this_corpus_and_both_are_small():
    directory = Path(model_directory("embedded_programs"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = list(islice(corpus_programs.corpus(0), 2000))
    assert tokenizer.get_vocab() == train_tokenizer(texts).get_vocab()
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    files = [file for name in ("embedded", "embedded_programs") for file in Path(model_directory(name)).iterdir()]
    assert sum(file.stat().st_size for file in files) < 8_000_000
