"""Publish saved models to the Hub, and download them."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import nn

from ..errors import ArpHubError, checked_path
from ..layers.model import check_model
from .client import HubFailure, call
from .load import load_model
from .repository import Published, Repository, check_name, open_repository
from .save import CARD, CONFIG, METRICS, WEIGHTS, is_saved_folder, save_pretrained
from .staging import MAIN, dense_name, stage


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    dense_revision: str | None = "dense",
) -> Published:
    """Publish a model with its card, so that ``timm.create_model("hf-hub:USER/NAME", pretrained=True)`` loads it.

    Each branch gets one commit with config, safetensors, card, metrics and pictures. Bad input raises an error before
    any upload, and transient failures are retried. If the push fails, new repositories, branches and tags are removed.
    A second push replaces what arp_hub writes; the owner's files stay, and the text between the two marks of the card.
    Exports of other weights are deleted.

    Args:
        model_or_folder: A timm model, decomposed or dense, or a folder written by `save_pretrained`.
        repo_id: ``user/name`` or ``organisation/name``; created if missing. Default namespace: the user's.
        token: A token with write access. Default: ``HF_TOKEN`` or the token of ``hf auth login``.
        private: Whether a new repository is private; one that exists must be as asked for. Default: the account's
            setting.
        revision: Branch to write to, by default ``main``; created from ``main`` if missing.
        tag: Tag for this version, such as ``v1``; the merged model gets the tag ``v1-dense``.
        create_pr: Open a pull request instead, without tag and merged model. The repository may belong to others.
        commit_message: Title of the commit.
        metrics: Numbers as for `save_pretrained`; they override those in a folder.
        dense_revision: Branch for the merged model in its plain timm architecture, which loads without arp_hub. With
            another ``revision``, its name is ``REVISION-DENSE_REVISION``. None: do not publish the merged model.

    Returns:
        Address, commit, branches and tag of what was published.

    Raises:
        ArpHubError: If it fails. The message gives the reason, what changed on the Hub, and the next command.

    Example:
        >>> arp_hub.push_to_hub("out", "me/resnet50-arp", tag="v1")  # doctest: +SKIP
    """
    _check_source(model_or_folder)
    branch = revision or MAIN
    dense = None if create_pr else dense_revision
    with open_repository(repo_id, token, create_pr) as target:
        merged = dense and dense_name(branch, dense)
        tags = [tag, *([dense_name(tag, dense)] if dense else [])] if tag else []
        target.check([branch, *([merged] if merged else [])], tags, create_pr, private)
        options = _options(private, revision, tag, create_pr, dense_revision)
        options += _about(metrics or {}, commit_message)
        with _folder_of(model_or_folder, target.repo_id, metrics) as folder:
            with _next_step(folder, target, options, kept=isinstance(model_or_folder, nn.Module)):
                uploads = call(
                    "prepare the upload",
                    stage,
                    folder,
                    target.scratch,
                    target.repo_id,
                    branch,
                    dense,
                    metrics=metrics,
                    tag=tag,
                    earlier_card=target.earlier_card,
                )
                if len(uploads) == 1 and not create_pr:
                    target.warn_of_old_merged(merged or dense_name(branch, "dense"))
                message = commit_message or f"Publish {target.repo_id.partition('/')[2]}{f' {tag}' if tag else ''}"
                return target.publish(uploads, message, private=private, create_pr=create_pr)


def check_push(repo_id: str, *, token: str | None = None) -> str:
    """Check that `push_to_hub` may write to a repository, for use before long work. It changes nothing.

    Returns:
        The full name of the repository.

    Raises:
        ArpHubError: If the name is invalid or belongs to others, or the token is missing, unknown or read-only.
    """
    with open_repository(repo_id, token, create_pr=False) as target:
        return target.repo_id


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Download a published model: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Only files that `save_pretrained` writes are downloaded, never a pickle. Without a network, the cache is used.

    Args:
        repo_id: ``user/name``, optionally as ``hf-hub:user/name@revision``.
        revision: Branch, tag or commit, ``main`` by default.
        token: For private repositories. Default: ``HF_TOKEN`` or the token of ``hf auth login``.
        cache_dir: The client's cache folder. Default: under ``HF_HOME``.
        local_dir: A folder to fill instead of one in the cache.

    Returns:
        The folder.

    Raises:
        ArpHubError: If it cannot be downloaded, or does not hold a model that this version can build.

    Example:
        >>> folder = arp_hub.download("me/resnet50-arp@v1")  # doctest: +SKIP
    """
    name, _, at = repo_id.removeprefix("hf-hub:").partition("@") if isinstance(repo_id, str) else (repo_id, "", "")
    check_name(name)
    revision = revision or at or None
    if local_dir is not None:  # huggingface_hub gives back whatever lies there if it cannot reach the Hub
        revision = call(f"look at '{name}'", HfApi(token=token).repo_info, name, revision=revision).sha
    folder = Path(
        call(
            f"download '{name}'",
            snapshot_download,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_dir=local_dir,
            allow_patterns=[CONFIG, WEIGHTS, CARD, METRICS, "*.png", "*.svg"],
        )
    )
    if not (folder / WEIGHTS).is_file():
        raise ArpHubError(f"'{repo_id}' holds no {WEIGHTS}: choose a model that arp_hub or timm has published")
    with torch.device("meta"):
        load_model(f"local-dir:{folder}", pretrained=False)
    return folder


