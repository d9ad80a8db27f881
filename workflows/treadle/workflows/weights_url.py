"""A run's place behind `broadcast.url`, for as long as the run lasts.

    <url>/<id of the run>/000003-5f3a91c0/…   what the learner of the run's third attempt writes

A run that is continued removes what its earlier attempts left; a run that ends removes what it wrote itself. An attempt
that was replaced and does not know it removes nothing of its successor's.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.platform.errors import ConfigError, StorageError
from treadle.platform.mirror import new_id
from treadle.platform.storage import Store, open_store
from treadle.workflows.folder import RunFolder

PATIENCE_S = 10.0
"""How long the end of a run waits for its objects to be removed."""


def check_weights_url(config: BroadcastConfig) -> None:
    """For a run that is about to start. Raises `StorageError` or `ConfigError` where nobody answers at `broadcast.url`,
    or where one can not write, read and remove."""
    if not config.url:
        return
    path, data = f"probe-{secrets.token_hex(4)}", b"treadle"
    try:
        store = _store(config)
        store.create_exclusive(path, data)
        found = store.try_read(path)
        store.remove(path)
    except (NotImplementedError, ValueError, TypeError) as error:
        # A storage that is only read, or one that needs more than a URL.
        raise ConfigError(
            f"broadcast.url={config.url} cannot be written to ({error}).", "Use s3:// or file://."
        ) from error
    if found != data:
        raise StorageError(
            f"{store.url_of(path)} was written and cannot be read.", "Use another broadcast.url."
        )


@contextmanager
def weights_url(
    config: BroadcastConfig, folder: RunFolder, say: Callable[[str], None]
) -> Iterator[BroadcastConfig]:
    """`config` with the place of this attempt as its URL, which is empty again when the block has ended. `say` hears
    of what could not be removed within `PATIENCE_S`."""
    if not config.url:
        yield config
        return
    state = folder.state()
    id = str(state.get("id") or new_id())
    folder.set_state(id=id)
    attempt = int(state.get("attempts", 1))
    place = f"{attempt:06d}-{secrets.token_hex(4)}"
    run = _store(config).child(id)
    _removing(lambda: _remove_earlier(run, attempt))
    try:
        yield replace(config, url=run.url_of(place))
    finally:
        removing, failed = _removing(lambda: run.remove(place))
        removing.join(PATIENCE_S)
        if removing.is_alive() or failed:
            why = failed[0] if failed else f"it took longer than {PATIENCE_S:g} s"
            say(f"warning: {run.url_of(place)} holds weights that nobody needs, and was not removed: {why}")


def _store(config: BroadcastConfig) -> Store:
    return open_store(config.url, read_timeout_s=config.url_timeout_s)


def _remove_earlier(run: Store, attempt: int) -> None:
    for name in run.list():
        number = name.partition("-")[0]
        if number.isdecimal() and int(number) < attempt:
            run.remove(name)


def _removing(remove: Callable[[], None]) -> tuple[threading.Thread, list[str]]:
    """A thread that removes, and the reason should it fail. It holds up no end of the process."""
    failed: list[str] = []

    def run() -> None:
        try:
            remove()
        except StorageError as error:
            failed.append(error.message)

    thread = threading.Thread(target=run, name="weights-remove", daemon=True)
    thread.start()
    return thread, failed
