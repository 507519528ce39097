"""What depends on the machine: the allocator's setting, ``zephyr-lite env``, and machines that are not supported."""

import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch

from zephyr_lite import __main__ as entry
from zephyr_lite.cli import environment
from zephyr_lite.model.allocator import is_wsl, set_allocator

WSL, LINUX = "5.15.167.4-microsoft-standard-WSL2", "6.8.0-51-generic"
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def kernel(monkeypatch):
    """Set the kernel's release, and leave the allocator as a new shell has it."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what is set later
        monkeypatch.delenv(name)
    return lambda release: monkeypatch.setattr(platform, "release", lambda: release)


@pytest.mark.parametrize(
    ("release", "given", "expected"),
    [
        (LINUX, {}, ("expandable_segments:True", None)),
        (WSL, {}, (None, None)),
        (LINUX, {NAMES[0]: "backend:native"}, ("backend:native", None)),
        (WSL, {NAMES[0]: "expandable_segments:True"}, ("expandable_segments:True", None)),
    ],
)
def test_segments_are_expandable_but_under_wsl_and_where_the_user_configured_them(
    release, given, expected, kernel, monkeypatch
):
    kernel(release)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_allocator()
    assert tuple(map(os.environ.get, NAMES)) == expected
    assert is_wsl() == (release == WSL)


@pytest.fixture
def card(monkeypatch):
    """A card of this compute capability; torch's kernels run on it, or not."""

    def put(capability, works=True):
        properties = SimpleNamespace(name="A card", total_memory=16 * 2**30, major=capability[0], minor=capability[1])
        for name, value in {
            "is_available": True,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_capability": capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        ones = torch.ones

        def tried(*shape, device):
            if not works:
                raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
            return ones(*shape)

        monkeypatch.setattr(torch, "ones", tried)

    return put


@pytest.mark.parametrize(
    ("capability", "works", "says"),
    [((7, 0), False, "whl/cu126"), ((7, 5), True, "float16 with loss scaling")],
)
def test_env_tries_whether_torch_computes_on_the_card(capability, works, says, card):
    card(capability, works)
    finding = environment.gpu()
    assert f"compute capability {capability[0]}.{capability[1]}" in finding.found
    assert says in finding.cure and bool(says) == bool(finding.cure)
    assert ("no kernel image" in finding.cure) == (not works)


def test_windows_is_refused_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "zephyr_lite.cli.app", None)  # an import of it would fail
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: zephyr-lite does not run on native Windows.\nInstall it and run it inside WSL2.\n"
    )


def test_a_module_of_another_package_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", "torch yaml")  # of PyYAML, as ROCm's triton is of pytorch-triton-rocm
    assert environment.packages().found == f"torch {torch.__version__}"
