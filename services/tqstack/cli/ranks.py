"""What `tqstack doctor` says of a model that several ranks divide, before they start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqstack.cli.checks import Finding
from tqstack.settings import Settings, SettingsError

SLOW_TRIP, SLOW_LINK = 0.5e-3, 100e6  # seconds, bytes a second: WiFi is worse than both


def examine(settings: Settings) -> Iterator[Finding]:
    """Hosts, versions and links. The model is not loaded: it may fit no single device."""
    from tqstack.ranks.supervisor import Places

    try:
        places = Places.of(settings)
    except SettingsError as error:
        yield Finding("ranks", "wrong", str(error), "mlx.distributed_config writes such a file")
        return
    where = "on this machine" if places.local else "on hosts"
    yield Finding("ranks", "ok", f"{len(places)} {where}, over {places.backend} (experimental)")
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if places.backend == "nccl" and gpus < len(places):
        detail = f"{gpus} GPUs for {len(places)} ranks"
        yield Finding("devices", "wrong", detail, f"set SIDECAR_RANKS={gpus}")
    yield _divisible(settings)
    for rank in range(1, len(places)):
        if not places.is_here(rank):
            yield from _host(places, rank, settings)


def _divisible(settings: Settings) -> Finding:
    from mlx_lm.utils import _get_classes

    from tqstack.models.spec import read_spec
    from tqstack.models.split import way

    spec = read_spec(settings.model_name)
    try:
        model_class, arguments = _get_classes(dict(spec.config))
        found = way(model_class(arguments.from_dict(dict(spec.config))))
    except Exception as error:  # whatever keeps mlx-lm from making it is the finding
        return Finding("model", "wrong", f"{spec.id}: {error}", "set SIDECAR_MODEL")
    if found is None:
        return Finding(
            "model",
            "wrong",
            f"mlx-lm cannot divide models like {spec.id}",
            "unset SIDECAR_RANKS and SIDECAR_HOSTS",
        )
    parts = "each layer" if found == "tensor" else "by layers"
    return Finding("model", "ok", f"{spec.id} is divided: {parts}; loaded when the ranks start")


def _host(places, rank: int, settings: Settings) -> Iterator[Finding]:
    from tqstack.models.split import NotSplitError
    from tqstack.ranks.control import UnreachableError
    from tqstack.ranks.group import about_this_rank, check_alike
    from tqstack.ranks.links import probe

    host = places.host(rank)
    what = f"host {host.ssh}"
    try:
        link = probe(places.host(0), host, rank, settings.model_name)
    except UnreachableError as error:
        advice = (
            f"it must answer `ssh {host.ssh}` without a password, and have tqstack where it is here"
        )
        yield Finding(what, "wrong", str(error), advice)
        return
    try:
        check_alike(about_this_rank(0), link.about)
    except NotSplitError as error:
        yield Finding(what, "wrong", str(error))
        return
    if link.about["model"] is not True:
        yield Finding(what, "wrong", link.about["model"], "copy or download the model there")
        return
    slow = link.round_trip > SLOW_TRIP or link.bandwidth < SLOW_LINK
    yield Finding(
        what,
        "note" if slow else "ok",
        f"same versions, has the model; {1e6 * link.round_trip:,.0f} µs there and back, "
        f"{link.bandwidth / 1e6:,.0f} MB/s",
        "every token sums numbers of all layers over this link: use a cable" if slow else "",
    )
