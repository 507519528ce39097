"""Make the writes of a run fail, each in turn, and see that nothing is lost.

    python -m tests.faults [--every 1] [--kind full ...] [--command sft ...]

``faulty`` patches what touches the disk (the last functions of ``zephyr_lite.io.atomic``): the k-th call fails. After an error
the state of before has to load and the message to name the file; then, after an error as after a death, the same command
has to end with what an undisturbed one leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.kill import Ground, faults, ground, standing
from zephyr_lite.cli import app as cli
from zephyr_lite.io import atomic as files
from zephyr_lite.io.manifest import manifest_fault
from zephyr_lite.io.safetensors import SafetensorsFile
from zephyr_lite.model.peft_io import adapter_sha256
from zephyr_lite.train import reference

PRIMITIVES = ("_open", "_write", "_fsync", "_rename", "_exchange", "_mkdir", "_unlink", "_remove_tree")
REMOVING = {"_unlink", "_remove_tree"}
# full: no space; io: the device fails; short: half is written, then no space; died: the process ends before the call;
# torn: it ends when half is written
KINDS = ("full", "io", "short", "died", "torn")
NUMBERS = {"full": errno.ENOSPC, "short": errno.ENOSPC, "io": errno.EIO}


class Died(BaseException):
    """The process is gone: nothing it would still do reaches the disk."""


@dataclass
class Layer:
    """What reached the disk.

    Attributes:
        at, kind: the call that fails (from 0; None: none), and how.
        calls: (primitive, path) of every call.
        unsafe: what a power failure could have taken: renamed before it was flushed.
    """

    at: int | None = None
    kind: str = "full"
    calls: list[tuple[str, str]] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    dead: bool = False
    full: bool = False
    flushed: set[tuple[int, int]] = field(default_factory=set)
    plain: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, name: str, *words: Any) -> Any:
        if self.dead:
            raise Died
        number, path = len(self.calls), _path(words[-1] if name in ("_rename", "_exchange") else words[0])
        self.calls.append((name, path))
        if self.full and name == "_write":  # the other half of a short write
            self.full = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number == self.at:
            if self.kind in ("short", "torn"):
                assert name == "_write"
                written = self.plain[name](words[0], bytes(words[1])[: max(1, len(words[1]) // 2)])
                self.dead, self.full = self.kind == "torn", self.kind == "short"
                if self.dead:
                    raise Died
                return written
            if self.kind == "died":
                self.dead = True
                raise Died
            raise OSError(NUMBERS[self.kind], os.strerror(NUMBERS[self.kind]))
        self._watch(name, words)
        return self.plain[name](*words)

    def _watch(self, name: str, words: Sequence[Any]) -> None:
        if name == "_write":
            self.flushed.discard(_inode(words[0]))
        elif name == "_fsync":
            self.flushed.add(_inode(words[0]))
        elif name in ("_rename", "_exchange"):
            source = Path(words[0])
            for path in [source, *source.rglob("*")] if not source.name.startswith(".old-") else []:
                if _aside(source) and _inode(path) not in self.flushed:
                    self.unsafe.append(str(path))
            log = Path(words[1]).parent / "metrics.jsonl"
            if Path(words[1]).name.startswith("checkpoint-") and log.exists() and _inode(log) not in self.flushed:
                self.unsafe.append(f"{log}, of which {words[1]} knows")


def _aside(path: Path) -> bool:
    return files._ASIDE.fullmatch(path.name) is not None


def _inode(file: Any) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _path(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)


@contextmanager
def faulty(at: int | None = None, kind: str = "full") -> Iterator[Layer]:
    """Within, the call of that number fails; with None all are only noted."""
    layer = Layer(at, kind)
    layer.plain = {name: getattr(files, name) for name in PRIMITIVES}

    def through(name: str) -> Callable[..., Any]:
        return lambda *words: layer(name, *words)

    with patch.multiple(files, **{name: through(name) for name in PRIMITIVES}):
        yield layer


def fits(kind: str, primitive: str) -> bool:
    """Whether a call can fail so, and another way than by the other kinds."""
    return primitive == "_write" if kind in ("short", "torn") else primitive not in REMOVING or kind != "full"


# A whole run


def commands(on: Ground, out: Path) -> dict[str, list[str]]:
    """The three commands of a run."""
    keys = {
        "model_name_or_path": on.base,
        "output_dir": out,
        "max_length": 128,
        "batch_size": 2,
        "lora_r": 64,
        "learning_rate": 5e-3,
        "save_steps": 1,
        "eval_steps": 2,
        "max_steps": 3,
        "save_total_limit": 1,
        "sample_tokens": 3,
        "optim": "adamw_8bit",
        "lora_dropout": 0.1,
        "load_in_4bit": "false",
    }

    def words(**changes: Any) -> list[str]:
        return [f"{key}={value}" for key, value in {**keys, **changes}.items()]

    pairs = {"dataset.path": on.pairs, "eval_dataset.path": on.pairs, "max_prompt_length": 64, "max_steps": 2}
    return {
        "sft": ["sft", *words(**{"dataset.path": on.chats, "eval_dataset.path": on.chats})],
        "dpo": ["dpo", *words(**pairs, precompute_ref_log_probs="true")],
        "merge": ["merge", "--run", str(out), "--out", str(out / "merged"), "--no-check", "--overwrite"],
    }


def run(words: list[str]) -> tuple[int, str]:
    """A command in this process: its exit code and what it said."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = cli.run(words)
    return code, said.getvalue()


