"""docs/troubleshooting.md quotes lines of mmlane: the words of each quotation stand in a string of its code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs/troubleshooting.md"
PACKAGES = ("plugin", "patches")
ANY = "*"  # stands for the word that a string is filled with

_FILLED = re.compile(r"%[-+ #0]*[\d.]*[a-zA-Z]|\{[^{}]*\}")
# What a quotation has in place of a value: dots, words in capitals, numbers, paths, flags; and what joins strings.
_VALUE = re.compile(r"\.\.\.|\b[A-Z][A-Z_]*\b|\[?\b\d[\d.]*\b\]?|/\w+/[\w/]+|(?<!\w)--?\w[\w-]*|[:;,()=]")

Words = tuple[str, ...]


def quotations() -> list[str]:
    """What stands in backquotes in the first column of the page's tables, but for the engine's own lines."""
    found: list[str] = []
    _, heading, ours = PAGE.read_text(encoding="utf-8").partition("\n## At start\n")
    assert heading
    for line in ours.splitlines():
        if line.startswith("| `"):
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


@cache
def code() -> list[Words]:
    """The words of all strings of the packages."""
    found: set[Words] = set()
    for package in PACKAGES:
        for module in sorted((CHECKOUT / package).rglob("*.py")):
            found.update(words_of(string) for string in strings_of(ast.parse(module.read_text(encoding="utf-8"))))
    return sorted(found)


def strings_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else f" {ANY} " for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _FILLED.sub(f" {ANY} ", node.value)


def words_of(string: str) -> Words:
    return tuple(re.sub(r"[:;,()=`]", " ", string).split())


def lies_in(words: Words, string: Words, *, to_the_end: bool = False) -> bool:
    """Whether a string begins with these words, and, if asked, has no others."""
    if not words or not string:
        return not words and not (to_the_end and string)
    if string[0] == ANY:
        return any(lies_in(words[filled:], string[1:], to_the_end=to_the_end) for filled in range(2))
    return words[0] == string[0] and lies_in(words[1:], string[1:], to_the_end=to_the_end)


def is_said(words: Words) -> bool:
    """Whether the code has these words in one string, or as the end of one and the begin of another."""

    def somewhere(words: Words, to_the_end: bool = False) -> bool:
        return any(
            lies_in(words, string[start:], to_the_end=to_the_end)
            for string in code()
            for start, word in enumerate(string)
            if word == words[0]
        )

    def at_the_begin(words: Words) -> bool:
        return any(lies_in(words, string) for string in code() if string and string[0] == words[0])

    return somewhere(words) or any(
        somewhere(words[:cut], to_the_end=True) and at_the_begin(words[cut:]) for cut in range(1, len(words))
    )


def test_quotations_are_found() -> None:
    assert len(quotations()) > 90


@pytest.mark.parametrize("quotation", quotations())
def test_the_words_of_a_quoted_line_stand_in_the_code(quotation: str) -> None:
    parts = map(words_of, _VALUE.split(quotation))
    assert [part for part in parts if len(part) > 2 and not is_said(part)] == []


def test_a_word_that_the_code_does_not_say_is_noticed() -> None:
    assert is_said(("features", "travel", "inline")) and not is_said(("features", "walk", "inline"))
