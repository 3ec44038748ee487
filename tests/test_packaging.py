"""What gets installed is what the repository holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "epmq_deploy": "",
    "exporters": "epmq_deploy.",
    "runtime": "epmq_deploy.",
    "cli": "epmq_deploy.",
}


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        prefix + ".".join(file.parent.relative_to(ROOT).parts)
        for folder, prefix in FOLDERS.items()
        for file in (ROOT / folder).rglob("__init__.py")
        if not any(parent.is_symlink() for parent in file.parents)
    }
    assert set(settings["packages"]) == packages | {"epmq_deploy"}
