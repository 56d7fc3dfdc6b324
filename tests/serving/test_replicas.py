"""Replicas without a cluster: what each is given, how they are asked for, told of, and end."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from hymba.errors import HymbaError
from hymba.serving.cluster import Replica, app
from hymba.serving.cluster_server import parse_replicas
from hymba.serving.machines import last_words, place
from hymba.serving.replica_metrics import join_metrics
from hymba.serving.service import Service

METRICS = """\
# HELP hymba_steps_total Steps.
# TYPE hymba_steps_total counter
hymba_steps_total{kind="a"} 3.0
# HELP hymba_seconds Time.
# TYPE hymba_seconds histogram
hymba_seconds_bucket{le="1.0"} 1.0
hymba_seconds_bucket{le="+Inf"} 2.0
hymba_seconds_count 2.0
hymba_seconds_sum 4.5
"""


def share(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], device: str, replicas: tuple[int, int]
) -> Any:
    alive: list[dict[str, Any]] = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
    service, resources = place(Service(device=device), *replicas)
    return service.device, resources


@pytest.mark.parametrize(
    ("nodes", "replicas", "cpus"),
    [
        ([{"CPU": 2.0}], (2, 2), 1),
        ([{"CPU": 16.0}], (3, 3), 5),
        ([{"CPU": 16.0}, {"CPU": 4.0}], (3, 3), 5),  # three on the large machine
        ([{"CPU": 8.0}, {"CPU": 8.0}], (3, 3), 4),  # five would leave room for two
        ([{"CPU": 8.0}], (1, 16), 1),  # no room for all: as many as fit
        ([{"CPU": 8.0}, {}], (1, 1), 8),
    ],
)
def test_replicas_share_the_cpus(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], replicas: tuple[int, int], cpus: int
) -> None:
    assert share(monkeypatch, nodes, "auto", replicas) == ("cpu", {"num_cpus": cpus})


def test_replicas_take_a_gpu_each_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"CPU": 8.0, "GPU": 1.0}
    gpu = ("cuda", {"num_cpus": 1, "num_gpus": 1})
    assert share(monkeypatch, [machine, machine], "auto", (2, 4)) == gpu
    assert share(monkeypatch, [machine, machine], "cuda", (1, 1)) == gpu
    assert share(monkeypatch, [machine], "auto", (2, 2)) == ("cpu", {"num_cpus": 4})
    assert share(monkeypatch, [machine], "cpu", (1, 1)) == ("cpu", {"num_cpus": 8})
    with pytest.raises(HymbaError, match="2 replicas on GPUs need as many, and the cluster has 1"):
        share(monkeypatch, [machine], "cuda", (2, 2))
    with pytest.raises(HymbaError, match="3 replicas need a CPU each, and the cluster has 2"):
        share(monkeypatch, [{"CPU": 2.0}], "auto", (3, 3))


def test_replicas_are_one_number_or_two() -> None:
    assert (parse_replicas("2"), parse_replicas("1:8")) == ((2, 2), (1, 8))
    for text in ("", "0", "-1", "two", "3:2", "0:2", "1:2:3", "1.5"):
        with pytest.raises(HymbaError, match="replicas are a number like 2, or the least and the most like 1:8"):
            parse_replicas(text)


def test_metrics_of_replicas_are_told_apart_and_once() -> None:
    lines = join_metrics([("a", METRICS), ("b", METRICS.replace("3.0", "5.0"))]).decode().splitlines()
    assert 'hymba_steps_total{kind="a",replica="a"} 3.0' in lines
    assert 'hymba_steps_total{kind="a",replica="b"} 5.0' in lines
    assert 'hymba_seconds_bucket{le="+Inf",replica="b"} 2.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == 2
    assert len([line for line in lines if not line.startswith("#")]) == 10


def test_the_last_words_are_the_reason() -> None:
    trace = "Deploying failed.\nTraceback:\n  File x\nhymba.errors.HymbaError: no such model: tin\n"
    assert last_words("Deploying failed.", trace) == "no such model: tin"
    assert last_words("\nonly this\n") == "only this"


def test_a_replica_whose_engine_has_ended_ends_its_process() -> None:
    replica: Any = object.__new__(Replica)
    replica._engine = SimpleNamespace(dead=None)
    replica.check_health()
    replica._engine.dead = "RuntimeError: out of memory"
    process = multiprocessing.get_context("fork").Process(target=replica.check_health)
    process.start()
    process.join(30)
    assert process.exitcode == 1


def test_serves_own_commands_give_texts_that_become_numbers() -> None:
    front = app({"model": "tiny", "replicas": "2", "max_replicas": "4", "cpus": "0.5", "max_rows": "3"})
    replica = front._bound_deployment.init_args[0]._bound_deployment
    assert replica.max_ongoing_requests == 6
    assert replica.ray_actor_options["num_cpus"] == 0.5
    with pytest.raises(ValueError, match="colour"):
        app({"colour": "red"})
