"""What is left of a study, and how long that may take by what is finished."""

from __future__ import annotations

from terrasynth.progress import duration
from terrasynth.study.run import Study

__all__ = ["outlook"]


def outlook(study: Study, jobs: int = 1) -> str:
    """What is still to be done, a line each; nothing is computed.

    A time is that of the finished units of the same kind; a segmentor takes as long as those of other arms.

    Args:
        study: of which some may be finished.
        jobs: processes that share the work.
    """
    left = study.left()
    if not left:
        return "All is done but the report."
    done = study.timing()
    cells = [seconds for group, each in done.items() if group.startswith("train: ") for seconds in each]
    seeds: dict[str, list[int | None]] = {}
    for task in left:
        seeds.setdefault(task.group, []).append(task.seed)
    lines, total, unknown = [], 0.0, False
    for group, under in seeds.items():
        known = done.get(group) or (cells if group.startswith("train: ") else [])
        seconds = len(under) * sum(known) / len(known) if known else None
        total, unknown = total + (seconds or 0.0), unknown or seconds is None
        some = [str(seed) for seed in dict.fromkeys(under) if seed is not None]
        told = f", {'seed' if len(some) == 1 else 'seeds'} {', '.join(some)}" if some else ""
        lines.append(f"  {group}{told}: {'not known yet' if seconds is None else f'about {duration(seconds)}'}")
    end = f"By the times of what is done: {'at least ' if unknown else ''}about {duration(total / jobs)}"
    if not total:
        end = "How long that takes shows when some of it is done"
    if study.clock.max_minutes is not None:
        end += f"; given are {study.clock.max_minutes:g} min"
    return "\n".join(["Left to do:", *lines, f"{end}."])
