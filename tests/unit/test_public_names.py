"""`from dstrain import ...`: every public name is there, and costs nothing until it is used."""

import importlib
import subprocess
import sys

import pytest

import dstrain
from tests.launch import ROOT, environment

PACKAGES = [
    "dstrain",
    *sorted(
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dstrain").glob("*/__init__.py")
        if "_PUBLIC" in path.read_text()
    ),
]
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package)._PUBLIC]


def test_the_table_is_not_empty():
    assert len(dstrain._PUBLIC) >= 10


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{p}.{n}" for p, n in NAMES])
def test_public_name_is_there(package, name):
    module = importlib.import_module(package)
    value = getattr(module, name)
    assert value is getattr(importlib.import_module(module._PUBLIC[name]), name)
    assert package != "dstrain" or name in dir(module)
    assert value.__doc__, f"{package}.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dstrain.trian  # noqa: B018


def test_importing_the_package_is_light():
    code = (
        "import sys, dstrain; print([m for m in ('torch', 'deepspeed', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_that_of_the_installed_distribution():
    assert importlib.import_module("importlib.metadata").version("dstrain") == dstrain.__version__
