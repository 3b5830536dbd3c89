"""Commit a checkpoint to the Hub: its files in, the weights of another shape out, in one commit.

The only file of the remote code that reaches the network, and only when `push_to_hub` is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = re.compile(r"(?:model(?:-\d+-of-\d+)?|rtpurbo_indexer)\.safetensors|model\.safetensors\.index\.json")


def is_hub_id(name: object) -> bool:
    """Whether `name` reads `owner/name` and nothing that could be a path: no `..`, no leading dot, no second slash."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and ".." not in name and len(name) <= 192


def is_weight_file(name: str) -> bool:
    """Whether `name` is a file that holds or indexes a checkpoint's weights, of either shape."""
    return _WEIGHTS.fullmatch(name) is not None


def require_hub_base(config) -> None:
    """Raise a `ValueError` unless an adapter with this config finds its base from anywhere."""
    base = config.base_model_name_or_path
    if not is_hub_id(base) or Path(base).is_dir():
        raise ValueError(
            f"this adapter names its base model as {base!r}, which nobody else can load: set "
            "config.base_model_name_or_path to a Hub id 'owner/name' (and base_model_revision to its commit), or push "
            "full weights with adapter_only=False"
        )


def portable_config(text: str) -> bytes:
    """A stored config without the paths of this machine that it may name as its base."""
    values = json.loads(text)
    if not is_hub_id(values.get("base_model_name_or_path")):
        values["base_model_name_or_path"] = values["base_model_revision"] = None
    base = values.get("base_config") or {}
    if not is_hub_id(base.get("_name_or_path")):
        base.pop("_name_or_path", None)
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def commit_to_hub(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
    card_data: Mapping[str, object] | None = None,
) -> CommitInfo:
    """Create the repository if needed and commit `files` to it, all in one commit.

    Weight files of the repository that are not among `files` are deleted in that commit: a full checkpoint over an
    adapter, or other shards, would otherwise leave a mixture that loads as something else.

    Args:
        repo_id: `owner/name`, or a name in one's own namespace.
        files: contents by their path in the repository.
        private, revision, token, create_pr, commit_message, commit_description, tags: as in `push_to_hub` of
            transformers; `revision` is a branch, made from `main` when it is not there.
        card_data: metadata of the card that a repository without README.md gets, when `files` holds none either.

    Raises:
        HfHubHTTPError: the Hub refused; nothing is committed then.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        present = set(api.list_repo_files(repo_id, revision=revision))
    except HfHubHTTPError:
        if not create_pr or revision is None:
            raise
        present = set(api.list_repo_files(repo_id))
    contents = dict(files)
    if "README.md" not in contents:
        contents |= _card(repo_id, present, revision=revision, token=token, tags=tags, card_data=card_data)
    stale = sorted(name for name in present - set(contents) if is_weight_file(name))
    # the client reads a str as a path and bytes as content
    add = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=value if isinstance(value, bytes) else str(value))
        for name, value in sorted(contents.items())
    ]
    return api.create_commit(
        repo_id,
        [*add, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=commit_message or "Upload RTPurbo model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _card(repo_id: str, present: set[str], *, revision, token, tags, card_data) -> dict[str, bytes]:
    """The README.md to commit: a new one, the present one with the tags added, or none."""
    if "README.md" not in present:
        data = ModelCardData(**{**(card_data or {}), "tags": [*(card_data or {}).get("tags", []), *(tags or [])]})
        title = repo_id.rpartition("/")[2]
        text = f"# {title}\n\nAn RTPurbo model. Load it with `trust_remote_code=True`.\n"
        return {"README.md": f"---\n{data.to_yaml()}\n---\n\n{text}".encode()}
    if not tags:
        return {}
    path = HfApi(token=token).hf_hub_download(repo_id, "README.md", revision=revision)
    card = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    known = card.data.get("tags") or []
    card.data["tags"] = [*known, *(tag for tag in tags if tag not in known)]
    return {"README.md": str(card).encode()}