def wrong_now(out: Path) -> Iterator[str]:
    """What in a run's folder does not load, whatever happened to the process that wrote it."""
    for path in [*out.glob("*/stage.json"), *out.glob("*/[!.]*/*.json"), *out.glob("merged/*.json")]:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            yield f"{path}: {error}"
    for path in out.glob("*/checkpoint-*"):
        if (wrong := manifest_fault(path)) is not None:
            yield f"{path}: {wrong}"
    for path in [*out.glob("*/reference-*.safetensors"), *out.glob("merged/*.safetensors")]:
        SafetensorsFile(path)
    for path in out.glob("*/stage.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        adapter = path.parent / "adapter"
        if info["status"] == "complete" and adapter_sha256(adapter) != info["adapter_sha256"]:
            yield f"{adapter}: is not what stage.json says"
        if adapter.is_dir() and not {"adapter_config.json", "tokenizer.json"} <= {p.name for p in adapter.iterdir()}:
            yield f"{adapter}: is not complete"
    merged = out / "merged"
    if merged.is_dir() and not {"config.json", "tokenizer.json", "zephyr_lite.json"} <= {
        p.name for p in merged.iterdir()
    }:
        yield f"{merged}: is not complete"


def left_aside(out: Path) -> list[str]:
    return [str(path) for path in out.rglob(".*") if _aside(path)]


def last_checkpoint(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in out.glob("*/checkpoint-*")), default=0)


