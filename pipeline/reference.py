"""The reference pages of the documentation, made from the code they describe: config keys, files, score columns.

`python -m pipeline.reference [FOLDER]` writes them (into `docs` by default).
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import annotated_types
import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config
from pipeline.data.inventory import ShardInfo
from pipeline.data.reasons import Reason
from pipeline.emit.manifest import ManifestLine, SelectionFolder
from pipeline.replay.files import RecordFolder
from pipeline.run import RunFolder
from pipeline.selection.summary import SelectionSummary
from pipeline.store import storage
from pipeline.store.scores import score_schema


@dataclass(frozen=True)
class Setting:
    """One key of the config: its dotted name, type and default in words, and what it means."""

    key: str
    type: str
    default: str
    meaning: str


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds (it may also be null); None for a field that holds a value."""
    choices = [choice for choice in _choices(annotation) if choice is not type(None)]
    if len(choices) == 1 and isinstance(choices[0], type) and issubclass(choices[0], BaseModel):
        return choices[0]
    return None


def iterate_settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """All keys of the config in the order of the file; a section comes before its keys."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_of(field.annotation)
        if inner is None:
            yield Setting(key, describe_type(field), describe_default(field), meaning(field))
        else:
            yield Setting(
                key, "section", "absent" if field.default is None else "", inspect.cleandoc(inner.__doc__ or "")
            )
            yield from iterate_settings(inner, f"{key}.")


def meaning(field: FieldInfo) -> str:
    """A field's docstring on one line."""
    return " ".join((field.description or "").split())


def describe_default(field: FieldInfo) -> str:
    """A field's default as YAML would have it; `required` without one."""
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json")
    return default if isinstance(default, str) and default else json.dumps(default)


def describe_type(field: FieldInfo) -> str:
    """A field's type and limits in words."""
    return _type_in_words(field.annotation, field.metadata)


def _type_in_words(annotation: Any, limits: list[Any] | tuple[Any, ...] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        return _type_in_words(inner, metadata)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_in_words(choice) for choice in typing.get_args(annotation))
    if origin is list:
        (item,) = typing.get_args(annotation)
        return f"list of {_type_in_words(item)}"
    if origin is dict:
        key, value = typing.get_args(annotation)
        return f"mapping of {_type_in_words(key)} to {_type_in_words(value)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner_keys = ", ".join(annotation.model_fields)
        return f"`{{{inner_keys}}}`"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
    text = words.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = [bound for limit in limits for bound in _bounds(limit)]
    return f"{text} {' and '.join(bounds)}" if bounds else text


def _bounds(limit: Any) -> Iterator[str]:
    if isinstance(limit, FieldInfo):
        for inner in limit.metadata:
            yield from _bounds(inner)
        return
    signs = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}
    for kind, sign in signs.items():
        if isinstance(limit, kind):
            yield f"{sign} {getattr(limit, kind.__name__.lower())}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def configuration_reference() -> str:
    """The page on the config, Markdown: one table per section, generated from the pydantic tree."""
    lines = [
        "# Configuration",
        "",
        "A config is a YAML file; an unknown key is an error. `diffprune init SHARDS` writes a commented one.",
        "",
        "- `--set a.b=c` overrides a key. The value is YAML: `--set 'select.keep={threshold: 0.1}'` needs the quotes",
        "  (for the shell) and the space after the colon (for YAML).",
        "- Relative paths count from the working directory, not from the config's folder.",
        "- What may be written in `select.by`, `select.where` and `select.spread` is under",
        "  [formulas](concepts.md#formulas-for-a-selection).",
        "- `demo:train`, `demo:target`, `demo:test` and `demo:truth` stand for parts of the built-in demo data. They",
        "  are written to `out`, which must then be a local folder, and need scikit-learn (`pip install '.[demo]'`).",
        "",
    ]
    lines += _settings_table("Top level", "", Config)
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            lines += _settings_table(f"`{name}`", f"{name}.", section)
    lines += ["## Small models", "", "Model configs that come with diffprune, for `proxy.model`.", ""]
    lines += ["| name | parameters | input, pixels | tokens |", "|---|---|---|---|"]
    for name, (parameters, pixels, tokens) in _SMALL_MODELS.items():
        lines.append(f"| `{name}` | {parameters} million | {pixels} | {tokens} |")
    return "\n".join(lines) + "\n"


#: The small models by name: parameters in millions, side of the input in pixels, length of the context in tokens.
_SMALL_MODELS = {
    "digits-vit": (1.7, 16, 12),
    "tiny-convnext": (1.8, 32, 16),
    "tiny-resnet": (2.9, 32, 16),
    "tiny-vit": (3.4, 32, 16),
    "tiny-siglip": (3.6, 32, 16),
    "tiny-fastvit": (4.9, 64, 16),
}


