"""A repository on the Hub: inspect it, and publish to it. A failed push is undone."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from .._utils.secrets import remember
from ..errors import ArpHubError
from .card import PICTURES
from .client import FAILURES, ODD_ANSWERS, HubFailure, call, explain, plain_uploads, uses_xet
from .export_files import EXPORT, EXPORT_FILES
from .save import CARD, WEIGHTS
from .staging import MAIN, Upload

_logger = logging.getLogger(__name__)
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|\.lock(/|$)|^[-/]|[/.]$|^@?$")
"""What no branch or tag of git may have in its name (``git check-ref-format``)."""


@dataclass(frozen=True)
class Published:
    """The result of `push_to_hub`.

    Attributes:
        repo_id: The repository, ``user/name``.
        url: The page of the repository or of the pull request.
        commit: The commit with the model.
        revision: The branch with that commit, or the reference of the pull request.
        dense_revision: The branch with the merged model, or None.
        tag: The tag of this version, or None.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    dense_revision: str | None
    tag: str | None


@dataclass
class Repository:
    """A repository, with its branches and tags before the push and the changes made so far."""

    api: HfApi
    repo_id: str
    scratch: Path
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    exists: bool = False
    changed: list[str] = field(default_factory=list)
    xet: bool = True

    def look(self) -> None:
        """Read the branches and tags."""
        refs = call(
            f"look at '{self.repo_id}'", _or_none(RepositoryNotFoundError, self.api.list_repo_refs), self.repo_id
        )
        if refs is not None:
            self.exists = True
            self.heads = {ref.name: ref.target_commit for ref in refs.branches}
            self.tags = {ref.name: ref.target_commit for ref in refs.tags}

    def check(self, branches: Sequence[str], tags: Sequence[str], create_pr: bool, private: bool | None) -> None:
        """Check that the repository allows this push.

        Args:
            branches: The branches to write, that of the model first.
            tags: The tags to set.
            create_pr: Whether a pull request is opened in place of a commit.
            private: Whether a new repository is private.

        Raises:
            ArpHubError: If git takes no such name, a tag is taken, a name would be both a branch and a tag or stand for
                two branches, the repository is more or less public than asked for, or a pull request is impossible.
        """
        branch = branches[0]
        for name in filter(_NO_REF.search, (*branches, *tags)):
            raise ArpHubError(f"{name!r} cannot name a branch or a tag in git: use letters, digits, '.', '-' and '_'")
        if create_pr and (tags or branch != MAIN):
            raise ArpHubError("a pull request has no tag and goes to main: leave out tag and revision")
        self.look()
        if create_pr and not self.exists:
            raise ArpHubError(f"there is no repository '{self.repo_id}' to open a pull request in: check the name")
        for tag in filter(self.tags.__contains__, tags):
            raise ArpHubError(f"'{self.repo_id}' has the tag '{tag}' already: choose another tag")
        for name in filter(self.tags.__contains__, branches):
            raise ArpHubError(f"'{name}' is a tag of '{self.repo_id}', not a branch: choose another revision")
        if len(set(branches)) < len(branches):
            raise ArpHubError(f"the model and its merged form cannot both be '{branch}': choose another dense_revision")
        for name in filter({MAIN, *branches, *self.heads}.__contains__, tags):
            raise ArpHubError(f"the tag '{name}' would have the name of a branch: choose another tag")
        if self.exists and private is not None and not create_pr:
            public = not call(f"look at '{self.repo_id}'", self.api.repo_info, self.repo_id).private
            if private == public:
                found, asked = ("public", "private") if public else ("private", "public")
                raise ArpHubError(
                    f"'{self.repo_id}' exists and is {found}, so that a push does not make it {asked}: change that in "
                    "its settings on the Hub, or leave private out"
                )

    def warn_of_old_merged(self, branch: str | None) -> None:
        """Say so if the merged model on the Hub stays that of earlier weights."""
        if branch in self.heads:
            _logger.warning(
                "the branch '%s' of '%s' stays as it is: it holds the merged model of an earlier push, not of this one",
                branch,
                self.repo_id,
            )

    def earlier_card(self, branch: str) -> str:
        """The card on a branch before this push, or an empty text."""
        head = self.heads.get(branch)
        if head is None:
            return ""
        fetch = _or_none(EntryNotFoundError, self.api.hf_hub_download)
        path = call(
            "read the card on the Hub", fetch, self.repo_id, CARD, revision=head, cache_dir=self.scratch / "cache"
        )
        return Path(path).read_text(encoding="utf-8") if path else ""

    def publish(self, uploads: list[Upload], message: str, *, private: bool | None, create_pr: bool) -> Published:
        """Create the repository and branches if missing, upload, commit and tag. A failure removes what was created."""
        main, *others = uploads
        with ExitStack() as made:
            if not self.exists:
                create = _unless_there(self.api.create_repo)
                created = call(f"create '{self.repo_id}'", create, self.repo_id, private=private)
                self.look()
                if MAIN not in self.heads:
                    raise HubFailure(
                        f"'{self.repo_id}' is being created or removed by somebody else: push again in a minute"
                    )
                if created:
                    made.push(_on_error(self._remove_empty_repository, self.heads[MAIN]))
            for upload in uploads:
                if upload.branch not in self.heads:
                    if self._make_branch(upload.branch):
                        made.push(_on_error(self._remove_branch, upload.branch))
            for upload in uploads if not create_pr else ():
                self._send_weights(upload)
            for upload in others:  # first, so that main's card never names a missing branch
                self._commit(upload, message, create_pr=False)
            info = self._commit(main, message, create_pr=create_pr)
        url = info.pr_url or f"{self.api.endpoint}/{self.repo_id}"
        with ExitStack() as made:  # the next attempt may set all of them
            for upload in uploads:
                if upload.tag and self._set_tag(upload.tag, self.heads[upload.branch]):
                    made.push(_on_error(self._remove_tag, upload.tag))
        where = info.pr_revision or main.branch
        return Published(self.repo_id, url, info.oid, where, others[0].branch if others else None, main.tag)

    def _make_branch(self, branch: str) -> bool:
        """Create a branch at the head of main; False if another push has created it first."""
        what, head = f"create the branch '{branch}' of '{self.repo_id}'", self.heads[MAIN]
        made = call(what, _unless_there(self.api.create_branch), self.repo_id, branch=branch, revision=head)
        self.heads[branch] = head
        return made

    def _set_tag(self, tag: str, commit: str) -> bool:
        """Tag a commit of this push. It is an error if another push has set the tag first.

        Returns:
            Whether this push has certainly set it.
        """
        what = f"set the tag '{tag}' on '{self.repo_id}'"
        made = call(what, _unless_there(self.api.create_tag), self.repo_id, tag=tag, revision=commit)
        if not made:
            self.look()
            if self.tags.get(tag) != commit:
                raise HubFailure(f"cannot {what}: somebody else set it during the push: choose another tag")
        return made

    def _send_weights(self, upload: Upload) -> None:
        """Upload the weights. They stay invisible until a commit names them."""
        what = f"upload the weights to '{self.repo_id}'"
        files = {name: path for name, path in upload.files.items() if name == WEIGHTS}
        call(what, self._xet_or_plain, lambda: self.api.preupload_lfs_files(
            self.repo_id, _additions(files), revision=upload.branch
        ))  # fmt: skip

    def _commit(self, upload: Upload, message: str, *, create_pr: bool) -> Any:
        """Commit all files of a branch, and delete generated ones that this push lacks.

        Exports that this push lacks stay if the weights are those that they were made of.

        A retry after a lost answer finds the files in place and changes nothing.
        """

        def commit() -> Any:
            tree = self.api.list_repo_tree(self.repo_id, revision=upload.branch, recursive=True)
            listed = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            additions = _additions(upload.files)
            kept = set() if not _holds_weights(listed, additions) else _exports(listed) - _exports(upload.files)
            generated = {*PICTURES, *_exports(listed)} - kept
            gone = [name for name in listed if name in generated and name not in upload.files]
            return self.api.create_commit(
                self.repo_id,
                [*additions, *(CommitOperationDelete(name) for name in gone)],
                commit_message=message,
                revision=upload.branch,
                parent_commit=None if create_pr else self.heads[upload.branch],
                create_pr=create_pr,
            )

        info = call(f"commit to '{self.repo_id}'", self._xet_or_plain, commit, again=not create_pr)
        self.changed.append("a pull request" if create_pr else f"branch '{upload.branch}'")
        if not create_pr:
            self.heads[upload.branch] = info.oid
        return info

    def _xet_or_plain(self, send: Callable[[], Any]) -> Any:
        """Send files through Xet if possible; after a failure, through plain LFS for the rest of the push."""
        if uses_xet() and self.xet:
            try:
                return send()
            except (ConnectionError, RuntimeError) as error:
                _logger.warning("cannot upload through Xet: %s; continuing with plain LFS", explain(error))
                self.xet = False
        with plain_uploads():
            return send()

    def _remove_empty_repository(self, first: str) -> None:
        """Remove the repository that this push created, unless somebody else has changed it."""
        refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        if {ref.name: ref.target_commit for ref in refs.branches} == {MAIN: first} and not (
            refs.tags or refs.pull_requests
        ):
            self.api.delete_repo(self.repo_id)
            self.changed.clear()

    def _remove_tag(self, tag: str) -> None:
        """Remove a tag that this push has set."""
        self.api.delete_tag(self.repo_id, tag=tag)

    def _remove_branch(self, branch: str) -> None:
        """Remove a branch that this push created, unless somebody else has committed to it."""
        refs = self.api.list_repo_refs(self.repo_id)
        if self.heads[branch] not in [ref.target_commit for ref in refs.branches if ref.name == branch]:
            return
        self.api.delete_branch(self.repo_id, branch=branch)
        if f"branch '{branch}'" in self.changed:
            self.changed.remove(f"branch '{branch}'")


