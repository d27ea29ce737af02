"""Which models can be divided, and that a divided one gives the numbers of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from models.architectures import CONFIGS, unadapted
from processes import clean_environment
from ranks.divided import FAMILIES
from tqstack.models.plan import Plan
from tqstack.models.spec import ModelSpec
from tqstack.models.split import NotSplitError, Part, common_plan, divided, split
from tqstack.ranks.supervisor import free_ports


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of two ranks says."""
    home = tmp_path_factory.mktemp("home")
    ring = home / "ring.json"
    ring.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    tests = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ranks.divided"],
            env=clean_environment(home, MLX_RANK=str(rank), MLX_HOSTFILE=str(ring)),
            cwd=tests,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_divided_model_gives_the_logits_of_the_whole(told, name):
    for rank in told:
        how, distance = rank[name]
        assert how == ("pipeline" if name == "qwen3-next" else "tensor")
        assert distance < 1e-3


class Ranks:
    """Stands for a group where nothing is sent."""

    def __init__(self, count):
        self._count = count

    def size(self):
        return self._count

    def rank(self):
        return 0


@pytest.mark.parametrize(
    "name, count, says",
    [
        ("granite", 2, "mlx-lm cannot divide models of this kind"),
        ("gemma3", 2, "mlx-lm cannot divide models of this kind"),
        ("llama", 3, "use fewer"),
        ("gpt-oss", 4, "fewer key and value heads"),
        ("qwen3-next", 4, "the same kinds of layers"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_to_do(name, count, says):
    config = CONFIGS[name]
    with pytest.raises(NotSplitError, match=says):
        split(ModelSpec.of(name, "", config), unadapted(config), Ranks(count))  # type: ignore


def test_a_part_has_its_share_of_heads_and_states():
    spec = ModelSpec.of("qwen3.5", "", CONFIGS["qwen3.5"])
    part = divided(spec, Part("tensor", 2)).geometry
    assert [x.kv_heads * 2 for x in part.layers] == [x.kv_heads for x in spec.geometry.layers]
    assert [x.state * 2 for x in part.layers] == [x.state for x in spec.geometry.layers]
    four = divided(spec, Part("tensor", 4)).geometry
    assert max(layer.kv_heads for layer in four.layers) == 1  # two heads, each on two ranks
    stage = divided(replace(spec), Part("pipeline", 5, first=2)).geometry
    assert stage.layers == spec.geometry.layers[2:3]


def test_alone_the_plan_is_ones_own():
    plan = Plan(10_000, 4_000, 5, 20, 7, 9, tail=3)
    assert common_plan(plan, mx.distributed.init()) == plan
