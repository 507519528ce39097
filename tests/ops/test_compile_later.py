"""A function that a library compiles while it is imported is compiled at its first call."""

import pytest
import torch

from zephyr_lite.ops.compile_later import compile_later


def test_functions_are_compiled_at_their_first_call_and_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append((model, options)) or model)
    now = torch.compile
    with compile_later():

        @torch.compile(dynamic=False)
        def one(x):
            """One more."""
            return x + 1

        layer = torch.nn.Identity()
        assert torch.compile(layer) is layer  # a module is no function: at once
    assert calls == [(layer, {})] and one.__doc__ == "One more." and torch.compile is now
    assert [one(1), one(2)] == [2, 3]
    assert [options for _, options in calls] == [{}, {"dynamic": False}]
    with pytest.raises(ModuleNotFoundError), compile_later():
        import no_such_library  # noqa: F401
    assert torch.compile is now
