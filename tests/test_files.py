"""Readers: what they take, and that each kind of wrong file gives one line that says where. Writers: all or nothing."""

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

polars = pytest.importorskip("polars", reason="the file readers need polars")
Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
pytest.importorskip("scipy", reason="Matrix Market files need scipy")

from lowrank_kernels import files, pictures, tables  # noqa: E402

DATA = Path(os.environ.get("LOWRANK_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not at {DATA}; set LOWRANK_DATA")


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *words):
    """The call is refused with one line that holds all the words."""
    with pytest.raises(files.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------------- triplets


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "userId,movieId,rating,timestamp\n1,10,4.5,0\n2,11,3,1\n"),
        ("moved.csv", "rating,timestamp,movie_id,User ID\n4.5,0,10,1\n3,1,11,2\n"),
        ("crlf.csv", "user,item,score\r\n1,10,4.5\r\n2,11,3\r\n"),
        ("bom.csv", b"\xef\xbb\xbfuser,item,score\n1,10,4.5\n2,11,3\n"),
        ("blank.csv", "\nuser,item,score\n\n1,10,4.5\n \n2,11,3\n\n"),
        ("spaces.csv", "user, item, score\n1, 10, 4.5\n2, 11, 3\n"),
        ("quoted.csv", '"user","item","score"\n"1","10","4.5"\n"2","11","3"'),
        ("a.tsv", "i\tj\tvalue\n1\t10\t4.5\n2\t11\t3\n"),
        ("semicolon.csv", "row;col;y\n1;10;4.5\n2;11;3\n"),
        ("u.data", "1\t10\t4.5\t881250949\n2\t11\t3\t891717742"),
        ("position.csv", "who,what,how much\n1,10,4.5\n2,11,3\n"),
        ("floats.csv", "user,item,score\n1.0,10.0,4.5\n2.0,11.0,3\n"),
    ],
)
def test_triplets_are_read(tmp_path, name, content):
    t = tables.read_triplets(put(tmp_path, name, content))
    assert (t.row.tolist(), t.col.tolist(), t.values.tolist()) == ([1, 2], [10, 11], [4.5, 3.0])
    assert t.row.dtype == t.col.dtype == np.int64
    assert t.values.dtype == np.float64


def test_text_labels_stay_text(tmp_path):
    t = tables.read_triplets(put(tmp_path, "a.csv", 'user,item,rating\n007,"Alien, 1979",5\nann,Heat,3\n'))
    assert t.row.tolist() == ["007", "ann"]
    assert t.col.tolist() == ["Alien, 1979", "Heat"]
    assert t.row.dtype.kind == "U"


def test_columns_by_name_and_number(tmp_path):
    path = put(tmp_path, "a.csv", "a,b,c,d\nx,1,2,3\ny,4,5,6\n")
    t = tables.read_triplets(path, row="d", col="a", value="b")
    assert (t.row.tolist(), t.col.tolist(), t.values.tolist()) == ([3, 6], ["x", "y"], [1, 4])
    t = tables.read_triplets(put(tmp_path, "b.csv", "9,1,2\n8,4,5\n"), row="2", col="3", value="1")
    assert (t.row.tolist(), t.col.tolist(), t.values.tolist()) == ([1, 4], [2, 5], [9, 8])


def test_parquet(tmp_path):
    frame = polars.DataFrame({"movieId": [10, 11], "userId": ["a", "b"], "rating": [4.5, 3.0]})
    frame.write_parquet(tmp_path / "a.parquet")
    t = tables.read_triplets(tmp_path / "a.parquet")
    assert (t.row.tolist(), t.col.tolist(), t.values.tolist()) == (["a", "b"], [10, 11], [4.5, 3.0])
    refused(lambda: tables.read_triplets(tmp_path / "a.parquet", value="stars"), "'stars'", "movieId, userId, rating")
    frame.with_columns(rating=polars.Series([1.0, float("nan")])).write_parquet(tmp_path / "b.parquet")
    refused(lambda: tables.read_triplets(tmp_path / "b.parquet"), "row 2", "'rating'", "nan")
    frame.with_columns(rating=polars.Series([None, 1.0])).write_parquet(tmp_path / "c.parquet")
    refused(lambda: tables.read_triplets(tmp_path / "c.parquet"), "row 1", "'rating'", "null")
    frame.with_columns(rating=polars.Series(["x", "y"])).write_parquet(tmp_path / "d.parquet")
    refused(lambda: tables.read_triplets(tmp_path / "d.parquet"), "'rating'", "numbers were wanted")
    whole = (tmp_path / "a.parquet").read_bytes()
    refused(lambda: tables.read_triplets(put(tmp_path, "cut.parquet", whole[:-20])), "cut.parquet", "not readable as Parquet")
    refused(lambda: tables.read_triplets(put(tmp_path, "fake.parquet", "user,item,rating\n1,2,3\n")), "not readable as Parquet")


