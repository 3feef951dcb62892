"""A headless Chromium, driven over a pipe by the DevTools protocol with the standard library alone.

The browser is the one that the variable BROWSER names, or the first Chromium or Chrome on the path.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile

from waiting import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
MISSING = "no browser: install Chromium or Chrome, or name one in the variable BROWSER"


def find_browser():
    """The browser to use; None where there is none."""
    return shutil.which(os.environ.get("BROWSER") or "") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with a fresh profile; `open` gives a page."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="profile-")
        read, self.write = os.pipe()
        self.read, write = os.pipe()

        def hand_over():  # the browser reads file 3 and writes file 4
            spare = os.dup(write)
            os.dup2(read, 3)
            os.dup2(spare, 4)

        self.process = subprocess.Popen(
            [find_browser(), *FLAGS, f"--user-data-dir={self.profile}"],
            pass_fds=(3, 4, read, write), preexec_fn=hand_over, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.buffer, self.count, self.events = b"", 0, []
        return self

    def __exit__(self, *_):
        os.close(self.write)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, session=None, **parameters):
        """The result of one command of the protocol; what arrives meanwhile is kept in `events`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def receive(self):
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            got = os.read(self.read, 1 << 20)
            assert got, "the browser has gone"
            self.buffer += got
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def wait_for(self, session, method):
        """Until an event has arrived."""
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self.receive())

    def open(self, path, width=1280, height=900, dark=False):
        """A page, a file or an address, loaded, in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        self.wait_for(session, "Page.loadEventFired")
        return page


class Page:
    """One page: what it logged, what a script finds in it, what it looks like."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def resize(self, width, height=900):
        """A window of this size, in CSS pixels; under 600 a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def evaluate(self, script):
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self):
        """Errors, warnings and messages of the console, and every request but the page itself."""
        self.evaluate("0")
        told = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded":
                told.append(parameters["entry"]["text"])
            elif method == "Runtime.consoleAPICalled":
                told.append(f"console.{parameters['type']}")
            elif method == "Runtime.exceptionThrown":
                told.append(parameters["exceptionDetails"]["text"])
            elif method == "Network.requestWillBeSent" and parameters.get("type") != "Document":
                told.append(f"request for {parameters['request']['url'][:200]}")
        return told

    def screenshot(self, path, whole=True):
        """PNG of the whole page, or of the window."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, fromSurface=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path):
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"]))


if __name__ == "__main__" and find_browser() is None:
    sys.exit(f"error: {MISSING}")