@dataclass
class Trial:
    """A run, what each of its commands begins with and leaves, and what each writes."""

    folder: Path
    on: Ground
    out: Path = field(init=False)
    words: dict[str, list[str]] = field(init=False)
    calls: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    right: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The undisturbed run. Every other one has its folder's name: it is in the files."""
        self.out = self.folder / "run"
        self.words = commands(self.on, self.out)
        for name, words in self.words.items():
            self.keep(name)
            with faulty() as layer:
                code, said = run(words)
            assert code == 0, said
            assert not layer.unsafe, f"renamed before it was flushed: {layer.unsafe}"
            self.calls[name] = layer.calls
            self.right[name] = standing(self.out)
            assert not [*faults(self.out), *wrong_now(self.out)]
        # the merge of all others replaces an earlier one
        shutil.rmtree(self.folder / "before-merge")
        self.keep("merge")
        with faulty() as layer:
            code, said = run(self.words["merge"])
        assert code == 0 and standing(self.out) == self.right["merge"], said
        self.calls["merge"] = layer.calls

    def keep(self, name: str) -> None:
        if self.out.exists():
            shutil.copytree(self.out, self.folder / f"before-{name}")

    def put_back(self, name: str) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if (before := self.folder / f"before-{name}").exists():
            shutil.copytree(before, self.out)

    def points(self, name: str, kind: str) -> list[int]:
        return [k for k, (primitive, _) in enumerate(self.calls[name]) if fits(kind, primitive)]

    def what(self, name: str, at: int) -> str:
        """The call's file, for people: numbers of steps and of asides are not told."""
        primitive, path = self.calls[name][at]
        parts = [_plain(part) for part in Path(os.path.relpath(path, self.out)).parts]
        return f"{primitive.strip('_')} {'/'.join(parts)}"

    def fail(self, name: str, at: int, kind: str) -> list[str]:
        """One fault; what was wrong afterwards."""
        self.put_back(name)
        with faulty(at, kind) as layer:
            try:
                code, said = run(self.words[name])
            except Died:
                code, said = -1, ""
        assert len(layer.calls) > at, "the call never came"
        wrong = [f"unsafe: {path}" for path in layer.unsafe]
        wrong += wrong_now(self.out)
        primitive, path = layer.calls[at]
        if kind in NUMBERS and primitive not in REMOVING:
            # after a rename the folder above is flushed: the message names what was renamed
            target = str(self.out) if Path(path).is_dir() else _plain(Path(path).name, steps=False)
            told = os.strerror(NUMBERS[kind]) in " ".join(said.split()) and target in "".join(said.split())
            if code != 2 or not told or "Traceback" in said:
                wrong.append(f"{target}: ended with {code} and said {said[-400:]!r}")
            wrong += [f"{path} is left" for path in left_aside(self.out)]
        elif kind in NUMBERS and code != 0:
            wrong.append(f"what could not be removed ended the command: {said[-400:]!r}")
        code, said = run(self.words[name])
        if code != 0:
            return [*wrong, f"the same command ended with {code} and said {said[-400:]!r}"]
        if primitive in REMOVING:  # what could not be deleted stays aside where the stage is not opened again
            for rest in left_aside(self.out):
                shutil.rmtree(rest)
        found, right = standing(self.out), self.right[name]
        wrong += [f"{file} differs" for file in right.keys() | found.keys() if right.get(file) != found.get(file)]
        return [*wrong, *faults(self.out), *wrong_now(self.out)]


def _plain(part: str, *, steps: bool = True) -> str:
    found = files._ASIDE.fullmatch(part)
    part = found["name"] if found else part
    return "checkpoint-N" if steps and part.startswith("checkpoint-") else part


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only each n-th call of a kind")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--command", action="append", choices=("sft", "dpo", "merge"))
    asked = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    os.environ.pop("ZEPHYR_LITE_CACHE", None)
    reference.SAVE_SECONDS = 0.0  # every group of pairs
    trial = Trial(folder, ground(folder))
    kinds: Counter[str] = Counter()
    where: Counter[str] = Counter()
    wrong: list[str] = []
    for name in asked.command or trial.words:
        for kind in asked.kind or KINDS:
            for at in trial.points(name, kind)[:: asked.every]:
                found = trial.fail(name, at, kind)
                kinds[kind] += 1
                where[f"{name}: {trial.what(name, at)}"] += 1
                for line in found:
                    wrong.append(f"{name} {kind} at {at} ({trial.what(name, at)}): {line}")
                    print(wrong[-1], flush=True)
    for what, count in sorted(where.items()):
        print(f"{count:5} {what}")
    print(f"{sum(kinds.values())} faults: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    print(f"{len(wrong)} wrong; " + ("nothing lost" if not wrong else f"left in {folder}"))
    if not wrong:
        shutil.rmtree(folder)
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
