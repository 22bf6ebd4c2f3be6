"""Runs that are shared: pushed to the Hugging Face Hub, and opened from there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from pyrovae import runs
from pyrovae.app.card import CARD, write_card
from pyrovae.arguments import one_line, one_of, require_packages
from pyrovae.errors import ResourceError

#: What is shared of a run, and of a run within it.
SHARED = (
    CARD, runs.CONFIG, runs.METRICS, runs.RESULTS, runs.REPORT, "*.png",
    *(f"{name}/{file}" for name in runs.CHECKPOINTS for file in (runs.WEIGHTS, runs.MANIFEST)),
)  # fmt: skip


def push_to_hub(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Share a run of pyrovae",
    token: str | bool | None = None,
    endpoint: str | None = None,
    override: bool = False,
) -> str:
    """Share a run: its weights as safetensors, config, metrics, results, pictures, and a model card, in one commit.

    The card (``README.md``) is written into the run first, unless there is one of your own. The optimizer's state stays
    here, as do files that are not the run's.

    :param run_dir: a run with at least one checkpoint, whose files are as they were saved.
    :param repo_id: such as ``"me/digits"``; made where it is not there yet.
    :param private: of a repository that is made.
    :param revision: a branch; the main one by default.
    :param token: of an account that may write; by default the one of ``hf auth login``.
    :param endpoint: another hub's address.
    :param override: share files, with a warning, that were changed since they were written.
    :return: the address of the model's page.
    :raises CheckpointError: for a folder that holds no whole run.
    :raises ResourceError: where the extra ``pyrovae[hub]`` is not installed, or the hub refuses or cannot be reached.

    >>> push_to_hub("runs/vae-digits-elbo", "me/digits")  # doctest: +SKIP
    'https://huggingface.co/me/digits'
    """
    require_packages("hub", "huggingface_hub")
    from huggingface_hub import HfApi

    run = runs.Run.of(run_dir, override=override)
    run.check_files()
    run.weights()
    write_card(run, repo_id)
    files = [path for inside in ("", "vqvae/") for name in SHARED for path in run.path.glob(inside + name)]
    hub = HfApi(endpoint=endpoint, token=token)
    with refused(f'"{repo_id}" could not be pushed to'):
        place = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=run.path, revision=revision, commit_message=message,
            allow_patterns=[glob.escape(path.relative_to(run.path).as_posix()) for path in files],
        )  # fmt: skip
    return str(place)


def from_pretrained(
    repo_id: str,
    *,
    revision: str | None = None,
    checkpoint: str = "last",
    pair: nn.Module | None = None,
    trust: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    override: bool = False,
) -> nn.Module:
    """The model of a run that was pushed to a hub, in eval mode; what was fetched before is not fetched again.

    It is opened as :func:`pyrovae.load` opens a run: nothing in it is executed, its files must hold what was saved, and
    a class that is not pyrovae's needs ``trust``, or the pair itself.

    :param repo_id: such as ``"me/digits"``.
    :param revision: a branch, a tag or a commit.
    :param checkpoint: ``"last"`` or ``"best"``.
    :param pair: an object to load the weights into.
    :param trust: import whatever class the config names.
    :param token: for what is private; by default the one of ``hf auth login``.
    :param endpoint: another hub's address.
    :param cache_dir: where it is kept; the hub's own cache by default.
    :param override: go on, with a warning, where files were changed.
    :raises CheckpointError: for what holds no run of pyrovae, or a damaged one.
    :raises ResourceError: where the extra ``pyrovae[hub]`` is not installed, or the hub refuses or cannot be reached.

    >>> from_pretrained("me/digits").decode  # doctest: +SKIP
    """
    require_packages("hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    one_of("checkpoint", checkpoint, runs.CHECKPOINTS)
    wanted = [runs.CONFIG, f"{checkpoint}/{runs.WEIGHTS}", f"{checkpoint}/{runs.MANIFEST}"]
    with refused(f'"{repo_id}" could not be fetched from'):
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=wanted, token=token, endpoint=endpoint,
            cache_dir=None if cache_dir is None else Path(cache_dir),
        )  # fmt: skip
    return runs.load(folder, pair=pair, checkpoint=checkpoint, trust=trust, override=override)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Say in one line that a hub refused, or was not reached."""
    try:
        yield
    except ValueError:  # of the name
        raise
    except Exception as error:
        raise ResourceError(f"{what} the hub: {one_line(error)}") from error
