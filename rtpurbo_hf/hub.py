"""Push an RTPurbo checkpoint to the Hub, with all that belongs to it, in one commit."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .hub_package import Package, build_package
from .modeling.push_rtpurbo import commit_to_hub

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushResult:
    """What was pushed, and the commit; `commit` is None after a dry run."""

    package: Package
    commit: CommitInfo | None


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    weights: str = "saved",
    base: str | None = None,
    base_revision: str | None = None,
    report: str | Path | None = None,
    figures: Sequence[str | Path] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
) -> PushResult:
    """Push a checkpoint with all that belongs to it, in one commit.

    Args:
        source: a checkpoint folder, or the output folder of `rtpurbo adapt`.
        repo_id: `owner/name`, or a name in your own namespace. Made if it is not there.
        private: of a new repository. revision: branch, made if it is not there. token: True or None, the one you are
            logged in with. create_pr: open a pull request instead of committing. All as in huggingface_hub.
        weights: `"saved"`, the shape that `source` has; `"adapter"`, the index only; `"full"`, everything.
        base, base_revision: Hub id and commit of the base, in place of what the config names. A Hub base without a
            revision is pinned to its present commit.
        report: a report.json in place of the one beside the checkpoint.
        figures: pictures beside those that lie with the report.
        license: of the base model, in place of what its source or its card on the Hub states.
        datasets: Hub ids of the training data, for the card.
        max_shard_size: of full weights that are converted.
        dry_run: gather and check, list, and push nothing. Converted weights are predicted in size, in one file.

    Raises:
        ValueError: no checkpoint, damaged weights, malformed files, or a package that nobody else could load.
        HfHubHTTPError: the Hub refused; nothing is committed then.
    """
    with _scratch(dry_run) as scratch:
        package = build_package(
            source,
            repo_id=repo_id,
            weights=weights,
            base=base,
            base_revision=base_revision,
            report=report,
            figures=figures,
            license=license,
            datasets=datasets,
            max_shard_size=max_shard_size,
            token=token,
            scratch=scratch,
        )
        if dry_run:
            return PushResult(package, None)
        if package.problems:
            raise ValueError("; ".join(package.problems))
        for note in package.notes:
            logger.warning("%s", note)
        files = {file.path: file.content for file in package.files if file.content is not None}
        commit = commit_to_hub(
            repo_id,
            files,
            private=private,
            revision=revision,
            token=token,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload RTPurbo {package.shape} checkpoint",
        )
    # converted weights lived in the scratch folder
    done = tuple(replace(file, content=None) for file in package.files)
    return PushResult(replace(package, files=done), commit)


@contextlib.contextmanager
def _scratch(dry_run: bool) -> Iterator[str | None]:
    if dry_run:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rtpurbo-push-") as folder:
        yield folder
