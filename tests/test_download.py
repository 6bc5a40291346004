"""Downloads survive a server that breaks off, and never pass a half file off as whole."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from conet_jax.data import download
from conet_jax.errors import InputError

BODY = bytes(range(256)) * 400


class Server(http.server.ThreadingHTTPServer):
    """What the next answers do is in ``plan``; what was asked for is in ``asked``."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.plan, self.asked, self.ranges = BODY, '"v1"', [], [], True
        self.location, self.extra = "/file", {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server: Server = self.server
        wanted = self.headers["Range"]
        server.asked.append(wanted)
        step = server.plan.pop(0) if server.plan else "all"
        if isinstance(step, int) and 300 <= step < 600:
            self.send_response(step)
            if step < 400:
                self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if wanted and server.ranges and self.headers["If-Range"] == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.body) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            end = len(server.body)
            sent = start - 7 * (step == "wrong range")
            self.send_header("Content-Range", f"bytes {sent}-{end - 1}/{end}")
        if step != "no length":
            self.send_header("Content-Length", str(len(server.body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        for name, value in server.extra.items():
            self.send_header(name, value)
        self.end_headers()
        rest = server.body[start:]
        self.wfile.write(rest[:step] if isinstance(step, int) else rest)
        self.close_connection = True


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def fetch(server, path, **options) -> list:
    waits = []
    options = {"retries": 2, "timeout": 5, "wait": waits.append} | options
    download.fetch(server.url, path, **options)
    return waits


def test_broken_connection_is_resumed_where_it_stopped(server, tmp_path):
    server.plan = [50_000, 0, 30_000, 7]
    waits = fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY
    assert server.asked == [None, *(f"bytes={n}-" for n in (50_000, 50_000, 80_000, 80_007))]
    assert len(waits) == 4 and max(waits) <= 30
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"]
    assert fetch(server, tmp_path / "x.csv") == [] and len(server.asked) == 5  # it is there


def test_next_call_goes_on_where_the_last_gave_up(server, tmp_path):
    server.plan = [50_000, 0, 0, 0]
    with pytest.raises(InputError, match=r"broke off, 3 attempts in a row.*\(50,000 bytes so far"):
        fetch(server, tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
    fetch(server, tmp_path / "x.csv")
    assert server.asked[-1] == "bytes=50000-"
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_changed_file_is_not_joined_to_the_old_part(server, tmp_path):
    server.plan = [50_000, 0, 0, 0]
    with pytest.raises(InputError):
        fetch(server, tmp_path / "x.csv")
    server.body, server.etag = BODY[::-1], '"v2"'
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY[::-1]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_file_without_a_strong_tag_starts_afresh(server, tmp_path, etag):
    server.etag, server.plan = etag, [50_000]
    fetch(server, tmp_path / "x.csv")
    assert server.asked == [None, None]
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_server_without_ranges_starts_afresh(server, tmp_path):
    server.ranges, server.plan = False, [50_000]
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_wrong_range_is_not_appended(server, tmp_path):
    server.plan = [50_000, "wrong range"]
    fetch(server, tmp_path / "x.csv")
    assert server.asked == [None, "bytes=50000-", "bytes=50000-"]
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_part_that_was_complete_is_only_renamed(server, tmp_path):
    (tmp_path / "x.csv.part").write_bytes(BODY)
    (tmp_path / "x.csv.part.tag").write_text('"v1"')
    fetch(server, tmp_path / "x.csv")
    assert server.asked == [f"bytes={len(BODY)}-"]
    assert (tmp_path / "x.csv").read_bytes() == BODY
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"]


def test_part_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "x.csv.part").write_bytes(BODY + b"more")
    (tmp_path / "x.csv.part.tag").write_text('"v1"')
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_passing_errors_are_waited_out_and_others_not(server, tmp_path):
    server.plan = [503, 500]
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY
    server.plan = [404]
    with pytest.raises(InputError, match="cannot be downloaded: status 404"):
        fetch(server, tmp_path / "y.csv")
    assert not (tmp_path / "y.csv").exists() and len(server.asked) == 4


def test_redirects_stay_with_http(server, tmp_path):
    server.plan = [302]
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY
    server.plan, server.location = [302], "ftp://127.0.0.1/x"
    with pytest.raises(InputError, match="ftp://127.0.0.1/x: only http and https"):
        fetch(server, tmp_path / "y.csv")
    with pytest.raises(InputError, match="only http and https"):
        download.fetch("ftp://x/y", tmp_path / "y.csv")


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "gopher", "FILE"])
def test_a_redirect_to_another_scheme_is_refused(server, tmp_path, scheme):
    (tmp_path / "secret").write_text("secret")
    server.plan, server.location = [302], f"{scheme}://{tmp_path}/secret"
    with pytest.raises(InputError, match="only http and https|is not allowed"):
        fetch(server, tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["secret"]


def test_redirects_without_end_are_refused(server, tmp_path):
    server.plan, server.location = [302] * 50, "/again"
    with pytest.raises(InputError, match="cannot be downloaded: status 302") as error:
        fetch(server, tmp_path / "x.csv")
    assert len(str(error.value).splitlines()) == 1


def test_a_server_has_no_say_in_where_a_file_goes(server, tmp_path):
    folder = tmp_path / "a" / "b"
    server.plan, server.location = [302], "/../../../evil.csv"
    server.extra = {"Content-Disposition": 'attachment; filename="../../evil.csv"'}
    fetch(server, folder / "x.csv")
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [folder / "x.csv"]


def test_names_of_downloads_stay_in_their_folder():
    """Prepare takes the last part of each address; nothing that is fetched is unpacked."""
    for pair in download.URLS.values():
        for url in pair.values():
            name = url.rsplit("/", 1)[1]
            assert name == pathlib.PurePath(name).name != ".." and not name.startswith(".")


def test_no_server_is_given_up(tmp_path):
    made, lines = Server(), []
    made.server_close()
    with pytest.raises(InputError, match="cannot be downloaded: .*refused.*, 3 attempts"):
        fetch(made, tmp_path / "x.csv", say=lines.append)
    assert [line.split("; ")[1] for line in lines] == [
        "attempts left: 2, the next in 2 s",
        "attempts left: 1, the next in 4 s",
    ]


def test_unannounced_size_ends_with_the_connection(server, tmp_path):
    server.plan = ["no length"]
    fetch(server, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == BODY


def test_unwritable_place_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(server, tmp_path / "file" / "x.csv")


def test_server_that_starts_over_and_breaks_off_each_time_is_given_up(server, tmp_path):
    server.ranges, server.plan = False, [50_000, 20_000] * 50
    with pytest.raises(InputError, match="attempts in a row"):
        fetch(server, tmp_path / "x.csv")
    assert len(server.asked) == 4


def test_prepare_downloads_resumes_and_builds(server, tmp_path):
    # 40 users, 8 items each in either domain: with the 5-core by default all of them stay.
    lines = [
        f"A{user:012},B{(user * 7 + 13 * n) % 50:09},5.0,{n}"
        for user in range(40)
        for n in range(8)
    ]
    server.body = ("\n".join([*lines, "A0RARE0RARE00,B000000000,5.0,3"]) + "\n").encode()
    server.plan = [4_000, 0, 100]
    code = (
        "import runpy, sys, time; time.sleep = lambda s: None; from conet_jax.data import download;"
        f"download.URLS['amazon'] = dict(target='{server.url}/b.csv', source='{server.url}/m.csv');"
        "few = ['--candidates=9', '--eval_k=5'];"
        "sys.argv = ['prepare', '--download=amazon', *few, *sys.argv[1:]];"
        "runpy.run_path('launch/prepare.py', run_name='__main__')"
    )
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, f"--out={tmp_path / 'amazon'}"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert sorted(os.listdir(tmp_path / "amazon.raw")) == ["b.csv", "m.csv"]
    meta = json.loads((tmp_path / "amazon" / "dataset.json").read_text())
    assert meta["options"]["min_user_items"] == meta["options"]["min_item_users"] == 5
    assert meta["counts"]["users"] == 40 and meta["counts"]["target_interactions"] == 320
    row = next(line for line in done.stdout.splitlines() if line.startswith("paper, Table 1"))
    numbers = "80,763 93,799 1,323,101 0.017% 35,896 963,373 0.033%"  # as printed in the paper
    assert row.split()[3:] == numbers.split()
    assert "does not state its filter" in done.stdout
