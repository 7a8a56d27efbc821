import os
import stat

import pytest

from repvgg._files import atomic_files, atomic_write, check_output, write_text
from repvgg.errors import OutputError, OutputExistsError


def listing(folder):
    return {path.name: path.read_text() if path.is_file() else "folder" for path in folder.iterdir()}


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as part:
        part.write_text("half")
        assert part.name == "a.txt"
        assert not path.exists()
        part.write_text("whole")
    assert listing(tmp_path) == {"a.txt": "whole"}


@pytest.mark.parametrize("name", ["a.txt", "mode"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("old", [{}, {"a.txt": "old", "mode": "old"}])
def test_nothing_is_left_of_what_fails(tmp_path, name, error, old):
    for other, text in old.items():
        (tmp_path / other).write_text(text)
    with pytest.raises(OutputError if isinstance(error, OSError) else error):
        write_half(tmp_path / name, error)
    assert listing(tmp_path) == old


def write_half(path, error):
    with atomic_write(path, overwrite=True) as part:
        part.write_text("half")
        raise error


def test_a_body_that_writes_nothing_fails(tmp_path):
    with pytest.raises(OutputError, match="No such file"), atomic_write(tmp_path / "mode"):
        pass
    assert listing(tmp_path) == {}


def test_a_file_that_comes_in_between_stays(tmp_path):
    with pytest.raises(OutputExistsError, match="exists"):
        write_while_another_does(tmp_path / "a.txt")
    assert listing(tmp_path) == {"a.txt": "theirs"}


def write_while_another_does(path):
    with atomic_write(path) as part:
        part.write_text("ours")
        path.write_text("theirs")


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    for name, error, text, overwrite in (
        ("a.txt", OutputExistsError, "exists: add --overwrite", False),
        ("folder", OutputExistsError, "is a folder", True),
        ("missing/a.txt", OutputError, "no folder", True),
        ("a.txt/b.txt", OutputError, "no folder", True),
    ):
        with pytest.raises(error, match=text):
            check_output(tmp_path / name, overwrite=overwrite)
        with pytest.raises(error, match=text):
            write_text(tmp_path / name, "new", overwrite=overwrite)
    with pytest.raises(OutputError, match="File name too long"):
        write_text(tmp_path / ("x" * 300), "new")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as part:
            part.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def test_permissions_of_the_file_that_is_replaced_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o440)
    write_text(path, "new", overwrite=True)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o440)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "link.txt", tmp_path / "there" / "real.txt"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new", overwrite=True)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert listing(tmp_path / "there") == {"real.txt": "new"}


def test_text_is_utf_8(tmp_path):
    assert write_text(tmp_path / "a.txt", "größer →") == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == "größer →".encode()


def test_files_next_to_each_other_appear_together(tmp_path):
    with atomic_files(tmp_path / "net.xml") as part:
        part.write_text("description")
        part.with_suffix(".bin").write_bytes(b"weights")
        assert list(tmp_path.glob("net*")) == []
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "net.xml": "description",
        "net.bin": "weights",
    }


def test_files_next_to_each_other_are_not_replaced_unasked(tmp_path):
    (tmp_path / "net.bin").write_text("of another network")

    def write(overwrite):
        with atomic_files(tmp_path / "net.xml", overwrite=overwrite) as part:
            part.write_text("description")
            part.with_suffix(".bin").write_text("weights")

    with pytest.raises(OutputExistsError, match=r"net\.bin"):
        write(overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["net.bin"]
    write(overwrite=True)
    assert (tmp_path / "net.bin").read_text() == "weights"


def test_files_of_a_failure_are_removed(tmp_path):
    def fail():
        with atomic_files(tmp_path / "net.xml") as part:
            part.write_text("description")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
