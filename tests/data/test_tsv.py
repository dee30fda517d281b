"""TSV files: rows and images come back, records are right, and whatever is broken is named."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fiber_d2.data.tsv import (
    TSVFile,
    clip_inclusive,
    decode_tsv_image,
    load_tsv_dataset,
    read_tsv_image,
    write_tsv,
)
from fiber_d2.data.tsv_file import tsv_image_size

REFERENCE = Path(__file__).parents[1] / "fixtures" / "data_eval" / "i_tsv"
text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\t\n"), max_size=8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(width, height, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def tsv(tmp_path):
    """Writes rows and gives the path."""

    def write(rows, name="some.tsv"):
        write_tsv(rows, str(tmp_path / name))
        return str(tmp_path / name)

    return write


@pytest.fixture
def dataset(tmp_path):
    """Writes a data set of three images; every part can be replaced. Gives the yaml's path."""
    sizes = [(20, 10), (8, 12), (30, 30)]
    objects = [
        [{"class": "cat", "rect": [1, 2, 5.5, 6]}, {"class": "a dog", "rect": [-3, 0, 40, 9]}],
        [],
        {
            "objects": [
                {"class": "cat", "rect": [0, 0, 0, 5]},
                {"class": "cat", "rect": [0, 0, 1, 5]},
            ]
        },
    ]
    keys = ["7", "x", "9"]

    def write(**changes):
        parts = {
            "img": [[k, encoded(picture(*size))] for k, size in zip(keys, sizes)],
            "label": [[k, json.dumps(entry)] for k, entry in zip(keys, objects)],
            "hw": [[k, f"{h} {w}"] for k, (w, h) in zip(keys, sizes)],
            "labelmap": {"a dog": 5, "cat": 2},
            **changes,
        }
        names = {}
        for part, content in parts.items():
            if content is None:
                continue
            kind = "json" if isinstance(content, dict) else "tsv"
            path = tmp_path / f"{part}.{kind}"
            if isinstance(content, dict):
                path.write_text(json.dumps(content))
            elif isinstance(content, str):
                path.write_text(content)
            else:
                write_tsv(content, str(path))
            names[part] = path.name
        (tmp_path / "set.yaml").write_text(json.dumps(names))
        return str(tmp_path / "set.yaml")

    return write


# --- files -------------------------------------------------------------------------------------


@given(st.lists(st.lists(text, min_size=1, max_size=3), max_size=6))
@settings(max_examples=40, deadline=None)
def test_rows_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "some.tsv"
    assert write_tsv(iter(rows), str(path)) == len(rows)
    assert list(TSVFile(str(path))) == rows
    written = path.with_suffix(".lineidx").read_bytes()
    path.with_suffix(".lineidx").unlink()
    assert list(TSVFile(str(path), build_index=True)) == rows
    assert path.with_suffix(".lineidx").read_bytes() == written
    # Independent of our reader: what plain Python sees in the file.
    assert [line.split("\t") for line in path.read_bytes().decode().split("\n")[:-1]] == rows


def test_access_like_a_list(tsv):
    file = TSVFile(tsv([["a", "1"], ["b", "2"]]))
    assert len(file) == 2 and file[-1] == ["b", "2"] == file.columns(1, at_least=2)
    for row in (2, -3):
        with pytest.raises(IndexError, match=f"no row {row}"):
            file[row]


def test_pickled_as_a_path(tsv):
    file = TSVFile(tsv([[str(k)] for k in range(10_000)]))
    assert file[5] == ["5"]  # open
    data = pickle.dumps(file)
    assert len(data) < 1000
    assert pickle.loads(data)[9_999] == ["9999"]


class Rows(Dataset):
    def __init__(self, file):
        self.file = file

    def __len__(self):
        return len(self.file)

    def __getitem__(self, row):
        return self.file[row][0]


