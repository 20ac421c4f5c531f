"""h2spec's HTTP/2 and HPACK conformance cases against a real server.

h2spec asks with GET and POST as a browser would, so nearly every answer it sees is an HTTP status without a call.
"""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.conftest import Serve, first_only, require
from tests.test_transport import Peer, honest

# Cases that do not apply to a gRPC server: case id -> why.
EXCEPTIONS = {
    "generic/2/2": "waits for DATA in the answer to a GET; a refusal by HTTP status has none",
    "generic/2/3": "waits for DATA in the answer to a GET; a refusal by HTTP status has none",
    "http2/5.1.2/1": "its requests are answered as fast as they come, so that there are never too many at once",
}
# Cases whose end depends on what comes first: their requests are no gRPC and may be refused before what is wrong comes
# (every frame held back for 20 ms, all of these fail). test_transport sends the same in calls that are under way.
SOMETIMES = {
    "http2/4.2/1": "its frame is as long as the server announces, and longer than the stream's window (RFC 9113 section"
    " 6.9.1)",
    "http2/6.9.1/3": "increases the window of a stream that has been refused",
    "http2/8.1/1": "a second HEADERS frame without END_STREAM",
    "http2/8.1.2.1/3": "a pseudo-header field in the trailers",
    **dict.fromkeys(("http2/8.1.2.6/1", "http2/8.1.2.6/2"), "a payload that is not as long as content-length says"),
}


@first_only("frames are cut and answered by h2 and by transport/, the same on every Python")
def test_h2spec(serve: Serve, tmp_path: Path) -> None:
    program = require("h2spec")
    served = serve("Async")
    report = tmp_path / "report.xml"
    options = ["--host", "127.0.0.1", "--port", str(served.port), "--path", "/ai.AI/chaos", "--timeout", "3"]
    subprocess.run([program, *options, "--junit-report", str(report)], check=False, capture_output=True, timeout=300)

    passed, failed = set(), {}
    text = re.sub("[\x00-\x08\x0b-\x1f]", "?", report.read_text(errors="replace"))  # it quotes bytes as they came
    for suite in ET.fromstring(text).iter("testsuite"):
        for number, case in enumerate(suite.iter("testcase"), start=1):
            name = f"{case.get('package')}/{number}"
            problem = case.find("failure") if case.find("error") is None else case.find("error")
            if problem is not None:
                failed[name] = f"{case.get('classname')}: {problem.text}"
            elif case.find("skipped") is None:
                passed.add(name)

    assert len(passed) + len(failed) > 130, "it did not come to its end"
    assert {name: why for name, why in failed.items() if name not in EXCEPTIONS | SOMETIMES} == {}
    assert EXCEPTIONS.keys() & passed == set(), "passes now: no exception any more"
    with Peer(served) as peer:
        honest(peer)
    assert "Traceback" not in served.log_text()
