from pathlib import Path

import pytest

from data.errors import InputError
from data.sources import ELPV_CLASS_NAMES, ImageReference, Source, is_prepared, open_source, read_lines


def _touch(root: Path, *names: str) -> Path:
    """Makes files with something in them: a source only lists, so no image is needed."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def _csv(folder: Path, text: str | bytes) -> str:
    path = folder / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def _error(location: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(location))
    return str(caught.value)


def test_open_source_lists_a_folder_per_class(tmp_path):
    _touch(tmp_path, "dog/2.JPG", "dog/1.png", "cat/a b,c.jpeg", "cat/d.gif", "cat/e.bmp")

    source = open_source(str(tmp_path))

    assert source.class_names == ("cat", "dog")
    assert source.columns == ()
    assert source.references == tuple(
        ImageReference(path=str(tmp_path / label / name), label=label)
        for label, name in [
            ("cat", "a b,c.jpeg"),
            ("cat", "d.gif"),
            ("cat", "e.bmp"),
            ("dog", "1.png"),
            ("dog", "2.JPG"),
        ]
    )


def test_open_source_passes_over_hidden_entries_and_lists_every_other_file_of_a_class(tmp_path):
    _touch(tmp_path, "cat/1.png", "cat/.2.png", "cat/notes.txt", "cat/more/3.webp", "dog/1.png", ".git/1.png", "readme.md")

    source = open_source(str(tmp_path))

    assert source.class_names == ("cat", "dog")
    assert [Path(reference.path).name for reference in source.references] == ["1.png", "notes.txt", "3.webp", "1.png"]


@pytest.mark.parametrize("name", ["labels.txt", "dict.txt"])
def test_open_source_takes_the_class_order_from_a_file(tmp_path, name):
    _touch(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / name).write_text("dog\n\n cat \n")

    assert open_source(str(tmp_path)).class_names == ("dog", "cat")


def test_open_source_keeps_a_folder_that_the_class_list_lacks(tmp_path):
    # The preparation quarantines its images, so that they are counted and named.
    _touch(tmp_path, "cat/1.png", "dog/1.png", "cow/1.png")
    (tmp_path / "labels.txt").write_text("dog\ncat\n")

    source = open_source(str(tmp_path))

    assert source.class_names == ("dog", "cat")
    assert [reference.label for reference in source.references] == ["cat", "cow", "dog"]


def test_open_source_explains_a_missing_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert _error("photos") == (
        "Expected `data.input` to be a folder with a folder per class, a CSV, a folder of TFRecords, or `elpv`. "
        f"Received: 'photos', which does not exist. Check the path (it is relative to {tmp_path})."
    )


def test_open_source_explains_a_folder_without_folders(tmp_path):
    _touch(tmp_path, "1.png")

    assert _error(tmp_path) == (
        f"Expected {tmp_path} to have one folder per class. Received: no folder in it. "
        "Put the images of each class into a folder of its own, or give a CSV of path,label."
    )


def test_open_source_explains_a_class_without_images(tmp_path):
    _touch(tmp_path, "cat/1.png", "dog/.hidden")

    assert _error(tmp_path) == (
        f"Expected images in every class of {tmp_path}. Received: class 'dog' without any. Add images or remove the class."
    )


def test_open_source_explains_a_single_class(tmp_path):
    _touch(tmp_path, "cat/1.png")

    assert _error(tmp_path) == (
        f"Expected at least two classes in {tmp_path}. Received: ['cat']. "
        "Put the images of each class into a folder of its own, or give each row of the CSV its label."
    )


def test_open_source_explains_a_listed_class_without_a_folder(tmp_path):
    _touch(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "labels.txt").write_text("cat\ndog\ncow\n")

    assert "Received: class 'cow' without any." in _error(tmp_path)


def test_open_source_reads_a_csv_without_a_header(tmp_path):
    source = open_source(_csv(tmp_path, "a.png,dog\nsub/b.png, cat \n/abs/c.png,dog\ngs://bucket/d.png,dog\n"))

    assert source == Source(
        class_names=("cat", "dog"),
        columns=(),
        references=(
            ImageReference(path=str(tmp_path / "a.png"), label="dog", line=1),
            ImageReference(path=str(tmp_path / "sub/b.png"), label="cat", line=2),
            ImageReference(path="/abs/c.png", label="dog", line=3),
            ImageReference(path="gs://bucket/d.png", label="dog", line=4),
        ),
        root=str(tmp_path),
    )


def test_open_source_reads_a_split_without_a_header(tmp_path):
    source = open_source(_csv(tmp_path, "a.png,dog,train\nb.png,cat,\nc.png,cat, test \n"))

    assert [reference.split for reference in source.references] == ["train", None, "test"]
    assert source.columns == ()


def test_open_source_reads_a_header_in_any_order_with_more_columns(tmp_path):
    source = open_source(_csv(tmp_path, "Camera,LABEL,Split,Path,site\nleft,dog,valid,a.png,x\nright,cat,,b.png,y\n"))

    assert source.class_names == ("cat", "dog")
    assert source.columns == ("Camera", "site")
    assert source.references == (
        ImageReference(path=str(tmp_path / "a.png"), label="dog", split="valid", columns=("left", "x"), line=2),
        ImageReference(path=str(tmp_path / "b.png"), label="cat", split=None, columns=("right", "y"), line=3),
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_open_source_reads_a_csv_as_spreadsheets_write_it(tmp_path, newline):
    lines = ["path,label", '"a, ""b"".png",dog', "", "ü.png,cät", ",", ""]

    source = open_source(_csv(tmp_path, b"\xef\xbb\xbf" + newline.join(lines).encode()))

    assert source.class_names == ("cät", "dog")
    assert [(Path(reference.path).name, reference.line) for reference in source.references] == [
        ('a, "b".png', 2),
        ("ü.png", 4),
    ]


def test_open_source_takes_the_class_order_beside_a_csv(tmp_path):
    (tmp_path / "labels.txt").write_text("dog\ncat\n")

    assert open_source(_csv(tmp_path, "a.png,cat\nb.png,dog\n")).class_names == ("dog", "cat")


@pytest.mark.parametrize("text", ["", "\n\n", "path,label\n"])
def test_open_source_explains_an_empty_csv(tmp_path, text):
    path = _csv(tmp_path, text)

    assert _error(path) == f"Expected rows of path,label in {path}. Received: none."


def test_open_source_explains_a_csv_of_one_class(tmp_path):
    path = _csv(tmp_path, "a.png,cat\nb.png,cat\n")

    assert _error(path).startswith(f"Expected at least two classes in {path}. Received: ['cat'].")


def test_open_source_names_the_line_with_too_many_columns(tmp_path):
    path = _csv(tmp_path, "path,label\na.png,cat\nb, c.png,dog\n")

    assert _error(path) == (
        f"Expected 2 columns (path,label) in {path}, line 3. Received: 3: 'b, c.png,dog'. Quote a name that has a comma in it."
    )


def test_open_source_names_the_line_with_a_wrong_split(tmp_path):
    path = _csv(tmp_path, "path,label,split\na.png,cat,train\nb.png,dog,validation\n")

    assert _error(path) == (
        f"Expected the split in {path}, line 3, to be empty or one of train, valid, test. Received: 'validation'. "
        "Correct it, or leave the column out to have the images split by their content."
    )


@pytest.mark.parametrize(
    ("first", "remedy"),
    [
        ("a.png", ""),
        ("a.png,cat,train,left", ""),
        ("a.png;cat", " Save it with commas between the columns."),
        ("a.png\tcat", " Save it with commas between the columns."),
        ("filename,class", " Rename the columns of its header."),
        ("Image,Category", " Rename the columns of its header."),
    ],
)
def test_open_source_explains_columns_without_names(tmp_path, first, remedy):
    path = _csv(tmp_path, f"{first}\n")

    assert _error(path) == (
        f"Expected {path} to begin with a header that names `path` and `label`, or to have the columns "
        f"path,label[,split]. Received: {first!r}.{remedy}"
    )


@pytest.mark.parametrize(
    "header", ["path,label,height", "path,label,site,site", "path,label,path", ",path,label", "path,label,a=b"]
)
def test_open_source_explains_columns_whose_names_clash(tmp_path, header):
    path = _csv(tmp_path, f"{header}\na.png,cat,1,2\n")

    assert _error(path) == (
        f"Expected the columns of {path} to have names of their own. Received: {header}. "
        "Rename what is empty, repeats, has a `=` or is one of image, label, filename, height, width, aspect, brightness, "
        "channels, brightness_group, size_group."
    )


def test_open_source_explains_a_csv_that_is_not_utf8(tmp_path):
    path = _csv(tmp_path, "ü.png,cat\n".encode("latin-1"))

    message = _error(path)
    assert message.startswith(f"Expected {path} to be a CSV in UTF-8. Received: 'utf-8' codec can't decode byte 0xfc")
    assert message.endswith("Save it as UTF-8.")


def test_open_source_names_the_line_of_a_broken_quote(tmp_path):
    path = _csv(tmp_path, 'a.png,cat\n"b"c.png,dog\n')

    message = _error(path)
    assert message.startswith(f"Expected {path} to be a CSV. Received: ")
    assert message.endswith(" in line 2.")


def test_open_source_lists_the_installed_elpv_data_set():
    source = open_source("elpv")

    labels = [reference.label for reference in source.references]
    assert source.class_names == ELPV_CLASS_NAMES == ("functional", "defective")
    assert source.columns == ("cell_type",)
    # As published: 1,508 + 295 cells of probability 0 and 1/3, 106 + 715 of 2/3 and 1; 1,074 mono, 1,550 poly.
    assert (labels.count("functional"), labels.count("defective")) == (1803, 821)
    types = [reference.columns[0] for reference in source.references]
    assert (types.count("mono"), types.count("poly")) == (1074, 1550)
    assert all(Path(reference.path).is_file() for reference in source.references)


def test_elpv_csv_fixture_is_a_source_of_real_images(elpv_csv):
    source = open_source(str(elpv_csv))

    assert source.class_names == ("defective", "functional")
    assert source.columns == ("cell_type",)
    assert len(source.references) == 40
    assert {reference.columns[0] for reference in source.references} == {"mono", "poly"}


def test_is_prepared_wants_records_with_their_class_list_and_schema(tmp_path):
    assert not is_prepared(str(tmp_path / "nowhere"))
    _touch(tmp_path, "labels.txt")
    assert not is_prepared(str(tmp_path))
    _touch(tmp_path, "train-00000-of-00001.tfrecord.gz")
    assert not is_prepared(str(tmp_path))
    _touch(tmp_path, "schema/schema.pbtxt")
    assert not is_prepared(str(tmp_path))
    _touch(tmp_path, "report.json")
    assert is_prepared(str(tmp_path))
    (tmp_path / "labels.txt").unlink()
    assert not is_prepared(str(tmp_path))


def test_read_lines_leaves_out_empty_lines_and_surrounding_blanks(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("b\r\n\n  a b \nü".encode())

    assert read_lines(str(path)) == ("b", "a b", "ü")


@pytest.mark.parametrize("name", [" cat", "a\nb"])
def test_open_source_refuses_class_names_that_a_line_cannot_hold(tmp_path, name):
    path = _csv(tmp_path, f'a.png,dog\nb.png,"{name}"\n')

    if name == " cat":  # spaces around a cell are not part of it
        assert open_source(str(path)).class_names == ("cat", "dog")
    else:
        assert f"Received: {name!r}. Rename it" in _error(path)


def test_open_source_refuses_a_class_that_is_listed_twice(tmp_path):
    _touch(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "labels.txt").write_text("dog\ncat\ndog\n")

    assert "Received: 'dog'. Rename it" in _error(tmp_path)


def test_open_source_explains_a_header_without_path(tmp_path):
    path = _csv(tmp_path, "filename,label\na.png,cat\n")

    assert _error(path).startswith(f"Expected {path} to begin with a header that names `path` and `label`")


def test_open_source_makes_no_class_of_an_empty_label(tmp_path):
    """The image is quarantined, with its line."""
    source = open_source(_csv(tmp_path, "a.png,dog\nb.png,\nc.png,cat\n"))

    assert source.class_names == ("cat", "dog")
    assert [reference.label for reference in source.references] == ["dog", "", "cat"]
