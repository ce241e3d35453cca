"""The command line: list and verify a store, without torch.

Owns the commands `ls` and `verify`, their output, and their exit codes: 0 sound; 1 damage found; 2
wrong arguments, an error that prevents an answer, or a checkpoint of a later version; 130
interrupted. Promises to read only, and to name every damaged file with its byte range. Loads no
tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import __version__
from holdfast.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from holdfast.filesystem import LocalFilesystem
from holdfast.format.inventory import name_tensors
from holdfast.messages import describe_size
from holdfast.policies.keeping import Candidate, find_agreement
from holdfast.storage import open_storage
from holdfast.storage.annotations import annotations_of
from holdfast.storage.identity import RunIdentity
from holdfast.storage.store import Checkpoint, Listing, Store, parse_checkpoint_name


@dataclass(frozen=True)
class _Target:
    """What a path on the command line names: a store, and one iteration of it or all."""

    store: Store
    iteration: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. None: the arguments of the process."""
    parser = argparse.ArgumentParser(prog="holdfast", description="Look at checkpoints.")
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    ls = commands.add_parser("ls", help="list the checkpoints of a store, newest first")
    ls.set_defaults(command=_ls)
    verify = commands.add_parser("verify", help="read every file and compare it with the manifest")
    verify.set_defaults(command=_verify)
    verify.add_argument(
        "--lineage",
        action="store_true",
        help="print also from where each was trained, and whether its replicas agreed",
    )
    for each in (ls, verify):
        each.add_argument("directory", type=Path, help="a store, or one iter_* directory of it")
        each.add_argument("--json", action="store_true", help="print one JSON document")
    parsed = parser.parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except CorruptCheckpointError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        return 1
    except CheckpointError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has closed it: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the shell's code for a program ended by SIGPIPE
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"holdfast: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the shell's code for a program ended by Ctrl-C
    return code


def _ls(parsed: argparse.Namespace) -> int:
    target = _find_target(parsed.directory)
    listing = _selected(target)
    tracker, problem = target.store.read_tracker()
    run_id = RunIdentity(target.store.storage).read_run_id()
    found = listing.checkpoints or listing.broken or listing.too_new
    noted, problems = _read_annotations(target.store, listing)
    if not found and run_id is None:
        raise CheckpointNotFoundError(
            f"{parsed.directory} holds no checkpoint.{_suggest(target.store.root)}"
        )
    if parsed.json:
        checkpoints = [
            {
                "iteration": each.iteration,
                "path": str(each.path),
                "sequence": each.manifest.sequence,
                "attempt": each.manifest.attempt,
                "run_id": each.manifest.run_id,
                "world_size": each.manifest.world_size,
                "size_bytes": each.manifest.size_bytes,
                "files": len(each.manifest.files),
                "saved_at": each.manifest.saved_at,
                "annotations": noted.get(each.iteration),
            }
            for each in listing.checkpoints
        ]
        broken = [{"path": str(each.path), "reason": each.reason} for each in listing.broken]
        too_new = [
            {"path": str(each.path), "reason": each.error.summary} for each in listing.too_new
        ]
        _print_json(
            {
                "run_id": run_id,
                "tracker": tracker,
                "checkpoints": checkpoints,
                "broken": broken,
                "too_new": too_new,
            }
        )
        return _exit_code(bool(listing.broken or problems), listing)
    print(f"{target.store.root}  run {run_id or 'unknown'}")
    rows: list[tuple[str, ...]] = [
        ("iteration", "saved at", "ranks", "files", "size", "attempt", "", "")
    ]
    rows += [_row(each, tracker, noted) for each in listing.checkpoints]
    if listing.checkpoints:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
    elif not found:
        print("  no checkpoints")
    for new in listing.too_new:
        print(f"  unknown: {new.path} {new.error.summary}")
    for each in listing.broken:
        print(f"  broken: {each.reason}")
    for each_problem in problems:
        print(f"  annotations: {each_problem}")
    if problem and listing.checkpoints:
        print(f"  tracker: {problem}")
    return _exit_code(bool(listing.broken or problems), listing)


def _exit_code(is_damaged: bool, listing: Listing) -> int:
    """A checkpoint of a later version is neither damaged nor known to be sound."""
    if is_damaged:
        return 1
    return 2 if listing.too_new else 0