HEAD = "userId,movieId,rating\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["the file is empty"]),
        ("\n \n", ["the file is empty"]),
        (HEAD, ["no data below"]),
        (HEAD + "1,2,3\n1,3,good\n1,4,bad\n", ["line 3", "'rating'", "finite number", "'good'", "2 such lines"]),
        (HEAD + "1,2,3\n\n1,3,good\n", ["line 4", "'rating'"]),
        (HEAD + '"1\n",2,3\n1,3,good\n', ["line 4", "'rating'"]),
        (HEAD + "1,2,3\n1,3,\n", ["line 3", "'rating'", "an empty cell"]),
        (HEAD + "1,2,nan\n", ["line 2", "'rating'", "'nan'"]),
        (HEAD + "1,2,1\n1,3,-inf\n", ["line 3", "'rating'", "'-inf'"]),
        (HEAD.replace(",", ";") + "1;2;3,5\n", ["line 2", "'3,5'", "decimals with a point"]),
        (HEAD + "1,2,3\n,3,4\n", ["line 3", "'userId'", "a label", "an empty cell"]),
        (HEAD + "1,2,3\n1,3\n", ["line 3", "3 columns", "got 2", "cut off"]),
        (HEAD + "1,2,3\n1,3\n1,4,5\n", ["line 3", "3 columns", "got 2"]),
        (HEAD + "1,2,3\n1,3,4,5\n", ["line 3", "3 columns", "got 4"]),
        (HEAD + "1,2,3\n12", ["line 3", "got 1", "cut off"]),
        (HEAD + '1,2,3\n1,"3,4\n', ["a.csv"]),
        (HEAD + "1,2,3\n1,3,4\n1,2,5\n", ["line 4", "(1, 2) is there twice", "line 2", "--duplicates"]),
        ("user,item\n1,2\n", ["3 columns are needed", "user, item"]),
        ("who,what,why\n1,2,because\n", ["'why' holds text", "who, what, why", "--value"]),
        ("user,user,rating\n1,2,3\n", ["'user' is there twice"]),
        ("1::10::4::978300760\n", ["'::'", "sed"]),
        (HEAD.encode() + b"1,caf\xe9,3\n", ["line 2", "UTF-8", "0xe9", "iconv"]),
        (HEAD.encode("utf-16"), ["UTF-16", "UTF-8"]),
        (HEAD.encode() + b"1,2,3\n\x00\x01\x02", ["line 3", "binary"]),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), ["PNG"]),
        (b"\x1f\x8b\x08" + bytes(50), ["gzip"]),
        (b"PK\x03\x04" + bytes(50), ["zip"]),
    ],
    ids=lambda x: None if isinstance(x, (str, bytes)) else x[0].replace(" ", "-"),
)
def test_wrong_triplets_are_refused(tmp_path, content, words):
    path = put(tmp_path, "a.csv", content)
    message = refused(lambda: tables.read_triplets(path), *words)
    assert message.startswith(str(path))


def test_wrong_paths_and_names_are_refused(tmp_path):
    refused(lambda: tables.read_triplets(tmp_path / "none.csv"), "no such file")
    refused(lambda: tables.read_triplets(tmp_path), "this is a folder")
    path = put(tmp_path, "a.csv", HEAD + "1,2,3\n")
    refused(lambda: tables.read_triplets(path, row="user"), "no column 'user'", "--row", "userId, movieId, rating")
    refused(lambda: tables.read_triplets(path, row="userId", col="userId"), "asked for twice")


def test_duplicates(tmp_path):
    path = put(tmp_path, "a.csv", HEAD + "2,9,1\n1,2,3\n1,3,4\n1,2,5\n")
    for policy, value in (("mean", 4.0), ("last", 5.0)):
        t = tables.read_triplets(path, duplicates=policy)
        entries = dict(zip(zip(t.row.tolist(), t.col.tolist(), strict=True), t.values.tolist(), strict=True))
        assert entries == {(2, 9): 1, (1, 2): value, (1, 3): 4}
        assert t.merged == 1


