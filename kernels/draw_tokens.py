"""minigen::draw_tokens: greedy and plain draws of `minigen.sampling` over a large vocabulary.

The noise of a plain draw takes two logarithms in float64 for each word of the vocabulary, so that
it is the same on every device and in every batch: 0.7 ms for 256 rows of 151,936 (H200). Here one
pass over the words finds for each run of them a bound that no score of the run exceeds: a few
instructions a word and no logarithm (see `score_bounds`). Then float64 decides in the run with the
highest bound, and in those whose bounds lie above what it found: one or two of them a row. The
result is the same, at the cost of the bounds.

Shapes: R rows, V vocabulary, C runs of `RUN` words that a row is cut into, N words of a run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minigen.kernels.checks import check_draw_tokens
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton


class Launch(NamedTuple):
    """Words of a run, runs that one program takes, warps of a program; warps of a row's choice."""

    run: int
    runs_a_program: int
    bounds_warps: int
    choose_warps: int


def choose_launch(num_rows: int, vocab_size: int) -> Launch:
    """A warp a run: no step of the pass waits for another warp. Where programs are many, one takes
    several runs, so that a row's key is made once for all of them."""
    return Launch(1024, 4 if num_rows * vocab_size >= 2**23 else 1, 1, 8)


def draws_tokens(logits_RV: Tensor) -> bool:
    """Whether these logits are drawn by the kernel: on a GPU."""
    return logits_RV.is_cuda


def draw_tokens(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    greedy: bool,
) -> Tensor:
    """One token a row: int64 [R], as `minigen.sampling.draw` gives it in mode "greedy" or "plain".

    Args:
        logits_RV: float32, bfloat16 or float16, words of a row side by side.
        temperature_R, min_p_R: float32; seed_R, sample_R, position_R: int64. A temperature of 0 is
            greedy.
        greedy: all rows are; the numbers are not read.

    Raises ValueError: shapes, dtypes or devices that do not fit.
    """
    return torch.ops.minigen.draw_tokens(
        logits_RV, temperature_R, min_p_R, seed_R, sample_R, position_R, greedy
    )


@torch.library.custom_op("minigen::draw_tokens", mutates_args=(), device_types="cuda")
def _cuda(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    greedy: bool,
) -> Tensor:
    numbers = temperature_R, min_p_R, seed_R, sample_R, position_R
    check_draw_tokens(logits_RV, *numbers)
    return draw_tokens_triton(logits_RV, *numbers, greedy)


@_cuda.register_fake
def _fake(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    greedy: bool,
) -> Tensor:
    check_draw_tokens(logits_RV, temperature_R, min_p_R, seed_R, sample_R, position_R)
    return logits_RV.new_empty(logits_RV.shape[:1], dtype=torch.int64)


