"""The service manager of this system."""

from __future__ import annotations

import sys

from tqstack.service.definition import Manager, Place
from tqstack.service.launchd import Launchd
from tqstack.service.systemd import Systemd


def manager(place: Place) -> Manager:
    """The one that runs services for the user on this system."""
    return Launchd(place) if sys.platform == "darwin" else Systemd(place)
