from collections.abc import Sequence
from typing import Any

class Memory:
    kind: str

class Device:
    id: int
    host_id: int
    process_index: int
    local_hardware_id: int | None
    platform: str
    device_kind: str
    def addressable_memories(self) -> Sequence[Memory]: ...
    def default_memory(self) -> Memory: ...
    def memory(self, kind: str) -> Memory: ...
    def memory_stats(self) -> dict[str, int] | None: ...
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
