"""Text, its vocabulary, and the parallel streams that truncated BPTT trains on.

the text          a b c d e f g h i j k l m ...
B = 3 streams     a b c d | e f g h | i j k l          stream b starts at b * S
step k            columns k*T .. (k+1)*T of every stream; the targets are one column later
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .errors import DataError
from .files import read_regular_file

STANDARD_LIBRARY_LIMIT: Final = 4_000_000  # characters; one pass of the default run
RARE_INTERVAL: Final = 100_000  # a character seen less than once per this many is unknown
VALIDATION_FRACTION: Final = 0.05
VALIDATION_LIMIT: Final = 100_000  # characters; keeps an evaluation at about a second

# Tests, installed packages and generated tables: not typical source code.
_SKIPPED_FOLDERS: Final = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)


@dataclass(frozen=True)
class Text:
    """A text and its origin.

    ``files`` are the user's files, or empty for the standard library.
    """

    content: str
    description: str
    files: tuple[str, ...] = ()
    encoding: str = "utf-8"

    @property
    def digest(self) -> str:
        """SHA-256 of the text, so that a resumed run can check that the text is unchanged."""
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


def read_files(paths: Sequence[str | os.PathLike[str]], encoding: str = "utf-8") -> Text:
    """Reads files and concatenates their texts.

    Line ends become ``\\n``, and a byte order mark is removed.

    Args:
        paths: text files.
        encoding: encoding of the files.

    Raises:
        DataError: the encoding does not exist, or a file is missing, a folder, not readable,
            empty, binary, or not text in this encoding.
    """
    try:
        encoding = codecs.lookup(encoding).name
        "".encode(encoding)
    except (LookupError, ValueError) as error:
        raise DataError(
            f"--encoding must be a text encoding that Python knows, got {encoding!r}"
        ) from error
    parts = [_read_file(Path(path), encoding) for path in paths]
    names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    plural = "file" if len(paths) == 1 else "files"
    return Text(
        content="".join(parts),
        description=f"{len(paths)} {plural} ({names})",
        files=tuple(str(Path(path).absolute()) for path in paths),
        encoding=encoding,
    )


def _read_file(path: Path, encoding: str) -> str:
    data = read_regular_file(path, DataError)
    if not data:
        raise DataError(f"{path}: is empty")
    if encoding == "utf-8" and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16, not UTF-8 (pass --encoding utf-16)")
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        if encoding == "utf-8" and b"\0" in data:
            raise DataError(f"{path}: is a binary file, not text") from error
        where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{path}: is not {encoding} text{where}; pass --encoding") from error
    if "\0" in text:
        raise DataError(f"{path}: is a binary file, not text")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def standard_library_files(root: Path) -> list[Path]:
    """Returns Python files below ``root``, without tests, installed packages, generated tables.

    The order is a fixed shuffle (sorted by a checksum of the relative path), so that the first few
    million characters and the held-out end are both samples of the whole library.
    """
    found: list[tuple[int, str]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                relative = Path(folder, name).relative_to(root).as_posix()
                found.append((zlib.crc32(relative.encode("utf-8", "surrogateescape")), relative))
    return [root / relative for _, relative in sorted(found)]


def read_standard_library(limit: int = STANDARD_LIBRARY_LIMIT, root: Path | None = None) -> Text:
    """Reads the Python source of the standard library of the running interpreter.

    Args:
        limit: characters after which no further file is read.
        root: another folder to read, for tests.

    Raises:
        DataError: there is no source (the interpreter ships compiled files only).
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = standard_library_files(folder)
    parts: list[str] = []
    used = 0
    for path in paths:
        if used >= limit:
            break
        try:
            part = _read_file(path, "utf-8")
        except DataError:  # an empty __init__.py, a source in another encoding
            continue
        parts.append(part)
        used += len(part)
    if not parts:
        raise DataError(
            f"{folder}: holds no Python source of the standard library; pass --text FILE"
        )
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Text(
        content="".join(parts),
        description=(
            f"the Python {version} standard library, {len(parts)} of its {len(paths)} files "
            f"(up to {limit:,} characters, without tests)"
        ),
    )


