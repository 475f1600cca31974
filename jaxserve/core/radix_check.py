"""What must be true of a radix tree over KV pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.core.leaf_queue import LeafQueue
from jaxserve.core.radix_node import Node


class TreeCounts(NamedTuple):
    """What a tree counts, as its attributes of these names."""

    num_nodes: int
    num_pages: int
    num_evictable: int
    num_host_pages: int


def check_nodes(
    nodes: Iterable[Node], page_bytes: int, counts: TreeCounts, queues: tuple[LeafQueue, LeafQueue]
) -> None:
    """Raises RuntimeError unless counts, locks, links, tiers and queues (device, host) agree with nodes."""
    near, far = ({id(node) for node in queue.entries()} for queue in queues)
    num_nodes = num_pages = num_evictable = num_host_pages = 0
    for node in nodes:
        num_nodes += node.parent is not None
        if node.on_host:
            num_host_pages += len(node.pages)
        else:
            num_pages += len(node.pages)
            num_evictable += 0 if node.num_locks else len(node.pages)
        if len(node.tokens) != len(node.pages) * page_bytes:
            raise RuntimeError(f"{len(node.pages)} pages with {len(node.tokens)} bytes of tokens")
        _check_children(node)
        if node.is_free_leaf and id(node) not in (far if node.on_host else near):
            raise RuntimeError(f"eviction cannot find the leaf {node.pages}")
        if node.claims and not node.num_locks:
            raise RuntimeError("a claim without a lock")
    found = TreeCounts(num_nodes, num_pages, num_evictable, num_host_pages)
    if found != counts:
        raise RuntimeError(f"there are {found}, counted as {counts}")


def _check_children(node: Node) -> None:
    for key, child in node.children.items():
        if child.parent is not node or child.start != node.end or not child.tokens.startswith(key):
            raise RuntimeError(f"a child of {node.pages} does not know its place")
        if child.num_locks > node.num_locks:
            raise RuntimeError(f"{child.num_locks} locks under {node.num_locks}")
        if node.on_host and not child.on_host:
            raise RuntimeError(f"{child.pages} on the device under {node.pages} on the host")
    if node.num_near != sum(not child.on_host for child in node.children.values()):
        raise RuntimeError(f"{node.num_near} children of {node.pages} on the device: counted wrong")
