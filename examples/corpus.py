"""Text for byte-level language models: collect, split, hash, store and encode it.

The default text is what every machine with Python has: the sources (and so the docstrings) of the
standard library. Everything here is deterministic: the same files give the same documents in the
same order, the same held-out set and the same SHA-256.

Token ids are those of transformers' `ByT5Tokenizer`: id = byte + 3, with 0 = padding, 1 = end of
document (eos), 2 = unknown.

    python examples/corpus.py                                  # what the text is made of
    python examples/corpus.py --write-corpus corpus.jsonl.gz   # carry the same text elsewhere
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
BYTE_OFFSET = 3
NUM_IDS = 256 + BYTE_OFFSET  # ids in use; ByT5 rounds its vocabulary up to 384
HELD_OUT_FRACTION = 0.03
MAX_HELD_OUT_BYTES = 200_000  # a larger file is trained on: alone it would decide the figure
TEXT_SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst")

# Not the standard library's own text, or the same table of numbers over and over (encodings).
SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings"}
TEST_DIRS = {"test", "tests", "idle_test"}
# Written when Python was built: they differ between machines and hold their paths.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class CorpusError(ValueError):
    """The text cannot be used; the message says why and what to do."""


class Document(NamedTuple):
    """One file: its path relative to the folder it was found in ('/' separators) and its bytes."""

    path: str
    data: bytes


def stdlib_documents(include_tests: bool = False) -> list[Document]:
    """The running Python's standard library, *.py; its own test suites only if asked for."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = SKIPPED_DIRS if include_tests else SKIPPED_DIRS | TEST_DIRS
    return read_folder(root, suffixes=(".py",), skipped_dirs=skipped)


def read_folder(
    root: str | os.PathLike[str],
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    skipped_dirs: Iterable[str] = ("__pycache__",),
) -> list[Document]:
    """Every file under `root` with one of `suffixes`, sorted by path, each content once.

    Links are not followed; empty files and the hidden ones are left out. Raises CorpusError if
    nothing is left.
    """
    root = Path(root)
    skipped = set(skipped_dirs)
    paths: list[Path] = []
    for folder, dirs, files in os.walk(root):
        dirs[:] = [d for d in dirs if d not in skipped and not d.startswith((".", "config-"))]
        paths += [
            Path(folder, name)
            for name in files
            if name.endswith(tuple(suffixes)) and not name.startswith((".", *SKIPPED_PREFIXES))
        ]
    found = [
        Document(path.relative_to(root).as_posix(), path.read_bytes())
        for path in paths
        if path.is_file() and not path.is_symlink()
    ]
    documents = _sorted_unique(found)
    if not documents:
        raise CorpusError(
            f"no text in {root}: looked for files ending in {', '.join(suffixes)}; "
            "name a folder that has some, or a single file"
        )
    return documents


def read_text(path: str | os.PathLike[str]) -> list[Document]:
    """Documents of a folder, or the single document that a file is. CorpusError if neither."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise CorpusError(f"no such file or folder: {path}")
    data = path.read_bytes()
    if not data:
        raise CorpusError(f"{path} is empty; a text of at least a few kilobytes is needed")
    return [Document(path.name, data)]


def _sorted_unique(documents: Iterable[Document]) -> list[Document]:
    """Sort by path, then keep the first of every group with equal contents; drop empty ones."""
    seen: set[bytes] = set()
    kept = []
    for document in sorted(documents):
        digest = hashlib.sha256(document.data).digest()
        if document.data and digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def corpus_sha256(documents: Iterable[Document]) -> str:
    """Hex SHA-256 over paths, lengths and contents, in order."""
    digest = hashlib.sha256()
    for path, data in documents:
        digest.update(f"{path}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def split_documents(
    documents: Sequence[Document], fraction: float = HELD_OUT_FRACTION
) -> tuple[list[Document], list[Document]]:
    """(training, held-out): held out is a file whose path hashes below `fraction`.

    The choice looks at each file alone (its path, and that it is not above MAX_HELD_OUT_BYTES), so
    that adding files moves no other file across. If the hash picks no file, the one with the
    smallest hash is held out; a single document gives its tail. Raises CorpusError if there is too
    little text to split.
    """
    if not 0 < fraction < 1:
        raise CorpusError(f"held-out fraction must lie between 0 and 1, got {fraction}")
    if len(documents) == 1:
        path, data = documents[0]
        cut = len(data) - max(1, round(len(data) * fraction))
        if cut < 1:
            raise CorpusError(f"{path}: {len(data)} bytes are too few to hold any out")
        return [Document(path, data[:cut])], [Document(f"{path}[{cut}:]", data[cut:])]
    if not documents:
        raise CorpusError("there are no documents to split")
    score = {d.path: _path_score(d.path) for d in documents if len(d.data) <= MAX_HELD_OUT_BYTES}
    if not score:
        raise CorpusError(f"every file is above {MAX_HELD_OUT_BYTES} bytes; name a single file")
    limit = max(fraction, min(score.values()))
    held_out = [d for d in documents if score.get(d.path, 1.0) <= limit]
    training = [d for d in documents if score.get(d.path, 1.0) > limit]
    if not training:
        raise CorpusError(f"a held-out fraction of {fraction} leaves no training text")
    return training, held_out


def _path_score(path: str) -> float:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def write_corpus(documents: Iterable[Document], path: str | os.PathLike[str]) -> None:
    """Write gzipped JSON lines, {"path": …, "text": …}; the same documents give the same bytes.

    Bytes that are not UTF-8 survive as surrogate escapes. The file appears whole or not at all.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        for document in documents:
            text = document.data.decode("utf-8", "surrogateescape")
            out.write(json.dumps({"path": document.path, "text": text}).encode() + b"\n")
    os.replace(partial, path)


