"""Weights are found in a fixed order, checked before they are used, and never run as code."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lsim
from lsim import weights
from lsim.networks import TRUNKS, AlexTrunk, LsimTrunk, SkipTrunk
from lsim.registry import UnknownMetricError, default_metric
from lsim.testing import check_metric, write_random_checkpoint
from lsim.weights import (
    BACKBONES,
    PUBLISHED,
    WeightsError,
    fetch_weights,
    find_head_and_backbone,
    find_weights,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    verified_sha256,
    weights_status,
    why_missing,
)

AUTHORS = [name for name in PUBLISHED if name.startswith("lsim")]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "mine.pth")


@pytest.fixture
def empty_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders of their own for ``$LSIM_WEIGHTS``, the user cache and the package: nothing in them yet."""
    folders = {name: tmp_path / name for name in ("environment", "cache", "package")}
    for folder in folders.values():
        folder.mkdir()
    (folders["package"] / "shipped_weights").mkdir()
    monkeypatch.setenv("LSIM_WEIGHTS", str(folders["environment"]))
    monkeypatch.setattr(weights, "cache_folder", lambda: folders["cache"])
    monkeypatch.setattr(weights, "__file__", str(folders["package"] / "weights.py"))
    return folders | {"package": folders["package"] / "shipped_weights"}


@pytest.fixture
def published_is_mine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The published ``lsim`` is a checkpoint of random weights: its content."""
    content = checkpoint.read_bytes()
    mine = replace(PUBLISHED["lsim"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PUBLISHED, "lsim", mine)
    return content


# --- where they are searched ------------------------------------------------------------------------------


def test_search_order(empty_search: dict[str, Path], checkpoint: Path) -> None:
    order = ["environment", "cache", "package"]
    for place in order:
        (empty_search[place] / "LSiM.pth").write_bytes(place.encode())
    assert find_weights("lsim", checkpoint) == checkpoint
    for place in order:
        found = find_weights("lsim")
        assert found.read_text() == place
        found.unlink()
    with pytest.raises(WeightsError) as error:
        find_weights("lsim")
    message = str(error.value)
    places = [message.index(str(empty_search[place])) for place in order]
    assert places == sorted(places)
    assert "lsim weights fetch lsim" in message
    assert "LSiM.pth" in message


def test_environment_may_name_several_folders_or_the_file(
    empty_search: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = other / "LSiM.pth"
    file.write_bytes(b"x")
    monkeypatch.setenv("LSIM_WEIGHTS", os.pathsep.join([str(empty_search["environment"]), str(other)]))
    assert find_weights("lsim") == file
    monkeypatch.setenv("LSIM_WEIGHTS", str(file))
    assert find_weights("lsim") == file
    with pytest.raises(WeightsError, match="no weights for 'lsim-skip'"):
        find_weights("lsim-skip")


def test_weights_by_published_name(empty_search: dict[str, Path]) -> None:
    file = empty_search["cache"] / PUBLISHED["lsim-noiseless"].file
    file.write_bytes(b"x")
    assert find_weights("lsim", "lsim-noiseless") == file


@pytest.mark.parametrize("name", ["non-siamese", "smoke-only"])
def test_weights_that_nobody_published_are_to_be_trained(name: str) -> None:
    with pytest.raises(
        WeightsError, match=rf"'lsim train', then pass weights=FILE, or --weights {name}=FILE"
    ):
        find_weights(name)
    assert "lsim train" in why_missing(name)
    assert "fetch" not in why_missing(name)


def test_absent_path_is_not_searched_elsewhere(empty_search: dict[str, Path], tmp_path: Path) -> None:
    (empty_search["cache"] / "LSiM.pth").write_bytes(b"x")
    with pytest.raises(
        WeightsError, match=r"no weights at .*absent\.pth: expected a file, there or .* one of the names"
    ):
        find_weights("lsim", tmp_path / "absent.pth")


# --- a head and the network that it stands on --------------------------------------------------------------


@pytest.fixture
def two_files(empty_search: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The two files of ``lpips-squeeze``, by name: bytes that are only hashed, and nowhere yet."""
    content = {"lpips-squeeze": b"head", "squeezenet1_1": b"network"}
    for name, value in content.items():
        sha256 = hashlib.sha256(value).hexdigest()
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], sha256=sha256))
    return {PUBLISHED[name].file: value for name, value in content.items()}


