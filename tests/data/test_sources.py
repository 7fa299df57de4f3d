"""Reading rows from files and from the hub, and what is said about those that cannot be used."""

import json

import datasets
import pytest

from tests.data.conftest import film_rows, write_jsonl
from zo_lightning.data import ClassificationTask, DataError, PromptDataModule, get_task, load_split

SST2 = get_task("sst2")


def fails(task, folder, split="train") -> str:
    with pytest.raises(DataError) as caught:
        load_split(task, split, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    folder = tmp_path / "odd [1] name"
    folder.mkdir()
    rows = [*film_rows(5), {"sentence": "NA", "label": 1, "idx": 5}, {"sentence": 'a, "b"', "label": 0, "idx": 6}]
    table = datasets.Dataset.from_list(rows)
    path = folder / f"train{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_pandas().to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    source = load_split(SST2, "train", folder)
    assert [source.rows[i]["sentence"] for i in range(7)] == [row["sentence"] for row in rows]
    assert source.labels.tolist() == [row["label"] for row in rows]
    assert source.origin == str(path)


@pytest.mark.parametrize("config", [True, False])
def test_a_local_copy_of_a_hub_dataset(tmp_path, config):
    data = tmp_path / ("sst2" if config else "data")
    data.mkdir()
    datasets.Dataset.from_list(film_rows(6)).to_parquet(data / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(film_rows(4)).to_parquet(data / "validation-00000-of-00001.parquet")
    if config:
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: sst2\n  data_files:\n  - split: train\n    path: sst2/train-*\n"
            "  - split: validation\n    path: sst2/validation-*\n---\n"
        )
    assert len(load_split(SST2, "train", tmp_path).rows) == 6
    assert len(load_split(SST2, "validation", tmp_path).rows) == 4


def test_text_labels(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "stars": "pos"}, {"text": "b", "stars": "neg"}])
    task = ClassificationTask("{text}", {"neg": " bad", "pos": " good"}, label_column="stars")
    assert load_split(task, "train", tmp_path).labels.tolist() == [1, 0]


def test_splits_by_other_names(tmp_path):
    write_jsonl(tmp_path / "held_out.jsonl", film_rows(3))
    assert len(load_split(SST2, "held_out", tmp_path).rows) == 3


def test_folder_that_does_not_exist(tmp_path):
    assert fails(SST2, tmp_path / "nowhere") == f"the folder {tmp_path / 'nowhere'} does not exist, check --data.data_dir"


def test_folder_without_the_split(film_dir):
    (film_dir / "train.jsonl").unlink()
    message = fails(SST2, film_dir)
    assert f"{film_dir} has no train.jsonl (.json, .parquet, .csv, .tsv), it holds ['validation.jsonl']" in message


def test_a_folder_of_tasks_points_to_the_one(tmp_path):
    for name in ("rte", "sst2"):
        write_jsonl(tmp_path / name / "train.jsonl", film_rows(3))
    assert f"it holds ['rte', 'sst2'], but {tmp_path / 'sst2'} exists: give that" in fails(SST2, tmp_path)


def test_two_files_for_one_split(film_dir):
    (film_dir / "train.csv").write_text("sentence,label\na,0\n")
    assert "holds ['train.csv', 'train.jsonl'], keep one file for 'train'" in fails(SST2, film_dir)


def test_file_that_cannot_be_parsed(film_dir):
    (film_dir / "train.jsonl").write_text('{"sentence": "a", "label": 1}\nnot json\n')
    assert f"cannot read {film_dir / 'train.jsonl'}: " in fails(SST2, film_dir)


def test_hub_copy_that_cannot_be_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_text("no parquet")
    assert f"cannot read the split 'train' from {tmp_path}" in fails(SST2, tmp_path)


def test_missing_columns(film_dir):
    message = fails(get_task("rte"), film_dir)
    assert f"{film_dir / 'train.jsonl'} lacks the columns ['premise', 'hypothesis'] that task 'rte' needs" in message
    assert "there are ['sentence', 'label', 'idx']" in message
    message = fails(ClassificationTask("{sentence}", ["a", "b"], label_column="stars"), film_dir)
    assert "lacks the columns ['stars']" in message
    assert "the answer is in ['stars']" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(film_dir, content):
    (film_dir / "train.jsonl").write_text(content)
    assert fails(SST2, film_dir) == f"{film_dir / 'train.jsonl'} is empty, it needs at least one row"


def test_no_rows(film_dir):
    (film_dir / "train.jsonl").unlink()
    (film_dir / "train.csv").write_text("sentence,label\n")
    assert fails(SST2, film_dir) == f"cannot read {film_dir / 'train.csv'}: it has no rows, and needs at least one"


def test_no_rows_on_the_hub(monkeypatch):
    empty = datasets.Dataset.from_list(film_rows(3)).select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: empty)
    assert fails(SST2, None) == "the split 'train' of nyu-mll/glue (sst2) has no rows, it needs at least one"


def test_unknown_label(film_dir):
    rows = film_rows(5)
    rows[3]["label"] = 7
    write_jsonl(film_dir / "train.jsonl", rows)
    message = fails(SST2, film_dir)
    assert message == (f"row 3 (from 0) of {film_dir / 'train.jsonl'}: unknown label 7 in column 'label', expected [0, 1]")


def test_unpublished_labels(film_dir):
    write_jsonl(film_dir / "train.jsonl", [{**row, "label": -1} for row in film_rows(5)])
    message = fails(SST2, film_dir)
    assert "row 0 (from 0)" in message
    assert "-1 marks rows whose labels were never published, use another split" in message


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = fails(SST2, None)
    assert message.startswith("cannot load the split 'train' of nyu-mll/glue (sst2) from the Hugging Face hub (")
    assert "give a folder that holds train.jsonl with --data.data_dir" in message


def test_the_hub_gives_rows(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(film_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load_split(SST2, "validation")
    assert asked == [("nyu-mll/glue", "sst2", "validation")]
    assert source.origin == "the split 'validation' of nyu-mll/glue (sst2)"
    assert len(source.rows) == 3


def test_task_without_a_hub_dataset():
    message = fails(ClassificationTask("{text}", ["a", "b"], name="mine"), None)
    assert message == "task 'mine' has no dataset on the hub, give a folder with --data.data_dir"


def test_a_column_of_another_type(tmp_path, words):
    """Texts that are all numbers are numbers in a CSV file."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("sentence,label\n" + "1,0\n2,1\n" * 3)
    data = PromptDataModule("sst2", str(tmp_path), tokenizer=words, num_train=2, num_dev=2)
    with pytest.raises(DataError, match=r"row \d \(from 0\) of .*train.csv: task 'sst2' cannot read it .* {'sentence': 'int'"):
        data.setup("fit")