def test_workers_that_share_an_open_file(tsv):
    names = [f"row {k} " + "x" * (k % 700) for k in range(300)]
    file = TSVFile(tsv([[name] for name in names]))
    assert file[0] == [names[0]]  # opened before the workers are made
    loader = DataLoader(Rows(file), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == names
    assert file[299] == [names[299]]


def test_missing_files(tmp_path, tsv):
    with pytest.raises(FileNotFoundError, match="nothing.tsv does not exist"):
        TSVFile(str(tmp_path / "nothing.tsv"))
    path = Path(tsv([["a"]]))
    path.with_suffix(".lineidx").unlink()
    with pytest.raises(FileNotFoundError, match=r"some\.tsv has no index .*some\.lineidx"):
        TSVFile(str(path))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "is empty"),
        ("0\n4\nx\n", "Entry 2 of .*lineidx is b'x'"),
        ("0\n4.5\n", "Entry 1 of .* no whole number"),
        ("0\n99999999999999999999\n", "Entry 1 of"),
        ("2\n4\n", "must start with 0 and rise; its entry 0 is 2"),
        ("0\n8\n4\n", "its entry 2 is 4"),
        ("0\n4\n4\n", "its entry 2 is 4"),
        ("-4\n0\n", "its entry 0 is -4"),
        ("0\n4\n8\n12\n", r"Row 3 of .*some\.tsv starts at byte 12 .* has 12 bytes"),
        ("0\n4\n8\n900\n", r"Row 3 of .*some\.tsv"),
    ],
)
def test_wrong_index_is_seen_at_once(tsv, index, message):
    path = Path(tsv([["a", "1"], ["b", "2"], ["c", "3"]]))  # rows start at 0, 4 and 8
    path.with_suffix(".lineidx").write_text(index)
    with pytest.raises(ValueError, match=message):
        TSVFile(str(path))


@pytest.mark.parametrize(("index", "row"), [("0\n5\n8\n", 0), ("0\n5\n8\n", 1), ("0\n4\n", 1)])
def test_wrong_index_is_seen_where_a_row_is_read(tsv, index, row):
    path = Path(tsv([["a", "1"], ["b", "2"], ["c", "3"]]))
    path.with_suffix(".lineidx").write_text(index)
    with pytest.raises(ValueError, match=rf"Row {row} of .*some\.tsv is not one line: .*lineidx"):
        TSVFile(str(path))[row]


def test_truncated_file(tsv):
    path = Path(tsv([["a", "1"], ["b", "2"], ["c", "3"]]))
    whole = path.read_bytes()
    file = TSVFile(str(path))
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="Row 2 of .* does not end with a newline"):
        TSVFile(str(path))
    with pytest.raises(ValueError, match="Row 2 of .* beyond the end"):
        file[2]
    path.write_bytes(whole[:6])
    with pytest.raises(ValueError, match="Row 2 of .* starts at byte 8"):
        TSVFile(str(path))


def test_rows_that_are_not_as_asked(tsv):
    path = Path(tsv([["a", "1"], ["b"]]))
    with pytest.raises(
        ValueError, match=r"Row 1 of .*some\.tsv has 1 columns instead of at least 2"
    ):
        TSVFile(str(path)).columns(1, at_least=2)
    path.write_bytes(path.read_bytes().replace(b"a", b"\xff"))
    with pytest.raises(ValueError, match=r"Row 0 of .*some\.tsv is not UTF-8"):
        TSVFile(str(path))[0]


