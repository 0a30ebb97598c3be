import base64
import hashlib

from mlx_tune.diagnosis.checks.distributions import installed, library_path, missing, owners


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def plant(folder, name, version, files, tag="py3-none-manylinux_2_35_x86_64"):
    """A distribution whose RECORD says so of its files; only what is given as bytes is written."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")
    (info / "RECORD").write_text("".join(f"{path},sha256={digest(content)},\n" for path, content in files.items()))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_a_distribution_is_read_from_its_metadata(tmp_path):
    plant(tmp_path, "mlx-cpu", "0.32.4", {"mlx/lib/libmlx.so": b"library", "mlx/lib/other.txt": b""})
    plant(tmp_path, "unrelated", "1.0", {})
    found = installed([str(tmp_path)])
    assert list(found) == ["mlx-cpu"]
    one = found["mlx-cpu"]
    assert (one.version, library_path(one)) == ("0.32.4", "mlx/lib/libmlx.so")
    assert one.tags == ("manylinux_2_35_x86_64",)


def test_the_first_folder_decides_as_for_imports(tmp_path):
    for folder, version in (("a", "2.0"), ("b", "1.0")):
        plant(tmp_path / folder, "mlx", version, {})
    assert installed([str(tmp_path / "a"), str(tmp_path / "b")])["mlx"].version == "2.0"
    assert installed([str(tmp_path / "b"), str(tmp_path / "a")])["mlx"].version == "1.0"


def test_files_that_are_gone_are_missed_but_not_headers(tmp_path):
    plant(tmp_path, "mlx", "1.0", {"mlx/core.so": b"1", "mlx/nn.py": b"2", "mlx/include/mlx/array.h": b"3"})
    one = installed([str(tmp_path)])["mlx"]
    assert missing(one) == []
    for path in ("mlx/core.so", "mlx/include/mlx/array.h"):
        (tmp_path / path).unlink()
    assert missing(one) == ["mlx/core.so"]


def test_the_hash_says_whose_a_file_is(tmp_path):
    path = "mlx/lib/libmlx.so"
    plant(tmp_path, "mlx-cuda-12", "1.0", {path: b"one"})
    plant(tmp_path, "mlx-cpu", "1.0", {path: b"the other"})
    claims = list(installed([str(tmp_path)]).values())
    assert owners(path, claims) == ["mlx-cpu"]
    (tmp_path / path).write_bytes(b"neither")
    assert owners(path, claims) == []
    (tmp_path / path).unlink()
    assert owners(path, claims) == []