def _verify(parsed: argparse.Namespace) -> int:
    target = _find_target(parsed.directory)
    listing = _selected(target)
    if not (listing.checkpoints or listing.broken or listing.too_new):
        raise CheckpointNotFoundError(
            f"{parsed.directory} holds no checkpoint.{_suggest(target.store.root)}"
        )
    lineage = _lineage(target.store) if parsed.lineage else {}
    results = [
        {"path": str(each.path), "size_bytes": each.manifest.size_bytes,
         **lineage.get(each.manifest.sequence, {}),
         "damages": [
             str(damage)
             for damage in name_tensors(
                 target.store.files_of(each), target.store.verify(each)
             )
         ]}
        for each in listing.checkpoints
    ]  # fmt: skip
    results += [
        {"path": str(each.path), "size_bytes": 0, "damages": [each.reason]}
        for each in listing.broken
    ]
    damaged = sum(bool(each["damages"]) for each in results)
    if parsed.json:
        unread = [str(each.path) for each in listing.too_new]
        _print_json({"checkpoints": results, "damaged": damaged, "too_new": unread})
        return _exit_code(damaged > 0, listing)
    for result in results:
        damages = result["damages"]
        assert isinstance(damages, list)
        print(f"{result['path']}: {'DAMAGED' if damages else 'sound'}")
        for damage in damages:
            print(f"  {damage.removeprefix(str(result['path']) + ': ')}")
        if "replicas" in result:
            print(f"  {_describe_lineage(result)}")
    for new in listing.too_new:
        print(f"{new.path}: NOT READ, it {new.error.summary}")
    plural = "" if len(results) == 1 else "s"
    print(f"{len(results)} checkpoint{plural} read, {damaged} damaged")
    return _exit_code(damaged > 0, listing)


def _lineage(store: Store) -> dict[int, dict[str, object]]:
    """Return where each checkpoint came from, and what is known of its replicas, by sequence."""
    attempts = RunIdentity(store.storage).attempts()
    resumed_from = {each.number: each.resumed_from for each in attempts}
    manifests = [each.manifest for each in store.listing().checkpoints]
    agreement = find_agreement([*map(Candidate.of, manifests)])
    return {
        each.sequence: {
            "attempt": each.attempt,
            "resumed_from": resumed_from.get(each.attempt),
            "replicas": {
                "compared": agreement[each.sequence].compared,
                "shares": agreement[each.sequence].shares,
                "agree": agreement[each.sequence].is_whole,
            },
        }
        for each in manifests
    }


def _describe_lineage(result: Mapping[str, Any]) -> str:
    start = result["resumed_from"]
    begun = "from the start" if start is None else f"resumed from iteration {start}"
    replicas = result["replicas"]
    if not replicas["shares"]:
        agreement = "replicas were not compared, or there are none"
    elif replicas["agree"]:
        agreement = "replicas agree"
    else:
        done = f"{replicas['compared']} of {replicas['shares']} shares"
        agreement = f"replicas agree as far as compared since, {done}"
    return f"attempt {result['attempt']}, {begun}; {agreement}"


def _find_target(directory: Path) -> _Target:
    filesystem = LocalFilesystem()
    path = directory.resolve()
    if not filesystem.is_directory(path):
        raise CheckpointNotFoundError(f"{directory} does not exist or is no directory.")
    iteration = parse_checkpoint_name(path.name)
    root = path if iteration is None else path.parent
    return _Target(Store(open_storage(root, filesystem)), iteration)


def _suggest(directory: Path) -> str:
    """Return the end of a message: a directory in this one that holds checkpoints, if there is."""
    filesystem = LocalFilesystem()
    with suppress(OSError):
        for each in sorted(directory.iterdir()):
            if each.is_dir() and Store(open_storage(each, filesystem)).listing().checkpoints:
                return f" Did you mean {each}?"
    return ""


def _selected(target: _Target) -> Listing:
    listing = target.store.listing()
    if target.iteration is None:
        return listing
    return Listing(
        tuple(each for each in listing.checkpoints if each.iteration == target.iteration),
        tuple(each for each in listing.broken if each.iteration == target.iteration),
        tuple(each for each in listing.too_new if each.iteration == target.iteration),
    )


def _read_annotations(
    store: Store, listing: Listing
) -> tuple[dict[int, dict[str, Any]], list[CheckpointError]]:
    """Return what is recorded of each checkpoint, and the records that cannot be read."""
    found: dict[int, dict[str, Any]] = {}
    problems: list[CheckpointError] = []
    for each in listing.checkpoints:
        try:
            found[each.iteration] = annotations_of(store.files_of(each))
        except CheckpointError as error:
            problems.append(error)
    return found, problems


def _row(
    checkpoint: Checkpoint, tracker: int | None, noted: Mapping[int, Mapping[str, Any]]
) -> tuple[str, ...]:
    manifest = checkpoint.manifest
    return (
        str(checkpoint.iteration),
        manifest.saved_at,
        str(manifest.world_size),
        str(len(manifest.files)),
        describe_size(manifest.size_bytes),
        str(manifest.attempt),
        "<- tracker" if checkpoint.iteration == tracker else "",
        " ".join(
            f"{name}={json.dumps(value)}"
            for name, value in sorted(noted.get(checkpoint.iteration, {}).items())
        ),
    )


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=1, sort_keys=True))
