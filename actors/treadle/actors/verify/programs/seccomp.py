"""The system calls that a sandboxed program is refused, as a BPF program.

A list of refusals, not of permissions: five language runtimes on several C libraries need most of the table.
What is refused is what reaches other processes, other namespaces, the network, the kernel's configuration, or
a large attack surface that no exercise needs.
"""

from __future__ import annotations

import errno
import tempfile
from functools import lru_cache

from treadle.actors.verify.programs.records import SandboxError

_REFUSED = {
    "reaches other processes": "ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd "
    "move_pages migrate_pages setpriority ioprio_set",
    "changes namespaces, mounts, roots": "unshare setns mount umount2 pivot_root chroot move_mount open_tree "
    "fsopen fsconfig fsmount fspick mount_setattr open_by_handle_at name_to_handle_at quotactl swapon swapoff",
    "reaches the network (socketpair stays: it reaches nobody)": "socket",
    "makes objects that outlive their process": "shmget msgget semget mq_open add_key request_key keyctl",
    "makes memory that no process is charged with": "memfd_create memfd_secret",
    "changes the kernel or its clocks": "kexec_load kexec_file_load init_module finit_module delete_module "
    "reboot syslog acct settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm",
    "is large and needed by no exercise": "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter "
    "io_uring_register fanotify_init lookup_dcookie modify_ldt vhangup",
}
_OWN_GROUP = ("setsid", "setpgid")
"""Refused where a process group, not a namespace, is what gets killed."""
_OF_OTHERS = (
    "prlimit64",
    "sched_setaffinity",
    "sched_setparam",
    "sched_setscheduler",
    "sched_setattr",
)
"""Refused with a process id other than 0 (oneself)."""
_CLONE_NAMESPACES = (
    0x00000080,  # CLONE_NEWTIME
    0x00020000,  # CLONE_NEWNS
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
)
_SHARED_ANONYMOUS = 0x21
"""Flags of `mmap`: a child could fill such memory and end, and no living process would be charged with it."""


@lru_cache(maxsize=2)
def bpf(keep_group: bool) -> bytes:
    """The filter for this machine's architecture; others (32-bit calls on a 64-bit kernel) end the process.

    `keep_group`: also refuse to leave the process group. Raises `SandboxError` without libseccomp.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxError(
            f"verify, sandbox: libseccomp cannot be loaded ({error}).",
            "Install it: apt-get install libseccomp2, pip install pyseccomp.",
        ) from error
    refuse = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    for name in (*" ".join(_REFUSED.values()).split(), *(_OWN_GROUP if keep_group else ())):
        if _known(pyseccomp, name):
            rules.add_rule(refuse, name)
    for name in _OF_OTHERS:
        rules.add_rule(refuse, name, pyseccomp.Arg(0, pyseccomp.NE, 0))
    for flag in _CLONE_NAMESPACES:
        rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    rules.add_rule(
        refuse, "mmap", pyseccomp.Arg(3, pyseccomp.MASKED_EQ, _SHARED_ANONYMOUS, _SHARED_ANONYMOUS)
    )
    # Its flags are behind a pointer, which a filter cannot follow; C libraries fall back to clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _known(pyseccomp: object, name: str) -> bool:
    """Whether the call exists on this architecture and in this version of libseccomp."""
    return int(pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)) != -1  # type: ignore[attr-defined]
