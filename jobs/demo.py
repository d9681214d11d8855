"""`make demo`: the whole way on this machine, from handwritten digits to a registered encoder, in minutes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from cluster import local, profiles
from datasets_prep.errors import UserError
from jobs import plan, recipes, submit, table
from jobs.shard import shard
from service.data.store import Store

DATA = Path("runs/demo")


def main() -> int:
    """Run the demo and return its exit code; what it started is stopped however it ends."""
    began = time.monotonic()
    try:
        click.echo("1. local stack: Ray with a token, MLflow")
        mine = local.current() is None
        stack = local.up(DATA, report=lambda line: click.echo(f"   {line}"))
        try:
            code = _train(stack)
        finally:
            if mine:
                local.down()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        return 130
    stopped = "the stack is stopped" if mine else "the stack ran before and goes on"
    click.echo(f"done in {time.monotonic() - began:.0f} s; {stopped}, everything is kept in {DATA}")
    click.echo(
        f"`.venv/bin/tessera up --data {DATA}` reopens it, `tessera ui` prints the links, `tessera down` stops it"
    )
    return code


def _train(stack: local.Stack) -> int:
    os.environ.update(local.client_environment(stack))
    click.echo("2. shards: 1,797 handwritten digits")
    digits = DATA / "digits"
    shard("digits", str(digits), say=lambda line: click.echo(f"   {line}"))
    click.echo("3. job: VICReg on two workers, submitted as `tessera submit demo` does")
    made = plan.make(recipes.load("demo", [f"data.uri={digits}"]))
    for name, value in made.rows():
        click.echo(f"   {name:<10} {value}")
    profile = profiles.resolve("local")
    submit.prepare(made, profile)
    done = submit.submit(made, profile)
    click.echo(f"   {'run':<10} {done.run}  {done.state}")
    if done.job:
        with submit.job_client(profile) as client:
            code = submit.follow(client, done.job, lambda line: click.echo(f"   {line}"))
        if code:
            return code
    result = submit.read_result(Store(profile.storage_uri), done.run)
    assert result is not None
    summary = DATA / "summary.json"
    summary.write_text(json.dumps(summarise(result), indent=1) + "\n")
    click.echo(f"4. result, also in {summary}\n{table.render(result)}")
    click.echo(f"encoder {result['model_uri']}, MLflow run {result['mlflow_run']}")
    return 0


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Percentages by representation, where the encoder is registered, and the MLflow run."""
    return result["scores"] | {"model_uri": result["model_uri"], "run_id": result["mlflow_run"]}


if __name__ == "__main__":
    sys.exit(main())
