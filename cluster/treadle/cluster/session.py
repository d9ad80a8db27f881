"""Opening and closing Ray: embedded in this process's own cluster, or attached to a running one."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from treadle.cluster.environment import NO_PRESTART, given_token, prepare_embedded, prepare_environment
from treadle.cluster.reach import check_cluster, split_address
from treadle.cluster.warm_start import LOG, pays, template
from treadle.platform.errors import ClusterError, ConfigError
from treadle.platform.failpoints import ENV
from treadle.platform.records import RoleSpec

_TEMP_PREFIX = "treadle-ray-"
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which Ray to run on."""

    address: str = ""
    """Empty: an embedded Ray that lives and dies with this process. "host:port": the GCS of a running cluster
    one of whose nodes is this machine. "auto": the cluster this process was started in, e.g. as a job."""
    num_cpus: int = 0
    """Embedded: logical CPUs to declare; 0 for as many as the roles need, at least those of the machine."""
    object_store_memory_bytes: int = 0
    """Embedded: shared memory for objects; 0 for 1 GiB, or half of what is free if that is less."""
    temp_dir: str = ""
    """Embedded: parent of Ray's private folder; empty for /tmp. Short: sockets lie in it."""
    warm_start: bool = True
    """Embedded, and no role has a GPU: role processes are forked from one that has imported torch, transformers and
    DeepSpeed, and start in tenths of a second. Off: every process imports for itself."""
    dashboard: bool = False
    """Embedded: start Ray's dashboard (some seconds and 200 MB more)."""
    token_file: str = ""
    """File with the cluster's token; empty for RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. An embedded Ray makes
    its own if none is given."""
    connect_deadline_s: float = 10.0
    """For a running cluster to answer."""
    placement_deadline_s: float = 300.0
    """For all roles to be placed; what can never be placed is refused at once."""

    def check(self) -> None:
        """Raises `ConfigError` naming the setting."""
        if self.address and self.address != "auto":
            try:
                split_address(self.address)
            except ClusterError as error:
                raise ConfigError(error.message, error.remedy) from error
        for name in ("num_cpus", "object_store_memory_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"cluster.{name}={getattr(self, name)} is negative.", "Use 0 for automatic."
                )
        if 0 < self.object_store_memory_bytes < 80 * _MIB:
            raise ConfigError(
                f"cluster.object_store_memory_bytes={self.object_store_memory_bytes} is below Ray's minimum.",
                "Use at least 83886080 (80 MiB), or 0 for automatic.",
            )
        for name in ("connect_deadline_s", "placement_deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster.{name} must be positive.", "Choose a larger value.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An open Ray. `dashboard_url` is empty without a dashboard."""

    embedded: bool
    gcs_address: str
    dashboard_url: str


@contextlib.contextmanager
def open_session(
    config: ClusterConfig,
    specs: Sequence[RoleSpec] = (),
    logs: Path | None = None,
    preload: Sequence[str] = (),
    runtime_env: Mapping[str, object] | None = None,
) -> Iterator[Session]:
    """Ray for the duration of a `with`. In a process that Ray itself has started, a detached controller's, that is the
    Ray it belongs to. Elsewhere call it in the main thread: an embedded cluster dies with the thread
    that started it, which is also what leaves no process behind when this one is killed.

    `specs` are the roles to come; an embedded Ray declares enough logical CPUs for all of them. `logs` is a
    folder that keeps what its processes have written (a running cluster keeps its own). `preload` is what
    the roles' processes import (`warm_start.template`). `runtime_env` is what processes on a running cluster get from
    this one (`wheel.shipped`): code and variables, readable there by everybody. SIGTERM inside the
    block goes to the program's own handler, or raises `SystemExit` where it has none, so that everything is
    closed. Raises `ClusterError`.
    """
    if inside_ray():
        import ray

        yield _session(ray, embedded=False)
        return
    prepare_environment(config.token_file)
    _refuse_a_second_session()
    opened = (
        _attached(config, runtime_env or {}) if config.address else _embedded(config, specs, logs, preload)
    )
    handler = signal.getsignal(signal.SIGTERM)  # before Ray replaces it
    with opened as session, _sigterm_handled(handler if callable(handler) else _leave):
        yield session


@contextlib.contextmanager
def _embedded(
    config: ClusterConfig, specs: Sequence[RoleSpec], logs: Path | None, preload: Sequence[str]
) -> Iterator[Session]:
    prepare_embedded()
    parent = Path(config.temp_dir or "/tmp")
    _remove_leftovers(parent)
    try:
        folder = tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-", dir=parent)
    except OSError as error:
        raise ClusterError(
            f"cluster.temp_dir={parent} cannot be used: {error.strerror}.",
            "Choose a folder that can be written.",
        ) from error
    try:
        with _template(config, specs, Path(folder), preload) as runtime_env:
            import ray  # after the environment is complete

            try:
                _init(
                    ray,
                    address="local",
                    num_cpus=config.num_cpus or logical_cpus(specs),
                    object_store_memory=config.object_store_memory_bytes or _default_store_bytes(),
                    include_dashboard=config.dashboard,
                    runtime_env=runtime_env,
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                )
                yield _session(ray, embedded=True)
            finally:
                family = _family()
                ray.shutdown()
                _end_frozen(family)
    finally:
        _end_processes(folder)
        if logs is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide why the session ends
                _keep_logs(Path(folder), logs)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _template(
    config: ClusterConfig, specs: Sequence[RoleSpec], folder: Path, preload: Sequence[str]
) -> Iterator[dict[str, object]]:
    """The runtime environment of workers: forked from a template where that pays."""
    if not (config.warm_start and preload and pays(specs)):
        yield {}
        return
    os.environ.update(NO_PRESTART)
    with template(folder, preload) as executable:
        yield {"py_executable": executable}


def _keep_logs(folder: Path, logs: Path) -> None:
    """Copies what the role processes have written, and Ray's own errors; empty files are left out."""
    logs.mkdir(parents=True, exist_ok=True)
    patterns = [
        f"session_*/logs/{name}" for name in ("worker-*.out", "worker-*.err", "gcs_server.err", "raylet.err")
    ]
    for pattern in (LOG, *patterns):
        for file in folder.glob(pattern):
            if not file.is_symlink() and file.stat().st_size:
                shutil.copyfile(file, logs / file.name)


@contextlib.contextmanager
def _attached(config: ClusterConfig, runtime_env: Mapping[str, object]) -> Iterator[Session]:
    address = os.environ.get("RAY_ADDRESS", "auto") if config.address == "auto" else config.address
    token = given_token()
    if address != "auto":
        check_cluster(address, token, config.connect_deadline_s)
    if token:
        os.environ["RAY_AUTH_MODE"] = "token"
    # How long Ray looks for a node of the cluster on this machine; read once, when ray is imported.
    os.environ.setdefault("RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS", f"{config.connect_deadline_s:.0f}")
    import ray  # after the environment is complete

    try:
        _init(ray, address=address, runtime_env=_with_faults(runtime_env, os.environ))
        yield _session(ray, embedded=False)
    finally:
        ray.shutdown()


def _with_faults(runtime_env: Mapping[str, object], environ: Mapping[str, str]) -> dict[str, object]:
    """Adds the failpoints that were ordered of this process, for those on a running cluster: an embedded Ray's inherit
    them."""
    given = runtime_env.get("env_vars")
    variables = dict(given) if isinstance(given, Mapping) else {}
    variables |= {name: value for name, value in environ.items() if name.startswith(ENV)}
    return {**runtime_env, **({"env_vars": variables} if variables else {})}


def _init(ray: object, **options: object) -> None:
    """`ray.init` with its many ways to fail in one."""
    try:
        _try_to_init(ray, options)
    except Exception as error:
        if options["address"] == "local":
            remedy = (
                "Look for a full disk or /dev/shm, a temp_dir that is too long, or an overloaded machine."
            )
        else:
            remedy = "A driver must run on a machine of the cluster; from elsewhere, use `treadle submit`."
        raise ClusterError(f"Ray does not start: {_first_line(error)}", remedy) from error


def _try_to_init(ray: object, options: Mapping[str, object]) -> None:
    """Ray gives a new node 30 s, which a crowded machine may exceed when everything is read for the first
    time; the second attempt finds it in memory."""
    for attempt in range(2):
        try:
            ray.init(  # type: ignore[attr-defined]
                namespace="treadle", logging_level="error", log_to_driver=False, **options
            )
            # Of a process that dies Ray prints a page on standard output; we say it in a sentence.
            ray._private.worker._worker_logs_enabled = False  # type: ignore[attr-defined]
            return
        except Exception as error:
            if attempt or "timed out during startup" not in str(error):
                raise
            _end_processes(str(options["_temp_dir"]))


def _end_processes(folder: str) -> None:
    """Ends this process's children that work in `folder`: a start that fails leaves its first processes
    behind."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(folder in word for word in child.cmdline()):
                child.kill()


def _family() -> set[psutil.Process]:
    """What this process's children have started: the workers, of the raylet or of the template."""
    mine = psutil.Process()
    return {*mine.children(recursive=True)} - {*mine.children()}


def _end_frozen(family: Iterable[psutil.Process]) -> None:
    """A process that is stopped by a signal never notices that its Ray has ended."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() == psutil.STATUS_STOPPED:
                process.kill()


def _session(ray: object, *, embedded: bool) -> Session:
    context = ray.get_runtime_context()  # type: ignore[attr-defined]
    worker = ray._private.worker.global_worker  # type: ignore[attr-defined]
    url = worker.node.webui_url if worker.node is not None else ""
    return Session(
        embedded=embedded, gcs_address=context.gcs_address, dashboard_url=f"http://{url}" if url else ""
    )


def logical_cpus(specs: Sequence[RoleSpec]) -> int:
    """CPUs an embedded Ray declares: Ray counts them, it does not reserve cores, and on two cores all roles
    must fit."""
    return max(os.cpu_count() or 1, math.ceil(sum(spec.count * spec.cpus for spec in specs)) + 1)


def _default_store_bytes() -> int:
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else psutil.virtual_memory().available
    return max(min(1024 * _MIB, free // 2), 80 * _MIB)


def _remove_leftovers(parent: Path) -> None:
    """Folders of sessions whose process was killed before it could remove them."""
    for folder in parent.glob(f"{_TEMP_PREFIX}*-*"):
        pid = folder.name.removeprefix(_TEMP_PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def inside_ray() -> bool:
    """Whether this process is one that Ray has started for an actor."""
    ray = sys.modules.get("ray")
    return (
        ray is not None
        and ray.is_initialized()
        and bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)
    )


def _refuse_a_second_session() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise ClusterError("This process is already connected to a Ray cluster.", "Close that session first.")


@contextlib.contextmanager
def _sigterm_handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Signals can only be handled in the main thread; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, replaced)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
