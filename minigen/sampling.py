"""The batched sampler: what it does to logits on the device.

Shape suffixes: R rows to sample, V vocabulary, C candidates (the largest logits of a row, sorted),
P rows with penalties, k asked for by the caller.

Noise is keyed by (seed, sample, position, vocabulary id) and by nothing else. A row therefore draws
the same token in any batch, at any place of it, through every `mode` and on every device, given the
same logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from minigen.kernels.draw_tokens import draw_tokens, draws_tokens
from minigen.sampling_rows import MAX_CANDIDATES, Mode, Row, TokenCounts, to_device

# --- drawing -------------------------------------------------------------------------------------


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    mode: Mode,
) -> Tensor:
    """One token a row: int64 ids [R]. Parameters are those of `SamplingTensors`.

    Temperature, then min-p, top-k and top-p in vLLM's order, then an exponential race over the
    tokens left (argmax of log p - log E, E exponential: the same as drawing from p). Greedy rows
    take the largest logit, the lowest id of equal ones. All tokens as likely as the last one that a
    filter keeps are kept: the result does not depend on how a sort orders equal logits.

    `mode` says what the rows need, and more than they need gives the same tokens: "greedy" only for
    greedy rows alone, "plain" for rows without top-k and top-p, "top_k" where every row with top-k
    or top-p has top_k <= MAX_CANDIDATES, "sort" for all. A function of tensors only: torch.compile
    takes it with fullgraph=True and any R. A row with NaN gives some id of the vocabulary.
    """
    if mode in ("greedy", "plain") and draws_tokens(logits_RV):
        numbers = temperature_R, min_p_R, seed_R, sample_R, position_R
        return draw_tokens(logits_RV, *numbers, greedy=mode == "greedy")
    logits_RV = logits_RV.float()
    if mode == "greedy":
        return logits_RV.argmax(-1)
    is_greedy_R1 = temperature_R[:, None] == 0
    temperature_R1 = torch.where(is_greedy_R1, 1.0, temperature_R[:, None]).double()

    # float64 from here on: the logarithms of two devices, or of a vector loop and its scalar rest,
    # and the sums of two batch sizes differ in the last bit. In float32 that turns about one draw
    # in a million, here one in 10^15.
    peak_R1 = logits_RV.amax(-1, keepdim=True).double()
    scaled_RV = (logits_RV.double() - peak_R1) / temperature_R1

    # Each filter keeps the logits from some value on, so a row needs one number, and no mask and no
    # scatter back from sorted order. Thresholds are logits as they came, before the temperature:
    # comparing them is exact.
    threshold_R1 = peak_R1 + temperature_R1 * min_p_R[:, None].double().log()
    if mode != "plain":
        num_candidates = logits_RV.shape[1]
        if mode == "top_k":
            num_candidates = min(MAX_CANDIDATES, num_candidates)
            candidates_RC = logits_RV.topk(num_candidates, -1).values
        else:
            candidates_RC = logits_RV.sort(-1, descending=True).values

        top_k_R1 = top_k_R[:, None]
        kth_R1 = candidates_RC.gather(1, top_k_R1.clamp(max=num_candidates) - 1).double()
        kth_R1 = torch.where(top_k_R1 <= num_candidates, kth_R1, -math.inf)
        threshold_R1 = torch.maximum(threshold_R1, kth_R1)

        # Masses are relative to the likeliest token's. Top-p shares out what top-k left, equals of
        # the k-th logit included, which may lie beyond the candidates: the sum is the whole row's.
        mass_RV = torch.where(logits_RV >= threshold_R1, scaled_RV.exp(), 0.0)
        total_R1 = mass_RV.sum(-1, keepdim=True)
        is_left_RC = candidates_RC >= threshold_R1
        mass_RC = ((candidates_RC.double() - peak_R1) / temperature_R1).exp()
        mass_RC = torch.where(is_left_RC, mass_RC, 0.0)
        is_kept_RC = is_left_RC & (_sum_before(mass_RC) < top_p_R[:, None] * total_R1)
        last_kept_RC = torch.where(is_kept_RC, candidates_RC, math.inf)
        last_kept_R1 = last_kept_RC.amin(-1, keepdim=True).double()
        threshold_R1 = torch.where(top_p_R[:, None] < 1, last_kept_R1, threshold_R1)

    race_RV = scaled_RV - _exponential(logits_RV.shape[1], seed_R, sample_R, position_R).log()
    race_RV = torch.where(logits_RV >= threshold_R1, race_RV, -math.inf)
    return torch.where(is_greedy_R1, logits_RV.double(), race_RV).argmax(-1)


def _sum_before(x_RC: Tensor) -> Tensor:
    """The sum of a row's entries before each entry.

    In two levels, runs of 256 and then their totals: Inductor fails on a long scan (torch 2.11,
    CUDA, 151,936 entries).
    """
    num_entries = x_RC.shape[1]
    runs = pad(x_RC, (0, -num_entries % 256)).unflatten(1, (-1, 256))
    within = pad(runs.cumsum(-1), (1, 0))
    before = pad(within[..., -1].cumsum(-1)[:, :-1], (1, 0))
    return (before[..., None] + within[..., :-1]).flatten(1)[:, :num_entries]


def _exponential(vocab_size: int, seed_R: Tensor, sample_R: Tensor, position_R: Tensor) -> Tensor:
    """Exponential noise [R, V], float64, from a hash of (seed, sample, position, id).

    The uniform (bits + 1/2) / 2^32 is exact in float64 and neither 0 nor 1, so that E is neither 0
    nor inf.
    """
    key_R = torch.zeros_like(seed_R)
    for number_R in (seed_R, sample_R, position_R):
        key_R = _kept(_mix(key_R + number_R + _GOLDEN))
    bits_RV = _word_bits(vocab_size, key_R)
    return -torch.log1p(-(bits_RV.double() + 0.5) * 2.0**-32)


# The constants of both hashes; SplitMix64's as the signed numbers that int64 tensors take.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LOW_32 = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finish (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    2014): once a row, so that rows have keys of 64 unrelated bits."""
    x = (x ^ _logical_shift(x, 30)) * _MULTIPLIER_1
    x = (x ^ _logical_shift(x, 27)) * _MULTIPLIER_2
    return x ^ _logical_shift(x, 31)


