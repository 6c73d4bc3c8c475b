"""Headless Chromium through its debugging pipe, and the pixels of a PNG: standard library only."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import tempfile
import time
import zlib
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
TIMEOUT = 60.0


def executable() -> str | None:
    """Path of the installed Chromium, None without one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page. ``problems`` gathers console errors, exceptions and blocked requests;
    ``requests`` the addresses that the page asked for."""

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="retort-browser-")
        self._process, self._write, self._read = _start(self._profile.name)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems, self.requests, self._events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        """End the browser that this object started and remove its profile."""
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, path: Path, width=1280, height=900, dark=False):
        """Load a file and wait for its load event; problems and requests start anew."""
        self.problems.clear()
        self.requests.clear()
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._handle(self._message())
        self.call("Runtime.evaluate", expression="0")  # events of the load arrive before its answer

    def evaluate(self, expression: str):
        """Value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
            "value"
        ]

    def screenshot(self, clip: dict | None = None) -> bytes:
        """PNG of the whole page, or of ``clip`` = {x, y, width, height} in page pixels."""
        more = {"clip": {**clip, "scale": 1}} if clip else {}
        answer = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, optimizeForSpeed=True, **more
        )
        return base64.b64decode(answer["data"])

    def call(self, method: str, **params):
        """Send one protocol command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._handle(answer)

    def _message(self) -> dict:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("Chromium closed its pipe or did not answer")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _handle(self, message: dict) -> None:
        method, params = message.get("method"), message.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(params)
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


def _start(profile: str) -> tuple[int, int, int]:
    """Process id, descriptor to write commands to, descriptor to read answers from."""
    ends = [*os.pipe(), *os.pipe()]  # read, write; read, write
    # The browser reads commands on descriptor 3 and writes answers to 4: keep our ends off those.
    to_browser, write, read, from_browser = (
        fcntl.fcntl(e, fcntl.F_DUPFD_CLOEXEC, 10) for e in ends
    )
    actions = [
        *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
        (os.POSIX_SPAWN_DUP2, to_browser, 3),
        (os.POSIX_SPAWN_DUP2, from_browser, 4),
    ]
    command = [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    for end in (*ends, to_browser, from_browser):
        os.close(end)
    return process, write, read


def pixels(png: bytes) -> list[list[tuple[int, int, int]]]:
    """Rows of (red, green, blue) of an 8-bit RGB or RGBA PNG without interlacing."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8 and kind in (2, 6), "only 8-bit RGB and RGBA"
    channels = 3 if kind == 2 else 4
    data = zlib.decompress(_image_data(png))
    above, rows, stride = bytearray(width * channels), [], width * channels + 1
    for y in range(height):
        line = data[y * stride : (y + 1) * stride]
        above = _unfilter(line[0], bytearray(line[1:]), above, channels)
        rows.append([tuple(above[i : i + 3]) for i in range(0, len(above), channels)])
    return rows


def count_near(rows, colour: tuple[int, int, int], tolerance: int = 24) -> int:
    """How many pixels differ from ``colour`` by at most ``tolerance`` in every channel."""
    return sum(
        all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))
        for row in rows
        for pixel in row
    )


def _image_data(png: bytes) -> bytes:
    at, found = 8, b""
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            found += png[at + 8 : at + 8 + size]
        at += size + 12
    return found


def _unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> bytearray:
    """Undo one row's PNG filter (PNG specification, section 9)."""
    for i in range(len(line)):
        left = line[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        if kind == 1:
            line[i] = (line[i] + left) & 255
        elif kind == 2:
            line[i] = (line[i] + above[i]) & 255
        elif kind == 3:
            line[i] = (line[i] + (left + above[i]) // 2) & 255
        elif kind == 4:
            line[i] = (line[i] + _paeth(left, above[i], corner)) & 255
    return line


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))
