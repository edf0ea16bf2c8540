from pathlib import Path

import numpy as np
import pytest

from lmssl.data.columns import store_array, stored_array


@pytest.mark.parametrize("values", [np.arange(5), np.zeros(0, np.uint8), np.ones((2, 3), bool)])
def test_what_was_stored_comes_back(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "deep" / "a.npy"
    store_array(path, values)
    store_array(path, values)
    found = stored_array(path)
    assert found is not None and found.dtype == values.dtype and np.array_equal(found, values)
    assert np.array_equal(np.load(path), values)
    assert [file.name for file in path.parent.iterdir()] == ["a.npy"]


def test_a_missing_file(tmp_path: Path) -> None:
    assert stored_array(tmp_path / "a.npy") is None


def test_damage_is_seen_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    store_array(path, np.arange(3))
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert stored_array(path) is None
    for length in (0, 10, len(content) - 1):
        path.write_bytes(content[:length])
        assert stored_array(path) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        store_array(tmp_path / "a.npy", np.arange(3))
    assert list(tmp_path.iterdir()) == []