def _kept(x_R: Tensor) -> Tensor:
    """The same, of which Inductor makes a buffer.

    Without, it writes each use of a value out as all that led to it. Each of three mixes uses its
    value twice, three times over, so that a draw had 24,000 operations to go through, now 1,000:
    29.5 s of Python to compile "plain" on the CPU, now 4.9 (torch 2.13). They end as the same code.
    """
    return x_R.as_strided(x_R.shape, x_R.stride())


def _word_bits(vocab_size: int, key_R: Tensor) -> Tensor:
    """32 random bits a word [R, V], as int64 of 0 to 2^32 - 1: a finish of 32 bits, ten
    instructions of a GPU, where one of 64 bits takes thirty.

    The rounds are those of triple32 (Wellons, "Prospecting for hash functions", 2018) in 32 bits.
    One half of the key turns the ids and is added at the end, the other is added after the first
    round. A row's words never share their bits, for each step can be undone. Without the last sum
    a word whose bits are small, so one that wins, would tell much of its neighbours'.
    """
    low_R1, high_R1 = (key_R & _LOW_32)[:, None], _logical_shift(key_R, 32)[:, None]
    # Ids are joined by xor: Inductor turns sums and products of an arange into index arithmetic,
    # which does not wrap at 64 bits (torch 2.13 on the CPU: other numbers, then memory corrupted).
    x_RV = low_R1 ^ torch.arange(vocab_size, device=key_R.device)
    for (shift, multiplier), added in zip(_ROUNDS, (high_R1, 0, low_R1), strict=True):
        x_RV = ((x_RV ^ (x_RV >> shift)) * multiplier + added) & _LOW_32
    return x_RV


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


# --- before and after a draw ---------------------------------------------------------------------


def edit_logits(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with each row's edits, as a new float32 tensor, in vLLM's order.

    Stop ids are ruled out below `min_tokens`, `logit_bias` is added, then the penalties: repetition
    over prompt and outputs (Keskar et al., "CTRL", 2019), frequency and presence over the outputs.
    Raises ValueError for a biased token outside the vocabulary.
    """
    edited_RV = logits_RV.to(torch.float32, copy=True)
    vocab_size, device = edited_RV.shape[1], edited_RV.device
    masked = [
        (r, token)
        for r, row in enumerate(rows)
        if row.masks_stop_ids
        for token in row.stop_ids
        if token < vocab_size  # a tokenizer may name an end that the model does not have
    ]
    if masked:
        places = to_device(masked, torch.int64, device)
        # The value is made on the device: a number of the host would be copied, and waited for.
        edited_RV.index_put_(places.unbind(1), edited_RV.new_full((), -math.inf))

    biased = []
    for r, row in enumerate(rows):
        row.params.check_vocabulary(vocab_size)
        biased += [(r, int(token), value) for token, value in (row.params.logit_bias or {}).items()]
    if biased:
        places = to_device([(r, token) for r, token, _ in biased], torch.int64, device)
        values = to_device([value for _, _, value in biased], torch.float32, device)
        edited_RV.index_put_(places.unbind(1), values, accumulate=True)

    penalised = [r for r, row in enumerate(rows) if row.params.has_penalties]
    if penalised:
        index_P = to_device(penalised, torch.int64, device)
        edited_RV[index_P] = _penalise(edited_RV[index_P], [rows[r] for r in penalised])
    return edited_RV


def _penalise(logits_PV: Tensor, rows: Sequence[Row]) -> Tensor:
    vocab_size, device = logits_PV.shape[1], logits_PV.device
    counts = [row.counts or TokenCounts(row.prompt_token_ids, vocab_size, device) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        count.catch_up(row.output_token_ids)
    outputs_PV = torch.stack([count.outputs_V for count in counts])
    is_seen_PV = torch.stack([count.prompt_V for count in counts]) | (outputs_PV > 0)
    penalties = [
        (row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty)
        for row in rows
    ]
    penalties_P3 = to_device(penalties, torch.float32, device)
    repetition_P1, frequency_P1, presence_P1 = penalties_P3.split(1, dim=1)
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(is_seen_PV, repeated_PV, logits_PV)
    return logits_PV - frequency_P1 * outputs_PV - presence_P1 * (outputs_PV > 0)


def top_logprobs(
    logits_RV: Tensor, tokens_R: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of raw logits: of the chosen tokens and of the `k` likeliest.

    Returns chosen_R (float32), ranks_R (int64, 1 = likeliest; of equals the last one's, as in
    vLLM), top_Rk (float32, falling) and top_ids_Rk (int64). `k` may be 0, and -1 or anything above
    V is all of V.
    """
    logits_RV = logits_RV.float()
    vocab_size = logits_RV.shape[1]
    k = vocab_size if k < 0 else min(k, vocab_size)
    norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, tokens_R[:, None])
    ranks_R = (logits_RV >= chosen_R1).sum(-1)
    top_Rk, top_ids_Rk = logits_RV.topk(k, -1)
    return (chosen_R1 - norm_R1)[:, 0], ranks_R, top_Rk - norm_R1, top_ids_Rk
