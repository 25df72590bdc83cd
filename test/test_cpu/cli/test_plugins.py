"""Plugins: how they are found and loaded, and what is said of those that cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from auto_round import AutoRound
from auto_round.cli import main
from auto_round.data_type import get_quant_func
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.plugins import load_plugins, loaded_plugins

SOURCE = """
from auto_round import PRESET_SCHEMES, QuantizationScheme
from auto_round.data_type import register_dtype


@register_dtype("{name}")
def {name}(tensor, **kwargs):
    return tensor, None, None


PRESET_SCHEMES["{upper}"] = QuantizationScheme(bits=4, group_size=32, data_type="{name}")
"""


@pytest.fixture(autouse=True)
def forget(registries: None) -> Iterator[None]:
    yield
    sys.modules.pop("guest_module", None)


def plugin(folder: Path, name: str, text: str = SOURCE) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text.format(name=name, upper=name.upper()))
    return path


def package(folder: Path, value: str, text: str) -> None:
    """An installed package that declares an entry point."""
    (folder / "guest_module.py").write_text(text)
    info = folder / "guest-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[auto_round.plugins]\nguest_types = {value}\n")


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    path = plugin(tmp_path, "mine")
    with pytest.raises(UnsupportedError):
        get_quant_func("mine")
    load_plugins(path)
    load_plugins([str(path)])
    assert get_quant_func("mine").__name__ == "mine"
    assert list(loaded_plugins()) == ["mine"]


def test_two_files_may_have_one_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = plugin(tmp_path, "mine"), plugin(tmp_path / "other", "mine", 'OTHER = "{name}"')
    load_plugins([first, second])
    assert get_quant_func("mine")


def test_the_variable_names_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(plugin(tmp_path, name)) for name in ("one", "two")]
    monkeypatch.setenv("AR_PLUGINS", os.pathsep.join(files))
    load_plugins()
    assert get_quant_func("one") and get_quant_func("two")


@pytest.mark.parametrize("function", [False, True])
def test_an_installed_package_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: bool) -> None:
    text = SOURCE.format(name="guest", upper="GUEST")
    if function:
        text = "def start():\n" + "".join(f"    {line}\n" for line in text.splitlines())
    package(tmp_path, "guest_module:start" if function else "guest_module", text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert loaded_plugins() == {}
    load_plugins()
    assert loaded_plugins() == {"guest_types": "package guest 1.2"}
    assert get_quant_func("guest")


def test_a_broken_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(tmp_path, "guest_module", "import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main.run(["list", "scheme"]) == ConfigError.exit_code
    assert "plugin 'guest_types' of package guest 1.2 cannot be loaded: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; give the path of a .py file"),
        ("a = 1\nb = 1 / 0\n", r"cannot be loaded: ZeroDivisionError: division by zero \(line 2\)"),
        ("def f(:\n", "cannot be loaded: SyntaxError"),
        (
            SOURCE.replace('"{name}"', '"int_sym"', 1),
            # Python 3.10 names the line of the function, later ones that of its decorator.
            r"cannot be loaded: .*'int_sym' is already registered by .* \(line [67]\)",
        ),
    ],
    ids=["missing", "raises", "syntax", "taken"],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        plugin(tmp_path, "broken", text)
    for _ in range(2):  # the second time too
        with pytest.raises(ConfigError, match=f"plugin {path} {message}"):
            load_plugins(path)
    assert loaded_plugins() == {}


def test_a_folder_is_no_plugin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_plugins(tmp_path)


def test_autoround_takes_files(tmp_path: Path, tiny_opt_model_path: str) -> None:
    ar = AutoRound(tiny_opt_model_path, scheme="MINE", plugins=plugin(tmp_path, "mine"), iters=0)
    assert ar.data_type == "mine"


def test_list_takes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["list", "scheme", "--plugin", str(plugin(tmp_path, "mine"))]) == 0
    assert "MINE" in capsys.readouterr().out
    assert main.run(["list", "scheme", "--plugin"]) == ConfigError.exit_code


def test_a_dataset_reaches_the_command_line(tmp_path: Path, tiny_opt_model_path: str) -> None:
    text = """
from auto_round.calib_dataset import register_dataset


@register_dataset("{name}", description="counted letters")
def {name}(tokenizer, seqlen):
    for i in range(64):
        yield "abcdefghijklmnopqrstuvwxyz" + "0123456789"[i % 10]
"""
    flags = ["--iters", "0", "--dataset", "letters", "--nsamples", "4", "--seqlen", "16", "--device", "cpu"]
    out = tmp_path / "out"
    words = ["--plugin", str(plugin(tmp_path, "letters", text)), "--output_dir", str(out)]
    assert main.run([tiny_opt_model_path, *flags, *words]) == 0
    assert "letters (4 samples)" in (out / "report.json").read_text()


def test_an_installed_package_reaches_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(tmp_path, "guest_module", SOURCE.format(name="guest", upper="GUEST"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main.run(["list", "scheme"]) == 0
    assert "GUEST" in capsys.readouterr().out


def test_an_unknown_file_stops_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["no/model", "--plugin", str(tmp_path / "none.py")]) == ConfigError.exit_code
    assert "none.py does not exist" in capsys.readouterr().err


def test_a_changed_plugin_is_another_run(tmp_path: Path, tiny_opt_model_path: str) -> None:
    from auto_round.run.fingerprint import fingerprint

    path = plugin(tmp_path, "mine")
    ar = AutoRound(tiny_opt_model_path, scheme="MINE", plugins=[path], iters=0, format="fake")
    values = fingerprint(ar.plan(), ar.settings, ar._runs.source, "5GB")
    assert values["plugin mine"] == loaded_plugins()["mine"]
