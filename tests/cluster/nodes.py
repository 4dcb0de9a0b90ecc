"""A Ray cluster of several nodes on this machine: the one place that knows how Ray makes and loses them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

STORE = 80_000_000
# A node whose raylet answers no more is dead after 3 s, not 15: how Ray finds that out is not what we test.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}


class Nodes:
    """A head without places for work, and the nodes that tests add to it and take away."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": HEALTH}
        self._sigterm = signal.getsignal(signal.SIGTERM)  # Ray's nodes take it over
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def add(self, cpus: int = 1, gpus: int = 0, **environment: str) -> Any:
        """One more machine, whose processes see these variables."""
        variables = {"PYTHONPATH": os.environ["PYTHONPATH"]} | environment
        return self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE, env_vars=variables)

    def kill(self, node: Any) -> None:
        """As a machine that loses its power: nobody is told."""
        os.kill(_raylet(node), signal.SIGKILL)

    def drain(self, node: Any, seconds: int = 60) -> None:
        """As a cloud that wants its machine back in `seconds`."""
        import ray
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = time.time_ns() // 1_000_000 + 1000 * seconds
        accepted, why = ray._raylet.GcsClient(address=self.address).drain_node(node.node_id, reason, "spot", deadline)
        assert accepted, why

    def workers(self, node: Any) -> list[int]:
        """Process ids of our actors on a node."""
        return [pid for pid in _children_of_raylet(_raylet(node)) if "ray::Shell" in _name(pid)]

    def clear(self) -> None:
        """Take every node away but the head."""
        for node in list(self._cluster.worker_nodes):
            left = _children_of_raylet(_raylet(node))
            self._cluster.remove_node(node)  # with notice, so that nothing is sent there any more
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.clear()
        self._cluster.shutdown()
        signal.signal(signal.SIGTERM, self._sigterm)


def wait_until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.1)


def _raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def _children_of_raylet(raylet: int) -> list[int]:
    """What the raylet started and what is left of that: once it is dead they are no more its children."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_RAYLET_PID") == str(raylet):
                found.append(process.pid)
    return found


def _name(pid: int) -> str:
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""
