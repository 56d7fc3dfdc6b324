"""The installed package: light to import, lazy names that resolve, assets and types shipped."""

import subprocess
import sys
from importlib import resources

import pytest

import hymba

HEAVY = ("accelerate", "datasets", "matplotlib", "pandas", "tokenizers", "transformers", "typer", "yaml")


@pytest.mark.parametrize("module", ["hymba", "hymba.model"])
def test_import_is_light(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_plain_import_does_not_even_load_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, hymba; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize("name", hymba.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(hymba, name) is not None
    assert name in dir(hymba)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mamba'"):
        hymba.Mamba  # noqa: B018


def test_bundled_files_are_package_data() -> None:
    package = resources.files("hymba")
    assert (package / "py.typed").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (package / "assets" / "tiny").iterdir()
    }
