"""Readers: every shape of file gives the rows that stand in it, or an error that says where."""

import codecs
import gzip
import json
import pathlib

import pytest

from conet_jax.data import formats, readers
from conet_jax.data.ncf import Given
from conet_jax.errors import InputError

USERS = ["A39HTATAQ9V7YF", "A3JM6GV9MNOF9X", "A1Z513UWSAAO0F"]
ITEMS = ["0205616461", "B00007M0CP", "000558925X"]
RATINGS = [5.0, 3.0, 1.0]
TIMES = [1369699200.0, 1355443200.0, 1404691200.0]
ROWS_2014 = [
    f"{u},{i},{r},{int(t)}" for u, i, r, t in zip(USERS, ITEMS, RATINGS, TIMES, strict=True)
]
ROWS_2018 = [
    f"{i},{u},{r},{int(t)}" for u, i, r, t in zip(USERS, ITEMS, RATINGS, TIMES, strict=True)
]


def columns(rows: readers.DomainRows) -> dict:
    frame = rows.frame.collect()
    assert len(frame) == rows.rows
    return {name: frame[name].to_list() for name in frame.columns}


FULL = {"user": USERS, "item": ITEMS, "rating": RATINGS, "timestamp": TIMES}


def write(folder: pathlib.Path, text: str | bytes, name: str = "file") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_end", [False, True])
@pytest.mark.parametrize("trailing", ["", ","])
@pytest.mark.parametrize(
    "lines",
    [
        ROWS_2014,
        ROWS_2018,
        ["UserId,ProductId,Rating,Timestamp", *ROWS_2014],
        ["asin,reviewerID,overall,unixReviewTime", *ROWS_2018],
    ],
    ids=["2014", "2018", "2014 header", "2018 header"],
)
def test_amazon_order_is_told_by_content_in_every_shape(
    tmp_path, lines, trailing, last_end, end, bom, zipped
):
    text = end.join(line + trailing for line in lines) + end * last_end
    data = codecs.BOM_UTF8 * bom + text.encode()
    path = write(tmp_path, gzip.compress(data) if zipped else data)
    assert columns(readers.read(path)) == FULL


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("header", [False, True])
def test_a_byte_order_mark_within_is_part_of_an_id(tmp_path, header, row):
    ids = ["a", "b"]
    ids[row] = "\ufeff" + ids[row]
    text = "user\titem\n" * header + "".join(f"{user}\tx\n" for user in ids)
    found = readers.read(write(tmp_path, text), "auto" if header else "tsv")
    if not header and row == 0:
        ids[0] = "a"  # that is where a mark belongs
    assert found.frame.collect()["user"].to_list() == ids


@pytest.mark.parametrize(
    ("lines", "format"),
    [
        (ROWS_2014, "amazon_2014"),
        (["user,item,rating,timestamp", *ROWS_2014], "amazon_2014"),
        (ROWS_2018, "amazon_2018"),
    ],
)
def test_explicit_amazon_order(tmp_path, lines, format):
    assert columns(readers.read(write(tmp_path, "\n".join(lines)), format)) == FULL


def test_explicit_order_wins_over_content(tmp_path):
    found = columns(readers.read(write(tmp_path, "\n".join(ROWS_2014)), "amazon_2018"))
    assert found["user"] == ITEMS and found["item"] == USERS


def test_undecidable_order_asks_for_format(tmp_path):
    path = write(tmp_path, "1,2,5,100\n2,1,4,100\n")
    with pytest.raises(InputError, match="--format=amazon_2014"):
        readers.read(path)
    assert columns(readers.read(path, "amazon_2018"))["user"] == ["2", "1"]


