"""A headless Chromium for tests: the DevTools protocol over a pipe (file descriptors 3 and 4), so nothing to install.

What is left out: any other browser, and all of the protocol but sending a command and collecting what goes wrong.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60.0


def find() -> str | None:
    """The browser's program, or None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a fresh headless browser. `errors` collects exceptions, console errors and failed requests."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions", "about:blank"]
        pipes = f'exec "$0" "$@" 3</dev/fd/{to_browser} 4>/dev/fd/{from_browser}'
        self._process = subprocess.Popen(
            ["sh", "-c", pipes, find(), *flags],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        self.errors: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        os.close(self._commands)
        os.close(self._answers)

    def send(self, method: str, **params: Any) -> dict:
        """One command; returns its result. Raises RuntimeError if the browser says no."""
        message = {"id": next(self._ids), "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], TIMEOUT_S)[0]:
                raise RuntimeError("the browser does not answer")
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method: str | None, params: dict) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "about:")):
            self.errors.append(f"the page asks for {params['request']['url'][:100]}")
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {params['message']}")

    def open(self, path: Path) -> None:
        """Loads a file and waits until it is complete."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.js("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, awaited. Raises RuntimeError where it throws."""
        sent = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in sent:
            raise RuntimeError(sent["exceptionDetails"]["exception"].get("description", expression))
        return sent["result"].get("value")

    def show(
        self, *, width: int = 1280, height: int = 900, mobile: bool = False, media: str = "", scheme: str = ""
    ) -> None:
        """The size of the window and the kind of device; `media` is print or screen, `scheme` dark or light."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def key(self, name: str, code: int) -> None:
        """Presses a key, such as ("ArrowRight", 39), where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))
