"""A stage without a model, its copy, and a hub in memory, for the tests of ``sync``."""

import json

from tests.fake_hub import FakeHub
from zephyr_lite.io import sync
from zephyr_lite.io.atomic import write_manifest
from zephyr_lite.io.run_dir import StageDir


def hub_in_memory(monkeypatch):
    """A hub in memory, and a token."""
    fake = FakeHub()
    monkeypatch.setattr(sync, "HfApi", fake)
    monkeypatch.setattr(sync, "get_token", lambda: "hf_secret_of_the_tests")
    monkeypatch.setattr(sync.constants, "HF_HUB_OFFLINE", False)
    return fake


class AStage:
    """A stage's folder without a model: what the mirror sees of it."""

    def __init__(self, run, name="sft", id="one"):
        self.dir = StageDir(run / name)
        self.dir.path.mkdir(parents=True)
        self.dir.config.write_text("seed: 1\n")
        self.info(id=id, status="running", created="2026-01-01")

    def info(self, **values):
        self.dir.write_info({**(self.dir.info() or {}), **values})

    def checkpoint(self, step, content=None):
        folder = self.dir.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.safetensors").write_text(content or f"weights of {step}")
        write_manifest(folder)
        with self.dir.metrics.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        return folder

    def finish(self):
        self.dir.adapter.mkdir()
        (self.dir.adapter / "adapter_model.safetensors").write_text("adapter")
        self.info(status="complete")


def mirror_of(place, stage):
    return sync.Mirror(str(place), stage.dir)


def there(folder):
    return sorted(p.name for p in folder.iterdir())
