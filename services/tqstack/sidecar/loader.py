"""Loading the model that the settings name, once Ollama has made room for it."""

from __future__ import annotations

import mlx.core as mx

from tqstack.engine.disk import DiskStore
from tqstack.engine.worker import Worker
from tqstack.machine import accelerator, cache_folder
from tqstack.models.planning import Facts, read_facts
from tqstack.models.runtime import Runtime, load_runtime
from tqstack.models.spec import ModelNotFoundError
from tqstack.settings import Settings
from tqstack.sidecar.ollama import make_room


class Loader:
    """Loads the model; called in the engine's thread."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.freed: dict[str, int] = {}  # what Ollama gave back last: model -> bytes

    def planned(self) -> Facts:
        """Facts of the model from its files.

        Raises:
            ModelNotFoundError, BrokenFileError, NotCompressedError, SettingsError
        """
        return read_facts(self._settings)

    def load(self) -> Runtime:
        try:
            plan = self.planned().plan
        except ModelNotFoundError:  # it is downloaded first
            plan = None
        self.freed = make_room(self._settings, plan)
        return load_runtime(self._settings)


def new_worker(settings: Settings, runtime: Runtime) -> Worker:
    """The worker of a loaded model, with the limits that the settings give."""
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
        disk = DiskStore(folder, quota, runtime.fingerprint)
    return Worker(runtime, settings.sidecar_max_queue, gap / 1000, disk)
