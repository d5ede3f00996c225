"""Looks at pages in headless Chromium: ``python docs/look.py URL_OR_FILE... --output DIR``.

Each page is opened as on a desktop and as on a phone. Its picture is written into the folder, and these are errors (exit status 1): errors on
the console, exceptions and files that do not load, a page that scrolls sideways, and labels of drawings that are cut off. Chromium must be
installed (``apt-get install chromium``); it is driven through its pipe, so that nothing else is needed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREENS = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
"""Width and height in pixels, and whether it is a phone."""

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--force-color-profile=srgb",
)  # fmt: skip

FAULTS = """(() => {
  const found = [], root = document.documentElement, wide = root.clientWidth;
  if (root.scrollWidth > wide) {
    const scrolls = e => e && e !== document.body && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const out = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e.parentElement));
    found.push(`scrolls sideways: ${root.scrollWidth} of ${wide} pixels: ` + out.slice(-3).map(e => e.outerHTML.slice(0, 90)).join(' | '));
  }
  for (const label of document.querySelectorAll('svg text')) {
    const inner = label.getBoundingClientRect(), outer = label.ownerSVGElement.getBoundingClientRect();
    if (!inner.width) continue;
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1)
      found.push(`label cut off: ${label.textContent}`);
  }
  for (const image of document.images) if (!image.complete || !image.naturalWidth) found.push(`image not shown: ${image.src.slice(0, 90)}`);
  return found;
})()"""


class Browser:
    """A browser that is driven by the DevTools protocol, of which messages end in a zero byte."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = os.fdopen(send, "wb", 0), os.fdopen(receive, "rb", 0)
        self._last, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method, and return what it answers. Events that arrive before are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        self._send.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Wait for an event."""
        while not any(each.get("method") == event for each in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._receive.read(1 << 20)
            if not part:
                raise RuntimeError(
                    "Chromium ended unexpectedly. Try to start it by hand: chromium --headless --no-sandbox about:blank"
                )
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the context."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise SystemExit("There is no Chromium: apt-get install chromium")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads messages from file 3 and writes answers to file 4.
        shell = ["sh", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "sh"]
        command = [*shell, program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            process.terminate()
            process.wait(30)


def look(browser: Browser, url: str, screen: str, scheme: str, picture: Path) -> list[str]:
    """Open a page, write its picture, and return what is wrong with it."""
    width, height, mobile = SCREENS[screen]
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
        browser.call(f"{domain}.enable", session)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
    browser.call("Emulation.setDeviceMetricsOverride", session, **metrics)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", session, features=media)
    browser.events.clear()
    failed = browser.call("Page.navigate", session, url=url).get("errorText")
    if failed:
        return [f"does not open: {failed}"]
    browser.wait_for("Page.loadEventFired")
    found = browser.call("Runtime.evaluate", session, expression=FAULTS, returnByValue=True)["result"]["value"]
    size = browser.call("Page.getLayoutMetrics", session)["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
    shot = browser.call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)
    picture.write_bytes(base64.b64decode(shot["data"]))
    found += [problem for event in browser.events if (problem := console_error(event))]
    browser.call("Target.closeTarget", targetId=target)
    return found


def console_error(event: dict[str, Any]) -> str | None:
    """What an event says went wrong, if it says so."""
    parameters, method = event.get("params", {}), event.get("method")
    if method == "Runtime.exceptionThrown":
        details = parameters["exceptionDetails"]
        return f"exception: {details.get('exception', {}).get('description', details['text'])}"
    if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
        return "console: " + " ".join(
            str(each.get("value", each.get("description", ""))) for each in parameters["args"]
        )
    if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        return f"console: {parameters['entry']['text']} {parameters['entry'].get('url', '')}"
    return None


def main() -> int:
    """Look at all pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", metavar="URL_OR_FILE")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--dark", action="store_true", help="also in dark colours")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    faults = 0
    with browser() as opened:
        for page in options.pages:
            url = page if "://" in page else Path(page).resolve(strict=True).as_uri()
            name = re.sub(r"[^\w.-]+", "_", page.split("://")[-1]).strip("_.")
            for screen in SCREENS:
                for scheme in ("light", "dark") if options.dark else ("light",):
                    picture = options.output / f"{name}.{screen}{'.dark' if scheme == 'dark' else ''}.png"
                    found = look(opened, url, screen, scheme, picture)
                    faults += len(found)
                    print(f"{'FAULTS' if found else 'good'}  {screen:8} {scheme:6} {page}", *found, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
