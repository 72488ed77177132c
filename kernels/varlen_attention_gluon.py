"""The forward of `varlen_attention` for Hopper, written in Gluon: warps that load, and warps that multiply.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, G = H / K query heads that
share a key/value head, D head dim; M = 64 rows of one group of four warps, N keys of a tile.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minigen.kernels.tiles import (
    LOG2_E, find_queries, key_range, on_device_of, positive_scale, whole_tiles, window_arguments,
)

find_queries_g = gluon.jit(find_queries.fn)
key_range_g = gluon.jit(key_range.fn)
whole_tiles_g = gluon.jit(whole_tiles.fn)


@gluon.jit
def keys_of(
    num_queries, first_query, num_keys, window_left, window_right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr,
):
    first = first_query + (num_keys - num_queries)
    last = gl.minimum(first + BLOCK_Q, num_keys) - 1
    low, high = key_range_g(
        first, last, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    return first, last, low, high, gl.maximum(gl.cdiv(high - low, BLOCK_N), 1)


@gluon.jit
def locate(
    tile, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, num_slots, window_left, window_right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr,
):
    slot = tile % num_slots
    seq, q_start, num_queries, first_query = find_queries_g(
        cu_seqlens_q_ptr, tile // num_slots, num_seqs, HAS_RIGHT, BLOCK_Q
    )
    k_start = gl.load(cu_seqlens_k_ptr + seq)
    num_keys = gl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    first, last, low, high, num_tiles = keys_of(
        num_queries, first_query, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_Q,
        BLOCK_N,
    )
    return slot, q_start, num_queries, first_query, k_start, num_keys, first, last, low, high, num_tiles


@gluon.jit
def next_of(tile, turn, num_programs, STATIC: gl.constexpr):
    """Snake order"""
    pid = gl.program_id(0)
    odd = turn & 1
    return turn * num_programs + odd * (num_programs - 1 - pid) + (1 - odd) * pid


@gluon.jit
def producer(
    descs, rings, pointers, numbers, options: gl.constexpr,
):
    q_desc, k_desc, v_desc = descs
    q_bufs, k_bufs, v_bufs, tile_bufs, bars = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, turns = bars
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, out_ptr, lse_ptr = pointers
    num_tokens, num_seqs, num_slots, num_tiles, window_left, window_right, score_scale = numbers
    HAS_LEFT: gl.constexpr = options[0]
    HAS_RIGHT: gl.constexpr = options[1]
    GROUP: gl.constexpr = options[2]
    SLOTS: gl.constexpr = options[3]
    HEAD_DIM: gl.constexpr = options[4]
    BLOCK_N: gl.constexpr = options[5]
    STAGES: gl.constexpr = options[6]
    CONSUMERS: gl.constexpr = options[7]
    SCHEDULE: gl.constexpr = options[10]
    ZERO: gl.constexpr = options[11]
    HALF_Q: gl.constexpr = 64 // GROUP
    BLOCK_Q: gl.constexpr = HALF_Q * CONSUMERS

    num_programs = gl.num_programs(0)
    tile = gl.program_id(0)
    turn = tile * 0
    valid_turn = tile * 0
    count = tile * 0
    while tile < num_tiles:
        slot, q_start, num_queries, first_query, k_start, num_keys, first, last, low, high, n = locate(
            tile, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, num_slots, window_left, window_right,
            HAS_LEFT, HAS_RIGHT, BLOCK_Q, BLOCK_N,
        )
        if first_query < num_queries:
            kv_head = slot // SLOTS
            q_index = valid_turn % 2
            q_phase = (valid_turn // 2) & 1
            send(tile_bufs, t_full, t_empty, valid_turn, slot, q_start, num_queries, first_query, num_keys)
            for w in gl.static_range(CONSUMERS):
                b = q_index * CONSUMERS + w
                mbarrier.wait(q_empty.index(b), q_phase ^ 1)
                mbarrier.expect(q_full.index(b), 64 * HEAD_DIM * 2)
                tma.async_copy_global_to_shared(
                    q_desc, [q_start + first_query + w * HALF_Q, slot * GROUP, 0], q_full.index(b),
                    q_bufs.index(b)._reinterpret(q_desc.dtype, [HALF_Q, GROUP, HEAD_DIM], q_desc.layout),
                )
            for i in range(n):
                start = low + (n - 1 - i) * BLOCK_N
                s = count % STAGES
                phase = (count // STAGES) & 1
                mbarrier.wait(k_empty.index(s), phase ^ 1)
                mbarrier.expect(k_full.index(s), BLOCK_N * HEAD_DIM * 2)
                tma.async_copy_global_to_shared(
                    k_desc, [k_start + start, kv_head * HEAD_DIM], k_full.index(s), k_bufs.index(s)
                )
                mbarrier.wait(v_empty.index(s), phase ^ 1)
                mbarrier.expect(v_full.index(s), BLOCK_N * HEAD_DIM * 2)
                if ZERO:
                    rows = gl.minimum(num_keys - start, BLOCK_N)
                    tma.async_copy_global_to_shared(
                        v_desc, [k_start + start + rows, BLOCK_N - rows, kv_head * HEAD_DIM],
                        v_full.index(s),
                        v_bufs.index(s)._reinterpret(v_desc.dtype, [1, BLOCK_N, HEAD_DIM], v_desc.layout),
                    )
                else:
                    tma.async_copy_global_to_shared(
                        v_desc, [k_start + start, kv_head * HEAD_DIM], v_full.index(s), v_bufs.index(s)
                    )
                count += 1
            valid_turn += 1
        turn += 1
        if SCHEDULE == 2:
            tile = gl.atomic_add(counter_ptr, 1) + num_programs
        else:
            tile = next_of(tile, turn, num_programs, True)
    send(tile_bufs, t_full, t_empty, valid_turn, -1, 0, 0, 0, 0)


@gluon.jit
def put(bufs, index, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    bufs.index(index).store(gl.full([1], 0, gl.int32, layout) + value)


@gluon.jit
def get(bufs, index):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(bufs.index(index).load(layout), 0)


@gluon.jit
def send(bufs, t_full, t_empty, turn, slot, q_start, num_queries, first_query, num_keys):
    t = turn % 2
    mbarrier.wait(t_empty.index(t), ((turn // 2) & 1) ^ 1)
    put(bufs, t * 8, slot)
    put(bufs, t * 8 + 1, q_start)
    put(bufs, t * 8 + 2, num_queries)
    put(bufs, t * 8 + 3, first_query)
    put(bufs, t * 8 + 4, num_keys)
    mbarrier.arrive(t_full.index(t), count=1)


@gluon.jit
def receive(bufs, t_full, t_empty, turn):
    t = turn % 2
    mbarrier.wait(t_full.index(t), (turn // 2) & 1)
    slot = get(bufs, t * 8)
    q_start = get(bufs, t * 8 + 1)
    num_queries = get(bufs, t * 8 + 2)
    first_query = get(bufs, t * 8 + 3)
    num_keys = get(bufs, t * 8 + 4)
    mbarrier.arrive(t_empty.index(t), count=1)
    return slot, q_start, num_queries, first_query, num_keys


@gluon.jit
def mask_scores(
    score_MN, position_M, start, num_keys, window_left, window_right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):
    layout: gl.constexpr = score_MN.type.layout
    key_N = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    visible_MN = (key_N < num_keys)[None, :] & (position_M == position_M)[:, None]
    if HAS_LEFT:
        visible_MN = visible_MN & (key_N[None, :] >= (position_M - window_left)[:, None])
    if HAS_RIGHT:
        visible_MN = visible_MN & (key_N[None, :] <= (position_M + window_right)[:, None])
    return gl.where(visible_MN, score_MN, float("-inf"))


@gluon.jit
def softmax_of(score_MN, max_M, sum_M, score_scale):
    new_max_M = gl.maximum(max_M, gl.max(score_MN, 1))
    base_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M * score_scale)
    weight_MN = gl.exp2(score_MN * score_scale - base_M[:, None])
    shrink_M = gl.exp2(max_M * score_scale - base_M)
    sum_M = sum_M * shrink_M + gl.sum(weight_MN, 1)
    return weight_MN, new_max_M, sum_M, shrink_M


@gluon.jit
def attend_tiles(
    begin, end, count, last_start, q_smem, k_bufs, v_bufs, bars, weight_MN, acc_MD, max_M, sum_M,
    position_M, num_keys, window_left, window_right, score_scale, turn_count,
    which: gl.constexpr, MASKED: gl.constexpr, options: gl.constexpr,
):
    q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, turns = bars
    HAS_LEFT: gl.constexpr = options[0]
    HAS_RIGHT: gl.constexpr = options[1]
    HEAD_DIM: gl.constexpr = options[4]
    BLOCK_N: gl.constexpr = options[5]
    STAGES: gl.constexpr = options[6]
    OVERLAP: gl.constexpr = options[8]
    PINGPONG: gl.constexpr = options[9]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    for i in range(begin, end):
        c = count + i
        s = c % STAGES
        mbarrier.wait(k_full.index(s), (c // STAGES) & 1)
        if PINGPONG:
            mbarrier.wait(turns.index(which), ((c + turn_count) & 1) ^ (1 - which))
        nothing = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
        score = warpgroup_mma(
            q_smem, k_bufs.index(s).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        ps = (c - 1) % STAGES
        v_phase = ((c - 1) // STAGES) & 1
        mbarrier.wait(v_full.index(ps), v_phase)
        acc = warpgroup_mma(weight_MN, v_bufs.index(ps), acc_MD, is_async=True)
        if PINGPONG:
            mbarrier.arrive(turns.index(1 - which), count=1)
        if OVERLAP:
            score_MN = warpgroup_mma_wait(1, deps=[score])
        else:
            score_MN, acc_MD, weight_MN = warpgroup_mma_wait(0, deps=[score, acc, weight_MN])
        mbarrier.arrive(k_empty.index(s), count=1)
        if MASKED:
            score_MN = mask_scores(
                score_MN, position_M, last_start - i * BLOCK_N, num_keys, window_left, window_right,
                HAS_LEFT, HAS_RIGHT, BLOCK_N,
            )
        new_weight_MN, max_M, sum_M, shrink_M = softmax_of(score_MN, max_M, sum_M, score_scale)
        new_weight_MN = new_weight_MN.to(q_smem.dtype)
        if OVERLAP:
            # Passes at once. Without a branch here ptxas moves the exponentials behind the wait.
            mbarrier.wait(v_full.index(ps), v_phase)
            acc_MD, weight_MN = warpgroup_mma_wait(0, deps=[acc, weight_MN])
        mbarrier.arrive(v_empty.index(ps), count=1)
        acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, out_layout))[:, None]
        weight_MN = gl.convert_layout(new_weight_MN, weight_layout)
    return weight_MN, acc_MD, max_M, sum_M


@gluon.jit
def consumer(
    rings, pointers, numbers, which: gl.constexpr, options: gl.constexpr,
):
    q_bufs, k_bufs, v_bufs, tile_bufs, bars = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, turns = bars
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, out_ptr, lse_ptr = pointers
    num_tokens, num_seqs, num_slots, num_tiles, window_left, window_right, score_scale = numbers
    HAS_LEFT: gl.constexpr = options[0]
    HAS_RIGHT: gl.constexpr = options[1]
    GROUP: gl.constexpr = options[2]
    HEAD_DIM: gl.constexpr = options[4]
    BLOCK_N: gl.constexpr = options[5]
    STAGES: gl.constexpr = options[6]
    CONSUMERS: gl.constexpr = options[7]
    SCHEDULE: gl.constexpr = options[10]
    HALF_Q: gl.constexpr = 64 // GROUP
    BLOCK_Q: gl.constexpr = HALF_Q * CONSUMERS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    store_rows: gl.constexpr = gl.SliceLayout(1, store_layout)

    turn = gl.program_id(0) * 0
    count = turn
    slot, q_start, num_queries, first_query, num_keys = receive(tile_bufs, t_full, t_empty, turn)
    while slot >= 0:
        first, last, low, high, n = keys_of(
            num_queries, first_query, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT,
            BLOCK_Q, BLOCK_N,
        )
        if True:
            whole_low, whole_high = whole_tiles_g(
                first, last, low, high, num_keys, window_left, window_right,
                HAS_LEFT, HAS_RIGHT, BLOCK_N,
            )
            from_right = gl.minimum(gl.maximum(n - (whole_high - low) // BLOCK_N, 1), n)
            from_left = gl.minimum(gl.maximum(n - (whole_low - low) // BLOCK_N, from_right), n)
            last_start = low + (n - 1) * BLOCK_N

            b = (turn % 2) * CONSUMERS + which
            q_smem = q_bufs.index(b)
            row_M = gl.arange(0, 64, row_layout)
            query_M = first_query + which * HALF_Q + row_M // GROUP
            position_M = query_M + (num_keys - num_queries)
            max_M = gl.full([64], float("-inf"), gl.float32, row_layout)
            sum_M = gl.zeros([64], gl.float32, row_layout)

            mbarrier.wait(q_full.index(b), (turn // 2) & 1)
            s = count % STAGES
            mbarrier.wait(k_full.index(s), (count // STAGES) & 1)
            nothing = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
            score = warpgroup_mma(
                q_smem, k_bufs.index(s).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            score_MN = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(k_empty.index(s), count=1)
            score_MN = mask_scores(
                score_MN, position_M, last_start, num_keys, window_left, window_right,
                HAS_LEFT, HAS_RIGHT, BLOCK_N,
            )
            new_weight_MN, max_M, sum_M, shrink_M = softmax_of(score_MN, max_M, sum_M, score_scale)
            weight_MN = gl.convert_layout(new_weight_MN.to(q_smem.dtype), weight_layout)
            acc_MD = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
            # Steps of the first tiles take no part in taking turns.
            turn_count = 0 - turn - 1
            weight_MN, acc_MD, max_M, sum_M = attend_tiles(
                1, from_right, count, last_start, q_smem, k_bufs, v_bufs, bars, weight_MN, acc_MD,
                max_M, sum_M, position_M, num_keys, window_left, window_right, score_scale,
                turn_count, which, True, options,
            )
            weight_MN, acc_MD, max_M, sum_M = attend_tiles(
                from_right, from_left, count, last_start, q_smem, k_bufs, v_bufs, bars, weight_MN,
                acc_MD, max_M, sum_M, position_M, num_keys, window_left, window_right, score_scale,
                turn_count, which, False, options,
            )
            if HAS_LEFT:
                weight_MN, acc_MD, max_M, sum_M = attend_tiles(
                    from_left, n, count, last_start, q_smem, k_bufs, v_bufs, bars, weight_MN,
                    acc_MD, max_M, sum_M, position_M, num_keys, window_left, window_right,
                    score_scale, turn_count, which, True, options,
                )
            p = count + n - 1
            ps = p % STAGES
            mbarrier.wait(v_full.index(ps), (p // STAGES) & 1)
            acc = warpgroup_mma(weight_MN, v_bufs.index(ps), acc_MD, is_async=True)
            acc_MD, weight_MN = warpgroup_mma_wait(0, deps=[acc, weight_MN])
            mbarrier.arrive(v_empty.index(ps), count=1)
            count += n

            empty_M = sum_M == 0.0
            divisor_M = gl.where(empty_M, 1.0, sum_M)
            lse_M = gl.where(empty_M, float("-inf"), max_M * score_scale + gl.log2(divisor_M))
            token_M = (q_start + query_M).to(gl.int64)
            head_M = slot * GROUP + row_M % GROUP
            # 0.693... = ln 2: from base 2 to the natural log that callers expect.
            gl.store(
                lse_ptr + head_M.to(gl.int64) * num_tokens + token_M,
                lse_M * 0.6931471805599453, mask=query_M < num_queries,
            )
            inverse_M = gl.convert_layout(1.0 / divisor_M, gl.SliceLayout(1, out_layout))
            out_MD = (acc_MD * inverse_M[:, None]).to(q_smem.dtype)
            # The queries have been read: their buffer takes the output, for whole rows at a time.
            q_smem.store(out_MD)
            out_MD = q_smem.load(store_layout)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(b), count=1)
            row_M = gl.arange(0, 64, store_rows)
            query_M = first_query + which * HALF_Q + row_M // GROUP
            head_M = slot * GROUP + row_M % GROUP
            out_row_M = (q_start + query_M).to(gl.int64) * (num_slots * GROUP) + head_M
            dim_D = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, store_layout))
            gl.store(
                out_ptr + (out_row_M * HEAD_DIM)[:, None] + dim_D[None, :],
                out_MD,
                mask=(query_M < num_queries)[:, None] & (dim_D < HEAD_DIM)[None, :],
            )
        turn += 1
        slot, q_start, num_queries, first_query, num_keys = receive(
            tile_bufs, t_full, t_empty, turn
        )


@gluon.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_slots", "num_tiles", "window_left", "window_right"]
)
def varlen_attention_gluon_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr,
    num_tokens, num_seqs, num_slots, num_tiles, window_left, window_right, score_scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SLOTS_A_KEY_HEAD: gl.constexpr,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, OVERLAP: gl.constexpr, PINGPONG: gl.constexpr, SCHEDULE: gl.constexpr,
    ZERO: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_bufs = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, 64, HEAD_DIM], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    tile_bufs = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=CONSUMERS)
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    options: gl.constexpr = (
        HAS_LEFT, HAS_RIGHT, GROUP, SLOTS_A_KEY_HEAD, HEAD_DIM, BLOCK_N, STAGES, CONSUMERS,
        OVERLAP, PINGPONG, SCHEDULE, ZERO,
    )
    descs = (q_desc, k_desc, v_desc)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, turns)
    rings = (q_bufs, k_bufs, v_bufs, tile_bufs, bars)
    pointers = (cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, out_ptr, lse_ptr)
    numbers = (num_tokens, num_seqs, num_slots, num_tiles, window_left, window_right, score_scale)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consumer, (rings, pointers, numbers, gl.constexpr(0), options)),
                (producer, (descs, rings, pointers, numbers, options)),
            ],
            [1],
            [40],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (rings, pointers, numbers, gl.constexpr(0), options)),
                (consumer, (rings, pointers, numbers, gl.constexpr(1), options)),
                (producer, (descs, rings, pointers, numbers, options)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (rings, pointers, numbers, gl.constexpr(0), options)),
                (consumer, (rings, pointers, numbers, gl.constexpr(1), options)),
                (consumer, (rings, pointers, numbers, gl.constexpr(2), options)),
                (producer, (descs, rings, pointers, numbers, options)),
            ],
            [4, 4, 1],
            [152, 152, 40],
        )


class RowsBefore:
    """A tensor's rows from `rows` before its first one on: what a descriptor may start at."""

    def __init__(self, tensor, rows):
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr() - rows * tensor.stride(0) * tensor.element_size()

    def data_ptr(self):
        return self.address


