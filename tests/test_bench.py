"""The bench runs, and counts what it should."""

import json

import pytest

from bench import compare, turns


def test_tiny(tmp_path, capsys):
    out = tmp_path / "compare.json"
    compare.main(["--tiny", "--sweep", "--out", str(out)])
    results = json.loads(out.read_text())
    found = {method: results[method]["variants"] for method in ("sft", "dpo")}
    assert list(found["sft"]) == ["fused", "trl", "trl recompute", "trl padded"]
    assert set(found["dpo"]) >= {"fused live", "fused cached", "trl live", "trl live recompute", "trl cached"}
    for variants in found.values():
        tokens = [v["tokens"] for v in variants.values()]
        assert len(tokens[0]) == 2 and all(t == tokens[0][: len(t)] for t in tokens)  # the same rows in the same rounds
    # medians of quotients: of the sign of what was measured, and no more can be said of a tiny model
    assert results["sft"]["ratios"].keys() == {f"fused over {best}" for best in [_fastest(found["sft"])]}
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "fused cached over trl live" in printed


def _fastest(variants):
    return min((v for v in variants if v.startswith("trl")), key=lambda name: variants[name]["seconds"][0])


def test_one_engine_alone(tmp_path, capsys):
    results = compare.main(["--tiny", "--engines", "fused", "--methods", "sft"])
    assert list(results["sft"]["variants"]) == ["fused"] and results["sft"]["ratios"] == {}
    assert "dpo" not in results


def test_a_variant_that_fails_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "fused", None)
    with pytest.raises(compare.UserError, match="fused"):
        compare.main(["--tiny", "--engines", "fused", "--methods", "sft"])
