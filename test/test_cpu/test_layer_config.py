from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auto_round.errors import ConfigError
from auto_round.layer_config import matching_layers, parse_ignore_layers, parse_layer_config, resolve_layers
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES]
W4 = PRESET_SCHEMES["W4A16"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{k_proj:{bits:8},lm_head:W4A16}", {"k_proj": {"bits": 8}, "lm_head": "W4A16"}),
        ('{"k_proj": {"bits": 8, "sym": false}}', {"k_proj": {"bits": 8, "sym": False}}),
        ("{k_proj:{bits:8,group_size:32,sym:False},}", {"k_proj": {"bits": 8, "group_size": 32, "sym": False}}),
        ("{ a.b : { bits : 3 } , c : { data_type : int } }", {"a.b": {"bits": 3}, "c": {"data_type": "int"}}),
        ("{'.*k_proj':{bits:8}}", {".*k_proj": {"bits": 8}}),
        ('{"layers\\.[0-3],x":{bits:8}}', {r"layers\.[0-3],x": {"bits": 8}}),
        (
            "{a:{group_size:[128,64]},b:{group_size:(1,32)}}",
            {"a": {"group_size": [128, 64]}, "b": {"group_size": [1, 32]}},
        ),
        ("{a:{bits:'8'}}", {"a": {"bits": 8}}),
        ("{a:{sym:true,bits:none}}", {"a": {"sym": True, "bits": None}}),
        ("{}", {}),
    ],
)  # fmt: skip
def test_relaxed_text(text: str, expected: dict[str, Any]) -> None:
    assert parse_layer_config(text) == expected


def test_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"k_proj": {"bits": 8}}))
    assert parse_layer_config(str(path)) == {"k_proj": {"bits": 8}}
    with pytest.raises(ConfigError, match="cannot read"):
        parse_layer_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "text", ["", "{", "{a}", "{a:}", "{a:{bits:8}", "{a:1,a:2}", "{a:1}}", "[1]", "k_proj", '{"a:1}', "{a:[1}", "{:1}"]
)
def test_broken_text_says_where(text: str) -> None:
    with pytest.raises(ConfigError, match="layer_config"):
        parse_layer_config(text)


@settings(max_examples=300, deadline=None)
@example("{" * 5000)
@example("[" * 5000)
@given(st.one_of(st.text(), st.text(alphabet="{}[](),:'\"abit816 .*\\n")))
def test_any_text_gives_a_mapping_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(parse_layer_config(text), dict)
    except ConfigError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="layers.0123*+[](){}^$|\\kproj_?")))
def test_any_pattern_gives_layers_or_a_config_error(pattern: str) -> None:
    try:
        schemes = resolve_layers(LAYERS, W4, {pattern: {"bits": 8}})
    except ConfigError:
        return
    assert list(schemes) == LAYERS


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.down_proj"]),
        ("k_proj", [n for n in LAYERS if n.endswith("k_proj")]),
        ("layers.1", [n for n in LAYERS if ".1." in n]),
        ("layers.1.", [n for n in LAYERS if ".1." in n]),
        ("1.mlp", [n for n in LAYERS if ".1.mlp" in n]),
        ("mlp", [n for n in LAYERS if "mlp" in n]),
        ("*k_proj", [n for n in LAYERS if n.endswith("k_proj")]),
        ("*.self_attn.k_proj", [n for n in LAYERS if n.endswith("k_proj")]),
        (".*k_proj", [n for n in LAYERS if n.endswith("k_proj")]),
        (r"layers\.(0|11)\..*q_proj$", ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]),
        ("model.layers.[0-1].mlp", [n for n in LAYERS if ".0.mlp" in n or ".1.mlp" in n]),
        ("lm_head", []),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert matching_layers(pattern, LAYERS) == expected