def _check_source(model_or_folder: object) -> None:
    """Check what the caller wants to publish, before the first call to the Hub."""
    if not isinstance(model_or_folder, (str, os.PathLike)):
        check_model(model_or_folder, mergeable=True)
        return
    folder = checked_path(model_or_folder, "the model's folder")
    if not is_saved_folder(folder) or not (folder / WEIGHTS).is_file():
        raise ArpHubError(
            f"'{folder}' is not a folder with a saved model: write one with arp-hub compress or arp_hub.save_pretrained"
        )


@contextmanager
def _folder_of(
    model_or_folder: nn.Module | str | os.PathLike[str], repo_id: str, metrics: Mapping[str, Any] | None
) -> Iterator[Path]:
    """The saved folder. A model is saved first, in a temporary folder that is kept if the push fails."""
    if not isinstance(model_or_folder, nn.Module):
        yield Path(model_or_folder)
        return
    place = Path(tempfile.mkdtemp(prefix="arp-hub-"))
    try:
        saved = save_pretrained(model_or_folder, place / repo_id.partition("/")[2], metrics=metrics)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    yield saved
    shutil.rmtree(place, ignore_errors=True)


def _options(
    private: bool | None, revision: str | None, tag: str | None, create_pr: bool, dense: str | None
) -> list[str]:
    """The equivalent options of ``arp-hub push``."""
    words = [] if private is None else ["--private" if private else "--no-private"]
    for option, value in (("--revision", revision), ("--tag", tag)):
        words += [option, value] if value else []
    words += ["--create-pr"] if create_pr else []
    return words + ([] if dense == "dense" else ["--dense-revision", dense] if dense else ["--no-dense"])


def _about(metrics: Mapping[str, Any], message: str | None) -> list[str]:
    """The options of ``arp-hub push`` for what a card says beside the numbers, and for the title of the commit."""
    words = ["--message", message] if message else []
    for option, key in (("--base-model", "base_model"), ("--dataset", "dataset"), ("--license", "license")):
        words += [option, metrics[key]] if isinstance(metrics.get(key), str) and metrics[key] else []
    return words + (["--bench"] if metrics.get("latency") else [])


@contextmanager
def _next_step(folder: Path, target: Repository, options: list[str], kept: bool) -> Iterator[None]:
    """If a push fails or is interrupted, report what changed on the Hub and the command to run next."""
    words = shlex.join(["arp-hub", "push", str(folder), target.repo_id, *options])

    def state() -> str:
        on_hub = f"Changed on the Hub: {', '.join(target.changed)}" if target.changed else "Nothing changed on the Hub"
        return f"{on_hub}; the saved model is kept whole in '{folder}'. To go on: {words}"

    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(state()) from stop
    except ArpHubError as error:
        if isinstance(error, HubFailure):
            raise HubFailure(f"{error}. {state()}", error.status, error.transient) from error.__cause__
        if kept:  # the model itself is at fault, so repeating the push would not help
            shutil.rmtree(folder.parent, ignore_errors=True)
        raise
