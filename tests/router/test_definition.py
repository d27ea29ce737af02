"""`backends.toml`: what it may say, and what is said of a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import toml
from tqstack.router.backends.definition import definitions
from tqstack.settings import Settings, SettingsError

URL = "http://127.0.0.1:9000"
GOOD = {"name": "studio", "kind": "openai", "url": URL}


def read(tmp_path, text: str):
    file = tmp_path / "backends.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    return definitions(Settings(router_backends=str(file)))


def test_without_a_file_there_are_the_two_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TQSTACK_CONFIG", str(tmp_path / "config.env"))
    sidecar, ollama = definitions(Settings(sidecar_enabled="0", ollama_model="qwen"))
    assert (sidecar.name, sidecar.kind, sidecar.role, sidecar.enabled) == (
        *("sidecar", "sidecar", "long", False),
    )
    assert (ollama.name, ollama.kind, ollama.role) == ("ollama", "ollama", "short")
    assert (ollama.url, ollama.default_model) == ("http://127.0.0.1:11434", "qwen")


def test_the_file_beside_the_settings_is_read_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setenv("TQSTACK_CONFIG", str(tmp_path / "config.env"))
    entries = [
        {**GOOD, "models": ["a", "b"], "default_model": "b", "role": "long", "priority": 2},
        {**GOOD, "name": "desk", "kind": "ollama", "url": "http://localhost:11434/v1/"},
        {**GOOD, "name": "tq", "kind": "sidecar"},
    ]
    (tmp_path / "backends.toml").write_text("".join(map(toml, entries)))
    studio, desk, tq = definitions(Settings())
    assert (studio.models, studio.default_model, studio.role) == (("a", "b"), "b", "long")
    assert (desk.url, desk.role, desk.priority) == ("http://127.0.0.1:11434", "short", 0)
    assert (tq.role, tq.models) == ("long", ())


def test_a_key_is_named_by_variable_or_file_and_never_told(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDIO_KEY", "sk-secret-1")
    (tmp_path / "key").write_text("sk-secret-2\n")
    one = {**GOOD, "key": {"env": "STUDIO_KEY"}}
    two = {**GOOD, "name": "desk", "key": {"file": str(tmp_path / "key")}}
    found = read(tmp_path, toml(one) + toml(two))
    assert [d.key.get_secret_value() for d in found] == ["sk-secret-1", "sk-secret-2"]
    assert "sk-secret" not in repr(found)


@pytest.mark.parametrize(
    "entry, told",
    [
        ({**GOOD, "key": "sk-secret-3"}, "the key itself has no place in the file"),
        ({**GOOD, "key": {"env": "NOT_THERE"}}, "the variable NOT_THERE holds no key"),
        ({**GOOD, "key": {"file": "/not/there"}}, "/not/there is no file"),
        ({**GOOD, "url": "studio.lan"}, "backend 1 url: allowed: an http://"),
        ({**GOOD, "url": "http://h:99999"}, "backend 1 url: allowed: an http://"),
        ({**GOOD, "kind": "vllm"}, "'sidecar', 'ollama' or 'openai'"),
        ({**GOOD, "rolle": "long"}, "backend 1 rolle: is not a setting here; allowed: at_once"),
        ({**GOOD, "role": "huge"}, "'short', 'long' or 'any'"),
        ({**GOOD, "name": "a b"}, "backend 1 name"),
        ({**GOOD, "name": "tq"}, "tq: means a backend of kind 'sidecar'"),
        ({**GOOD, "certificate": "/not/there.pem"}, "holds no certificate in PEM form"),
        ({**GOOD, "models": ["a"], "default_model": "b"}, "not among its models"),
        ({"name": "x", "kind": "openai"}, "backend 1 url: Field required"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place_and_what_is_allowed(tmp_path, entry, told):
    with pytest.raises(SettingsError) as error:
        read(tmp_path, toml(entry))
    assert told in str(error.value) and "backends.toml" in str(error.value)
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "backend: Field required"),
        ("backend = 3", "backend: Input should be a valid list"),
        ("[[backend]", "line 1"),
        ("x = " + "[" * 20_000, "recursion"),
        (toml({**GOOD, "enabled": False}), "every backend is switched off"),
        (toml(GOOD) * 2, "more than one backend 'studio'"),
        ("\ud800", "utf-8"),
    ],
)
def test_a_file_that_is_no_list_of_backends_is_refused(tmp_path, text, told):
    with pytest.raises(SettingsError, match=told):
        read(tmp_path, text)


def test_a_named_file_must_be_there(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        definitions(Settings(router_backends=str(tmp_path / "none.toml")))


VALUES = st.recursive(
    st.none().map(lambda _: 0)
    | st.booleans()
    | st.integers()
    | st.sampled_from(["openai", "sidecar", URL, "long", "studio", ""])
    | st.text("ab:/'\"\n\0\u2028", max_size=5).map(lambda t: t.replace("'", "")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from([*GOOD, "key", "models", "role", "priority", "enabled", "default_model"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.dictionaries(FIELDS, VALUES), max_size=3), st.text(max_size=20), st.booleans())
def test_any_file_is_backends_or_an_error_of_the_settings(entries, noise, noisy):
    import tempfile
    from pathlib import Path

    text = "".join(toml({**GOOD, **entry}) for entry in entries) + (noise if noisy else "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read(Path(folder), text)
        except SettingsError as error:
            assert "backends.toml" in str(error)
        else:
            assert found and len({one.name for one in found}) == len(found)
