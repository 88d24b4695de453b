"""Foundry's public catalogue on loopback, as the real SDK 2.2.1 asks for it: the list, the registry, the blobs.

The list is plain HTTP under the path that the SDK insists on. For a download it asks ``REGION.api.azureml.ms`` over
TLS where the blobs are; it honours HTTPS_PROXY and SSL_CERT_FILE, so this is that proxy, too, with its own certificate.
The blobs are Azure's REST API as far as the SDK uses it: a list, HEAD, and ranges of 2 MiB.
"""

from __future__ import annotations

import json
import shutil
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import pytest

PATH = "/asset-gallery/v1.0/models"
PUBLISHER = "Contoso"
PARTS = 8
DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass(frozen=True)
class Entry:
    """A variant that the catalogue lists; its files are those of ``folder``."""

    name: str
    alias: str
    folder: Path
    version: int = 1
    device: str = "cpu"
    execution_provider: str = "CPUExecutionProvider"
    licence: str = "MIT"

    @property
    def model_id(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def asset_id(self) -> str:
        return f"azureml://registries/azureml/models/{self.name}/versions/{self.version}"

    def as_json(self) -> dict[str, Any]:
        """In the shape of the catalogue's ``value`` records."""
        size = sum(file.stat().st_size for file in self.folder.iterdir())
        return {
            "assetId": self.asset_id,
            "entityId": f"azureml:{self.name}:{self.version}",
            "annotations": {
                "tags": {"alias": self.alias, "foundryLocal": "", "license": self.licence},
                "systemCatalogData": {
                    "publisher": PUBLISHER,
                    "displayName": self.name,
                    "license": self.licence,
                    "inferenceTasks": ["chat-completion"],
                    "modelCapabilities": ["chat", "tool-calling"],
                    "deploymentOptions": ["Foundry Local on Devices"],
                },
            },
            "properties": {
                "id": self.model_id,
                "name": self.name,
                "version": self.version,
                "creationContext": {"createdTime": "2026-01-01T00:00:00Z"},
                "variantInfo": {
                    "parents": [{"assetId": f"azureml://registries/azureml/models/{self.alias}/versions/1"}],
                    "variantMetadata": {
                        "modelType": "ONNX",
                        "device": self.device,
                        "executionProvider": self.execution_provider,
                        "fileSizeBytes": size,
                    },
                },
            },
        }


@dataclass
class Catalogue:
    """What is served, how it misbehaves, and what was asked.

    ``cuts``: so many ranges are broken off half way. ``stalls``: so many are never answered, nor are those (file, first
    byte) that ``stall_if`` says. ``trickle_s`` is what each of a large range's ``PARTS`` takes. ``sent`` are the ranges
    that went out whole, ``filters`` those of the last list.
    """

    entries: list[Entry]
    cuts: int = 0
    stalls: int = 0
    sent: list[tuple[str, int]] = field(default_factory=list)
    filters: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    certificate: Path | None = None
    stall_if: Callable[[str, int], bool] = lambda name, first: False
    trickle_s: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """What leads the SDK, and so loadbench, here."""
        proxy = self.url.removesuffix(PATH)
        more = {} if self.certificate is None else {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": str(self.certificate)}
        return {"LOADBENCH_CATALOG_URL": self.url, **more}

    def take(self, what: str) -> bool:
        """Whether this is one of those that are to be cut, or stalled."""
        left = getattr(self, what)
        setattr(self, what, max(0, left - 1))
        return bool(left)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    catalogue: Catalogue
    tls: ssl.SSLContext | None


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def catalogue(self) -> Catalogue:
        return cast(_Server, self.server).catalogue

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is http.server's
        pass

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            large = len(body) > 1 << 20
            size = -(-len(body) // PARTS) if large and self.catalogue.trickle_s else len(body) or 1
            for first in range(0, len(body), size):
                self.wfile.write(body[first : first + size])
                self.catalogue.over.wait(self.catalogue.trickle_s if size < len(body) else 0)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if urlsplit(self.path).path != PATH:
            self.answer(b"no such path", 404)
            return
        self.catalogue.filters = asked["filters"]
        rows = [entry.as_json() for entry in self.catalogue.entries]
        self.answer(
            json.dumps({"totalCount": len(rows), "value": rows}).encode(), headers={"Content-Type": "application/json"}
        )

    def do_CONNECT(self) -> None:
        tls = cast(_Server, self.server).tls
        assert tls is not None
        self.send_response(200)
        self.end_headers()
        self.connection = tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        self.wfile = socketserver._SocketWriter(self.connection)  # type: ignore[attr-defined]
        self.close_connection = False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        by_asset = {entry.asset_id: index for index, entry in enumerate(self.catalogue.entries)}
        if parts.path.endswith("/nonazureaccount") and (index := by_asset.get(query["assetId"][0])) is not None:
            blobs = f"{self.catalogue.url.removesuffix(PATH)}/blobs{index}?sig=none"
            self.answer(json.dumps({"blobSasUri": blobs}).encode(), headers={"Content-Type": "application/json"})
        elif not parts.path.startswith("/blobs"):
            self.answer(b"no such path", 404)
        else:
            container, _, name = parts.path.removeprefix("/blobs").partition("/")
            folder = self.catalogue.entries[int(container)].folder
            self.list_blobs(folder) if not name else self.blob(folder / name)

    def list_blobs(self, folder: Path) -> None:
        rows = "".join(
            f"<Blob><Name>{file.name}</Name><Properties><Creation-Time>{DATE}</Creation-Time>"
            f"<Last-Modified>{DATE}</Last-Modified><Etag>0x1</Etag><Content-Length>{file.stat().st_size}</Content-Length>"
            "<BlobType>BlockBlob</BlobType><AccessTier>Hot</AccessTier><ServerEncrypted>true</ServerEncrypted>"
            "</Properties></Blob>"
            for file in sorted(folder.iterdir())
        )
        listing = f'<EnumerationResults ContainerName="c"><Blobs>{rows}</Blobs><NextMarker /></EnumerationResults>'
        self.answer(
            f'<?xml version="1.0" encoding="utf-8"?>{listing}'.encode(), headers={"Content-Type": "application/xml"}
        )

    def blob(self, file: Path) -> None:
        data = file.read_bytes()
        told = {
            "Content-Type": "application/octet-stream",
            "ETag": '"0x1"',
            "Last-Modified": DATE,
            "x-ms-blob-type": "BlockBlob",
            "x-ms-creation-time": DATE,
            "x-ms-server-encrypted": "true",
            "x-ms-lease-state": "available",
            "x-ms-lease-status": "unlocked",
        }
        asked = self.headers.get("x-ms-range")
        if asked is None:
            self.answer(data, headers=told)
            return
        first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
        piece = data[first : last + 1]
        if self.catalogue.take("stalls") or self.catalogue.stall_if(file.name, first):
            self.catalogue.over.wait()
            self.close_connection = True
            return
        told["Content-Range"] = f"bytes {first}-{first + len(piece) - 1}/{len(data)}"
        if self.catalogue.take("cuts"):
            self.answer(piece[: len(piece) // 2], 206, told | {"Content-Length": str(len(piece))})
            self.close_connection = True
            return
        self.answer(piece, 206, told)
        self.catalogue.sent.append((file.name, first))


@contextmanager
def serving(entries: list[Entry], folder: Path) -> Iterator[Catalogue]:
    """Serve these; ``folder`` takes the certificate. Skips downloads' tests where there is no openssl to make it."""
    catalogue = Catalogue(entries)
    server = _Server(("127.0.0.1", 0), _Answers)
    server.catalogue, server.tls = catalogue, None
    catalogue.url = f"http://127.0.0.1:{server.server_address[1]}{PATH}"
    if shutil.which("openssl"):
        catalogue.certificate, key = folder / "cert.pem", folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=loopback"]
        names = ["-addext", "subjectAltName=DNS:*.api.azureml.ms"]
        files = ["-out", str(catalogue.certificate), "-keyout", str(key)]
        subprocess.run([*command, *names, *files], check=True, capture_output=True)
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(catalogue.certificate, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield catalogue
    finally:
        catalogue.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, for a certificate")


def put_into_cache(cache: Path, entry: Entry) -> Path:
    """Lay a model into the cache as a finished download does: publisher, name-version, and the file that vouches."""
    path = cache / "catalog" / PUBLISHER / f"{entry.name}-{entry.version}"
    shutil.copytree(entry.folder, path)
    (path / "inference_model.json").write_text(json.dumps({"Name": entry.model_id, "PromptTemplate": None}))
    return path