def test_both_files_are_needed_and_one_command_gets_them(
    empty_search: dict[str, Path], two_files: dict[str, bytes]
) -> None:
    assert why_missing("lpips-squeeze").endswith("'lsim weights fetch lpips-squeeze' (5 MB)")
    for file, content in two_files.items():
        path = empty_search["cache"] / file
        path.write_bytes(content)
        other = next(other for other in two_files if other != file)
        with pytest.raises(WeightsError, match=rf"searched {other}.*'lsim weights fetch lpips-squeeze'"):
            find_head_and_backbone("lpips-squeeze")
        assert "lsim weights fetch lpips-squeeze" in why_missing("lpips-squeeze")
        assert "lsim weights fetch lpips-squeeze" in lsim.registry.why_unavailable("lpips-squeeze")
        path.unlink()


@pytest.mark.parametrize("damaged", ["squeeze.pth", "squeezenet1_1-b8a52dc0.pth"])
def test_both_files_are_checked(
    empty_search: dict[str, Path], two_files: dict[str, bytes], damaged: str
) -> None:
    for file, content in two_files.items():
        (empty_search["environment"] / file).write_bytes(content)
    head, backbone = find_head_and_backbone("lpips-squeeze")
    assert (head.name, backbone.name) == tuple(two_files)
    assert why_missing("lpips-squeeze") == ""
    (empty_search["environment"] / damaged).write_bytes(b"other")
    assert f"{damaged}: SHA-256 is" in why_missing("lpips-squeeze")
    assert f"{damaged}: SHA-256 is" in lsim.registry.why_unavailable("lpips-squeeze")


def test_the_head_is_searched_first_and_then_beside_the_network(
    empty_search: dict[str, Path], two_files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    mine = folder / "features.safetensors"
    mine.write_bytes(b"mine")
    assert "lsim weights fetch lpips-squeeze" in why_missing("lpips-squeeze", mine)
    (folder / "squeeze.pth").write_bytes(two_files["squeeze.pth"])
    assert find_head_and_backbone("lpips-squeeze", mine) == (folder / "squeeze.pth", mine)
    assert why_missing("lpips-squeeze", mine) == ""
    (empty_search["cache"] / "squeeze.pth").write_bytes(two_files["squeeze.pth"])
    assert find_head_and_backbone("lpips-squeeze", mine) == (empty_search["cache"] / "squeeze.pth", mine)
    assert "no weights at" in why_missing("lpips-squeeze", tmp_path / "absent.pth")


def test_fetching_a_head_fetches_its_network(
    empty_search: dict[str, Path], two_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lpips-squeeze", "squeezenet1_1"):
        there = empty_search["package"] / PUBLISHED[name].file
        there.write_bytes(two_files[there.name])
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], url=there.as_uri()))
    monkeypatch.setattr("pooch.retrieve", _copy)
    assert fetch_weights("lpips-squeeze") == empty_search["cache"] / "squeeze.pth"
    assert {path.name for path in empty_search["cache"].iterdir()} == set(two_files)


def _copy(url: str, known_hash: str, fname: str, path: Path) -> str:
    """``pooch.retrieve`` for addresses of files."""
    content = Path(url.removeprefix("file://")).read_bytes()
    assert known_hash == f"sha256:{hashlib.sha256(content).hexdigest()}"
    (path / fname).write_bytes(content)
    return str(path / fname)


# --- what is refused --------------------------------------------------------------------------------------


def test_wrong_hash_names_file_expected_and_found(empty_search: dict[str, Path], checkpoint: Path) -> None:
    file = empty_search["environment"] / "LSiM.pth"
    file.write_bytes(checkpoint.read_bytes())
    with pytest.raises(WeightsError) as error:
        lsim.load_metric("lsim")
    for part in (str(file), PUBLISHED["lsim"].sha256, hashlib.sha256(checkpoint.read_bytes()).hexdigest()):
        assert part in str(error.value)


