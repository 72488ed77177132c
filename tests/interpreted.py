"""Triton's interpreter in place of a GPU: what is smaller there, and what it need not do.

With TRITON_INTERPRET=1 the GPU tests run on CPU tensors. The interpreter takes tens of microseconds
of Python for each operation of each program, hardly more for a large tile than for a small one. So
cases get fewer programs (sequences, heads, rows beyond a tile's edge), and keep what makes them
kinds: head dims, groups, masks, lengths about edges.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from tests.attention_cases import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = (
    (torch.float32, torch.float16)
    if INTERPRETED
    else (torch.bfloat16, torch.float16, torch.float32)
)
# A tile of queries has at most 128 rows, of any group: one more than that, and all run over it.
MOST_ROWS = 136


def smaller(num_seqs: int, num_kv_heads: int) -> Callable[[Case], Case]:
    """Maps a case to one of so many sequences and key/value heads and `MOST_ROWS` rows at most; a
    GPU's to itself.

    Rows are the queries of a sequence times the heads of a group. A sequence that has as many keys
    as queries keeps as many as it keeps queries.
    """

    def change(case: Case) -> Case:
        if not INTERPRETED:
            return case
        group = case.num_heads // case.num_kv_heads
        heads = min(case.num_kv_heads, num_kv_heads)
        pairs = list(zip(case.q_lens, case.kv_lens, strict=True))[:num_seqs]
        q_lens = tuple(min(q_len, MOST_ROWS // group) for q_len, _ in pairs)
        kv_lens = tuple(
            least if kv_len == q_len else kv_len
            for least, (q_len, kv_len) in zip(q_lens, pairs, strict=True)
        )
        return dataclasses.replace(
            case, q_lens=q_lens, kv_lens=kv_lens, num_heads=heads * group, num_kv_heads=heads
        )

    return change


def leave_out_what_tells_nothing() -> None:
    """Half and more of the interpreter's time goes to work without effect (Triton 3.6 and 3.7).

    Each sum, difference and product of integers is computed again in 64 bits, with its bounds, for
    an assertion on overflow that is made in debug mode only, which the interpreter has no way into.

    And its own functions are put into `triton.language` not only when a kernel is launched, but
    again at every call of a function within the kernel, by a search through all names. Only the
    first call from each module, which may name other parts of the language, finds any left. What a
    launch patches it takes back, and what a call patches stays, as without this.

    The backward's tests take 27 s of a processor so, 36 with the second of these and 47 with the
    first.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith(("3.6.", "3.7.")):
        return
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.debug
    )
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)
        return None

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
