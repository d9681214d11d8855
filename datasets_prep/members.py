"""Tars as they come from elsewhere: members by name, offset and size, and what is wrong with them.

Nothing is unpacked and nothing but labels is interpreted. Python's `tarfile` takes a damaged header in the middle of
an archive for its end; here that is a fault, as is an archive without an end mark.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from datasets_prep.index import parse_array

IMAGE_FIELDS = ("jpg", "png", "webp")
PICKLES = frozenset(("pickle", "pkl", "pyd", "pth", "pt", "ckpt", "joblib", "dill", "npz"))
_BLOCK = 512
_ZERO = bytes(_BLOCK)
_ODD_TYPES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_LABEL = re.compile(rb"\s*(\d{1,9})\s*")


class Seekable(Protocol):
    """A file to read forwards."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102
    def seek(self, position: int, /) -> object: ...  # noqa: D102


class Stream:
    """A forward-only file over chunks of bytes that counts and hashes what passes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk, self._at = memoryview(b""), 0
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        return b"".join(self._take(size))

    def seek(self, position: int) -> None:
        """Pass over what lies before `position`; the end may come first."""
        for _ in self._take(position - self.position):
            pass

    def finish(self) -> tuple[int, str]:
        """Pass over the rest; return the size in bytes and the SHA-256 in hex of everything."""
        for _ in self._take(1 << 62):
            pass
        return self.position, self._sha256.hexdigest()

    def _take(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            if self._at == len(self._chunk):
                self._chunk, self._at = memoryview(next(self._chunks, b"")), 0
                if not self._chunk:
                    return
                self._sha256.update(self._chunk)
            piece = self._chunk[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            yield piece


class Member(NamedTuple):
    """A file in a tar: where its content lies, or why nothing must be made of it."""

    name: str
    offset: int
    size: int
    fault: str = ""


def members(file: Seekable, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Yield the files of an archive that fills `file` from `start` to `stop`; folders are passed over.

    While a member is at hand its content can be read from `file`. Damage ends the archive: its last member then has
    no name and the fault.
    """
    position, long_name, stop = start, None, stop or 1 << 62
    while True:
        file.seek(position)
        header = file.read(_BLOCK) if position + _BLOCK <= stop else b""
        if header == _ZERO:
            return
        fault, size = _header_fault(header, position - start)
        if fault:
            yield Member("", position, 0, fault)
            return
        kind, content = header[156:157], position + _BLOCK
        position = content + size + -size % _BLOCK
        if kind in b"xL":
            long_name = _long_name(kind, file.read(size)) or long_name
        elif kind not in b"gK5":
            yield _member(long_name or _short_name(header), content, size, kind)
        if kind not in b"xLgK":
            long_name = None


def _header_fault(header: bytes, position: int) -> tuple[str, int]:
    """Say what is wrong with a header, or its content's size."""
    if len(header) < _BLOCK:
        return f"it ends before byte {position + _BLOCK}, without its end mark: it is truncated", 0
    try:
        if _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32:
            return "", _number(header[124:136])
    except ValueError:
        pass
    return f"there is no tar header at byte {position}: it is damaged, or no tar", 0


def _number(digits: bytes) -> int:
    """Read an octal number, or a binary one as GNU writes sizes above 8 GiB."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:])
    return int(digits.split(b"\0")[0].strip() or b"0", 8)


def _short_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _long_name(kind: bytes, content: bytes) -> bytes | None:
    if kind == b"L":
        return content.rstrip(b"\0")
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
    return found[1] if found else None


def _member(raw: bytes, offset: int, size: int, kind: bytes) -> Member:
    name = raw.decode(errors="backslashreplace").removeprefix("./")
    if kind not in (b"0", b"\0", b"7"):
        fault = f"is {_ODD_TYPES.get(kind, f'of type {kind!r}')}"
    elif raw.startswith(b"/") or b".." in raw.split(b"/"):
        fault = "leads out of the archive"
    elif not _is_utf8(raw):
        fault = "has a name that is not UTF-8"
    else:
        fault = ""
    return Member(name, offset, size, fault and f"member {name!r} {fault}")


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class Entry:
    """One sample of a WebDataset tar: its members by extension, those contents that were asked for, its faults."""

    key: str
    members: dict[str, Member] = field(default_factory=dict[str, Member])
    contents: dict[str, bytes] = field(default_factory=dict[str, bytes])
    faults: list[str] = field(default_factory=list[str])

    @property
    def image(self) -> str:
        """Extension of the image; only a sample without faults is sure to have one."""
        return next(name for name in self.members if name in IMAGE_FIELDS)

    def label(self) -> int | None:
        """Return the number in `.cls`, None where there is no such member or no number in it."""
        found = _LABEL.fullmatch(self.contents.get("cls", b""))
        return int(found[1]) if found else None


def entries(file: Seekable, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """Group a tar's members into samples: neighbours whose names are equal up to the base name's first dot.

    Args:
        file: a whole tar.
        wanted: says by its extension whether a member's content is read; others are passed over.

    Yields:
        Every sample, with what is wrong with it; a damaged archive ends in an entry without key and members.
    """
    entry, seen = Entry(""), set[str]()
    for member in members(file):
        key, extension = split_name(member.name)
        if key != entry.key or not member.name:
            if entry.members or entry.faults:
                yield _complete(entry)
            entry = Entry(key)
            if key in seen:
                entry.faults.append(f"key {key!r} occurs twice")
            seen.add(key)
        entry.faults += _faults(member, extension, entry)
        entry.members[extension] = member
        if not member.fault and (extension == "npy" or wanted(extension)):
            entry.contents[extension] = file.read(member.size)
            entry.faults += _array_faults(member, entry.contents) if extension == "npy" else []
    if entry.members or entry.faults:
        yield _complete(entry)


def split_name(name: str) -> tuple[str, str]:
    """Cut a member's name into key and extension, at the base name's first dot; `jpeg` is `jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    return folder + slash + stem, "jpg" if extension == "jpeg" else extension


def _faults(member: Member, extension: str, entry: Entry) -> list[str]:
    if member.fault:
        return [member.fault]
    if extension.rpartition(".")[2] in PICKLES:
        return [f"member {member.name!r} may hold a pickle, which could run code: such files are never loaded"]
    if extension in entry.members:
        return [f"member {member.name!r} occurs twice"]
    return []


def _array_faults(member: Member, contents: dict[str, bytes]) -> list[str]:
    try:
        parse_array(contents["npy"])
    except ValueError:
        return [f"member {member.name!r} is no plain array or holds pickled objects, which are never loaded"]
    return []


def _complete(entry: Entry) -> Entry:
    images = [name for name in entry.members if name in IMAGE_FIELDS]
    if not entry.faults and len(images) != 1:
        held = ", ".join(entry.members)
        entry.faults.append(f"sample {entry.key!r} needs one image (jpg, png or webp) and has {held}")
    elif not entry.faults and not entry.members[images[0]].size:
        entry.faults.append(f"member {entry.members[images[0]].name!r} is empty")
    if "cls" in entry.contents and entry.label() is None:
        entry.faults.append(f"member {entry.members['cls'].name!r} is no number: {entry.contents['cls'][:20]!r}")
    return entry
