"""Rows 7 and 10 together: the node on which a detached controller lives is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.chaos.attached import QUICK_CHECKS, family
from tests.chaos.book import Row, write_row
from tests.chaos.detached import Detached, importable, told
from tests.chaos.links import NEEDS_LINKS, link_to_a_second_machine
from tests.chaos.runs import WHOLE_RUN, account, clean, first_step_after, same_bits
from tests.clusters import Node, RunningCluster, cluster_of, end_node
from tests.e2e.programs import samples_of

pytestmark = [*WHOLE_RUN, NEEDS_LINKS]

TOLD_S = 15.0
HOSTS = ("first", "second")
ROUNDS = 8


@contextmanager
def three_machines() -> Iterator[tuple[RunningCluster, tuple[str, ...]]]:
    """The head is here, without room for roles; the others have networks and names of their own. Also gives the words
    within which a client runs on the first of them."""
    with ExitStack() as stack:
        links = [stack.enter_context(link_to_a_second_machine(number)) for number in (1, 2)]
        within = [(*link.within, *_named(host)) for link, host in zip(links, HOSTS, strict=True)]
        others = [
            Node(cpus=6, host=link.far, within=words) for link, words in zip(links, within, strict=True)
        ]
        stack.enter_context(importable())
        head = Node(cpus=0, host=links[0].near)
        yield stack.enter_context(cluster_of(head, *others, **QUICK_CHECKS)), within[0]


def _named(host: str) -> tuple[str, ...]:
    return ("unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh")


def away_from_the_head(cluster: RunningCluster, folder: Path, within: tuple[str, ...]) -> Detached:
    """A run whose controller is not on the head's machine. Ray chooses, and does not always choose the client's: what
    it has put on the head is ended, and asked for again."""
    for number in range(ROUNDS):
        (folder / str(number)).mkdir()
        run = Detached(cluster, folder / str(number), within=within)
        run.begin()
        if run.state["controller"]["host"] in HOSTS:
            return run
        run.__exit__()
        assert run.all_gone(), run.program.survivors()
    raise AssertionError(f"Ray has put the controller on the head {ROUNDS} times in a row")


def test_row_07_the_node_of_a_detached_controller_is_lost_and_the_run_resumed(
    tmp_path: Path, undisturbed: Path
) -> None:
    with three_machines() as (cluster, there), away_from_the_head(cluster, tmp_path, there) as run:
        host = run.state["controller"]["host"]
        lost = cluster.nodes[1 + HOSTS.index(host)]
        roles = sorted({process.name() for process in family(lost, "ray::")})
        assert any("Controller" in role for role in roles), roles
        killed = time.monotonic()
        run.client.kill()
        end_node(lost)
        attached = told(cluster, "attach", str(run.folder))
        seconds = [time.monotonic() - killed]
        while "running, attempt 1" in (status := told(cluster, "status", str(run.folder))).out:
            assert time.monotonic() - killed < 4 * TOLD_S, status
        seconds.append(time.monotonic() - killed)
        assert attached.code == 1, attached
        assert "its node died" in attached.complaint, attached
        assert f"treadle resume {run.folder} --detach" in attached.complaint
        assert attached.err.count("\n") == 1, attached.err
        assert status.code == 0, status
        assert ": killed, attempt 1" in status.out, status
        assert "its node died" in status.out, status
        assert f"treadle resume {run.folder} --detach" in status.out
        assert run.all_gone(), run.program.survivors()
        resumed = time.time()
        ended = told(cluster, "resume", str(run.folder), "--detach")
        assert ended.code == 0, ended
        assert "rl 6/6" in ended.out
        assert (run.state["attempts"], run.state["state"]) == (2, "finished")
        assert run.state["controller"]["host"] != host
    found = account(run.folder)
    write_row(
        Row(
            row=7,
            fault="the node of a detached controller is lost: from then until treadle attach and status have said so",
            seconds=seconds,
            budget_s=TOLD_S,
            account=found,
            same_bits=same_bits(run.folder, undisturbed),
            figures={
                "resumed_s": round(first_step_after(run.folder, resumed), 3),
                "roles on it": ", ".join(roles),
            },
        )
    )
    assert clean(found), found
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)
    assert max(seconds) <= TOLD_S, seconds