@contextmanager
def open_repository(repo_id: str, token: str | None, create_pr: bool) -> Iterator[Repository]:
    """Open a repository that the token may write to, with a scratch folder."""
    check_name(repo_id)
    token = token or get_token()
    if not token:
        raise ArpHubError(f"no token to publish '{repo_id}': log in with `hf auth login`, set HF_TOKEN or pass token=")
    remember(token)
    api = HfApi(token=token)
    user, role, orgs = call("log in to the Hub", _who, api)
    if role == "read":
        raise ArpHubError(
            f"the token of '{user}' may only read: use one with write access (https://huggingface.co/settings/tokens)"
        )
    full = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    namespace = full.partition("/")[0]
    if not create_pr and namespace != user and orgs.get(namespace, "read") == "read":
        raise ArpHubError(
            f"'{user}' may not write to '{full}', which belongs to '{namespace}': push to "
            f"'{user}/{full.partition('/')[2]}', or open a pull request with create_pr=True (--create-pr)"
        )
    with tempfile.TemporaryDirectory(prefix="arp-hub-") as scratch:
        yield Repository(api, full, Path(scratch))


def _who(api: HfApi) -> tuple[str, str | None, dict[str, str | None]]:
    """The user, the token's role, and the user's role in each organisation."""
    who = api.whoami()
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    return who["name"], role, {org["name"]: org.get("roleInOrg") for org in who.get("orgs", ())}


