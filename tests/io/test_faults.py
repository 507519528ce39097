"""Every write may fail: the layer through which a run's files are written, call by call, and a whole run's writes, thinned.

All of a run's writes, in all ways: ``python -m tests.faults``.
"""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import faults
from tests.faults import KINDS, NUMBERS, PRIMITIVES, Died, Trial, faulty, fits, left_aside
from tests.kill import Ground
from zephyr_lite.config.load import RunConfig
from zephyr_lite.io import atomic as files
from zephyr_lite.io.manifest import MANIFEST, manifest_fault, write_manifest
from zephyr_lite.model.base import load_base
from zephyr_lite.train import reference

ROOT = Path(files.__file__).parent

# Pieces of work: what they begin with, and what they leave


def text(path: Path) -> None:
    files.write_text(path / "a.json", "new")


def large(path: Path) -> None:
    with files.bytes_aside(path / "a.json") as file:
        for _ in range(3):
            file.write(b"x" * files.BUFFER)


def folder(path: Path) -> None:
    with files.folder_aside(path / "f") as aside:
        files.write_json(aside / "one.json", {"a": 1})
        (aside / "deeper").mkdir()
        (aside / "deeper" / "foreign").write_text("by a library")
        write_manifest(aside)


def copy(path: Path) -> None:
    files.copy_file(path / "a.json", path / "b.json")


def deep(path: Path) -> None:
    files.make_folder(path / "x" / "y")
    files.write_text(path / "x" / "y" / "z", "new")


def removal(path: Path) -> None:
    files.remove_folder(path / "f")


def lines(path: Path) -> None:
    files.append_line(path / "log.jsonl", "two")
    files.sync_file(path / "log.jsonl")


WORK = [text, large, folder, copy, deep, removal, lines]


def before(path: Path) -> None:
    path.mkdir()
    (path / "a.json").write_text("old")
    (path / "log.jsonl").write_text("one\n")
    (path / "f").mkdir()
    (path / "f" / "one.json").write_text("old")


