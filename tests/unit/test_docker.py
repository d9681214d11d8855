"""Dockerfiles, compose file, Prometheus and Grafana agree with each other, with Ray and with what a run logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.profiles import read
from cluster.render import IMAGE, render
from tests.images import instructions

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "tessera.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def _provisioned(what: str) -> dict:
    return yaml.safe_load((DOCKER / "grafana" / "provisioning" / what / "tessera.yaml").read_text())


@pytest.mark.parametrize("name", ["train", "serve", "tracking"])
def test_a_dockerfile_is_clean_pinned_and_without_root(name):
    path = DOCKER / f"{name}.Dockerfile"
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(hadolint), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    steps = instructions(path)
    bases = [rest.split()[0] for word, rest in steps if word == "FROM"]
    assert bases == ["${BASE}"] * 2 and re.search(r":\d+\.\d+\.\d+-", dict(steps)["ARG"] + steps[0][1])
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]


@pytest.mark.parametrize("name", ["train", "serve", "tracking"])
def test_what_a_dockerfile_copies_is_there_and_not_ignored(name):
    ignore = (DOCKER / f"{name}.Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*"
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    copied = [
        source
        for word, rest in instructions(DOCKER / f"{name}.Dockerfile")
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed) and all((ROOT / source).exists() for source in copied)


def test_the_image_of_nodes_has_what_ray_s_launcher_runs_and_the_home_that_it_mounts_files_in():
    steps = instructions(DOCKER / "train.Dockerfile")
    (installed,) = [rest for word, rest in steps if word == "RUN" and "apt-get install" in rest]
    assert {"openssh-client", "rsync"} < set(installed.split())
    assert any(word == "ENV" and "HOME=/home/tessera" in rest for word, rest in steps)


def test_compose_takes_the_stack():
    schema = (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    validator = jsonschema.Draft202012Validator(json.loads(schema))
    validator.validate(COMPOSE)
    broken = COMPOSE | {"services": {"head": {"imagge": "x"}}}
    with pytest.raises(jsonschema.ValidationError, match="imagge"):
        validator.validate(broken)


def test_the_stack_is_whole():
    services, volumes = COMPOSE["services"], set(COMPOSE["volumes"])
    for name, service in services.items():
        assert service["image"] == IMAGE or re.search(r":v?\d+\.\d+", service["image"]), name
        for other in (needed := service.get("depends_on", {})):
            assert "healthcheck" in services[other] or isinstance(needed, list), (name, other)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in volumes if not source.startswith(".") else (DOCKER / source).exists()
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")


def test_secrets_of_the_stack_come_from_outside():
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|TOKEN|ACCESS_KEY", name):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?\}", value), name


def test_what_a_profile_changes_belongs_to_the_stack():
    (text,) = render("compose", "rtx4090", read("rtx4090")).values()
    changed = yaml.safe_load(text)["services"]
    assert set(changed) < set(COMPOSE["services"])
    assert changed["worker"]["environment"].keys() - COMPOSE["services"]["worker"]["environment"].keys() == set()


def test_prometheus_asks_ray_where_it_answers():
    (job,) = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    (dns,) = job["dns_sd_configs"]
    for name in dns["names"]:
        assert f"--metrics-export-port={dns['port']}" in COMPOSE["services"][name]["command"]


def test_grafana_is_given_the_sources_that_its_panels_read():
    sources = {source["uid"]: source["type"] for source in _provisioned("datasources")["datasources"]}
    assert len(PANELS) == 15
    for panel in PANELS:
        assert sources[panel["datasource"]["uid"]] == panel["datasource"]["type"]
    urls = [source["url"] for source in _provisioned("datasources")["datasources"]]
    assert {url.removeprefix("http://").split(":")[0] for url in urls} <= set(COMPOSE["services"])
    (provider,) = _provisioned("dashboards")["providers"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


def test_the_panels_read_metrics_that_ray_exports():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    read_by_panels = {
        name for p in PANELS for target in p["targets"] for name in re.findall(r"ray_(\w+)", target.get("expr", ""))
    }
    assert len(read_by_panels) == 9 and read_by_panels <= set(METRICS_GAUGES)
