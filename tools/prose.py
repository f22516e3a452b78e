"""Looks for words that `plain_words.yaml` advises against: python -m tools.prose

In documents: their text, without code. In the packages: comments and strings, docstrings among them. One line for
each place; exit status 1 if there is any.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
WORDS = Path(__file__).with_name("plain_words.yaml")
DOCUMENTS = ("*.md", "docs/*.md", "changelog.d/*.md", ".github/*.md")
PACKAGES = ("plugin", "patches", "devkit", "tools", "bench", "tests")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
_SPOKEN = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # from 3.12 on

Text = tuple[int, str]  # the number of a line, and what stands there
Read = Callable[[Path], Iterator[Text]]


def text_of(document: Path) -> Iterator[Text]:
    """The lines of a document; code in it is left out, and counts as a line all the same."""
    plain = _CODE.sub(lambda code: "\n" * code.group().count("\n"), document.read_text(encoding="utf-8"))
    return enumerate(plain.splitlines(), start=1)


def words_of(module: Path) -> Iterator[Text]:
    """The comments and strings of a module."""
    with module.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in _SPOKEN:
                yield from enumerate(token.string.splitlines(), start=token.start[0])


def found_in(checkout: Path, words: dict[str, str]) -> Iterator[str]:
    """A line for each place that has one of the words."""
    rules = [(re.compile(rf"\b(?:{word})\b", re.IGNORECASE), instead) for word, instead in words.items()]
    texts: list[tuple[Path, Read]] = []
    for pattern in DOCUMENTS:
        texts += [(path, text_of) for path in sorted(checkout.glob(pattern))]
    for package in PACKAGES:
        texts += [(path, words_of) for path in sorted((checkout / package).rglob("*.py"))]
    for path, read in texts:
        for number, line in read(path):
            for rule, instead in rules:
                if match := rule.search(line):
                    yield f"{path.relative_to(checkout)}:{number}: {match.group()!r}; write: {instead}"


def main() -> int:
    found = list(found_in(CHECKOUT, yaml.safe_load(WORDS.read_text(encoding="utf-8"))))
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
