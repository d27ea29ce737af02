"""The disk tier: what is damaged or foreign costs a cold prefill, never a wrong answer."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from engine.jobs import finished, submit
from engine.test_warm import assert_warm_equals_cold
from tqstack.engine.disk import DiskStore, File
from tqstack.engine.worker import Worker


@pytest.fixture(scope="module")
def written(tiny, noise, tmp_path_factory):
    """A folder with the prefixes of one sequence, and the runtime that made them."""
    runtime, folder = tiny(), tmp_path_factory.mktemp("written")
    worker = Worker(runtime, disk=DiskStore(folder, 1 << 30, runtime.fingerprint))
    finished(worker, submit(worker, noise[:2500], boundaries=(600, 2400)))
    worker.close()
    return runtime, folder


@pytest.fixture
def filled(written, tmp_path):
    """The same, to be damaged."""
    runtime, folder = written
    return runtime, Path(shutil.copytree(folder, tmp_path / "disk"))


def opened(filled):
    runtime, folder = filled
    return Worker(runtime, disk=DiskStore(folder, 1 << 30, runtime.fingerprint))


def longest(folder):
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_files_are_for_their_owner_alone(filled):
    _, folder = filled
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "lfm2", "nemotron-h"])
def test_every_kind_of_state_comes_back_exactly(tiny, noise, tmp_path, family):
    runtime = tiny(family)
    worker = Worker(runtime, disk=DiskStore(tmp_path, 1 << 30, runtime.fingerprint))
    finished(worker, submit(worker, noise[:700]))
    worker.close()
    assert_warm_equals_cold(opened((runtime, tmp_path)), noise[:800], 690)


@pytest.mark.parametrize("at", [0.02, 0.5, 0.99])
def test_a_flipped_byte_costs_a_cold_prefill(filled, noise, at):
    _, folder = filled
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[int(at * len(content))] ^= 0x10
        path.write_bytes(content)
    worker = opened(filled)
    assert_warm_equals_cold(worker, noise[:2600], 0)
    finished(worker, submit(worker, noise[:2600]))
    assert worker.totals["cached_tokens"] == 0


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.999])
def test_a_truncated_file_costs_no_more_than_what_it_held(filled, noise, keep):
    _, folder = filled
    path = longest(folder)
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if keep < 1 else keep)
    worker = opened(filled)
    assert_warm_equals_cold(worker, noise[:2600], 600)
    assert path not in set(folder.iterdir()) or worker._prefixes.disk.rejected == 0


def test_another_codec_reads_nothing_of_it(filled, tiny, noise):
    _, folder = filled
    other = tiny(codecs="tq3")
    worker = Worker(other, disk=DiskStore(folder, 1 << 30, other.fingerprint))
    assert_warm_equals_cold(worker, noise[:2600], 0)
    assert len(worker._prefixes.disk) == 0


def test_a_file_of_another_model_under_our_name_is_refused(filled, tiny, noise):
    """Even if all that names it agrees: what it holds does not."""
    runtime, folder = filled
    other = tiny(codecs="tq3")
    worker = Worker(other, disk=DiskStore(folder, 1 << 30, runtime.fingerprint))
    assert_warm_equals_cold(worker, noise[:2600], 0)
    assert worker._prefixes.disk.rejected


def test_what_is_half_written_when_the_process_dies_is_cleaned_away(filled):
    _, folder = filled
    (folder / "half.part").write_bytes(b"12345")
    opened(filled)
    assert not list(folder.glob("*.part"))


def arrays(size):
    return {"x": np.zeros(size, np.uint8)}


def test_what_is_written_when_nobody_asks_for_anything_is_told(tiny, noise, tmp_path):
    runtime = tiny()
    disk = DiskStore(tmp_path, 1 << 30, runtime.fingerprint)
    worker = Worker(runtime, disk=disk)
    finished(worker, submit(worker, noise[:700]))
    while worker.resting:
        worker.rest()
    disk.flush()
    told = worker.status()
    assert told["prefixes"]["disk"]["written"] == len(list(tmp_path.iterdir())) > 0
    assert told["memory"]["parts"]["in_flight"] == 0
    assert told["memory"]["held"] == sum(told["memory"]["parts"].values())


def test_the_quota_holds_and_the_longest_unused_goes_first(tmp_path):
    disk = DiskStore(tmp_path, 10_000, "model")
    for i in range(8):
        name = disk.name([i])
        disk.write(File(name, 1, "", 0, 0), arrays(2000), {})
        while disk.in_flight:
            pass
        os.utime(tmp_path / f"{name}.safetensors", (i, i))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000
    left = {i for i in range(8) if disk.name([i]) in disk}
    assert left == {4, 5, 6, 7}
    disk.close()


def test_a_file_goes_before_the_one_that_it_hangs_on(tmp_path):
    disk = DiskStore(tmp_path, 7_000, "model")
    parent = ""
    for length in (1, 2, 3, 4):
        name = disk.name(range(length))
        disk.write(File(name, length, parent, 0, 0), arrays(2000), {})
        parent = name
    disk.close()
    lengths = sorted(file.length for file in disk.longest(range(9)))
    assert lengths == list(range(1, len(lengths) + 1)) and len(lengths) < 4


def test_more_than_may_wait_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("tqstack.engine.disk.MOST_IN_FLIGHT", 3000)
    disk = DiskStore(tmp_path, 10**9, "model")
    taken = [disk.write(File(str(i), i, "", 0, 0), arrays(2000), {}) for i in range(50)]
    assert taken[0] and not all(taken)
    disk.close()
    assert disk.in_flight == 0
