from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from rewriter.storage import cache as store_file
from rewriter.storage.cache import Mirror, load, save_to
from rewriter.storage.files import Place, PlaceError, checked, inside, names, read, write


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    kinds: dict[str, Place] = {
        "folder": tmp_path / "a",
        "file": (tmp_path / "b").as_uri(),
        "memory": f"memory://{uuid.uuid4().hex}/c/",
    }
    return kinds[request.param]


def test_a_file_is_read_as_it_was_written(place: Place) -> None:
    assert read(place, "x/y.bin") is None
    assert names(place) == []
    data = bytes(range(256)) * 100
    write(place, "x/y.bin", data)
    assert read(place, "x/y.bin") == data
    write(place, "x/y.bin", b"new")
    assert read(place, "x/y.bin") == b"new"
    assert names(inside(place, "x")) == ["y.bin"]
    assert read(inside(place, "x"), "y.bin") == b"new"
    write(place, "x/a.bin", b"")
    assert names(inside(place, "x")) == ["a.bin", "y.bin"]


def test_nobody_sees_a_file_that_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that dies between the two steps leaves a part that is listed nowhere."""
    url = f"memory://{uuid.uuid4().hex}"
    write(url, "y.bin", b"old")

    def die(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryFileSystem, "mv", die)
    with pytest.raises(KeyboardInterrupt):
        write(url, "y.bin", b"new")
    assert read(url, "y.bin") == b"old"
    assert names(url) == ["y.bin"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/x", r"^nosuch://bucket/x: cannot be opened: .*nosuch"),
        ("absent://host/x", "absent://host/x: cannot be opened: install absentfs"),
    ],
)
def test_a_url_that_cannot_be_opened_is_said_in_words(url: str, said: str) -> None:
    fsspec.register_implementation(
        "absent", "absentfs.Files", clobber=True, errtxt="install absentfs"
    )
    with pytest.raises(PlaceError, match=said):
        checked(url)


def test_what_a_file_system_raises_comes_with_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeniedError(Exception):
        pass

    def denied(*words: object, **options: object) -> None:
        raise DeniedError("no\n credentials")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", denied)
    with pytest.raises(PlaceError, match=r"^memory://u: no credentials$"):
        write("memory://u", "x", b"")


def test_fits_behind_a_url_are_found_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "shared").as_uri()
    here, there = Mirror(tmp_path / "here", url), Mirror(tmp_path / "there", url)
    tensors = {"w": torch.randn(3, 4), "s": torch.tensor(2.5, dtype=torch.float64)}
    assert load(there, "ab12") is None
    save_to(here, "ab12", tensors, {"n": 1})
    found = load(there, "ab12")
    assert found is not None
    assert found[1] == {"n": 1}
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][k], v) for k, v in tensors.items())

    def fail(*words: object) -> None:
        raise AssertionError("asked for again")

    monkeypatch.setattr(store_file, "read", fail)
    assert load(there, "ab12") is not None


def test_a_damaged_file_behind_a_url_is_no_fit_and_is_replaced(tmp_path: Path) -> None:
    url = (tmp_path / "shared").as_uri()
    here, there = Mirror(tmp_path / "here", url), Mirror(tmp_path / "there", url)
    write(url, "ab/ab12.safetensors", b"half a fi")
    assert load(here, "ab12") is None
    save_to(here, "ab12", {"w": torch.ones(2)}, {})
    assert load(here, "ab12") is not None
    assert load(there, "ab12") is not None