def test_pairs(tmp_path):
    row, col = tables.read_pairs(put(tmp_path, "p.csv", "user,item\n1,a\n2,b\n"))
    assert (row.tolist(), col.tolist()) == ([1, 2], ["a", "b"])
    refused(lambda: tables.read_pairs(put(tmp_path, "q.csv", "user\n1\n")), "2 columns are needed")


@needs_data
def test_movielens():
    t = tables.read_triplets(DATA / "ml-latest-small" / "ratings.csv")
    assert t.names == ("userId", "movieId", "rating")
    assert len(t.values) == 100_004
    assert (len(np.unique(t.row)), len(np.unique(t.col))) == (671, 9066)
    assert (t.values.min(), t.values.max()) == (0.5, 5.0)


# ---------------------------------------------------------------------- dense


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("a,b,c\n1,,3\n4,NA,-200\n", ["a", "b", "c"]),
        ("1,,3\n4,NaN,-200\n", None),
        ("a;b;c\r\n1;?;3\r\n\r\n4;N/A;-200.0\r\n", ["a", "b", "c"]),
    ],
)
def test_dense_is_read(tmp_path, content, columns):
    dense = tables.read_dense(put(tmp_path, "a.csv", content), missing_value=-200)
    np.testing.assert_array_equal(dense.values, [[1, np.nan, 3], [4, np.nan, np.nan]])
    assert dense.columns == columns


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("station,2001,2002,2003\nA,1.5,,3\nB,2,4,5\n", True),  # years
        (",10,20,37\nann,5,,3.5\n", True),  # a pivot with row names
        ("userId,10,20,37\n1,5,,3\n2,,4,4\n", True),  # a pivot of whole numbers
        ("A,1,2,3\nB,4,5,6\n", False),
        ("A,3,2,1\nB,4.5,5,6\n", False),  # not ascending
        ("A,1.5,2,3\nB,4,5,6\n", False),
        ("1,2,3,4\n5,6,7.5,8\n", False),
    ],
)
def test_a_first_line_of_whole_numbers(tmp_path, text, header):
    (tmp_path / "a.csv").write_text(text)
    dense = tables.read_dense(tmp_path / "a.csv")
    assert (dense.columns is not None) == header
    if not text.startswith(","):
        for given in (True, False):
            assert (tables.read_dense(tmp_path / "a.csv", header=given).columns is not None) == given


def test_labels_of_a_table_without_a_header_are_written_back(tmp_path):
    (tmp_path / "a.csv").write_text("A,1.5,,3\nB,2,4,5\n")
    dense = tables.read_dense(tmp_path / "a.csv")
    assert dense.labels == {"column 1": ["A", "B"]}
    files.write_dense(tmp_path / "b.csv", dense)
    assert (tmp_path / "b.csv").read_text() == "A,1.5,,3.0\nB,2.0,4.0,5.0\n"


def test_line_ends_of_old_macs(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\r1,2\r3,4\r")
    assert tables.read_dense(tmp_path / "a.csv").values.tolist() == [[1, 2], [3, 4]]


def test_a_placeholder_in_float32(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-99.9, 1, 2], [3, 4, -99.9]], np.float32))
    assert np.isnan(tables.read_dense(tmp_path / "a.npy", missing_value=-99.9).values).sum() == 2


def test_first_line_that_counts_is_a_header(tmp_path):
    assert tables.read_dense(put(tmp_path, "a.csv", "0,1,2,3,4\n1,2,3,4,5.5\n")).columns == list("01234")
    assert tables.read_triplets(put(tmp_path, "b.csv", "1,2,3\n2,3,4\n")).values.tolist() == [3, 4]


def test_dense_labels(tmp_path):
    dense = tables.read_dense(put(tmp_path, "a.csv", "day,hour,x,y\nmon,1h,1,\ntue,2h,,4\n"))
    assert dense.labels == {"day": ["mon", "tue"], "hour": ["1h", "2h"]}
    assert dense.columns == ["x", "y"]
    dense = tables.read_dense(put(tmp_path, "b.csv", ",x,y\n0,1,\n1,,4\n"))
    assert dense.labels == {"column 1": ["0", "1"]}
    np.testing.assert_array_equal(dense.values, [[1, np.nan], [np.nan, 4]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["the file is empty"]),
        ("a,b\n", ["no data below"]),
        ("a,b\n1,2\n3,x\n", ["line 3", "'b'", "'x'"]),
        ("a,b\n1,2\n3,inf\n", ["line 3", "'b'", "'inf'"]),
        ("a,b\n1,2\n3\n", ["line 3", "2 columns", "got 1", "cut off"]),
        ("a,b\nNA,\n,\n", ["every cell is missing"]),
        ("a,b\nx,y\n", ["no column of numbers", "a, b"]),
        ("1,2\n3,\xe9\n".encode("latin-1"), ["line 2", "UTF-8"]),
    ],
)
def test_wrong_dense_is_refused(tmp_path, content, words):
    path = put(tmp_path, "a.csv", content)
    refused(lambda: tables.read_dense(path), str(path), *words)


