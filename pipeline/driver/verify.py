"""``action=verify``: reads every file of a run's artifacts again and compares it with the hash in the manifest.

Whether an artifact is complete is otherwise judged by the sizes of its files, so that a repeated command reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from pipeline.config import Settings
from pipeline.driver.graph import Node, select_nodes
from pipeline.errors import DamagedArtifacts


def verify(run: Settings, nodes: Mapping[str, Node], console: Console) -> None:
    """Prints one line per selected artifact, followed by what is wrong with it. Changes nothing.

    Raises:
        DamagedArtifacts: a file is missing or differs from what was committed.
    """
    console.print(f"[bold]{run.name}[/]")
    damaged = []
    for name, node in select_nodes(nodes, run.stages).items():
        faults = node.artifact.damage() if node.artifact.path.exists() else None
        state = "absent" if faults is None else "damaged" if faults else "intact"
        console.print(f"  {state:<8} {name:<24} {node.artifact.key[:12]}", markup=False)
        for fault in faults or ():
            console.print(f"           {fault}", markup=False)
        if faults:
            damaged.append(node)
    if damaged:
        stages = ",".join(dict.fromkeys(node.stage for node in damaged))
        raise DamagedArtifacts(
            f"{len(damaged)} of {run.name}'s artifacts are damaged. Add force=[{stages}] to action=run to rebuild them "
            "and everything made from them."
        )
