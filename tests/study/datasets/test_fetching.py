"""A file is fetched whole and with its checksum, or not at all."""

from __future__ import annotations

import hashlib
import http.server
import threading
import urllib.request

import pytest

from batchnorm import InputError, OutputError
from batchnorm.study.datasets.fetching import Source, fetch

DATA = bytes(range(256)) * 40


def source(*urls, data=DATA, size=None):
    return Source("file.gz", urls, hashlib.sha256(data).hexdigest(), len(data) if size is None else size)


@pytest.fixture
def there(tmp_path):
    path = tmp_path / "there" / "file.gz"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


def test_a_file_is_fetched(tmp_path, there):
    told = []
    path = fetch(source(there.as_uri()), tmp_path / "here", told.append)
    assert path == tmp_path / "here" / "file.gz"
    assert path.read_bytes() == DATA
    assert told == [f"fetching file.gz, 0.01 MB, from {there.as_uri()}"]


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (DATA[:-1], r"gives 10239 of the published 10240 bytes"),
        (DATA + b"\0", r"gives more than the published 10240 bytes"),
        (b"\1" + DATA[1:], r"gives a file with another SHA-256 than the published one"),
        (b"", r"gives 0 of the published 10240 bytes"),
    ],
)
def test_what_is_not_the_published_file_is_not_kept(tmp_path, there, held, reason):
    there.write_bytes(held)
    here = tmp_path / "here"
    with pytest.raises(InputError, match=rf"cannot fetch file\.gz \(.*{reason}\): try again with a network, or put"):
        fetch(source(there.as_uri()), here, lambda _: None)
    assert list(here.iterdir()) == []


def test_the_next_address_is_tried(tmp_path, there):
    nowhere = (tmp_path / "nowhere").as_uri()
    assert fetch(source(nowhere, there.as_uri()), tmp_path, lambda _: None).read_bytes() == DATA


def test_no_network(tmp_path):
    """A port at which nobody listens, as a machine without a network would find all of them."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_port
    with pytest.raises(
        InputError, match=r"cannot fetch file\.gz \(http.*refused\): try again with a network"
    ) as caught:
        fetch(source(f"http://127.0.0.1:{port}/file.gz"), tmp_path, lambda _: None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Broken(http.server.BaseHTTPRequestHandler):
    """Promises the whole file and hangs up in the middle of it; knows no other path."""

    def do_GET(self):
        if self.path != "/file.gz":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:5000])

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("path", "reason"), [("file.gz", "5000"), ("gone.gz", "Not Found")])
def test_a_server_that_fails(tmp_path, monkeypatch, path, reason):
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(InputError, match=rf"cannot fetch file\.gz \(.*{reason}"):
            fetch(source(f"http://127.0.0.1:{server.server_port}/{path}"), tmp_path, lambda _: None)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, there):
    (tmp_path / "occupied").write_text("")
    with pytest.raises(OutputError, match=r"cannot write file\.gz into .*occupied"):
        fetch(source(there.as_uri()), tmp_path / "occupied" / "here", lambda _: None)


def test_an_interrupt_leaves_nothing(tmp_path, there):
    def tell(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(source(there.as_uri()), tmp_path / "here", tell)
    assert list((tmp_path / "here").iterdir()) == []