def test_npy(tmp_path):
    matrix = np.array([[1.0, np.nan], [3.0, 4.0]], dtype=np.float32)
    np.save(tmp_path / "a.npy", matrix)
    np.testing.assert_array_equal(tables.read_dense(tmp_path / "a.npy").values, matrix)
    np.save(tmp_path / "o.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    refused(lambda: tables.read_dense(tmp_path / "o.npy"), "not readable as a NumPy array")
    np.save(tmp_path / "v.npy", np.ones(3))
    refused(lambda: tables.read_dense(tmp_path / "v.npy"), "2 dimensions", "(3,)")
    np.save(tmp_path / "c.npy", np.ones((2, 2), dtype=complex))
    refused(lambda: tables.read_dense(tmp_path / "c.npy"), "complex128")
    np.save(tmp_path / "i.npy", np.array([[1, np.inf]]))
    refused(lambda: tables.read_dense(tmp_path / "i.npy"), "row 1, column 2", "inf")
    whole = (tmp_path / "a.npy").read_bytes()
    refused(lambda: tables.read_dense(put(tmp_path, "cut.npy", whole[:-4])), "not readable as a NumPy array")
    refused(lambda: tables.read_dense(put(tmp_path, "text.npy", "1,2\n")), "does not start like one")
    refused(lambda: tables.read_dense(put(tmp_path, "empty.npy", "")), "the file is empty")


@needs_data
def test_air_quality():
    dense = tables.read_dense(DATA / "air-quality" / "AirQuality.csv", missing_value=-200)
    assert dense.values.shape == (9357, 13)
    assert list(dense.labels) == ["Date", "Time"]
    assert 0.1 < np.isnan(dense.values).mean() < 0.2


# ---------------------------------------------------------------------- Matrix Market


def test_matrix_market(tmp_path):
    coo = tables.read_matrix_market(
        put(tmp_path, "a.mtx", "%%MatrixMarket matrix coordinate real general\n% words\n3 4 2\n1 2 5.5\n3 4 0\n")
    )
    assert coo.shape == (3, 4)
    assert (coo.row.tolist(), coo.col.tolist(), coo.data.tolist()) == ([0, 2], [1, 3], [5.5, 0.0])
    coo = tables.read_matrix_market(
        put(tmp_path, "s.mtx", "%%MatrixMarket matrix coordinate integer symmetric\n2 2 2\n1 1 3\n2 1 4\n")
    )
    np.testing.assert_array_equal(coo.todense(), [[3, 4], [4, 0]])
    coo = tables.read_matrix_market(put(tmp_path, "d.mtx", "%%MatrixMarket matrix array real general\n2 2\n1\n0\nnan\n4\n"))
    assert sorted(zip(coo.row.tolist(), coo.col.tolist(), coo.data.tolist(), strict=True)) == [(0, 0, 1), (1, 0, 0), (1, 1, 4)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["the file is empty"]),
        ("1 2 3\n", ["not readable as Matrix Market"]),
        ("%%MatrixMarket matrix coordinate pattern general\n2 2 1\n1 1\n", ["pattern", "nothing to predict"]),
        ("%%MatrixMarket matrix coordinate complex general\n2 2 1\n1 1 1 1\n", ["complex"]),
        ("%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 5\n", ["not readable as Matrix Market"]),
        ("%%MatrixMarket matrix coordinate real general\n2 2 1\n3 1 5\n", ["not readable as Matrix Market"]),
        ("%%MatrixMarket matrix coordinate real general\n2 2 1\n1 1 x\n", ["not readable as Matrix Market", "ine 3"]),
        ("%%MatrixMarket matrix coordinate real general\n2 2 1\n2 1 nan\n", ["row 2, column 1", "nan"]),
        ("%%MatrixMarket matrix coordinate real general\n2 2 0\n", ["no entries"]),
    ],
)
def test_wrong_matrix_market_is_refused(tmp_path, content, words):
    path = put(tmp_path, "a.mtx", content)
    refused(lambda: tables.read_matrix_market(path), str(path), *words)


