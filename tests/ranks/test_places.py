"""Where ranks run and what each is told: hosts.json, MLX's variables, shares of one machine."""

from __future__ import annotations

import json

import pytest

from tqstack.ranks import control, supervisor
from tqstack.ranks.role import Role
from tqstack.ranks.supervisor import Places
from tqstack.settings import Settings, SettingsError

RING = [
    {"ssh": "localhost", "ips": ["127.0.0.1"], "rdma": []},
    {"ssh": "cupboard", "ips": ["10.0.0.2", "10.0.1.2"]},
]
JACCL = {
    "backend": "jaccl",
    "envs": ["MLX_METAL_FAST_SYNCH=1"],
    "hosts": [
        {"ssh": "a", "ips": ["127.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "b", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None]},
    ],
}


@pytest.fixture
def places(tmp_path):
    def make(content) -> tuple[Settings, Places]:
        path = tmp_path / "hosts.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        settings = Settings(sidecar_model="demo", sidecar_hosts=str(path), tqstack_api_key="secret")
        return settings, Places.of(settings)

    return make


def roles(settings, places) -> list[Role]:
    with control.listen("127.0.0.1") as listener:
        return places.roles(settings, listener)


def test_ring_hosts_have_an_address_of_the_ring_for_each_ip(places):
    settings, found = places(RING)
    first, second = roles(settings, found)
    ring = json.loads(second.files["MLX_HOSTFILE"])
    assert ring == [["127.0.0.1:32323"], ["10.0.0.2:32324", "10.0.1.2:32325"]]
    assert first.files == second.files and second.environment["MLX_RANK"] == "1"
    assert (found.is_here(0), found.is_here(1)) == (True, False)


def test_jaccl_hosts_have_their_devices_and_a_coordinator(places):
    settings, found = places(JACCL)
    role = roles(settings, found)[1]
    assert json.loads(role.files["MLX_IBV_DEVICES"]) == [[None, "rdma_en2"], ["rdma_en2", None]]
    assert role.environment["MLX_JACCL_COORDINATOR"] == "127.0.0.1:32323"
    assert role.environment["MLX_METAL_FAST_SYNCH"] == "1" and role.backend == "jaccl"


def test_ranks_on_one_machine_have_a_gpu_each_and_stay_on_loopback(monkeypatch):
    monkeypatch.setattr(supervisor, "accelerator", lambda: "cuda")
    settings = Settings(sidecar_model="demo", sidecar_ranks=2)
    found = Places.of(settings)
    for rank, role in enumerate(roles(settings, found)):
        wanted = {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank), "MLX_WORLD_SIZE": "2"}
        assert role.environment.items() >= wanted.items()
        assert role.environment["NCCL_HOST_IP"] == "127.0.0.1"
        assert role.environment["NCCL_SOCKET_IFNAME"] == "lo"
        assert (role.backend, role.beside) == ("nccl", 1)


def test_a_role_crosses_the_wire_unchanged_without_clients_keys(places):
    first, second = roles(*places(RING))
    assert Role.from_line(second.to_line()) == second
    assert first.settings["tqstack_api_key"] == "secret"
    assert second.settings["tqstack_api_key"] == "" and second.listener is None
    assert first.key == second.key and len(first.key) == 64


def test_ranks_on_one_machine_share_its_memory_and_disk(monkeypatch):
    settings = Settings(
        sidecar_model="demo",
        sidecar_ranks=2,
        sidecar_memory_mb=1000,
        sidecar_prefix_cache_mb=100,
        sidecar_prefix_disk_gb=2,
    )
    own = roles(settings, Places.of(settings))[1].own_settings()
    assert (own.sidecar_memory_mb, own.sidecar_prefix_cache_mb) == (500, 50)
    assert own.prefix_disk_bytes == 1_000_000_000


@pytest.mark.parametrize(
    "content, says",
    [
        ("[", "no JSON"),
        ([], "at least 2"),
        (RING[:1], "at least 2"),
        ([{"ssh": "a"}, RING[1]], "ips"),
        ([RING[0], {**RING[1], "ssh": "-oProxyCommand=x"}], "ssh"),
        ({**JACCL, "hosts": RING}, "rdma device"),
        ({"backend": "mpi", "hosts": RING}, "backend"),
        ({"hosts": RING, "envs": ["no value"]}, "envs"),
        ({"hosts": RING, "port": 1}, "port"),
    ],
)
def test_a_wrong_hosts_file_is_refused_with_the_place(places, content, says):
    with pytest.raises(SettingsError, match="SIDECAR_HOSTS") as error:
        places(content)
    assert says in str(error.value)


def test_a_hosts_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        Places.of(Settings(sidecar_hosts=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    "fields",
    [
        {"sidecar_ranks": 2, "sidecar_hosts": "hosts.json"},
        {"sidecar_ranks": 2, "sidecar_idle_unload_seconds": 60},
        {"sidecar_hosts": "hosts.json", "sidecar_lazy_load": "1"},
    ],
)
def test_settings_that_contradict_ranks_are_refused(fields):
    with pytest.raises(ValueError, match="SIDECAR_RANKS"):
        Settings(**fields)
