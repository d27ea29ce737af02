"""Loading the model that the settings name, once Ollama has made room for it."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from tqstack.engine.disk import DiskStore
from tqstack.engine.worker import Worker
from tqstack.machine import accelerator, cache_folder
from tqstack.models.planning import ModelFacts, read_facts
from tqstack.models.runtime import Runtime, load_runtime
from tqstack.models.spec import ModelNotFoundError
from tqstack.ranks.group import Group
from tqstack.settings import Settings
from tqstack.sidecar.ollama import make_room


class Loader:
    """Loads the model; called in the engine's thread.

    Args:
        group: of ranks that divide it; None: it is loaded whole.
    """

    def __init__(self, settings: Settings, group: Group | None = None):
        self._settings, self.group = settings, group
        self.freed: dict[str, int] = {}  # what Ollama gave back last: model -> bytes

    def planned(self) -> ModelFacts:
        """What is told of the model from its files.

        Raises:
            ModelNotFoundError, BrokenFileError, NotCompressedError, SettingsError
        """
        return read_facts(self._settings)

    def load(self) -> Runtime:
        collectives = self.group.join() if self.group else None
        try:
            plan = self.planned().plan
        except ModelNotFoundError:  # it is downloaded first
            plan = None
        if self.group is None or self.group.rank == 0:
            self.freed = make_room(self._settings, plan)
        return load_runtime(self._settings, collectives)


def new_worker(
    settings: Settings,
    runtime: Runtime,
    group: Group | None = None,
    make: Callable[..., Worker] = Worker,
) -> Worker:
    """The worker of a loaded model, with the limits that the settings give.

    Args:
        group: of ranks that divide the model; each keeps prefixes of its own.
        make: `Worker`, or what has its arguments.
    """
    # Memory that MLX has freed and keeps for later is memory too: of that no more than a step
    # needs, and none beyond the budget.
    mx.set_cache_limit(runtime.plan.workspace)
    mx.set_memory_limit(runtime.plan.budget)
    gap = settings.sidecar_stream_gap_ms
    if gap == "auto":
        gap = 1000 if accelerator() == "cpu" else 250
    disk = None
    if quota := settings.prefix_disk_bytes:
        folder = cache_folder() / "prefixes"
        if group is not None:
            folder /= f"rank-{group.rank}-of-{group.role.ranks}"
        disk = DiskStore(folder, quota, runtime.fingerprint)
    return make(runtime, settings.sidecar_max_queue, gap / 1000, disk)
