from __future__ import annotations

import pytest

from zephyr_lite.client import client


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACK_OFF", 0.01)
    monkeypatch.setattr(client, "GRACE", 2.0)
