"""A headless Chromium that the tests look at pages with, over the DevTools protocol.

Only so can a page be seen as it is: what it holds need not be changed to be measured, and a window
may be as narrow as a phone's.
"""

import base64
import collections
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time

PROGRAM = shutil.which("chromium")
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab. What happens in it is kept in `events`, a list for each method of the protocol."""

    def __init__(self, to_browser, from_browser, *, seconds=60):
        """Takes the two ends of the pipes; nothing may take longer than `seconds`."""
        self._to, self._from, self._seconds = to_browser, from_browser, seconds
        self._unread = b""
        self._last = 0
        self._session = {}
        self.events = collections.defaultdict(list)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Calls a method of the protocol; its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, url, *, width, height=800, scheme="light"):
        """Opens a page in a window of this size, and waits until all of it is there."""
        self.resize(width, height=height)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        assert "errorText" not in self.call("Page.navigate", url=url)
        while not self.events["Page.loadEventFired"]:
            self._receive()

    def resize(self, width, *, height=800):
        """Gives the window another size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def evaluate(self, expression):
        """The value of an expression in JavaScript; the page's policy does not hold for it."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self):
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _receive(self):
        end = time.monotonic() + self._seconds
        while b"\0" not in self._unread:
            left = max(0, end - time.monotonic())
            if not select.select([self._from], [], [], left)[0]:
                raise TimeoutError(f"Chromium said nothing for {self._seconds} s")
            piece = os.read(self._from, 2**20)
            if not piece:
                raise EOFError("Chromium ended")
            self._unread += piece
        message, self._unread = self._unread.split(b"\0", 1)
        answer = json.loads(message)
        if "method" in answer:
            self.events[answer["method"]].append(answer["params"])
        return answer


@contextlib.contextmanager
def browser(profile):
    """Starts Chromium with a profile in this folder, and ends it."""
    read_there, to_browser = os.pipe()
    from_browser, write_there = os.pipe()
    # Chromium reads from file descriptor 3 and writes to 4; the pipes must not have these already.
    far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_there, write_there)]
    redirected = f'exec "$@" 3<&{far[0]} 4>&{far[1]}'
    process = subprocess.Popen(
        ["bash", "-c", redirected, "", PROGRAM, *_OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=far,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for descriptor in (read_there, write_there, *far):
        os.close(descriptor)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        os.killpg(process.pid, signal.SIGKILL)  # renderers and all
        process.wait(30)