@pytest.mark.parametrize("zipped", [False, True])
def test_review_json_lines(tmp_path, zipped):
    lines = [
        json.dumps(
            {
                "reviewerID": u,
                "asin": i,
                "helpful": [0, 0],
                "reviewText": 'a "quote", a \n newline',
                "overall": r,
                "unixReviewTime": int(t),
                "reviewTime": "02 26, 2008",
            }
        )
        for u, i, r, t in zip(USERS, ITEMS, RATINGS, TIMES, strict=True)
    ]
    data = ("\n".join(lines) + "\n").encode()
    path = write(tmp_path, gzip.compress(data) if zipped else data)
    assert columns(readers.read(path)) == FULL


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize(
    "header", ["user_id,item_id,rating,timestamp", "User,Item,Score,Time", "uid,ASIN,stars,ts"]
)
def test_named_columns_in_common_spellings(tmp_path, separator, header):
    text = "\n".join([header, *ROWS_2014]).replace(",", separator)
    assert columns(readers.read(write(tmp_path, text))) == FULL


def test_named_columns_in_any_order_with_others_between(tmp_path):
    text = 'title,item_id,note,user_id\n"a, b",007,x,01\n"c ""d""",7,,1\n'
    found = columns(readers.read(write(tmp_path, text)))
    assert found == {"user": ["01", "1"], "item": ["007", "7"]}


def test_quoted_line_ends_in_other_columns(tmp_path):
    text = 'item_id,title,user_id,rating\n1,"two\nlines",a,1\n2,"three\n\nlines",b,2\n'
    assert columns(readers.read(write(tmp_path, text)))["user"] == ["a", "b"]
    with pytest.raises(InputError, match="file:7: bad rating 'x'"):
        readers.read(write(tmp_path, text + "3,t,c,x\n"))


def test_quoted_ids(tmp_path):
    found = columns(readers.read(write(tmp_path, 'user_id,item_id\n"a,b","c ""d"""\né,日本\n')))
    assert found == {"user": ["a,b", "é"], "item": ['c "d"', "日本"]}


@pytest.mark.parametrize("text", ["01\t002\t4\n1\t2\t5", "01\t002\t4\t\n1\t2\t5\t\n"])
def test_tab_separated_without_header_keeps_leading_zeros(tmp_path, text):
    found = columns(readers.read(write(tmp_path, text)))
    assert found == {"user": ["01", "1"], "item": ["002", "2"], "rating": [4.0, 5.0]}


def test_recbole_typed_header(tmp_path):
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t01\t4\t100.5\n"
    for format in ("auto", "recbole"):
        found = columns(readers.read(write(tmp_path, text, "x.inter"), format))
        assert found == {"user": ["1"], "item": ["01"], "rating": [4.0], "timestamp": [100.5]}


def test_blank_lines_are_harmless(tmp_path):
    text = "\nuser_id,item_id,rating\n\na,b,1\n\n\nc,d,2\n\n"
    assert columns(readers.read(write(tmp_path, text)))["user"] == ["a", "c"]


def ncf(folder: pathlib.Path, prefix: bool) -> str:
    texts = {
        "train": "0\t10\t1\n1\t20\t1\n0\t30\t1\n",
        "test": "1\t10\t1\n0\t20\t1\n",
        "negative": "(0, 20)\t40\t50\n(1, 10)\t30\t020\t50\n",
    }
    names = {
        "train": ("train.txt", "X.train.rating"),
        "test": ("test.txt", "X.test.rating"),
        "negative": ("test_neg.txt", "X.test.negative"),
    }
    for key, text in texts.items():
        if prefix and key != "negative":  # the published files have a fourth column
            text = text.replace("\t1\n", "\t4\t978300760\n")
        write(folder, text, names[key][prefix])
    return str(folder / "X") if prefix else str(folder)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("format", ["auto", "ncf"])
