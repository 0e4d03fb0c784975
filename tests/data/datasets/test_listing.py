import os
from pathlib import Path

import pytest

from dinov2.data.datasets.listing import ListFile
from dinov2.errors import DataError
from tests.data.datasets.trees import write_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(["a.png", "my photo.png", "sub/c.png"]):
        write_image(tmp_path / "images" / name, colour=number)
    return tmp_path


def made(folder: Path, name: str, text: str) -> ListFile:
    (folder / name).write_text(text, encoding="utf-8")
    return ListFile(folder / name)


def test_a_text_list_gives_paths_relative_to_itself_in_its_order(images: Path) -> None:
    listing = made(images, "all.txt", "images/sub/c.png\n\nimages/my photo.png\nimages/a.png\n")
    assert [listing[i][0].getpixel((0, 0))[0] for i in range(3)] == [2, 1, 0]
    assert listing.class_names is None
    assert listing.get_targets() is None


def test_absolute_paths_are_taken_as_they_are(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert len(made(tmp_path / "elsewhere", "l.txt", f"{images / 'images' / 'a.png'}\n")) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "images/a.png 4\nimages/my photo.png 0\nimages/sub/c.png 4\n"),
        ("l.txt", "images/a.png\t4\nimages/my photo.png\t0\nimages/sub/c.png\t4\n"),
        ("l.csv", "path,label\nimages/a.png,4\nimages/my photo.png,0\nimages/sub/c.png,4\n"),
        ("l.csv", "id,label,path\n7,4,images/a.png\n8,0,images/my photo.png\n9,4,images/sub/c.png\n"),
        ("l.csv", 'images/a.png,4\n"images/my photo.png",0\nimages/sub/c.png,4\n'),
        ("l.csv", "\ufeffpath,label\r\nimages/a.png,4\r\nimages/my photo.png,0\r\nimages/sub/c.png,4\r\n"),
    ],
)
def test_class_numbers_are_kept_as_they_are(images: Path, name: str, text: str) -> None:
    listing = made(images, name, text)
    targets = listing.get_targets()
    assert targets is not None
    assert targets.tolist() == [4, 0, 4]
    assert listing.class_names == ["0", "1", "2", "3", "4"]
    assert os.path.basename(listing.path_of(1)) == "my photo.png"


def test_class_names_are_numbered_in_sorted_order(images: Path) -> None:
    listing = made(images, "l.csv", "path,label\nimages/a.png,zebra\nimages/my photo.png,ant\nimages/sub/c.png,zebra\n")
    assert listing.class_names == ["ant", "zebra"]
    assert [listing.get_target(i) for i in range(3)] == [1, 0, 1]


def test_a_csv_without_labels_has_none(images: Path) -> None:
    assert made(images, "l.csv", "path\nimages/a.png\n").get_targets() is None


