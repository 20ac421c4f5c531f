"""deploy/: each file in the program that it is for, or against its schema, and what must agree does.

The container's start, its health check and its end are run as they are written, in namespaces of their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dockerfile_parse
import kubernetes_validate
import pytest
import yaml

from aipod.cli.nginx_check import audit
from aipod.cli.options import Seconds
from aipod.cli.serve import OPTIONS
from aipod.config import Config
from aipod.identity import add_token
from aipod.transport.listeners import BACKLOG
from tests.conftest import ROOT, Serve, children, first_only, free_port, left_in, missing, require, wait_until
from tests.test_cli import aipod
from tests.test_nginx_conf import made_by

pytestmark = first_only("what is in deploy/ is read by systemd, Kubernetes and Docker")
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CARELESS = "tests.models_deploy:Careless"
# The oldest Kubernetes with gRPC probes, and the newest that the schemas know.
VERSIONS = ("1.27.0", kubernetes_validate.latest_version())


def test_every_file_is_looked_at() -> None:
    """Here, or nginx.conf in tests/test_nginx_conf.py. A new file needs a test."""
    found = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert found == {
        *("README.md", "nginx.conf", "Containerfile"),
        *(f"kubernetes/{name}" for name in ("kustomization.yaml", "nginx.conf", "nginx.yaml", "scan.yaml")),
        *(f"systemd/aipod{name}" for name in ("@.service", "@.socket", ".sysusers.conf")),
    }


def longest_stop(arguments: list[str]) -> float:
    """Seconds that a server with these arguments may take to end."""
    given = {option(word): word.partition("=")[2] for word in arguments}
    return Config(
        drain=Seconds().convert(given["drain"], None, None) if "drain" in given else Config().drain
    ).longest_stop


def option(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def served_as(arguments: list[str], changes: dict[str, str]) -> list[str]:
    """The arguments, all of which must be known, with other values."""
    assert {option(word) for word in arguments if word.startswith("--")} <= {*OPTIONS, "config"}
    return [
        f"{word.partition('=')[0]}={changes[option(word)]}" if option(word) in changes else word for word in arguments
    ]


# ---- the container


class Container:
    """What deploy/Containerfile says."""

    def __init__(self) -> None:
        text = io.BytesIO((DEPLOY / "Containerfile").read_bytes())
        parser = dockerfile_parse.DockerfileParser(fileobj=text)
        self.steps = [
            (step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"
        ]
        starts = [number for number, (name, _) in enumerate(self.steps) if name == "FROM"]
        self.first, self.last = self.steps[: starts[-1]], self.steps[starts[-1] :]

    def all(self, name: str) -> list[str]:
        return [value for step, value in self.last if step == name]

    def one(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    @property
    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for value in self.all("ENV") for pair in shlex.split(value))


@pytest.fixture(scope="module")
def container() -> Container:
    return Container()


def test_the_container_is_small_and_is_nobody(container: Container) -> None:
    (base,) = {value for step, value in container.steps if step == "ARG"}
    assert re.match(r"PYTHON=3\.1[123]\.\d+-slim-\w+$", base), "one Python that this runs on, and one Debian"
    images = [value.split()[0] for step, value in container.steps if step == "FROM"]
    assert images == ["docker.io/library/python:${PYTHON}"] * 2
    assert re.match(r"[1-9]\d*:[1-9]\d*$", container.one("USER"))
    assert [step for step, _ in container.last].index("USER") > max(
        number for number, (step, _) in enumerate(container.last) if step in ("RUN", "COPY")
    )
    # Nothing is built there: it has one package of Debian's, and what the other stage has built.
    packages = [word for run in container.all("RUN") for word in re.findall(r"install -y (.*?) *&&", run)]
    assert packages == ["--no-install-recommends tini"]
    assert not any("pip" in run for run in container.all("RUN"))
    assert [value.split()[0] for value in container.all("COPY")] == ["--from=build"]
    sources = [word for step, value in container.first if step == "COPY" for word in value.split()[:-1]]
    assert sources == ["pyproject.toml", "README.md", "LICENSE", "aipod"]
    assert all((ROOT / source).exists() for source in sources)


def test_what_the_container_says_agrees(container: Container) -> None:
    settings = {name: value for name, value in container.env.items() if name.startswith("AIPOD_")}
    assert {name.removeprefix("AIPOD_").lower() for name in settings} <= set(OPTIONS)
    assert json.loads(container.one("VOLUME")) == [settings["AIPOD_SPOOL"], settings["AIPOD_DATA"]]
    assert container.env["HOME"] == os.path.dirname(settings["AIPOD_SPOOL"])
    assert settings["AIPOD_BIND"] == f"0.0.0.0:{container.one('EXPOSE')}"
    assert settings["AIPOD_BIND"].rpartition(":")[2] == Config().bind[0].rpartition(":")[2], "as the health check asks"
    assert container.one("STOPSIGNAL") == "SIGTERM"
    assert container.env["PATH"].split(":")[0] == "/opt/aipod/bin"
    text = (DEPLOY / "Containerfile").read_text()
    assert all(int(seconds) >= Config().longest_stop for seconds in re.findall(r"--stop-timeout (\d+)", text))


class Running:
    """The container's command, as an unprivileged user, in a process namespace of its own."""

    def __init__(self, container: Container, directory: Path, model: str) -> None:
        for program in ("unshare", "tini"):
            require(program)
        user, _, group = container.one("USER").partition(":")
        unshare = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"]
        unshare += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        if subprocess.run([*unshare, "true"], capture_output=True).returncode:
            missing("this system gives no user namespaces")
        self.spool = directory / "spool"
        where = {"SPOOL": str(self.spool), "DATA": str(directory / "data"), "BIND": f"127.0.0.1:{free_port()}"}
        env = {**container.env, **{f"AIPOD_{name}": value for name, value in where.items()}}
        # /opt/aipod is the environment that the tests run in.
        paths = [str(Path(sys.executable).parent), *env["PATH"].split(":")[1:], *os.environ["PATH"].split(":")]
        env["HOME"] = str(directory)
        self.env = {**env, "PATH": ":".join(paths), "AIPOD_TO": where["BIND"], "AIPOD_RESERVE": "0"}
        assert json.loads(container.one("CMD")) == ["serve"]
        command = [*json.loads(container.one("ENTRYPOINT")), "serve", model]
        with (directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                [*unshare, *command], env=self.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"aipod listening on {where['BIND']}\n", (
            directory / "log"
        ).read_text()
        (self.first,) = (pid for pid in children(self.process.pid) if parent(pid) == self.process.pid)

    def aipod(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["aipod", *arguments]
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def below(pid: int) -> list[str]:
    """The commands of the children of a process, also of those that have ended and were not reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == pid:
                found.append(name)
    return sorted(found)


@pytest.fixture
def running(container: Container, tmp_path: Path) -> Iterator[Running]:
    running = Running(container, tmp_path, CARELESS)
    yield running
    running.process.kill()  # and with it all that is in its namespace
    running.process.communicate()


def test_the_container_starts_reaps_answers_and_drains(container: Container, running: Running, tmp_path: Path) -> None:
    """Mutant seen: without tini aipod is process 1, and what the model's program has left is never reaped."""
    options, _, check = container.one("HEALTHCHECK").partition(" CMD ")
    assert {"--interval", "--timeout", "--start-period", "--retries"} == set(re.findall(r"--[a-z-]+", options))
    health = json.loads(check)
    assert health[0] == "aipod"
    done = running.aipod(*health[1:])
    assert (done.returncode, done.stdout) == (0, "SERVING\n")

    status = Path(f"/proc/{running.first}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    done = running.aipod("call", "orphan")
    assert (done.returncode, done.stdout) == (0, '"left"\n')
    wait_until(lambda: "sleep" not in below(running.first))

    call = ["aipod", "call", "wait_for", "-k", f"file={json.dumps(str(tmp_path / 'go'))}"]
    with subprocess.Popen(call, env=running.env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        wait_until(lambda: "working" in (tmp_path / "log").read_text())
        # As a container is stopped: process 1 is told.
        os.kill(running.first, getattr(signal, container.one("STOPSIGNAL")))
        wait_until(lambda: "draining" in (tmp_path / "log").read_text())
        done = running.aipod(*health[1:])
        assert (done.returncode, done.stdout) == (0, "SERVING\n"), "who drains is to be left alone"
        (tmp_path / "go").touch()
        assert caller.communicate(timeout=60)[0] == '"waited"\n'
    assert running.process.wait(60) == 0
    assert running.aipod(*health[1:]).returncode == 3
    assert left_in(running.spool, uploads=False) == []


# ---- Kubernetes


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    both = documents("scan.yaml") + documents("nginx.yaml")
    return {one["metadata"]["name"]: one for one in both if one["kind"] == kind}


@pytest.fixture
def pod() -> dict[str, Any]:
    return of_kind("StatefulSet")["scan"]["spec"]["template"]["spec"]


@pytest.fixture
def server(pod: dict[str, Any]) -> dict[str, Any]:
    (server,) = pod["containers"]
    return server


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["scan.yaml", "nginx.yaml"])
def test_the_manifests_keep_to_the_schema(name: str, version: str) -> None:
    """Strictly: a word that is not in it is an error. Mutant seen: runAsNonRoot one level higher."""
    found = documents(name)
    assert len(found) > 2
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_server_has_the_time_to_drain(pod: dict[str, Any], server: dict[str, Any]) -> None:
    assert pod["terminationGracePeriodSeconds"] >= longest_stop(server["args"])
    nginx = of_kind("Deployment")["aipod-nginx"]["spec"]["template"]["spec"]
    assert nginx["terminationGracePeriodSeconds"] >= longest_stop(server["args"])


PROBES = {"startupProbe": "liveness", "livenessProbe": "liveness", "readinessProbe": "readiness"}


def test_the_probes_ask_for_what_a_server_knows(serve: Serve, server: dict[str, Any]) -> None:
    """A probe of a name that there is not would have every pod killed, again and again."""
    port = server["args"][[option(word) for word in server["args"]].index("bind")].rpartition(":")[2]
    assert {name: server[name]["grpc"] for name in PROBES} == {
        name: {"port": int(port), "service": service} for name, service in PROBES.items()
    }
    served = serve(CARELESS)
    for service in set(PROBES.values()):
        assert aipod("health", service, "--to", served.address, forked=True).out == b"SERVING\n"
    starting = server["startupProbe"]
    assert starting["periodSeconds"] * starting["failureThreshold"] > Config().load_timeout


def test_a_server_takes_the_arguments(serve: Serve, server: dict[str, Any], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    token = add_token(tokens, "alice", [], [])
    assert server["args"][0] == "serve"
    changes = {"tokens": str(tokens), "spool": str(tmp_path / "spool"), "data": str(tmp_path / "data")}
    served = serve(
        CARELESS, *served_as(server["args"][2:], {**changes, "bind": "127.0.0.1:0", "metrics": "127.0.0.1:0"})
    )
    done = aipod("call", "orphan", "--to", served.address, environ={"AIPOD_TOKEN": token}, forked=True)
    assert done.answer == "left"
    assert aipod("call", "orphan", "--to", served.address, forked=True).status == 1


def test_pods_are_nobody_and_may_nothing(container: Container) -> None:
    for kind, name in (("StatefulSet", "scan"), ("Deployment", "aipod-nginx")):
        pod = of_kind(kind)[name]["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert re.search(r":[0-9]", one["image"])
            assert {"memory"} == set(one["resources"]["limits"])
    user = of_kind("StatefulSet")["scan"]["spec"]["template"]["spec"]["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == container.one("USER")
    assert user["fsGroup"] == user["runAsGroup"]


def test_what_a_server_writes_is_on_a_volume(pod: dict[str, Any], server: dict[str, Any]) -> None:
    claims = of_kind("StatefulSet")["scan"]["spec"]["volumeClaimTemplates"]
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteOnce"]]
    volumes = {volume["name"] for volume in pod["volumes"]} | {claim["metadata"]["name"] for claim in claims}
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert set(mounts) == volumes
    (state,) = (claim["metadata"]["name"] for claim in claims)
    given = {option(word): word.partition("=")[2] for word in server["args"]}
    assert all(given[name].startswith(mounts[state] + "/") for name in ("spool", "data"))
    assert given["tokens"].startswith(mounts["tokens"] + "/")
    assert mounts["tmp"] == "/tmp"


def test_names_and_ports_agree(server: dict[str, Any]) -> None:
    """From the caller to the pod."""
    services, sets = of_kind("Service"), of_kind("StatefulSet")["scan"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    given = {option(word): word for word in server["args"]}
    assert given["bind"].endswith(f":{ports['grpc']}")
    assert given["metrics"].endswith(f":{ports['metrics']}")
    labels = sets["template"]["metadata"]["labels"]
    assert sets["selector"]["matchLabels"] == labels
    headless = services[sets["serviceName"]]["spec"]
    assert (headless["clusterIP"], headless["selector"]) == ("None", labels)
    assert {port["name"]: port["port"] for port in headless["ports"]} == ports
    pods = [f"scan-{number}" for number in range(sets["replicas"])]
    for name in pods:
        assert services[name]["spec"]["selector"] == {"statefulset.kubernetes.io/pod-name": name}
        assert services[name]["spec"]["publishNotReadyAddresses"] is True, "to the end of a drain callers must find it"
        assert [port["port"] for port in services[name]["spec"]["ports"]] == [ports["grpc"]]
    for name, budget in of_kind("PodDisruptionBudget").items():
        assert budget["spec"]["selector"]["matchLabels"] == {"app": name}
    addresses = [f"{name}:{ports['grpc']}" for name in pods]
    assert f"--upstream=scan={','.join(addresses)}" in made_by(nginx_text())

    nginx = of_kind("Deployment")["aipod-nginx"]["spec"]
    assert services["aipod"]["spec"]["selector"] == nginx["template"]["metadata"]["labels"]
    (port,) = nginx["template"]["spec"]["containers"][0]["ports"]
    assert services["aipod"]["spec"]["ports"][0]["targetPort"] == port["containerPort"]
    assert f"--listen={port['containerPort']}" in made_by(nginx_text())
    (rule,) = (rule for rule in of_kind("NetworkPolicy")["scan"]["spec"]["ingress"] if "from" in rule)
    assert rule["from"] == [{"podSelector": {"matchLabels": nginx["template"]["metadata"]["labels"]}}]
    assert rule["ports"] == [{"port": ports["grpc"]}]


def nginx_text() -> str:
    return (KUBERNETES / "nginx.conf").read_text()


def test_nginx_in_kubernetes_has_what_it_needs() -> None:
    done = aipod(*made_by(nginx_text()), forked=True)
    assert done.out.decode() == nginx_text(), "as its first lines say"
    assert audit(KUBERNETES / "nginx.conf") == []
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["scan.yaml", "nginx.yaml"]
    pod = of_kind("Deployment")["aipod-nginx"]["spec"]["template"]["spec"]
    (one,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    (generated,) = kustomization["configMapGenerator"]
    assert volumes["configuration"]["configMap"]["name"] == generated["name"]
    assert f"{mounts['configuration']}/{generated['files'][0]}" in one["command"]
    (secret,) = kustomization["secretGenerator"]
    servers = of_kind("StatefulSet")["scan"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tokens", "secret": {"secretName": secret["name"]}} in servers
    assert secret["files"] == ["tokens.toml"]
    given = {option(word): word.partition("=")[2] for word in made_by(nginx_text())}
    assert given["run_dir"] == mounts["run"]
    assert given["tls_cert"].startswith(mounts["tls"] + "/")
    # kubernetes.io/tls: https://kubernetes.io/docs/concepts/configuration/secret/#tls-secrets
    assert [Path(given[name]).name for name in ("tls_cert", "tls_key")] == ["tls.crt", "tls.key"]


# ---- systemd


def unit(name: str) -> dict[str, list[str]]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], Path]:
    """Both units of the instance `scan`, for programs and paths of this machine."""
    aipod = Path(sys.executable).parent / "aipod"

    def path(kind: str) -> Path:
        text = (DEPLOY / "systemd" / f"aipod@.{kind}").read_text()
        text = text.replace("/opt/aipod/bin/aipod", str(aipod)).replace("/opt/aipod/models", str(ROOT))
        path = tmp_path / f"aipod@scan.{kind}"
        path.write_text(text)
        return path

    return path


def test_systemd_takes_the_units(installed: Callable[[str], Path]) -> None:
    """Mutant seen: a directive that there is not. The exposure is 1.6 of 10; what else there is breaks models."""
    analyze = require("systemd-analyze")
    service, socket = installed("service"), installed("socket")
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(service), str(socket)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    command = [analyze, "security", "--offline=yes", "--threshold=17", "--no-pager", str(service)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-200:]


def test_the_unit_agrees_with_the_server() -> None:
    service, socket = unit("aipod@.service"), unit("aipod@.socket")
    assert service["Type"] == ["notify"]
    assert service["KillMode"] == ["mixed"], "TERM is for the server alone: workers finish their jobs"
    assert service["OOMPolicy"] == ["continue"], "a worker that takes too much must not end the server"
    (seconds,) = service["TimeoutStopSec"]
    (command,) = service["ExecStart"]
    assert Seconds().convert(seconds, None, None) >= longest_stop(command.split())
    assert Seconds().convert(service["TimeoutStartSec"][0], None, None) > Config().load_timeout
    assert "aipod@%i.socket" in service["Requires"]
    assert socket["Backlog"] == [str(BACKLOG)]
    assert not {"MemoryDenyWriteExecute", "ProcSubset"} & set(service), "they break models"
    assert service["User"] == socket["SocketUser"] == ["aipod"]


def test_systemd_makes_the_user(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    command = [require("systemd-sysusers"), f"--root={tmp_path}", str(DEPLOY / "systemd" / "aipod.sysusers.conf")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (line,) = (tmp_path / "etc" / "passwd").read_text().splitlines()
    assert (line.split(":")[0], line.split(":")[5:]) == ("aipod", ["/var/lib/aipod", "/usr/sbin/nologin"])


def test_the_unit_starts_a_server_with_its_state(tmp_path: Path) -> None:
    """By its own command, with the file that its first lines show."""
    (command,) = unit("aipod@.service")["ExecStart"]
    program, *words = shlex.split(command.replace("/etc/aipod/%i.toml", str(tmp_path / "scan.toml")))
    assert Path(program).name == "aipod"
    (tmp_path / "scan.toml").write_text(f'[aipod]\nmodel = "{CARELESS}"\nbind = "127.0.0.1:0"\n')
    environ = {**os.environ, "STATE_DIRECTORY": str(tmp_path / "state")}
    command_here = [str(Path(sys.executable).parent / "aipod"), *words]
    with subprocess.Popen(command_here, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("aipod listening on ")
        process.terminate()
        assert process.wait(60) == 0
    assert (tmp_path / "state" / CARELESS.replace(":", ".") / "spool" / "app").read_text().strip()
