"""A shard as a sequence of samples: every one of them in order, good or bad, whatever state the tar is in.

A sample is the consecutive members that share the name up to the first dot (`pipeline.data.naming`).
Members are read into memory one sample at a time and never written anywhere, so their names cannot do harm.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.layout import NAME_BYTES, Headers, Layout
from pipeline.data.naming import group, split_name
from pipeline.data.reasons import Reason
from pipeline.data.stream import ShardStream
from pipeline.store import storage

#: Image members, in the order in which open_clip looks for them.
IMAGE_TYPES = ("jpg", "png", "jpeg", "webp")
#: Images above this are not read.
MAX_MEMBER_BYTES = 512 << 20
#: Captions and json above this are not read: parsed they take many times as much.
MAX_TEXT_BYTES = 4 << 20
#: A tar with more than this before a member, in long names or pax records, breaks off there: `tarfile` reads all of it.
MAX_HEADER_BYTES = 256 << 10

#: Members that are read, by their ending.
READ_TYPES = (*IMAGE_TYPES, "txt", "json")
_UID = re.compile(r"[0-9a-fA-F]{32}")
#: The usual cause is `tar cf shard.tar *.jpg *.txt`: the files of a sample must be neighbours in a tar, and what is
#: named on its command line stays in that order, even with `--sort=name`.
_SAME_KEY = "an earlier sample of this shard has the same key (tar --sort=name -C FOLDER . keeps its files together)"
#: What `tarfile` raises on bytes that are no tar; errors of storage are other ones and pass through.
_NOT_A_TAR = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError)
#: How `tarfile` names a zero block (the closing marker) and the end of the file where a header should be.
_MARKER: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_NO_MARKER: type[Exception] = tarfile.EmptyHeaderError  # type: ignore[attr-defined]
_BAD_HEADER: type[Exception] = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
#: Headers that hold something about the member after them.
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass(slots=True)
class Sample:
    """One sample of a shard.

    Attributes:
        index: its number in the shard, from 0.
        key: the members' common name; bytes that are not UTF-8 are escaped with backslashes.
        uid: the json's uid if it is 32 hex digits, else the BLAKE2b-128 of `SHARD FILE NAME/KEY`.
        image: the encoded image, None where there is none.
        image_type: the ending of the image's member.
        caption: the text, None where there is none that can be read.
        meta: the json object, None where there is none that can be read.
        status: a `Reason`: `ok`, or the first thing found wrong.
        error: what exactly is wrong, one line.
    """

    index: int
    key: str
    uid: str
    image: bytes | None
    image_type: str
    caption: str | None
    meta: dict[str, Any] | None
    status: str
    error: str


@dataclass(slots=True)
class Group:
    """The members of a sample: contents of the types that are read (None: too large, see `most_bytes`)."""

    key: str
    repeated: bool
    contents: dict[str, bytes | None] = field(default_factory=dict)
    broken: str = ""


class ShardReader:
    """Iterates over the samples of the shard at `url` once; closes it at the end or as a context manager.

    Attributes:
        end_error: "" while reading and after a complete tar; else where and why it broke off.
    """

    def __init__(self, url: str, *, caption: str = "txt") -> None:
        self.url = url
        self.end_error = ""
        self._parser = SampleParser(url, caption)
        self._stream = ShardStream(url)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Sample]:
        for index, found in enumerate(self._groups(read=True)):
            yield self._parser.parse(index, found)

    def locate(self) -> tuple[int, Layout | None]:
        """The number of samples that iterating would give, without decoding any (instead of iterating), and where
        they lie, for a sound tar of the usual form.
        """
        headers = Headers()
        samples = sum(1 for _ in self._groups(read=False, headers=headers))
        return samples, None if self.end_error else headers.layout()

    def keys(self) -> list[str]:
        """The keys of the samples as they are in the tar (instead of iterating)."""
        return [found.key for found in self._groups(read=False)]

    def _groups(self, read: bool, headers: Headers | None = None) -> Iterator[Group]:
        members = Members(self._stream)
        seen: set[bytes] = set()
        try:
            for key, mine in group(_files(members, read, headers)):
                endings = ((name[1:].lower(), content) for name, content in mine)
                contents = {ending: content for ending, content in endings if read and ending in READ_TYPES}
                digest = hashlib.blake2b(_encode(key), digest_size=8).digest()
                self.end_error = members.end_error  # known once there is no member after this sample
                # What would have followed in a tar that breaks off is unknown: the last sample may be incomplete.
                yield Group(key, digest in seen, contents, members.end_error if members.broken else "")
                seen.add(digest)
            self.end_error = members.end_error
        finally:
            self._stream.close()


def _files(members: Members, read: bool, headers: Headers | None) -> Iterator[tuple[str, bytes | None]]:
    """The regular files among members, with the content of those that are read (None: too large); headers are noted."""
    for header in members:
        if headers is not None:
            headers.add(header, header.field, members.room)
        if header.isreg():
            parts = split_name(header.name) if read else None
            ending = parts[1].lower() if parts is not None else ""
            yield header.name, members.content(header, most_bytes(ending)) if ending in READ_TYPES else None


def most_bytes(ending: str) -> int:
    """Bytes up to which members of that ending are read."""
    return MAX_MEMBER_BYTES if ending in IMAGE_TYPES else MAX_TEXT_BYTES


class SampleParser:
    """Makes samples of their members' contents, for the shard at `url`; `caption` is `txt` or `json:KEY`."""

    def __init__(self, url: str, caption: str) -> None:
        self._name = storage.basename(url)
        self._caption_key = json_key(caption)

    def parse(self, index: int, group: Group) -> Sample:
        """Sample number `index` of the shard."""
        problems: list[tuple[Reason, str]] = []
        if group.repeated:
            problems.append((Reason.DUPLICATE_KEY, _SAME_KEY))
        if group.broken:
            problems.append((Reason.TRUNCATED_SAMPLE, group.broken))
        for ending, content in group.contents.items():
            if content is None:
                problems.append((Reason.TOO_LARGE, f"the {ending} member is over {most_bytes(ending)} bytes or sparse"))
        image_type = next((ending for ending in IMAGE_TYPES if ending in group.contents), "")
        image = group.contents.get(image_type)
        if not image_type:
            problems.append((Reason.NO_IMAGE, f"no member ends in {', '.join(IMAGE_TYPES)}"))
        elif image is not None and not image:
            problems.append((Reason.ZERO_SIZE, f"the {image_type} member is empty"))
        meta = _parse_meta(group.contents.get("json"), problems)
        caption = self._caption(group, meta, problems)
        status, error = problems[0] if problems else (Reason.OK, "")
        key = _encode(group.key).decode("utf-8", "backslashreplace")
        uid = self._uid(group.key, meta)
        return Sample(index, key, uid, image, image_type, caption, meta, str(status), error)

    def _caption(self, group: Group, meta: dict[str, Any] | None, problems: list[tuple[Reason, str]]) -> str | None:
        if self._caption_key is None:
            content = group.contents.get("txt")
            if content is None:
                if "txt" not in group.contents:
                    problems.append((Reason.NO_CAPTION, "no member ends in txt"))
                return None
        else:
            try:
                value = caption_in(meta, self._caption_key)
            except TypeError as error:
                problems.append((Reason.NO_CAPTION, f"expected a string at json key {self._caption_key!r}: {error}"))
                return None
            # JSON can escape halves of surrogate pairs, which no UTF-8 text contains.
            content = value.encode("utf-8", "surrogatepass")
        try:
            caption = content.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append((Reason.BAD_UTF8, f"byte {error.start} of the caption: {error.reason}"))
            return None
        if not caption.strip():
            problems.append((Reason.EMPTY_CAPTION, "nothing but white space"))
        return caption

    def _uid(self, key: str, meta: dict[str, Any] | None) -> str:
        uid = (meta or {}).get("uid")
        if isinstance(uid, str) and _UID.fullmatch(uid):
            return uid.lower()
        return hashlib.blake2b(f"{self._name}/".encode() + _encode(key), digest_size=16).hexdigest()