def content(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def visible(path: Path) -> dict[str, str]:
    return {name: text for name, text in content(path).items() if not name.startswith(".")}


def every_fault(work: Callable[[Path], None], path: Path) -> Iterator[tuple[str, str, dict[str, str], dict[str, str]]]:
    """Of each fault: how, what it hit, and what there was before and would have been after."""
    before(path / "whole")
    old = visible(path / "whole")
    with faulty() as layer:
        work(path / "whole")
    assert layer.unsafe == []
    new = visible(path / "whole")
    for kind in KINDS:
        for at, (primitive, _) in enumerate(layer.calls):
            if not fits(kind, primitive):
                continue
            place = path / f"{kind}{at}"
            before(place)
            with faulty(at, kind):
                error: BaseException | None = None
                try:
                    work(place)
                except (OSError, Died) as caught:
                    error = caught
            if isinstance(error, OSError):
                assert error.errno == NUMBERS[kind] and str(place) in error.filename
                assert not files._ASIDE.search(error.filename), "names a file that is not there any more"
                assert left_aside(place) == []
            else:
                assert isinstance(error, Died) if kind in ("died", "torn") else primitive in faults.REMOVING
            yield kind, primitive, old, new
            assert visible(place) in (old, new) or work is deep or (work is lines and kind == "torn")
            for folder in (place, *(p for p in place.rglob("*") if p.is_dir() and not p.name.startswith("."))):
                files.sweep(folder)
            assert left_aside(place) == []
            if work is not removal and work is not lines:  # these are not the same done twice
                work(place)
                assert visible(place) == new


@pytest.mark.parametrize("work", WORK)
def test_a_write_that_fails_leaves_what_was_there(work, tmp_path):
    hit = {(kind, primitive) for kind, primitive, *_ in every_fault(work, tmp_path)}
    assert {kind for kind, _ in hit} >= ({"io", "died"} if work is removal else set(KINDS))


def test_without_an_exchange_of_names_the_folder_comes_back(tmp_path, monkeypatch):
    """A file system that cannot swap two names: between two renames the folder is away, until the next start."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    away = 0
    with faulty() as layer:
        before(tmp_path / "whole")
        folder(tmp_path / "whole")
    new = visible(tmp_path / "whole")
    for kind in ("io", "died"):
        for at in range(len(layer.calls)):
            place = tmp_path / f"{kind}{at}"
            before(place)
            old = visible(place)
            with faulty(at, kind), suppress(OSError, Died):
                folder(place)
            away += not (place / "f").exists()
            assert kind == "died" or (place / "f").exists()
            files.sweep(place)
            assert visible(place) in (old, new) and left_aside(place) == []
    assert away == 1


def test_every_primitive_is_hit_by_the_pieces_of_work(tmp_path):
    seen = set()
    for work in WORK:
        place = tmp_path / work.__name__
        before(place)
        with faulty() as layer:
            work(place)
        seen |= {primitive for primitive, _ in layer.calls}
    assert seen == set(PRIMITIVES) - {"_unlink"}  # which follows an error only


def test_what_is_renamed_before_it_is_flushed_is_seen(tmp_path):
    """The watch of the tests itself."""
    (tmp_path / ".a.01234567").write_text("x")
    with faulty() as layer:
        files._rename(tmp_path / ".a.01234567", tmp_path / "a")
    assert len(layer.unsafe) == 1


def test_a_living_process_keeps_what_it_has_aside(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from zephyr_lite.io.atomic import folder_aside, file_aside\n"
        "with folder_aside(Path(sys.argv[1]) / 'f'), file_aside(Path(sys.argv[1]) / 't'):\n"
        "    print('there', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"there\n"
        mine = tmp_path / ".cache"
        mine.mkdir()
        files.sweep(tmp_path, alone=True)
        assert len(left_aside(tmp_path)) == 2
    finally:
        child.kill()
        child.wait()
    (tmp_path / ".other.01234567").write_text("x")
    files.sweep(tmp_path, "f")
    files.sweep(tmp_path, "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cache", ".other.01234567"]


def test_a_library_that_runs_out_of_space_is_told_as_such(tmp_path):
    """In a real process with a real limit: tokenizers is written in Rust, its errors are plain text."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(2000)}, unk_token="word0"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as found, files.folder_aside(tmp_path / "adapter") as aside:
            tokenizer.save(str(aside / "tokenizer.json"))
        with pytest.raises(OSError, match="File too large") as own:
            files.write_text(tmp_path / "text", "x" * 5000)
        files.append_line(tmp_path / "log", "x" * 900)
        with pytest.raises(OSError, match="File too large"):
            files.append_line(tmp_path / "log", "y" * 900)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.errno == errno.EFBIG and found.value.filename == str(tmp_path / "adapter")
    assert own.value.filename == str(tmp_path / "text")
    assert content(tmp_path) == {"log": "x" * 900 + "\n"}


def test_secrets_are_hidden_in_texts_and_data_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_API_KEY", "sk-verysecret1")
    files.write_json(tmp_path / "stage.json", {"error": "401 for sk-verysecret1"})
    with files.file_aside(tmp_path / "rows.jsonl") as file:
        file.write("sk-verysecret1")
    assert content(tmp_path) == {"rows.jsonl": "sk-verysecret1", "stage.json": '{\n  "error": "401 for ***"\n}\n'}


def test_links_and_modes(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "f").symlink_to("elsewhere")
    mask = os.umask(0o027)
    try:
        folder(tmp_path)
        text(tmp_path)
    finally:
        os.umask(mask)
    assert (tmp_path / "f").is_dir() and not (tmp_path / "f").is_symlink() and (tmp_path / "elsewhere").is_dir()
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o750 and (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert manifest_fault(tmp_path / "f") is None and (tmp_path / "f" / MANIFEST).is_file()
    assert left_aside(tmp_path) == []


# A whole run


@pytest.fixture(scope="module")
def trial(tmp_path_factory, tiny_base, chat_rows, pair_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SAVE_SECONDS", 0.0)
        yield Trial(tmp_path_factory.mktemp("faults"), Ground(tiny_base, chat_rows, pair_rows))


@pytest.mark.parametrize(
    ("name", "kind", "what", "number"),
    [
        ("sft", "torn", "write sft/config.yaml", 0),
        ("sft", "full", "write sft/checkpoint-N/state.safetensors", 1),
        ("sft", "died", "rename sft/checkpoint-N", 2),
        ("sft", "short", "write sft/metrics.jsonl", 2),
        ("dpo", "io", "write dpo/reference-", 1),
        ("dpo", "died", "rename dpo/adapter", 0),
        ("merge", "short", "write merged/model.safetensors", 0),
        ("merge", "died", "exchange merged", 0),
    ],
)
def test_a_run_survives_the_fault(trial, name, kind, what, number):
    points = [at for at in trial.points(name, kind) if trial.what(name, at).startswith(what)]
    assert trial.fail(name, points[number], kind) == []


def test_a_quantized_base_that_could_not_be_written_is_made_at_the_next_start(tmp_path, monkeypatch, tiny_base):
    """Where the cache cannot be written the base is quantized in memory, and that is said."""

    def start(place: Path) -> tuple[list[str], dict[str, bytes]]:
        monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / place))
        said: list[str] = []
        load_base(RunConfig(model_name_or_path=str(tiny_base)), say=said.append)
        kept = (tmp_path / place).rglob("*.safetensors")
        return said, {path.name: path.read_bytes() for path in kept if not files._ASIDE.search(str(path))}

    with faulty() as layer:
        _, right = start("whole")
    assert len(right) == 1 and not layer.unsafe
    points = [at for at, (primitive, _) in enumerate(layer.calls) if fits("full", primitive)]
    for number, at in enumerate(points[::3]):
        place, kind = f"fault{at}", ("full", "died")[number % 2]
        with faulty(at, kind):
            try:
                said, _ = start(place)
                assert kind == "full" and "No space left" in said[-1] and "in memory" in said[-1]
            except Died:
                assert kind == "died"
        assert start(place)[1] == right
        assert left_aside(tmp_path / place) == []


def test_a_run_with_a_flipped_bit_goes_on_from_the_checkpoint_before(trial):
    """To the same adapter, and it says so."""
    words = [*trial.words["sft"], "save_total_limit=3"]
    trial.put_back("sft")
    last = max(at for at in trial.points("sft", "died") if trial.what("sft", at) == "open sft/stage.json")
    with faulty(last - 4, "died"), pytest.raises(Died):  # two checkpoints fewer are deleted: four calls
        faults.run(words)
    weights = trial.out / "sft" / "checkpoint-3" / "state.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    code, said = faults.run(words)
    assert code == 0
    assert "checkpoint-3: state.safetensors has another hash than was written; using checkpoint-2" in said
    found = faults.standing(trial.out)
    same = [name for name in found if name.startswith(("sft/adapter/", "sft/metrics"))]
    assert len(same) > 4 and all(found[name] == trial.right["sft"][name] for name in same)
    assert sorted(p.name for p in (trial.out / "sft").glob("*checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
