"""lm-eval around a swapped model: log-likelihoods and greedy continuations stay the same."""

from __future__ import annotations

import pytest
import torch

from openmythos_kernels import accelerate
from tests.outside.installed import need
from tests.outside.works import PACKAGES, make

need("lm_eval")
api = need("lm_eval.api.model")
instance = need("lm_eval.api.instance")
pytestmark = pytest.mark.filterwarnings("ignore")


class Evaluated(api.LM):
    """A minimal adapter whose tokens are letters."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        ids = torch.tensor([[ord(letter) % 37 for letter in context + continuation]])
        logits = self.model(ids[:, :-1]).log_softmax(-1)[0, -len(continuation) :]
        wanted = ids[0, -len(continuation) :]
        return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood(self, requests):
        return [self._score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [self._score(" ", request.args[0])[0] for request in requests]

    @torch.no_grad()
    def generate_until(self, requests):
        out = []
        for request in requests:
            ids = torch.tensor([[ord(letter) % 37 for letter in request.args[0]]])
            cache: dict = {}
            logits, text = self.model(ids, kv_cache=cache), []
            for step in range(4):
                text.append(int(logits[0, -1].argmax()))
                logits = self.model(torch.tensor([text[-1:]]), kv_cache=cache, start_pos=ids.shape[1] + step)
            out.append(" ".join(map(str, text)))
        return out


def ask(lm, kind, *arguments):
    requests = [instance.Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
    return getattr(lm, kind)(requests)


@pytest.mark.parametrize("package", PACKAGES)
def test_scores_are_the_same(package):
    plain, fast = Evaluated(make(package)), Evaluated(accelerate(make(package)))
    pairs = [("The sky", " is blue"), ("Two and two", " are four"), ("a", "b")]
    for (a, greedy_a), (b, greedy_b) in zip(ask(fast, "loglikelihood", *pairs), ask(plain, "loglikelihood", *pairs)):
        assert a == pytest.approx(b, rel=1e-5) and greedy_a == greedy_b
    texts = [(pair[0] + pair[1],) for pair in pairs]
    assert ask(fast, "loglikelihood_rolling", *texts) == pytest.approx(
        ask(plain, "loglikelihood_rolling", *texts), rel=1e-5
    )
    prompts = [(pair[0], {"until": ["\n"]}) for pair in pairs]
    assert ask(fast, "generate_until", *prompts) == ask(plain, "generate_until", *prompts)
