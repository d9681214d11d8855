"""A sweep before Ray Tune: its identity, its package and its job. One sweep, one name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.profiles import Profile
from datasets_prep.errors import UserError
from jobs import package, plan
from jobs.submit import Submission, begin, check_versions, planned
from jobs.sweep import Sweep
from jobs.train import STATE
from service import tracking
from service.config import RunConfig
from service.data.store import Store

PACKED = "sweep.json"
ENTRYPOINT = f"python -m jobs.tune {PACKED}"
IDENTITY, TRIALS = "sweep.json", "trials.json"


def identity(settings: Sweep, made: plan.Plan, code: str) -> dict[str, Any]:
    """What decides how a sweep goes, `code` by its hash; two of one name must have the same."""
    base = made.config.identity()
    return {"sweep": settings.identity(), "base": base, "fingerprint": made.fingerprint, "code": code}


def check_same(run: Store, mine: Mapping[str, Any]) -> None:
    """Refuse a name that belongs to another sweep, or to a run.

    Raises:
        UserError: it names what differs, and the fix.
    """
    if not run.exists(IDENTITY):
        if run.exists(STATE):
            raise UserError(f"{run.uri} is a run: give the sweep another name, such as name={mine['sweep']['name']}-2")
        return
    kept = json.loads(run.get(IDENTITY))["identity"]
    then, now = (dict(tracking.leaves(each)) for each in (kept, mine))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"{run.uri} is another sweep of that name: {what}{more}; set them back, or give this one another name, "
            f"such as name={mine['sweep']['name']}-2"
        )


def keep(run: Store, settings: Sweep, base: RunConfig, mine: Mapping[str, Any]) -> None:
    """Put into a sweep's folder what it is."""
    run.put(IDENTITY, json.dumps({"identity": mine, **packed(settings, base)}, indent=1).encode())


def packed(settings: Sweep, base: RunConfig) -> dict[str, Any]:
    """A sweep and the config that its trials share, as plain values."""
    return {"sweep": settings.plain(), "base": base.plain()}


def unpacked(text: str | bytes) -> tuple[Sweep, RunConfig]:
    """The sweep and the config that `packed` was given, from JSON."""
    tree = json.loads(text)
    return Sweep.model_validate(tree["sweep"]), RunConfig.model_validate(tree["base"])


def submit(settings: Sweep, made: plan.Plan, profile: Profile, *, dry_run: bool = False) -> Submission:
    """Start, continue, join or just find the sweep of that name."""
    check_versions(profile)
    tracking.check(profile.tracking_uri)
    code = package.collect()
    mine = identity(settings, made, code.hash)
    check_same(Store(profile.storage_uri).sub(settings.name), mine)
    document = json.dumps(packed(settings, made.config), indent=1).encode()
    with tempfile.TemporaryDirectory(prefix="tessera-package-") as scratch:
        built = package.write(code, {PACKED: document}, Path(scratch) / "package.zip")
        facts = {"run": settings.name, "recipe": made.config.name, "commit": code.commit or "none"}
        facts |= {"steps": str(made.steps), "entrypoint": ENTRYPOINT, "identity": package.digest(mine)}
        done = planned(settings.name, built) if dry_run else begin(profile, built, facts)
    return replace(done, commit=code.commit, untracked=code.untracked)
