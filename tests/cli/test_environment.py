"""What depends on the machine: the allocator's setting, ``zephyr-lite env``, and machines that are not supported."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from zephyr_lite import __main__ as entry
from zephyr_lite.cli import environment
from zephyr_lite.cli.app import run
from zephyr_lite.config.load import MemorySpec
from zephyr_lite.errors import UserError
from zephyr_lite.memory import machine as machine_file
from zephyr_lite.model import activation_offload
from zephyr_lite.model.allocator import is_wsl, set_allocator
from zephyr_lite.model.base import compute_device

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
        (LINUX, {NAMES[1]: "backend:native"}, (None, "backend:native")),
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


@pytest.mark.parametrize(("release", "expected"), [(LINUX, "expandable_segments:True"), (WSL, None)])
def test_training_sets_the_allocator(release, expected, kernel, monkeypatch, tmp_path):
    kernel(release)
    monkeypatch.chdir(tmp_path)
    assert run(["sft", "model_name_or_path=nowhere", "dataset=nothing.jsonl", "output_dir=run"]) == 2
    assert os.environ.get(NAMES[0]) == expected


def test_the_allocator_is_set_before_torch_is_imported():
    program = "import sys, zephyr_lite.model.allocator; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
    [
        ((7, 0), False, "whl/cu126"),
        ((12, 0), False, "newer CUDA"),
        ((7, 5), True, "float16 with loss scaling"),
        ((8, 9), True, ""),
    ],
)
def test_env_tries_whether_torch_computes_on_the_card(capability, works, says, card):
    card(capability, works)
    finding = environment.gpu()
    assert f"compute capability {capability[0]}.{capability[1]}" in finding.found
    assert says in finding.cure and bool(says) == bool(finding.cure)
    assert ("no kernel image" in finding.cure) == (not works)


def test_a_rocm_build_is_refused(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UserError, match="is a ROCm build; zephyr-lite supports NVIDIA cards only"):
        compute_device()
    (said,) = [finding for finding in environment.survey() if "ROCm" in finding.line()]
    assert "HIP_VISIBLE_DEVICES=-1" in said.cure


def test_windows_is_refused_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "zephyr_lite.cli.app", None)  # an import of it would fail
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: zephyr-lite does not run on native Windows.\nInstall it and run it inside WSL2.\n"
    )


def test_under_wsl_the_plan_has_what_can_be_locked_and_the_allocator_no_more_than_is_free(monkeypatch):
    device, gib = torch.device("cuda", 0), 2**30
    for module, name, value in (
        (machine_file, "main_memory", 32 * gib),
        (activation_offload, "lockable", 3 * gib),
        (machine_file, "is_wsl", True),
        (machine_file, "free_memory", 10 * gib),
        (torch.cuda, "get_device_capability", (8, 6)),
        (torch.cuda, "get_device_name", "A card"),
        (torch.cuda, "memory_allocated", 2 * gib),
        (torch.cuda, "get_device_properties", SimpleNamespace(total_memory=16 * gib)),
    ):
        monkeypatch.setattr(module, name, lambda *a, value=value: value)
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    machine = machine_file.this_machine(device, torch.float16, MemorySpec(), measure=False)
    assert (machine.free, machine.host) == (10 * gib, 3 * gib)
    machine_file.cap_allocator(device, MemorySpec())
    machine_file.cap_allocator(device, MemorySpec(vram="6.75GiB"))  # of which the context takes 0.75
    assert fractions == [(12 / 16, device), (8 / 16, device)]
    monkeypatch.setattr(machine_file, "is_wsl", lambda: False)
    assert machine_file.this_machine(device, torch.float16, MemorySpec(), measure=False).host == 16 * gib
    machine_file.cap_allocator(device, MemorySpec())
    machine_file.cap_allocator(torch.device("cpu"), MemorySpec())
    assert len(fractions) == 2


def test_env_names_wsl_and_says_what_is_off_there(kernel):
    kernel(WSL)
    found = environment.system().found
    assert "(WSL2)" in found and "expandable_segments is off" in found
    kernel(LINUX)
    found = environment.system().found
    assert "WSL" not in found and "expandable_segments" not in found