@pytest.mark.shared
def test_one_flipped_bit_is_noticed(published_weights: Path, tmp_path: Path) -> None:
    content = bytearray((published_weights / "LSiM.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "LSiM.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="SHA-256"):
        lsim.load_metric("lsim", tmp_path / "LSiM.pth")


@pytest.mark.shared
@pytest.mark.parametrize("name", AUTHORS)
def test_published_files_are_those(published_weights: Path, name: str) -> None:
    file = published_weights / PUBLISHED[name].file
    assert hashlib.sha256(file.read_bytes()).hexdigest() == PUBLISHED[name].sha256
    assert find_weights(name) == file


@pytest.mark.shared
@pytest.mark.parametrize("name", BACKBONES)
def test_published_heads_are_those(shared: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = shared / "reference" / "lpips"
    monkeypatch.setenv("LSIM_WEIGHTS", str(folder))
    file = folder / PUBLISHED[name].file
    assert hashlib.sha256(file.read_bytes()).hexdigest() == PUBLISHED[name].sha256
    assert find_weights(name) == file


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_file(checkpoint: Path, tmp_path: Path, kept: float, legacy: bool) -> None:
    whole = torch.load(checkpoint, weights_only=True)
    torch.save(whole, checkpoint, _use_new_zipfile_serialization=not legacy)
    content = checkpoint.read_bytes()
    broken = tmp_path / "broken.pth"
    broken.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(WeightsError, match=r"broken\.pth: not a checkpoint"):
        lsim.load_metric("lsim", broken)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"\x89PNG\r\n\x1a\n", b"\0" * 4096])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "page.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"page\.pth: not a checkpoint"):
        lsim.load_metric("lsim", file)


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_malicious_pickle_is_refused(tmp_path: Path, save: Any) -> None:
    trap, file = tmp_path / "trap", tmp_path / "malicious.pth"
    save({"stateDict": {}, "normM2": [], "normCount": [], "more": Malicious(trap)}, file)
    with pytest.raises(WeightsError, match=r"malicious\.pth: not a checkpoint"):
        lsim.load_metric("lsim", file)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists(), "the pickle is harmless: this test shows nothing"


def test_checkpoint_of_another_network(tmp_path: Path) -> None:
    skip = write_random_checkpoint(tmp_path / "skip.pth", SkipTrunk)
    with pytest.raises(
        WeightsError, match=r"skip\.pth: no tensor 'basenet\.slice1\.0\.weight'; found .*basenet\.conv1"
    ):
        lsim.load_metric("lsim", skip)
    plain = write_random_checkpoint(tmp_path / "plain.pth", LsimTrunk)
    with pytest.raises(WeightsError, match=r"plain\.pth: no tensor 'basenet\.conv1\.0\.weight'"):
        lsim.load_metric("lsim-skip", plain)


@pytest.mark.shared
@pytest.mark.usefixtures("published_weights")
def test_published_checkpoint_of_another_network() -> None:
    with pytest.raises(WeightsError, match=r"SkipConnections\.pth: no tensor 'basenet\.slice1"):
        lsim.load_metric("lsim", "lsim-skip")


def _without(key: str) -> Any:
    return lambda raw: raw.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _without("normM2"),
            r"expected the keys \['normCount', 'normM2', 'stateDict'\], found",
        ),
        (
            lambda raw: raw["stateDict"].update({"lin2.1.weight": torch.ones(1, 5, 1, 1)}),
            r"'lin2\.1\.weight' has shape \(1, 5, 1, 1\), expected \(1, 192, 1, 1\)",
        ),
        (
            lambda raw: raw["stateDict"].pop("basenet.slice3.1.bias"),
            r"no tensor 'basenet\.slice3\.1\.bias'",
        ),
        (lambda raw: raw["normM2"].pop(), "4 and 5 entries; expected 5, one per feature map"),
        (lambda raw: raw["normM2"].__setitem__(1, torch.ones(26)), r"shapes .*\(26,\).*expected \(y, x\)"),
        (lambda raw: raw["normM2"].__setitem__(1, 3.0), r"shapes .*\(\).*expected \(y, x\)"),
        (lambda raw: raw.update(stateDict=[1, 2]), "stateDict to be a Mapping, found list"),
        (lambda raw: raw["stateDict"].update({"lin0.1.weight": "text"}), r"no tensor 'lin0\.1\.weight'"),
        (lambda raw: raw.update(normCount=3), "normCount to be a Sequence, found int"),
    ],
)
def test_damaged_content_names_what_is_wrong(checkpoint: Path, damage: Any, message: str) -> None:
    raw = torch.load(checkpoint, weights_only=True)
    damage(raw)
    torch.save(raw, checkpoint)
    with pytest.raises(WeightsError, match=rf"mine\.pth: .*{message}"):
        lsim.load_metric("lsim", checkpoint)


def test_a_bare_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(WeightsError, match=r"tensor\.pth: expected the keys .*found Tensor"):
        lsim.load_metric("lsim", tmp_path / "tensor.pth")


def test_metrics_without_weights_take_none(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"'ssim' has no weights; got weights='.*mine\.pth'"):
        lsim.load_metric("ssim", checkpoint)


