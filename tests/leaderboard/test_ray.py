"""Ray, without a cluster: what an actor is asked for, and a cluster that has no room for one."""

from __future__ import annotations

import socket
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from twin_bench.errors import InputError
from twin_bench.leaderboard.executors import EXECUTORS, Given
from twin_bench.leaderboard.executors.workers import Workers


class PretendRay(types.ModuleType):
    """The module of Ray, of a cluster with these machines. It keeps the options of the actors that are started."""

    def __init__(self, *machines: dict[str, float]) -> None:
        super().__init__("ray")
        self.machines, self.asked, self.left = machines, list[dict[str, Any]](), False
        errors = dict.fromkeys(("RayActorError", "WorkerCrashedError", "OutOfMemoryError"), OSError)
        self.exceptions = types.SimpleNamespace(**errors)

    def init(self, **settings: Any) -> None:
        self.settings = settings

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 999, "GPU": 999}}
        return [gone, *({"Alive": True, "Resources": machine} for machine in self.machines)]

    def cluster_resources(self) -> dict[str, float]:
        return {kind: sum(one.get(kind, 0) for one in self.machines) for kind in ("CPU", "GPU")}

    def remote(self, _: type) -> PretendRay:
        return self

    def options(self, **options: Any) -> types.SimpleNamespace:
        self.asked.append(options)
        return types.SimpleNamespace(remote=lambda: None)

    def kill(self, _: Any) -> None:
        pass

    def shutdown(self) -> None:
        self.left = True


@pytest.fixture
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.parametrize(
    ("machines", "gpus", "says"),
    [
        ([{"CPU": 2}, {"CPU": 2}], None, "a worker needs 3 processors and 0 GPUs, and no machine of the cluster"),
        ([{"CPU": 8}, {"CPU": 0, "GPU": 2}], 1.0, "a worker needs 1 processors and 1 GPUs, and no machine"),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], 2.0, "a worker needs 1 processors and 2 GPUs, and no machine"),
        ([{"CPU": 8, "GPU": 1}], 2.0, "--gpus-per-worker 2: the cluster has 1 GPUs"),
    ],
)
def test_a_cluster_without_room_for_one_worker_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, machines: list[dict[str, float]], gpus: float | None, says: str
) -> None:
    """Ray itself waits for a machine with room, for ever and in silence."""
    ray = PretendRay(*machines)
    monkeypatch.setitem(sys.modules, "ray", ray)
    started = time.monotonic()
    with (
        EXECUTORS["ray"](Given(address=address, gpus_per_worker=gpus)) as executor,
        pytest.raises(InputError) as refused,
    ):
        executor.device("cuda" if gpus else "cpu")
    assert time.monotonic() - started < 10
    assert str(refused.value).startswith(f"--address {address}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ray.settings["address"] == address
    assert ray.left
    assert not ray.asked


def test_an_actor_has_its_resources_and_no_bars_of_its_own(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    ray = PretendRay({"CPU": 7})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with EXECUTORS["ray"](Given(address=address)) as executor:
        assert isinstance(executor, Workers)
        assert executor.device("cpu") == "cpu"
        assert executor.count() == 2
        executor.worker(0)
    (asked,) = ray.asked
    assert (asked["num_cpus"], asked["num_gpus"]) == (3, 0)
    variables = asked["runtime_env"]["env_vars"]
    assert variables == {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "3"}
