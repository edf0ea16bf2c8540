import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lmssl.data.corpus import check_first_record, list_units, read_chunks
from lmssl.data.readers import read_part
from lmssl.data.units import Unit
from lmssl.errors import DataError
from lmssl.recipe.data import DatasetsCorpus

TEXTS = [f"{i} " + "word " * (i % 30) for i in range(3000)]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_dict({"id": list(range(3000)), "text": TEXTS}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def corpus(path: Path | str, **fields: Any) -> DatasetsCorpus:
    return DatasetsCorpus(name="a", kind="datasets", path=str(path), **fields)


def documents(units: tuple[Unit, ...]) -> list[str]:
    return [d.text for unit in units for chunk in read_chunks(unit, max_bad_records=0) for d in chunk.documents]


def test_a_saved_dataset_is_cut_at_rows(saved: Path) -> None:
    units = list_units(corpus(saved), chunk_bytes=50_000)
    assert len(units) > 3 and all(unit.chunk_bytes is None for unit in units)
    check_first_record(units)
    assert documents(units) == TEXTS


def test_a_split_of_a_saved_dict(tmp_path: Path) -> None:
    both = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert documents(list_units(corpus(tmp_path / "saved", split="test"))) == ["test"]
    with pytest.raises(DataError, match="no split 'dev'; the splits are test, train"):
        list_units(corpus(tmp_path / "saved", split="dev"))


def test_a_wrong_field_of_a_saved_dataset(saved: Path) -> None:
    with pytest.raises(DataError, match="field 'body': no such field; the fields are id, text"):
        list_units(corpus(saved, field="body"))
    with pytest.raises(DataError, match="field 'id': it holds int64, not text"):
        list_units(corpus(saved, field="id"))


def test_a_saved_dataset_that_changed(saved: Path) -> None:
    units = list_units(corpus(saved))
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_fingerprint": "another"}))
    with pytest.raises(DataError, match="changed after the corpus was listed"):
        list(read_part(units[0].form, units[0].parts[0]))


def test_a_broken_saved_dataset(saved: Path) -> None:
    (saved / "state.json").write_text("{}")
    with pytest.raises(DataError, match="datasets cannot read it") as caught:
        list_units(corpus(saved))
    assert caught.value.where == str(saved)


def test_a_dataset_that_load_dataset_knows_is_streamed_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (unit,) = list_units(corpus(folder), chunk_bytes=20_000)
    assert unit.chunk_bytes == 20_000
    assert documents((unit,)) == TEXTS
    wrong = list_units(corpus(folder, field="body"))
    with pytest.raises(DataError, match="no field 'body'; the fields are text"):
        check_first_record(wrong)
    with pytest.raises(DataError, match="datasets cannot read it"):
        documents(list_units(corpus(folder, split="dev")))


def test_no_such_dataset() -> None:
    with pytest.raises(DataError, match="datasets cannot read it") as caught:
        list_units(corpus("nobody/nothing"))
    assert caught.value.where == "nobody/nothing"