@pytest.mark.parametrize("row", [[], ["a\tb"], ["a", "b\n"], ["\ud800"]])
def test_rows_that_cannot_be_written(tmp_path, tsv, row):
    path = tsv([["old"]])
    with pytest.raises(ValueError, match=r"Row 1 for .*some\.tsv"):
        write_tsv([["new"], row], path)
    assert list(TSVFile(path)) == [["old"]]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["some.lineidx", "some.tsv"]


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_images_as_detectron2_reads_them(tmp_path, tsv, orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(9, 5, seed=1).save(tmp_path / "a.jpg", exif=exif)
    data = base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()
    file = TSVFile(tsv([["key", "more", data]]))
    image = decode_tsv_image(file, 0, image_format)
    expected = detection_utils.read_image(str(tmp_path / "a.jpg"), format=image_format)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)
    assert tsv_image_size(file, 0) == image.shape[:2]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_every_image_has_three_channels(tsv, mode):
    file = TSVFile(tsv([["key", encoded(picture(6, 4).convert(mode))]]))
    assert decode_tsv_image(file, 0).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="'BGR' or 'RGB'"):
        decode_tsv_image(file, 0, "L")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("abc", "broken base64"),
        ("ab!d", "broken base64"),
        ("\u00e9", "broken base64"),
        ("", "no image"),
        (base64.b64encode(b"no image at all").decode(), "no image"),
        (encoded(picture(40, 40))[:400], "damaged"),
        (encoded(picture(40, 40), "JPEG")[:400], "damaged"),
    ],
)
def test_broken_images(tsv, data, message):
    file = TSVFile(tsv([["good", encoded(picture(3, 3))], ["bad", data]]))
    with pytest.raises(ValueError, match=rf"Row 1 of .*some\.tsv .*{message}"):
        decode_tsv_image(file, 1)
    assert decode_tsv_image(file, 0).shape == (3, 3, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11, 30])  # Pillow warns, and Pillow refuses
def test_huge_images(tsv, monkeypatch, side):
    file = TSVFile(tsv([["key", encoded(picture(side, side))]]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"Row 0 of .*some\.tsv .*too large"):
        decode_tsv_image(file, 0)


# --- data sets ---------------------------------------------------------------------------------


def test_records(dataset, tmp_path):
    records = load_tsv_dataset(dataset(), "tsv_test_records")
    metadata = MetadataCatalog.get("tsv_test_records")
    assert records.class_names == ["cat", "a dog"] == metadata.thing_classes
    assert records.label_numbers.tolist() == [2, 5]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1}
    MetadataCatalog.remove("tsv_test_records")

    def box(values, category):
        mode = BoxMode.XYXY_ABS
        return {"bbox": values, "bbox_mode": mode, "category_id": category, "iscrowd": 0}

    name = str(tmp_path / "img.tsv")
    assert list(records) == [
        {
            "file_name": name,
            "tsv_row": 0,
            "height": 10,
            "width": 20,
            "image_id": 7,
            "annotations": [box([1, 2, 6.5, 7], 0), box([0, 0, 20, 10], 1)],
        },
        {
            "file_name": name,
            "tsv_row": 1,
            "height": 12,
            "width": 8,
            "image_id": 1,
            "annotations": [],
        },
        {
            "file_name": name,
            "tsv_row": 2,
            "height": 30,
            "width": 30,
            "image_id": 9,
            "annotations": [box([0, 0, 2, 6], 0)],
        },
    ]
    for record, size in zip(records, records.image_sizes().tolist()):
        assert read_tsv_image(record).shape == (record["height"], record["width"], 3)
        assert size == [record["height"], record["width"]]
    np.testing.assert_array_equal(read_tsv_image(records[0], "RGB"), np.asarray(picture(20, 10)))
    with pytest.raises(IndexError):
        records[3]


def test_line_list_and_subset(dataset):
    whole = load_tsv_dataset(dataset(), None)
    records = load_tsv_dataset(dataset(linelist="1\n0\n1\n1\n"))
    assert [record["tsv_row"] for record in records] == [1, 0, 1, 1]
    # The key is no number: such images are counted through by their place.
    assert [record["image_id"] for record in records] == [0, 7, 2, 3]
    assert records.image_sizes().tolist() == [[12, 8], [10, 20], [12, 8], [12, 8]]
    part = records.subset([3, 1, 1])
    assert list(part) == [records[3], records[1], records[1]]
    assert list(part.subset(np.array([0]))) == [records[3]]
    assert list(whole.subset([])) == []


def test_records_in_workers_and_pickled(dataset):
    records = load_tsv_dataset(dataset(linelist="0\n1\n2\n" * 5000))
    expected = [records[index] for index in range(30)]
    loader = DataLoader(
        records.subset(range(30)), batch_size=6, num_workers=2, collate_fn=lambda batch: batch
    )
    assert sum(loader, []) == expected
    again = pickle.loads(pickle.dumps(records))
    assert len(again) == 15_000 and again[14_999] == records[14_999]


