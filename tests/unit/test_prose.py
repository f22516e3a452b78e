"""Words with plainer ones are found in text, and not in code."""

from __future__ import annotations

from pathlib import Path

from tools.prose import CHECKOUT, WORDS, found_in

RULES = {"whoever": "the process", "strays?": "unrelated process"}
DOCUMENT = """# Title

Whoever reads this, and `whoever` is a name.

```python
whoever = "in code"
```
A [stray](whoever.md) process.
"""
MODULE = '''"""Tells whoever asks."""
whoever = f"a stray {__name__}"  # strays
'''


def test_they_are_found_in_text_comments_and_strings(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(DOCUMENT)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "module.py").write_text(MODULE)
    assert sorted(found_in(tmp_path, RULES)) == [
        "README.md:3: 'Whoever'; write: the process",
        "README.md:8: 'stray'; write: unrelated process",
        "plugin/module.py:1: 'whoever'; write: the process",
        "plugin/module.py:2: 'stray'; write: unrelated process",
        "plugin/module.py:2: 'strays'; write: unrelated process",
    ]


def test_the_rules_are_where_they_are_looked_for() -> None:
    assert WORDS.is_relative_to(CHECKOUT) and "whoever" in WORDS.read_text()
