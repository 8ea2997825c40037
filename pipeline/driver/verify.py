"""``action=verify``: reads every file of a run's artifacts again and compares it with the hash in the manifest.

Whether an artifact is complete is otherwise judged by the sizes of its files, so that a repeated command reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from pipeline.driver.graph import select_nodes
from pipeline.driver.run import Run
from pipeline.errors import DamagedArtifacts


def verify(runs: Sequence[Run], console: Console) -> None:
    """Prints one line per selected artifact of every run, followed by what is wrong with it. Changes nothing.

    Raises:
        DamagedArtifacts: a file is missing or differs from what was committed. It is raised after all were read.
    """
    faults: dict[str, list[str] | None] = {}  # by key; None if there is no such artifact
    damaged = {}
    for run, nodes in runs:
        console.print(f"[bold]{escape(run.name)}[/]")
        for name, node in select_nodes(nodes, run.stages).items():
            key = node.artifact.key
            if key not in faults:
                faults[key] = node.artifact.damage() if node.artifact.path.exists() else None
            found = faults[key]
            state = "absent" if found is None else "damaged" if found else "intact"
            console.print(f"  {state:<8} {name:<24} {key[:12]}", markup=False)
            for fault in found or ():
                console.print(f"           {fault}", markup=False)
            if found:
                damaged[key] = node.stage
    if damaged:
        stages = ",".join(dict.fromkeys(damaged.values()))
        raise DamagedArtifacts(
            f"damaged artifacts: {len(damaged)}. Add force=[{stages}] to action=run to rebuild them and everything "
            "made from them."
        )