def draw_tokens_triton(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    greedy: bool,
) -> Tensor:
    """Launches the kernels on checked arguments: on a GPU, or in Triton's interpreter."""
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    num_rows, vocab_size = logits_RV.shape
    tokens_R = logits_RV.new_empty(num_rows, dtype=torch.int64)
    if num_rows == 0:
        return tokens_R
    launch = choose_launch(num_rows, vocab_size)
    num_programs = -(-vocab_size // (launch.run * launch.runs_a_program))
    # Runs behind the vocabulary's end, of a row's last program, have -inf as the others' words.
    num_runs = num_programs * launch.runs_a_program
    peaks_RC = logits_RV.new_empty(num_rows, num_runs, dtype=torch.float32)
    bounds_RC = peaks_RC if greedy else torch.empty_like(peaks_RC)
    shape = (vocab_size, num_runs, logits_RV.stride(0))
    constants = {"RUN": launch.run, "GREEDY": greedy}
    numbers = temperature_R, min_p_R, seed_R, sample_R, position_R
    with on_device_of(logits_RV):
        run_bounds_kernel[(num_rows, num_programs)](
            logits_RV, peaks_RC, bounds_RC, *numbers, *shape,
            **constants, RUNS=launch.runs_a_program, num_warps=launch.bounds_warps,
        )  # fmt: skip
        choose_kernel[(num_rows,)](
            logits_RV, peaks_RC, bounds_RC, tokens_R, *numbers, *shape,
            **constants, BLOCK_C=power_of_two(num_runs), num_warps=launch.choose_warps,
        )  # fmt: skip
    return tokens_R


@triton.jit
def load_run(logits_ptr, row, run, vocab_size, stride_r, RUN: tl.constexpr):
    """A run's words and their logits; -inf behind the vocabulary's end."""
    word_N = run * RUN + tl.arange(0, RUN)
    logit_N = tl.load(
        logits_ptr + row.to(tl.int64) * stride_r + word_N,
        mask=word_N < vocab_size,
        other=float("-inf"),
    )
    return word_N, logit_N.to(tl.float32)


@triton.jit
def mix(x):
    """SplitMix64's finish, as `minigen.sampling._mix`; x is unsigned."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed_ptr, sample_ptr, position_ptr, row):
    """The two halves of a row's key, low and high, as `minigen.sampling._exponential` makes it."""
    seed = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
    sample = tl.load(sample_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(position_ptr + row).to(tl.uint64, bitcast=True)
    key = mix(seed + 0x9E3779B97F4A7C15)
    key = mix(key + sample + 0x9E3779B97F4A7C15)
    key = mix(key + position + 0x9E3779B97F4A7C15)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def word_bits(low, high, run, RUN: tl.constexpr):
    """32 random bits for each word of a run, as `minigen.sampling._word_bits`.

    The run's first word and the place in the run share no bits: the sum of the two is their xor,
    and what all words share is joined first.
    """
    x_N = (low ^ (run * RUN).to(tl.uint32)) ^ tl.arange(0, RUN).to(tl.uint32)
    x_N = (x_N ^ (x_N >> 17)) * 0xED5AD4BB + high
    x_N = (x_N ^ (x_N >> 11)) * 0xAC4C1B51
    return (x_N ^ (x_N >> 15)) * 0x31848BAB + low


@triton.jit
def exact_noise(bits_N):
    """-log(E), E = -log(1 - u) and u = (bits + 1/2) / 2^32, in float64, in which 1 - u is exact."""
    rest_N = ((4294967295 - bits_N).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(rest_N))


@triton.jit
def score_bounds(logit_N, bits_N, temperature):
    """Float32 numbers that no word's score exceeds, once `upper_scores` adds what is left out.

    E = -log(1 - u) is at least u, and log2(u) at least what lies on the straight line between the
    powers of two beside it. A float32's own bits, read as an integer, are that line: 2^23 (log2 +
    127). So logit / T - log(E) <= log(2) (logit log2(e) / T + 32 + 127 - integer / 2^23). Of words
    that can win u is small, and the bound too high by 6 % of E at most.
    """
    line_N = bits_N.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    return logit_N * (1.4426950408889634 / temperature) - line_N * 1.1920928955078125e-07


@triton.jit
def upper_scores(bound_C, peak, temperature):
    """The bounds of (logit - peak) / T - log(E), in float64.

    `score_bounds` rounds: the integer by 2^-17, the sum by 2^-17 and 2^-24 of it, the product by
    2^-22 of it (a quotient may be off by two units), and the product is at most the sum and 160.
    """
    bound_C = bound_C.to(tl.float64)
    # min: -inf stays below every score.
    room_C = 1e-3 + 1e-6 * tl.minimum(tl.abs(bound_C), 1e38)
    peak = peak.to(tl.float64) / temperature.to(tl.float64)
    return (bound_C + 159.0 + room_C) * 0.6931471805599453 - peak


@triton.jit
def threshold_of(peak, temperature, min_p):
    """The least logit that min-p keeps beside `peak`, in float64; -inf without."""
    return peak.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))


