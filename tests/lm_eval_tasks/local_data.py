"""The tasks' documents: jsonl files next to this one, whatever the working directory is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """{"test": the documents of `file`}; lm-eval passes a task's other metadata as well."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