def json_key(caption: str) -> str | None:
    """KEY of `json:KEY`; None for `txt`."""
    return caption.removeprefix("json:") if caption.startswith("json:") else None


def caption_in(meta: dict[str, Any] | None, key: str) -> str:
    """The caption at a key of a sample's json object. Raises `TypeError` with what is there instead of a string."""
    value = (meta or {}).get(key)
    if not isinstance(value, str):
        raise TypeError("none" if value is None else type(value).__name__)
    return value


def read_shard(url: str, *, caption: str = "txt") -> ShardReader:
    """Open a shard to iterate over its samples, one for each sample in it, in order, bad ones included.

    `caption` is `txt` or `json:KEY`. Raises `InputError` when storage fails, at once or while iterating; a tar or
    compressed stream that is itself broken gives what can be read and says so in `end_error`.
    """
    return ShardReader(url, caption=caption)


class _Header(tarfile.TarInfo):
    """A member's header that tells its archive how the reading of headers ended; `TarFile.next` hides it.

    Attributes:
        field: the name in its own field, whatever headers before it say.
    """

    field: bytes

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        header.field = buf[:NAME_BYTES].partition(b"\0")[0]
        if header.type in _EXTENDED and header.size > MAX_HEADER_BYTES:
            raise _BAD_HEADER(f"{header.size} bytes of headers before a member")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Header:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.end = error
            raise


