"""What is installed and which devices are here, told without importing packages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from auto_round.errors import DeviceError
from auto_round.inference.convert_model import infer_target_device
from auto_round.inference.table import (
    available_devices,
    install_command,
    installed_version,
    unmet_requirement,
)


def test_versions() -> None:
    assert unmet_requirement("torch") is None and unmet_requirement("torch>=2.6") is None
    missing_requirement = unmet_requirement("transformers<5.0.0")
    assert missing_requirement is not None and missing_requirement.startswith(
        "needs transformers<5.0.0, and transformers 5"
    )
    assert unmet_requirement("no-such-package>=1") == "needs no-such-package>=1, which is not installed"
    found = installed_version("torch")  # without the build ("+cu130") for some wheels
    assert found and Version(found).public == Version(torch.__version__).public
    assert installed_version("no-such-package") is None


def test_a_package_on_the_path_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed_version("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    assert installed_version("gptqmodel") is None
    (tmp_path / "gptqmodel").mkdir()
    (tmp_path / "gptqmodel" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_version("gptqmodel") == "" and unmet_requirement("gptqmodel>=7") is None
    assert "gptqmodel" not in sys.modules
    (tmp_path / "gptqmodel-6.1.dist-info").mkdir()
    (tmp_path / "gptqmodel-6.1.dist-info" / "METADATA").write_text("Name: gptqmodel\nVersion: 6.1\n")
    assert unmet_requirement("gptqmodel>=7") == "needs gptqmodel>=7, and gptqmodel 6.1 is installed"


def test_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert unmet_requirement("C compiler") == "needs a C compiler, and none was found"
    assert install_command(("C compiler",)) == "install a C compiler"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    assert unmet_requirement("C compiler") is None


def test_what_to_type() -> None:
    assert install_command(("torch>=2.6",)) == ""
    assert install_command(("no-such-package", "torch>=99")) == "pip install no-such-package 'torch>=99'"


def test_device_maps() -> None:
    assert infer_target_device(None) in ("cpu", "hpu") and infer_target_device("xpu:0") == "xpu"
    assert (
        infer_target_device({"a": "disk", "b": "cpu"}) == "cpu"
        and infer_target_device(torch.device("cuda", 1)) == "cuda"
    )
    assert infer_target_device({"a": 0}) != "cpu" and infer_target_device("auto") in available_devices()
    with pytest.raises(DeviceError, match="device_map"):
        infer_target_device(1.5)


def test_a_gaudi_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "habana_frameworks").mkdir()
    (tmp_path / "habana_frameworks" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "hpu" in available_devices() and infer_target_device(None) == "hpu" and infer_target_device("cpu") == "cpu"