def test_ncf_folder_and_prefix(tmp_path, prefix, format):
    rows = readers.read(ncf(tmp_path, prefix), format)
    assert columns(rows) == {
        "user": ["0", "1", "0", "1", "0"],
        "item": ["10", "20", "30", "10", "20"],
    }
    assert rows.given == Given(["1", "0"], ["10", "20"], [["30", "020", "50"], ["40", "50"]])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("test.txt", "1\t10\t1\n1\t20\t1\n", "'1' has more than one test item"),
        ("test_neg.txt", "(0, 20)\t40\n", "no line for user '1'"),
        ("test_neg.txt", "(0, 20)\t40\n(1, 99)\t40\n", "test_neg.txt:2: .* not in the test file"),
        ("test_neg.txt", "(0, 20)\t40\n(0, 20)\t40\n", "test_neg.txt:2: a second line"),
        ("test_neg.txt", "(0, 20)\t40\n1, 10\t40\n", "test_neg.txt:2: expected"),
        ("test_neg.txt", "(0, 20)\t40\n(1, 10)\t40\t\t50\n", "test_neg.txt:2: expected"),
        ("test_neg.txt", "(0, 20)\n", "test_neg.txt:1: expected"),
        ("test_neg.txt", "", "empty"),
        ("train.txt", "0\t10\t1\n0\n", "train.txt:2: the item id is missing"),
        ("train.txt", None, "train.txt: no such file"),
    ],
)
def test_bad_ncf_files_are_named(tmp_path, file, text, message):
    path = ncf(tmp_path, prefix=False)
    if text is None:
        (tmp_path / file).unlink()
    else:
        write(tmp_path, text, file)
    with pytest.raises(InputError, match=message):
        readers.read(path)


