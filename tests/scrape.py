"""What a server tells Prometheus, asked for over HTTP and read by Prometheus's own parsers."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping

from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

from tests.conftest import Served, wait_until

OPEN = "application/openmetrics-text; version=1.0.0"


class Scrape(Mapping[str, float]):
    """Samples by `name{label="value",...}`, labels in the order of the alphabet; in both formats the same."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.text = text(address)
        self._samples = samples(plain_families(self.text))

    def __getitem__(self, name: str) -> float:
        return self._samples[name]

    def __iter__(self) -> object:  # type: ignore[override]
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def counted(self, name: str) -> dict[str, float]:
        """What is not 0 of a metric: its labels' values, joined by spaces, to the number."""
        found = {}
        for sample, value in self._samples.items():
            if sample.partition("{")[0] == name and value:
                found[" ".join(re.findall(r'="([^"]*)"', sample))] = value
        return found


def samples(families: object) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in families:  # type: ignore[attr-defined]
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def text(address: str, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=20) as response:
        kind = response.headers["content-type"]
        assert kind.startswith("application/openmetrics-text" if accept == OPEN else "text/plain; version=0.0.4"), kind
        return str(response.read().decode())


def open_samples(address: str) -> dict[str, float]:
    """As OpenMetrics, whose parser is strict: names, types, the order of buckets, the end."""
    return samples(open_families(text(address, OPEN)))


def metrics_of(served: Served) -> str:
    """Where a server has its metrics."""
    found = wait_until(lambda: re.search(r"metrics are at http://(\S+)/metrics", served.log_text()))
    return str(found[1])


def until(address: str, **wanted: dict[str, float]) -> Scrape:
    """A scrape in which these metrics have counted this: what a call did is counted when its peer has its answer."""

    def look() -> Scrape | None:
        scrape = Scrape(address)
        return scrape if {name: scrape.counted(name) for name in wanted} == wanted else None

    try:
        return wait_until(look, seconds=20)  # type: ignore[no-any-return]
    except BaseException:
        scrape = Scrape(address)
        print({name: scrape.counted(name) for name in wanted}, "is not", wanted)
        raise
