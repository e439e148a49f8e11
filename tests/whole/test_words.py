"""The documents are in plain words: short sentences, and not too many of them. `docs/log.md` is free."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]

NO_TEXT = [
    r"^ *```.*?^ *```",  # code between fences
    r"(?<=\n\n)(?: {4}[^\n]*\n+)+",  # code by indentation
    r"<!--.*?-->|</?[a-z][^<>]*>",  # HTML
    r"!\[[^\]]*\]\([^)]*\)",  # images
    r"(?<=\])\([^)]*\)",  # targets of links
]


def text_of(page):
    """A page without code blocks, HTML, images and targets of links; tables and headings are still there."""
    for pattern in NO_TEXT:
        page = re.sub(pattern, "", page, flags=re.M | re.S)
    return page


def count(text):
    """Words: whatever stands between white space and has a letter or a digit in it."""
    return sum(bool(re.search(r"[^\W_]", word)) for word in text.split())


def sentences(page):
    """The prose, cut at . ! or ? before white space, at blank lines, and where a list item, table or heading begins."""
    prose = re.sub(r"^\s*[|#].*$", "", text_of(page), flags=re.M)
    prose = re.sub(r"^\s*(?:[-*+]|\d+\.) ", "\n\n", prose, flags=re.M)  # the mark of a list item
    blocks = re.split(r"\n\s*\n", prose)
    parts = [part for block in blocks for part in re.split(r"(?<=[.!?])[*)\"']*(?:\s+|$)", block)]
    return [" ".join(part.split()) for part in parts if count(part)]


def read(file):
    return (ROOT / file).read_text()


def longest_sentence(file):
    return f"The longest sentence of {file}:\n" + max(sentences(read(file)), key=count)


def test_the_measure_on_a_small_page():
    page = """# A heading. It does not count

One [link of five words](https://example.com/a.b) counts `five` words. Is this
the second? **Bold.** 1.5 is one word (so is a - b).
![a picture](x.png) <br>
| a table | with cells. |
|---|---|

    indented code. More of it.

- an item without a full stop
- the next one:
  ```bash
  fenced code. More of it.
  ```
1. numbered
"""
    expected = {"One [link of five words] counts `five` words.": 8, "Is this the second?": 4, "**Bold.": 1}
    expected |= {"1.5 is one word (so is a - b).": 8}
    expected |= {"an item without a full stop": 6, "the next one:": 3, "numbered": 1}
    assert {sentence: count(sentence) for sentence in sentences(page)} == expected
    heading, table, number = 6, 4, 1
    assert count(text_of(page)) == sum(expected.values()) + heading + table + number


@pytest.mark.parametrize("file", FILES)
def test_sentences_are_short(file):
    lengths = [count(sentence) for sentence in sentences(read(file))]
    mean = sum(lengths) / len(lengths)
    seen = f"{file}: {mean:.1f} words a sentence (under 20), the longest has {max(lengths)} (at most 35). "
    assert mean < 20 and max(lengths) <= 35, seen + longest_sentence(file)


def test_the_readme_is_short():
    prose, lines = sum(map(count, sentences(read("README.md")))), read("README.md").count("\n")
    seen = f"README.md: {prose} words of prose (under 900), {lines} lines (under 200). "
    assert prose < 900 and lines < 200, seen + longest_sentence("README.md")


def test_the_documents_are_short():
    lengths = {file: count(text_of(read(file))) for file in FILES}
    total, design = sum(lengths.values()), lengths["docs/design.md"]
    seen = f"{design} words in docs/design.md (under 2,500), {total} in all (under 21,700): {lengths}. "
    assert design < 2500 and total < 21_700, seen + longest_sentence(max(lengths, key=lengths.get))