def test_checkpoint_is_translated_whole(checkpoint: Path) -> None:
    raw = torch.load(checkpoint, weights_only=True)
    loaded = load_checkpoint(checkpoint, LsimTrunk)
    assert torch.equal(loaded.trunk["conv3.weight"], raw["stateDict"]["basenet.slice3.1.weight"])
    assert [len(w) for w in loaded.channel_weights] == list(LsimTrunk.CHANNELS)
    assert loaded.counts == raw["normCount"]
    assert loaded.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert min(w.min().item() for w in loaded.channel_weights) < 0
    metric: Any = lsim.load_metric("lsim", checkpoint, device="cpu")
    assert all((w >= 0).all() for w in metric._weights)


# --- our own format ---------------------------------------------------------------------------------------


def _as_safetensors(checkpoint: Path, path: Path, trunk: str = "lsim", **said: str) -> Path:
    save_checkpoint(path, load_checkpoint(checkpoint, TRUNKS[trunk]), trunk, said)
    return path


@pytest.mark.parametrize("trunk", TRUNKS)
def test_weights_written_are_those_read(tmp_path: Path, trunk: str) -> None:
    pickled = load_checkpoint(write_random_checkpoint(tmp_path / "mine.pth", TRUNKS[trunk]), TRUNKS[trunk])
    path = tmp_path / "mine.safetensors"
    sha256 = save_checkpoint(path, pickled, trunk, {"made": "here"})
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_metadata(path)["made"] == "here"
    ours = load_checkpoint(path, TRUNKS[trunk])
    assert ours.sha256 == sha256
    assert ours.counts == pickled.counts
    assert ours.trunk.keys() == pickled.trunk.keys()
    for mine, theirs in zip(
        [*ours.trunk.values(), *ours.channel_weights, *ours.deviation_squares],
        [*pickled.trunk.values(), *pickled.channel_weights, *pickled.deviation_squares],
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore::lsim.SizeWarning")
@pytest.mark.parametrize("trunk", TRUNKS)
def test_any_name_takes_weights_that_state_their_trunk(tmp_path: Path, trunk: str) -> None:
    pickled = write_random_checkpoint(tmp_path / "mine.pth", TRUNKS[trunk])
    path = _as_safetensors(pickled, tmp_path / "mine.safetensors", trunk)
    metric = lsim.load_metric("smoke-only", path, "cpu", size=None)
    assert metric.name == "smoke-only"
    assert isinstance(metric.trunk, TRUNKS[trunk])
    check_metric(metric, frame_size=48)


def test_an_unknown_name_needs_weights_that_state_their_trunk(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownMetricError, match=r"'smoke-only'.*mine\.pth doesn't state its trunk"):
        lsim.load_metric("smoke-only", checkpoint)
    path = tmp_path / "other.safetensors"
    save_checkpoint(path, load_checkpoint(checkpoint, LsimTrunk), "resnet", {})
    with pytest.raises(WeightsError, match="trunk 'resnet', which no metric has; there are lsim, skip"):
        lsim.load_metric("smoke-only", path)


def test_weights_of_another_trunk_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = _as_safetensors(checkpoint, tmp_path / "mine.safetensors")
    with pytest.raises(WeightsError, match=r"mine\.safetensors: .*trunk 'lsim', expected .* SkipTrunk"):
        lsim.load_metric("lsim-skip", path)


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"other\.safetensors: expected weights of format lsim 1"):
        lsim.load_metric("lsim", path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"format": "lsim", "format_version": "1"})
    with pytest.raises(WeightsError, match="metadata lacks counts, trunk"):
        lsim.load_metric("lsim", path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(WeightsError, match=r"other\.safetensors: not a safetensors file"):
        lsim.load_metric("lsim", path)


def test_a_relative_file_is_found_in_the_search_folders(
    empty_search: dict[str, Path], checkpoint: Path
) -> None:
    path = _as_safetensors(checkpoint, empty_search["package"] / "mine.safetensors")
    assert find_weights("anything", "mine.safetensors") == path


def test_the_default_is_published_weights_where_they_are(
    empty_search: dict[str, Path], published_is_mine: bytes
) -> None:
    assert default_metric() == "lsim-open"
    (empty_search["cache"] / "LSiM.pth").write_bytes(published_is_mine)
    assert default_metric() == "lsim"
    assert lsim.load_metric().name == "lsim"


# --- fetching ---------------------------------------------------------------------------------------------


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves ``content``, counting requests; anything else than /LSiM.pth is not found."""

    content = b""
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path != "/LSiM.pth":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Publisher]]:
    """A server on loopback in the place of the authors' repository."""

    class Fresh(Publisher):
        requests = 0

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/LSiM.pth"
    monkeypatch.setitem(PUBLISHED, "lsim", replace(PUBLISHED["lsim"], url=url))
    yield Fresh
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetch_verifies_and_is_found_then(
    empty_search: dict[str, Path], published_is_mine: bytes, publisher: type[Publisher]
) -> None:
    publisher.content = published_is_mine
    fetched = fetch_weights("lsim")
    assert fetched == empty_search["cache"] / "LSiM.pth"
    assert fetched.read_bytes() == published_is_mine
    assert find_weights("lsim") == fetched
    assert lsim.load_metric("lsim").name == "lsim"
    fetch_weights("lsim")
    assert publisher.requests == 1, "fetched again although it is there"


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b""])
def test_fetching_wrong_content_leaves_nothing(
    empty_search: dict[str, Path], published_is_mine: bytes, publisher: type[Publisher], content: bytes
) -> None:
    publisher.content = content
    with pytest.raises(WeightsError, match=r"could not fetch LSiM\.pth from http://127\.0\.0\.1.*hash"):
        fetch_weights("lsim")
    assert list(empty_search["cache"].iterdir()) == []


