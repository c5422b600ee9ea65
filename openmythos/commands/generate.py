"""Text from the model of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openmythos.commands.parsing import run_and_config
from openmythos.generate import stream
from openmythos.training.data import load_tokenizer
from openmythos.training.ranks import Device
from openmythos.training.trained import load_run


@dataclass(frozen=True)
class GenerateConfig:
    """A continuation of a prompt.

    Attributes:
        prompt: what the text begins with.
        tokens: tokens to add at most.
        loops: loops of the recurrent block; 0: as configured.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: makes sampling repeatable.
        exit: rule by which a token leaves the loop early: act, head, latent, kl, confidence, entropy or argmax; empty:
            the model's halting.
        fast: swap in the modules of openmythos_kernels.
        device: auto, cpu or cuda.
    """

    prompt: str = "def "
    tokens: int = 256
    loops: int = 0
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    exit: str = ""
    fast: bool = True
    device: Device = "auto"


def main(arguments: Sequence[str]) -> None:
    """`openmythos generate RUN [key=value ...]`; prints the text as it grows"""
    folder, config = run_and_config(GenerateConfig, arguments, "openmythos generate")
    model, tree = load_run(folder, config.fast, config.device)
    tokenizer = load_tokenizer(tree["data"]["tokenizer"])
    ids = [int(i) for i in tokenizer.encode(config.prompt)]
    options: dict = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    if config.loops:
        options["n_loops"] = config.loops
    if config.exit:
        options["exit"] = config.exit
    print(config.prompt, end="", flush=True)
    shown = ""
    new: list[int] = []
    for token in stream(model, [ids], config.tokens, eos=tokenizer.eos, **options):
        if int(token) == tokenizer.eos:
            break
        new.append(int(token))
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(new)[len(shown) :])