def test_a_full_name_beats_a_pattern_and_the_later_pattern_the_earlier() -> None:
    name = "model.layers.0.self_attn.k_proj"
    schemes = resolve_layers(LAYERS, W4, {name: {"bits": 2}, "k_proj": {"bits": 8}, "layers.1.": {"bits": 3}})
    assert schemes[name].bits == 2
    assert schemes["model.layers.1.self_attn.k_proj"].bits == 3
    assert schemes["model.layers.2.self_attn.k_proj"].bits == 8
    assert schemes["model.layers.2.mlp.down_proj"] == W4


def test_ignored_layers_beat_everything() -> None:
    schemes = resolve_layers(LAYERS, W4, {"model.layers.0.mlp.down_proj": {"bits": 8}}, "mlp, layers.1.")
    assert schemes["model.layers.0.mlp.down_proj"].bits == 16
    assert schemes["model.layers.1.self_attn.q_proj"].bits == 16
    assert schemes["model.layers.10.self_attn.q_proj"] == W4
    assert parse_ignore_layers(" a ;b,, c") == parse_ignore_layers(["a", " b", "c", ""]) == ("a", "b", "c")


def test_the_head_stays_as_it_is_unless_named() -> None:
    assert resolve_layers(LAYERS, W4, outside_blocks=["lm_head"])["lm_head"].bits == 16
    assert resolve_layers(LAYERS, W4, outside_blocks=["lm_head"], quant_lm_head=True)["lm_head"] == W4
    named = resolve_layers(LAYERS, W4, {"lm_head": "W8A16"}, outside_blocks=["lm_head"])
    assert named["lm_head"] == PRESET_SCHEMES["W8A16"]
    both = resolve_layers(LAYERS, W4, {}, "lm_head", outside_blocks=["lm_head"], quant_lm_head=True)
    assert both["lm_head"].bits == 16


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("w8a16", PRESET_SCHEMES["W8A16"]),
        (QuantizationScheme(3, 32), QuantizationScheme(3, 32)),
        ({"bits": 8, "group_size": 32}, W4.with_overrides({"bits": 8, "group_size": 32})),
        ({}, W4),
        (8, W4.with_overrides({"bits": 8})),
        ("fp16", PRESET_SCHEMES["BF16"]),
        ({"bits": 16}, W4.with_overrides({"bits": 16})),
    ],
)
def test_entries(entry: Any, expected: QuantizationScheme) -> None:
    assert resolve_layers(LAYERS, W4, {"k_proj": entry})["model.layers.3.self_attn.k_proj"] == expected


@pytest.mark.parametrize(
    "entry, words",
    [
        ("W4A61", r"layer_config\['k_proj'\].*did you mean 'W4A16'"),
        ({"bist": 8}, r"layer_config\['k_proj'\].*did you mean 'bits'"),
        ({"bits": 0}, r"layer_config\['k_proj'\].*bits=0"),
        ({"bits": "8"}, "bits='8'"),
        (None, "give a preset name"),
        (3.5, "give a preset name"),
        (True, "give a preset name"),
    ],
)
def test_wrong_entries_name_the_layer_and_the_nearest(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_layers(LAYERS, W4, {"k_proj": entry})


@pytest.mark.parametrize("argument", ["layer_config", "ignore_layers"])
def test_a_pattern_that_matches_nothing_brings_the_nearest(argument: str) -> None:
    config = {"k_porj": {"bits": 8}} if argument == "layer_config" else None
    with pytest.raises(ConfigError, match=rf"{argument}: 'k_porj' matches no layer.*k_proj"):
        resolve_layers(LAYERS, W4, config, "k_porj" if config is None else None)


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        resolve_layers(LAYERS, W4, {"(k_proj": {"bits": 8}})


@pytest.mark.parametrize("pattern", ["", "  ", 3])
def test_an_empty_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="layer pattern"):
        resolve_layers(LAYERS, W4, {pattern: {"bits": 8}})


def test_ignored_layers_are_texts() -> None:
    with pytest.raises(ConfigError, match="ignore_layers: 3"):
        parse_ignore_layers([3])  # type: ignore[list-item]
