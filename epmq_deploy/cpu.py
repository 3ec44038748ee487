"""How many cores this process may use: what its affinity and its container allow, not the host."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

_TOPOLOGY = Path("/sys/devices/system/cpu")
_PROCESS = Path("/proc/self")


def usable_cores() -> int | None:
    """Return the number of physical cores that this process may keep busy, 1 or more.

    The smaller of the cores that its processors (``sched_getaffinity``) belong to and the whole
    processors in the quotas of its control groups (version 1 or 2) and of those they are in. More
    threads than that wait for each other. None where the system does not say.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = physical_cores(os.sched_getaffinity(0))
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores(processors: Collection[int], topology: Path = _TOPOLOGY) -> int:
    """Count the physical cores that logical processors belong to.

    Args:
        processors: their numbers.
        topology: the system's description; a processor that it lacks counts as a core.
    """
    siblings = set()
    for number in processors:
        file = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
        try:
            siblings.add(file.read_text(encoding="utf-8").strip())
        except OSError:
            siblings.add(str(number))
    return max(1, len(siblings))


def cpu_quota(process: Path = _PROCESS) -> float | None:
    """Return how many processors' time this process gets; None where nothing limits it.

    Args:
        process: folder with ``cgroup`` and ``mountinfo`` of the process.
    """
    try:
        groups = _groups((process / "cgroup").read_text(encoding="utf-8"))
        quotas = [
            quota
            for version, root, mounted in _mounts(
                (process / "mountinfo").read_text(encoding="utf-8")
            )
            if version in groups
            for folder in _upwards(groups[version], root, mounted)
            if (quota := _quota(folder, version)) is not None
        ]
    except (OSError, ValueError):  # a system that describes itself in another way
        return None
    return min(quotas, default=None)


def _groups(text: str) -> dict[int, PurePosixPath]:
    """Return the process's control groups that can limit processors, by version."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            groups[1] = PurePosixPath(path)
    return groups


def _mounts(text: str) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """Yield version, root within the hierarchy and mount point of its mounted control groups."""
    for line in text.splitlines():
        fields, _, details = line.partition(" - ")
        root, mounted = fields.split()[3:5]
        kind, *_, options = details.split()
        if kind == "cgroup2":
            yield 2, PurePosixPath(root), Path(mounted)
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield 1, PurePosixPath(root), Path(mounted)


def _upwards(group: PurePosixPath, root: PurePosixPath, mounted: Path) -> Iterator[Path]:
    """Yield the folders of a group and of those it is in, as far as they are mounted."""
    # A container sees its own group at the root of the mount, whatever the host calls it.
    inner = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
    folder = mounted / str(inner).lstrip("/")
    yield folder
    while folder != mounted and mounted in folder.parents:
        folder = folder.parent
        yield folder


def _quota(folder: Path, version: int) -> float | None:
    """Return the quota of one control group, in processors."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    unlimited = quota == "max" or int(quota) <= 0
    return None if unlimited else int(quota) / int(period)