@pytest.mark.parametrize(
    "form", ['[{"height": 10, "width": 20}]', '{"height":10,"width":20}', "10 20"]
)
def test_forms_of_sizes(dataset, form):
    rows = [["7", form], ["x", "12 8"], ["9", "30 30"]]
    record = load_tsv_dataset(dataset(hw=rows))[0]
    assert (record["height"], record["width"]) == (10, 20)


def test_sizes_from_the_images(dataset):
    records = load_tsv_dataset(dataset(hw=None))
    assert list(records) == list(load_tsv_dataset(dataset()))
    assert load_tsv_dataset(dataset(hw=None)).image_sizes().tolist() == [
        [10, 20],
        [12, 8],
        [30, 30],
    ]


def test_images_by_id(dataset):
    labels = [["1", '{"img_id": "b", "objects": []}'], ["2", '{"img_id": 12, "objects": []}']]
    records = load_tsv_dataset(dataset(label=labels, imageid2idx={"b": 2, "12": 0}))
    assert [(r["tsv_row"], r["image_id"], r["height"], r["width"]) for r in records] == [
        (2, 1, 30, 30),
        (0, 2, 10, 20),
    ]
    assert records.image_sizes().tolist() == [[30, 30], [10, 20]]
    records = load_tsv_dataset(dataset(label=labels, imageid2idx={"b": 2}))
    with pytest.raises(ValueError, match=r"Row 1 of .*label\.tsv has the img_id 12"):
        records[1]
    with pytest.raises(ValueError, match="beyond the 3 rows"):
        load_tsv_dataset(dataset(label=labels, imageid2idx={"b": 3}))


@pytest.mark.parametrize(
    "labelmap",
    [
        {"label_to_idx": {"cat": 1, "a dog": 2}},
        {"__background__": 0, "a dog": 2, "cat": 1},
        "cat\na dog\n",
    ],
)
def test_forms_of_label_maps(dataset, labelmap):
    records = load_tsv_dataset(dataset(labelmap=labelmap))
    assert records.class_names == ["cat", "a dog"]
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    other = load_tsv_dataset(dataset(labelmap=None, jsondict={"cat": 1, "a dog": 2}))
    assert other.class_names == ["cat", "a dog"]


def test_background_is_no_class(dataset):
    labels = [
        ["7", '[{"class": "__background__", "rect": [0, 0, 5, 5]}]'],
        ["x", "[]"],
        ["9", "[]"],
    ]
    records = load_tsv_dataset(dataset(label=labels))
    assert records[0]["annotations"] == []
    assert records.objects(0)[1].tolist() == [-1]


