"""Words with plainer ones are found in text, and not in code."""

from __future__ import annotations

from pathlib import Path

from tools.prose import CHECKOUT, WORDS, found_in

# Words that plain_words.yaml does not have, since the linter reads this file too.
RULES = {"utilise": "use", "leverages?": "uses"}
DOCUMENT = """# Title

Utilise this, and `utilise` is a name.

```python
utilise = "in code"
```
A [leverage](utilise.md) of 2.
"""
MODULE = '''"""Tells how to utilise it."""
utilise = f"a leverage {__name__}"  # leverages
'''


def test_they_are_found_in_text_comments_and_strings(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(DOCUMENT)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "module.py").write_text(MODULE)
    assert sorted(found_in(tmp_path, RULES)) == [
        "README.md:3: 'Utilise'; write: use",
        "README.md:8: 'leverage'; write: uses",
        "plugin/module.py:1: 'utilise'; write: use",
        "plugin/module.py:2: 'leverage'; write: uses",
        "plugin/module.py:2: 'leverages'; write: uses",
    ]


def test_the_rules_are_where_they_are_looked_for() -> None:
    assert WORDS.is_relative_to(CHECKOUT) and "lane" in WORDS.read_text()
