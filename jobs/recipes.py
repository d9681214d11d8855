"""From a recipe and dotted overrides to one validated `RunConfig`; every error at once, each with the nearest fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from cluster.credentials import check_settings
from datasets_prep.errors import UserError
from service.config import RunConfig

RECIPES = Path(__file__).parent / "recipes"
Tree = dict[str, Any]


def names() -> list[str]:
    """Recipes that ship with Tessera."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe(name: str) -> str:
    """First comment of a shipped recipe, as one line."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


def load(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a shipped recipe by name, or a YAML or JSON file by path, and apply `key.sub=value` overrides."""
    merged = _defaults(RunConfig)
    for tree in _layers(recipe):
        merged = _merge(merged, tree, RunConfig)
    return _validated(merged, overrides, f"recipe {recipe!r}")


def overlay(config: RunConfig, overrides: Sequence[str], what: str) -> RunConfig:
    """Apply `key.sub=value` overrides to a config; errors name it as `what`."""
    return _validated(config.plain(), overrides, what)


def _validated(merged: Tree, overrides: Sequence[str], what: str) -> RunConfig:
    errors: list[str] = []
    for override in overrides:
        path, _, text = override.partition("=")
        if "=" not in override or not path:
            errors.append(f"{override!r} is no override: write key.sub=value, such as schedule.epochs=10")
            continue
        merged = _merge(merged, _nest(path.split("."), parse(text)), RunConfig)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        errors += [explain(item, merged) for item in error.errors()]
    else:
        check_settings(config.plain())
        if not errors:
            return config
    count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
    raise UserError(f"{count} in the config of {what}:\n" + "\n".join(f"  {e}" for e in errors))


def schema() -> str:
    """JSON schema of a whole config, for editors that complete and check YAML."""
    return json.dumps(RunConfig.model_json_schema(), indent=1)


def to_yaml(config: RunConfig) -> str:
    """Every setting of a config, written out."""
    return yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)


def _layers(recipe: str, above: tuple[str, ...] = ()) -> list[Tree]:
    """Settings of a recipe after those of the recipe that it names as its `base`, and so on."""
    if recipe in above:
        raise UserError(f"recipe {recipe!r} is its own base, through {' → '.join(above)}: name another one")
    tree, own = _read(recipe)
    base = tree.pop("base", None)
    return [*(_layers(str(base), (*above, recipe)) if base is not None else []), {"name": own, **tree}]


def _read(recipe: str) -> tuple[Tree, str]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = RECIPES / f"{recipe}.yaml"
        if not path.exists():
            raise UserError(f"unknown recipe {recipe!r}{_nearest(recipe, names())}; there are: {', '.join(names())}")
    return read_yaml(path, "recipe", "a mapping of settings"), path.stem


def read_yaml(path: Path, what: str, content: str) -> Tree:
    """Read a file of settings, or say what is wrong with it."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {what} file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} file {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} file {path} must hold {content}")
    return cast(Tree, tree)


def parse(text: str) -> Any:
    """The value of an override: YAML, or else the text itself."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _nest(path: Sequence[str], value: Any) -> Tree:
    return {path[0]: _nest(path[1:], value) if len(path) > 1 else value}


def _defaults(model: type[BaseModel]) -> Tree:
    """Defaults of a config type as a plain tree; required fields are left out, except that their own defaults show."""
    tree: Tree = {}
    for name, field in model.model_fields.items():
        if field.default is not PydanticUndefined:
            value = field.default
            tree[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        elif (inner := _variants(field.annotation)) and len(inner) == 1:
            tree[name] = _defaults(inner[0])
    return tree


def _variants(annotation: Any) -> list[type[BaseModel]]:
    """Config types that an annotation admits: none for a plain value, several for a union told apart by `kind`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _variants(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [variant for arg in get_args(annotation) for variant in _variants(arg)]
    return []


def _named(annotation: Any) -> type[BaseModel] | None:
    """Config type of the values of a mapping by name, such as the sources of a mixture."""
    variants = _variants(get_args(annotation)[1]) if get_origin(annotation) is dict else []
    return variants[0] if variants else None


def _merge(base: Tree, change: Tree, model: type[BaseModel]) -> Tree:
    """Lay `change` over `base`; where it names another `kind`, that kind's defaults replace the siblings."""
    merged = dict(base)
    for name, value in change.items():
        field = model.model_fields.get(name)
        if field and (named := _named(field.annotation)) and isinstance(value, dict):
            before = cast(dict[str, Tree], base.get(name, {}))
            changed = cast(dict[str, Tree], value)
            merged[name] = before | {k: _merge(before.get(k, _defaults(named)), v, named) for k, v in changed.items()}
            continue
        variants = _variants(field.annotation) if field else []
        if not variants or not isinstance(value, dict):
            merged[name] = value
            continue
        tree = cast(Tree, value)
        before = cast(Tree, base.get(name)) if isinstance(base.get(name), dict) else {}
        kind = tree.get("kind", before.get("kind"))
        variant = next((v for v in variants if _kind(v) == kind), variants[0])
        if len(variants) > 1 and kind != before.get("kind"):
            before = _defaults(variant)
        merged[name] = _merge(before, tree, variant)
    return merged


def _kind(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def explain(error: ErrorDetails, tree: Tree, root: type[BaseModel] = RunConfig) -> str:
    """One line on an error in the tree of a config type: dotted name, value, constraint, fix."""
    path = [str(part) for part in _real_path(error["loc"], tree)]
    dotted = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        return f"{dotted} is no setting{_nearest(path[-1], _siblings(path, root))}"
    if error["type"] == "missing":
        return f"{dotted} must be given: no default fits every {'run' if root is RunConfig else root.__name__.lower()}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        context = error.get("ctx", {})
        return f"{dotted}.kind={context.get('tag')!r} is none of {context.get('expected_tags')}"
    if isinstance(error["input"], dict | BaseModel):
        return f"{dotted}: {message}" if path else message
    return f"{dotted}={error['input']!r}: {message}"


def _real_path(loc: tuple[int | str, ...], tree: Tree) -> list[int | str]:
    """Drop the union tags that pydantic puts into locations."""
    path: list[int | str] = []
    node: Any = tree
    for position, part in enumerate(loc):
        is_tag = isinstance(node, dict) and part == cast(Tree, node).get("kind") and part not in node
        if is_tag and position < len(loc) - 1:
            continue
        path.append(part)
        node = cast(Tree, node).get(str(part)) if isinstance(node, dict) else None
    return path


def _siblings(path: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Settings that stand beside a dotted name, of all kinds that could stand there."""
    models: list[type[BaseModel]] = [root]
    for part in path[:-1]:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [variant for field in fields for variant in _variants(field.annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f"; there are: {', '.join(choices)}"
