"""What a file is, by its content: packed or not, text, JSON or Parquet, and its bytes as UTF-8."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator

import polars as pl

from conet_jax import files
from conet_jax.errors import InputError

FORMATS = (
    "auto",
    "amazon_2014",
    "amazon_2018",
    "amazon_json",
    "named",
    "tsv",
    "recbole",
    "json",
    "parquet",
    "ncf",
)
SAMPLE_BYTES = 1 << 18  # some thousand lines: enough to tell 2014 from 2018
LINE_BYTES = 16 << 20
UNREADABLE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError),
    *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_BZ2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # "BZh" alone can begin an id
# Files that are no text and that are not read, by how they begin.
_OTHERS = {
    b"ARROW1\0\0": "a Feather (Arrow) file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls)",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!\x1a": "a RAR archive",
    b"\x80\x02": "stored Python objects",
    b"\x80\x03": "stored Python objects",
    b"\x80\x04": "stored Python objects",
    b"\x80\x05": "stored Python objects",
    b"%PDF-": "a PDF",
}
_ARRAY = re.compile(rb"\s*\[\s*(\{|\]\s*$)")
# "x" and one of these begin a zlib stream, which Polars would unpack, or begin an id.
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        """Says that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fills a buffer; 0 at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def kind_of(name: str) -> str:
    """Returns ``plain``, ``parquet`` or how a file is packed: gzip, bz2, xz, zstd or zip.

    Raises:
      InputError: it is something else that is no text.
    """
    with readable(name), files.open_regular(name) as file:
        head = file.read(512)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4))
        tail = file.read(4)
    if head.startswith(b"PAR1") and tail == b"PAR1" and len(head) >= 12:
        return "parquet"
    for begins, what in _OTHERS.items():
        if head.startswith(begins):
            raise InputError(f"{name}: is {what}: save it as CSV or Parquet")
    if head[257:262] == b"ustar":
        raise InputError(f"{name}: is a tar archive: unpack it, and name the file in it")
    kind = next((kind for begins, kind in _PACKED.items() if head.startswith(begins)), "plain")
    return "plain" if kind == "bz2" and not _BZ2.match(head) else kind


def scannable(name: str) -> bool:
    """Whether Polars reads the file as it is: UTF-8, plain or packed by gzip or zstd."""
    if kind_of(name) not in ("plain", "gzip", "zstd"):
        return False
    with files.open_regular(name) as file:
        if file.read(2) in _ZLIB:
            return False
    with opened(name) as file:
        return not _is_wide(file)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what goes wrong when a file is read into an ``InputError``."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not the text that its first bytes promise: {error}") from None
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or "damaged"
        raise InputError(
            f"{name}: cannot be read: {reason}; expected a text file, plain or packed by gzip, "
            "bz2, xz, zstd or zip, or a Parquet file"
        ) from None


@contextlib.contextmanager
def opened(name: str) -> Iterator[io.BufferedIOBase]:
    """Opens a file of text for reading its bytes, unpacked; UTF-16 with its mark becomes UTF-8."""
    with contextlib.ExitStack() as stack:
        file = _unpacked(name, stack)
        if _is_wide(file):
            file = stack.enter_context(io.BufferedReader(_Chunks(_as_utf8(file))))
        yield file


def is_array(name: str) -> bool:
    """Whether a file is one JSON array, of objects or of nothing."""
    with readable(name), opened(name) as file:
        return _ARRAY.match(file.read(1 << 12).removeprefix(codecs.BOM_UTF8)) is not None


def _unpacked(name: str, stack: contextlib.ExitStack) -> io.BufferedIOBase:
    kind = kind_of(name)
    if kind == "parquet":
        raise InputError(f"{name}: is a Parquet file: expected text")
    if kind == "zip":
        archive = stack.enter_context(zipfile.ZipFile(name))
        only = _only_member(name, archive)
        try:
            member = archive.open(only)
        except RuntimeError:
            raise InputError(
                f"{name}: {only.filename} in it is encrypted: unpack it first"
            ) from None
        return stack.enter_context(io.BufferedReader(member))
    if kind == "zstd":
        return stack.enter_context(io.BufferedReader(_Chunks(_lines_of_zstd(name))))
    open_packed = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(kind, open)
    file = stack.enter_context(open_packed(name, "rb"))
    # As one class, so that each can look ahead.
    return file if kind == "plain" else stack.enter_context(io.BufferedReader(file))


def _only_member(name: str, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if any(member.filename == "[Content_Types].xml" for member in members):
        raise InputError(f"{name}: is an Excel workbook or another document: save it as CSV")
    if len(members) != 1:
        listed = ", ".join(member.filename for member in members[:3])
        raise InputError(
            f"{name}: a zip archive of {len(members)} files ({listed:.80}): expected one; unpack it"
        )
    return members[0]


def _is_wide(file: io.BufferedIOBase) -> bool:
    return file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _as_utf8(file: io.BufferedIOBase) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")()
    for piece in iter(lambda: file.read(1 << 16), b""):
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", final=True).encode()


def _lines_of_zstd(name: str) -> Iterator[bytes]:
    for batch in pl.scan_lines(name, glob=False).collect_batches(chunk_size=1 << 14):
        yield "".join(f"{line}\n" for line in batch.to_series()).encode()
