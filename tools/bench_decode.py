"""`python -m tools.bench_decode`: decode tokens/s beside transformers, on random weights.

Both continue the same prompts greedily. The time of one new token is taken off the time of all, so
that prefill does not count. The last line is one JSON document.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from minigen import LLM, SamplingParams, cli
from minigen.model import DTYPES
from minigen.report import bar
from minigen.runner import COMPILE_MODES
from minigen.shapes import SHAPES
from tools.common import run

CONTEXT = 2048
LONGEST_PROMPT = 255


def prompts_for(batch: int, vocab_size: int) -> list[list[int]]:
    """One prompt of 128 tokens, or many of 8 to 255."""
    rng = random.Random(0)
    lengths = [128] if batch == 1 else [rng.randint(8, LONGEST_PROMPT) for _ in range(batch)]
    return [[rng.randrange(3, vocab_size) for _ in range(n)] for n in lengths]


def decode_rate(
    generate: Callable[[int], None],
    batch: int,
    tokens: int,
    repeats: int,
    ran: Callable[[], object] = lambda: None,
) -> float:
    """Tokens a second after the first; `generate(n)` makes n tokens a prompt.

    `ran` hears of each of its 1 + 2 * repeats calls.
    """
    generate(2)  # warm
    ran()
    spans = []
    for _ in range(repeats):
        seconds = []
        for count in (1, tokens):
            start = time.perf_counter()
            generate(count)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            ran()
        spans.append(seconds[1] - seconds[0])
    return batch * (tokens - 1) / median(spans)


def main(args: argparse.Namespace) -> None:
    most = CONTEXT - LONGEST_PROMPT
    if not 2 <= args.tokens <= most:
        raise ValueError(
            f"--tokens {args.tokens}: give 2 to {most}, the first of which does not count"
        )
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers") from None

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {k: v for k, v in SHAPES[args.shape].items() if k != "dtype"}
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    rival = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        rival.save_pretrained(folder)
        start = time.perf_counter()
        llm = LLM(
            Path(folder), dtype=args.dtype, compile=args.compile, max_model_len=CONTEXT,
            num_cache_blocks=max(256, 40 * max(args.batch)), enable_prefix_caching=False,
            progress=cli.is_terminal(sys.stderr),
        )  # fmt: skip
        startup = time.perf_counter() - start
    rival = rival.to(device).eval()
    rows = []
    for batch in args.batch:
        prompts = prompts_for(batch, shape["vocab_size"])
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )

        def minigen(count: int, prompts: list[list[int]] = prompts) -> None:
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            llm.generate(prompts, params, progress=False)

        @torch.inference_mode()
        def padded(count: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            rival.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

        with bar(2 * (1 + 2 * args.repeats), f"batch {batch}", "run") as shown:
            ours, theirs = (
                decode_rate(generate, batch, args.tokens, args.repeats, shown.update)
                for generate in (minigen, padded)
            )
        rows.append({"batch": batch, "minigen": round(ours, 1), "transformers": round(theirs, 1)})
        rates = f"minigen {ours:9.1f} tokens/s   transformers {theirs:9.1f} tokens/s"
        print(f"batch {batch:4d}   {rates}", flush=True)
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    document = {
        "shape": args.shape,
        "device": name,
        "dtype": args.dtype,
        "compile": args.compile,
        "compile_status": llm.compile_status,
        "startup_s": round(startup, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    print(json.dumps(document))


def options() -> argparse.ArgumentParser:
    made = cli.Parser(prog="python -m tools.bench_decode", description=__doc__)
    made.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    made.add_argument("--batch", type=cli.positive, nargs="+", default=[1, 16], metavar="N")
    made.add_argument(
        "--tokens", type=cli.positive, default=33, metavar="N", help="new tokens a prompt"
    )
    made.add_argument("--repeats", type=cli.positive, default=3, metavar="N")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--compile", choices=COMPILE_MODES, default="default")
    return made


if __name__ == "__main__":
    run(options(), main)