class _Archive(tarfile.TarFile):
    tarinfo = _Header
    end: Exception | None = None


class Members:
    """The members of a tar in order.

    Attributes:
        end_error: after iterating, "" or where and why the tar broke off.
        broken: whether bytes were unreadable or missing, rather than just the closing marker.
    """

    def __init__(self, stream: ShardStream) -> None:
        self.end_error = ""
        self.broken = False
        self._stream = stream
        self._archive: _Archive | None = None

    def __iter__(self) -> Iterator[_Header]:
        offset = 0
        try:
            # r| never seeks; the buffer is what one read asks of the stream.
            self._archive = archive = _Archive.open(fileobj=self._stream, mode="r|", bufsize=1 << 16)  # type: ignore[call-overload]
            while (header := archive.next()) is not None:
                archive.members.clear()
                yield header
                offset = archive.offset
                self._skip()
        except _NOT_A_TAR as error:
            self._stop(offset, self._stream.error or str(error) or type(error).__name__)
            return
        if self._stream.error:
            self._stop(offset, self._stream.error)
        elif isinstance(archive.end, _NO_MARKER):
            self.end_error = f"no end-of-archive marker at byte {offset}"
        elif not isinstance(archive.end, _MARKER):
            self._stop(offset, str(archive.end))

    @property
    def room(self) -> int:
        """Bytes from where the content of the member just given starts, or goes on, to the header of the next."""
        assert self._archive is not None
        assert self._archive.fileobj is not None
        room: int = self._archive.offset - self._archive.fileobj.tell()
        return room

    def content(self, header: tarfile.TarInfo, most: int) -> bytes | None:
        """The bytes of the member just given; None if there are more than `most`. What is missing at the end is missing
        here too; iterating on then finds the tar broken.
        """
        return None if header.size > most or header.issparse() else self.whole(header)

    def whole(self, header: tarfile.TarInfo) -> bytes:
        """The bytes of the member just given, however many they are, and zeros for the holes of a sparse one."""
        assert self._archive is not None
        assert self._archive.fileobj is not None
        file = self._archive.extractfile(header) if header.issparse() else None
        # A damaged header can claim more bytes than it leaves room for before the next one.
        return self._archive.fileobj.read(max(0, min(header.size, self.room))) if file is None else file.read()

    def _skip(self) -> None:
        """Go on to the next header. `TarFile.next` would try for years if a header claims enough bytes."""
        assert self._archive is not None
        assert self._archive.fileobj is not None
        while (missing := self.room) > 0:
            if not self._archive.fileobj.read(min(missing, 1 << 20)):
                raise tarfile.ReadError("unexpected end of data")

    def _stop(self, offset: int, why: str) -> None:
        self.broken = True
        byte = min(offset, self._stream.position)
        self.end_error = f"the tar breaks off at byte {byte}: {' '.join(why.split())}"


def _parse_meta(content: bytes | None, problems: list[tuple[Reason, str]]) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        problems.append((Reason.BAD_JSON, " ".join(str(error).split())[:200]))
        return None
    if not isinstance(meta, dict):
        problems.append((Reason.BAD_JSON, f"expected an object, found {type(meta).__name__}"))
        return None
    return meta


def _encode(name: str) -> bytes:
    """The bytes of a member's name as they are in the tar."""
    return name.encode("utf-8", "surrogateescape")