def test_paths_are_found_beside_the_yaml_first(dataset, tmp_path, monkeypatch):
    path = Path(dataset())
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    expected = list(load_tsv_dataset(str(path)))
    shutil.copy(tmp_path / "hw.tsv", elsewhere / "hw.tsv")
    (elsewhere / "hw.tsv").write_text("wrong")
    assert list(load_tsv_dataset(str(path))) == expected
    for name in ("hw.tsv", "hw.lineidx"):
        shutil.move(tmp_path / name, elsewhere / name)
    assert list(load_tsv_dataset(str(path))) == expected
    (elsewhere / "hw.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"set\.yaml names hw\.tsv, which is not at"):
        load_tsv_dataset(str(path))


def test_index_of_labels_is_made(dataset, tmp_path):
    path = dataset()
    (tmp_path / "label.lineidx").unlink()
    assert len(load_tsv_dataset(path)) == 3
    (tmp_path / "img.lineidx").unlink()
    with pytest.raises(FileNotFoundError, match=r"img\.tsv has no index"):
        load_tsv_dataset(path)


ROWS = [["7", "[]"], ["x", "[]"], ["9", "[]"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img": None}, "must name `img`, `label` and `labelmap`"),
        ({"labelmap": {}}, "must give each class name a number"),
        ({"labelmap": {"cat": "1"}}, "must give each class name a number"),
        ({"labelmap": {"cat": 1, "dog": 1}}, "same number"),
        ({"labelmap": "cat\ncat\n"}, "repeats a name"),
        ({"label": ROWS[:2]}, r"img\.tsv has 3 rows, but .*label\.tsv has 2"),
        ({"linelist": "0\n3\n"}, r"Entry 1 of the line list .* is 3, .* rows 0 to 2"),
        ({"linelist": "0\n-1\n"}, "Entry 1 of the line list"),
        ({"linelist": "0\nx\n"}, r"Entry 1 of .*linelist\.tsv"),
    ],
)
def test_data_sets_that_cannot_be_opened(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        load_tsv_dataset(dataset(**changes))


@pytest.mark.parametrize("content", ["- a", "a: [", "img: 5", "\x00"])
def test_yaml_that_names_no_files(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_tsv_dataset(str(path))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        load_tsv_dataset(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("label", "[{", "has no json"),
        ("label", "[" * 100_000, "has no json"),
        ("label", "5", "neither a list"),
        ("label", '{"other": []}', "neither a list"),
        ("label", "[5]", "an object without"),
        ("label", '[{"class": "cat"}]', "an object without"),
        ("label", '[{"rect": [1, 2, 3, 4]}]', "an object without"),
        ("label", '[{"class": "cat", "rect": [1, 2, 3]}]', "an object without"),
        ("label", '[{"class": "cat", "rect": [1, 2, 3, "x"]}]', "an object without"),
        ("label", '[{"class": ["cat"], "rect": [1, 2, 3, 4]}]', "an object without"),
        ("label", '[{"class": "cat", "rect": [1, 2, 3, NaN]}]', "not finite"),
        ("label", '[{"class": "cow", "rect": [1, 2, 3, 4]}]', "'cow', which is not in the label"),
        ("hw", "10", "a height and a width"),
        ("hw", "0 5", "a height and a width"),
        ("hw", "[]", "a height and a width"),
        ("hw", '{"height": 5}', "a height and a width"),
        ("hw", '{"height": 5, "width": null}', "a height and a width"),
    ],
)
def test_broken_rows(dataset, part, text, message):
    rows = {"label": ROWS, "hw": [["7", "10 20"], ["x", "12 8"], ["9", "30 30"]]}[part]
    records = load_tsv_dataset(dataset(**{part: [rows[0], ["x", text], rows[2]]}))
    assert records[0]["image_id"] == 7
    with pytest.raises(ValueError, match=rf"Row 1 of .*{part}\.tsv .*{message}"):
        records[1]


def test_rows_about_different_images(dataset):
    records = load_tsv_dataset(dataset(label=[ROWS[1], ROWS[0], ROWS[2]]))
    with pytest.raises(ValueError, match=r"Row 0 of .*hw\.tsv is about '7', but .* about 'x'"):
        records[0]


@given(
    st.lists(st.tuples(*[st.integers(-5, 15)] * 4), max_size=5),
    st.integers(1, 10),
    st.integers(1, 10),
)
@settings(max_examples=50, deadline=None)
def test_clipping_counts_pixels(boxes, height, width):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    clipped, kept = clip_inclusive(np.array(boxes, dtype=float).reshape(-1, 4), height, width)
    for box, found, keep in zip(boxes, clipped.tolist(), kept.tolist()):
        columns = [x for x in range(box[0], box[2] + 1) if 0 <= x < width]
        rows = [y for y in range(box[1], box[3] + 1) if 0 <= y < height]
        assert keep == (len(columns) > 1 and len(rows) > 1)
        if keep:
            assert found == [columns[0], rows[0], columns[-1], rows[-1]]


def test_reference_dataset_reads_alike_after_a_copy(tmp_path):
    """Rows written by us from rows read by us are the reference's own bytes."""
    for path in REFERENCE.glob("*.tsv"):
        if path.with_suffix(".lineidx").exists():
            write_tsv(TSVFile(str(path)), str(tmp_path / path.name))
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
            index = path.with_suffix(".lineidx")
            assert (tmp_path / index.name).read_text().split() == index.read_text().split()
