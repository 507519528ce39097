"""Qwen2 in the memory account, and the guide to a new family."""

import re
from pathlib import Path

import pytest
import torch

from tests.contract.test_families import MIXED, qwen2, save_tokenizer
from zephyr_lite.config.load import RunConfig
from zephyr_lite.memory.estimate import base_bytes, slab_bytes
from zephyr_lite.memory.speed import attention_operations
from zephyr_lite.memory.workload import make_workload
from zephyr_lite.model.base import load_base
from zephyr_lite.model.weight_streaming import WeightStreamer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    qwen2(eos_token_id=0, **MIXED).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_the_account_knows_its_biases_and_the_time_its_windows(base):
    config = RunConfig(load_in_4bit=False)
    model = qwen2(**MIXED)
    job = make_workload(config, "sft", model.config, torch.float32, longest=36)
    assert sum(base_bytes(job).values()) == sum(p.nbytes for p in model.parameters())  # the tied head once
    assert attention_operations(job) == 4 * 64 * (36 / 2 + 9 - 81 / 72) / 2
    settings = RunConfig(model_name_or_path=str(base))
    loaded = load_base(settings)
    job = make_workload(settings, "sft", loaded.model.config, loaded.dtype)
    small = [p for n, p in loaded.model.named_parameters() if "norm" in n or n.endswith("bias")]
    assert len(small) == 11 and base_bytes(job)["norms"] == sum(p.nbytes for p in small)
    assert [slab.numel() for slab in WeightStreamer(loaded.model, torch.device("cpu")).slabs] == [slab_bytes(job)] * 2


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
