"""Layers in turboquant-mlx-full's format give what their dequantised weights give."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from models.architectures import CONFIGS, unadapted
from tqstack.models.device import this_machine
from tqstack.weights import turboquant_mlx
from tqstack.weights.turboquant_mlx import PolarLinear, PolarSwitchLinear, put_layers
from weights.polar_writer import FIELDS, Coded, write_layer


def made(kind: type[PolarLinear], coded: Coded, bias=None, rotated: bool | None = True):
    planes = coded.planes | ({} if bias is None else {"bias": bias})
    layer = kind({name: plane.shape for name, plane in planes.items()}, rotated)
    layer.load_weights([(name, mx.array(plane)) for name, plane in planes.items()])
    return layer


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [128, 192, 320, 448, 2880 // 4])
@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("qjl", [False, True])
def test_a_layer_gives_what_its_dequantised_weights_give(width, levels, qjl, monkeypatch):
    monkeypatch.setattr(turboquant_mlx, "CHUNK", 7 * width)  # of 40 rows, seven at a time
    coded = write_layer(random(40, width), levels, group=16, qjl=qjl)
    bias, x = random(40).astype(np.float16), random(2, 3, width)
    expected = x @ coded.weight.T + bias
    layer = made(PolarLinear, coded, bias)
    scale = np.abs(expected).max()
    assert np.abs(np.array(layer(mx.array(x))) - expected).max() < 1e-5 * scale
    assert np.abs(np.array(layer.dense()) - coded.weight).max() < 1e-5
    assert np.abs(np.array(layer.plain()(mx.array(x))) - expected).max() < 1e-5 * scale
    halves = layer(mx.array(x).astype(mx.bfloat16))
    assert halves.dtype == mx.bfloat16
    assert np.abs(np.array(halves.astype(mx.float32)) - expected).max() < 0.02 * scale


@pytest.mark.parametrize("levels", [3, 8])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_give_what_their_dequantised_weights_give(levels, tokens, monkeypatch):
    monkeypatch.setattr(turboquant_mlx, "CHUNK", 4 * 3 * 128)
    coded, bias = write_layer(random(4, 24, 128), levels), random(4, 24).astype(np.float16)
    layer, plain = made(PolarSwitchLinear, coded, bias), SwitchLinear(128, 24, 4)
    plain.weight, plain.bias = mx.array(coded.weight), mx.array(bias)
    x, chosen = mx.array(random(1, tokens, 1, 1, 128)), mx.random.randint(0, 4, (1, tokens, 2))
    for same in (layer(x, chosen), layer.plain()(x, chosen)):
        assert same.shape == (1, tokens, 2, 1, 24)
        assert mx.abs(same - plain(x, chosen)).max().item() < 1e-4
    x, chosen = mx.array(random(5, 1, 128)), mx.array([0, 0, 2, 3, 3])  # as mlx-lm sorts them
    same = layer(x, chosen, sorted_indices=True) - plain(x, chosen, sorted_indices=True)
    assert mx.abs(same).max().item() < 1e-4


@pytest.mark.skipif(not this_machine().expands_weights, reason="a GPU frees memory later")
@pytest.mark.parametrize("experts", [0, 8])
def test_a_layer_is_never_there_decoded_as_a_whole(experts, monkeypatch):
    monkeypatch.setattr(turboquant_mlx, "CHUNK", 1 << 14)
    words, groups = (2048, 26), (2048, 4)  # of 256 inputs in 3 bits
    lead = (experts,) if experts else ()
    planes = {"weight": (*lead, *words), "scales": (*lead, *groups), "codebook": (8,)}
    kind = PolarSwitchLinear if experts else PolarLinear
    layer = kind({**planes, "signs": (256,)}, True)
    arguments = (mx.array([[0, 1, 2, 3, 4, 5, 6, 7]]),) if experts else ()
    x = mx.ones((1, 1, 256) if not experts else (1, 1, 1, 256))
    mx.eval(layer.parameters(), x, arguments)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x, *arguments))
    decoded = 4 * 2048 * 256 * max(1, experts)
    assert mx.get_peak_memory() - before < decoded / (10 if experts else 2)


def test_rotation_none_is_believed_unless_a_sign_says_otherwise():
    x = random(5, 128)
    for rotated in (False, True):
        coded = write_layer(random(32, 128), rotated=rotated)
        layer = made(PolarLinear, coded, rotated=None)
        assert np.abs(np.array(layer(mx.array(x))) - x @ coded.weight.T).max() < 1e-3


@pytest.fixture
def llama():
    """The model, and shapes of the tensors of a folder of it."""
    model, path = unadapted(CONFIGS["llama"]), "model.layers.0.mlp.up_proj"
    planes = write_layer(np.array(model.layers[0].mlp.up_proj.weight)).planes
    return model, {f"{path}.{name}": plane.shape for name, plane in planes.items()}


def test_fields_that_nobody_knows_are_refused(llama):
    cases = [
        ({"lattice": "e8"}, r"quantization\.lattice in config\.json is a field .* update tqstack"),
        ({"fuse_rotations": True}, "cannot be fused into norms"),
        ({"rotation": "butterfly"}, "'butterfly'; turboquant-mlx models have one of hadamard"),
    ]
    for fields, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            put_layers(llama[0], {**FIELDS, **fields}, llama[1])
    put_layers(llama[0], {**FIELDS, "fuse_rotations": False, "attn_bits": None}, llama[1])


@pytest.mark.parametrize(
    ("plane", "shape", "sentence"),
    [
        ("signs", None, r"lacks model\.layers\.0\.mlp\.up_proj\.signs: download or convert"),
        ("weight", None, r"lacks .*up_proj\.weight"),
        ("weight", (192, 12), r"up_proj\.weight has the shape \(192, 12\) and should have .*, 13"),
        ("scales", (192, 3), "3 groups, into which a row of 128 weights"),
        ("codebook", (7,), "7 levels"),
        ("bias", (128,), r"bias has the shape \(128,\) and should have \(192,\)"),
        ("qjl_packed", (192, 4), r"lacks .*qjl_norms, .*qjl_signs"),
    ],
)
def test_planes_that_are_missing_or_of_another_shape_are_named(llama, plane, shape, sentence):
    model, names = llama
    name = f"model.layers.0.mlp.up_proj.{plane}"
    if shape is None:
        del names[name]
    else:
        names[name] = shape
    with pytest.raises(ValueError, match=sentence):
        put_layers(model, FIELDS, names)


def test_codes_of_no_linear_layer_and_halves_of_affine_codes_are_refused(llama):
    model, names = llama
    moved = {name.replace("up_proj", "side_proj"): shape for name, shape in names.items()}
    with pytest.raises(ValueError, match=r"codes of model\.layers\.0\.mlp\.side_proj, where"):
        put_layers(model, FIELDS, moved)
    tower = {f"vision_tower.{name}": shape for name, shape in names.items()}
    put_layers(model, FIELDS, tower)  # mlx-lm drops it
    assert not [m for _, m in model.named_modules() if isinstance(m, PolarLinear)]
    names |= {"model.embed_tokens.weight": (128, 16), "model.embed_tokens.scales": (128, 4)}
    with pytest.raises(ValueError, match=r"lacks model\.embed_tokens\.biases"):
        put_layers(model, FIELDS, names)
