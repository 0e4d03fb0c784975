import pytest
from PIL import Image

from dinov2.encode.image_inputs import Frame, find_frames, open_frame
from dinov2.errors import DataError


def picture(path, colour=(200, 10, 10), size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def moving(path, n=3):
    frames = [Image.new("RGB", (6, 4), (80 * i, 0, 0)) for i in range(n)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def test_a_folder_gives_its_images_in_the_order_people_count(tmp_path):
    for name in ("frame_10.png", "frame_9.png", "b/2.jpg", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    names = [frame.path.relative_to(tmp_path).as_posix() for frame in find_frames([tmp_path])]
    assert names == ["b/2.jpg", "frame_9.png", "frame_10.png"]


def test_files_keep_the_order_they_were_given_in(tmp_path):
    paths = [picture(tmp_path / name) for name in ("z.png", "a.png")]
    assert find_frames([str(path) for path in paths]) == [Frame(path) for path in paths]


def test_a_pattern_gives_what_matches_unless_a_file_has_that_name(tmp_path):
    for name in ("a_10.png", "a_9.png", "b.png", "c[1].png"):
        picture(tmp_path / name)
    assert [frame.name for frame in find_frames([tmp_path / "a_*.png"])] == ["a_9.png", "a_10.png"]
    assert [frame.name for frame in find_frames([tmp_path / "c[1].png"])] == ["c[1].png"]


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp"])
def test_a_file_of_several_frames_gives_each(tmp_path, suffix):
    path = moving(tmp_path / f"clip{suffix}")
    frames = find_frames([path])
    assert [frame.name for frame in frames] == [f"clip{suffix} {i}" for i in range(3)]
    reds = [open_frame(frame).getpixel((0, 0))[0] for frame in frames]
    assert reds == pytest.approx([0, 80, 160], abs=4)
    assert open_frame(frames[1]).mode == "RGB"


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / "turned.jpg", exif=exif)
    assert open_frame(Frame(path)).size == (4, 6)


def test_frames_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "tif"):
        pages = [Image.new("RGB", (6, 4), (80 * i, 0, 0)) for i in range(2)]
        pages[0].save(tmp_path / f"clip.{suffix}", save_all=True, append_images=pages[1:], exif=exif)
        sizes = {open_frame(frame).size for frame in find_frames([tmp_path / f"clip.{suffix}"])}
        assert sizes == {(4, 6)}


def test_what_is_no_image_is_said_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.gif").write_bytes(b"GIF89a no")
    with pytest.raises(DataError, match="no image was named"):
        find_frames([])
    with pytest.raises(DataError, match="nowhere.png; check the path"):
        find_frames([tmp_path / "nowhere.png"])
    with pytest.raises(DataError, match="no image was found in .*empty"):
        find_frames([tmp_path / "empty"])
    with pytest.raises(DataError, match="torn.gif cannot be read as an image"):
        open_frame(find_frames([tmp_path / "torn.gif"])[0])
    with pytest.raises(DataError, match=r"frame 7 of .*clip.gif cannot be read"):
        open_frame(Frame(moving(tmp_path / "clip.gif"), 7))
