"""What a library compiles while it is imported is compiled when it is called, and computes the same."""

import pytest
import torch

from zephyr_lite.ops.compile_later import compile_later


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[str, dict]]:
    """Stands for torch.compile, which takes seconds; the functions that it was given, and how."""
    calls = []

    def compile_now(model, **options):
        calls.append((model.__name__ if hasattr(model, "__name__") else type(model).__name__, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    return calls


def test_compiled_at_the_first_call_and_once(compiled):
    with compile_later():

        @torch.compile
        def one(x):
            """One more."""
            return x + 1

        @torch.compile(dynamic=False)
        def two(x):
            return x + 2

        layer = torch.nn.Identity()
        assert torch.compile(layer) is layer  # a module is no function: at once
    assert compiled == [("Identity", {})] and one.__name__ == "one" and one.__doc__ == "One more."
    assert [one(1), one(2), two(3)] == [2, 3, 5]
    assert compiled == [("Identity", {}), ("one", {}), ("two", {"dynamic": False})]


def test_torch_compile_is_itself_again_where_the_import_fails(compiled):
    now = torch.compile
    with pytest.raises(ModuleNotFoundError), compile_later():
        import no_such_library  # noqa: F401
    assert torch.compile is now
