"""The same held-out prompts, answered by each stage's model: what the report shows side by side."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from treadle.platform.contracts import Prompts
from treadle.platform.records import Issue, Sampling, WeightVersion
from treadle.workflows.folder import replace_file
from treadle.workflows.roles import Roles, texts_of

CHAINS = 10


async def record_chains(
    roles: Roles, prompts: Prompts, *, stage: str, path: Path, sampling: Sampling, version: WeightVersion
) -> None:
    """Adds this stage's answers to the first ten held-out prompts to `chains.json`."""

    async def one(index: int) -> dict[str, Any]:
        prompt = prompts.at(index)
        issue = Issue(id=f"{stage}/chain/{index:08d}", prompt=prompt, sampling=sampling, version=version)
        drawn = await roles.rollouts.draw(issue)
        verdict = (await roles.verifiers.judge(drawn))[0]
        text = (await texts_of(drawn.texts))[0]
        return {
            "text": text,
            "reward": verdict.reward,
            "status": verdict.status.value,
            "parts": dict(verdict.parts),
        }

    count = min(CHAINS, len(prompts))
    answers = await asyncio.gather(*(one(i) for i in range(count)))
    stored = json.loads(path.read_text()) if path.exists() else []
    if len(stored) != count:
        stored = [
            {"prompt": prompts.at(i).text, "answer": prompts.at(i).payload.get("answer"), "stages": {}}
            for i in range(count)
        ]
    for entry, answer in zip(stored, answers, strict=True):
        entry["stages"][stage] = answer
    replace_file(path, json.dumps(stored, indent=1, ensure_ascii=False))