def check_name(repo_id: str) -> None:
    """Check a repository's name by the rules of the Hub."""
    if not isinstance(repo_id, str):
        raise ArpHubError(f"the name of a repository must be text, got {type(repo_id).__name__} {repo_id!r:.100}")
    try:
        validate_repo_id(repo_id)
    except FAILURES as error:
        raise ArpHubError(f"'{repo_id}' is not a valid name for a repository: {explain(error)}") from None


def _holds_weights(listed: Mapping[str, RepoFile], additions: Sequence[CommitOperationAdd]) -> bool:
    """Whether a repository has the very weights that are to be uploaded."""
    there = listed[WEIGHTS].lfs if WEIGHTS in listed else None
    new = [addition.upload_info.sha256.hex() for addition in additions if addition.path_in_repo == WEIGHTS]
    return there is not None and new == [there.sha256]


def _exports(listed: Collection[str]) -> set[str]:
    """The paths that files of exports may have: in the folders among ``listed`` that hold an ``export.json``."""
    places = [place for name in listed for place, _, file in [name.rpartition("/")] if place and file == EXPORT]
    return {f"{place}/{file}" for place in places for file in EXPORT_FILES}


def _additions(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())]


def _or_none(kind: type[Exception], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, returning None if it raises ``kind``."""

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except kind:
            return None

    return attempt


def _unless_there(make: Callable[..., Any]) -> Callable[..., bool]:
    """Create something on the Hub; False if it already exists.

    A retry after a lost answer also gives False, because the first attempt may have created it. A failed push removes
    only what it certainly created itself.
    """

    def attempt(*args: Any, **kwargs: Any) -> bool:
        try:
            make(*args, **kwargs)
            return True
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            return False

    return attempt


def _on_error(function: Callable[..., None], *args: Any) -> Callable[..., bool]:
    """An exit of a with block that undoes something if the block fails. It tries once, and warns if it cannot."""

    def leave(kind: type[BaseException] | None, *_: Any) -> bool:
        if kind is not None:
            try:
                function(*args)
            except (*FAILURES, *ODD_ANSWERS) as error:
                _logger.warning("what this push created on the Hub could not be removed: %s", explain(error))
        return False

    return leave
