"""What a run takes on a cluster: arithmetic of time, memory and money, and what is said where it does not fit."""

import json

import pytest
from click.testing import CliRunner

from cluster.profiles import Profile, ProfileFile, read
from datasets_prep.errors import UserError
from jobs import recipes
from jobs.cli import cli
from jobs.forecast import Forecast, at, forecast
from jobs.plan import outline
from service.engine.footprint import KINDS, Footprint
from tests.families import GROUP, family_config

GIB = 2**30


def made(*changes, samples=None, recipe="ijepa-vitb-imagenet"):
    return outline(recipes.load(recipe, changes), samples)


def on(profile, peak_gib, *changes, recipe="ijepa-vitb-imagenet", world=8, data=0):
    memory = dict.fromkeys(KINDS, 0) | {"activations": int(peak_gib * GIB)}
    config, file = recipes.load(recipe, [f"parallel.workers={world}", *changes]), read(profile)
    found = Footprint(memory, 1e12, {"context_encoder": 86_000_000}, 86_000_000, 10**9)
    return Forecast(config, profile, file, world, 1, file.node.gpus > 0, found, data, 3600)


def cpu_cluster(memory_gib, **changes):
    node = {"cpus": 4, "memory_gib": memory_gib, "shm_gib": 0.5, "disk_gib": 10}
    return ProfileFile.model_validate({"nodes": 1, "node": node, **changes})


def test_steps_follow_from_a_number_of_samples_or_a_public_size():
    assert made(samples=1_281_167).steps_per_epoch == 1_281_167 // 64 // 32
    assert made().samples == 1_281_167 - 128_117
    with pytest.raises(UserError, match="give --samples"):
        made("data.uri=s3://mine/photos")
    with pytest.raises(UserError, match="lower data.batch_size"):
        made(samples=1000)


def test_time_and_cost_are_the_work_over_the_range_of_speeds():
    found = on("a100x8", 10)
    assert found.tflops == pytest.approx((0.2 * 312, 0.45 * 312))
    assert found.hours == pytest.approx((1 / (0.45 * 312), 1 / (0.2 * 312)))  # 3600 steps of 1 TFLOP
    assert found.cost == pytest.approx(tuple(27.44705 * hours for hours in found.hours))
    assert on("rtx4090", 10, world=1).cost is None


def test_no_precision_is_faster_than_the_one_that_the_profile_calls_fastest():
    fast, slow = on("a100x8", 10), on("a100x8", 10, "compute.precision=fp32")
    assert slow.tflops == pytest.approx((0.2 * 19.5, 0.45 * 19.5))
    assert dict(fast.rows())["precision"] == "bf16"
    assert dict(slow.rows())["precision"] == "fp32; a100x8 is fastest in bf16: compute.precision=bf16"
    cores = on("cpu-cluster", 10, "parallel.cpus_per_worker=2")
    assert cores.tflops == pytest.approx((2 * 0.02, 2 * 0.12))
    assert dict(cores.rows())["precision"].startswith("bf16; cpu-cluster is fastest in fp32")
    assert (cores.summary()["precision"], cores.summary()["fastest_precision"]) == ("bf16", "fp32")


def test_memory_counts_the_process_its_peers_and_resident_data():
    assert on("rtx4090", 10, world=1).needed_gib == pytest.approx(10 * 1.05 + 1)
    assert on("a100x8", 10, data=2 * GIB).needed_gib == pytest.approx(12 * 1.05 + 2)
    assert on("rtx4090", 21, world=1).fits and not on("rtx4090", 22, world=1).fits
    assert on("a100x8", 73).fits and not on("a100x8-40gb", 73).fits


def test_what_does_not_fit_is_refused_with_the_cheapest_setting_that_does():
    config = family_config("image_vicreg", "data.batch_size=4096", "compute.device=cpu", *GROUP)
    plan = outline(config, 100_000)
    whole = forecast(plan, "big", cpu_cluster(64))
    enough = 1 + whole.footprint.peak / GIB / 3
    with pytest.raises(UserError, match=r"use parallel.micro_batch=\d+, which needs") as refused:
        forecast(plan, "small", cpu_cluster(enough))
    size = int(str(refused.value).split("micro_batch=")[1].split(",")[0])
    parallel = config.parallel.model_copy(update={"micro_batch": size})
    assert forecast(outline(config.model_copy(update={"parallel": parallel}), 100_000), "small", cpu_cluster(enough))
    with pytest.raises(UserError, match="take a smaller encoder"):
        forecast(plan, "tiny", cpu_cluster(1.0))


def test_workers_that_no_node_has_room_for_are_refused():
    plan = outline(family_config("image_vicreg", "parallel.workers=4", "parallel.cpus_per_worker=3"), 10_000)
    with pytest.raises(UserError, match="needs 12 CPUs, the cluster has 4"):
        forecast(plan, "small", cpu_cluster(64))
    with pytest.raises(UserError, match="3 nodes.*room for 1 workers.*needs 4"):
        forecast(plan, "narrow", cpu_cluster(64, nodes=3, interconnect={"between": "ethernet"}))
    with pytest.raises(UserError, match="need 8 GPUs, the cluster has 1"):
        forecast(made(), "rtx4090", read("rtx4090"))


def test_the_command_prints_a_line_for_programs_and_names_profiles():
    arguments = ["plan", "demo", "--samples", "1000", "family.encoder.width=8", "parallel.workers=1", "--json"]
    done = CliRunner().invoke(cli, [*arguments, "--cluster", "cpu-cluster"], catch_exceptions=False)
    row = json.loads(done.output)
    assert row["steps"] == row["steps_per_epoch"] * recipes.load("demo").schedule.epochs
    assert sum(row["memory_bytes"].values()) / GIB + 1 == pytest.approx(row["memory_needed_gib"])
    assert row["memory_gib"] == 64 and row["nodes"] == 1 and row["package_bytes"] > 100_000
    unknown = CliRunner().invoke(cli, [*arguments, "--cluster", "a100x9"])
    assert "unknown profile" in str(unknown.exception) and "a100x8" in str(unknown.exception)


def test_a_step_is_traced_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    settings = ["family.encoder.depth=8", "compute.device=cpu"]
    first = forecast(outline(family_config("image_vicreg", *settings), 1000), "small", cpu_cluster(64))
    [kept] = (tmp_path / "footprints").iterdir()
    kept.write_text(kept.read_text().replace(f'"flops": {first.footprint.flops}', '"flops": 7.0'))
    longer = family_config("image_vicreg", *settings, "name=other", "checkpoint.keep_last=5")
    assert forecast(outline(longer, 1000), "small", cpu_cluster(64)).footprint.flops == 7.0
    forecast(outline(family_config("image_vicreg", *settings, "data.batch_size=32"), 1000), "small", cpu_cluster(64))
    assert len(list((tmp_path / "footprints").iterdir())) == 2


def test_a_live_machine_has_the_cpus_that_ray_was_given():
    machine = {"name": "local", "jobs_address": "x", "tracking_uri": "x", "storage_uri": "x", "env": {}, "gpus": 0}
    plan = outline(
        family_config("image_vicreg", "parallel.workers=64", "data.batch_size=128", "data.partitions=64"), 10_000
    )
    found = at(plan, Profile(**machine, cpus=64, file=cpu_cluster(64 * 3)))
    assert found.world == 64 and found.room_gib == pytest.approx(3)
    assert at(plan, Profile(**machine, cpus=64, file=None)) is None
