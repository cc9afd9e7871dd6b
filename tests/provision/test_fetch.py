"""Fetching benchmarks: a local server with ranges, resumed and damaged downloads, archives that would do harm."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from tests.kit.checks import fails
from tests.kit.known import build
from tests.kit.server import Server
from vlprompt.data.datasets import load_dataset
from vlprompt.data.known.table import DATASETS, Source
from vlprompt.errors import OutputError
from vlprompt.provision import fetch, unpack
from vlprompt.provision.fetch import DOWNLOADS, get


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def packed(folder: Path, at: str, kind: str = "w:gz") -> bytes:
    """A folder as a tar, below the path ``at``."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=kind) as tar:  # type: ignore[call-overload]
        tar.add(folder, at)
    return content.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def dtd(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The miniature of DTD, on the server under the names of the real one; gives its archive."""
    folder = build(tmp_path / "original", "dtd")
    archive = packed(folder, "dtd")
    split = (folder / "split_zhou_DescribableTextures.json").read_bytes()
    server.files = {"/dtd.tar.gz": archive, "/split": split}
    images, lists = DATASETS["dtd"].sources
    sources = (
        replace(images, urls=(f"{server.url}/dtd.tar.gz",), checksum=f"md5:{hashlib.md5(archive).hexdigest()}"),
        replace(lists, urls=(f"{server.url}/split",), checksum=f"sha256:{hashlib.sha256(split).hexdigest()}"),
    )
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], sources=sources))
    return archive


def change(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """Another first source of DTD."""
    first, second = DATASETS["dtd"].sources
    sources = (replace(first, **values), second)
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], sources=sources))


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- downloads ------------------------------------------------------------------------------------


def test_a_fetched_benchmark_loads(vlprompt, tmp_path: Path, dtd: bytes, server: Server) -> None:
    root = tmp_path / "data"
    code, out, err = vlprompt("data", "get", "DTD", "--root", root, "--json")
    assert code == 0, err
    assert json.loads(out) == {"fetched": {"dtd": ["dtd.tar.gz", "split_zhou_DescribableTextures.json"]}}
    assert "licence: research" in err
    assert len(load_dataset("dtd", root).split.train) == 9
    assert tree(root) == {f"dtd/{x}" for x in tree(tmp_path / "original" / "dtd")} | {"dtd"}
    requests = len(server.asked)
    code, out, err = vlprompt("data", "get", "dtd", "--root", root, "--json")
    assert (code, json.loads(out)) == (0, {"fetched": {"dtd": []}})
    assert f"dtd.tar.gz: images is in {root / 'dtd'} already" in err
    assert len(server.asked) == requests


def test_a_broken_download_goes_on_where_it_was(tmp_path: Path, dtd: bytes, server: Server) -> None:
    said: list[str] = []
    server.breaks_after = 100
    with fails(rf"cannot fetch dtd.tar.gz: 127.0.0.1: it broke off after 100 of {len(dtd)} bytes; 100 bytes are kept"):
        get(DATASETS["dtd"], tmp_path, said.append)
    assert not (tmp_path / "dtd").exists()
    server.breaks_after = 50
    with fails("150 bytes are kept, and the same command continues"):
        get(DATASETS["dtd"], tmp_path, said.append)
    server.breaks_after = None
    steps: list[tuple[int, int]] = []
    get(DATASETS["dtd"], tmp_path, said.append, lambda done, of: steps.append((done, of)))
    ranges = [asked for path, asked in server.asked if path == "/dtd.tar.gz"]
    assert ranges == [None, "bytes=100-", "bytes=150-"]
    assert (len(dtd), len(dtd)) in steps
    assert len(load_dataset("dtd", tmp_path).split.train) == 9
    assert not (tmp_path / DOWNLOADS).exists()


def test_a_file_that_changed_is_fetched_anew(
    tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/dtd.tar.gz"] = b"an older version, longer than what is cut"
    server.breaks_after = 20
    change(monkeypatch, checksum="")
    with fails("20 bytes are kept"):
        get(DATASETS["dtd"], tmp_path, print)
    server.files["/dtd.tar.gz"], server.breaks_after = dtd, None
    said: list[str] = []
    get(DATASETS["dtd"], tmp_path, said.append)
    assert server.asked[1] == ("/dtd.tar.gz", "bytes=20-")  # the server said that it is another file, and sent it whole
    assert "dtd.tar.gz: no checksum is known, so its content is not verified" in said
    assert len(load_dataset("dtd", tmp_path).split.train) == 9


@pytest.mark.parametrize(("tags", "known", "resumes"), [(False, True, True), (False, False, False)])
def test_without_a_tag_only_a_checksum_allows_to_go_on(
    tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, tags: bool, known: bool, resumes: bool
) -> None:
    server.tags, server.breaks_after = tags, 30
    if not known:
        change(monkeypatch, checksum="")
    with fails("30 bytes are kept"):
        get(DATASETS["dtd"], tmp_path, print)
    server.breaks_after = None
    get(DATASETS["dtd"], tmp_path, print)
    assert server.asked[1] == ("/dtd.tar.gz", "bytes=30-" if resumes else None)
    assert len(load_dataset("dtd", tmp_path).split.train) == 9


def test_a_server_without_ranges(tmp_path: Path, dtd: bytes, server: Server) -> None:
    server.ranges, server.breaks_after = False, 40
    with fails("40 bytes are kept"):
        get(DATASETS["dtd"], tmp_path, print)
    server.breaks_after = None
    get(DATASETS["dtd"], tmp_path, print)
    assert len(load_dataset("dtd", tmp_path).split.train) == 9


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_a_download_that_was_whole_when_it_was_stopped(
    tmp_path: Path, dtd: bytes, server: Server, extra: bytes
) -> None:
    part = tmp_path / DOWNLOADS / "dtd.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(dtd + extra)
    get(DATASETS["dtd"], tmp_path, print)
    asked = [asked for path, asked in server.asked if path == "/dtd.tar.gz"]
    assert asked == [f"bytes={len(dtd + extra)}-"] + ([None] if extra else [])
    assert len(load_dataset("dtd", tmp_path).split.train) == 9


def test_the_next_mirror_is_tried(tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, urls=(f"{server.url}/gone", f"{server.url}/dtd.tar.gz"))
    get(DATASETS["dtd"], tmp_path, print)
    assert [path for path, _ in server.asked] == ["/gone", "/dtd.tar.gz", "/split"]
    assert len(load_dataset("dtd", tmp_path).split.train) == 9


def test_a_wrong_checksum_removes_the_file(vlprompt, tmp_path: Path, dtd: bytes, server: Server) -> None:
    server.files["/dtd.tar.gz"] = b"not what it should be"
    code, _, err = vlprompt("data", "get", "dtd", "--root", tmp_path)
    found, expected = hashlib.md5(b"not what it should be").hexdigest(), hashlib.md5(dtd).hexdigest()
    assert code == 2
    assert f"dtd.tar.gz is damaged, or another file: its md5 is {found}, not {expected}\n" in err
    assert not (tmp_path / "dtd").exists()
    assert not (tmp_path / DOWNLOADS).exists()
    server.files["/dtd.tar.gz"] = dtd
    assert vlprompt("data", "get", "dtd", "--root", tmp_path)[0] == 0


def test_offline_is_said_in_one_line(
    vlprompt, tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    code, out, err = vlprompt("data", "get", "dtd", "--root", tmp_path)
    *said, error = err.splitlines()
    assert (code, out) == (2, "")
    assert error == "error: cannot fetch dtd.tar.gz: 127.0.0.1: no connection (Connection refused)"
    assert len(said) == 1
    assert not (tmp_path / "dtd").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.files.clear(), "127.0.0.1: the server answers 404 Not Found"),
        (lambda s: setattr(s, "type", "text/html"), "127.0.0.1: a web page came instead of the file"),
    ],
)
def test_answers_that_are_not_the_file(
    tmp_path: Path, dtd: bytes, server: Server, spoil: Callable[[Server], object], says: str
) -> None:
    spoil(server)
    with fails(f"cannot fetch dtd.tar.gz: {says}$"):
        get(DATASETS["dtd"], tmp_path, print)
    assert tree(tmp_path / DOWNLOADS) == set()


def test_an_archive_put_there_by_hand_is_used(tmp_path: Path, dtd: bytes, server: Server) -> None:
    (tmp_path / DOWNLOADS).mkdir()
    (tmp_path / DOWNLOADS / "dtd.tar.gz").write_bytes(dtd)
    get(DATASETS["dtd"], tmp_path, print)
    assert [path for path, _ in server.asked] == ["/split"]
    assert len(load_dataset("dtd", tmp_path).split.train) == 9
    assert (tmp_path / DOWNLOADS / "dtd.tar.gz").read_bytes() == dtd  # it is not ours to remove
    assert tree(tmp_path / DOWNLOADS) == {"dtd.tar.gz"}


def test_a_split_put_there_by_hand_is_copied(tmp_path: Path, dtd: bytes, server: Server) -> None:
    name = "split_zhou_DescribableTextures.json"
    (tmp_path / DOWNLOADS).mkdir()
    (tmp_path / DOWNLOADS / name).write_bytes(server.files["/split"])
    get(DATASETS["dtd"], tmp_path, print)
    assert (tmp_path / DOWNLOADS / name).read_bytes() == (tmp_path / "dtd" / name).read_bytes()


class KilledError(BaseException):
    """What stands for a kill."""


@pytest.mark.parametrize("last", range(1, 6))
def test_what_a_killed_command_leaves_goes_with_the_next(
    tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    calls = 0
    rmtree, replace_ = shutil.rmtree, os.replace

    def killed(call):
        def count(*given, **more):
            nonlocal calls
            calls += 1
            if calls >= last:
                raise KilledError
            return call(*given, **more)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "rmtree", killed(rmtree))
        patch.setattr(fetch.os, "replace", killed(replace_))
        with pytest.raises(KilledError):
            get(DATASETS["dtd"], tmp_path, print)
    get(DATASETS["dtd"], tmp_path, print)
    assert len(load_dataset("dtd", tmp_path).split.train) == 9
    assert not (tmp_path / DOWNLOADS).exists()


def test_what_has_to_be_got_by_hand(vlprompt, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "original", "stanford_cars")
    server.files["/split"] = (folder / "split_zhou_StanfordCars.json").read_bytes()
    cars = DATASETS["stanford_cars"]
    source = replace(cars.sources[0], urls=(f"{server.url}/split",), checksum="")
    monkeypatch.setitem(DATASETS, "stanford_cars", replace(cars, sources=(source,)))
    root = tmp_path / "data"
    code, _, err = vlprompt("data", "get", "stanford_cars", "--root", root)
    assert code == 2
    assert f"error: data set 'stanford_cars': {cars.by_hand} ({root / 'stanford_cars'}; {cars.homepage})" in err
    for part in ("cars_train", "cars_test"):
        (folder / part).rename(root / "stanford_cars" / part)
    assert vlprompt("data", "get", "stanford_cars", "--root", root)[0] == 0
    assert len(load_dataset("stanford_cars", root).split.test) == 6


def test_names_that_do_not_exist(vlprompt, tmp_path: Path) -> None:
    code, _, err = vlprompt("data", "get", "dtb", "--root", tmp_path)
    assert code == 2
    assert err.startswith("error: unknown data set 'dtb': did you mean 'dtd'?")


@pytest.mark.parametrize("step", ["download", "unpack"])
def test_a_full_disk(
    vlprompt, tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "unpack":
        monkeypatch.setattr(unpack.shutil, "copyfileobj", full)
    else:
        monkeypatch.setattr(fetch.os, "replace", full)
    code, _, err = vlprompt("data", "get", "dtd", "--root", tmp_path)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: cannot write ")
    assert err.endswith(": No space left on device\n")
    assert not (tmp_path / "dtd").exists()
    assert {Path(x).suffix for x in tree(tmp_path / DOWNLOADS)} <= {".gz", ".part", ".tag", ".fetched"}
    monkeypatch.undo()


# --- archives -------------------------------------------------------------------------------------


def test_an_archive_in_an_archive(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "original", "caltech101")
    inner = packed(folder / "101_ObjectCategories", "101_ObjectCategories")
    server.files["/x.zip"] = zipped(
        {"caltech-101/101_ObjectCategories.tar.gz": inner, "__MACOSX/caltech-101/._x": b"-"}
    )
    caltech = DATASETS["caltech101"]
    source = replace(caltech.sources[0], urls=(f"{server.url}/x.zip",), checksum="")
    get(replace(caltech, sources=(source,)), tmp_path, print)
    images = "caltech-101/101_ObjectCategories"
    assert tree(tmp_path / images) == tree(tmp_path / "original" / images)
    assert tree(tmp_path / "caltech-101") == {"101_ObjectCategories"} | {
        f"101_ObjectCategories/{x}" for x in tree(tmp_path / images)
    }


def test_lists_and_images_of_the_aircraft(tmp_path: Path, server: Server) -> None:
    folder = build(tmp_path / "original", "fgvc_aircraft")
    server.files["/a.tar"] = packed(folder, "fgvc-aircraft-2013b/data", "w:")
    aircraft = DATASETS["fgvc_aircraft"]
    source = replace(aircraft.sources[0], urls=(f"{server.url}/a.tar",), checksum="")
    get(replace(aircraft, sources=(source,)), tmp_path, print)
    assert tree(tmp_path / "fgvc_aircraft") == tree(folder)


def tar_of(*members: tarfile.TarInfo, content: bytes = b"x") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def zip_link(name: str, to: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, to)
    return stream.getvalue()


@lru_cache
def bomb(compression: int) -> bytes:
    """32 MiB of zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive, archive.open("dtd/images/x.jpg", "w") as file:
        file.write(bytes(32 << 20))
    return stream.getvalue()


def understated(compression: int) -> bytes:
    """The same, with 10 bytes announced."""
    size = struct.pack("<I", 32 << 20)
    assert bomb(compression).count(size) == 2  # before the content and in the directory
    return bomb(compression).replace(size, struct.pack("<I", 10))


def lying_bomb() -> bytes:
    """A tar whose header announces a name of 8 MiB, which a reader would put into memory."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 20
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(8 << 20))


HARMFUL = {
    "../ in a tar": (lambda: tar_of(entry("dtd/a.jpg"), entry("dtd/../../evil")), "'dtd/../../evil' leads out of its"),
    "../ in a zip": (lambda: zipped({"dtd/images/a.jpg": b"x", "../evil": b"x"}), "'../evil' leads out of its folder"),
    "backslashes": (lambda: zipped({"dtd\\..\\..\\evil": b"x"}), "leads out of its folder"),
    "an absolute path in a tar": (lambda: tar_of(entry("/tmp/evil")), "'/tmp/evil' leads out of its folder"),
    "an absolute path in a zip": (lambda: zipped({"/tmp/evil": b"x"}), "'/tmp/evil' leads out of its folder"),
    "a drive": (lambda: zipped({"C:evil": b"x"}), "'C:evil' leads out of its folder"),
    "a symbolic link in a tar": (
        lambda: tar_of(entry("dtd/images", tarfile.SYMTYPE, "/"), entry("dtd/images/evil")),
        "'dtd/images' is neither a file nor a folder",
    ),
    "a hard link": (lambda: tar_of(entry("dtd/x", tarfile.LNKTYPE, "/etc/passwd")), "is neither a file nor a folder"),
    "a device": (lambda: tar_of(entry("dtd/images", tarfile.CHRTYPE)), "is neither a file nor a folder"),
    "a symbolic link in a zip": (lambda: zip_link("dtd/images", "/"), "'dtd/images' is neither a file nor a folder"),
    "a file twice": (lambda: tar_of(entry("dtd/a.jpg"), entry("dtd/a.jpg")), "'dtd/a.jpg' is in it twice"),
    "1,000 times smaller": (lambda: bomb(zipfile.ZIP_DEFLATED), "it unpacks to more than 100 times its size"),
    "100,000 times smaller": (lambda: bomb(zipfile.ZIP_BZIP2), "'dtd/images/x.jpg' is compressed in another way than"),
    "a size that is a lie": (lambda: understated(zipfile.ZIP_DEFLATED), "is damaged: Bad CRC-32"),
    "a size that is a lie, bzip2": (lambda: understated(zipfile.ZIP_BZIP2), "in another way than deflate"),
    "a size that is a lie, LZMA": (lambda: understated(zipfile.ZIP_LZMA), "in another way than deflate"),
    "a tar 1,000 times smaller": (
        lambda: tar_of(entry("dtd/images/x.jpg"), content=bytes(8 << 20)), "it unpacks to more than 100 times its size",
    ),
    "a header without end": (lambda: lying_bomb(), "it unpacks to more than 100 times its size"),
    "a cut tar": (lambda: tar_of(entry("dtd/images/a.jpg"), content=os.urandom(4096))[:-2000], "is damaged: "),
    "a tar cut at its very end": (lambda: tar_of(entry("dtd/images/a.jpg"))[:-4], "is damaged: "),
    "a cut zip": (lambda: zipped({"dtd/images/a.jpg": b"x"})[:-10], "is damaged: "),
    "noise": (lambda: bytes(range(256)) * 40, "is damaged: "),
    "nothing": (lambda: b"", "is damaged: "),
    "a compression that is not read": (lambda: bz2.compress(b"x" * 2000), "is damaged: "),
    "another content": (lambda: tar_of(entry("dtd/labels/a.txt")), "has no 'dtd/images'"),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMFUL)
def test_harmful_archives_leave_nothing(
    vlprompt, tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    make, says = HARMFUL[what]
    server.files["/dtd.tar.gz"] = make()
    change(monkeypatch, checksum="")
    root = tmp_path / "data"
    code, out, err = vlprompt("data", "get", "dtd", "--root", root)
    *_, error = err.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith(f"error: archive {root / DOWNLOADS / 'dtd.tar.gz'} ")
    assert says in error
    assert tree(root) == set()
    assert not (tmp_path / "evil").exists()


def test_the_bombs_are_as_small_as_they_say() -> None:
    assert (32 << 20) / len(bomb(zipfile.ZIP_BZIP2)) > 100_000
    assert (32 << 20) / len(bomb(zipfile.ZIP_DEFLATED)) > 900


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_size_that_is_a_lie_takes_no_memory(tmp_path: Path, compression: int) -> None:
    (tmp_path / "lie.zip").write_bytes(understated(compression))
    tracemalloc.start()
    try:
        with fails("lie.zip is "):
            unpack.unpack(tmp_path / "lie.zip", tmp_path / "out")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


@pytest.mark.parametrize("known", [True, False])
def test_a_bad_archive_put_there_by_hand_is_left_to_its_owner(
    tmp_path: Path, dtd: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        change(monkeypatch, checksum="")
    archive = tmp_path / DOWNLOADS / "dtd.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(dtd[:-10])
    with fails(f"{archive}.*; remove the file to have it fetched"):
        get(DATASETS["dtd"], tmp_path, print)
    assert archive.read_bytes() == dtd[:-10]
    assert tree(archive.parent) == {"dtd.tar.gz"}
    assert not (tmp_path / "dtd").exists()


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "many.tar.gz"
    archive.write_bytes(tar_of(*(entry(f"{i}") for i in range(11))))
    monkeypatch.setattr(unpack, "MEMBERS", 11)
    unpack.unpack(archive, tmp_path / "fits")
    monkeypatch.setattr(unpack, "MEMBERS", 10)
    with fails("is refused: it has more than 10 members"):
        unpack.unpack(archive, tmp_path / "refused")


def test_what_is_unpacked_is_what_was_packed(tmp_path: Path) -> None:
    folder = build(tmp_path, "sun397") / "SUN397"
    for name, content in {
        "a.tar": packed(folder, "x", "w:"),
        "a.tgz": packed(folder, "x"),
        "a.zip": zipped({f"x/{p}": (folder / p).read_bytes() for p in tree(folder) if (folder / p).is_file()}),
    }.items():
        (tmp_path / name).write_bytes(content)
        out = tmp_path / f"{name}.out"
        unpack.unpack(tmp_path / name, out)
        assert tree(out / "x") == tree(folder)
        assert all((out / "x" / p).read_bytes() == (folder / p).read_bytes() for p in tree(folder) if "." in p)
        assert all(not path.stat().st_mode & 0o111 for path in out.rglob("*.jpg"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_of(entry("a"), entry("a/b")))  # a file where a folder must be
    with pytest.raises(OutputError, match=r"cannot write .*out"):
        unpack.unpack(archive, tmp_path / "out")


def test_sources_without_a_checksum_are_few() -> None:
    unknown = {source.name for d in DATASETS.values() for source in d.sources if not source.checksum}
    assert unknown == {
        "classnames.txt", "split_zhou_Food101.json", "split_zhou_SUN397.json", "UCF-101-midframes.zip",
        "ImageNet-Sketch.zip", "clothing-dataset-small.zip",
    }  # fmt: skip
    assert Source(("https://host/a/b.zip?download=1",), {"x": "y"}).name == "b.zip"