BAD = [
    ("user_id,item_id,rating\na,b,1\nc,d,x\n", r"file:3: bad rating 'x'"),
    ("user_id,item_id,rating\na,b,1\nc,d,nan\n", r"file:3: the rating is missing .'nan'."),
    ("user_id,item_id,rating\na,b,1\nc,d,1e999\n", r"file:3: bad rating '1e999'"),
    ("user_id,item_id,rating\na,b,1\nc,d,\n", r"file:3: the rating is missing"),
    ("user_id,item_id,timestamp\na,b,1\nc,d,-inf\n", r"file:3: bad timestamp '-inf'"),
    ("user_id,item_id,rating\na,b,1\nc,d\n", r"file:3: the rating is missing"),
    ("user_id,item_id,rating\n\na,b,1\n\nc,d,e,4\n", r"file:5: 4 fields where 3"),
    ("user_id,item_id,rating\na,b,1,1\n", r"file:2: 4 fields where 3"),
    ('user_id,item_id,rating\na,b,1\nc,"d,1\ne,f,1\n', r"file:3: a quote is opened"),
    ('user_id,item_id\na,b\nc,"d\ne,f\n', r"file:3: a quote is opened"),
    ('user_id,item_id,rating\nq,r,1\n"a\nz",b,1\nc,d,x\n', r"file:3: a quote is opened"),
    ("user_id,item_id,rating\na,b,1\nc,d\r5,x\n", r"file:3: .*stray line end"),
    ('user_id,item_id\na,"b\nc,d"\ne,f\n', r"file:2: a quote is opened"),
    ("user_id,item_id,rating\n", "a header, but no rows"),
    ("user_id,item_id\na,b\nc\n", r"file:3: the item id is missing"),
    ("name,item_id,rating\na,b,1\n", "file:1: no column is known to be the user: found 'name', "),
    ("a,b\nc,d\n", "the user: give --user_column=1 --item_column=2, or add a header line such as"),
    ("1\t2\t3\n1\t2\tx\n", r"file:2: bad rating 'x'"),
    ("1\t2\t3\n1\t2\t3\t4\n", r"file:2: 4 fields where 3"),
    ("", "the file is empty"),
    ("\n\n", "the file is empty"),
    (b"user_id,item_id\na,b\n\xff\xfe,c\n", r"file:3: not UTF-8"),
    ("\n".join([*ROWS_2014, "A39HTATAQ9V7YG,B00007M0CP,five,1369699200"]), "file:4: .*'five'"),
    (",\n".join([*ROWS_2014, "A39HTATAQ9V7YG,B00007M0CP,5,1369699200,7"]), "file:4: 5 fields"),
    ('{"reviewerID": "a", "asin": "b", "overall": 4}\n{"reviewerID": "a"\n', "file:2: not JSON"),
    ('{"reviewerID": "a", "asin": "b"}\n[1]\n', "file:2: expected a JSON object"),
    ('{"reviewerID": "a", "asin": "b", "overall": 4}\n' * 2 + '{"reviewerID": "a", "asin": "b"}',
     "file:3: the rating is missing"),
    ('{"reviewerID": "a", "asin": "b", "overall": "x"}\n', "file:1: bad rating 'x'"),
    ('{"overall": 5, "asin": "b"}\n', "file:1: no column is known to be the user: found"),
    (gzip.compress(b"user_id,item_id\n" + b"a,b\n" * 99, mtime=0)[:-9], "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_line_is_named_with_its_value(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        readers.read(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_bad_line_far_behind_the_sample_is_found(tmp_path):
    good = b"user_id,item_id,rating\n" + b"a,b,1\n" * 100_000
    assert len(good) > formats.SAMPLE_BYTES
    for tail, message in [
        (b"c,d,x\n", "file:100002: bad rating 'x'"),
        (b"c,d,1,1\n", "file:100002: 4 fields"),
        (b"c,\xff,1\n", "file:100002: not UTF-8"),
        (b'c,"d,1\n' + b"a,b,1\n" * 50_000, "file:100002: a quote is opened"),
    ]:
        with pytest.raises(InputError, match=message):
            readers.read(write(tmp_path, good + tail + b"a,b,1\n"))
        with pytest.raises(InputError, match=message):
            readers.read(write(tmp_path, gzip.compress(good + tail + b"a,b,1\n", 1)))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file"):
        readers.read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="train.txt: no such file"):
        readers.read(tmp_path)
    with pytest.raises(InputError, match="only ncf reads a folder"):
        readers.read(tmp_path, "tsv")
    with pytest.raises(InputError, match="X.train.rating: no such file"):
        readers.read(tmp_path / "X", "ncf")


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("named", "1,2,3\n", "needs a header line"),
        ("recbole", "1\t2\t3\n", "needs a header line"),
        ("tsv", "1,2,3\n", "separated by tabs"),
        ("tsv", "1\t2\t3\t4\t5\n", "2 to 4 fields"),
        ("amazon_2014", "1\t2\t3\t4\n", "separated by commas"),
        ("amazon_2018", "1,2\n", "3 to 4 fields"),
        ("amazon_json", "1,2,3\n", "file:1: expected a JSON object"),
        ("csv", "1,2,3\n", "unknown format 'csv': expected one of auto"),
    ],
)
def test_wrong_format_is_refused(tmp_path, format, text, message):
    with pytest.raises(InputError, match=message):
        readers.read(write(tmp_path, text), format)


def test_raw_files_at_hand(data_dir):
    raw = data_dir / "amazon-raw"
    beauty = columns(readers.read(raw / "ratings_Beauty_first30k_2014.csv"))
    lines = (raw / "ratings_Beauty_first30k_2014.csv").read_text().splitlines()[1:]
    assert beauty["user"] == [line.split(",")[0] for line in lines]
    assert beauty["item"] == [line.split(",")[1] for line in lines]
    magazines = columns(readers.read(raw / "Magazine_Subscriptions_first546_2018order.csv"))
    lines = (raw / "Magazine_Subscriptions_first546_2018order.csv").read_text().splitlines()
    assert magazines["user"] == [line.split(",")[1] for line in lines]
    assert magazines["rating"] == [float(line.split(",")[2]) for line in lines]
    movies = columns(readers.read(raw / "Movies_and_TV_5_first999.json"))
    reviews = [
        json.loads(x) for x in (raw / "Movies_and_TV_5_first999.json").read_text().splitlines()
    ]
    assert movies["item"] == [review["asin"] for review in reviews]
    assert movies["timestamp"] == [review["unixReviewTime"] for review in reviews]