def _settings_table(title: str, prefix: str, section: type[BaseModel]) -> list[str]:
    lines = [f"## {title}", "", *inspect.cleandoc(section.__doc__ or "").splitlines(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for setting in iterate_settings(section, prefix):
        if setting.type == "section" and not prefix:
            continue
        if prefix or "." not in setting.key:
            default = f"`{setting.default}`" if setting.default not in ("required", "") else setting.default
            lines.append(f"| `{setting.key}` | {_cell(setting.type)} | {_cell(default)} | {_cell(setting.meaning)} |")
    return [*lines, ""]


def outputs_reference(embedding_size: int = 512) -> str:
    """The page on what a run writes, Markdown: files of the run's folder, score columns, reasons of rejection."""
    lines = ["# Outputs", "", "## Files of a run's folder", "", "| path | what it is |", "|---|---|"]
    known = [
        *_files(RunFolder, "."),
        *_files(RecordFolder, "checkpoints/run-000"),
        *_files(SelectionFolder, "pruned"),
        *_OTHER_FILES.items(),
    ]
    for path, text in known:
        lines.append(f"| `{path}` | {_cell(text)} |")
    for title, text, rows in _contents():
        lines += ["", f"## {title}", "", text, "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in rows.items()]
    lines += ["", "## Columns of `scores/*.parquet`", ""]
    lines += ["One row per input sample, in input order, rejected ones included.", ""]
    lines += ["| column | type | may be null | meaning |", "|---|---|---|---|"]
    for field in score_schema(embedding_size):
        text = (field.metadata or {}).get(b"description", b"").decode()
        kind = _arrow_type(field.type, embedding_size)
        lines.append(f"| `{field.name}` | {_cell(kind)} | {'yes' if field.nullable else 'no'} | {_cell(text)} |")
    lines += ["", "## Values of `status`", "", "| status | meaning |", "|---|---|"]
    lines += [f"| `{reason.value}` | {_cell(text)} |" for reason, text in _reasons()]
    return "\n".join(lines) + "\n"


def _contents() -> Iterator[tuple[str, str, dict[str, str]]]:
    """What is in the files that others read: heading, a sentence, and columns or keys with what each is."""
    yield "Columns of `inventory.parquet`", "One row per input shard, in order.", _attributes(ShardInfo)
    yield "Keys of `pruned/manifest.jsonl`", "One line per input shard, in order.", _attributes(ManifestLine)
    names = (field.name for field in fields(SelectionSummary) if field.name != "folder")
    selection = {name: _SELECTION_KEYS[name] for name in names}
    yield "Keys of `pruned/selection.json`", "What a selection says of itself.", selection
    yield "Keys of `summary.json`", "Of a stage that has not run there is nothing.", _SUMMARY_KEYS
    yield "Keys of `evaluation/results.json`", "`rows` is a list, one entry per set of pairs:", _RESULT_KEYS


def _attributes(kind: type) -> dict[str, str]:
    """The attributes of a dataclass by name, from the section `Attributes` of its docstring."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    texts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    found = {name: " ".join((text[0].upper() + text[1:]).replace("None ", "null ").split()) for name, text in texts}
    return {field.name: found[field.name] for field in fields(kind)}


_SELECTION_KEYS = {
    "name": "The selection's name.",
    "scores": "A fingerprint of all score files that were used.",
    "seed": "The run's seed, which decides what is drawn.",
    "config": "The `select` section.",
    "total": "Pairs in the score files: those kept, pruned and rejected.",
    "scored": "Pairs with a score, of which a fraction is taken.",
    "kept": "Pairs that are kept.",
    "pruned": "Pairs that are not kept, by reason.",
    "rejected": "Pairs without a score, by `status`.",
    "threshold": "The ranked value of the last pair kept; null where groups have their own.",
    "shortfall": "Pairs that a fraction asks for beyond those that can be kept.",
    "harmful_kept": "With `significant`: harmful pairs that were needed to meet the quota.",
    "groups": "With `balance`: `name`, `size` (pairs that can be kept) and `kept` of each group.",
    "sources": "`name`, `pairs` and `kept` of each source.",
    "shards": "`shard` (its number), `url`, `rows` and `kept` of each input shard.",
    "seconds": "Seconds of each pass over the scores.",
    "clusters": "`name`, `size` and `kept` of each cluster of embeddings, where any were found.",
}

_SUMMARY_KEYS = {
    "seconds": "Seconds of each stage.",
    "scores.shards": "Input shards.",
    "scores.scored_shards": "Shards with scores.",
    "scores.failed_shards": "Shards that were set aside, each with the reason.",
    "scores.pairs": "Rows of the score files, rejected pairs included.",
    "scores.rejected": "Pairs without a score.",
    "scores.rejected_by_reason": "The same by `status`.",
    "scores.worker_seconds": "Seconds of all workers by phase: `load`, `waiting`, `score`, `commit`.",
    "scores.pairs_per_worker_second": "Rows over the seconds of `score`.",
    "scores.predicted": "With `score.sample`: the share, and how well the other scores were predicted.",
    "counts": "Of the last selection: `selection` (its name), `in`, `kept`, `pruned`, `rejected`, both by reason "
    "(`pruned_by_reason`, `rejected_by_reason`), `threshold`.",
    "quality": "With `evaluate.truth`: how well the selection finds wrong captions (`auroc`, `precision`, "
    "`base_rate`), and each ranking that was judged (`by`).",
}

_RESULT_KEYS = {
    "set": "The set's name.",
    "series": "What chose it.",
    "share": "What the choice keeps of the scored pairs; null for sets of their own size.",
    "size": "Its pairs.",
    "metric": "What was measured.",
    "mean": "Mean over the seeds.",
    "std": "Standard deviation over the seeds (n - 1); null with one seed.",
    "seeds": "Trainings.",
    "values": "The metric of each training.",
}

#: Files and folders (with a `/` at the end) that no class of paths knows.
_OTHER_FILES = {
    "pruned/selection.json": "Written last by `select`: settings, counts by reason, threshold, groups, sources (JSON).",
    "pruned/shards/00000.tar": "A pruned tar.",
    "pruned/shards/00000.parquet": "Where the pairs of the tar beside it come from, in its order (Parquet: uid, key, "
    "source_url, source_key, source_index).",
    "pruned/shards/00000_stats.json": "The commit mark of a tar, written last: `successes`, bytes (JSON).",
    "pruned/shards/sizes.json": "Pairs of each tar, for open_clip (JSON).",
    "checkpoints/trained.json": "Written last: the proxy runs are trained, and for which fingerprint (JSON).",
    "directions/00000.safetensors": "What every pair is scored along at checkpoint number 0 of the list.",
    "directions/batches.safetensors": "The reference, gradient and target pairs, decoded.",
    "directions/marks/": "The commit marks of the files of directions (JSON).",
    "evaluation/results.json": "What `evaluate` measured: a row per set of pairs (JSON).",
    "evaluation/sets/": "Positions of the pairs of each set (npy).",
    "evaluation/trainings/": "What each training gave (JSON), so that none is repeated.",
    "evaluation/progress/": "How far trainings are, while they go on (JSON).",
    "validation/table.json": "What `validate` measured, by estimator (JSON).",
    "validation/results.parquet": "The same by pair, half and seed (Parquet).",
    "validation/validation.svg": "The same as a plot.",
    "validation/seeds/": "What each seed gave (JSON), so that none is repeated.",
    "validation/progress/": "How far seeds are, while they go on (JSON).",
    "tensorboard/": "Losses, learning rates and results of trainings, for TensorBoard.",
    "cache/": "Training pairs, decoded; may be removed. A run on an object store has it in a temporary folder.",
    "failed/STAGE/": "Why tasks of other stages than `score` were set aside (JSON).",
    "scratch/": "What a stage keeps while it goes on.",
    "demo/": "The demo data, where the config asks for them.",
}


def _files(
    folder: type[RunFolder] | type[RecordFolder] | type[SelectionFolder], root: str
) -> Iterator[tuple[str, str]]:
    """Paths that a folder's class knows, with their docstrings."""
    example = folder(root)
    for name, member in vars(folder).items():
        if name.startswith("_") or name == "root":
            continue
        if isinstance(member, property):
            path = str(getattr(example, name))
        elif isinstance(member, types.FunctionType):
            path = str(member(example, "NAME" if name == "selection" else 0))
        else:
            continue
        yield path.removeprefix("./"), " ".join(inspect.cleandoc(member.__doc__ or "").split())


def _arrow_type(kind: pa.DataType, embedding_size: int) -> str:
    if pa.types.is_fixed_size_list(kind):
        return (
            f"fixed_size_list<{_arrow_type(kind.value_type, 0)}>[2d], {embedding_size} with d = {embedding_size // 2}"
        )
    if pa.types.is_list(kind):
        return f"list<{_arrow_type(kind.value_type, 0)}>"
    return {"float": "float32", "halffloat": "float16"}.get(str(kind), str(kind))


def _reasons() -> list[tuple[Reason, str]]:
    """The reasons with the docstrings that follow them in the source, which Python itself does not keep."""
    found = re.findall(
        r'^    ([A-Z0-9_]+) = [^\n]*\n    """(.*?)"""', inspect.getsource(Reason), re.MULTILINE | re.DOTALL
    )
    texts = {name: " ".join(text.split()) for name, text in found}
    return [(reason, texts.get(reason.name, "")) for reason in Reason]


def _cell(text: str) -> str:
    """Text that cannot end a table cell."""
    return text.replace("|", "\\|")


#: The pages by file name, with what writes them.
PAGES = {"configuration.md": configuration_reference, "outputs.md": outputs_reference}


def write_pages(folder: str = "docs") -> None:
    """Write the pages into a folder."""
    for name, page in PAGES.items():
        storage.write_bytes(storage.join(folder, name), page().encode())


if __name__ == "__main__":
    write_pages(*sys.argv[1:])
