"""minigen::draw_tokens: greedy and plain draws of `minigen.sampling` over a large vocabulary.

The noise of a plain draw takes two logarithms in float64 for each word of the vocabulary, so that
it is the same on every device and in every batch: 0.7 ms for 256 rows of 151,936 (H200), a fifth of
a decode step. Here float32 finds the words that can win, nearly always one a row, and float64
decides among them: the result is the same, at the cost of the float32 pass.

Shapes: R rows, V vocabulary, C runs of `RUN` words that a row is cut into.
"""

import torch
from torch import Tensor

from minigen.kernels.checks import check_draw_tokens
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton

RUN = 1024
# A winner's score differs from its float32 score by less. Scores that can win are above -26: the
# likeliest word has 0 plus at least -3.2 of noise, and no noise is above 22.9. So the quotient of
# two float32 numbers is off by 3e-6 at most, and the noise, see `quick_noise`, by 1e-5.
MARGIN = tl.constexpr(1e-3)


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
    num_runs = -(-vocab_size // RUN)
    tokens_R = logits_RV.new_empty(num_rows, dtype=torch.int64)
    if num_rows == 0:
        return tokens_R
    peaks_RC = logits_RV.new_empty(num_rows, num_runs, dtype=torch.float32)
    scores_RC = peaks_RC if greedy else torch.empty_like(peaks_RC)
    shape = (vocab_size, num_runs, logits_RV.stride(0))
    constants = {"RUN": RUN, "BLOCK_C": power_of_two(num_runs)}
    numbers = temperature_R, min_p_R, seed_R, sample_R, position_R
    with on_device_of(logits_RV):
        grid = (num_rows * num_runs,)
        run_peaks_kernel[grid](logits_RV, peaks_RC, *shape, RUN=RUN, num_warps=4)
        if not greedy:
            run_scores_kernel[grid](
                logits_RV, peaks_RC, scores_RC, *numbers, *shape, **constants, num_warps=4
            )
        choose_kernel[(num_rows,)](
            logits_RV, peaks_RC, scores_RC, tokens_R, *numbers, *shape,
            **constants, GREEDY=greedy, num_warps=4,
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
def run_peaks_kernel(
    logits_ptr, peaks_ptr, vocab_size, num_runs, stride_r, RUN: tl.constexpr
):  # fmt: skip
    """One program: the largest logit of a run."""
    row, run = tl.program_id(0) // num_runs, tl.program_id(0) % num_runs
    _, logit_N = load_run(logits_ptr, row, run, vocab_size, stride_r, RUN)
    tl.store(peaks_ptr + row * num_runs + run, tl.max(logit_N, 0))


@triton.jit
def row_peak(peaks_ptr, row, num_runs, BLOCK_C: tl.constexpr):
    run_C = tl.arange(0, BLOCK_C)
    peak_C = tl.load(peaks_ptr + row * num_runs + run_C, mask=run_C < num_runs, other=float("-inf"))
    return tl.max(peak_C, 0)


@triton.jit
def mix(x):
    """SplitMix64's finish, as `minigen.sampling._mix`; x is unsigned."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noise_bits(seed, sample, position, word_N):
    """32 random bits a word, as `minigen.sampling._exponential` has them."""
    key = mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = mix(key + sample.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = mix(key + position.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    return mix((key ^ word_N.to(tl.uint64)) * 0x9E3779B97F4A7C15) >> 32


@triton.jit
def quick_noise(bits_N):
    """-log(E) in float32, E = -log(1 - u) and u = (bits + 1/2) / 2^32.

    Where u is small a series has the digits that 1 - u would lose; above, -log(1 - u) is at least
    0.03, of which an error of 2e-7 is less than 1e-5.
    """
    u_N = (bits_N.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest_N = ((4294967295 - bits_N).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series_N = u_N * (1.0 + u_N * (0.5 + u_N * (0.33333333 + u_N * (0.25 + u_N * 0.2))))
    return -tl.log(tl.where(u_N < 0.03, series_N, -tl.log(rest_N)))


@triton.jit
def exact_noise(bits_N):
    """The same in float64, in which 1 - u is exact."""
    rest_N = ((4294967295 - bits_N).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(rest_N))


@triton.jit
def threshold_of(peak, temperature, min_p):
    """The least logit that min-p keeps, in float64; -inf without."""
    return peak.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))


@triton.jit
def run_scores_kernel(
    logits_ptr,
    peaks_ptr,
    scores_ptr,
    temperature_ptr,
    min_p_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    vocab_size,
    num_runs,
    stride_r,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the best float32 score of a run."""
    row, run = tl.program_id(0) // num_runs, tl.program_id(0) % num_runs
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        tl.store(scores_ptr + row * num_runs + run, tl.load(peaks_ptr + row * num_runs + run))
        return
    peak = row_peak(peaks_ptr, row, num_runs, BLOCK_C)
    word_N, logit_N = load_run(logits_ptr, row, run, vocab_size, stride_r, RUN)
    bits_N = noise_bits(
        tl.load(seed_ptr + row), tl.load(sample_ptr + row), tl.load(position_ptr + row), word_N
    )
    score_N = (logit_N - peak) / temperature + quick_noise(bits_N)
    kept_N = logit_N.to(tl.float64) >= threshold_of(peak, temperature, tl.load(min_p_ptr + row))
    score_N = tl.where(kept_N & (word_N < vocab_size), score_N, float("-inf"))
    tl.store(scores_ptr + row * num_runs + run, tl.max(score_N, 0))


@triton.jit
def choose_kernel(
    logits_ptr,
    peaks_ptr,
    scores_ptr,
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
    BLOCK_C: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """One program: a row's token, the first of equal ones, from the runs that may hold it."""
    row = tl.program_id(0)
    run_C = tl.arange(0, BLOCK_C)
    score_C = tl.load(
        scores_ptr + row * num_runs + run_C, mask=run_C < num_runs, other=float("-inf")
    )
    bound = tl.max(score_C, 0) - MARGIN
    is_drawn = False
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        is_drawn = temperature != 0.0
        peak = row_peak(peaks_ptr, row, num_runs, BLOCK_C)
        threshold = threshold_of(peak, temperature, tl.load(min_p_ptr + row))
        seed, sample = tl.load(seed_ptr + row), tl.load(sample_ptr + row)
        position = tl.load(position_ptr + row)
    best = tl.full([], float("-inf"), tl.float64)
    token = tl.full([], 0, tl.int64)
    run = tl.min(tl.where(score_C >= bound, run_C, num_runs), 0)
    while run < num_runs:
        word_N, logit_N = load_run(logits_ptr, row, run, vocab_size, stride_r, RUN)
        score_N = logit_N.to(tl.float64)
        if not GREEDY:  # noqa: SIM102  a constant, and a number of the row's
            if is_drawn:
                kept_N = (score_N >= threshold) & (word_N < vocab_size)
                scaled_N = (score_N - peak.to(tl.float64)) / temperature.to(tl.float64)
                bits_N = noise_bits(seed, sample, position, word_N)
                score_N = tl.where(kept_N, scaled_N + exact_noise(bits_N), float("-inf"))
        best_of_run = tl.max(score_N, 0)
        if best_of_run > best:
            best = best_of_run
            first = tl.min(tl.where(score_N == best_of_run, word_N, vocab_size), 0)
            token = first.to(tl.int64)
        run = tl.min(tl.where((score_C >= bound) & (run_C > run), run_C, num_runs), 0)
    tl.store(tokens_ptr + row, token)