def launch(
    q_THD, k_TKD, v_TKD, out_THD, lse_HT, cu_seqlens_q, cu_seqlens_k, *, window, scale,
    block_n=128, stages=2, consumers=2, overlap=True, pingpong=False, schedule=2, zero=True,
    packed=True, programs=1,
):
    """Programs: how many a multiprocessor, 0 for one a tile."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_TKD.shape
    group = num_heads // num_kv_heads
    pack = group if packed else 1
    num_seqs = cu_seqlens_q.shape[0] - 1
    q_THD, scale = positive_scale(q_THD, scale)
    num_slots = num_heads // pack
    half = 64 // pack
    num_tiles = (num_tokens // (half * consumers) + num_seqs) * num_slots
    rows_of = gl.NVMMASharedLayout(128, 16, 2)
    boxes_of = gl.NVMMASharedLayout(128, 16, 3)
    width = num_kv_heads * head_dim
    q_desc = TensorDescriptor(
        q_THD, [num_tokens, num_heads, head_dim], list(q_THD.stride()), [half, pack, head_dim], boxes_of
    )
    k_desc = TensorDescriptor(
        k_TKD, [num_keys, width], [k_TKD.stride(0), 1], [block_n, head_dim], rows_of
    )
    if zero:
        v_desc = TensorDescriptor(
            RowsBefore(v_TKD, block_n), [num_keys + block_n, block_n, width],
            [v_TKD.stride(0), v_TKD.stride(0), 1], [1, block_n, head_dim], boxes_of,
        )
    else:
        v_desc = TensorDescriptor(
            v_TKD, [num_keys, width], [v_TKD.stride(0), 1], [block_n, head_dim], rows_of
        )
    grid = num_tiles
    if programs:
        properties = torch.cuda.get_device_properties(q_THD.device)
        grid = min(num_tiles, programs * properties.multi_processor_count)
    counter = cu_seqlens_q
    if schedule == 2:
        counter = torch.zeros(1, dtype=torch.int32, device=q_THD.device)
    options = {} if programs < 2 else {"maxnreg": 128}
    with on_device_of(q_THD):
        return varlen_attention_gluon_kernel[(grid,)](
            q_desc, k_desc, v_desc, out_THD, lse_HT, cu_seqlens_q, cu_seqlens_k, counter,
            num_tokens, num_seqs, num_slots, num_tiles,
            score_scale=scale * LOG2_E,
            SLOTS_A_KEY_HEAD=group // pack, GROUP=pack, HEAD_DIM=head_dim, BLOCK_N=block_n,
            STAGES=stages, CONSUMERS=consumers, OVERLAP=overlap, PINGPONG=pingpong,
            SCHEDULE=schedule, ZERO=zero, num_warps=4, **window_arguments(window), **options,
        )
