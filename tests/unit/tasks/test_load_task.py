"""Tasks by name: the embedded one, the hub's from a cache filled here, and the real files where they lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_cache import put_dataset
from task_files import picture, png, write_class_folders, write_idx, write_parquet

from layerprobe.errors import NotAvailableError, UnknownNameError, UsageError
from layerprobe.tasks import load, load_task
from layerprobe.tasks.catalog import TASKS
from layerprobe.tasks.parquet import ColumnChoice, from_datasets


def test_digits_are_embedded() -> None:
    task = load_task("digits")
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 1077,
        "validation": 269,
        "test": 451,
    }
    assert (task.n_classes, task.channels, task.image_size) == (10, 1, 8)
    images = np.stack(task.train.images())
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert task.classes == [str(i) for i in range(10)]
    assert repr(task) == "Task('digits': 10 classes; 1,077 train, 269 validation, 451 test images)"
    assert load_task("digits").split_hash == task.split_hash
    ids = np.concatenate([split.ids for split in task.splits.values()])
    assert len(set(ids.tolist())) == 1797


def test_unknown_names_get_suggestions() -> None:
    with pytest.raises(UnknownNameError) as error:
        load_task("cifar1000")
    assert str(error.value) == (
        "unknown task 'cifar1000'. Did you mean 'cifar100' or 'cifar10'? See: layerprobe ls tasks"
    )


def test_the_table_is_literal_and_needs_no_heavy_import() -> None:
    assert TASKS["cifar100"].task_id == "uoft-cs/cifar100"
    assert {"mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet-1k", "food101", "digits"} <= set(TASKS)
    for name, entry in TASKS.items():
        assert entry.task_id.count("/") == 1, name
        assert entry.note, name
    code = (
        "import sys, layerprobe.tasks.catalog; "
        "print(sorted({'torch', 'datasets', 'pyarrow', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_image_size_is_known_before_images_are_read(tmp_path: Path) -> None:
    assert load.peek_image_size("cifar100") == (32, True)
    assert load.peek_image_size("food101") == (0, True)
    assert load.peek_image_size("someone/pictures") == (None, True)
    write_class_folders(tmp_path / "folders", {"cat": 2, "dog": 2})
    assert load.peek_image_size(str(tmp_path / "folders")) == (6, False)
    write_parquet(tmp_path / "x.parquet", [png(picture(0)[:4])], {"label": [0]})
    assert load.peek_image_size(str(tmp_path / "x.parquet")) == (0, True)
    write_idx(tmp_path / "idx" / "t10k-images-idx3-ubyte", np.zeros((2, 7, 7), np.uint8))
    write_idx(tmp_path / "idx" / "t10k-labels-idx1-ubyte", np.zeros(2, np.uint8))
    assert load.peek_image_size(str(tmp_path / "idx")) == (7, True)
    with pytest.raises(UnknownNameError, match="unknown task 'cifar1000'"):
        load.peek_image_size("cifar1000")
    with pytest.raises(UsageError, match="no label columns"):
        load.peek_image_size("digits:fine")


def cifar100_files(folder: Path) -> dict[str, bytes | Path]:
    """CIFAR-100 in small, laid out as its repository is."""
    files: dict[str, bytes | Path] = {"README.md": b"---\nconfigs: []\n---\n"}
    for split, numbers in {"train": range(60), "test": range(100, 130)}.items():
        path = write_parquet(
            folder / f"{split}.parquet",
            [png(picture(i)) for i in numbers],
            {"fine_label": [i % 3 for i in numbers], "coarse_label": [i % 2 for i in numbers]},
            class_names={"fine_label": ["apple", "bear", "cup"], "coarse_label": ["food", "thing"]},
        )
        files[f"cifar100/{split}-00000-of-00001.parquet"] = path
    return files


def test_an_alias_loads_from_the_hub_cache_while_offline(hub_cache: Path, tmp_path: Path) -> None:
    commit = put_dataset(hub_cache, "uoft-cs/cifar100", cifar100_files(tmp_path))
    task = load_task("cifar100", offline=True)
    assert (task.name, task.task_id, task.revision) == ("cifar100", "uoft-cs/cifar100", commit)
    assert task.classes == ["apple", "bear", "cup"]
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 54,
        "validation": 6,
        "test": 30,
    }
    assert load_task("uoft-cs/cifar100").split_hash == task.split_hash
    assert load_task("cifar100", revision=commit).split_hash == task.split_hash
    assert load_task("cifar100:coarse_label").classes == ["food", "thing"]
    with pytest.raises(NotAvailableError, match="at revision 'v2' is not cached"):
        load_task("cifar100", revision="v2")


def test_a_configuration_is_looked_for_in_its_folder(hub_cache: Path, tmp_path: Path) -> None:
    files = {path.replace("cifar100/", "cropped_digits/"): f for path, f in cifar100_files(tmp_path).items()}
    files["full_numbers/train-00000-of-00001.parquet"] = b"not read"
    put_dataset(hub_cache, "ufldl-stanford/svhn", files)
    assert load_task("svhn").n_classes == 3


def test_what_is_not_cached_says_how_to_get_it(hub_cache: Path) -> None:
    with pytest.raises(NotAvailableError) as error:
        load_task("cifar100")
    assert str(error.value) == (
        "'cifar100' (uoft-cs/cifar100) is not cached and offline mode is on (HF_HUB_OFFLINE=1); "
        "download it first or pass a local folder with --data-dir"
    )
    with pytest.raises(NotAvailableError, match=r"'someone/pictures' is not cached and .*\(--offline\)"):
        load_task("someone/pictures", offline=True)


def test_what_datasets_prepared_earlier_is_found(hub_cache: Path, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "repository"
    for path, source in cifar100_files(tmp_path / "made").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    commit = "c" * 40
    prepared = datasets.load_dataset(str(folder / "cifar100"), cache_dir=str(tmp_path / "arrow"))
    target = hub_cache.parent / "datasets" / "uoft-cs___cifar100" / "default" / "0.0.0" / commit
    source = Path(prepared["train"].cache_files[0]["filename"]).parent
    target.parent.mkdir(parents=True)
    source.rename(target)
    for arrow in target.glob("*.arrow"):
        arrow.rename(arrow.with_name("cifar100-" + arrow.name.split("-", 1)[1]))
    task = load_task("cifar100")
    assert task.revision == commit
    assert len(task.test) == 30
    assert task.split_hash == load_task(str(folder)).split_hash
    with pytest.raises(NotAvailableError, match="at revision 'other'"):
        load_task("cifar100", revision="other")


class TestOnline:
    """The road through `datasets`, with the library's entry point replaced."""

    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
        monkeypatch.setattr(load, "offline_reason", lambda offline: None)
        monkeypatch.setattr(load, "hub_is_out_of_reach", lambda: False)

    def fail_with(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def load(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("datasets.load_dataset_builder", load)

    def test_loads_and_notes_the_commit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import datasets

        folder = tmp_path / "repository"
        for path, source in cifar100_files(tmp_path / "made").items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        asked = []

        def load(name: str, config: str | None, *, revision: str | None):
            asked.append((name, config, revision))
            builder = original(str(folder / "cifar100"), cache_dir=str(tmp_path / "arrow"))
            builder.hash = "d" * 40
            return builder

        original = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        task = load_task("cifar100", revision="main")
        assert asked == [("uoft-cs/cifar100", None, "main")]
        assert task.revision == "d" * 40
        assert task.split_hash == load_task(str(folder)).split_hash

    def test_falls_back_to_the_cache(
        self, monkeypatch: pytest.MonkeyPatch, hub_cache: Path, tmp_path: Path
    ) -> None:
        from huggingface_hub.errors import HTTPError

        put_dataset(hub_cache, "uoft-cs/cifar100", cifar100_files(tmp_path))
        for error in (HTTPError("timed out"), ConnectionError("no route")):
            self.fail_with(monkeypatch, error)
            assert load_task("cifar100").n_classes == 3
        with pytest.raises(NotAvailableError, match="not cached and the hub cannot be reached"):
            load_task("cifar10")

    def test_errors_of_the_hub_become_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from datasets.exceptions import DatasetNotFoundError

        self.fail_with(monkeypatch, DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub."))
        with pytest.raises(NotAvailableError, match="'x/y' is gated: accept its terms"):
            load_task("x/y")
        self.fail_with(monkeypatch, DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"))
        with pytest.raises(UnknownNameError, match=r"the hub has no data set 'x/y' \(or it is private\)"):
            load_task("x/y")
        self.fail_with(monkeypatch, DatasetNotFoundError("Revision 'v' doesn't exist for dataset 'x/y'"))
        with pytest.raises(UnknownNameError, match="'x/y' has no revision 'v'"):
            load_task("x/y", revision="v")
        self.fail_with(monkeypatch, ValueError("Config name is missing.\nPlease pick one"))
        with pytest.raises(UsageError, match=r"cannot load 'x/y' from the hub: Config name is missing\.$"):
            load_task("x/y")

    def test_only_plain_readers_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import datasets

        (tmp_path / "x.csv").write_text("label\n1\n")
        builder = datasets.load_dataset_builder("csv", data_files=str(tmp_path / "x.csv"))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
        with pytest.raises(
            UsageError, match="'x/y' is stored as csv; layerprobe reads parquet, arrow, imagefolder"
        ):
            load_task("x/y")


def test_a_downloaded_image_folder_is_followed(tmp_path: Path) -> None:
    import datasets

    write_class_folders(tmp_path / "data", {"cat": 10, "dog": 10})
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "c")
    )
    source = from_datasets(loaded, ColumnChoice(), "x/y", follow_paths=True)
    assert np.array_equal(source.splits[0].images.pixels(0), picture(0))
    assert source.classes == ["cat", "dog"]


def test_real_mnist(shared_data: Path) -> None:
    task = load_task("mnist", data_dir=shared_data / "data" / "mnist")
    assert task.report["official"] == {"test": 10_000}
    assert task.report["duplicates"]["surplus"] == {"test": 0}
    assert (task.channels, task.image_size, task.n_classes) == (1, 28, 10)
    assert sum(len(split) for split in task.splits.values()) == 10_000
    # Ones are narrow: they have the least ink of all digits, by far.
    ink = np.array([image.mean() for image in task.train.images()])
    assert np.argmin([ink[task.train.labels == digit].mean() for digit in range(10)]) == 1


@pytest.mark.slow
def test_real_cifar100_has_its_known_duplicates(shared_data: Path) -> None:
    task = load_task("cifar100", data_dir=shared_data / "data" / "cifar100")
    assert task.report["official"] == {"test": 10_000, "train": 30_000}
    found = task.report["duplicates"]
    assert found["surplus"] == {"train": 6, "test": 2}
    assert found["across"] == {"train and test": 7}
    assert found["dropped"] == {"train": 7, "test": 0}
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 26_993,
        "validation": 3_000,
        "test": 10_000,
    }
    limited = load_task("cifar100", data_dir=shared_data / "data" / "cifar100", limit=2000)
    assert np.array_equal(limited.train.ids, task.train.ids[:2000])
    assert (np.bincount(limited.train.labels) == 20).all()
    assert np.array_equal(limited.test.images([7])[0], task.test.images([7])[0])
