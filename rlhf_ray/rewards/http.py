"""A server as a reward: ``--reward http://host:port/path``.

One POST a shard, ``{"rows": [{"prompt", "response", "messages", ...fields}]}``, answered by ``{"scores": [number]}``.
A connection that fails, times out or answers 5xx or 429 is tried again with growing pauses; any other answer is an
error at once.  ``http://user:password@host`` asks with basic authentication.  Standard library only.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit, urlunsplit

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.config.secrets import redacted
from rlhf_ray.rewards.base import RewardContext, check_scores, response_texts
from rlhf_ray.rewards.function import call_fields
from rlhf_ray.types import Rollout

FIRST_PAUSE = 0.5  # seconds, doubled at each further attempt
RETRIED = frozenset({429, 500, 502, 503, 504})


class HTTPReward:
    """Asks a server for the scores of a whole shard."""

    def __init__(self, source: RewardSource, context: RewardContext) -> None:
        self.url, self.headers = _request(source.source)
        self.name = redacted(source.source)
        self.timeout = source.timeout
        self.retries = source.retries
        self.context = context

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B,) float32; ValueError when the server does not answer with that many numbers."""
        texts = response_texts(rollout, self.context.tokenizer)
        rows = [
            {**call_fields(self.context.prompts.rows[i]), "response": text}
            for i, text in zip(rollout.prompt_ids.tolist(), texts, strict=True)
        ]
        answer = self._post({"rows": rows})
        try:
            scores = torch.tensor([float(score) for score in json.loads(answer)["scores"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'reward {self.name} must answer {{"scores": [number, ...]}}; it answered {answer[:200]!r}'
            ) from error
        return check_scores(scores, len(rollout), self.name)

    def _post(self, body: dict[str, object]) -> bytes:
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=self.headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer: bytes = response.read()
                    return answer
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED:
                    raise ValueError(f"reward {self.name} answered {error.code} {error.reason}") from error
                fault: Exception = error
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                fault = error
            if attempt < self.retries:
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise ValueError(f"reward {self.name} did not answer in {self.retries + 1} attempts: {fault}")


def _request(url: str) -> tuple[str, dict[str, str]]:
    """A URL without its user part, and the headers to ask with, which have it instead."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    return urlunsplit(parts._replace(netloc=host)), headers
