"""Numbers of YAML 1.1 that nobody means: 010 is 8 there, 1:30 is 90. In a file and on the command line: value -> value or error."""

from __future__ import annotations

import pytest

from zephyr_lite.config.load import load_config
from zephyr_lite.config.strict_yaml import read_yaml
from zephyr_lite.errors import UserError

OTHER_BASE = "is a number of base 8 or 60"


@pytest.mark.parametrize("value", ["010", "-010", "+017", "00", "0_7", "1:30", "1:30:00", "-1:30", "1:30.5"])
def test_other_bases_are_refused(tmp_path, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"stage: x\nseed: {value}\n")
    with pytest.raises(UserError, match=f"c.yaml line 2: .*{OTHER_BASE}"):
        load_config("sft", str(file), [])
    with pytest.raises(UserError, match=f"the command line: .*{OTHER_BASE}"):
        load_config("sft", None, [f"seed={value}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("10", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1.5e-3", 0.0015),
        ("'010'", "010"),
        (".inf", float("inf")),
    ],
)
def test_numbers_as_they_look_are_read(tmp_path, text, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"key: {text}\n")
    assert read_yaml(file) == {"key": value}


@pytest.mark.parametrize("text", ["0012345", "010", "1:30", "2024", "1e5"])
def test_a_key_whose_value_is_a_text_takes_it_as_it_is(text):
    assert load_config("sft", None, [f"model_revision={text}"]).config.model_revision == text
