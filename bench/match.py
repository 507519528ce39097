"""One match of the GPU bench: every engine tries its settings, the fastest of each that fits play rounds against each other.

A setting is tried by a process of its own, for a warm-up step and a timed one. What runs out of memory is a result, not a
failure of the bench. Where the card holds all players at once they take turns (see ``turns``); on a smaller one each
plays its rounds alone, one after the other, and quotients are of rounds with the same rows.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.turns import CONTEXT_BYTES, Failed, Runner, Variant, describe, take_turns, times_faster

WARM_UP = 3  # steps before the rounds: the first is slow, a trial goes by the better of the others
SKIPS = (24, 16, 8)  # of Mistral's 32 layers, those that Unsloth does not recompute
MOST_AHEAD = 8  # processes that load while others are tried


@dataclass(frozen=True)
class Player(Variant):
    """A variant with what a GPU adds.

    Attributes:
        dropout: LoRA dropout.
        micro_tokens: tokens that the fused engine runs at once; None: as its plan says.
    """

    dropout: float = 0.0
    micro_tokens: int | None = None

    @property
    def side(self) -> str:
        """Whose settings compete for one place in the rounds."""
        words = [self.engine]
        if self.method == "dpo":
            words.append("cached" if self.cached else "live")
        if self.micro_tokens is not None:
            words.append(f"{self.micro_tokens} tokens at once")
        if self.engine == "unsloth" and self.recompute and not self.skip_layers:
            words.append("default")  # its fastest setting is a separate entry
        return " ".join(words)

    @property
    def kind(self) -> tuple[int, ...]:
        """What settings that differ by the size of their micro-batches have in common."""
        return self.recompute, self.padded, self.liger, self.skip_layers

    @property
    def name(self) -> str:
        return self.side if self.engine == "fused" else super().name


def settings(method: str, engine: str, per_device: Iterable[int], *, liger: bool = False) -> list[Player]:
    """A baseline's settings, in the order in which they are tried: what surely fits first.

    Args:
        liger: TRL with Liger's kernels, too.
    """
    sizes = sorted(per_device)
    found = [Player(method, engine, recompute=recompute, per_device=n) for n in sizes for recompute in (True, False)]
    if engine == "unsloth":
        found += [Player(method, engine, recompute=True, per_device=n, skip_layers=k) for n in sizes for k in SKIPS]
    if engine == "trl" and liger:
        found += [Player(method, engine, recompute=True, per_device=n, liger=True) for n in sizes]
        found.append(Player(method, engine, liger=True))
    if engine == "trl" and method == "sft":
        found.append(Player(method, engine, recompute=True, padded=True))
    return found


@dataclass
class Match:
    """One method under one cap.

    Args:
        method: sft or dpo.
        values: the configuration that all players share.
        rounds: wanted.
        deadline: when the rounds shall end, on ``time.monotonic``; a round is dropped sooner than an engine.
        folder: for the players' runs.
        cap: GiB that each player may take of the card; None on a CPU.
        room_bytes: free on the card for all of them together.
        idle_bytes: what a player takes that has loaded and not stepped yet.
        threads: players are threads of this process (a test).
    """

    method: str
    values: dict[str, Any]
    rounds: int
    deadline: float
    folder: Path
    cap: float | None
    room_bytes: int
    idle_bytes: int
    threads: bool = False
    tried: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, tuple[Player, float]] = field(default_factory=dict)
    kept: dict[str, Runner] = field(default_factory=dict)
    players: list[Runner] = field(default_factory=list)
    sides: int = 0
    loading: deque[Runner] = field(default_factory=deque)
    started: int = 0
    footprints: dict[str, int] = field(default_factory=dict)

    def play(self, players: list[Player], then: Callable[[Match], list[list[Player]]], sides: int) -> dict[str, Any]:
        """Try all, let the best play, and tell.

        Args:
            players: tried in this order; of a side's the fastest plays.
            then: called after that, for sides whose setting follows from another's: lists of which the first that
                fits plays.
            sides: how many there will be, those of ``then`` included.
        """
        self.sides = sides
        try:
            self._try_all(players, time.monotonic() + 0.7 * max(0.0, self.deadline - time.monotonic()))
            self._first_that_fits([deque(alternatives) for alternatives in then(self) if alternatives])
            played = self._side_by_side() if self.together else self._one_by_one()
        finally:
            for runner in (*self.kept.values(), *self.loading):
                runner.abandon()
        return self._result(played)

    @property
    def together(self) -> bool:
        """Whether all sides fit on the card at once."""
        return self.cap is None or self.sides * self._cap_bytes <= self.room_bytes

    @property
    def _cap_bytes(self) -> int:
        return int((self.cap or 0) * 2**30)

    def fitting(self, side: str) -> list[Player]:
        """The settings of a side that fitted, the fastest first."""
        ran = [t for t in self.tried if t["side"] == side and t["result"] == "ran"]
        return [t["player"] for t in sorted(ran, key=lambda t: t["seconds"])]

    # -- trials --------------------------------------------------------------------------------------------------

    def _try_all(self, players: list[Player], until: float) -> None:
        waiting, loading = deque(players), self.loading
        while waiting or loading:
            while waiting and len(loading) < self._ahead():
                player = waiting.popleft()
                if (why := self._pointless(player, until)) is None:
                    loading.append(self._start(player))
                else:
                    self._note(player, "not tried", why)
            if not loading:
                continue
            runner = loading.popleft()
            assert isinstance(runner.variant, Player)
            if (why := self._pointless(runner.variant, until)) is None:
                self._try(runner)
            else:
                runner.abandon()
                self._note(runner.variant, "not tried", why)

    def _first_that_fits(self, queues: list[deque[Player]]) -> None:
        waiting = deque(queues)
        while waiting or self.loading:
            while waiting and len(self.loading) < self._ahead():
                self.loading.append(self._start(waiting.popleft().popleft()))
            runner = self.loading.popleft()
            rest = queues.pop(0)
            while not self._try(runner) and rest:
                runner = self._start(rest.popleft())

    def _ahead(self) -> int:
        """How many may load or lie ready, the next on trial among them."""
        if self.threads or not self.together:
            return 1  # threads of one process would only get in each other's way
        return max(1, min(MOST_AHEAD, (self._spare() - self._cap_bytes) // self.idle_bytes))

    def _pointless(self, player: Player, until: float) -> str | None:
        for t in self.tried:
            other: Player = t["player"]
            if t["side"] != player.side:
                continue
            if t["result"] == "refused":
                return f"the engine refused {other.name}"
            if t["result"] == "memory" and other.per_device < player.per_device and other.kind == player.kind:
                return f"{other.name} did not fit"
            less = not other.recompute or other.skip_layers > player.skip_layers
            if player.skip_layers and t["result"] == "ran" and other.per_device == player.per_device and less:
                return f"{other.name} fitted, which recomputes less"
        broken = [t for t in self.tried if t["side"] == player.side and t["result"] in ("error", "died", "late")]
        if len(broken) > 1 and player.side not in self.best:
            return "the engine failed twice"
        fitted = sorted(
            (t["player"].per_device, t["seconds"])
            for t in self.tried
            if t["side"] == player.side and t["result"] == "ran" and t["player"].kind == player.kind
        )
        if len(fitted) > 1 and fitted[-1][0] < player.per_device and fitted[-1][1] > fitted[-2][1]:
            return "more at once was slower already"
        if time.monotonic() > until and player.side in self.best:
            return "out of time"
        return None

    def _start(self, player: Player) -> Runner:
        self.started += 1
        told = {
            **self.values,
            "engine": player.engine,
            "lora_dropout": player.dropout,
            "precompute_ref_log_probs": player.cached,
            "output_dir": str(self.folder / f"{self.method}-{player.dropout}-{self.started}"),
        }
        if player.micro_tokens is not None:
            told["memory"] = {"micro_tokens": player.micro_tokens}
        return Runner(player, told, threads=self.threads, cap=self.cap, own_folder=True)

    def _patience(self) -> float:
        """How long to wait for an answer: what does not come by the deadline would take another's time."""
        return max(60.0, self.deadline - time.monotonic())

    def _try(self, runner: Runner) -> bool:
        """Load, warm up, keep it if it is the side's fastest."""
        player = runner.variant
        assert isinstance(player, Player)
        try:
            seconds, peak = self._warm_up(runner)
        except Failed as error:
            self._note(player, error.kind, error.text)
            return False
        self._note(player, "ran", "", seconds=seconds, peak_bytes=peak)
        if player.side in self.best and self.best[player.side][1] <= seconds:
            self._end(runner)
            return True
        self.best[player.side] = (player, seconds)
        before = self.kept.pop(player.side, None)
        if before is not None:
            self._end(before)
        self.kept[player.side] = runner
        self.footprints[player.side] = peak + CONTEXT_BYTES
        # the rounds start again what has to make room for the next on trial
        wanted = self._cap_bytes + len(self.loading) * self.idle_bytes
        while self.kept and (not self.together or self._spare() < wanted):
            side = max(self.kept, key=lambda side: self.footprints[side])
            self._end(self.kept.pop(side))
        return True

    def _spare(self) -> int:
        """Bytes of the card that no kept player holds."""
        if self.cap is None:
            return sys.maxsize
        return self.room_bytes - sum(self.footprints[side] for side in self.kept)

    def _warm_up(self, runner: Runner) -> tuple[float, int]:
        runner.load(self._patience())
        steps = [runner.step(self._patience()) for _ in range(WARM_UP)]
        # the better of two: another side may be loading meanwhile, and the first step compiles
        return min(s["seconds"] for s in steps[1:]), max(s.get("peak_bytes", 0) for s in steps)

    def _end(self, runner: Runner) -> None:
        try:
            runner.stop()
        except Failed:
            runner.abandon()  # it has told what it had to tell

    def _note(self, player: Player, result: str, why: str, **found: Any) -> None:
        self.tried.append({"player": player, "side": player.side, "result": result, "why": why, **found})
        words = why.strip().splitlines()[-1:] or [f"{found.get('seconds', 0):.2f} s"]
        print(f"{self.method} {player.name}: {result}: {words[0]}", file=sys.stderr, flush=True)

    # -- rounds --------------------------------------------------------------------------------------------------

    def _side_by_side(self) -> int:
        for side, (player, _) in self.best.items():
            if side not in self.kept:
                self.kept[side] = self._start(player)
                try:
                    self._warm_up(self.kept[side])
                except Failed as error:
                    self._drop(self.kept[side], error)
        played, longest = 0, 0.0
        while played < self.rounds and self.kept:
            begun = time.monotonic()
            if played and begun + longest > self.deadline:
                break
            for runner in list(take_turns(list(self.kept.values()), played)):
                self._round(runner)
            played += 1
            longest = max(longest, time.monotonic() - begun)
        self.players = list(self.kept.values())
        while self.kept:
            self._end(self.kept.popitem()[1])
        return played

    def _one_by_one(self) -> int:
        played = self.rounds
        left = list(self.best.items())
        for place, (_, (player, _)) in enumerate(left):
            runner = self._start(player)
            until = time.monotonic() + (self.deadline - time.monotonic()) / (len(left) - place)
            self.kept[player.side] = runner
            try:
                self._warm_up(runner)
            except Failed as error:
                self._drop(runner, error)
                continue
            while len(runner.steps) < self.rounds and player.side in self.kept:
                if runner.steps and time.monotonic() + runner.steps[-1]["seconds"] > until:
                    break
                self._round(runner)
            if player.side in self.kept:
                self._end(self.kept.pop(player.side))
                self.players.append(runner)
                played = min(played, len(runner.steps))
        return played

    def _round(self, runner: Runner) -> None:
        try:
            runner.steps.append(runner.step(self._patience()))
        except Failed as error:
            self._drop(runner, error)

    def _drop(self, runner: Runner, error: Failed) -> None:
        assert isinstance(runner.variant, Player)
        self._note(runner.variant, error.kind, f"in step {WARM_UP + len(runner.steps) + 1}: {error.text}")
        self.kept.pop(runner.variant.side, None)
        runner.abandon()

    def _result(self, played: int) -> dict[str, Any]:
        unit = "tokens" if self.method == "sft" else "pairs"
        runners = {r.variant.side: r for r in self.players if isinstance(r.variant, Player) and r.steps}
        ratios = {
            f"{a} over {b}": times_faster(runners[a], runners[b])
            for a in runners
            for b in runners
            if a in ("fused", "fused live", "fused cached") and not b.startswith("fused")
        }
        for side in ("unsloth", "unsloth live"):  # its fastest setting may be its default
            for ours in runners:
                both = [ratios[n] for n in (f"{ours} over {side}", f"{ours} over {side} default") if n in ratios]
                ratios |= {f"{ours} over {side}": min(both)} if both else {}
        # the last word on each side that has no result
        last = {t["side"]: t for t in self.tried if t["result"] not in ("ran", "not tried")}
        not_run = {side: f"{t['result']}: {t['why']}" for side, t in last.items() if side not in runners}
        return {
            "method": self.method,
            "cap_gib": self.cap,
            "rounds": played,
            "rounds_wanted": self.rounds,
            "side_by_side": self.together,
            "variants": {side: {"setting": r.variant.name, **describe(r, unit)} for side, r in runners.items()},
            "ratios": ratios,
            "not_run": not_run,
            "tried": [{**{k: v for k, v in t.items() if k != "player"}, **asdict(t["player"])} for t in self.tried],
        }


def following(match: Match, side: str, **changes: Any) -> list[Player]:
    """The settings of a side that fitted, the fastest first, changed."""
    return [replace(player, **changes) for player in match.fitting(side)]
