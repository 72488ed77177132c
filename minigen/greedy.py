"""A look at a model in training: greedy continuations, without a cache.

Every token computes its prompt anew; for the few short samples between training steps that costs
less than a second copy of the weights and a cache would.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from minigen.batch import make_batch
from minigen.trainer import TrainingModel


@torch.no_grad()
def continue_greedily(
    model: TrainingModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """The likeliest tokens after each prompt, all prompts in one packed batch; no prompt is empty.

    A continuation ends with a token of `stop_ids`, which it does not hold, after `max_tokens`, or
    where the decoder's `max_length` is reached.
    """
    model.eval()
    decoder = model.decoder
    device = decoder.embed.weight.device
    sequences = [list(prompt) for prompt in prompts]
    running = list(range(len(sequences)))
    for _ in range(max_tokens):
        running = [i for i in running if len(sequences[i]) < decoder.max_length]
        if not running:
            break
        tokens = [torch.tensor(sequences[i]) for i in running]
        nothing = [torch.zeros(len(t), dtype=torch.bool) for t in tokens]
        batch = make_batch(tokens, nothing, decoder.config, decoder.max_length).to(device)
        hidden_TE = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens_S1)
        last_S = batch.cu_seqlens_S1[1:-1].long() - 1
        chosen = decoder.logits(hidden_TE[last_S]).argmax(-1).tolist()
        ended = {i for i, token in zip(running, chosen, strict=True) if token in stop_ids}
        for i, token in zip(running, chosen, strict=True):
            if i not in ended:
                sequences[i].append(token)
        running = [i for i in running if i not in ended]
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]