@triton.jit
def run_bounds_kernel(
    logits_ptr,
    peaks_ptr,
    bounds_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    vocab_size,
    num_runs,
    stride_r,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """One program: of each of its runs the largest logit, and of a row that is drawn the largest of
    the scores' bounds.

    What min-p does not keep beside the run's largest logit it does not keep beside the row's, which
    is not known here.
    """
    row = tl.program_id(0)
    temperature = 0.0
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        low, high = row_key(seed_ptr, sample_ptr, position_ptr, row)
    for index in range(RUNS):
        run = tl.program_id(1) * RUNS + index
        _, logit_N = load_run(logits_ptr, row, run, vocab_size, stride_r, RUN)
        place = row.to(tl.int64) * num_runs + run
        peak = tl.max(logit_N, 0)
        tl.store(peaks_ptr + place, peak)
        if not GREEDY:  # noqa: SIM102  a constant, and a number of the row's
            if temperature != 0.0:
                # A branch each: a mask that also serves rows without min-p is two instructions a
                # word of twenty, and values that both branches share cost registers.
                if min_p > 0.0:
                    # Rounded, the threshold is not above a float32 that it was not above before.
                    least = threshold_of(peak, temperature, min_p).to(tl.float32)
                    kept_N = tl.where(logit_N >= least, logit_N, float("-inf"))
                    bound_N = score_bounds(kept_N, word_bits(low, high, run, RUN), temperature)
                    tl.store(bounds_ptr + place, tl.max(bound_N, 0))
                else:
                    bound_N = score_bounds(logit_N, word_bits(low, high, run, RUN), temperature)
                    tl.store(bounds_ptr + place, tl.max(bound_N, 0))


@triton.jit
def next_run(upper_C, may_hold_C, run_C, upper, run, num_runs):
    """The run behind the given one, and its bound, when those that may hold the token are ordered
    from the highest bound to the lowest, equal ones by their numbers; `num_runs` behind the last.
    NaN comes nowhere."""
    behind_C = may_hold_C & ((upper_C < upper) | ((upper_C == upper) & (run_C > run)))
    highest = tl.max(tl.where(behind_C, upper_C, float("-inf")), 0)
    return tl.min(tl.where(behind_C & (upper_C == highest), run_C, num_runs), 0), highest


@triton.jit
def choose_kernel(
    logits_ptr,
    peaks_ptr,
    bounds_ptr,
    tokens_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    vocab_size,
    num_runs,
    stride_r,
    RUN: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a row's token, the first of equal ones, from the runs that may hold it.

    They come from the highest bound on, until a bound is below the best score so far. Min-p leaves
    out runs of which no word is likely enough.
    """
    row = tl.program_id(0)
    run_C = tl.arange(0, BLOCK_C)
    place_C = row.to(tl.int64) * num_runs + run_C
    peak_C = tl.load(peaks_ptr + place_C, mask=run_C < num_runs, other=float("-inf"))
    peak = tl.max(peak_C, 0)
    upper_C = peak_C.to(tl.float64)
    may_hold_C = run_C < num_runs
    is_drawn = False
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        is_drawn = temperature != 0.0
        low, high = row_key(seed_ptr, sample_ptr, position_ptr, row)
        threshold = threshold_of(peak, temperature, tl.load(min_p_ptr + row))
        if is_drawn:
            bound_C = tl.load(bounds_ptr + place_C, mask=run_C < num_runs, other=float("-inf"))
            upper_C = upper_scores(bound_C, peak, temperature)
            may_hold_C = may_hold_C & (peak_C.to(tl.float64) >= threshold)
    best = tl.full([], float("-inf"), tl.float64)
    token = tl.full([], 0, tl.int64)
    run, upper = next_run(upper_C, may_hold_C, run_C, float("inf"), -1, num_runs)
    while run < num_runs:
        word_N, logit_N = load_run(logits_ptr, row, run, vocab_size, stride_r, RUN)
        score_N = logit_N.to(tl.float64)
        if not GREEDY:  # noqa: SIM102  a constant, and a number of the row's
            if is_drawn:
                kept_N = (score_N >= threshold) & (word_N < vocab_size)
                scaled_N = (score_N - peak.to(tl.float64)) / temperature.to(tl.float64)
                noise_N = exact_noise(word_bits(low, high, run, RUN))
                score_N = tl.where(kept_N, scaled_N + noise_N, float("-inf"))
        best_of_run = tl.max(score_N, 0)
        word = tl.min(tl.where(score_N == best_of_run, word_N, vocab_size - 1), 0).to(tl.int64)
        if (best_of_run > best) | ((best_of_run == best) & (word < token)):
            best = best_of_run
            token = word
        run, upper = next_run(upper_C, may_hold_C, run_C, upper, run, num_runs)
        # Of a greedy row the first run with the largest logit has the token.
        if (not is_drawn) | (upper < best):
            run = num_runs
    tl.store(tokens_ptr + row, token)
