"""Downloads of image data sets, from a server on loopback."""

import dataclasses
import functools
import http.server
import json
import tarfile
import threading
from pathlib import Path

import pytest

from cvxnn.cli import main
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.images import IMAGE_SOURCES, fetch_images, load_images
from tests.image_files import (
    CIFAR,
    FASHION,
    IDX_NAMES,
    binary_batch,
    make_official,
    no_data_elsewhere,
    quietly,
    write_cifar,
    write_fashion,
)

__all__ = ["no_data_elsewhere"]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; "/short/..." and "/broken/..." misbehave."""

    asked: list[str]

    def do_GET(self):
        kind, _, name = self.path.lstrip("/").partition("/")
        self.asked.append(name)
        if kind == "broken":
            self.send_error(500)
            return
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if kind == "short" else content)

    def log_message(self, *arguments):
        pass


class TestDownloads:
    @pytest.fixture
    def server(self, tmp_path):
        """A folder that is served, the address, and the names asked for."""
        folder = tmp_path / "served"
        folder.mkdir()
        Server.asked = []
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder)) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield folder, f"http://127.0.0.1:{server.server_address[1]}", Server.asked
            server.shutdown()
            thread.join()

    @pytest.fixture
    def fashion(self, server, monkeypatch):
        write_fashion(server[0])
        make_official(monkeypatch, FASHION, server[0])
        return server

    def test_fetch_once(self, fashion, tmp_path):
        _, url, asked = fashion
        fetched = fetch_images("fashion_mnist", base_url=f"{url}/good")
        assert sorted(fetched.downloaded) == sorted(asked) == sorted(IDX_NAMES)
        assert {path.parent for path in fetched.files} == {tmp_path / "cache" / "fashion-mnist"}
        assert {path.name for path in fetched.files[0].parent.iterdir()} == set(IDX_NAMES)
        again = fetch_images("fashion_mnist", base_url=f"{url}/good/")
        assert (again.downloaded, again.files, len(asked)) == ((), fetched.files, 4)
        assert len(quietly("fashion_mnist", "test")) == 20

    def test_damaged_file_in_the_cache_is_replaced(self, fashion):
        _, url, asked = fashion
        files = fetch_images("fashion_mnist", base_url=f"{url}/good").files
        good = files[2].read_bytes()
        files[2].write_bytes(good[:-5])
        assert fetch_images("fashion_mnist", base_url=f"{url}/good").downloaded == (files[2].name,)
        assert files[2].read_bytes() == good and len(asked) == 5

    def test_cifar_archive(self, server, monkeypatch, tmp_path):
        folder, url, _ = server
        layout = CIFAR.layouts[0]
        write_cifar(tmp_path / "made", layout, binary_batch)
        with tarfile.open(folder / layout.archive, "w:gz") as stream:
            stream.add(tmp_path / "made", arcname=layout.folder)
        make_official(monkeypatch, CIFAR, tmp_path / "made", folder / layout.archive)
        cache = tmp_path / "a" / "b"
        fetched = fetch_images("cifar10", base_url=f"{url}/good", cache_dir=cache)
        assert fetched.files == (cache / layout.archive,) and fetched.note == ""
        data = quietly("cifar10", cache_dir=cache)
        assert (len(data), data.note) == (30, "")

    def test_download_on_demand(self, fashion, monkeypatch):
        source = IMAGE_SOURCES["fashion_mnist"]
        there = dataclasses.replace(source.download, base_url=f"{fashion[1]}/good/")
        monkeypatch.setitem(IMAGE_SOURCES, "fashion_mnist", dataclasses.replace(source, download=there))
        with pytest.raises(StorageError, match="not in the cache"):
            load_images("fashion_mnist")
        assert fashion[2] == []
        assert len(quietly("fashion_mnist", download=True)) == 30

    @pytest.mark.parametrize(
        ("path", "words"),
        [("short", "ended early; nothing is kept"), ("broken", "the server answers with status 500")],
    )
    def test_server_that_fails(self, fashion, tmp_path, path, words):
        with pytest.raises(StorageError, match=words):
            fetch_images("fashion_mnist", base_url=f"{fashion[1]}/{path}")
        assert not (tmp_path / "cache").exists()

    def test_wrong_hash(self, fashion, tmp_path):
        folder, url, _ = fashion
        (folder / IDX_NAMES[1]).write_bytes(b"another file")
        with pytest.raises(StorageError, match=f"{IDX_NAMES[1]} is not the official file: .* nothing is kept"):
            fetch_images("fashion_mnist", base_url=f"{url}/good")
        kept = [path.name for path in (tmp_path / "cache" / "fashion-mnist").iterdir()]
        assert set(kept) <= set(IDX_NAMES) - {IDX_NAMES[1]}  # files that were right stay

    def test_no_server(self, fashion, tmp_path):
        with http.server.HTTPServer(("127.0.0.1", 0), Server) as closed:
            port = closed.server_address[1]
        with pytest.raises(StorageError, match=f"no connection to 127.0.0.1:{port}; a folder that has the files"):
            fetch_images("fashion_mnist", base_url=f"http://127.0.0.1:{port}")
        assert not (tmp_path / "cache").exists()

    def test_interruption_leaves_nothing(self, fashion, tmp_path, monkeypatch):
        import requests

        def interrupt(self, chunk_size):
            yield b"a part"
            raise KeyboardInterrupt

        monkeypatch.setattr(requests.Response, "iter_content", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_images("fashion_mnist", base_url=f"{fashion[1]}/good")
        assert not (tmp_path / "cache").exists()

    def test_cache_that_cannot_be_made(self, fashion, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(StorageError, match="cannot write to"):
            fetch_images("fashion_mnist", base_url=f"{fashion[1]}/good", cache_dir=tmp_path / "file" / "x")

    @pytest.mark.parametrize("url", ["", "ftp://a/b", "file:///x", "nothing", "http://", 3])
    def test_wrong_address(self, url):
        with pytest.raises(InvalidInputError, match="base_url is"):
            fetch_images("cifar10", base_url=url)

    def test_files_of_the_data_folder_come_first(self, fashion, tmp_path, monkeypatch):
        folder, url, asked = fashion
        fetched = fetch_images("fashion_mnist", data_dir=folder, base_url=f"{url}/good")
        assert (fetched.downloaded, fetched.note, asked) == ((), "", [])
        monkeypatch.setenv("CVXNN_DATA_DIR", str(folder))
        assert fetch_images("fashion_mnist", base_url=f"{url}/good").files == fetched.files
        (folder / IDX_NAMES[0]).write_bytes(b"x")
        assert IDX_NAMES[0] in fetch_images("fashion_mnist").warnings[0]
        (tmp_path / "empty").mkdir()
        with pytest.raises(StorageError, match="without data_dir the files are downloaded"):
            fetch_images("fashion_mnist", data_dir=tmp_path / "empty", base_url=f"{url}/good")
        assert asked == []

    def test_command(self, fashion, capsys):
        command = ["datasets", "fetch", "fashion_mnist", "--base-url", f"{fashion[1]}/good"]
        assert main(command) == 0
        captured = capsys.readouterr()
        assert "4 of 4 files" in captured.out and "Fashion-MNIST" in captured.out
        assert IDX_NAMES[0] in captured.err  # the progress bar
        assert main([*command, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["downloaded"] == [] and len(document["files"]) == 4 and document["note"] == ""
        assert main([*command, "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")

    def test_command_with_a_folder_of_other_files(self, fashion, capsys):
        (fashion[0] / IDX_NAMES[0]).write_bytes(b"x")
        assert main(["datasets", "fetch", "fashion_mnist", "--data-dir", str(fashion[0]), "--json"]) == 0
        captured = capsys.readouterr()
        document = json.loads(captured.out)
        assert IDX_NAMES[0] in document["warnings"][0] and "not the official bytes" in document["note"]
        assert captured.err.startswith("Warning: ")

    @pytest.mark.parametrize(
        ("arguments", "status"),
        [
            (["nothing"], 2),
            (["cifar10", "--data-dir", "no/such/folder"], 2),
            (["cifar10", "--data-dir", ""], 2),
            (["cifar10", "--base-url", "nothing"], 2),
            (["cifar10", "--data-dir", "."], 1),
        ],
    )
    def test_command_refuses(self, arguments, status, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["datasets", "fetch", *arguments]) == status
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and err.count("\n") == 1
