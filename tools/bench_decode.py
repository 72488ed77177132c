"""`python -m tools.bench_decode`: decode tokens/s beside transformers, on random weights.

Both continue the same prompts greedily. The time of one new token is taken off the time of all, so
that prefill does not count. The last line is one JSON document.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from minigen import LLM, SamplingParams
from minigen.shapes import SHAPES


def prompts_for(batch: int, vocab_size: int) -> list[list[int]]:
    """One prompt of 128 tokens, or many of 8 to 255."""
    rng = random.Random(0)
    lengths = [128] if batch == 1 else [rng.randint(8, 255) for _ in range(batch)]
    return [[rng.randrange(3, vocab_size) for _ in range(n)] for n in lengths]


def decode_rate(generate: Callable[[int], None], batch: int, tokens: int, repeats: int) -> float:
    """Tokens a second after the first; `generate(n)` makes n tokens a prompt."""
    generate(2)  # warm
    spans = []
    for _ in range(repeats):
        seconds = []
        for count in (1, tokens):
            start = time.perf_counter()
            generate(count)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        spans.append(seconds[1] - seconds[0])
    return batch * (tokens - 1) / median(spans)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_decode", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", default="default")
    args = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {k: v for k, v in SHAPES[args.shape].items() if k != "dtype"}
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    rival = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        rival.save_pretrained(folder)
        start = time.perf_counter()
        llm = LLM(
            Path(folder), dtype=args.dtype, compile=args.compile, max_model_len=2048,
            num_cache_blocks=max(256, 40 * max(args.batch)), enable_prefix_caching=False,
            progress=False,
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

        ours = decode_rate(minigen, batch, args.tokens, args.repeats)
        theirs = decode_rate(padded, batch, args.tokens, args.repeats)
        rows.append({"batch": batch, "minigen": round(ours, 1), "transformers": round(theirs, 1)})
        print(
            f"batch {batch:4d}   minigen {ours:9.1f} tokens/s   transformers {theirs:9.1f} tokens/s"
        )
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


if __name__ == "__main__":
    main()