def test_fetching_replaces_a_damaged_file(
    empty_search: dict[str, Path], published_is_mine: bytes, publisher: type[Publisher]
) -> None:
    publisher.content = published_is_mine
    (empty_search["cache"] / "LSiM.pth").write_bytes(published_is_mine[:100])
    assert fetch_weights("lsim").read_bytes() == published_is_mine


def test_fetch_into_a_folder(
    empty_search: dict[str, Path], published_is_mine: bytes, publisher: type[Publisher], tmp_path: Path
) -> None:
    publisher.content = published_is_mine
    assert fetch_weights("lsim", tmp_path / "here") == tmp_path / "here" / "LSiM.pth"


@pytest.mark.parametrize("path", ["/gone.pth", None])
def test_publisher_out_of_reach_says_what_to_do(
    empty_search: dict[str, Path],
    publisher: type[Publisher],
    monkeypatch: pytest.MonkeyPatch,
    path: str | None,
) -> None:
    """Not found, and nobody there at all."""
    base = PUBLISHED["lsim"].url.removesuffix("/LSiM.pth")
    url = f"{base}{path}" if path else "http://127.0.0.1:9/LSiM.pth"
    monkeypatch.setitem(PUBLISHED, "lsim", replace(PUBLISHED["lsim"], url=url))
    with pytest.raises(WeightsError, match=rf"could not fetch LSiM\.pth from {url}.*LSIM_WEIGHTS"):
        fetch_weights("lsim")


def test_fetch_of_an_unknown_name() -> None:
    with pytest.raises(
        WeightsError, match="no published weights named 'lsim3d'; available: lsim, lsim-noiseless"
    ):
        fetch_weights("lsim3d")


def test_status_of_all(empty_search: dict[str, Path], published_is_mine: bytes) -> None:
    (empty_search["environment"] / "LSiM.pth").write_bytes(published_is_mine)
    (empty_search["cache"] / PUBLISHED["lsim-skip"].file).write_bytes(b"damaged")
    found = {status.name: status for status in weights_status()}
    others = dict.fromkeys(("lsim-open", "lsim-untrained", *PUBLISHED), "absent")
    assert {name: status.state for name, status in found.items()} == others | {
        "lsim": "ok",
        "lsim-skip": "damaged",
    }
    for name in ("lpips-vgg", "vgg16"):
        assert found[name].detail == "'lsim weights fetch lpips-vgg' (553 MB)"


def test_downloads_are_pinned() -> None:
    """To one commit of the authors, one of LPIPS' authors, and by the hash in the name."""
    for name, published in PUBLISHED.items():
        if name in AUTHORS:
            assert published.url.startswith("https://github.com/tum-pbs/LSIM/raw/a89a1d4")
        elif name in BACKBONES:
            assert "/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/" in published.url
        else:
            assert f"-{published.sha256[:8]}.pth" in published.url
        assert published.url.endswith(f"/{published.file}")
        assert published.licence


def test_a_file_of_ones_own_may_be_called_as_the_heads_of_lpips_are(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "alex.pth", AlexTrunk, size=64)
    assert load_checkpoint(path, AlexTrunk).counts
    with pytest.raises(WeightsError, match=r"alex\.pth: SHA-256 is"):
        verified_sha256(path, perceptual=True)
