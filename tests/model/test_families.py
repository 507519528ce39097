"""The guide to a new family."""

import re
from pathlib import Path


def test_the_guide_names_what_is_there():
    """Files and tests of docs/extending.md exist, its entry is the one of the table, and each row's file reads what it says."""
    root = Path(__file__).parents[2]
    guide = (root / "docs" / "extending.md").read_text()
    named = set(re.findall(r"`((?:zephyr_lite|tests|docs)/[\w/.]+)`", guide))
    assert len(named) > 15 and not [name for name in named if not (root / name).exists()]
    tests = set(re.findall(r"`(test_\w+)`", guide))
    code = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(tests) > 6 and not [name for name in tests if f"def {name}(" not in code]
    told = re.sub(r"\s*#.*", "", guide.split("```python\n", 1)[1].split("```")[0])
    source = (root / "zephyr_lite" / "model" / "families.py").read_text()
    assert "".join(told.split()) in "".join(re.sub(r"\s*#.*", "", source).split())
