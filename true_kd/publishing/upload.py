"""Sends a parcel to the Hugging Face hub: one commit, to a repository that is private unless the caller says otherwise.

What is there is looked at before anything is sent, so that nothing meant to be private reaches a public place.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from true_kd.errors import EnvironmentProblem, InputError, TrueKDError
from true_kd.publishing.parcel import Parcel
from true_kd.suggest import printable, quote, redact


@dataclass(frozen=True)
class Destination:
    """Where a parcel goes."""

    repo: str
    revision: str | None = None
    """A branch, made where it is not there; None for main."""
    is_public: bool = False


@dataclass(frozen=True)
class Uploaded:
    """What came of it."""

    url: str
    commit: str
    """The address of the commit; of the latest one, where nothing had changed."""
    is_private: bool
    is_new: bool
    """Whether the repository was made for it."""
    is_unchanged: bool
    """Whether all of it was there already, so that there is no new commit."""


class HubProblem(EnvironmentProblem):
    """The hub cannot be reached, or does not let us in."""


def check_destination(to: Destination) -> None:
    """Raise InputError where a name cannot be one of the hub's; the hub is not asked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to.repo)
    except HFValidationError as error:
        raise InputError(
            f"REPO {quote(to.repo)}: not a name of the hub, expected OWNER/NAME. {_brief(error)}"
        ) from error
    if to.repo.count("/") != 1:
        raise InputError(f"REPO {quote(to.repo)}: no owner, expected OWNER/NAME. Write whose it is.")
    if to.revision is not None and not re.fullmatch(r"\w[\w./-]{0,200}", to.revision):
        raise InputError(f"--revision {quote(to.revision)}: not the name of a branch. Write another.")


def upload(parcel: Parcel, to: Destination, message: str) -> Uploaded:
    """Send a parcel in one commit; the repository is made where it is not there.

    Raises
    ------
    HubProblem
        without a token or a network, and where the hub refuses; nothing was committed then.
    InputError
        when the repository is public and that was not asked for, or its name is refused.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    made, fault = False, None
    try:
        token = get_token()
        if token is None:
            raise HubProblem("hub: no token here, expected one to upload with. Run `hf auth login`.")
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="true-kd")
        try:
            is_private, is_there = api.repo_info(to.repo).private, True
        except RepositoryNotFoundError as error:
            if _status(error) != 404:
                raise
            is_there = False
        if not is_there:
            api.create_repo(to.repo, private=not to.is_public)
            made = True
            is_private = api.repo_info(to.repo).private
        if not is_private and not to.is_public:
            found = "made public by the hub" if made else "there already, and public"
            raise InputError(f"{to.repo}: {found}, expected a private repository. Give --public, or another name.")
        if to.revision is not None:
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        files = [CommitOperationAdd(name, str(parcel.folder / name)) for name in parcel.names]
        head = api.repo_info(to.repo, revision=to.revision).sha
        commit = api.create_commit(to.repo, files, commit_message=message, revision=to.revision)
    except TrueKDError:
        raise
    except Exception as error:  # noqa: BLE001 - what the hub's libraries raise differs with their versions
        fault = error
    if fault is not None:
        raise _told(fault, to, made) from fault
    return Uploaded(f"{api.endpoint}/{to.repo}", commit.commit_url, bool(is_private), made, commit.oid == head)


def _told(error: Exception, to: Destination, made: bool) -> TrueKDError:
    """What went wrong, in a line."""
    left = f" The new repository {to.repo} is there, and empty." if made else ""
    status = _status(error)
    where = f"hub: {to.repo}: "
    reason = f"{status}: {_reason(error)}" if status else _brief(error)
    if status == 401:
        return HubProblem(f"hub: the token is not accepted ({reason}). Run `hf auth login` again.{left}")
    if status == 403:
        return HubProblem(
            f"{where}this token may not write there ({reason}). Use one with write access, or your own OWNER.{left}"
        )
    if status == 402 or status == 413 or (status and "quota" in reason.lower()):
        return HubProblem(f"{where}no room there ({reason}). Free some of its storage.{left}")
    if status == 404:
        return HubProblem(f"{where}not found ({reason}). Check the name, the branch, and what the token may see.{left}")
    if status == 409:
        return InputError(f"{where}the name is taken ({reason}). Choose another.")
    if status in (400, 422):
        return InputError(f"{where}refused ({reason}). Choose another name or licence.{left}")
    if status is not None:
        return HubProblem(f"{where}the hub failed ({reason}). Run it again later: nothing was committed.{left}")
    if "offline" in reason.lower():
        return HubProblem(f"hub: offline mode is on (HF_HUB_OFFLINE), expected a network. Unset it.{left}")
    return HubProblem(
        f"hub: cannot be reached, or the connection broke ({reason}). Run it again: nothing was committed.{left}"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _response(error: BaseException) -> Any:
    found = (getattr(one, "response", None) for one in _chain(error))
    return next((response for response in found if response is not None), None)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer; None where it gave none."""
    return getattr(_response(error), "status_code", None)


def _reason(error: BaseException) -> str:
    """What the hub itself said, without addresses and secrets."""
    response = _response(error)
    said = response.headers.get("X-Error-Message") or ""
    with contextlib.suppress(ValueError, RuntimeError):
        body = response.json()
        said = said or str(body.get("error", "") if isinstance(body, dict) else "")
    return _cut(said or getattr(response, "reason_phrase", "") or "no reason given")


def _brief(error: BaseException) -> str:
    last = [*_chain(error)][-1]
    return _cut(str(last) or type(last).__name__)


def _cut(text: str) -> str:
    line = " ".join(redact(text).split())
    return printable(line[:197] + "..." if len(line) > 200 else line).rstrip(".")
