"""Files that need no compiler to be written: relocatable ELF objects of constants, and static archives.

LLVM could write constants too, but would hold several copies of them as text and in memory; weights take hundreds of
megabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

_ALIGNMENT = 64
_RELOCATABLE = 1  # e_type
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3  # sh_type
_ALLOC = 2  # sh_flags
_GLOBAL_OBJECT = 1 << 4 | 1  # binding and type of a symbol
_HIDDEN = 2
_HEADER_BYTES, _SECTION_BYTES, _SYMBOL_BYTES = 64, 64, 24


def write_constants(path: Path, machine: int, symbols: Mapping[str, Sequence[Any]]) -> None:
    """Write an ELF64 object whose read-only data holds, for each hidden symbol, buffers one after the other.

    Args:
        path: the file.
        machine: number of the architecture, e_machine.
        symbols: buffers by symbol; each symbol is aligned to 64 bytes.
    """
    names = ("", ".rodata", ".note.GNU-stack", ".symtab", ".strtab", ".shstrtab")
    strings, table = b"\0", b"\0" * _SYMBOL_BYTES
    with path.open("wb") as file:
        file.write(b"\0" * _HEADER_BYTES)
        data_begin = file.tell()
        for name, buffers in symbols.items():
            _pad(file, _ALIGNMENT)
            begin = file.tell()
            for buffer in buffers:
                file.write(buffer)
            size = file.tell() - begin
            table += struct.pack("<IBBHQQ", len(strings), _GLOBAL_OBJECT, _HIDDEN, 1, begin - data_begin, size)
            strings += name.encode() + b"\0"
        data_size = file.tell() - data_begin
        _pad(file, 8)
        places = {".rodata": (data_begin, data_size), ".note.GNU-stack": (file.tell(), 0)}
        section_names = b"\0".join(name.encode() for name in names) + b"\0"
        for name, content in ((".symtab", table), (".strtab", strings), (".shstrtab", section_names)):
            places[name] = (file.tell(), len(content))
            file.write(content)
        _pad(file, 8)
        sections_begin = file.tell()
        kinds = {
            ".rodata": (_PROGBITS, _ALLOC, 0, 0, _ALIGNMENT, 0),
            ".note.GNU-stack": (_PROGBITS, 0, 0, 0, 1, 0),  # without it, linkers make the stack executable
            ".symtab": (_SYMTAB, 0, names.index(".strtab"), 1, 8, _SYMBOL_BYTES),  # the first global symbol is 1
            ".strtab": (_STRTAB, 0, 0, 0, 1, 0),
            ".shstrtab": (_STRTAB, 0, 0, 0, 1, 0),
        }
        file.write(b"\0" * _SECTION_BYTES)
        for name in names[1:]:
            kind, flags, link, info, alignment, entry = kinds[name]
            where = section_names.index(name.encode() + b"\0")
            file.write(struct.pack("<IIQQQQIIQQ", where, kind, flags, 0, *places[name], link, info, alignment, entry))
        file.seek(0)
        identity = b"\x7fELF" + bytes([2, 1, 1]) + b"\0" * 9  # 64 bits, little-endian, version 1
        file.write(identity)
        file.write(
            struct.pack(
                "<HHIQQQIHHHHHH",
                *(_RELOCATABLE, machine, 1, 0, 0, sections_begin, 0),
                *(_HEADER_BYTES, 0, 0, _SECTION_BYTES, len(names), names.index(".shstrtab")),
            )
        )


def _pad(file: Any, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


@final
class ArchiveMember:
    """An object file of an archive, and the symbols that others link to."""

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        self.path, self.symbols = path, tuple(symbols)


_COPY_BYTES = 2**24


def write_archive(path: Path, members: Sequence[ArchiveMember]) -> None:
    """Write a static archive in the format of GNU ar, with its index of symbols; names have at most 15 characters."""
    names = b"".join(symbol.encode() + b"\0" for member in members for symbol in member.symbols)
    names += b"\0" * (len(names) % 2)
    count = sum(len(member.symbols) for member in members)
    index_bytes = 4 + 4 * count + len(names)
    offsets, offset = [], 8 + 60 + index_bytes
    for member in members:
        offsets += [offset] * len(member.symbols)
        size = member.path.stat().st_size
        offset += 60 + size + size % 2
    with path.open("wb") as file:
        file.write(b"!<arch>\n" + _member_header("/", index_bytes))
        file.write(struct.pack(f">I{count}I", count, *offsets) + names)
        for member in members:
            size = member.path.stat().st_size
            file.write(_member_header(f"{member.path.name}/", size))
            with member.path.open("rb") as source:
                while part := source.read(_COPY_BYTES):
                    file.write(part)
            file.write(b"\n" * (size % 2))


def read_archive(path: Path) -> list[bytes]:
    """Return the object files of an archive by :func:`write_archive`."""
    content, at, members = path.read_bytes(), 8, []
    while at < len(content):
        name, size = content[at : at + 16].rstrip(), int(content[at + 48 : at + 58])
        if name != b"/":  # the index
            members.append(content[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    return members


def _member_header(name: str, size: int) -> bytes:
    # Date, owner and group are 0, so that equal networks give equal files.
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{'644':<8}{size:<10}`\n".encode()