# ---------------------------------------------------------------------- pictures


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (5, 7), dtype=np.uint8), rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for name, pixels in (("grey.png", grey), ("colour.png", colour)):
        Image.fromarray(pixels).save(tmp_path / name)
        np.testing.assert_array_equal(pictures.read_picture(tmp_path / name), pixels / 255)
    Image.fromarray(grey).convert("P").save(tmp_path / "grey_palette.png")
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "grey_palette.png"), grey / 255)
    Image.fromarray(colour).quantize(4).save(tmp_path / "palette.png")
    assert pictures.read_picture(tmp_path / "palette.png").shape == (5, 7, 3)
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    np.testing.assert_allclose(pictures.read_picture(tmp_path / "deep.png"), grey * 256.0 / 65535)
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "bits.png"), grey > 100)


def test_alpha(tmp_path):
    pixels = np.full((4, 5, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert pictures.read_picture(tmp_path / "opaque.png").shape == (4, 5, 3)
    pixels[1, 2, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    refused(lambda: pictures.read_picture(tmp_path / "a.png"), "1 pixels are transparent", "--alpha-mask", "flatten")
    picture = pictures.read_picture(tmp_path / "a.png", alpha_mask=True)
    assert np.isnan(picture[1, 2]).all()
    assert np.isnan(picture).sum() == 3
    Image.fromarray(pixels[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert np.isnan(pictures.read_picture(tmp_path / "la.png", alpha_mask=True)).sum() == 1
    palette = Image.fromarray(np.array([[0, 1], [1, 1]], dtype=np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    refused(lambda: pictures.read_picture(tmp_path / "p.png"), "transparent")
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "p.png", alpha_mask=True)[0], [[np.nan] * 3, [1, 0, 0]])
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "none.png")
    refused(lambda: pictures.read_picture(tmp_path / "none.png", alpha_mask=True), "every pixel is transparent")


def test_wrong_pictures_are_refused(tmp_path):
    refused(lambda: pictures.read_picture(tmp_path / "none.png"), "no such file")
    refused(lambda: pictures.read_picture(put(tmp_path, "empty.png", "")), "the file is empty")
    refused(lambda: pictures.read_picture(put(tmp_path, "text.png", "hello\n")), "no picture format")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    refused(lambda: pictures.read_picture(put(tmp_path, "cut.png", whole[:1000])), "not readable as a picture")
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    refused(lambda: pictures.read_picture(tmp_path / "a.gif"), "animation of 2 frames")


def test_masks(tmp_path):
    mask = np.random.default_rng(0).random((4, 6)) < 0.5
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(np.where(mask, 250, 3).astype(np.uint8)).convert("RGB").save(tmp_path / "rgb.png")
    np.save(tmp_path / "m.npy", mask)
    for name in ("m.png", "rgb.png", "m.npy"):
        np.testing.assert_array_equal(pictures.read_mask(tmp_path / name, (4, 6)), mask)
    refused(lambda: pictures.read_mask(tmp_path / "m.png", (6, 4)), "6 rows x 4 columns", "got 4 x 6")
    Image.new("L", (6, 4)).save(tmp_path / "black.png")
    refused(lambda: pictures.read_mask(tmp_path / "black.png", (4, 6)), "nothing as observed")
    np.save(tmp_path / "two.npy", np.full((4, 6), 2))
    refused(lambda: pictures.read_mask(tmp_path / "two.npy", (4, 6)), "0 (missing) and 1")


# ---------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", "user,item,rating\n1,2,3\n", "triplets"),
        ("a.csv", "a,b,c\n1,2,3.5\n", "triplets"),
        ("a.csv", "a,b,c\n1.5,2,3\n", "dense"),
        ("a.csv", "a,b,c\n1,,3\n", "dense"),
        ("a.csv", "1,2,3,4,5\n", "dense"),
        ("u.data", "1\t2\t3\t4\n", "triplets"),
        ("a.parquet", "PAR1", "triplets"),
        ("a.npy", "x", "dense"),
        ("a.mtx", "x", "matrix-market"),
        ("a.txt", "%%MatrixMarket matrix array real general\n", "matrix-market"),
        ("a.JPG", "x", "picture"),
    ],
)
def test_kinds_are_guessed(tmp_path, name, content, kind):
    assert tables.guess_kind(put(tmp_path, name, content)) == kind


def test_unknown_kind_is_refused(tmp_path):
    refused(lambda: tables.guess_kind(put(tmp_path, "a.xyz", "1,2\n")), "'.xyz'", "--kind")


# ---------------------------------------------------------------------- writers


def writers():
    values = np.random.default_rng(0).random((300, 300))
    return {
        "a.csv": lambda path, **k: files.write_table(path, {"x": values.ravel()}, **k),
        "a.parquet": lambda path, **k: files.write_table(path, {"x": values.ravel()}, **k),
        "a.npz": lambda path, **k: files.write_arrays(path, {"left": values}, **k),
        "a.npy": lambda path, **k: files.write_dense(path, files.Dense(values), **k),
        "b.csv": lambda path, **k: files.write_dense(path, files.Dense(values), **k),
        "a.png": lambda path, **k: pictures.write_picture(path, values, **k),
    }


@pytest.mark.parametrize("name", sorted(writers()))
def test_writers_never_replace_without_leave(tmp_path, name):
    write, path = writers()[name], tmp_path / name
    write(path)
    first = path.read_bytes()
    path.write_bytes(b"precious")
    with pytest.raises(files.OutputError, match=r"exists already; pass --overwrite"):
        write(path)
    assert path.read_bytes() == b"precious"
    write(path, overwrite=True)
    assert len(path.read_bytes()) == len(first)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", sorted(writers()))
@pytest.mark.parametrize("old", [None, b"precious"], ids=["new", "replace"])
def test_full_disk_leaves_nothing_behind(tmp_path, name, old):
    path = tmp_path / name
    if old is not None:
        path.write_bytes(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writes beyond 20 kB fail, as on a full disk
    try:
        with pytest.raises(files.OutputError, match="could not be written: File too large; nothing was left behind"):
            writers()[name](path, overwrite=old is not None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ([] if old is None else [name])
    assert old is None or path.read_bytes() == old


def test_no_space_when_syncing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.OutputError, match="No space left on device"):
        files.write_atomically(tmp_path / "a", lambda handle: handle.write(b"x"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_interrupted_writer_leaves_nothing_behind(tmp_path, failure):
    def writer(handle):
        handle.write(b"half")
        raise failure

    with pytest.raises(failure):
        files.write_atomically(tmp_path / "a", writer)
    assert os.listdir(tmp_path) == []


def test_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(files.OutputError, match="exists already"):
        files.write_atomically(path, lambda handle: path.write_bytes(b"precious"))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["a"]


def test_without_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    files.write_atomically(tmp_path / "a", lambda handle: handle.write(b"x"))
    with pytest.raises(files.OutputError, match="exists already"):
        files.write_atomically(tmp_path / "a", lambda handle: handle.write(b"y"))
    assert (tmp_path / "a").read_bytes() == b"x"


def test_mode_and_links_are_kept(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write_atomically(link, lambda handle: handle.write(b"new"), overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_outputs_are_checked_early(tmp_path):
    with pytest.raises(files.OutputError, match="mkdir -p"):
        files.check_output(tmp_path / "no" / "a.csv")
    with pytest.raises(files.OutputError, match="not a regular file"):
        files.check_output(tmp_path, overwrite=True)
    with pytest.raises(files.InputError, match=r"can be written as \.png, got extension '\.jpg'"):
        files.check_output(tmp_path / "a.jpg", suffixes=(".png",))


def test_written_files_read_back(tmp_path):
    dense = files.Dense(np.array([[1.5, np.nan], [0.1, 4.0]]), ["x", "y"], {"day": ["mon", "tue"]})
    files.write_dense(tmp_path / "a.csv", dense)
    again = tables.read_dense(tmp_path / "a.csv")
    np.testing.assert_array_equal(again.values, dense.values)
    assert (again.columns, again.labels) == (dense.columns, dense.labels)
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3)) / 255
    pictures.write_picture(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.png"), picture)
    files.write_arrays(tmp_path / "a.npz", {"labels": np.array(["a", "b"], dtype=object), "left": np.ones(2)})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == ["a", "b"]


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(files.MissingExtra, match=r"reading CSV needs polars: pip install lowrank-kernels\[all\]"):
        tables.read_triplets(put(tmp_path, "a.csv", HEAD + "1,2,3\n"))
