"""Reads a config from standard input and prints the inferred family as JSON, for the driver.

python -m pipeline.models.family_inference < config.json
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Prints the family, or ``{"fault": ...}``."""
    printed = os.dup(1)
    os.dup2(2, 1)  # libraries print to standard output, which must hold the answer only
    from pipeline.models.families.inferred import family_to_json
    from pipeline.models.family_inference.worker import infer_or_explain

    found = infer_or_explain(json.load(sys.stdin))
    with os.fdopen(printed, "w") as stream:
        json.dump({"fault": found} if isinstance(found, str) else family_to_json(found), stream)


if __name__ == "__main__":
    main()