TABLES = {
    "its own header": "path,label\nimages/a.png,10\nimages/my photo.png,2\nimages/sub/c.png,10\n",
    "another header": "filename,class\nimages/a.png,10\nimages/my photo.png,2\nimages/sub/c.png,10\n",
    "a header of unknown words": "Bild,Art\nimages/a.png,10\nimages/my photo.png,2\nimages/sub/c.png,10\n",
    "an index": ",image,width,target\n0,images/a.png,8,10\n1,images/my photo.png,8,2\n2,images/sub/c.png,8,10\n",
    "the label first": "10,images/a.png\n2,images/my photo.png\n10,images/sub/c.png\n",
    "tabs": "images/a.png\t10\nimages/my photo.png\t2\nimages/sub/c.png\t10\n",
    "tabs and a header": "image\tlabel\nimages/a.png\t10\nimages/my photo.png\t2\nimages/sub/c.png\t10\n",
    "semicolons": "Datei;Klasse\nimages/a.png;10\nimages/my photo.png;2\nimages/sub/c.png;10\n",
    "Excel's first line": "sep=;\nimages/a.png;10\nimages/my photo.png;2\nimages/sub/c.png;10\n",
    "quotes": '"path", "label"\n"images/a.png", "10"\n"images/my photo.png", "2"\n"images/sub/c.png", "10"\n',
    "floats, as pandas writes them": "path,label\nimages/a.png,10.0\nimages/my photo.png,2.0\nimages/sub/c.png,10.0\n",
    "empty columns": "path,label,\n\nimages/a.png,10,\nimages/my photo.png,2,\n,,\nimages/sub/c.png,10,\n",
    "comments": "# of mine\nimages/a.png,10\n#images/x.png,3\nimages/my photo.png,2\n# end\nimages/sub/c.png,10\n",
    "old line ends": "path,label\rimages/a.png,10\rimages/my photo.png,2\rimages/sub/c.png,10\r",
    "paths of Windows": "path,label\nimages\\a.png,10\nimages\\my photo.png,2\nimages\\sub\\c.png,10\n",
    "several times the same": "path,label\nimages/a.png,10\nimages/my photo.png,2\nimages/a.png,10\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [".csv", ".txt", ".tsv"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_read_by_what_stands_in_it(images: Path, table: str, ending: str, encoding: str) -> None:
    (images / f"l{ending}").write_bytes(TABLES[table].encode(encoding))
    listing = ListFile(images / f"l{ending}")
    targets = listing.get_targets()
    assert targets is not None and targets.tolist() == [10, 2, 10]
    assert listing.class_names == [str(number) for number in range(11)]
    assert [os.path.basename(listing.path_of(i)) for i in range(2)] == ["a.png", "my photo.png"]
    assert all(os.path.isfile(listing.path_of(i)) for i in range(3))


@pytest.mark.parametrize(
    ("text", "paths", "classes"),
    [
        ("images/a.png golden retriever\nimages/sub/c.png ox\n", ["a.png", "c.png"], ["golden retriever", "ox"]),
        ('"images/my photo.png" 1\n"images/a.png" 0\n', ["my photo.png", "a.png"], ["0", "1"]),
        ("images/#1.png\n#2.png\n# 3.png\n", ["#1.png", "#2.png"], None),
        ("images/a.png\nimages/b, c.png\n", ["a.png", "b, c.png"], None),
        ("images/b, c.png\nimages/a.png\n", ["b, c.png", "a.png"], None),
        ("images/gone, c.png\nimages/a.png\n", ["gone, c.png", "a.png"], None),
        ("images/b, c.png 1\nimages/a.png 0\n", ["b, c.png", "a.png"], ["0", "1"]),
    ],
)
def test_a_line_of_text_is_a_path_and_perhaps_a_label(images, text, paths, classes) -> None:
    for name in ("images/#1.png", "#2.png", "images/b, c.png"):
        write_image(images / name)
    listing = made(images, "l.txt", text)
    assert [os.path.basename(listing.path_of(i)) for i in range(len(listing))] == paths
    assert listing.class_names == classes


def test_names_in_other_encodings_and_escaped_names_are_found(images: Path) -> None:
    write_image(images / "images" / "käse.png")
    (images / "l.csv").write_bytes("images\\käse.png,1\nimages\\a.png,0\n".encode("cp1252"))
    assert [os.path.isfile(ListFile(images / "l.csv").path_of(i)) for i in range(2)] == [True, True]
    try:
        write_image(images / "images" / "k\udce4se.png")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    listing = made(images, "e.txt", "images/a.png\nimages/k\\udce4se.png\n")
    assert listing[1][0].size == (8, 6)
    listing = made(images, "e.txt", "images/a.png\nimages/k\\ud800se.png\n")
    with pytest.raises(DataError, match="cannot be read"):
        listing[1]


def test_what_is_no_regular_file_is_refused_before_it_is_opened(images: Path) -> None:
    os.mkfifo(images / "l.txt")
    for path in (images / "l.txt", "/dev/zero", images):
        with pytest.raises(DataError, match="is no regular file"):
            ListFile(path)


def test_a_huge_list_is_refused_before_it_is_read(images: Path) -> None:
    for start, message in (b"images/a.png\n" * 10_000, "more than 1 GiB"), (b"", "no text"):
        with open(images / "l.txt", "wb") as file:
            file.write(start)
            file.truncate(1 << 41)  # sparse
        with pytest.raises(DataError, match=message):
            ListFile(images / "l.txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "names no image"),
        ("l.csv", "path,label\n", "names no image"),
        ("l.txt", "images/a.png 1\nimages/sub/c.png\n", "1 of the 2 images in .* have no label .*number 2"),
        ("l.txt", "images/gone.png\n", "files that do not exist, such as .*gone.png"),
        ("l.csv", "a,b,c\n", "3 columns and no header"),
        ("l.csv", "label,path\n4\n", "has no path"),
        ("l.txt", "images/a.png 99999999999\n", "no class number"),
        ("l.csv", "a" * 200_000 + "\n", "l.csv is no table of paths"),
        ("l.csv", "path,label\nimages/a.png,0\nimages/sub/c.png,nan\n", "1 of the 2 images in .* have no label"),
        ("l.csv", "path,label\nimages/a.png,0\nimages/sub/c.png,-1\n", "the label -1 .* is no class number"),
        ("l.csv", "path,label\nimages/a.png,0.5\nimages/sub/c.png,0\n", r"the label 0\.5 .* is no class number"),
        ("l.csv", "path,label\nimages/a.png,1e400\nimages/sub/c.png,inf\n", "is no class number"),
        ("l.csv", "path,label\nimages/a.png,1\nimages/sub/c.png,cat\n", r"are numbers \(1\) and names \(cat\)"),
        ("l.csv", "images/a.png,1\nimages/a.png,2\n", "with the labels 1 and 2"),
        ("l.csv", "images/a.png,images/sub/c.png\n", "image files in 2 columns"),
        ("l.csv", "file,class,target\nimages/a.png,1,2\n", "3 columns and no header"),
        ("l.csv", "file,width,height\nimages/a.png,1,2\n", "3 columns and no header"),
        ("l.csv", "images/a.png,1\nimages/my, photo.png,2\n", "has 3 columns, the first has 2; quote paths"),
        ("l.csv", "images/a.png;images/b.png,images/sub/c.png\n", "could be separated by ';' or by ','"),
        ("l.csv", "filename,class\n", "names no image"),
        ("l.txt", "# only a comment\n", "names no image"),
        ("l.csv", "JFIF\0\1", "l.csv is no text; give a list"),
        ("l.txt", "JFIF\0\1", "l.txt is no text; give a list"),
    ],
)
def test_a_list_that_makes_no_sense_says_why(images: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(images, name, text)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        ListFile(tmp_path / "gone.txt")


def test_one_missing_image_is_left_to_the_reading(images: Path) -> None:
    listing = made(images, "l.txt", "images/gone.png\nimages/a.png\n")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        listing[0]
    assert listing[1][0].size == (8, 6)


def test_the_fingerprint_follows_order_labels_and_sizes(images: Path) -> None:
    texts = ["images/a.png\nimages/sub/c.png\n", "images/sub/c.png\nimages/a.png\n"]
    texts += ["images/a.png 0\nimages/sub/c.png 1\n", "images/a.png 1\nimages/sub/c.png 0\n"]
    prints = [made(images, "l.txt", text).fingerprint() for text in texts]
    write_image(images / "images" / "a.png", size=(60, 60), colour=3)
    prints.append(made(images, "l.txt", texts[0]).fingerprint())
    assert len(set(prints)) == 5
    assert made(images, "again.txt", texts[0]).fingerprint() == prints[-1]
