"""A Ray cluster of several nodes on this machine: a script that the tests start.

Prints its address; then, for each line `add` on stdin, adds a node of one CPU and one GPU (a number, not a device) and
prints the process of its raylet.
The head has no CPUs, so that no stage is placed next to the pipeline. Ends with its stdin.
"""

import sys

from ray.cluster_utils import Cluster

OBJECTS = 80 * 1024**2  # bytes


def tell(value: object) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def main() -> None:
    small = {"object_store_memory": OBJECTS, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    tell(cluster.address)
    for _ in sys.stdin:
        node = cluster.add_node(num_cpus=1, num_gpus=1, **small)
        tell(node.all_processes["raylet"][0].process.pid)
    cluster.shutdown()


main()
