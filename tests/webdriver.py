"""A headless browser for tests: Chromium through the W3C WebDriver protocol of chromedriver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

_SECONDS = 60  # until a request fails; a busy machine starts the browser in a few seconds


class NoBrowser(Exception):
    """This machine has no browser that starts."""


class Browser:
    """A browser, from its start to `close`.

    Args:
        profile: an empty folder for the browser's files.
        dark: whether pages see a dark colour scheme.

    Raises:
        NoBrowser: Chromium or chromedriver is missing or does not start.
    """

    def __init__(self, profile: Path, dark: bool = False) -> None:
        driver = shutil.which("chromedriver")
        binary = shutil.which("chromium") or shutil.which("google-chrome")
        if not driver or not binary:
            raise NoBrowser("needs chromium and chromedriver (Debian's package chromium-driver)")
        self._process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self._address = f"http://127.0.0.1:{self._port()}"
            arguments = [
                "--headless=new",
                "--no-sandbox",  # Chromium's own sandbox does not start for root in a container
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            ]
            capabilities = {
                "goog:chromeOptions": {"binary": binary, "args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = self._request(
                "POST", "/session", {"capabilities": {"alwaysMatch": capabilities}}
            )
            self._session = f"/session/{answer['sessionId']}"
        except (OSError, ValueError) as error:
            self._process.kill()
            self._process.wait()
            raise NoBrowser(f"chromedriver does not start Chromium: {error}") from error

    def _port(self) -> int:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise ValueError("chromedriver ended without a port")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Loads a page. Its scripts have run when this returns."""
        self._request("POST", f"{self._session}/url", {"url": page.as_uri() + fragment})

    def run(self, script: str) -> Any:
        """Runs JavaScript in the page and returns what it returns."""
        return self._request(
            "POST", f"{self._session}/execute/sync", {"script": script, "args": []}
        )

    def press(self, key: str) -> None:
        """Presses and releases a key, named by WebDriver's code."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._request("POST", f"{self._session}/actions", body)

    def errors(self) -> list[str]:
        """Returns the errors and warnings in the console since the last call."""
        entries = self._request("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def close(self) -> None:
        """Ends the browser."""
        try:
            self._request("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait()
