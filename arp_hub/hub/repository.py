"""A repository on the Hub: look at it, and change it whole or not at all."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import ArpHubError
from .card import PICTURES
from .client import FAILURES, call, explain, plain_uploads, uses_xet
from .save import CARD, WEIGHTS
from .staging import MAIN, Upload

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What `push_to_hub` has done.

    Attributes:
        repo_id: The repository, ``user/name``.
        url: Its page, or that of the pull request.
        commit: The commit with the model.
        revision: The branch it is on, or the reference of the pull request.
        dense_revision: The branch with the merged model, None if there is none.
        tag: The tag of this version, None if none was asked for.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    dense_revision: str | None
    tag: str | None


@dataclass
class Repository:
    """A repository, as it is before the push."""

    api: HfApi
    repo_id: str
    scratch: Path
    heads: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    exists: bool = False
    changed: list[str] = field(default_factory=list)
    xet: bool = True

    def look(self) -> None:
        """Note the branches and tags."""
        refs = call(
            f"look at '{self.repo_id}'", _or_none(RepositoryNotFoundError, self.api.list_repo_refs), self.repo_id
        )
        if refs is not None:
            self.exists = True
            self.heads = {ref.name: ref.target_commit for ref in refs.branches}
            self.tags = {ref.name for ref in refs.tags}

    def check(self, branch: str, tags: list[str], create_pr: bool) -> None:
        """Refuse what the repository as it is does not allow."""
        if create_pr and (tags or branch != MAIN):
            raise ArpHubError("a pull request has no tag and goes to main: leave out tag and revision")
        self.look()
        if create_pr and not self.exists:
            raise ArpHubError(f"there is no repository '{self.repo_id}' to open a pull request in: check the name")
        for tag in filter(self.tags.__contains__, tags):
            raise ArpHubError(f"'{self.repo_id}' has the tag '{tag}' already: choose another, a tag should not move")
        if branch in self.tags:
            raise ArpHubError(f"'{branch}' is a tag of '{self.repo_id}', not a branch: choose another revision")

    def earlier_card(self, branch: str) -> str:
        """The card on a branch before this push, empty if there is none."""
        head = self.heads.get(branch)
        if head is None:
            return ""
        fetch = _or_none(EntryNotFoundError, self.api.hf_hub_download)
        path = call("read the present card", fetch, self.repo_id, CARD, revision=head, cache_dir=self.scratch / "cache")
        return Path(path).read_text(encoding="utf-8") if path else ""

    def publish(self, uploads: list[Upload], message: str, *, private: bool | None, create_pr: bool) -> Published:
        """Make the repository and branches if need be, upload, commit and tag. A failure takes back what was made."""
        main, *others = uploads
        with ExitStack() as made:
            if not self.exists:
                call(f"create '{self.repo_id}'", self.api.create_repo, self.repo_id, private=private, exist_ok=True)
                made.push(_on_error(self._remove_empty_repository))
                self.look()
            for upload in uploads:
                if upload.branch not in self.heads:
                    self._make_branch(upload.branch)
                    made.push(_on_error(self._remove_branch, upload.branch))
            for upload in uploads if not create_pr else ():
                self._send_weights(upload)
            for upload in others:  # first, so that main's card never names a branch that is not there
                self._commit(upload, message, create_pr=False)
            info = self._commit(main, message, create_pr=create_pr)
        url = info.pr_url or f"{self.api.endpoint}/{self.repo_id}"
        for upload in uploads:
            if upload.tag:
                what = f"set the tag '{upload.tag}' on '{self.repo_id}'"
                call(what, self.api.create_tag, self.repo_id, tag=upload.tag, revision=upload.branch, exist_ok=True)
        where = info.pr_revision or main.branch
        return Published(self.repo_id, url, info.oid, where, others[0].branch if others else None, main.tag)

    def _make_branch(self, branch: str) -> None:
        what = f"make the branch '{branch}' of '{self.repo_id}'"
        call(what, self.api.create_branch, self.repo_id, branch=branch, exist_ok=True)
        self.heads[branch] = self.heads[MAIN]

    def _send_weights(self, upload: Upload) -> None:
        """Upload large files; nobody sees them before a commit names them."""
        what = f"upload the weights to '{self.repo_id}'"
        files = {name: path for name, path in upload.files.items() if name == WEIGHTS}
        call(what, self._xet_or_plain, lambda: self.api.preupload_lfs_files(
            self.repo_id, _additions(files), revision=upload.branch
        ))  # fmt: skip

    def _commit(self, upload: Upload, message: str, *, create_pr: bool) -> Any:
        """One commit with all files of a branch, without the pictures that are no longer drawn.

        Tried again after a lost answer, it finds its files there and changes nothing.
        """

        def commit() -> Any:
            listed = self.api.list_repo_files(self.repo_id, revision=upload.branch)
            gone = [name for name in listed if name in PICTURES and name not in upload.files]
            return self.api.create_commit(
                self.repo_id,
                [*_additions(upload.files), *(CommitOperationDelete(name) for name in gone)],
                commit_message=message,
                revision=upload.branch,
                parent_commit=None if create_pr else self.heads[upload.branch],
                create_pr=create_pr,
            )

        info = call(f"commit to '{self.repo_id}'", self._xet_or_plain, commit, again=not create_pr)
        self.changed.append("a pull request" if create_pr else f"branch '{upload.branch}'")
        return info

    def _xet_or_plain(self, send: Callable[[], Any]) -> Any:
        """Send files as the client prefers; where the Hub has no Xet, through plain LFS from then on."""
        if uses_xet() and self.xet:
            try:
                return send()
            except (ConnectionError, RuntimeError) as error:
                _logger.warning("no upload through Xet: %s; going on with plain LFS", explain(error))
                self.xet = False
        with plain_uploads():
            return send()

    def _remove_empty_repository(self) -> None:
        if set(self.api.list_repo_files(self.repo_id)) <= {".gitattributes"}:
            self.api.delete_repo(self.repo_id)
            self.changed.clear()

    def _remove_branch(self, branch: str) -> None:
        self.api.delete_branch(self.repo_id, branch=branch)
        if f"branch '{branch}'" in self.changed:
            self.changed.remove(f"branch '{branch}'")


@contextmanager
def open_repository(repo_id: str, token: str | None, create_pr: bool) -> Iterator[Repository]:
    """A repository that the token may write to, with a scratch folder."""
    check_name(repo_id)
    token = token or get_token()
    if not token:
        raise ArpHubError(
            f"no token to publish '{repo_id}' with: log in with `hf auth login`, set HF_TOKEN or pass token="
        )
    api = HfApi(token=token)
    who = call("log in to the Hub", api.whoami)
    user, role = who["name"], who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ArpHubError(
            f"the token of '{user}' may only read: use one with write access (https://huggingface.co/settings/tokens)"
        )
    full = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", ())}
    namespace = full.partition("/")[0]
    if not create_pr and namespace != user and orgs.get(namespace, "read") == "read":
        raise ArpHubError(
            f"'{user}' may not write to '{full}', which belongs to '{namespace}': push to "
            f"'{user}/{full.partition('/')[2]}', or open a pull request with create_pr=True (--create-pr)"
        )
    with tempfile.TemporaryDirectory(prefix="arp-hub-") as scratch:
        yield Repository(api, full, Path(scratch))


def check_name(repo_id: str) -> None:
    """Refuse what the Hub would not take as a repository's name."""
    try:
        validate_repo_id(repo_id)
    except FAILURES as error:
        raise ArpHubError(f"'{repo_id}' is no valid name for a repository: {explain(error)}") from None


def _additions(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())]


def _or_none(kind: type[Exception], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with None for an answer that says there is no such thing."""

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except kind:
            return None

    return attempt


def _on_error(function: Callable[..., None], *args: Any) -> Callable[..., bool]:
    """An exit of a with block that undoes something if the block fails; it tries once, and then says so."""

    def leave(kind: type[BaseException] | None, *_: Any) -> bool:
        if kind is not None:
            try:
                function(*args)
            except FAILURES as error:
                _logger.warning("what was made on the Hub could not be removed: %s", explain(error))
        return False

    return leave