class Vocabulary:
    """The characters that a model knows, numbered from 1. Number 0 stands for all others.

    Args:
        characters: distinct single characters.
    """

    UNKNOWN: Final = 0
    UNKNOWN_SYMBOL: Final = "\ufffd"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = tuple(characters)
        if len(set(self.characters)) != len(self.characters) or any(
            len(character) != 1 for character in self.characters
        ):
            raise DataError("the vocabulary must consist of distinct single characters")
        codes = torch.tensor([ord(character) for character in self.characters], dtype=torch.int64)
        self._table = torch.zeros(sys.maxunicode + 1, dtype=torch.int32)
        self._table[codes] = torch.arange(1, len(codes) + 1, dtype=torch.int32)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Returns the characters of a text that occur at least once per `RARE_INTERVAL`.

        Raises:
            DataError: every character is rarer.
        """
        counts = torch.bincount(_code_points(text))
        least = max(1, len(text) // RARE_INTERVAL)
        found = torch.nonzero(counts >= least).flatten().tolist()
        if not found:
            raise DataError(
                f"none of the {len(text):,} characters of the text occurs {least} times"
            )
        return cls(chr(code) for code in found)

    def __len__(self) -> int:
        """Number of symbols, including the unknown symbol."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Tensor:
        """Returns the numbers of the characters of a text, int32 [len(text)]."""
        return self._table[_code_points(text)]

    def decode(self, numbers: Iterable[int]) -> str:
        """Returns the text of a sequence of numbers. The unknown symbol becomes U+FFFD."""
        symbols = (self.UNKNOWN_SYMBOL, *self.characters)
        return "".join(symbols[number] for number in numbers)


def _code_points(text: str) -> Tensor:
    if not text:
        return torch.empty(0, dtype=torch.int64)
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    points: Tensor = torch.frombuffer(data, dtype=torch.int32)
    if sys.byteorder == "big":
        points = points.view(torch.uint8).view(-1, 4).flip(1).contiguous().view(torch.int32)[:, 0]
    return points.to(torch.int64)


class Streams:
    """A text cut into parallel streams, served in chunks of consecutive steps.

    Args:
        numbers: int32 [N], an encoded text.
        batch_size: B, number of streams.
        seq_length: T, characters per stream and chunk.
        device: device of the chunks.

    Raises:
        DataError: the text has fewer than B * T + 1 characters.
    """

    def __init__(
        self,
        numbers: Tensor,
        batch_size: int,
        seq_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        length = (numbers.numel() - 1) // batch_size  # S, characters per stream
        if length < seq_length:
            raise DataError(
                f"{numbers.numel():,} characters are too few for chunks of "
                f"{batch_size} x {seq_length}"
            )
        self.batch_size = batch_size
        self.seq_length = seq_length
        self.chunks = length // seq_length
        body = numbers[: batch_size * length].view(batch_size, length).t()  # [S,B]
        end = numbers[length : batch_size * length + 1 : length].unsqueeze(0)  # [1,B]
        self._rows = torch.cat((body, end)).to(device)  # [S+1,B]

    def chunk(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of a chunk, each int64 [T,B]. Chunk 0 starts all streams."""
        start = index * self.seq_length
        rows = self._rows[start : start + self.seq_length + 1].long()
        return rows[:-1], rows[1:]


@dataclass(frozen=True)
class Corpus:
    """A text prepared for training: its vocabulary, the training part and the validation part."""

    text: Text
    vocabulary: Vocabulary
    training: Streams
    validation: Streams

    def summary(self) -> dict[str, Any]:
        """Returns the description of the text that a checkpoint saves."""
        return {
            "files": list(self.text.files),
            "encoding": self.text.encoding,
            "characters": len(self.text.content),
            "sha256": self.text.digest,
        }


def split(text: Text, batch_size: int, seq_length: int) -> tuple[str, str]:
    """Returns the training part of a text and the held-out end, as `prepare` describes.

    Raises:
        DataError: the text is too short for the batch size and sequence length.
    """
    total = len(text.content)
    held_out = min(int(total * VALIDATION_FRACTION), VALIDATION_LIMIT)
    held_out = max(held_out, seq_length + 1)
    needed = batch_size * seq_length + 1 + seq_length + 1
    if total < needed:
        name = text.description
        raise DataError(
            f"{name}: {total:,} characters are too few; --batch-size {batch_size} and "
            f"--seq-length {seq_length} need at least {needed:,}"
        )
    held_out = min(held_out, total - (batch_size * seq_length + 1))
    return text.content[:-held_out], text.content[-held_out:]


def prepare(
    text: Text,
    batch_size: int,
    seq_length: int,
    device: torch.device | str = "cpu",
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """Holds out the end of a text, builds the vocabulary of the rest, and cuts both into streams.

    The held-out part is 5 % of the text, at least one chunk and at most 100,000 characters.

    Args:
        text: the text to train on.
        batch_size: B, streams of the training part. The held-out part has as many if it is long
            enough.
        seq_length: T, characters per stream and chunk.
        device: device of the chunks.
        vocabulary: a given vocabulary (of a checkpoint) instead of that of the text.

    Raises:
        DataError: the text is too short for the batch size and sequence length.
    """
    learned, tested = split(text, batch_size, seq_length)
    vocabulary = vocabulary or Vocabulary.of(learned)
    streams = max(1, min(batch_size, (len(tested) - 1) // seq_length))
    return Corpus(
        text=text,
        vocabulary=vocabulary,
        training=Streams(vocabulary.encode(learned), batch_size, seq_length, device),
        validation=Streams(vocabulary.encode(tested), streams, seq_length, device),
    )