def read_corpus(path: str | os.PathLike[str]) -> list[Document]:
    """Read what `write_corpus` wrote. CorpusError if the file is missing, cut short or foreign."""
    documents = []
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            for line in lines:
                row = json.loads(line)
                data = row["text"].encode("utf-8", "surrogateescape")
                documents.append(Document(row["path"], data))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"cannot read the corpus {path} ({error}); make one with --write-corpus"
        ) from error
    if not documents:
        raise CorpusError(f"the corpus {path} holds no documents; make one with --write-corpus")
    return documents


def encode(data: bytes) -> np.ndarray:
    """Bytes → ByT5 ids, (len(data),) int16."""
    return np.frombuffer(data, dtype=np.uint8).astype(np.int16) + BYTE_OFFSET


def decode(ids: Iterable[int]) -> bytes:
    """ByT5 ids → bytes; the special ids (and those above the bytes) are dropped."""
    return bytes(i - BYTE_OFFSET for i in map(int, ids) if BYTE_OFFSET <= i < NUM_IDS)


def token_stream(documents: Iterable[Document]) -> np.ndarray:
    """All documents as one (total,) int16 stream: eos, document, eos, document, …, eos."""
    eos = np.array([EOS_ID], dtype=np.int16)
    parts = [eos]
    for document in documents:
        parts += [encode(document.data), eos]
    return np.concatenate(parts)


def total_bytes(documents: Iterable[Document]) -> int:
    """Number of bytes of text."""
    return sum(len(document.data) for document in documents)


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose the text, shared by the scripts of this folder."""
    source = parser.add_argument_group("text").add_mutually_exclusive_group()
    source.add_argument("--text", metavar="PATH", help="a folder of text, or one text file")
    source.add_argument("--corpus", metavar="FILE", help="an archive made with --write-corpus")
    parser.add_argument(
        "--include-tests",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the standard library's own test suites too (no effect on --text, --corpus)",
    )


def documents_from_options(args: argparse.Namespace) -> list[Document]:
    """The documents that the options of `add_corpus_options` name."""
    if args.corpus:
        return read_corpus(args.corpus)
    if args.text:
        return read_text(args.text)
    return stdlib_documents(include_tests=args.include_tests)


def describe(documents: Sequence[Document]) -> str:
    """Two lines for people: sizes, split and hash."""
    training, held_out = split_documents(documents)
    return (
        f"text: {len(documents)} files, {total_bytes(documents):,} bytes, "
        f"sha256 {corpus_sha256(documents)}\n"
        f"training: {len(training)} files, {total_bytes(training):,} bytes; "
        f"held out: {len(held_out)} files, {total_bytes(held_out):,} bytes"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_corpus_options(parser)
    parser.add_argument("--write-corpus", metavar="FILE", help="store the text in one archive")
    args = parser.parse_args(argv)
    try:
        documents = documents_from_options(args)
        print(describe(documents))
        if args.write_corpus:
            write_corpus(documents, args.write_corpus)
            print(f"wrote {args.write_corpus}, {os.path.getsize(args.write_corpus):,} bytes")
    except (CorpusError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
